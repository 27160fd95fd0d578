"""The product with a quantized weight: values against float64, gradients, refusals, dispatch."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import QArray, quantize
from qjax.ops._dispatch import choose, simulate_gpu
from qjax.quantization import quantize_activation
from qjax.recipe import SCHEMES

FORMATS = ["int4_1x32", "int4_1x32_asym", "int3_1x64", "int4_1x32_min", "int8_channel", "mxfp4",
           "nvfp4", "mxfp8", "fp8_e4m3_128x128", "fp8_e5m2_tensor"]  # fmt: skip


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def float64(x):
    return np.asarray(x.dequantize(jnp.float32) if isinstance(x, QArray) else x, np.float64)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values(name, dtype):
    x, w, bias = (
        normal(2, 3, 192, dtype=dtype),
        quantize(normal(160, 192), name),
        normal(160, seed=2),
    )
    y = qjax.dot(x, w, bias=bias)
    exact = float64(x.astype(jnp.float32)) @ float64(w).T + float64(bias)
    assert y.shape == (2, 3, 160) and y.dtype == x.dtype
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("word", ["INT8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP8", "MXFP4"])
def test_activation_formats_quantize_the_input(word):
    spec = SCHEMES[word]
    x, w = normal(5, 256), quantize(normal(128, 256, seed=1), spec.weights)
    y = qjax.dot(x, w, activation_format=spec.activations)
    exact = float64(quantize_activation(x, spec.activations)) @ float64(w).T
    np.testing.assert_allclose(np.asarray(y), exact, rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(y) - np.asarray(qjax.dot(x, w))).max() > 1e-3


def test_columns_in_another_order():
    w = quantize(normal(32, 64), "int4_1x32")
    perm = jnp.asarray(np.random.default_rng(0).permutation(64), jnp.int32)
    w, x = dataclasses.replace(w, column_perm=perm), normal(3, 64, seed=1)
    np.testing.assert_allclose(qjax.dot(x, w), x @ w.dequantize().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["int4_1x32", "fp8_e4m3_128x128"])
def test_gradient_reaches_the_input(name):
    w, g = quantize(normal(48, 64), name), normal(3, 48, seed=2)
    _, pullback = jax.vjp(lambda x: qjax.dot(x, w), normal(3, 64, seed=1))
    np.testing.assert_allclose(pullback(g)[0], g @ w.dequantize(), rtol=1e-5, atol=1e-5)


def test_gradients_of_plain_products_stay_16_bits_wide():
    x, w = normal(8, 64, dtype=jnp.bfloat16), normal(48, 64, seed=1)

    def loss(x, w):
        return jnp.sum(qjax.dot(x, w).astype(jnp.float32) ** 2)

    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, w))
    assert program.count("preferred_element_type=bfloat16") == 3
    assert "preferred_element_type=float32" not in program
    dx, dw = jax.grad(loss, (0, 1))(x, w)
    a, b = float64(x.astype(jnp.float32)), float64(w.astype(jnp.bfloat16).astype(jnp.float32))
    g = 2 * (a @ b.T)
    assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    for found, exact in ((dx, g @ b), (dw, g.T @ a)):
        error = np.linalg.norm(float64(found.astype(jnp.float32)) - exact)
        assert error < 2**-7 * np.linalg.norm(exact)  # three roundings to bfloat16


def test_one_row_on_a_gpu_is_the_same_product():
    x, w, bias = normal(1, 1, 256, dtype=jnp.bfloat16), normal(96, 256, seed=1), normal(96, seed=2)

    def loss(x, w):
        return jnp.sum(qjax.dot(x, w, bias=bias, out_dtype="float32") ** 2)

    expected = jax.value_and_grad(loss, (0, 1))(x, w)
    with simulate_gpu():
        found = jax.value_and_grad(loss, (0, 1))(x, w)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert a.shape == b.shape and np.linalg.norm(a - b) <= 3e-3 * np.linalg.norm(b)


def test_quantized_activations_are_differentiated_straight_through():
    spec = SCHEMES["FP8_DYNAMIC"]
    for w in (quantize(normal(48, 64), spec.weights), normal(48, 64)):
        dense = w.dequantize() if isinstance(w, QArray) else w
        run = lambda x, w=w: qjax.dot(x, w, activation_format=spec.activations)  # noqa: E731
        _, pullback = jax.vjp(run, normal(3, 64, seed=1))
        g = normal(3, 48, seed=2)
        np.testing.assert_allclose(pullback(g)[0], g @ dense, rtol=1e-5, atol=1e-5)


def test_jit_and_vmap():
    w, x = quantize(normal(32, 64), "int4_1x32"), normal(4, 3, 64, seed=1)
    expected = qjax.dot(x, w)
    np.testing.assert_allclose(jax.jit(qjax.dot)(x, w), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.vmap(lambda x: qjax.dot(x, w))(x), expected, rtol=1e-5, atol=1e-5
    )


def test_embedding_rows():
    for name in ("int8_1x32", "int4_1x32_asym", "fp8_e4m3_128x128", "int8_tensor", "nvfp4"):
        w = quantize(normal(300, 64), name)
        rows = jnp.asarray([[0, 299], [130, 7]])
        expected = np.asarray(w.dequantize())[np.asarray(rows)]
        np.testing.assert_array_equal(qjax.take_rows(w, rows, dtype="float32"), expected)


def test_refusals():
    w = quantize(normal(32, 64), "int4_1x32")
    with pytest.raises(ValueError, match=r"dot: needs x \[..., K\] and w \[N, K\] of one K"):
        qjax.dot(normal(3, 32), w)
    with pytest.raises(ValueError, match="the device is a cpu"):
        qjax.dot(normal(3, 64), w, implementation="pallas_mosaic_gpu")
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        qjax.dot(normal(3, 64), w, implementation="triton")
    with qjax.require_kernels(), pytest.raises(ValueError, match="kernels are required"):
        qjax.dot(normal(3, 64), w)
    assert qjax.dot(normal(3, 64), w, implementation="xla").shape == (3, 32)


def test_each_fallback_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="qjax"):
        for _ in range(3):
            assert choose("an op", None, "a reason of this test") == "xla"
        assert choose("an op", None, None) == "pallas_mosaic_gpu"
    assert caplog.messages == ["an op runs through XLA: a reason of this test"]
