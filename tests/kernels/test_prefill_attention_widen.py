"""Prefill attention's widening of narrow tiles, its instructions emulated for 128 threads."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from ptx_emulator import E4M3, Emulated, swizzled

from qjax.pallas_kernels import _prefill_attention_widen_sm90 as widening
from qjax.pallas_kernels._paged_attention_registers_sm90 import Storage


@pytest.fixture
def emulated(monkeypatch):
    replacement = Emulated()
    monkeypatch.setattr(plgpu, "inline_mgpu", replacement)
    return replacement


@pytest.mark.parametrize(
    ("dtype", "dim", "tokens"),
    [
        ("float8_e4m3fn", 64, 128),
        ("float8_e4m3fn", 128, 128),
        ("float8_e5m2", 128, 64),
        ("float8_e4m3fn", 64, 64),
        ("float8_e4m3fn", 256, 64),
        ("float4_e2m1fn", 64, 128),
        ("float4_e2m1fn", 128, 128),
    ],
)
@pytest.mark.parametrize(("valid", "scaled"), [(None, True), (37, True), (37, False)])
def test_tiles(emulated, dtype, dim, tokens, valid, scaled):
    rng, storage = np.random.default_rng(dim + tokens), Storage(dtype, dim)
    blocks = None
    if storage.bits == 4:
        tile = rng.integers(0, 256, (tokens, dim // 2), np.uint8)
        blocks = rng.uniform(0.01, 2, (tokens * dim // 2048, 128)).astype(E4M3)
    else:
        tile = rng.standard_normal((tokens, dim), np.float32).astype(jnp.dtype(dtype))
    scale = rng.uniform(0.1, 1, 128).astype(np.float32)
    if valid is not None:  # what nobody wrote
        (tile if blocks is None else blocks.reshape(tokens, -1))[valid:] = jnp.nan
        scale[np.arange(128) % tokens >= valid] = np.nan
    target = np.zeros((tokens, dim), np.float16)
    emulated.images[id(tile)] = swizzled(tile, storage.swizzle)
    emulated.layouts[id(target)] = lambda written: swizzled(written, 128)
    if tokens == 64:  # both threads of a token have its scale
        scale[64:] = scale[:64]
    factor = jnp.asarray(scale) if scaled else None
    widening.widen(tile, target, valid, factor, blocks, storage=storage)


@pytest.mark.parametrize(("page_size", "tokens"), [(8, 128), (64, 128), (320, 64)])
@pytest.mark.parametrize("per_token", [False, True])
def test_scales_of_tokens(emulated, page_size, tokens, per_token):
    rng = np.random.default_rng(page_size)
    table = rng.permutation(80).astype(np.int32).reshape(2, 40)
    table[1, 3] = -7
    shape = (70, 3, page_size) if per_token else (70, 3)  # the table has pages past the pool's
    scales = rng.uniform(0.1, 1, shape).astype(np.float32)
    sizes = dict(tokens=tokens, page_size=page_size)
    for tile in (0, 1, 40):
        pages = widening.token_pages(table, 1, tile, **sizes)
        widening.token_scales(scales, pages, 2, tile, **sizes)
