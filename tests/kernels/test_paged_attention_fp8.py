"""Decode attention over paged FP8 caches: numbers, masks, garbage in unwritten memory, ptxas, and the GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import testing
from qjax.pallas_kernels.paged_attention_fp8_sm90 import (
    choose_splits,
    paged_decode_attention,
    unsupported_reason,
)

TOLERANCE = 3e-3


def operands(lengths, *, q_heads, kv_heads, dim, page, table_pages, dtype="float8_e4m3fn"):
    """A pool of shuffled pages; what no sequence has written is NaN."""
    keys = jax.random.split(jax.random.key(dim + page), 6)
    batch, pool = len(lengths), len(lengths) * table_pages + 3
    query = jax.random.normal(keys[0], (batch, q_heads, dim), jnp.bfloat16)
    table = jax.random.permutation(keys[1], pool)[: batch * table_pages]
    table = table.reshape(batch, table_pages).astype(jnp.int32)
    written = np.zeros((pool, page), bool)
    for row, length in zip(np.asarray(table), lengths, strict=True):
        written[row] = (np.arange(table_pages * page) < length).reshape(table_pages, page)
    pages = []
    for key in keys[2:4]:
        values = jax.random.normal(key, (pool, kv_heads, page, dim))
        pages.append(jnp.where(written[:, None, :, None], values, jnp.nan).astype(dtype))
    scales = (jax.random.uniform(key, (kv_heads,), minval=0.5, maxval=1.5) for key in keys[4:])
    return query, *pages, table, jnp.asarray(lengths, jnp.int32), *scales


def reference(
    query,
    key_pages,
    value_pages,
    table,
    lengths,
    key_scale,
    value_scale,
    *,
    window=None,
    sinks=None,
):
    """float32 softmax over each sequence's tokens, one sequence and head at a time."""
    batch, q_heads, dim = query.shape
    kv_heads, page = key_pages.shape[1:3]
    out = np.zeros(query.shape, np.float32)
    keys, values = (np.asarray(p, np.float32) for p in (key_pages, value_pages))
    for b in range(batch):
        length = int(lengths[b])
        first = 0 if window is None else max(length - window, 0)
        tokens = np.arange(first, length)
        numbers = np.asarray(table)[b, tokens // page]
        for n in range(q_heads):
            head = n // (q_heads // kv_heads)
            k = keys[numbers, head, tokens % page] * float(key_scale[head])
            v = values[numbers, head, tokens % page] * float(value_scale[head])
            logits = k @ np.asarray(query[b, n], np.float32) * dim**-0.5
            if sinks is not None:
                logits = np.append(logits, float(sinks[n]))
                v = np.concatenate([v, np.zeros((1, dim), np.float32)])
            if len(logits):
                weights = np.exp(logits - logits.max())
                out[b, n] = weights / weights.sum() @ v
    return out


def attend(args, **options):
    *arrays, key_scale, value_scale = args
    return paged_decode_attention(*arrays, key_scale=key_scale, value_scale=value_scale, **options)


def relative_error(out, expected):
    return np.linalg.norm(np.asarray(out, np.float32) - expected) / np.linalg.norm(expected)


CASES = [
    # Groups of 4, pages smaller than a tile, short last tile.
    (
        dict(lengths=[130, 37], q_heads=4, kv_heads=1, dim=128, page=16, table_pages=9),
        {"splits": 1},
    ),
    # Groups of 16 and e5m2; more splits than tiles.
    (
        dict(
            lengths=[250],
            q_heads=16,
            kv_heads=1,
            dim=64,
            page=64,
            table_pages=4,
            dtype="float8_e5m2",
        ),
        {"splits": 3},
    ),
    # Window and sinks; no token, one token; pages larger than a tile.
    (
        dict(lengths=[0, 1, 200], q_heads=2, kv_heads=1, dim=128, page=128, table_pages=2),
        {"splits": 2, "sliding_window": 70, "sinks": jnp.array([0.5, -1.0])},
    ),
    (dict(lengths=[70], q_heads=24, kv_heads=2, dim=64, page=8, table_pages=12), {"splits": 1}),
]


@pytest.mark.parametrize(("sizes", "options"), CASES, ids=["gqa", "e5m2", "window", "small-pages"])
def test_numbers(sizes, options):
    args = operands(**sizes)
    with testing.interpret():
        out = attend(args, **options)
    expected = reference(*args, window=options.get("sliding_window"), sinks=options.get("sinks"))
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, expected) <= TOLERANCE
    empty = np.asarray(args[4]) == 0
    assert (np.asarray(out, np.float32)[empty] == 0).all()


def test_splits_fill_the_gpu_and_stay_worthwhile():
    assert choose_splits(1, 8, 131072, num_sms=132) == 50
    assert choose_splits(128, 8, 8192, num_sms=132) == 1
    assert choose_splits(1, 8, 1024, num_sms=132) == 2
    assert choose_splits(1, 8, 64, num_sms=132) == 1


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
def test_ptxas_neither_spills_nor_serializes():
    jobs = []
    for dim, page, q_heads, kv_heads in (
        (128, 64, 32, 8),
        (128, 16, 64, 8),
        (64, 32, 9, 3),
        (128, 128, 64, 1),
    ):
        args = operands([1], q_heads=q_heads, kv_heads=kv_heads, dim=dim, page=page, table_pages=8)
        jobs.append((lambda *args: attend(args, num_sms=132, sliding_window=99), args))
    for (report,) in testing.ptxas_reports(jobs):
        report.check()
        assert report.stack_bytes == 0


def test_bad_arguments_are_named():
    args = list(operands([9], q_heads=4, kv_heads=2, dim=64, page=16, table_pages=2))
    with pytest.raises(ValueError, match=r"key_scale must be float32 \[2\]; found float32\[1\]"):
        attend([*args[:5], jnp.ones(1), args[6]])
    with pytest.raises(ValueError, match=r"lengths must be int32 \[1\]"):
        attend([*args[:4], jnp.zeros(2, jnp.int32), *args[5:]])
    with pytest.raises(ValueError, match=r"pages must be one of .* found bfloat16"):
        attend([args[0], args[1].astype(jnp.bfloat16), *args[2:]])
    assert unsupported_reason(32, 8, 128, 64) is None
    assert "head_dim must be 64 or 128; found 80" in unsupported_reason(32, 8, 80, 64)
    assert "page_size" in unsupported_reason(32, 8, 128, 24)
    assert "must divide" in unsupported_reason(30, 8, 128, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [16, 64, 128])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(32, 8), (64, 8), (8, 8)])
def test_gpu_matches_the_reference(page, q_heads, kv_heads):
    lengths = [1, 0, 1000, 4096, 777, 64, 63, 65]
    args = operands(
        lengths, q_heads=q_heads, kv_heads=kv_heads, dim=128, page=page, table_pages=4096 // page
    )
    for options in (
        {},
        {"splits": 1},
        {"sliding_window": 300, "sinks": jnp.linspace(-1, 1, q_heads)},
    ):
        out = jax.jit(lambda *args, o=options: attend(args, **o))(*args)
        expected = reference(
            *args, window=options.get("sliding_window"), sinks=options.get("sinks")
        )
        assert relative_error(out, expected) <= TOLERANCE
