"""Decode over pages of latents: numbers, splits, ragged lengths, garbage in unwritten memory, ptxas, and the GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import testing
from qjax.pallas_kernels import mla_decode_fp8_sm90, mla_decode_sm90
from qjax.pallas_kernels.mla_decode_fp8_sm90 import mla_decode_fp8_attention
from qjax.pallas_kernels.mla_decode_sm90 import (
    choose_splits,
    mla_decode_attention,
    unsupported_reason,
)

TOLERANCE = 3e-3
SCALE = 0.06


def operands(lengths, heads, page_size, max_len=None):
    """Queries, shuffled pages (NaN where no sequence has written), the table and lengths."""
    lengths = np.asarray(lengths, np.int32)
    batch, steps = lengths.shape
    count = -(-(max_len or lengths.max()) // page_size)
    rng = np.random.default_rng(heads + page_size)
    table = rng.permutation(batch * count + 3)[: batch * count].reshape(batch, count)
    pool = np.full((batch * count + 3, page_size, 576), np.nan, np.float32)
    for row, length in zip(table, lengths[:, -1], strict=True):
        for i, page in enumerate(row):
            written = int(np.clip(length - i * page_size, 0, page_size))
            pool[page, :written] = rng.standard_normal((written, 576))
    query = jnp.asarray(rng.standard_normal((batch, steps, heads, 576)), jnp.bfloat16)
    pages = jnp.asarray(pool, jnp.bfloat16)
    return query, pages, jnp.asarray(table, jnp.int32), jnp.asarray(lengths)


def quantized(args):
    """The operands with pages of E4M3 codes, scales of 128 columns and rotated columns; and what they stand for."""
    query, pages, table, lengths = args
    latents = np.asarray(pages[..., :512], np.float32)
    blocks = latents.reshape(*latents.shape[:2], 4, 128)
    scales = (
        np.abs(blocks).max(axis=-1) / np.float32(448) * np.float32([1, 0.3, 1, 1])
    )  # some saturate
    codes = jnp.asarray(np.clip(blocks / scales[..., None], -448, 448), jnp.float8_e4m3fn)
    kept = np.asarray(codes, np.float32) * scales[..., None]
    kept = jnp.asarray(kept.reshape(latents.shape))
    pools = (codes.reshape(latents.shape), jnp.asarray(scales), pages[..., 512:])
    plain = (
        query,
        jnp.concatenate([kept, pages[..., 512:].astype(jnp.float32)], axis=-1),
        table,
        lengths,
    )
    return (query, *pools, table, lengths), plain


def reference(query, pages, table, lengths):
    """float32 softmax of one query and sequence at a time, and the logarithms of its denominators."""
    query, pages, table = (np.asarray(x, np.float32) for x in (query, pages, table))
    out = np.zeros((*query.shape[:3], 512), np.float32)
    logs = np.full(query.shape[:3], -np.inf, np.float32)
    for b, t in np.ndindex(*query.shape[:2]):
        length = int(lengths[b, t])
        if length:
            latents = pages[table[b].astype(int)].reshape(-1, 576)[:length]
            logits = query[b, t] @ latents.T * SCALE
            top = logits.max(axis=1, keepdims=True)
            weights = np.exp(logits - top)
            total = weights.sum(axis=1, keepdims=True)
            out[b, t] = weights / total @ latents[:, :512]
            logs[b, t] = (top + np.log(total))[:, 0]
    return out, logs


LOGS_TOLERANCE = {
    "bf16": 1e-4,
    "fp8": 2e-3,
}  # code * scale is rounded to float16: 3e-4 of a logit of one token


def check(found, args, latents="bf16"):
    (out, logs), (expected, expected_logs) = found, reference(*args)
    assert out.dtype == jnp.bfloat16
    out = np.asarray(out, np.float32)
    assert np.linalg.norm(out - expected) <= TOLERANCE * np.linalg.norm(expected)
    tolerance = LOGS_TOLERANCE[latents]
    np.testing.assert_allclose(logs, expected_logs, rtol=1e-4, atol=tolerance)
    assert not out[np.asarray(args[3]) == 0].any()


CASES = [
    # lengths, heads, page size, splits
    ([[200], [0]], 16, 64, 1),
    ([[300], [1]], 72, 128, 2),
    ([[64, 65], [0, 1]], 48, 16, 1),
    ([[199, 200]], 64, 32, 3),
]


@pytest.mark.parametrize(("lengths", "heads", "page_size", "splits"), CASES, ids=str)
def test_numbers(lengths, heads, page_size, splits):
    args = operands(lengths, heads, page_size)
    with testing.interpret():
        found = mla_decode_attention(*args, scale=SCALE, splits=splits)
    check(found, args)


FP8_CASES = [
    ([[200], [0]], 16, 64, 1),
    ([[130, 131], [1, 2]], 40, 128, 2),
    ([[320]], 72, 64, 1),
]


@pytest.mark.parametrize(("lengths", "heads", "page_size", "splits"), FP8_CASES, ids=str)
def test_numbers_of_fp8_latents(lengths, heads, page_size, splits):
    args, plain = quantized(operands(lengths, heads, page_size))
    with testing.interpret():
        found = mla_decode_fp8_attention(*args, scale=SCALE, splits=splits)
    check(found, plain, "fp8")


def test_splits_past_the_end_add_nothing():
    args = operands([[70]], 8, 64, max_len=256)
    with testing.interpret():
        found = mla_decode_attention(*args, scale=SCALE, splits=4)
    check(found, args)


def test_splits_fill_the_sms():
    assert choose_splits(256, 4096, num_sms=132) == 1
    assert choose_splits(64, 16384, num_sms=132) == 2
    assert 8 <= choose_splits(2, 4096, num_sms=132) <= 64


def test_bad_arguments_are_named():
    query, pages, table, lengths = operands([[9]], 16, 16)
    with pytest.raises(ValueError, match=r"lengths must be int32 \[1, 1\]; found int32 \[1\]"):
        mla_decode_attention(query, pages, table, lengths[0], scale=1.0)
    with pytest.raises(ValueError, match="must be bfloat16; found bfloat16 and float16"):
        mla_decode_attention(query, pages.astype(jnp.float16), table, lengths, scale=1.0)
    with pytest.raises(ValueError, match="scale must be positive; found -1"):
        mla_decode_attention(query, pages, table, lengths, scale=-1.0)
    assert unsupported_reason(128, 576, 512, 64) is None
    assert "found 24" in unsupported_reason(128, 576, 512, 24)
    assert "found 320 and 256" in unsupported_reason(128, 320, 256, 64)
    assert "found 9 of 16 heads" in unsupported_reason(16, 576, 512, 64, queries=9)


def test_bad_fp8_latents_are_named():
    (query, codes, scales, rotated, table, lengths), _ = quantized(operands([[9]], 16, 64))
    rest = (table, lengths)
    with pytest.raises(
        ValueError, match=r"scale_pages must be float32 \[4, 64, 4\]; found float32"
    ):
        mla_decode_fp8_attention(query, codes, scales[..., :1], rotated, *rest, scale=1.0)
    with pytest.raises(ValueError, match="codes must be float8_e4m3fn; found float8_e5m2"):
        e5m2 = codes.astype(jnp.float8_e5m2)
        mla_decode_fp8_attention(query, e5m2, scales, rotated, *rest, scale=1.0)
    assert "found 32" in mla_decode_fp8_sm90.unsupported_reason(128, 576, 512, 32)


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
def test_ptxas_neither_spills_nor_serializes():
    jobs = []
    for lengths, heads, page_size, splits in [([[1]], 128, 64, 1), ([[1, 2]], 16, 16, 4)]:
        args = operands(lengths, heads, page_size)
        jobs.append((lambda *a, s=splits: mla_decode_attention(*a, scale=1.0, splits=s), args))
        args, _ = quantized(operands(lengths, heads, 64))
        jobs.append((lambda *a, s=splits: mla_decode_fp8_attention(*a, scale=1.0, splits=s), args))
    for i, reports in enumerate(testing.ptxas_reports(jobs)):
        for report in reports:
            report.check()
            assert report.stack_bytes == 0
        report = reports[0]  # what combines splits follows
        producer, math = mla_decode_fp8_sm90.REGISTERS if i % 2 else mla_decode_sm90.REGISTERS
        assert producer + 2 * math <= 3 * report.registers  # what setmaxnreg hands out


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [None, 1, 5])
@pytest.mark.parametrize(("heads", "page_size"), [(128, 64), (16, 16), (64, 128), (40, 32)])
def test_gpu_matches_the_reference(heads, page_size, splits):
    args = operands([[1999, 2000], [0, 1], [777, 778]], heads, page_size)
    found = jax.jit(lambda *a: mla_decode_attention(*a, scale=SCALE, splits=splits))(*args)
    check(found, args)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [None, 1, 5])
@pytest.mark.parametrize(("heads", "page_size"), [(128, 64), (16, 64), (40, 128)])
def test_gpu_matches_the_reference_on_fp8_latents(heads, page_size, splits):
    args, plain = quantized(operands([[1999, 2000], [0, 1], [777, 778]], heads, page_size))
    call = jax.jit(lambda *a: mla_decode_fp8_attention(*a, scale=SCALE, splits=splits))
    check(call(*args), plain, "fp8")
