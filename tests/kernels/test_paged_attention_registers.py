"""The decode kernel's inlined instructions, emulated for 128 threads, against what interpret mode computes instead."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from ptx_emulator import BF16, E4M3, Emulated, swizzled

from qjax.pallas_kernels import _paged_attention_combine_sm90 as combine_module
from qjax.pallas_kernels import _paged_attention_loads_sm90 as loads
from qjax.pallas_kernels import _paged_attention_mma_sm90 as mma
from qjax.pallas_kernels._paged_attention_registers_sm90 import Storage


@pytest.fixture
def emulated(monkeypatch):
    replacement = Emulated()
    monkeypatch.setattr(plgpu, "inline_mgpu", replacement)
    return replacement


STORAGES = [
    Storage(dtype, dim)
    for dtype, dims in {
        "bfloat16": (64, 80, 96, 128, 256),
        "float16": (64,),
        "float8_e4m3fn": (64, 80, 96, 128, 256),
        "float8_e5m2": (128,),
        "float4_e2m1fn": (64, 128),
    }.items()
    for dim in dims
]


def tile_of(rng, storage: Storage):
    """Random codes of a tile, and their scales."""
    if storage.bits == 4:
        codes = rng.integers(0, 256, (storage.tile, storage.dim // 2), np.uint8)
        scales = rng.uniform(0.01, 2, (storage.tile * storage.dim // 2048, 128))
        return codes, (scales.astype(E4M3),)
    values = rng.standard_normal((storage.tile, storage.dim), np.float32)
    return values.astype(jnp.dtype(storage.dtype)), ()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: f"{s.dtype}-{s.dim}")
def test_products(emulated, storage, turned):
    rng = np.random.default_rng(storage.dim)
    operand = jnp.dtype(storage.operand)
    tile, scales = tile_of(rng, storage)
    emulated.images[id(tile)] = swizzled(tile, storage.swizzle)
    query = jnp.asarray(rng.standard_normal((64, storage.dim), np.float32).astype(operand))
    mma.logits(query, tile, *scales, storage=storage, turned=turned)
    p = rng.uniform(0, 1, (64, storage.tokens // (1 + turned)))
    p, rescale = jnp.asarray(p.astype(operand)), rng.uniform(0, 1, 64).astype(np.float32)
    if turned:  # a warp's rows are alike
        rescale = np.repeat(rescale[:32].reshape(4, 1, 8), 16, axis=1).reshape(64, 8)
    rescale = jnp.asarray(rescale)
    out = rng.standard_normal((64, storage.dim // (1 + turned)), np.float32)
    out = jnp.asarray(out)
    for begin, end in ((-5, 1000), (3, storage.tile - 9)):
        mma.add_values(p, tile, out, rescale, begin, end, *scales, storage=storage, turned=turned)


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: f"{s.dtype}-{s.dim}")
def test_queries_and_merged_parts(emulated, storage):
    rng = np.random.default_rng(storage.dim)
    query = rng.standard_normal((2, 3, 10, storage.dim), np.float32).astype(BF16)
    for block in range(2):
        loads.queries(query, 1, 1, block, group=5, storage=storage)
    out = jnp.asarray(rng.standard_normal((64, storage.dim), np.float32))
    tile, _ = tile_of(rng, storage)
    for count in (1, 4, 8, 9, 16):
        rows = loads.merge_rows(count, storage.dim)
        loads.merge(out, tile, 1, rows=rows, storage=storage)
        if count <= 8:
            half = out[:, : storage.dim // 2]
            loads.merge(half, tile, 1, rows=rows, storage=storage, turned=True)


@pytest.mark.parametrize("page_size", [8, 16, 32, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_scales(emulated, dtype, page_size):
    rng, storage = np.random.default_rng(page_size), Storage(dtype, 128)
    table = rng.permutation(80).astype(np.int32).reshape(2, 40)
    table[1, 3] = -7
    options = dict(storage=storage, page_size=page_size)
    for shape in ((80, 3), (80, 3, page_size)):
        scales = rng.uniform(0.1, 1, shape).astype(np.float32)
        for tile, last_page in ((0, 39), (1, 39), (1, 5)):
            pages = loads.token_pages(table, 1, tile, last_page, **options)
            for turned in (False, True):
                found = loads.load_scales(scales, pages, 2, tile, **options, turned=turned)
                kinds = dict(storage=storage, per_token=len(shape) == 3, turned=turned)
                loads.spread_scales(found, **kinds)
                loads.largest_scale(found, lanes=len(shape) == 3)


def test_row_values(emulated):
    values = np.arange(40, dtype=np.float32)
    loads.row_values(values, 8, 1, repeat=-4, count=30)
    loads.row_values(values.astype(np.int32).reshape(5, 8), 8, 1, repeat=4, count=30)
    loads.row_values(values, 0, 0, repeat=2, count=7, turned=True)


def test_statistics(emulated):
    values = jnp.asarray(np.random.default_rng(0).standard_normal((64, 16), np.float32))
    for largest in (True, False):
        loads.over_tokens(values, largest=largest)
        loads.over_tokens(values, largest=largest, lanes=False)
    loads.repeat(values[:, :8], 32)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("rows", "blocks", "dim"), [(4, 1, 128), (8, 1, 80), (32, 2, 64)])
def test_combination(emulated, monkeypatch, with_sinks, rows, blocks, dim):
    rng = np.random.default_rng(rows)
    parts = rng.standard_normal((2, 3, 5, rows, dim), np.float32)
    log_sums = rng.uniform(-3, 3, (2, 3, 5, blocks, 64)).astype(np.float32)
    arrays = (rng.standard_normal(12, np.float32),) if with_sinks else ()
    monkeypatch.setattr(plgpu, "kernel", lambda *_, **__: lambda *args: args[0])
    captured = []
    monkeypatch.setattr(
        plgpu,
        "inline_mgpu",
        lambda **types: lambda fn: captured.append((fn, types)) or (lambda *args: None),
    )
    sinks = jnp.asarray(arrays[0]) if with_sinks else None
    combine_module.combine(
        jnp.asarray(parts), jnp.asarray(log_sums), sinks, group=4, out_dtype="float32"
    )
    ((fn, types),) = captured
    for block in range(blocks):
        emulated(**types)(fn)(parts, log_sums, 1, 2, block, *arrays)
