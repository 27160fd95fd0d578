"""The FP8 product of weight gradients: numbers in interpret mode, ptxas of every tiling, a GPU where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import testing
from qjax.pallas_kernels.fp8_wgrad_gemm_sm90 import (
    MAX_SMEM,
    WgradTileConfig,
    candidate_tiles,
    choose_tiles,
    fp8_wgrad_gemm,
    unsupported_reason,
)

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}
GPU_TOLERANCE = 2e-3  # the tensor cores keep about 14 bits of the sum over 128 tokens
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"


def operands(n, k, tokens, *, dtypes=(E4M3, E4M3), seed=0):
    """Random operands whose scales span a factor of 100; columns past `tokens` are zeros."""
    keys = jax.random.split(jax.random.key(seed), 4)
    width, blocks = -(-tokens // 16) * 16, -(-tokens // 128)
    args = []
    for rows, dtype, key in ((n, dtypes[0], keys[:2]), (k, dtypes[1], keys[2:])):
        codes = 4 * jax.random.normal(key[0], (rows, width))
        codes = jnp.where(jnp.arange(width)[None] < tokens, codes, 0.0)
        shape = (blocks, -(-rows // 4) * 4)
        scale = 10.0 ** jax.random.uniform(key[1], shape, minval=-2.0, maxval=0.0)
        args += [codes.astype(dtype), scale]
    return args


def reference(left, left_scale, right, right_scale):
    """float32 product of the dequantized operands."""

    def values(codes, scale):
        scale = np.repeat(np.asarray(scale).T[: codes.shape[0]], 128, axis=1)
        return np.asarray(codes, np.float32) * scale[:, : codes.shape[1]]

    product = jnp.matmul(
        values(left, left_scale), values(right, right_scale).T, precision="highest"
    )
    return np.asarray(product)


def relative_error(out, expected):
    out = np.asarray(out, np.float32)
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


# Tiles that are cut on every side, tokens of every remainder, several tiles a worker, fewer blocks than stages.
CASES = [
    ((260, 136, 272), WgradTileConfig(sub=2, columns=128, stages=2), (E4M3, E4M3), "float32"),
    ((120, 200, 400), WgradTileConfig(sub=1, columns=128, stages=3), (E5M2, E4M3), "float32"),
    ((129, 136, 272), WgradTileConfig(sub=1, columns=64, stages=2), (E4M3, E5M2), "bfloat16"),
    ((57, 72, 5), WgradTileConfig(sub=2, columns=128, stages=3), (E5M2, E4M3), "bfloat16"),
]


@pytest.mark.parametrize(("shape", "config", "dtypes", "out_dtype"), CASES, ids=str)
def test_numbers(shape, config, dtypes, out_dtype):
    args = operands(*shape, dtypes=dtypes)
    with testing.interpret():
        out = fp8_wgrad_gemm(*args, config=config, out_dtype=out_dtype, num_sms=3)
    assert (out.shape, out.dtype) == (shape[:2], out_dtype)
    assert relative_error(out, reference(*args)) <= TOLERANCE[out_dtype]


def test_it_adds_to_a_gradient():
    args = operands(200, 136, 272)
    before = 100 * jax.random.normal(jax.random.key(9), (200, 136))
    config = WgradTileConfig(sub=1, columns=64, stages=2)
    with testing.interpret():
        out = fp8_wgrad_gemm(*args, accumulator=before, config=config, num_sms=2)
        again = fp8_wgrad_gemm(*args, accumulator=out, config=config, num_sms=2)
    product = reference(*args)
    assert relative_error(out, np.asarray(before) + product) <= 1e-5
    assert relative_error(again, np.asarray(before) + 2 * product) <= 1e-5


def test_nan_and_zero_rows_stay_in_their_rows():
    left, left_scale, right, right_scale = operands(70, 72, 150)
    left = left.at[3, 140].set(jnp.nan).at[5].set(0)
    with testing.interpret():
        out = np.asarray(fp8_wgrad_gemm(left, left_scale, right, right_scale, num_sms=2))
    assert np.isnan(out[3]).all()
    assert (out[5] == 0).all()
    others = [i for i in range(70) if i not in (3, 5)]
    expected = reference(left, left_scale, right, right_scale)
    assert relative_error(out[others], expected[others]) <= 1e-5


LLAMA = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]


def test_chosen_tiles_fit_and_depend_on_the_size():
    for config in candidate_tiles():
        assert config.smem_bytes() <= MAX_SMEM
        assert config.stages >= 3
    for n, k in LLAMA:
        config = choose_tiles(n, k, 4096, num_sms=132)
        assert (config.rows, config.columns) == (256, 128)
    assert (
        choose_tiles(1024, 1024, 4096, num_sms=132).rows == 128
    )  # 32 large tiles would leave SMs idle


def structs(n, k, tokens, dtypes=(E4M3, E4M3)):
    return jax.eval_shape(lambda: operands(n, k, tokens, dtypes=dtypes))


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
def test_ptxas_neither_spills_nor_serializes():
    def bind(config, **options):
        return lambda *args: fp8_wgrad_gemm(*args, config=config, num_sms=132, **options)

    large = candidate_tiles()[0]
    jobs = [(bind(c), structs(4096, 4096, 4096)) for c in candidate_tiles()]
    jobs.append((bind(large, out_dtype="bfloat16"), structs(300, 264, 272, (E5M2, E4M3))))
    gradient = jax.ShapeDtypeStruct((300, 264), jnp.float32)
    jobs.append(
        (
            lambda *args: fp8_wgrad_gemm(*args[:4], accumulator=args[4], num_sms=132),
            [*structs(300, 264, 272), gradient],
        )
    )
    for (report,) in testing.ptxas_reports(jobs):
        report.check()
        assert report.stack_bytes == 0


def test_bad_arguments_are_named():
    left, left_scale, right, right_scale = args = operands(64, 64, 256)
    with pytest.raises(ValueError, match=r"of one T; found \[64, 256\] and \[64, 128\]"):
        fp8_wgrad_gemm(left, left_scale, right[:, :128], right_scale)
    with pytest.raises(ValueError, match=r"multiple of 16, .* found N=64, K=64, 200 tokens"):
        fp8_wgrad_gemm(left[:, :200], left_scale, right[:, :200], right_scale)
    with pytest.raises(ValueError, match="K must be a multiple of 8"):
        fp8_wgrad_gemm(left, left_scale, right[:60], right_scale)
    with pytest.raises(
        ValueError, match=r"right_scale must be float32 \[2, R\], R a multiple of 4"
    ):
        fp8_wgrad_gemm(left, left_scale, right, right_scale.T)
    with pytest.raises(ValueError, match=r"accumulator must be float32 \[64, 64\]"):
        fp8_wgrad_gemm(*args, accumulator=jnp.zeros((64, 64)), out_dtype="bfloat16")
    with pytest.raises(ValueError, match="no such tile"):
        WgradTileConfig(sub=3, columns=128, stages=2)
    assert unsupported_reason(1, 8, 16) is None
    assert "float16" in unsupported_reason(8, 8, 16, out_dtype="float16")
    assert "int8" in unsupported_reason(8, 8, 16, left_dtype="int8")


GPU_CASES = [
    ((4096, 4096, 4096), (E4M3, E4M3)),
    ((6144, 4096, 1000), (E5M2, E4M3)),
    ((576, 1536, 8192), (E4M3, E5M2)),
    ((201, 72, 5), (E5M2, E4M3)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtypes"), GPU_CASES, ids=str)
def test_gpu_matches_the_reference(shape, dtypes):
    args = operands(*shape, dtypes=dtypes)
    expected = reference(*args)
    before = jax.random.normal(jax.random.key(1), shape[:2])
    added = jax.jit(lambda *a: fp8_wgrad_gemm(*a[:4], accumulator=a[4]))(*args, before)
    assert relative_error(added, expected + np.asarray(before)) <= GPU_TOLERANCE
    for config in candidate_tiles():
        out = fp8_wgrad_gemm(*args, config=config)
        assert relative_error(out, expected) <= GPU_TOLERANCE
    out = fp8_wgrad_gemm(*args, out_dtype="bfloat16")
    assert relative_error(out, expected) <= 2 * GPU_TOLERANCE
