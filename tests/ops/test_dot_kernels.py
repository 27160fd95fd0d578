"""The product through its kernels, interpreted: values, gradients, batching, meshes, refusals, re-laid out weights."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import qjax
from qjax import nn, qarray, quantize, testing
from qjax.checkpoint._declared import declared_spec
from qjax.nn import Context
from qjax.ops._dispatch import simulate_gpu
from qjax.recipe import SCHEMES, QuantSpec
from qjax.sharding import Sharding, array_specs, make_mesh, part_specs

N, K = 192, 256


def normal(*shape, seed=0, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def kernels():
    """Every op chooses its kernel and runs it on the CPU."""
    stack = contextlib.ExitStack()
    stack.enter_context(testing.interpret())
    stack.enter_context(simulate_gpu())
    stack.enter_context(qjax.require_kernels())
    return stack


MIXED = [
    "int4_1x64_asym",
    "int4_channel",
    "int4_1x32_min",
    "int8_channel_asym",
    "int8_tensor",
    "fp8_e4m3_128x128",
    "mxfp8",
    "mxfp4",
    "int2_1x64_asym",
    "int3_1x32_min",
]
STORED = [
    *MIXED,
    "int4_1x32",
    "int4_1x128",
    "int8_1x128",
    "fp8_e5m2_tensor",
    "int6_1x64",
    "int8_1x64_min",
]


@pytest.mark.parametrize("name", STORED)
def test_wgmma_storage_holds_the_same_array(name):
    w = quantize(normal(2, N, K), name)
    if name.startswith("mx"):  # every power of two, and NaN
        every = jnp.resize(jnp.arange(256, dtype=jnp.uint8), w.scale.shape)
        w = dataclasses.replace(w, scale=jax.lax.bitcast_convert_type(every, w.scale.dtype))
    packed = qarray.to_wgmma(w)
    packed.validate()
    storage = "wgmma8" if name == "mxfp4" else "wgmma"  # of experts
    assert packed.format.storage == storage and packed.shape == w.shape
    assert packed.format.nbytes(w.shape) == packed.nbytes
    np.testing.assert_array_equal(packed.dequantize(jnp.float32), w.dequantize(jnp.float32))
    back = qarray.to_packed(packed)
    assert back.format == w.format
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(w), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_codes_of_wgmma_storage_are_narrow():
    sizes = {"int2_1x128": 2, "int3_1x128": 4, "int4_1x128": 4, "int6_1x128": 8, "mxfp8": 8}
    for name, bits in sizes.items():
        packed = qjax.prepack(quantize(normal(N, K), name))
        assert packed.format.stored_bits == bits
        assert packed.qvalue.nbytes * 8 == N * K * bits


def test_wider_groups_repeat_their_scales():
    w = quantize(normal(64, 512), qjax.qformat("int4_1x256"))
    packed = qjax.prepack(w)
    assert packed.format.block_shape == (1, 128)
    np.testing.assert_array_equal(packed.dequantize(), w.dequantize())


def test_quantizing_into_wgmma_storage():
    w = normal(N, K)
    for name in ("int4_1x32", "fp8_e4m3_128x128"):
        packed = qjax.prepack(quantize(w, name))
        again = quantize(w, packed.format)
        np.testing.assert_array_equal(again.qvalue, packed.qvalue)


def test_other_arrays_stay():
    for name, shape in (("nvfp4", (N, K)), ("int8_16x16", (N, K)), ("int4_1x32", (N + 8, K))):
        w = quantize(normal(*shape), name)
        assert qjax.prepack(w) is w


@pytest.mark.parametrize("name", MIXED)
def test_mixed_inputs(name):
    n = 64
    x, w, bias = normal(2, 3, K, seed=1), quantize(normal(n, K), name), normal(n, seed=2)
    expected = qjax.dot(x.astype(jnp.float32), w, bias=bias)
    with kernels():
        y = qjax.dot(x, qjax.prepack(w), bias=bias)
    assert y.dtype == x.dtype and y.shape == (2, 3, n)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("name", ["int4_1x32", "int8_1x128_asym"])
def test_permuted_columns(name):
    perm = jnp.asarray(np.random.default_rng(0).permutation(K), jnp.int32)
    w = dataclasses.replace(quantize(normal(N, K), name), column_perm=perm)
    x = normal(3, K, seed=1)
    expected = x.astype(jnp.float32) @ w.dequantize(jnp.float32).T
    with kernels():
        y = qjax.dot(x, qjax.prepack(w))
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("word", ["FP8_BLOCK", "FP8_DYNAMIC", "FP8"])
def test_fp8(word):
    spec = SCHEMES[word]
    x, w, bias = normal(5, K, seed=1), quantize(normal(N, K), spec.weights), normal(N, seed=2)
    scale = jnp.float32(0.01) if spec.activations.static else None
    args = dict(activation_format=spec.activations, activation_scale=scale, bias=bias)
    expected = qjax.dot(x, w, **args, out_dtype=jnp.float32)
    with kernels():
        y = qjax.dot(x, w, **args)
    # The codes are those of the reference; only sums and the output are rounded differently.
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-7, atol=2**-6)


def test_gradients_are_those_of_the_reference():
    spec = SCHEMES["FP8_BLOCK"]
    x, bias, g = normal(4, K, seed=1), normal(N, seed=2), normal(4, N, seed=3)
    for w, act in (
        (qjax.prepack(quantize(normal(N, K), "int4_1x32")), None),
        (quantize(normal(N, K), spec.weights), spec.activations),
    ):

        def loss(x, bias, w=w, act=act):
            y = qjax.dot(x, w, bias=bias, activation_format=act)
            return jnp.sum(y.astype(jnp.float32) * g.astype(jnp.float32))

        expected = jax.grad(loss, (0, 1))(x, bias)
        with kernels():
            found = jax.grad(loss, (0, 1))(x, bias)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            np.testing.assert_allclose(a, b, rtol=2**-6, atol=2**-4)


def test_vmap_and_jit():
    w = qjax.prepack(quantize(normal(64, K), "int4_1x128"))
    x = normal(3, 2, K, seed=1)
    with kernels():
        batched = jax.jit(jax.vmap(lambda x: qjax.dot(x, w)))(x)
    np.testing.assert_array_equal(batched, qjax.dot(x, w).astype(batched.dtype))


def test_reasons_are_told():
    x = normal(3, K)
    cases = {
        "prepack": quantize(normal(N, K), "int4_1x32"),
        "prepack(w) once": quantize(normal(N, K), "fp8_e4m3_128x128"),
        "int8": quantize(normal(N, K), "int8_16x16"),
    }
    for word, w in cases.items():
        with simulate_gpu(), pytest.raises(ValueError, match=f"dot: .*{re.escape(word)}"):
            qjax.dot(x, w, implementation="pallas_mosaic_gpu")
    with pytest.raises(ValueError, match="the device is a cpu"):
        qjax.dot(x, qjax.prepack(cases["prepack"]), implementation="pallas_mosaic_gpu")


@pytest.mark.parametrize(("in_axis", "out_axis"), [(None, "tensor"), ("tensor", None)])
def test_layers_on_a_mesh(in_axis, out_axis):
    sharding = Sharding(make_mesh("tensor=2"))
    spec = SCHEMES["W4A16"]
    one = nn.Linear(K, N * 2, "l", Context({"l": spec}))
    nn.initialize(one, jax.random.key(0))
    x = normal(3, K, seed=1)
    expected = one(x.astype(jnp.float32))
    layer = nn.Linear(
        K, N * 2, "l", Context({"l": spec}, sharding=sharding), in_axis=in_axis, out_axis=out_axis
    )
    w = one.weight.get_value()
    layer.weight.set_value(
        jax.tree.map(
            lambda part, like: jax.device_put(part, like.sharding), w, layer.weight.get_value()
        )
    )
    assert nn.prepack(layer) == 1
    packed = layer.weight.get_value()
    specs = array_specs(packed, P(out_axis, in_axis))
    assert packed.qvalue.sharding.spec == specs.qvalue
    np.testing.assert_array_equal(packed.dequantize(), w.dequantize())
    # The interpreter knows one device, so the parts meet the reference here.
    np.testing.assert_allclose(layer(x.astype(jnp.float32)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["fp8_e4m3_128x128", "fp8_e4m3_tensor", "int2_1x32_asym"])
def test_layers_declare_the_format_they_were_loaded_in(name):
    spec = QuantSpec(qjax.qformat(name), None)
    layer = nn.Linear(K, N, "l", Context({"l": spec}))
    nn.initialize(layer, jax.random.key(0))
    w = layer.weight.get_value()
    assert nn.prepack(layer) == 1
    assert layer.weight.get_value().format.storage == "wgmma"
    assert declared_spec(layer) == spec
    for a, b in zip(
        jax.tree.leaves(qarray.to_packed(layer.weight.get_value())),
        jax.tree.leaves(w),
        strict=True,
    ):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_layers_with_quantized_inputs_keep_their_layout():
    layer = nn.Linear(K, N, "l", Context({"l": SCHEMES["FP8_BLOCK"]}))
    nn.initialize(layer, jax.random.key(0))
    assert nn.prepack(layer) == 0


def test_shards_that_would_cut_a_block_stay():
    context = Context({"l": SCHEMES["W4A16"]}, sharding=Sharding(make_mesh("tensor=2")))
    layer = nn.Linear(K, N, "l", context, out_axis="tensor")  # 96 rows a device
    nn.initialize(layer, jax.random.key(0))
    assert nn.prepack(layer) == 0


def test_specs_of_the_parts():
    for name, columns in (("int4_1x32", "data"), ("fp8_e4m3_tensor", None)):
        format = qjax.prepack(quantize(normal(N, K), name)).format
        specs = part_specs(format, P("tensor", "data"))
        assert specs["qvalue"] == P("tensor", "data", None, None)
        assert specs["scale"] == P("tensor", columns, None)


@pytest.mark.parametrize("word", ["FP8_BLOCK", "FP8_DYNAMIC"])
def test_experts(word):
    spec = SCHEMES[word]
    x, w, bias = (
        normal(11, K, seed=1),
        quantize(normal(3, N, K), spec.weights),
        normal(3, N, seed=2),
    )
    sizes, g = jnp.array([4, 0, 6], jnp.int32), normal(11, N, seed=3).astype(jnp.float32)
    args = dict(activation_format=spec.activations)
    expected = qjax.ragged_dot(x, w, sizes, bias=bias, **args, out_dtype=jnp.float32)

    def loss(x, bias):
        y = qjax.ragged_dot(x, w, sizes, bias=bias, **args).astype(jnp.float32)
        return jnp.sum(jnp.where(jnp.arange(11)[:, None] < 10, y * g, 0.0))

    gradients = jax.grad(loss, (0, 1))(x, bias)
    with kernels():
        y = qjax.ragged_dot(x, w, sizes, bias=bias, **args)
        found = jax.grad(loss, (0, 1))(x, bias)
    assert y.dtype == x.dtype and not np.asarray(y[10:], np.float32).any()
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-7, atol=2**-6)
    for a, b in zip(found, gradients, strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        np.testing.assert_allclose(a, b, rtol=2**-6, atol=2**-4)


def test_experts_without_a_kernel_are_told():
    x, w = normal(4, K), quantize(normal(2, N, K), "nvfp4")
    with simulate_gpu(), pytest.raises(ValueError, match=r"ragged_dot: .*float4_e2m1fn"):
        qjax.ragged_dot(x, w, jnp.array([2, 2]), implementation="pallas_mosaic_gpu")
