"""Layers on a mesh equal layers on one device, whatever the format and the cut."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import QuantSpec, Sharding, make_mesh, qformat, quantize
from qjax.formats import ActivationFormat
from qjax.nn import Context, Embedding, Linear, RMSNorm
from qjax.quantization import refine_blocks
from qjax.recipe import SCHEMES

SPECS = {
    "plain": QuantSpec(),
    "int4": QuantSpec(qformat("int4_1x32")),
    "asym": QuantSpec(qformat("int4_1x64_asym")),
    "mxfp4": QuantSpec(qformat("mxfp4")),
    "nvfp4": QuantSpec(qformat("nvfp4"), ActivationFormat(qformat("nvfp4"))),
    "fp8 blocks": SCHEMES["FP8_BLOCK"],
    "fp8 token": SCHEMES["FP8_DYNAMIC"],
    "int8": SCHEMES["INT8"],
    "fp8 tensor": QuantSpec(
        qformat("fp8_e4m3_tensor"), ActivationFormat(qformat("fp8_e4m3_tensor"))
    ),
}
N, K = 192, 256


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def linear(spec, sharding, *, permuted=False, **axes):
    context = Context({"layer": spec}, "float32", sharding)
    layer = Linear(K, N, "layer", context, use_bias=True, **axes)
    w, like = normal(N, K, seed=1), layer.weight.get_value()
    if spec.weights is not None:
        w = quantize(w, spec.weights)
        w = dataclasses.replace(refine_blocks(w, like.format.block_shape), format=like.format)
    if permuted:
        perm = np.random.default_rng(0).permutation(K).astype(np.int32)
        w = dataclasses.replace(w, column_perm=jnp.asarray(perm))
    layer.weight.set_value(w)
    layer.bias.set_value(normal(N, seed=2))
    return layer


@pytest.mark.parametrize("axes", [{"out_axis": "tensor"}, {"in_axis": "tensor"}, {}], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_column_and_row_parallel(name, axes):
    x = normal(4, 3, K)
    expected = linear(SPECS[name], Sharding())(x)
    layer = linear(SPECS[name], Sharding(make_mesh("tensor=4,data=2")), **axes)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jit(layer)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", [{"out_axis": "tensor"}, {"in_axis": "tensor"}], ids=str)
def test_permuted_columns_cross_shards(axes):
    x = normal(2, K)
    expected = linear(SPECS["int4"], Sharding(), permuted=True)(x)
    layer = linear(SPECS["int4"], Sharding(make_mesh("tensor=4")), permuted=True, **axes)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)
    w = layer.weight.get_value().dequantize(jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    bias = np.asarray(layer.bias.get_value())
    np.testing.assert_allclose(expected, exact + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "asym", "fp8 blocks"])
def test_embeddings(name):
    ids = jnp.asarray([[0, 5, 191], [77, 3, 100]])
    outputs = []
    for sharding in (Sharding(), Sharding(make_mesh("tensor=4,data=2"))):
        table = Embedding(N, K, "embed", Context({"embed": SPECS[name]}, "float32", sharding))
        w, like = normal(N, K), table.weight.get_value()
        if SPECS[name].weights is not None:
            w = quantize(w, SPECS[name].weights)
            w = dataclasses.replace(refine_blocks(w, like.format.block_shape), format=like.format)
        table.weight.set_value(w)
        outputs.append((table(ids), table.attend(normal(2, K, seed=1))))
    for one, many in zip(*outputs, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-4)


def test_norm():
    norm = RMSNorm(K, Context(dtype="float32"), eps=1e-5)
    norm.weight.set_value(normal(K, seed=1))
    x = np.asarray(normal(3, K), np.float64)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    expected *= np.asarray(norm.weight.get_value())
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-5)
