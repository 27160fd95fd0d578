"""Grouped FP8 products: numbers in interpret mode, lowering and ptxas of every tiling, a GPU where there is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import testing
from qjax.pallas_kernels._fp8_grouped_gemm_sm90 import MAX_SMEM
from qjax.pallas_kernels._grouped_tiles_sm90 import tile_table
from qjax.pallas_kernels.fp8_grouped_gemm_sm90 import (
    GroupedTileConfig,
    choose_tiles,
    fp8_block_grouped_gemm,
    fp8_rowwise_grouped_gemm,
    unsupported_reason,
)

TOLERANCE = 2e-3  # bf16 rounding of the output alone is about 1.7e-3

swapped = functools.partial(GroupedTileConfig, True)
upright = functools.partial(GroupedTileConfig, False)


def cdiv(a, b):
    return -(-a // b)


def operands(lead, groups, n, k, *, scaling="block", dtypes=("float8_e4m3fn",) * 2, seed=0):
    """x [*lead, k], x_scale, w [groups, n, k], w_scale and a bias."""
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (*lead, k)).astype(dtypes[0])
    w = jax.random.normal(keys[1], (groups, n, k)).astype(dtypes[1])
    if scaling == "block":
        rows = cdiv(int(np.prod(lead)), 4) * 4
        shapes = (cdiv(k, 128), rows), (groups, cdiv(n, 128), cdiv(k, 128))
    else:
        shapes = lead, (groups, n)
    x_scale, w_scale = (
        10.0 ** jax.random.uniform(key, shape, minval=-1.0, maxval=0.0)
        for key, shape in zip(keys[2:4], shapes, strict=True)
    )
    return x, x_scale, w, w_scale, jax.random.normal(keys[4], (groups, n))


def reference(x, x_scale, w, w_scale, sizes, bias=None):
    """float32 products of the dequantized operands; NaN where the masked layout leaves rows undefined."""
    k, (groups, n) = x.shape[-1], w.shape[:2]
    rows = x.size // k
    x_scale, w_scale = np.asarray(x_scale), np.asarray(w_scale)
    if w_scale.ndim == 3:
        x_scale = np.repeat(x_scale.T, 128, axis=1)[:rows, :k]
        w_scale = np.repeat(np.repeat(w_scale, 128, axis=1), 128, axis=2)[:, :n, :k]
    else:
        x_scale, w_scale = x_scale.reshape(-1, 1), w_scale[..., None]
    left = np.asarray(x, np.float32).reshape(rows, k) * x_scale
    out = np.full((rows, n), 0.0 if x.ndim == 2 else np.nan, np.float32)
    starts = np.cumsum([0, *sizes]) if x.ndim == 2 else np.arange(groups) * x.shape[1]
    for e in range(groups):
        mine = slice(starts[e], starts[e] + sizes[e])
        right = np.asarray(w[e], np.float32) * w_scale[e]
        with np.errstate(invalid="ignore"):  # NaN
            out[mine] = left[mine] @ right.T
        if bias is not None:
            out[mine] += np.asarray(bias[e])
    return out.reshape(*x.shape[:-1], n)


def relative_error(out, expected):
    """Over the defined rows; a NaN in them makes the result NaN."""
    defined = ~np.isnan(expected)
    difference = np.where(defined, np.asarray(out, np.float32) - expected, 0)
    return np.linalg.norm(difference) / np.linalg.norm(expected[defined])


# Both orientations, multicast, empty groups, one huge group, sums below T, short tiles on every side, any K of 16.
CASES = [
    ((9,), (3, 0, 1, 5), (200, 272), swapped(tokens=8, weights=128, stages=2)),
    ((40,), (0, 0, 37, 0), (136, 384), swapped(tokens=16, weights=64, stages=2)),
    ((70,), (1, 33, 0, 30), (264, 144), swapped(tokens=32, weights=128, stages=3)),
    ((61,), (3, 45, 13, 0), (320, 256), swapped(tokens=24, weights=256, stages=2)),
    (
        (150,),
        (100, 0, 3, 47),
        (392, 256),
        swapped(tokens=96, weights=128, stages=2, cluster=4, halves=True),
    ),
    ((300,), (5, 0, 290, 1), (72, 256), upright(tokens=128, weights=64, stages=2)),
    ((280,), (131, 60, 0, 66), (200, 400), upright(tokens=128, weights=128, stages=2, cluster=2)),
    (
        (330,),
        (0, 301, 27, 2),
        (136, 128),
        upright(tokens=256, weights=128, stages=2, cluster=2, halves=True),
    ),
    ((260,), (256, 3), (136, 128), upright(tokens=256, weights=128, stages=2)),
    ((4, 21), (21, 0, 7, 1), (200, 272), swapped(tokens=16, weights=128, stages=2)),
    ((3, 150), (150, 9, 0), (136, 256), upright(tokens=128, weights=128, stages=2)),
]


@pytest.mark.parametrize(("lead", "sizes", "nk", "config"), CASES, ids=str)
def test_block_scaled_numbers(lead, sizes, nk, config):
    *args, bias = operands(lead, len(sizes), *nk)
    with testing.interpret():
        out = fp8_block_grouped_gemm(*args, jnp.int32(sizes), bias=bias, config=config, num_sms=4)
    assert out.dtype == jnp.bfloat16
    expected = reference(*args, sizes, bias)
    assert relative_error(out, expected) <= TOLERANCE
    if len(lead) == 1:
        assert (np.asarray(out)[sum(sizes) :] == 0).all()


@pytest.mark.parametrize("case", [0, 3, 6, 9])
def test_row_scaled_numbers(case):
    lead, sizes, nk, config = CASES[case]
    dtypes = ("float8_e5m2", "float8_e4m3fn")
    *args, bias = operands(lead, len(sizes), *nk, scaling="row", dtypes=dtypes)
    with testing.interpret():
        out = fp8_rowwise_grouped_gemm(
            *args, jnp.int32(sizes), bias=bias, out_dtype="float16", config=config, num_sms=3
        )
    assert out.dtype == jnp.float16
    assert relative_error(out, reference(*args, sizes, bias)) <= TOLERANCE
    if len(lead) == 1:
        assert (np.asarray(out)[sum(sizes) :] == 0).all()


def test_random_skew():
    rng = np.random.default_rng(0)
    args = operands((48,), 12, 72, 144)[:4]
    config = swapped(tokens=8, weights=128, stages=2)
    run = jax.jit(functools.partial(fp8_block_grouped_gemm, config=config, num_sms=5))
    with testing.interpret():
        for alpha in (0.05, 0.5, 5.0):
            sizes = rng.multinomial(rng.integers(20, 49), rng.dirichlet([alpha] * 12))
            out = run(*args, jnp.int32(sizes))
            assert relative_error(out, reference(*args, sizes)) <= TOLERANCE


@pytest.mark.parametrize("swap", [True, False])
def test_nan_stays_in_its_row(swap):
    x, x_scale, w, w_scale, _ = operands((30,), 3, 136, 256)
    sizes = [11, 9, 6]
    x = x.at[10, 200].set(jnp.nan).at[20, 3].set(jnp.nan).at[28].set(jnp.nan)
    x_scale = x_scale.at[1, 12].set(jnp.nan)
    config = swapped(16, 128, 2) if swap else upright(128, 128, 2)
    with testing.interpret():
        out = fp8_block_grouped_gemm(
            x, x_scale, w, w_scale, jnp.int32(sizes), config=config, num_sms=2
        )
    out = np.asarray(out, np.float32)
    assert np.isnan(out).any(axis=1).nonzero()[0].tolist() == [10, 12, 20]
    assert (out[26:] == 0).all()  # NaN past the groups does not come through either
    expected = reference(x, x_scale, w, w_scale, sizes)
    fine = [i for i in range(30) if i not in (10, 12, 20)]
    assert relative_error(out[fine], expected[fine]) <= TOLERANCE


def test_nothing_but_empty_groups():
    *args, bias = operands((5,), 3, 72, 128)
    with testing.interpret():
        out = fp8_block_grouped_gemm(*args, jnp.zeros(3, jnp.int32), bias=bias, num_sms=2)
    assert out.shape == (5, 72)
    assert (np.asarray(out) == 0).all()


@pytest.mark.parametrize("tokens", [8, 48])
def test_table_covers_each_row_once(tokens):
    rng = np.random.default_rng(tokens)
    for rows, groups in ((1, 1), (7, 20), (500, 6), (1000, 64)):
        for sizes in (
            rng.multinomial(rows, rng.dirichlet([0.3] * groups)),
            rng.multinomial(rows // 2, [1 / groups] * groups),
            np.zeros(groups, int),
        ):
            table = np.asarray(tile_table(jnp.int32(sizes), (rows,), tokens))
            assert table[0, 3] <= len(table)
            owner = np.full(rows, -1)
            for group, first, count, _ in table[: table[0, 3]]:
                assert 0 < count <= tokens
                assert (owner[first : first + count] == -1).all()
                owner[first : first + count] = group
            ends = np.cumsum(sizes)
            assert (owner == np.searchsorted(ends, np.arange(rows), side="right")).all()


def test_table_of_the_masked_layout():
    table = np.asarray(tile_table(jnp.int32([0, 20, 64, 3]), (4, 64), 32))
    assert table[0, 3] == 4
    assert table[:4, :3].tolist() == [[1, 64, 20], [2, 128, 32], [2, 160, 32], [3, 192, 3]]


BENCHMARKED = [  # rows a group, groups, N, K, masked
    (1024, 1, 4096, 7168, True),
    (256, 4, 4096, 7168, True),
    (256, 4, 7168, 2048, True),
    (192, 32, 6144, 7168, True),
    (20, 32, 6144, 7168, True),
    (8, 256, 4096, 7168, True),
    (8192, 4, 6144, 7168, False),
    (4096, 8, 4096, 7168, False),
    (128, 256, 4096, 7168, False),
    (128, 256, 7168, 2048, False),
]


def test_chosen_tiles_fit_and_depend_on_the_size():
    for rows, groups, n, k, _ in BENCHMARKED:
        config = choose_tiles(rows, groups, n, k, num_sms=132)
        assert config.smem_bytes() <= MAX_SMEM
        assert config.stages >= 3
    assert choose_tiles(8, 256, 4096, 7168, num_sms=132).swap
    assert choose_tiles(8, 256, 4096, 7168, num_sms=132).tokens <= 16
    large = choose_tiles(4096, 8, 4096, 7168, num_sms=132)
    assert (large.swap, large.tokens, large.weights, large.cluster) == (False, 256, 128, 2)


def structs(lead, groups, n, k, scaling="block"):
    args = jax.eval_shape(lambda: operands(lead, groups, n, k, scaling=scaling))
    return *args, jax.ShapeDtypeStruct((groups,), jnp.int32)


def bound(op, config):
    def run(x, x_scale, w, w_scale, bias, sizes):
        return op(x, x_scale, w, w_scale, sizes, bias=bias, config=config, num_sms=132)

    return run


@pytest.mark.parametrize("lead", [(1,), (500,), (4, 96)])
def test_odd_shapes_lower(lead):
    for n, k in ((576, 7168), (2112, 512), (72, 48)):
        for op, scaling in ((fp8_block_grouped_gemm, "block"), (fp8_rowwise_grouped_gemm, "row")):
            text = testing.lower_for_gpu(bound(op, None), *structs(lead, 4, n, k, scaling))
            assert "mosaic_gpu" in text


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
def test_ptxas_neither_spills_nor_serializes():
    cases = {}
    for rows, groups, n, k, masked in BENCHMARKED:
        lead = (groups, 2 * rows) if masked else (groups * rows,)
        cases.setdefault(choose_tiles(rows, groups, n, k, num_sms=132), (lead, groups, n, k))
    by_row = dict(cases)
    for lead, sizes, nk, config in CASES[2:6]:
        cases.setdefault(config, (lead, len(sizes), *nk))
    jobs = [(bound(fp8_block_grouped_gemm, c), structs(*s)) for c, s in cases.items()]
    jobs += [(bound(fp8_rowwise_grouped_gemm, c), structs(*s, "row")) for c, s in by_row.items()]
    for reports in testing.ptxas_reports(jobs):
        (report,) = reports
        report.check()
        assert report.stack_bytes == 0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"no such tile; .*tokens=192"):
        upright(tokens=192, weights=128, stages=2)
    x, x_scale, w, w_scale, bias = operands((8,), 2, 128, 256)
    sizes = jnp.int32([3, 5])
    with pytest.raises(ValueError, match=r"N must be a multiple of 8 .* found N=132, K=256"):
        fp8_block_grouped_gemm(x, x_scale, jnp.zeros((2, 132, 256), w.dtype), w_scale, sizes)
    with pytest.raises(ValueError, match=r"w_scale of w .* must be \[2, 1, 2\]; found \[2, 2\]"):
        fp8_block_grouped_gemm(x, x_scale, w, jnp.ones((2, 2)), sizes)
    with pytest.raises(ValueError, match="multiple of 4"):
        fp8_block_grouped_gemm(x, jnp.ones((2, 9)), w, w_scale, sizes)
    with pytest.raises(ValueError, match="tokens last"):
        fp8_block_grouped_gemm(x, jnp.ones((8, 2)), w, w_scale, sizes)
    with pytest.raises(ValueError, match=r"group_sizes must be int32 \[2\].*found int32 \[3\]"):
        fp8_block_grouped_gemm(x, x_scale, w, w_scale, jnp.int32([3, 5, 0]))
    with pytest.raises(ValueError, match=r"found float32 \[2\]"):
        fp8_block_grouped_gemm(x, x_scale, w, w_scale, jnp.ones(2))
    with pytest.raises(ValueError, match=r"must have the 2 groups of w; found \[1, 8, 256\]"):
        fp8_block_grouped_gemm(x[None], x_scale, w, w_scale, sizes)
    with pytest.raises(ValueError, match=r"bias must be \[2, 128\]; found \[5\]"):
        fp8_block_grouped_gemm(x, x_scale, w, w_scale, sizes, bias=bias[0, :5])
    with pytest.raises(ValueError, match=r"x_scale must be \[8\] and w_scale \[2, 128\]"):
        fp8_rowwise_grouped_gemm(x, jnp.ones(9), w, jnp.ones((2, 128)), sizes)
    with pytest.raises(ValueError, match="scales must be float32"):
        fp8_rowwise_grouped_gemm(x, jnp.ones(8, jnp.bfloat16), w, jnp.ones((2, 128)), sizes)
    assert unsupported_reason(576, 7168) is None
    assert "bfloat16" in unsupported_reason(576, 7168, x_dtype="bfloat16")
    assert "float32" in unsupported_reason(576, 7168, out_dtype="float32")


@pytest.mark.gpu
@pytest.mark.parametrize("config", [c[-1] for c in CASES] + [None], ids=str)
def test_gpu_matches_the_reference(config):
    rng = np.random.default_rng(1)
    for lead, groups, n, k in (
        ((700,), 6, 576, 1536),
        ((5, 300), 5, 2112, 400),
        ((300,), 4, 320, 128),
    ):
        if len(lead) == 1:
            sizes = rng.multinomial(lead[0] - 50, rng.dirichlet([0.4] * groups))
        else:
            sizes = np.array([300, 0, 1, 77, 130])
        for op, scaling in ((fp8_block_grouped_gemm, "block"), (fp8_rowwise_grouped_gemm, "row")):
            *args, bias = operands(lead, groups, n, k, scaling=scaling)
            out = jax.jit(functools.partial(op, config=config))(*args, jnp.int32(sizes), bias=bias)
            expected = reference(*args, sizes, bias)
            assert relative_error(out, expected) <= TOLERANCE
            if len(lead) == 1:
                assert (np.asarray(out, np.float32)[sum(sizes) :] == 0).all()
