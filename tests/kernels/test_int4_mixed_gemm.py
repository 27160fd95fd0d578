"""INT4 weights times 16-bit activations: numbers, every tiling through ptxas, and the GPU where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import testing
from qjax.formats import qformat
from qjax.pallas_kernels.int4_mixed_gemm_sm90 import (
    MAX_SMEM,
    TileConfig,
    choose_tiles,
    int4_mixed_gemm,
    permute_columns,
    unsupported_reason,
)
from qjax.quantization import quantize

TOLERANCE = 2e-3


def operands(m, n, k, group, *, zero_points=False, dtype="bfloat16", scale_dtype="bfloat16"):
    keys = jax.random.split(jax.random.key(m + n + k), 5)
    x = jax.random.normal(keys[0], (m, k)).astype(dtype)
    codes = jax.random.bits(keys[1], (n, k // 2), jnp.uint8)
    scale = (0.1 * jax.random.normal(keys[2], (n, k // group))).astype(scale_dtype)
    zero_point = None
    if zero_points:
        zero_point = jax.random.randint(keys[3], (n, k // group), -8, 9).astype(jnp.int8)
    return x, codes, scale, zero_point, jax.random.normal(keys[4], (n,))


def reference(x, codes, scale, zero_point, bias):
    """float32 product with the dequantized weights."""
    codes, scale = np.asarray(codes), np.asarray(scale, np.float32)
    n, k = codes.shape[0], 2 * codes.shape[1]
    group = k // scale.shape[1]
    q = np.stack([codes & 15, codes >> 4], axis=-1).reshape(n, k).astype(np.float32) - 8
    if zero_point is not None:
        q -= np.repeat(np.asarray(zero_point, np.float32), group, axis=1)
    w = q * np.repeat(scale, group, axis=1)
    product = jnp.matmul(np.asarray(x, np.float32), w.T, precision="highest")
    return np.asarray(product) + np.asarray(bias, np.float32)


def relative_error(out, expected):
    return np.linalg.norm(np.asarray(out, np.float32) - expected) / np.linalg.norm(expected)


def config(columns, warpgroups, depth, splits=1):
    return TileConfig(columns, warpgroups, depth, 2, splits)


# Group sizes below, at and above a chunk, zero points, short tiles in M, N and K, split-K, all warpgroup counts.
CASES = [
    ((1, 192, 256, 128), {}, config(8, 2, 128)),
    ((5, 192, 576, 64), {"zero_points": True}, config(8, 2, 128, splits=2)),
    ((17, 128, 576, 32), {"zero_points": True, "scale_dtype": "float32"}, config(32, 1, 128)),
    ((100, 192, 512, 512), {"dtype": "float16", "scale_dtype": "float16"}, config(128, 2, 256)),
    ((200, 128, 768, 256), {"zero_points": True, "dtype": "float16"}, config(128, 2, 256)),
    ((3, 320, 512, 32), {"zero_points": True}, config(8, 4, 256)),
]


@pytest.mark.parametrize(("shape", "options", "tiles"), CASES, ids=str)
def test_numbers(shape, options, tiles):
    args = operands(*shape, **options)
    *arrays, bias = args
    with testing.interpret():
        out = int4_mixed_gemm(*arrays, bias=bias, config=tiles, num_sms=3)
    assert out.dtype == arrays[0].dtype
    assert relative_error(out, reference(*args)) <= TOLERANCE


@pytest.mark.parametrize("name", ["int4_1x128", "int4_1x64_asym", "int4_channel"])
def test_it_reads_the_packages_own_storage(name):
    m, n, k = 9, 128, 256
    w = quantize(jax.random.normal(jax.random.key(0), (n, k)), qformat(name))
    x = jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16)
    with testing.interpret():
        out = int4_mixed_gemm(x, w.qvalue, w.scale, w.zero_point, num_sms=2)
    expected = np.asarray(x, np.float32) @ np.asarray(w.dequantize(jnp.float32)).T
    assert relative_error(out, expected) <= TOLERANCE


def test_columns_are_permuted_within_each_32():
    columns = np.asarray(permute_columns(jnp.arange(64, dtype=jnp.int32)[None]))[0]
    for j in range(4):
        for t in range(4):
            for h in range(2):
                assert columns[8 * j + 2 * t + h] == 8 * t + 4 * h + j
    np.testing.assert_array_equal(columns[32:], columns[:32] + 32)


SIZES = [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (57344, 8192)]


def test_chosen_tiles_fit():
    for n, k in [*SIZES, (192, 576), (2880, 2880)]:
        for m in (1, 8, 17, 32, 64, 100, 256, 4096):
            tiles = choose_tiles(m, n, k, num_sms=132)
            assert tiles.smem_bytes() <= MAX_SMEM
            assert tiles.stages >= 3
    small = choose_tiles(1, 4096, 4096, num_sms=132)
    tasks = 4096 // small.rows * small.splits
    assert 64 <= tasks


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
def test_ptxas_neither_spills_nor_serializes():
    def structs(m, n, k, group, **options):
        return jax.eval_shape(lambda: operands(m, n, k, group, **options))

    def job(shape, options, tiles):
        x, codes, scale, zero_point, bias = structs(*shape, **options)
        arrays = (
            (x, codes, scale, bias) if zero_point is None else (x, codes, scale, bias, zero_point)
        )

        def run(x, codes, scale, bias, zero_point=None):
            return int4_mixed_gemm(
                x, codes, scale, zero_point, bias=bias, config=tiles, num_sms=132
            )

        return run, arrays

    jobs = [job(*case) for case in CASES]
    seen = set()
    for n, k in SIZES:
        for m in (1, 16, 32, 64, 256):
            tiles = choose_tiles(m, n, k, num_sms=132)
            if tiles not in seen:
                seen.add(tiles)
                jobs.append(job((m, n, k, 32), {"zero_points": True}, tiles))
    for reports in testing.ptxas_reports(jobs):
        (report,) = reports
        report.check()
        assert report.stack_bytes == 0


def test_bad_arguments_are_named():
    x, codes, scale, zero_point, bias = operands(4, 128, 256, 64, zero_points=True)
    with pytest.raises(ValueError, match=r"codes must be uint8\[128, 128\].* found int8"):
        int4_mixed_gemm(x, codes.astype(jnp.int8), scale)
    with pytest.raises(ValueError, match=r"groups a divisor of K=256; found \[128, 3\]"):
        int4_mixed_gemm(x, codes, scale[:, :3])
    with pytest.raises(
        ValueError, match=r"zero_point must be int8\[128, 4\].* found int8\[128, 2\]"
    ):
        int4_mixed_gemm(x, codes, scale, zero_point[:, :2])
    with pytest.raises(ValueError, match=r"bias must be float32\[128\].* found float32\[5\]"):
        int4_mixed_gemm(x, codes, scale, bias=bias[:5])
    with pytest.raises(ValueError, match=r"x must be one of .* found float32"):
        int4_mixed_gemm(x.astype(jnp.float32), codes, scale)
    assert unsupported_reason(4, 128, 256, group_size=64) is None
    assert "multiples of 64" in unsupported_reason(4, 100, 256, group_size=64)
    assert "groups must be of" in unsupported_reason(4, 128, 256, group_size=16)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 3, 17, 64, 100, 4096])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (28672, 4096), (192, 576), (2880, 2880)])
@pytest.mark.parametrize("group", [32, 64])
def test_gpu_matches_the_reference(m, n, k, group):
    for zero_points in (False, True):
        args = operands(m, n, k, group, zero_points=zero_points)
        *arrays, bias = args
        out = jax.jit(int4_mixed_gemm)(*arrays, bias=bias)
        assert relative_error(out, reference(*args)) <= TOLERANCE
