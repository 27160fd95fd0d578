"""Fake quantization: values equal the quantizer's, gradients equal their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import qformat, quantize
from qjax.qat import fake_quant
from qjax.quantization import compute_grid

FORMATS = [
    "int2_1x32",
    "int4_1x32",
    "int4_1x32_asym",
    "int4_1x32_min",
    "int3_channel",
    "int8_tensor",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "fp8_e4m3_128x128",
    "fp8_e5m2_channel",
]


def normal(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_the_quantizers_and_gradients_pass_straight(name, dtype):
    x = normal((2, 40, 256), dtype=dtype)
    cotangent = normal(x.shape, 1, dtype)
    y, pullback = jax.vjp(lambda x: fake_quant(x, name), x)
    np.testing.assert_array_equal(y, quantize(x, name).dequantize())
    np.testing.assert_array_equal(pullback(cotangent)[0], cotangent)


def test_clipped_values_get_no_gradient():
    x = normal((4, 64))
    grid = compute_grid(x, qformat("int4_1x32"))
    u = np.asarray(x).reshape(4, 2, 32) / np.asarray(grid.scale)[..., None]
    saturates = (np.round(u) > 7).reshape(4, 64)
    gradient = jax.grad(lambda x: jnp.sum(fake_quant(x, "int4_1x32", clip=True)))(x)
    np.testing.assert_array_equal(gradient, np.where(saturates, 0.0, 1.0))
    assert 0 < saturates.sum() < saturates.size


def test_learned_scale_has_the_gradient_of_learned_step_sizes():
    """d y / d s = round(x/s) - x/s inside the grid, the grid's end outside (arXiv:1902.08153, eq. 3)."""
    x, cotangent = normal((4, 64)), normal((4, 64), 1)
    scale = jnp.full((4, 2), 0.15)  # amax / 0.15 lies beyond the grid's 7

    def loss(scale, x):
        grid = compute_grid(x, qformat("int4_1x32"))._replace(scale=scale)
        return jnp.sum(cotangent * fake_quant(x, "int4_1x32", grid=grid))

    by_scale, by_x = jax.grad(loss, (0, 1))(scale, x)
    u = np.asarray(x, np.float64).reshape(4, 2, 32) / 0.15
    inside = (np.round(u) >= -8) & (np.round(u) <= 7)
    derivative = np.where(inside, np.round(u) - u, np.clip(u, -8, 7))
    expected = (derivative * np.asarray(cotangent).reshape(4, 2, 32)).sum(-1)
    np.testing.assert_allclose(by_scale, expected, rtol=1e-4, atol=1e-4)
    # (x / s) * s has a derivative of 1 but for one rounding
    np.testing.assert_allclose(by_x, np.where(inside.reshape(4, 64), cotangent, 0.0), rtol=1e-6)
    assert 0 < inside.sum() < inside.size


def test_learned_rounding_moves_codes_and_has_a_gradient():
    """d y / d v = s inside the grid (AutoRound, arXiv:2309.05516)."""
    x = normal((4, 64))
    grid = compute_grid(x, qformat("int4_1x64"))._replace(scale=jnp.full((4, 1), 0.5))
    offsets = jnp.full(x.shape, 0.4)
    y = fake_quant(x, "int4_1x64", grid=grid, rounding=offsets)
    expected = np.clip(np.round(np.asarray(x) / 0.5 + 0.4), -8, 7) * 0.5
    np.testing.assert_allclose(y, expected, atol=1e-6)
    gradient = jax.grad(lambda v: jnp.sum(fake_quant(x, "int4_1x64", grid=grid, rounding=v)))(
        offsets
    )
    np.testing.assert_allclose(gradient, np.full(x.shape, 0.5))


def test_learned_scales_are_rounded_to_the_formats_scale_dtype():
    x = normal((2, 64))
    grid = compute_grid(x, qformat("mxfp4"))._replace(scale=jnp.full((2, 2), 0.3))
    y = fake_quant(x, "mxfp4", grid=grid)
    codes = {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    assert set(np.unique(np.abs(np.asarray(y) / 0.25)).tolist()) <= codes
    gradient = jax.grad(lambda s: jnp.sum(fake_quant(x, "mxfp4", grid=grid._replace(scale=s))))(
        grid.scale
    )
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)
