"""Prefill attention: numbers, masks, ragged and paged sequences, garbage in unwritten memory, ptxas, and the GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import testing
from qjax.pallas_kernels._prefill_attention_plan_sm90 import TileConfig
from qjax.pallas_kernels.prefill_attention_sm90 import (
    choose_tile,
    paged_prefill_attention,
    prefill_attention,
    unsupported_reason,
)

TOLERANCE = 3e-3


def operands(batch, rows, keys, q_heads, kv_heads, dim, value_dim=None, dtype="bfloat16"):
    k = jax.random.split(jax.random.key(rows + dim), 3)
    return (
        jax.random.normal(k[0], (batch, rows, q_heads, dim), dtype),
        jax.random.normal(k[1], (batch, keys, kv_heads, dim), dtype),
        jax.random.normal(k[2], (batch, keys, kv_heads, value_dim or dim), dtype),
    )


def paged(key, value, lengths, page_size):
    """The same keys and values in shuffled pages; what no sequence has written is NaN."""
    batch, keys, heads, _ = key.shape
    count = -(-keys // page_size)
    table = jax.random.permutation(jax.random.key(7), batch * count + 3)[: batch * count]
    table = np.asarray(table.reshape(batch, count).astype(jnp.int32))
    pools = []
    for source in (key, value):
        pool = np.full((batch * count + 3, heads, page_size, source.shape[3]), np.nan, np.float32)
        for b in range(batch):
            for token in range(int(lengths[b])):
                page = table[b, token // page_size]
                pool[page, :, token % page_size] = np.asarray(source[b, token], np.float32)
        pools.append(jnp.asarray(pool, key.dtype))
    return *pools, jnp.asarray(table)


def reference(query, key, value, *, causal=True, options=None):
    """float32 softmax, one sequence and head at a time; rows past a sequence's queries are zeros."""
    options = options or {}
    query, key, value = (np.asarray(x, np.float32) for x in (query, key, value))
    (batch, rows, q_heads, dim), (keys, kv_heads) = query.shape, key.shape[1:3]
    out = np.zeros((batch, rows, q_heads, value.shape[3]), np.float32)
    window, cap, sinks = (options.get(k) for k in ("sliding_window", "logit_soft_cap", "sinks"))
    scale = options.get("scale", dim**-0.5)
    for b in range(batch):
        length = int(options["lengths"][b]) if "lengths" in options else keys
        count = int(options["query_lengths"][b]) if "query_lengths" in options else rows
        offset = int(options["query_offsets"][b]) if "query_offsets" in options else length - count
        position, token = offset + np.arange(count)[:, None], np.arange(length)[None]
        visible = np.full((count, length), True)
        if causal:
            visible &= token <= position
        if window is not None:
            visible &= token > position - window
        for n in range(q_heads):
            head = n // (q_heads // kv_heads)
            logits = query[b, :count, n] @ key[b, :length, head].T * scale
            if cap is not None:
                logits = cap * np.tanh(logits / cap)
            logits = np.where(visible, logits, -np.inf)
            sink = -np.inf if sinks is None else float(sinks[n])
            top = np.maximum(logits.max(axis=1, initial=-1e30, keepdims=True), sink)
            weights = np.exp(logits - top)
            total = weights.sum(axis=1, keepdims=True) + np.exp(sink - top)
            weights = np.where(visible.any(axis=1, keepdims=True), weights / total.clip(1e-30), 0)
            out[b, :count, n] = weights @ value[b, :length, head]
    return out


def relative_error(out, expected, query_lengths=None):
    out = np.asarray(out, np.float32)
    assert out.shape == expected.shape
    if query_lengths is not None:  # the other rows mean nothing
        real = np.arange(out.shape[1])[None] < np.asarray(query_lengths)[:, None]
        out = np.where(real[..., None, None], out, 0)
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


def ints(*numbers):
    return jnp.array(numbers, jnp.int32)


