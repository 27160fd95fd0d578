"""FP8 matrix products: numbers in interpret mode, lowering and ptxas of every tiling, a GPU where there is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import testing
from qjax.pallas_kernels._fp8_gemm_sm90 import MAX_SMEM, TileConfig, choose_tiles
from qjax.pallas_kernels.fp8_block_gemm_sm90 import fp8_block_gemm, unsupported_reason
from qjax.pallas_kernels.fp8_rowwise_gemm_sm90 import fp8_rowwise_gemm

TOLERANCE = 2e-3  # bf16 rounding of the output alone is about 1.7e-3

swapped = functools.partial(TileConfig, True)
upright = functools.partial(TileConfig, False)


def cdiv(a, b):
    return -(-a // b)


def operands(m, n, k, *, scaling="block", dtypes=("float8_e4m3fn", "float8_e4m3fn"), seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (m, k)).astype(dtypes[0])
    w = jax.random.normal(keys[1], (n, k)).astype(dtypes[1])
    if scaling == "block":
        shapes = (cdiv(k, 128), cdiv(m, 4) * 4), (cdiv(n, 128), cdiv(k, 128))
    else:
        shapes = (m,), (n,)
    scales = (
        10.0 ** jax.random.uniform(key, shape, minval=-1.0, maxval=0.0)
        for key, shape in zip(keys[2:4], shapes, strict=True)
    )
    x_scale, w_scale = scales
    return x, x_scale, w, w_scale, jax.random.normal(keys[4], (n,))


def reference(x, x_scale, w, w_scale, bias=None):
    """float32 product of the dequantized operands."""
    x_scale, w_scale = np.asarray(x_scale), np.asarray(w_scale)
    (m, k), n = x.shape, w.shape[0]
    if w_scale.ndim == 2:
        x_scale = np.repeat(x_scale.T, 128, axis=1)[:m, :k]
        w_scale = np.repeat(np.repeat(w_scale, 128, axis=0), 128, axis=1)[:n, :k]
    else:
        x_scale, w_scale = x_scale[:, None], w_scale[:, None]
    left, right = np.asarray(x, np.float32) * x_scale, np.asarray(w, np.float32) * w_scale
    out = np.asarray(jnp.matmul(left, right.T, precision="highest"))
    return out if bias is None else out + np.asarray(bias, np.float32)


def relative_error(out, expected):
    out = np.asarray(out, np.float32)
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


# Every branch of the kernel: both orientations, short tiles on every side, split-K, multicast, K of every swizzle.
BLOCK_CASES = [
    ((1, 200, 384), swapped(columns=8, sub=1, warpgroups=2, stages=2)),
    ((7, 192, 544), swapped(columns=8, sub=1, warpgroups=1, stages=3, splits=2)),
    ((63, 320, 576), swapped(columns=64, sub=1, warpgroups=2, stages=2)),
    ((50, 400, 288), swapped(columns=64, sub=1, warpgroups=3, stages=2)),
    ((100, 136, 48), swapped(columns=128, sub=1, warpgroups=2, stages=2)),
    ((129, 72, 288), upright(columns=64, sub=1, warpgroups=2, stages=2)),
    ((300, 320, 640), upright(columns=128, sub=2, warpgroups=2, stages=2)),
    ((130, 264, 416), upright(columns=128, sub=1, warpgroups=2, stages=2, splits=2)),
    ((300, 200, 256), upright(columns=128, sub=1, warpgroups=3, stages=2)),
    ((257, 320, 256), upright(columns=128, sub=2, warpgroups=2, stages=3, cluster=2)),
]


@pytest.mark.parametrize(("shape", "config"), BLOCK_CASES, ids=str)
def test_block_scaled_numbers(shape, config):
    *args, bias = operands(*shape)
    with testing.interpret():
        out = fp8_block_gemm(*args, bias=bias, config=config, num_sms=4)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, reference(*args, bias)) <= TOLERANCE


ROW_CASES = [
    ((5, 136, 288), swapped(columns=8, sub=1, warpgroups=2, stages=2)),
    ((33, 200, 512), swapped(columns=64, sub=1, warpgroups=1, stages=2, splits=2)),
    ((150, 200, 256), upright(columns=128, sub=2, warpgroups=2, stages=2)),
]


@pytest.mark.parametrize(("shape", "config"), ROW_CASES, ids=str)
def test_row_scaled_numbers(shape, config):
    *args, bias = operands(*shape, scaling="row", dtypes=("float8_e5m2", "float8_e4m3fn"))
    with testing.interpret():
        out = fp8_rowwise_gemm(*args, bias=bias, out_dtype="float16", config=config, num_sms=3)
    assert out.dtype == jnp.float16
    assert relative_error(out, reference(*args, bias)) <= TOLERANCE


def test_tensor_scales_and_padding_rows():
    m, n, k = 5, 136, 256
    x, _, w, _, _ = operands(16, n, k)
    x_scale, w_scale = jnp.float32([0.5]), jnp.float32([3.0])
    with testing.interpret():
        out = fp8_rowwise_gemm(x, x_scale, w, w_scale, m=m, num_sms=2)
    expected = 1.5 * np.asarray(x, np.float32)[:m] @ np.asarray(w, np.float32).T
    assert out.shape == (m, n)
    assert relative_error(out, expected) <= TOLERANCE


def test_nan_and_zero_rows_stay_in_their_rows():
    x, x_scale, w, w_scale, _ = operands(12, 136, 256)
    x = x.at[3, 200].set(jnp.nan).at[5].set(0)
    with testing.interpret():
        out = np.asarray(fp8_block_gemm(x, x_scale, w, w_scale, num_sms=2), np.float32)
    assert np.isnan(out[3]).all()
    assert (out[5] == 0).all()
    others = [i for i in range(12) if i not in (3, 5)]
    expected = reference(x, x_scale, w, w_scale)
    assert relative_error(out[others], expected[others]) <= TOLERANCE


DEEPSEEK = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]


def test_chosen_tiles_fit_and_depend_on_the_size():
    for n, k in DEEPSEEK:
        for m in (1, 7, 16, 63, 64, 128, 129, 256, 4096):
            config = choose_tiles(m, n, k, num_sms=132)
            assert config.smem_bytes() <= MAX_SMEM
            assert config.stages >= 3
            assert config.swap or m > 64
    assert choose_tiles(1, 2112, 7168, num_sms=132).splits > 1  # 33 tiles would leave 99 SMs idle
    large = choose_tiles(4096, 7168, 16384, num_sms=132)
    assert (large.rows, large.columns, large.splits) == (256, 128, 1)


def structs(m, n, k, scaling="block"):
    args = jax.eval_shape(lambda: operands(m, n, k, scaling=scaling))
    return args


def compiled_cases():
    """Each tiling that `choose_tiles` picks for the benchmarked shapes, and those of the numeric tests."""
    cases = {}
    for n, k in DEEPSEEK:
        for m in (1, 16, 64, 128, 256, 4096):
            cases.setdefault(choose_tiles(m, n, k, num_sms=132), (m, n, k))
    for shape, config in BLOCK_CASES:
        cases.setdefault(config, shape)
    return [(shape, config) for config, shape in cases.items()]


@pytest.mark.parametrize("shape", [(1, 576, 7168), (63, 2112, 512), (129, 2112, 18432)])
def test_odd_shapes_lower(shape):
    for op, scaling in ((fp8_block_gemm, "block"), (fp8_rowwise_gemm, "row")):

        def run(x, x_scale, w, w_scale, bias, op=op):
            return op(x, x_scale, w, w_scale, bias=bias, num_sms=132)

        assert "mosaic_gpu" in testing.lower_for_gpu(run, *structs(*shape, scaling))


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
def test_ptxas_neither_spills_nor_serializes():
    def bind(op, config):
        return lambda x, x_scale, w, w_scale, bias: op(
            x, x_scale, w, w_scale, bias=bias, config=config, num_sms=132
        )

    jobs = [(bind(fp8_block_gemm, c), structs(*s)) for s, c in compiled_cases()]
    jobs += [(bind(fp8_rowwise_gemm, c), structs(*s, "row")) for s, c in ROW_CASES]
    jobs.append(
        (
            bind(fp8_rowwise_gemm, choose_tiles(4096, 4096, 7168, num_sms=132)),
            structs(4096, 4096, 7168, "row"),
        )
    )
    for reports in testing.ptxas_reports(jobs):
        (report,) = reports
        report.check()
        assert report.stack_bytes == 0


def test_bad_arguments_are_named():
    x, x_scale, w, w_scale, bias = operands(8, 128, 256)
    with pytest.raises(ValueError, match=r"N must be a multiple of 8 .* found N=132, K=256"):
        fp8_block_gemm(x, x_scale, jnp.zeros((132, 256), w.dtype), jnp.ones((2, 2)))
    with pytest.raises(
        ValueError, match=r"w_scale of w \[128, 256\] must be \[1, 2\]; found \[2, 2\]"
    ):
        fp8_block_gemm(x, x_scale, w, jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="multiple of 4"):
        fp8_block_gemm(x, jnp.ones((2, 9)), w, w_scale)
    with pytest.raises(ValueError, match="tokens last"):
        fp8_block_gemm(x, jnp.ones((8, 2)), w, w_scale)
    with pytest.raises(ValueError, match=r"m in 1\.\.M.; found x"):
        fp8_rowwise_gemm(x, jnp.ones(9), w, jnp.ones(128), m=9)
    with pytest.raises(ValueError, match=r"bias must be \[128\]"):
        fp8_block_gemm(x, x_scale, w, w_scale, bias=bias[:5])
    with pytest.raises(ValueError, match="scales must be float32"):
        fp8_rowwise_gemm(x, jnp.ones(8, jnp.bfloat16), w, jnp.ones(128))
    assert unsupported_reason(1, 576, 7168) is None
    assert "bfloat16" in unsupported_reason(1, 576, 7168, x_dtype="bfloat16")
    assert "float32" in unsupported_reason(1, 576, 7168, out_dtype="float32")


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 7, 63, 129, 300, 4096])
@pytest.mark.parametrize(("n", "k"), [*DEEPSEEK, (576, 7168), (2112, 128), (7168, 18432)])
def test_gpu_matches_the_reference(m, n, k):
    for op, scaling in ((fp8_block_gemm, "block"), (fp8_rowwise_gemm, "row")):
        *args, bias = operands(m, n, k, scaling=scaling, seed=m)
        out = jax.jit(op)(*args, bias=bias)
        assert relative_error(out, reference(*args, bias)) <= TOLERANCE
