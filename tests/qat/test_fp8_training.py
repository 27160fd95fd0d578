"""Training in FP8: the three products against their definitions, models on one device and on a mesh, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from qat_tiny_model import CONFIG

import qjax
from qjax import nn, qat, testing
from qjax.formats import ActivationFormat
from qjax.ops import fp8_dot
from qjax.ops._dispatch import simulate_gpu
from qjax.quantization import quantize, quantize_activation
from qjax.registry import model_module
from qjax.sharding import Sharding, make_mesh


def normal(*shape, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def rounded(x, element="float8_e4m3fn", amax_min=0.0):
    name = "fp8_e4m3_1x128" if element == "float8_e4m3fn" else "fp8_e5m2_1x128"
    q = quantize_activation(x, ActivationFormat(qjax.qformat(name), amax_min=amax_min))
    return np.asarray(q.dequantize(jnp.float32), np.float64)


@pytest.mark.parametrize("element", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("tokens", [(130,), (2, 50)])
def test_products_are_those_of_the_recipe(element, tokens):
    x, w, dy = normal(*tokens, 320), normal(200, 320, seed=1), normal(*tokens, 200, seed=2)
    y, pullback = jax.vjp(lambda x, w: fp8_dot(x, w, gradient_element=element), x, w)
    dx, dw = pullback(dy)
    x2, dy2 = x.reshape(-1, 320), dy.reshape(-1, 200)
    wq = np.asarray(quantize(w, "fp8_e4m3_128x128").dequantize(), np.float64)
    np.testing.assert_allclose(
        y.reshape(-1, 200), rounded(x2, amax_min=1e-4) @ wq.T, rtol=1e-4, atol=1e-3
    )
    np.testing.assert_allclose(
        dx.reshape(-1, 320), rounded(dy2, element) @ wq, rtol=1e-4, atol=1e-3
    )
    expected = rounded(dy2.T, element) @ rounded(x2.T, amax_min=1e-4).T
    np.testing.assert_allclose(dw, expected, rtol=1e-4, atol=1e-3)
    exact = np.asarray(dy2, np.float64).T @ np.asarray(x2, np.float64)
    assert np.linalg.norm(dw - exact) / np.linalg.norm(exact) < 0.1


def test_forward_and_gradients_run_on_kernels():
    tokens, k, n = 150, 96, 64
    x, w = normal(tokens, k).astype(jnp.bfloat16), normal(n, k, seed=1)
    dy = normal(tokens, n, seed=2).astype(jnp.bfloat16)

    def differentiate(implementation):
        def product(x, w):
            return fp8_dot(x, w, gradient_element="float8_e5m2", implementation=implementation)

        y, pullback = jax.vjp(product, x, w)
        return y, *pullback(dy)

    expected = differentiate("xla")
    with testing.interpret(), simulate_gpu():
        found = differentiate("pallas_mosaic_gpu")
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) / np.linalg.norm(b) <= 2.5e-3  # both round to bfloat16


def test_training_runs_on_kernels():
    x, w = jnp.ones((64, 128), jnp.bfloat16), jnp.ones((64, 128))

    def kernels(implementation, x):
        def loss(w):
            return jnp.sum(fp8_dot(x, w, implementation=implementation).astype(jnp.float32))

        with simulate_gpu():
            return str(jax.make_jaxpr(jax.grad(loss))(w))

    ops = [
        f"fp8_{op}" for op in ("block_gemm", "wgrad_gemm", "quantize_both_axes", "quantize_128x128")
    ]
    assert all(op in kernels(None, x) for op in ops)
    assert "pallas" not in kernels("xla", x)
    with pytest.raises(ValueError, match=r"fp8_dot: .* x must be one of .*; found float32"):
        kernels("pallas_mosaic_gpu", x.astype(jnp.float32))


@pytest.mark.gpu
def test_gpu_gradients_match_the_reference():
    for tokens, n, k in ((150, 160, 288), (4096, 4096, 4096)):
        x, w = normal(tokens, k).astype(jnp.bfloat16), normal(n, k, seed=1, scale=k**-0.5)
        dy = normal(tokens, n, seed=2, scale=1e-6).astype(jnp.bfloat16)
        for element in ("float8_e4m3fn", "float8_e5m2"):
            results = []
            for implementation in ("pallas_mosaic_gpu", None, "xla"):

                @jax.jit
                def differentiate(x, w, dy, element=element, implementation=implementation):
                    options = dict(gradient_element=element, implementation=implementation)
                    y, pullback = jax.vjp(lambda x, w: fp8_dot(x, w, **options), x, w)
                    return y, *pullback(dy)

                results.append(differentiate(x, w, dy))
            for found in results[:2]:
                for a, b in zip(found, results[2], strict=True):
                    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
                    assert jnp.linalg.norm(a - b) / jnp.linalg.norm(b) <= 3e-3


IDS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 33)), jnp.int32)


def losses(sharding=None, fp8=True, steps=12):
    family = model_module("llama")
    config = family.Config.from_hf(CONFIG)
    model = family.Model(config, dtype="float32", sharding=sharding or Sharding())
    nn.initialize(model, jax.random.key(0), scale=0.1)
    if fp8:
        assert len(qat.fp8_training(model)) == 14
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.sgd(0.1)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = nnx.merge(graphdef, params, rest)(IDS[:, :-1])[0]
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, IDS[:, 1:])
            return jnp.mean(nll)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state2 = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state2, value

    found = []
    for _ in range(steps):
        params, state, value = step(params, state)
        found.append(float(value))
    return found


def test_a_model_learns_as_in_float32_and_on_a_mesh():
    plain, fp8 = losses(fp8=False), losses()
    assert plain[-1] < 0.9 * plain[0]
    np.testing.assert_allclose(fp8, plain, rtol=0.03)
    assert max(abs(a - b) for a, b in zip(fp8, plain, strict=True)) > 1e-4
    # A shard's own columns and tokens share scales, so codes round otherwise, and steps amplify it.
    mesh = losses(Sharding(make_mesh("tensor=2,data=2")), steps=6)
    np.testing.assert_allclose(mesh, fp8[:6], rtol=5e-3)


def test_misuse_is_told():
    family = model_module("llama")
    model = family.Model(family.Config.from_hf(CONFIG), dtype="float32")
    nn.initialize(model, jax.random.key(0))
    with pytest.raises(ValueError, match="match none"):
        qat.fp8_training(model, targets=("mlp",))
    with pytest.raises(ValueError, match="gradient_element must be one of"):
        qat.fp8_training(model, gradient_element="float16")
    qat.prepare(model, "FP8_BLOCK")
    with pytest.raises(ValueError, match="needs a plain weight"):
        qat.fp8_training(model)
    with pytest.raises(ValueError, match="of one K"):
        fp8_dot(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