CASES = {
    "causal": ((1, 256, 256, 2, 1, 128), {}),
    "full": ((1, 128, 384, 1, 1, 64), {"causal": False}),
    # Aligned at the end; neither queries nor keys fill their tiles.
    "chunk": ((1, 72, 300, 2, 2, 64), {}),
    "float16": ((1, 128, 128, 1, 1, 128, None, "float16"), {"scale": 0.2}),
    "head 96": ((1, 136, 200, 1, 1, 96), {}),
    "head 256": ((1, 128, 200, 1, 1, 256), {}),
    "latent": ((1, 130, 130, 1, 1, 192, 128), {}),
    "window": ((1, 256, 640, 1, 1, 64), {"sliding_window": 150}),
    "narrow window": ((1, 128, 512, 1, 1, 64), {"sliding_window": 1}),
    "soft cap": ((1, 128, 256, 1, 1, 64), {"logit_soft_cap": 2.0, "scale": 1.0}),
    "sinks": ((1, 128, 128, 2, 1, 64), {"sinks": jnp.array([2.0, -3.0])}),
    "ragged": (
        (3, 136, 300, 2, 1, 64),
        {"lengths": ints(300, 0, 129), "query_lengths": ints(136, 5, 1)},
    ),
    "offsets": (
        (2, 128, 300, 1, 1, 64),
        {
            "lengths": ints(260, 40),
            "query_offsets": ints(100, 0),
            "query_lengths": ints(128, 40),
            "sliding_window": 70,
            "sinks": jnp.array([0.5]),
        },
    ),
    "ragged full": ((2, 64, 256, 1, 1, 64), {"lengths": ints(7, 200), "causal": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_numbers(case):
    sizes, options = CASES[case]
    args = operands(*sizes)
    with testing.interpret():
        out = prefill_attention(*args, num_sms=3, **options)
    expected = reference(*args, causal=options.get("causal", True), options=options)
    assert out.dtype == args[0].dtype
    assert relative_error(out, expected, options.get("query_lengths")) <= TOLERANCE


@pytest.mark.parametrize(
    ("page_size", "dim"), [(16, 64), (64, 128), (128, 64), (128, 256)], ids=str
)
def test_pages(page_size, dim):
    """Chunks after prefixes of other lengths, the memory past them NaN."""
    query, key, value = operands(2, 72, 300, 2, 1, dim)
    options = {"lengths": ints(290, 73), "query_lengths": ints(72, 40)}
    key_pages, value_pages, table = paged(key, value, options["lengths"], page_size)
    with testing.interpret():
        out = paged_prefill_attention(
            query,
            key_pages,
            value_pages,
            table,
            options["lengths"],
            query_lengths=options["query_lengths"],
            num_sms=3,
        )
    expected = reference(query, key, value, options=options)
    assert relative_error(out, expected, options["query_lengths"]) <= TOLERANCE


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def narrow_operands(lengths, kv_heads, page_size, dim, dtype, scales):
    """Pools of narrow pages and their scales, what no sequence has written NaN; and keys and values [B, S, K, H]."""
    rng = np.random.default_rng(page_size + dim)
    batch, count = len(lengths), -(-max(lengths) // page_size)
    pool = batch * count + 3
    table = rng.permutation(pool)[: batch * count].reshape(batch, count).astype(np.int32)
    written = np.zeros((pool, 1, page_size), bool)
    for row, length in zip(table, lengths, strict=True):
        written[row, 0] = (np.arange(count * page_size) < length).reshape(count, page_size)
    shape, arrays, dense = (pool, kv_heads, page_size), {}, []
    for name in ("key", "value"):
        if dtype == "nvfp4":
            codes = rng.integers(0, 256, (*shape, dim // 2), np.uint8)
            block = rng.uniform(2**-6, 0.5, (*shape, dim // 16)).astype(np.float32)
            block = np.where(written[..., None], block, np.nan).astype(jnp.float8_e4m3fn)
            numbers = E2M1[np.stack([codes % 16, codes // 16], axis=-1).reshape(*shape, dim)]
            numbers = numbers * np.repeat(block.astype(np.float32), 16, axis=3)
            arrays[f"{name}_block_scale"] = block
        else:
            numbers = rng.standard_normal((*shape, dim), np.float32)
            codes = np.where(written[..., None], numbers, np.nan).astype(jnp.dtype(dtype))
            numbers = codes.astype(np.float32)
        kinds = {"head": shape[1:2], "page": shape[:2], "alike": shape[:2], "token": shape}
        scale_shape = kinds[scales]
        low, high = (0.5, 1.5) if scales == "head" or name == "key" else (1e-6, 2e-4)
        scale = rng.uniform(low, high, scale_shape).astype(np.float32)
        if scales == "alike":
            scale[:] = scale[0]
        if scales == "token":
            scale = np.where(written, scale, np.nan)
        spread = scale.reshape(
            {"head": (1, -1, 1, 1), "token": (*shape, 1)}.get(scales, (*shape[:2], 1, 1))
        )
        found = np.moveaxis((numbers * spread)[table], 3, 2)
        dense.append(np.nan_to_num(found.reshape(batch, count * page_size, kv_heads, dim)))
        arrays |= {f"{name}_pages": codes, f"{name}_scale": scale}
    return {k: jnp.asarray(v) for k, v in arrays.items()} | {
        "page_table": jnp.asarray(table)
    }, dense


NARROW_CASES = [
    ("float8_e4m3fn", 32, 128, "head"),
    ("float8_e5m2", 128, 64, "page"),
    ("float8_e4m3fn", 64, 256, "token"),
    ("float8_e4m3fn", 16, 64, "token"),
    ("float8_e5m2", 192, 128, "alike"),
    ("nvfp4", 16, 128, "head"),
    ("nvfp4", 32, 64, "alike"),
    ("nvfp4", 256, 128, "page"),
]


@pytest.mark.parametrize(("dtype", "page_size", "dim", "scales"), NARROW_CASES)
def test_narrow_pages(dtype, page_size, dim, scales):
    query = operands(2, 40, 8, 2, 2, dim)[0]
    options = {"lengths": ints(190, 43), "query_lengths": ints(40, 17)}
    pages, dense = narrow_operands((190, 43), 2, page_size, dim, dtype, scales)
    with testing.interpret():
        out = paged_prefill_attention(query, **pages, **options, num_sms=3)
    expected = reference(query, *dense, options=options)
    assert out.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert relative_error(out, expected, options["query_lengths"]) <= TOLERANCE


def test_garbage_past_the_end_stays_out():
    query, key, value = operands(1, 64, 256, 1, 1, 64)
    key, value = (x.at[:, 70:].set(jnp.nan) for x in (key, value))
    with testing.interpret():
        out = prefill_attention(query, key, value, lengths=ints(70), num_sms=1)
    expected = reference(query, key[:, :70], value[:, :70])
    assert relative_error(out, expected) <= TOLERANCE


def test_one_cta_or_many_give_the_same():
    """Every order of the work: sections of heads, odd and even rounds, a last round that is not full."""
    args = operands(2, 256, 256, 3, 3, 64)
    outs = []
    for ctas in (1, 5, 12):
        with testing.interpret(detect_races=False):
            outs.append(np.asarray(prefill_attention(*args, num_sms=ctas), np.float32))
    assert relative_error(outs[0], reference(*args)) <= TOLERANCE
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


def test_tiles_fit_shared_memory():
    assert choose_tile(128, 128) == TileConfig(
        keys=128, stages=2, separate_output=True, overlap=True
    )
    assert choose_tile(192, 128) == TileConfig(
        keys=96, stages=2, separate_output=True, overlap=True
    )
    assert choose_tile(192, 128, page_size=64) == TileConfig(
        keys=64, stages=2, separate_output=True, overlap=True
    )
    assert choose_tile(128, 128, page_size=320) == TileConfig(
        keys=64, stages=2, separate_output=True, overlap=True
    )
    assert choose_tile(256, 256) == TileConfig(
        keys=64, stages=2, separate_output=False, overlap=True
    )
    assert choose_tile(192, 128).smem_bytes(192, 128) == 204800


def test_bad_arguments_are_named():
    query, key, value = operands(1, 64, 64, 2, 1, 64)
    with pytest.raises(ValueError, match=r"value must be bfloat16 \[1, 64, 1, 64\]; found float16"):
        prefill_attention(query, key, value.astype(jnp.float16))
    with pytest.raises(ValueError, match=r"lengths must be int32 \[1\]; found int32 \[2\]"):
        prefill_attention(query, key, value, lengths=ints(1, 2), num_sms=1)
    with pytest.raises(ValueError, match="sliding_window must be positive and needs causal"):
        prefill_attention(query, key, value, causal=False, sliding_window=4, num_sms=1)
    with pytest.raises(ValueError, match="scale must be positive; found -1"):
        prefill_attention(query, key, value, scale=-1.0, num_sms=1)
    with pytest.raises(ValueError, match=r"page_table must be int32 \[1, 4\]"):
        pages = jnp.zeros((4, 1, 16, 64), jnp.bfloat16)
        table = jnp.zeros((2, 4), jnp.int32)
        paged_prefill_attention(query, pages, pages, table, ints(64), num_sms=1)
    assert unsupported_reason(32, 8, 128, 128, page_size=64) is None
    assert "must divide" in unsupported_reason(30, 8, 128, 128)
    assert "(80, 80)" in unsupported_reason(32, 8, 80, 80)
    assert "found 24" in unsupported_reason(32, 8, 128, 128, page_size=24)
    assert "found float32" in unsupported_reason(32, 8, 128, 128, dtype="float32")


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
def test_ptxas_neither_spills_nor_serializes():
    jobs = []
    every = {"lengths": ints(9), "sliding_window": 99, "logit_soft_cap": 30.0}
    for dim, value_dim in ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256)):
        args = operands(1, 256, 256, 2, 1, dim, value_dim)
        for options in ({"causal": False}, every) if dim == 128 == value_dim else (every,):
            jobs.append((lambda *a, o=options: prefill_attention(*a, num_sms=132, **o), args))
    for page_size in (16, 128):
        query, key, value = operands(1, 256, 256, 2, 1, 128)
        args = (query, *paged(key, value, ints(0), page_size), ints(0))
        jobs.append((lambda *a: paged_prefill_attention(*a, num_sms=132), args))
    for dtype, page_size, dim, scales in (NARROW_CASES[i] for i in (0, 2, 3, 5, 7)):
        pages, _ = narrow_operands((9,), 1, page_size, dim, dtype, scales)
        names, query = list(pages), operands(1, 256, 8, 2, 1, dim)[0]

        def call(query, lengths, *values, names=names):
            pages = dict(zip(names, values, strict=True))
            return paged_prefill_attention(query, lengths=lengths, **pages, num_sms=132)

        jobs.append((call, (query, ints(9), *pages.values())))
    for (report,) in testing.ptxas_reports(jobs):
        report.check()
        assert report.stack_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gpu_matches_the_reference(dims, dtype):
    args = operands(2, 520, 1000, 4, 2, *dims, dtype)
    for options in (
        {},
        {"causal": False},
        {"lengths": ints(1000, 333), "query_lengths": ints(520, 333)},
        {"sliding_window": 300, "logit_soft_cap": 20.0, "sinks": jnp.linspace(-1, 1, 4)},
    ):
        out = jax.jit(lambda *a, o=options: prefill_attention(*a, **o))(*args)
        expected = reference(*args, causal=options.get("causal", True), options=options)
        assert relative_error(out, expected, options.get("query_lengths")) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_gpu_reads_pages(page_size, dtype):
    query, key, value = operands(2, 256, 900, 4, 2, 128)
    key, value = key.astype(dtype), value.astype(dtype)
    options = {"lengths": ints(890, 200), "query_lengths": ints(256, 199)}
    pages = paged(key, value, options["lengths"], page_size)
    out = jax.jit(paged_prefill_attention)(
        query, *pages, options["lengths"], query_lengths=options["query_lengths"]
    )
    expected = reference(query, key, value, options=options)
    assert relative_error(out, expected, options["query_lengths"]) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "page_size", "dim", "scales"), NARROW_CASES)
def test_gpu_reads_narrow_pages(dtype, page_size, dim, scales):
    query = operands(2, 256, 8, 4, 2, dim)[0]
    options = {"lengths": ints(890, 200), "query_lengths": ints(256, 199)}
    pages, dense = narrow_operands((890, 200), 2, page_size, dim, dtype, scales)
    out = jax.jit(paged_prefill_attention)(query, **pages, **options)
    expected = reference(query, *dense, options=options)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert relative_error(out, expected, options["query_lengths"]) <= TOLERANCE
