"""Decode attention over paged caches: numbers, masks, garbage in unwritten memory, ptxas, and the GPU."""

import concurrent.futures
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import testing
from qjax.pallas_kernels._paged_attention_registers_sm90 import Storage
from qjax.pallas_kernels.paged_attention_sm90 import (
    choose_splits,
    paged_decode_attention,
    unsupported_reason,
)

TOLERANCE = 3e-3
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a call; `lengths` are those of each sequence's newest query."""

    lengths: tuple[int, ...]
    q_heads: int
    kv_heads: int
    dim: int = 128
    page: int = 16
    pages: int = 16
    dtype: str = "float8_e4m3fn"
    scales: str = "head"
    queries: int = 1
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    splits: int | None = None

    @property
    def options(self):
        names = dict(sliding_window=self.window, logit_soft_cap=self.soft_cap, splits=self.splits)
        return {k: v for k, v in names.items() if v is not None}


def operands(case: Case) -> dict[str, np.ndarray]:
    """A pool of shuffled pages; what no sequence has written is NaN."""
    rng = np.random.default_rng(case.dim + case.page)
    batch, pool = len(case.lengths), len(case.lengths) * case.pages + 3
    table = rng.permutation(pool)[: batch * case.pages].reshape(batch, -1).astype(np.int32)
    written = np.zeros((pool, case.page), bool)
    for row, length in zip(table, case.lengths, strict=True):
        written[row] = (np.arange(case.pages * case.page) < length).reshape(-1, case.page)
    arrays = {}
    shape = (pool, case.kv_heads, case.page)
    for name in ("key", "value"):
        values = rng.standard_normal((*shape, case.dim), np.float32)
        values[~np.broadcast_to(written[:, None], shape)] = np.nan
        if case.dtype == "nvfp4":
            codes = rng.integers(0, 256, (*shape, case.dim // 2), np.uint8)
            block = rng.uniform(2**-9, 0.5, (*shape, case.dim // 16)).astype(np.float32)
            block[~np.broadcast_to(written[:, None], shape)] = np.nan
            arrays[f"{name}_pages"] = codes
            arrays[f"{name}_block_scale"] = block.astype(jnp.float8_e4m3fn)
        else:
            arrays[f"{name}_pages"] = values.astype(jnp.dtype(case.dtype))
        scale_shape = {"none": None, "head": shape[1:2], "page": shape[:2], "token": shape}
        if scale_shape[case.scales] is not None:
            low, high = (0.5, 1.5) if case.scales == "head" or name == "key" else (1e-7, 2e-4)
            scale = rng.uniform(low, high, scale_shape[case.scales]).astype(np.float32)
            if case.scales == "token":
                scale[~np.broadcast_to(written[:, None], shape)] = np.nan
            arrays[f"{name}_scale"] = scale
    ends = np.asarray(case.lengths)[:, None] - np.arange(case.queries)[::-1]
    ends = np.maximum(ends, 0).astype(np.int32)
    if case.sinks:
        arrays["sinks"] = np.linspace(-1, 1, case.q_heads, dtype=np.float32)
    query = rng.standard_normal((batch, case.queries, case.q_heads, case.dim), np.float32)
    query = query.astype(jnp.bfloat16)
    if case.queries == 1:
        query, ends = query[:, 0], ends[:, 0]
    return arrays | {"query": query, "page_table": table, "lengths": ends}


def reference(case: Case, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """float32 softmax over each query's tokens, one query and head at a time."""
    a = {k: np.asarray(v, np.float32) for k, v in arrays.items() if "page_table" != k}
    query, ends = a["query"], a["lengths"].astype(int)
    if case.queries == 1:
        query, ends = query[:, None], ends[:, None]
    table, out = arrays["page_table"], np.zeros(query.shape, np.float32)

    def read(name, numbers, head, slots):
        found = a[f"{name}_pages"][numbers, head, slots]
        if case.dtype == "nvfp4":
            codes = found.astype(int)
            codes = np.stack([codes % 16, codes // 16], axis=-1).reshape(-1, case.dim)
            block = a[f"{name}_block_scale"][numbers, head, slots]
            found = E2M1[codes] * np.repeat(block, 16, axis=1)
        match case.scales:
            case "head":
                return found * a[f"{name}_scale"][head]
            case "page":
                return found * a[f"{name}_scale"][numbers, head][:, None]
            case "token":
                return found * a[f"{name}_scale"][numbers, head, slots][:, None]
        return found

    for b, t, n in np.ndindex(query.shape[:3]):
        first = 0 if case.window is None else max(ends[b, t] - case.window, 0)
        tokens = np.arange(first, ends[b, t])
        where = (table[b, tokens // case.page], n * case.kv_heads // case.q_heads)
        k, v = (read(name, *where, tokens % case.page) for name in ("key", "value"))
        x = k @ query[b, t, n] * case.dim**-0.5
        if case.soft_cap is not None:
            x = case.soft_cap * np.tanh(x / case.soft_cap)
        if case.sinks:
            x = np.append(x, a["sinks"][n])
            v = np.concatenate([v, np.zeros((1, case.dim), np.float32)])
        if len(tokens):
            weights = np.exp(x - x.max())
            out[b, t, n] = weights / weights.sum() @ v
    return out.reshape(arrays["query"].shape)


def relative_error(out, expected):
    return np.linalg.norm(np.asarray(out, np.float32) - expected) / np.linalg.norm(expected)


def check(case: Case):
    arrays = operands(case)
    out = jax.jit(lambda a: paged_decode_attention(**a, **case.options))(arrays)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, reference(case, arrays)) <= TOLERANCE
    empty = np.asarray(arrays["lengths"]) == 0
    assert (np.asarray(out, np.float32)[empty] == 0).all()


CASES = {
    "groups of 4, pages smaller than a tile": Case(
        lengths=(130, 37), q_heads=4, kv_heads=1, pages=9, splits=1
    ),
    "bfloat16": Case(
        lengths=(130, 37), q_heads=4, kv_heads=2, pages=9, dtype="bfloat16", scales="none", splits=2
    ),
    "float16 pages": Case(
        lengths=(65,), q_heads=1, kv_heads=1, dim=64, dtype="float16", scales="none", splits=1
    ),
    "e5m2, more splits than tiles": Case(
        lengths=(250,), q_heads=16, kv_heads=1, dim=64, page=64, dtype="float8_e5m2", splits=3
    ),
    "window, sinks, no token, one token, pages as large as a tile": Case(
        lengths=(0, 1, 200), q_heads=2, kv_heads=1, page=128, window=70, sinks=True, splits=2
    ),
    "window and sinks without splits": Case(
        lengths=(0, 1, 200), q_heads=10, kv_heads=2, page=32, window=70, sinks=True, splits=1
    ),
    "two warpgroups, small pages": Case(
        lengths=(300,), q_heads=24, kv_heads=1, dim=64, page=8, pages=40, splits=1
    ),
    "64 rows": Case(lengths=(140,), q_heads=64, kv_heads=1, sinks=True, splits=2),
    "scales per page": Case(lengths=(250, 3), q_heads=4, kv_heads=2, scales="page", splits=1),
    "scales per token": Case(lengths=(250, 9), q_heads=24, kv_heads=2, scales="token", splits=2),
    "bfloat16 with scales per token, pages larger than a tile": Case(
        lengths=(250,), q_heads=4, kv_heads=1, page=128, dtype="bfloat16", scales="token", splits=1
    ),
    "soft cap": Case(lengths=(140,), q_heads=4, kv_heads=1, soft_cap=0.7, splits=1),
    "4 queries": Case(lengths=(140, 3), q_heads=2, kv_heads=1, queries=4, sinks=True, splits=2),
    "8 queries, two warpgroups, window": Case(
        lengths=(140,), q_heads=4, kv_heads=1, queries=8, window=20, scales="page", splits=1
    ),
    "80 channels": Case(lengths=(140,), q_heads=4, kv_heads=1, dim=80, splits=1),
    "96 channels": Case(
        lengths=(70,), q_heads=3, kv_heads=1, dim=96, dtype="bfloat16", scales="none", splits=1
    ),
    "nvfp4": Case(lengths=(130, 37), q_heads=4, kv_heads=2, pages=9, dtype="nvfp4", splits=1),
    "nvfp4 with scales per page, pages larger than a tile": Case(
        lengths=(150,), q_heads=4, kv_heads=1, page=128, dtype="nvfp4", scales="page", splits=2
    ),
    "nvfp4, 64 channels": Case(
        lengths=(150, 0), q_heads=4, kv_heads=1, dim=64, page=32, dtype="nvfp4", splits=1
    ),
    "256 channels": Case(lengths=(70,), q_heads=3, kv_heads=1, dim=256, splits=1),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers(name):
    with testing.interpret():
        check(CASES[name])


def test_splits_fill_the_gpu_and_stay_worthwhile():
    def splits(pairs, tokens):
        storage = Storage.of("float8_e4m3fn", 128)
        return choose_splits(pairs, tokens, num_sms=132, ctas=2, storage=storage)

    assert splits(8, 131072) == 33  # one full wave
    assert splits(64 * 8, 8192) == 1  # nearly two waves as it is
    assert splits(8, 1024) == 4  # no part below two tiles
    assert splits(8, 64) == 1


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
def test_ptxas_does_not_spill():
    jobs = []
    for case in CASES.values():
        arrays = operands(dataclasses.replace(case, lengths=(1,)))
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
        names, options = list(shapes), {"num_sms": 132} | case.options
        fn = functools.partial(
            lambda names, options, *values: paged_decode_attention(
                **dict(zip(names, values, strict=True)), **options
            ),
            names,
            options,
        )
        jobs.append((fn, list(shapes.values())))
    for reports in testing.ptxas_reports(jobs):
        for report in reports:
            report.check()
            assert report.stack_bytes == 0


def test_bad_arguments_are_named():
    arrays = operands(Case(lengths=(9,), q_heads=4, kv_heads=2, dim=64, pages=2))
    arrays = {k: jnp.asarray(v) for k, v in arrays.items()}

    def call(**changed):
        return paged_decode_attention(**(arrays | changed))

    with pytest.raises(ValueError, match=r"key_scale must be float32 \[2\] or \[5, 2\] or"):
        call(key_scale=jnp.ones(1))
    with pytest.raises(
        ValueError, match=r"value_scale must be float32 \[2\]; found float32\[5, 2\]"
    ):
        call(value_scale=jnp.ones((5, 2)))
    with pytest.raises(ValueError, match="only uint8 pages take block scales"):
        call(key_block_scale=jnp.ones(1))
    with pytest.raises(ValueError, match=r"key_block_scale must be float8_e4m3fn .*; found None"):
        four = Case(lengths=(9,), q_heads=4, kv_heads=2, dtype="nvfp4", pages=2)
        four = {k: jnp.asarray(v) for k, v in operands(four).items()}
        paged_decode_attention(**(four | {"key_block_scale": None}))
    with pytest.raises(ValueError, match="give both scales or none"):
        call(value_scale=None)
    with pytest.raises(ValueError, match=r"lengths must be int32 \[1, 1\]"):
        call(lengths=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=r"pages must be one of .* found int8"):
        call(key_pages=arrays["key_pages"].astype(jnp.int8))
    with pytest.raises(ValueError, match=r"value_pages must be float8_e4m3fn .*; found bfloat16"):
        call(value_pages=arrays["value_pages"].astype(jnp.bfloat16))


def test_reasons_name_the_constraint():
    assert unsupported_reason(32, 8, 128, 64) is None
    assert "head_dim must be one of" in unsupported_reason(32, 8, 72, 64)
    assert "page_size must be one of" in unsupported_reason(32, 8, 128, 24)
    assert "must divide" in unsupported_reason(30, 8, 128, 64)
    assert "at most 8 queries" in unsupported_reason(32, 8, 128, 64, queries=9)
    assert "FP4 pages need" in unsupported_reason(8, 8, 64, 16, page_dtype="float4_e2m1fn")
    assert "found 5 times 16" in unsupported_reason(128, 8, 128, 64, queries=5)


@pytest.mark.gpu
def test_gpu_matches_the_reference():
    lengths = (1, 0, 1000, 777, 64, 65)

    def run(case):
        splits = 1 if case.splits == 1 else 3
        check(dataclasses.replace(case, lengths=lengths, pages=1024 // case.page, splits=splits))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # compilation is what takes time
        futures = {name: pool.submit(run, case) for name, case in CASES.items()}
    failures = {name: error for name, f in futures.items() if (error := f.exception())}
    assert not failures, failures
