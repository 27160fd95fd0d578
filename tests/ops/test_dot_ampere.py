"""The product of weights with 16-bit inputs on GPUs of compute capability 8: chosen on request only, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import quantize, testing
from qjax.ops._dispatch import simulate_gpu
from qjax.recipe import SCHEMES

N, K = 128, 192


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(jnp.bfloat16)


@pytest.mark.parametrize("name", ["int4_1x64_asym", "fp8_e4m3_channel"])
def test_the_same_weight_on_request(name):
    w = qjax.prepack(quantize(normal(N, K), name))
    x, bias = normal(3, K, seed=1), normal(N, seed=2)
    expected = np.asarray(qjax.dot(x.astype(jnp.float32), w, bias=bias))
    with testing.interpret(detect_races=False), simulate_gpu(capability="8.6"):
        out = qjax.dot(x, w, bias=bias, implementation="pallas_mosaic_gpu")
    assert np.linalg.norm(np.asarray(out, np.float32) - expected) <= 3e-3 * np.linalg.norm(expected)


def test_gradient():
    w = qjax.prepack(quantize(normal(N, K), "int4_1x64"))

    def total(x):
        return jnp.sum(qjax.dot(x, w, implementation="pallas_mosaic_gpu"), dtype=jnp.float32)

    with testing.interpret(detect_races=False), simulate_gpu(capability="8.0"):
        gradient = np.asarray(jax.grad(total)(normal(3, K, seed=1)), np.float32)
    expected = np.asarray(jnp.sum(w.dequantize(jnp.float32), axis=0))[None]
    assert np.linalg.norm(gradient - expected) <= 6e-3 * np.linalg.norm(expected) * 3**0.5


def test_reasons_are_told():
    x, asked = normal(3, K), "pallas_mosaic_gpu"
    with simulate_gpu(capability="8.0"):
        with pytest.raises(ValueError, match=r"qjax.prepack\(w\) once"):
            qjax.dot(x, quantize(normal(N, K), "int4_1x32"), implementation=asked)
        with pytest.raises(ValueError, match=r"capability is 8\.0, the kernel needs 9\.0"):
            w = quantize(normal(N, K), "fp8_e4m3_channel")
            inputs = SCHEMES["FP8_DYNAMIC"].activations
            qjax.dot(x, w, activation_format=inputs, implementation=asked)
    with simulate_gpu(capability="7.5"), pytest.raises(ValueError, match=r"needs 9\.0 or 8\.0 or"):
        qjax.dot(x, qjax.prepack(quantize(normal(N, K), "int4_1x32")), implementation=asked)
