"""The indexer's logits: numbers, ranges, pages, garbage past a sequence's end, shares of work, ptxas, and the GPU."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from ptx_emulator import Emulated

from qjax import testing
from qjax.pallas_kernels import _mqa_logits_registers_sm90 as registers
from qjax.pallas_kernels._mqa_logits_plan_sm90 import SMEM_BYTES, Plan, choose_tiles, schedule
from qjax.pallas_kernels.mqa_logits_sm90 import mqa_logits, paged_mqa_logits, unsupported_reason

F8, F32, I32 = jnp.float8_e4m3fn, jnp.float32, jnp.int32
TOLERANCE = 1e-5
GPU_TOLERANCE = 2e-3  # the tensor cores keep fewer bits of FP8 products' sums


def vectors(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), F8)


def operands(queries, heads, dim, keys):
    """Random data, and ranges of all kinds: empty ones, whole ones, and some that leave 0..T."""
    rng = np.random.default_rng(queries + keys)
    start = rng.integers(-2, keys, queries)
    end = np.minimum(start + rng.integers(-3, keys, queries), keys + 2)
    start[0], end[0] = 0, keys
    return (
        vectors(rng, queries, heads, dim),
        jnp.asarray(rng.standard_normal((queries, heads)), F32),
        vectors(rng, keys, dim),
        jnp.asarray(rng.uniform(0.1, 2, keys), F32),
        jnp.asarray(start, I32),
        jnp.asarray(end, I32),
    )


def reference(query, weights, keys, scale, start, end):
    query, keys = (np.asarray(x, np.float32) for x in (query, keys))
    weights, scale = np.asarray(weights), np.asarray(scale)
    out = np.full((query.shape[0], keys.shape[0]), -np.inf, np.float32)
    for s, row in enumerate(out):
        seen = slice(max(int(start[s]), 0), max(int(end[s]), 0))
        row[seen] = weights[s] @ np.maximum(query[s] @ keys[seen].T * scale[seen], 0)
    return out


def paged_operands(lengths, queries, heads, dim, page_size, pages):
    """Shuffled pages with NaN where nothing was written, and page numbers far out of range past the lengths."""
    batch, total = len(lengths), len(lengths) * pages + 2
    rng = np.random.default_rng(batch + pages)
    table = rng.permutation(total)[: batch * pages].reshape(batch, pages)
    pool = np.full((total, page_size, dim), np.nan, np.float32)
    scale = np.full((total, page_size), np.nan, np.float32)
    for row, length in zip(table, lengths, strict=True):
        for i in range(pages):
            written = int(np.clip(length - i * page_size, 0, page_size))
            pool[row[i], :written] = rng.standard_normal((written, dim))
            scale[row[i], :written] = rng.uniform(0.1, 2, written)
        row[-(-length // page_size) :] = 2**30
    return (
        vectors(rng, batch, queries, heads, dim),
        jnp.asarray(rng.standard_normal((batch, queries, heads)), F32),
        jnp.asarray(pool, F8),
        jnp.asarray(scale),
        jnp.asarray(table, I32),
        jnp.asarray(lengths, I32),
    )


def paged_reference(query, weights, pool, scale, table, lengths):
    (batch, queries, _, dim), page_size = query.shape, pool.shape[1]
    pool, scale, table = np.asarray(pool, np.float32), np.asarray(scale), np.asarray(table)
    out = []
    for b in range(batch):
        row = np.minimum(table[b], len(pool) - 1)
        end = int(lengths[b]) + np.arange(1 - queries, 1)
        keys, scales = pool[row].reshape(-1, dim), scale[row].reshape(-1)
        out.append(reference(query[b], weights[b], keys, scales, 0 * end, end))
    assert out[0].shape == (queries, table.shape[1] * page_size)
    return np.concatenate(out)


def check(out, expected, tolerance, name=""):
    assert out.dtype == F32 and out.shape == expected.shape
    out, seen = np.asarray(out), np.isfinite(expected)
    assert np.isneginf(out[~seen]).all(), name
    error = np.linalg.norm(out[seen] - expected[seen])
    assert error <= tolerance * np.linalg.norm(expected[seen]), name


CASES = [
    # queries, heads, dim, keys, SMs: tiles of queries, the last one cut
    (20, 64, 128, 450, 3),
    (5, 64, 64, 333, 2),
    # keys shared out: one tile, fewer keys than a step
    (3, 40, 128, 60, 2),
    (2, 32, 64, 600, 3),
]
PAGED = [
    # lengths, queries, heads, dim, page size, pages, SMs
    ([500, 0, 130], 1, 64, 128, 64, 10, 3),
    ([290, 1], 3, 64, 128, 512, 1, 2),
    ([90, 40], 5, 64, 128, 32, 4, 2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case):
    args = operands(*case[:-1])
    with testing.interpret():
        out = mqa_logits(*args, num_sms=case[-1])
    check(out, reference(*args), TOLERANCE)


@pytest.mark.parametrize("case", PAGED, ids=str)
def test_numbers_of_pages(case):
    args = paged_operands(*case[:-1])
    with testing.interpret():
        out = paged_mqa_logits(*args, num_sms=case[-1])
    check(out, paged_reference(*args), TOLERANCE)


@pytest.mark.parametrize(("queries", "heads"), [(2, 64), (1, 128), (3, 40), (4, 32), (16, 8)])
def test_the_sum_over_heads_in_registers(queries, heads, monkeypatch):
    """The inlined code of all threads, which interpret mode replaces by its reference."""
    emulated = Emulated()
    monkeypatch.setattr(plgpu, "inline_mgpu", emulated)
    rng = np.random.default_rng(heads)
    product = rng.standard_normal((64, queries * heads), np.float32)
    weights = rng.standard_normal(queries * heads, np.float32)
    scales = rng.uniform(0.1, 2, 64).astype(np.float32)
    bounds = np.stack([rng.integers(90, 130, queries), rng.integers(120, 190, queries)], axis=1)
    bounds = bounds.astype(np.int32).reshape(-1)
    out = np.full((queries, 64), np.nan, np.float32)
    emulated.layouts[id(out)] = lambda logits: np.ascontiguousarray(logits).view(np.uint8)
    arrays = map(jnp.asarray, (product, weights, scales))
    registers.weigh(*arrays, bounds, out, jnp.int32(100))


def test_no_key_is_seen():
    query, weights, keys, scale, start, _ = operands(5, 64, 64, 130)
    with testing.interpret():
        out = mqa_logits(query, weights, keys, scale, start, start, num_sms=2)
    assert np.isneginf(out).all()


@pytest.mark.parametrize("queries", [1, 2, 4, 64, 1000])
@pytest.mark.parametrize("heads", [8, 32, 64, 128])
def test_tiles_fit(queries, heads):
    for dim in (64, 128):
        tile = choose_tiles(queries, heads, dim)
        plan = Plan(1, queries, heads, dim, 4096, None, tile, 132)
        assert tile.stages >= 2 and plan.smem_bytes <= SMEM_BYTES
        assert plan.columns <= 128 and plan.my_groups * plan.columns <= 256
        assert sum(plan.registers) + plan.registers[1] <= 3 * 168


def test_workers_have_equal_shares_of_what_is_seen():
    """Whatever the ranges are, each tile's steps are done once, in order, by neighbours."""
    queries, keys, workers = 100, 3000, 7
    plan = Plan(1, queries, 64, 128, keys, None, choose_tiles(queries, 64, 128), workers)
    end = np.arange(queries) * 30
    end[16:32] = 0
    bounds = jnp.asarray(np.stack([end // 3, end], axis=1)[None], I32)
    _, units, work = (np.asarray(x) for x in schedule(bounds, plan))
    counts = [
        -(-end[u : u + 8].max() // 128) - end[u : u + 8].min() // 3 // 128 if end[u + 1] else 0
        for u in range(0, queries, 8)
    ]
    np.testing.assert_array_equal(np.diff(units[:, 1]), counts)
    shares = work[:, 1] - work[:, 0]
    assert shares.max() - shares.min() <= 1 and shares.sum() == sum(counts)
    for begin, past, first, past_unit in work:
        assert units[first, 1] <= begin < units[first + 1, 1]
        assert units[past_unit - 1, 1] < past <= units[past_unit, 1]


def test_bad_arguments_are_named():
    query, weights, keys, scale, start, end = operands(3, 16, 64, 40)
    with pytest.raises(ValueError, match=r"head_weights must be float32 \[3, 16\]; found .*\[3\]"):
        mqa_logits(query, weights[:, 0], keys, scale, start, end)
    with pytest.raises(ValueError, match="keys must be float8_e4m3fn; found bfloat16"):
        mqa_logits(query, weights, keys.astype(jnp.bfloat16), scale, start, end)
    paged = paged_operands([9], 1, 16, 64, 48, 1)
    with pytest.raises(ValueError, match=r"page_size must be one of .*; found 48"):
        paged_mqa_logits(*paged)
    with pytest.raises(ValueError, match=r"lengths must be int32 \[1\]; found int32 \[1, 1\]"):
        paged_mqa_logits(*paged[:-1], paged[-1][None])
    assert unsupported_reason(64, 128, page_size=1024) is None
    assert "found 12" in unsupported_reason(12, 128)
    assert "found 96" in unsupported_reason(64, 96)


def shapes(queries, heads, dim, keys):
    s = jax.ShapeDtypeStruct
    query, weights = s((queries, heads, dim), F8), s((queries, heads), F32)
    bound = s((queries,), I32)
    return query, weights, s((keys, dim), F8), s((keys,), F32), bound, bound


def paged_shapes(batch, queries, heads, dim, page_size, pages):
    s = jax.ShapeDtypeStruct
    query, weights = s((batch, queries, heads, dim), F8), s((batch, queries, heads), F32)
    pool = s((batch * pages, page_size, dim), F8), s((batch * pages, page_size), F32)
    return query, weights, *pool, s((batch, pages), I32), s((batch,), I32)


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
def test_ptxas_neither_spills_nor_serializes():
    jobs = [
        (lambda *a: mqa_logits(*a, num_sms=132), shapes(4096, 64, 128, 32768)),
        (lambda *a: mqa_logits(*a, num_sms=132), shapes(4096, 32, 64, 4096)),
        (lambda *a: paged_mqa_logits(*a, num_sms=132), paged_shapes(64, 1, 64, 128, 64, 64)),
        (lambda *a: paged_mqa_logits(*a, num_sms=132), paged_shapes(4, 4, 64, 128, 32, 64)),
    ]
    for (report,) in testing.ptxas_reports(jobs):
        report.check()
        assert report.stack_bytes == 0
        assert 24 + 2 * 240 <= 3 * report.registers  # what setmaxnreg hands out


GPU_CASES = [
    (512, 64, 128, 3000),
    (301, 32, 128, 2099),
    (130, 128, 128, 2048),
    (97, 40, 128, 3001),
    (200, 8, 128, 1024),
    (300, 64, 64, 2500),
    (65, 16, 64, 4100),
    (1, 64, 128, 20000),
    (4, 64, 128, 10001),
    (3, 8, 64, 50),
]
GPU_PAGED = [
    ([20000], 1, 64, 128, 64, 320),
    ([1999, 0, 64, 1, 777], 2, 64, 128, 64, 40),
    ([3000, 4096], 4, 64, 128, 32, 128),
    ([700, 1], 3, 32, 128, 256, 3),
    ([900, 33], 1, 64, 64, 128, 8),
    ([1024, 5], 9, 64, 128, 512, 2),
]


@pytest.mark.gpu
def test_gpu_matches_the_reference():
    jobs = [(mqa_logits, operands(*sizes), reference, sizes) for sizes in GPU_CASES]
    jobs += [
        (paged_mqa_logits, paged_operands(*sizes), paged_reference, sizes) for sizes in GPU_PAGED
    ]

    def compiled(job):
        return jax.jit(job[0]).lower(*job[1]).compile()

    with concurrent.futures.ThreadPoolExecutor() as pool:  # compilation is mostly ptxas
        kernels = list(pool.map(compiled, jobs))
    for run, (_, args, expected, sizes) in zip(kernels, jobs, strict=True):
        wanted = expected(*args)
        for _ in range(3):  # what depends on the warps' order may differ from run to run
            check(run(*args), wanted, GPU_TOLERANCE, sizes)
