"""The weights' quantizer: bit for bit that of `qjax.quantization`, and its transposed codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import testing
from qjax.pallas_kernels.fp8_quantize_128x128_sm90 import fp8_quantize_128x128, unsupported_reason
from qjax.quantization import compute_grid, qformat, quantize

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"


def weight(n, k, dtype):
    """Blocks of very different size, one of zeros, one with infinities, a -0."""
    spread = jnp.exp(2.0 * jax.random.normal(jax.random.key(1), (-(-n // 128), -(-k // 128))))
    spread = jnp.repeat(jnp.repeat(spread, 128, axis=0), 128, axis=1)[:n, :k]
    w = jax.random.normal(jax.random.key(0), (n, k)) * spread
    w = w.at[:128, 128:256].set(0).at[3, 7].set(-jnp.inf).at[120, 100].set(jnp.inf)
    return w.at[5, 3].set(-0.0).astype(dtype)


def assert_matches(w, dtype, found):
    codes, transposed, scale = (np.asarray(a) for a in found)
    format = qformat("fp8_e4m3_128x128" if dtype == E4M3 else "fp8_e5m2_128x128")
    w = w.astype(jnp.float32)
    expected = quantize(w, format, grid=compute_grid(w, format))
    np.testing.assert_array_equal(scale, expected.scale)
    bits = np.asarray(expected.qvalue).view(np.uint8)
    np.testing.assert_array_equal(codes.view(np.uint8), bits)
    np.testing.assert_array_equal(transposed.view(np.uint8), bits.T)


CASES = [((272, 288), E4M3, jnp.float32), ((144, 192), E4M3, jnp.bfloat16)]


@pytest.mark.parametrize(("shape", "dtype", "w_dtype"), CASES, ids=str)
def test_codes_and_scales(shape, dtype, w_dtype):
    w = weight(*shape, w_dtype)
    with testing.interpret():
        found = fp8_quantize_128x128(w, dtype=dtype)
    assert_matches(w, dtype, found)


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
def test_ptxas_does_not_spill():
    jobs = [
        (
            functools.partial(fp8_quantize_128x128, dtype=dtype),
            [jax.ShapeDtypeStruct((272, 320), w)],
        )
        for w, dtype in ((jnp.float32, E4M3), (jnp.bfloat16, E5M2))
    ]
    for (report,) in testing.ptxas_reports(jobs):
        report.check()
        assert (
            report.registers <= 128
        )  # two CTAs an SM: the loads of one under the other's arithmetic


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"16 and K of 32, .* found N=40, K=64"):
        fp8_quantize_128x128(jnp.ones((40, 64)))
    with pytest.raises(ValueError, match=r"w must be one of .* found float16"):
        fp8_quantize_128x128(jnp.ones((64, 64), jnp.float16))
    with pytest.raises(ValueError, match="codes must be one of"):
        fp8_quantize_128x128(jnp.ones((64, 64)), dtype="int8")
    with pytest.raises(ValueError, match=r"w must be \[N, K\]; found \[64\]"):
        fp8_quantize_128x128(jnp.ones(64))
    assert "K of 64" in unsupported_reason(64, 96, w_dtype="bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(144, 192), (576, 1536), (6144, 4096)])
def test_gpu_matches_the_reference(n, k):
    for dtype, w_dtype in ((E4M3, jnp.float32), (E5M2, jnp.float32), (E4M3, jnp.bfloat16)):
        w = weight(n, k, w_dtype)
        assert_matches(w, dtype, fp8_quantize_128x128(w, dtype=dtype))


@pytest.mark.gpu
def test_gpu_nan_marks_its_block():
    w = weight(288, 288, jnp.float32).at[140, 130].set(jnp.nan)
    codes, transposed, scale = fp8_quantize_128x128(w)
    assert np.argwhere(np.isnan(scale)).tolist() == [[1, 1]]
    for found in (codes, transposed.T):
        assert np.isnan(np.asarray(found[128:256, 128:256], np.float32)).all()
        assert np.isnan(np.asarray(found, np.float32)).sum() == 128 * 128
