"""The quantizer along both axes: bit for bit that of `qjax.quantization`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import testing
from qjax.pallas_kernels.fp8_quantize_both_axes_sm90 import fp8_quantize_both_axes, padded_rows
from qjax.quantization import compute_grid, qformat, quantize

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"


def values(tokens, n, dtype=jnp.bfloat16):
    """Rows of very different size; a row and a column of zeros, infinities, a -0, a subnormal."""
    spread = jnp.exp(2.0 * jax.random.normal(jax.random.key(1), (tokens, 1)))
    x = (jax.random.normal(jax.random.key(0), (tokens, n)) * spread).astype(dtype)
    x = x.at[1].set(0).at[:, 5].set(0).at[2, 7].set(-jnp.inf).at[:, 9].set(jnp.inf)
    return x.at[0, 3].set(-0.0).at[3, 130:].set(jnp.finfo(dtype).tiny / 4)


def reference(x, dtype, **bounds):
    """Codes and scales of x [M, K] with K filled up to whole blocks."""
    format = qformat("fp8_e4m3_1x128" if dtype == E4M3 else "fp8_e5m2_1x128")
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 128)))
    q = quantize(padded, format, grid=compute_grid(padded, format, **bounds))
    return np.asarray(q.qvalue), np.asarray(q.scale)


def assert_matches(x, dtype, found, **bounds):
    tokens, n = x.shape
    codes, scale, transposed, transposed_scale = (np.asarray(a) for a in found)
    up = (-(-tokens // 128) * 128, -(-n // 128) * 128)
    assert codes.shape == (padded_rows(tokens), n)
    assert scale.shape == (up[1] // 128, up[0])
    assert transposed.shape == (n, up[0])
    assert transposed_scale.shape == (up[0] // 128, up[1])
    for mine, my_scale, source in ((codes[:tokens], scale, x), (transposed, transposed_scale, x.T)):
        expected, expected_scale = reference(source, dtype, **bounds)
        rows = source.shape[0]
        np.testing.assert_array_equal(my_scale[:, :rows].T, expected_scale)
        expected = expected[:, : mine.shape[1]]
        np.testing.assert_array_equal(mine.view(np.uint8), expected.view(np.uint8))


CASES = [
    ((260, 272), E4M3, jnp.bfloat16, {}),
    ((5, 144), E5M2, jnp.float16, {"amax_min": 0.5, "amax_max": 2.0}),
]


@pytest.mark.parametrize(("shape", "dtype", "x_dtype", "bounds"), CASES, ids=str)
def test_codes_and_scales(shape, dtype, x_dtype, bounds):
    x = values(*shape, x_dtype)
    with testing.interpret():
        found = fp8_quantize_both_axes(x, dtype=dtype, **bounds)
    assert_matches(x, dtype, found, **bounds)


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
def test_ptxas_does_not_spill():
    jobs = [
        (
            functools.partial(fp8_quantize_both_axes, dtype=dtype),
            [jax.ShapeDtypeStruct((300, 272), x)],
        )
        for x, dtype in ((jnp.bfloat16, E4M3), (jnp.float16, E5M2))
    ]
    (bfloat16,), (float16,) = testing.ptxas_reports(jobs)
    bfloat16.check()
    float16.check()
    # Three CTAs an SM: the loads of some run under the arithmetic of others.
    assert bfloat16.registers <= 80


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"K must be a multiple of 16 .* found M=2, K=40"):
        fp8_quantize_both_axes(jnp.ones((2, 40), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"x must be one of .* found float32"):
        fp8_quantize_both_axes(jnp.ones((2, 128)))
    with pytest.raises(ValueError, match="codes must be one of"):
        fp8_quantize_both_axes(jnp.ones((2, 128), jnp.bfloat16), dtype="int8")
    with pytest.raises(ValueError, match=r"x must be \[T, N\]; found \[128\]"):
        fp8_quantize_both_axes(jnp.ones(128, jnp.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "n"), [(1, 576), (300, 1536), (4096, 4096)])
def test_gpu_matches_the_reference(tokens, n):
    for dtype in (E4M3, E5M2):
        x = values(max(tokens, 4), n)[:tokens]
        assert_matches(x, dtype, fp8_quantize_both_axes(x, dtype=dtype))


@pytest.mark.gpu
def test_gpu_nan_marks_its_blocks():
    x = values(300, 272).at[140, 130].set(jnp.nan)
    codes, scale, transposed, transposed_scale = fp8_quantize_both_axes(x)
    for found, at in ((scale, (1, 140)), (transposed_scale, (1, 130))):
        assert np.argwhere(np.isnan(found)).tolist() == [list(at)]
    assert np.isnan(np.asarray(codes[140, 128:256], np.float32)).all()
    assert np.isnan(np.asarray(transposed[130, 128:256], np.float32)).all()
