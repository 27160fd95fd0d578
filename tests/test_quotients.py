"""The quantizer's division: correctly rounded wherever it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import quantization


def test_quotients_are_corrected_to_the_nearest():
    # What the GPU's division may be: up to two ulps off.
    keys = jax.random.split(jax.random.key(11), 4)
    x = jax.random.normal(keys[0], (1 << 18,)).at[:3].set(jnp.array([0.0, -0.0, jnp.inf]))
    # A tie of e4m3's subnormals that a quotient one ulp lower would miss.
    x = x.at[3].set(float.fromhex("0x1.cap-19"))
    exponents = jax.random.randint(keys[1], x.shape, -70, 70).astype(jnp.float32)
    divisor = jnp.exp2(exponents) * jax.random.uniform(keys[2], x.shape, minval=1.0, maxval=2.0)
    divisor = divisor.at[3].set(float.fromhex("0x1.05b6dcp-11"))
    exact = np.asarray(x) / np.asarray(divisor)
    ulps = jax.random.randint(keys[3], x.shape, -2, 3)
    ulps = np.where(np.isfinite(exact) & (exact != 0), ulps, 0)
    off = (exact.view(np.int32) + ulps).view(np.float32)
    found = quantization._corrected(jnp.asarray(off), x, divisor)
    np.testing.assert_array_equal(np.asarray(found).view(np.int32), exact.view(np.int32))
    assert found[3] * 512 == 3.5


@pytest.mark.gpu
def test_gpu_divides_as_the_cpu():
    keys = jax.random.split(jax.random.key(12), 2)
    x = jax.random.normal(keys[0], (1024, 4096))
    divisor = jax.random.uniform(keys[1], (1024, 1), minval=1e-3, maxval=1e-2)
    found = np.asarray(jax.jit(quantization._divide)(x, divisor))
    np.testing.assert_array_equal(found, np.asarray(x) / np.asarray(divisor))
