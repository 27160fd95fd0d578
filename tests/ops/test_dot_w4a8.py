"""INT4 weights that meet 8-bit inputs: their storage, the product through its kernel, layers."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import checkpoint, nn, qarray, testing
from qjax.formats import ActivationFormat, qformat
from qjax.nn import Context
from qjax.ops._dispatch import simulate_gpu
from qjax.recipe import SCHEMES

N, K = 64, 256
KERNEL = "pallas_mosaic_gpu"

# Compiled whole, which is faster than operation by operation.
quantize = jax.jit(qjax.quantize, static_argnums=1)
prepack = jax.jit(qjax.prepack, static_argnums=1)


def normal(*shape, seed=0, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


@contextlib.contextmanager
def kernels():
    with testing.interpret(), simulate_gpu(), qjax.require_kernels():
        yield


def relative_error(found, expected):
    found, expected = (np.asarray(a, np.float32) for a in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["int4_1x32_asym", "int4_channel"])
def test_storage_holds_the_same_array(name):
    w = quantize(normal(2, N, K), name)
    packed = qarray.to_wgmma(w, eight_bit=True)
    packed.validate()
    assert packed.format.storage == "wgmma8" and packed.shape == w.shape
    assert packed.format.nbytes(w.shape) == packed.nbytes
    np.testing.assert_array_equal(packed.dequantize(jnp.float32), w.dequantize(jnp.float32))
    back = qarray.to_packed(packed)
    assert back.qvalue.tobytes() == w.qvalue.tobytes()
    again = quantize(normal(2, N, K), packed.format)
    np.testing.assert_array_equal(again.qvalue, packed.qvalue)


def test_storage_is_for_int4():
    activation = SCHEMES["W4A8"].activations
    for name in ("int4_1x32_min", "int8_1x32", "mxfp4"):
        w = quantize(normal(N, K), name)
        assert qjax.prepack(w, activation) is w
        with pytest.raises(ValueError, match="'wgmma8' stores int4 without minimums"):
            qarray.to_wgmma(w, eight_bit=True)
    w = quantize(normal(N, K), "int4_1x32")
    blocks = ActivationFormat(qformat("fp8_e4m3_1x128"))
    assert qjax.prepack(w, blocks) is w
    assert qjax.prepack(w).format.storage == "wgmma"


def test_values_and_gradients():
    """Of a static format, whose one scale is for all tokens, and weights with zero points."""
    activation, scale = ActivationFormat(qformat("int8_tensor"), static=True), jnp.float32(0.02)
    x, bias, g = normal(2, 3, K, seed=1), normal(N, seed=2), normal(2, 3, N, seed=3)
    w = quantize(normal(N, K), "int4_1x64_asym")
    packed = prepack(w, activation)

    def product(x, bias, w=w, **options):
        args = dict(activation_format=activation, activation_scale=scale, **options)
        return qjax.dot(x, w, bias=bias, **args)

    expected, pull = jax.vjp(jax.jit(lambda *a: product(*a, out_dtype=jnp.float32)), x, bias)
    with kernels():
        y, pull_kernel = jax.vjp(lambda *a: product(*a, w=packed, implementation=KERNEL), x, bias)
    # The codes are those of the reference; only sums and the output are rounded differently.
    assert y.dtype == x.dtype and relative_error(y, expected) <= 2e-3
    for a, b in zip(pull_kernel(g), pull(g.astype(jnp.float32)), strict=True):
        assert a.dtype == b.dtype and relative_error(a, b) <= 6e-3


def test_what_the_kernel_refuses():
    spec = SCHEMES["W4A8"]
    x, w = normal(3, K), quantize(normal(N, K), spec.weights)
    packed = prepack(w, spec.activations)
    with simulate_gpu():
        y = qjax.dot(x, packed, activation_format=spec.activations, implementation="xla")
        np.testing.assert_array_equal(y, qjax.dot(x, w, activation_format=spec.activations))
        for message, weight, activation in (
            (r"qjax.prepack\(w, activation\) once", w, spec.activations),
            ("no kernel for int4 .* with 16-bit inputs", packed, None),
            ("no kernel for int4 .* with float8_e4m3fn", packed, SCHEMES["FP8_BLOCK"].activations),
        ):
            with pytest.raises(ValueError, match=message):
                qjax.dot(x, weight, activation_format=activation, implementation=KERNEL)
        with pytest.raises(ValueError, match=r"the output must be one of .*float32"):
            wide = dict(out_dtype=jnp.float32, implementation=KERNEL)
            qjax.dot(x, packed, activation_format=spec.activations, **wide)


def test_layers_take_a_quantized_norm():
    spec = SCHEMES["W4AFP8"]
    layer = nn.Linear(K, N, "l", Context({"l": spec}, implementation=KERNEL))
    norm = nn.RMSNorm(K, Context(), eps=1e-5)
    for i, module in enumerate((layer, norm)):
        nn.initialize(module, jax.random.key(i))
    x = normal(5, K, seed=1)
    plain = nn.Linear(K, N, "l", Context({"l": spec}))
    plain.weight.set_value(layer.weight.get_value())
    expected = plain(norm(x).astype(jnp.float32))
    assert plain.input_format() is None
    assert nn.prepack(layer) == 1 and layer.input_format() == spec.activations
    with kernels():
        y = layer(norm(x))
    assert relative_error(y, expected) <= 2e-3
    layer.implementation = None  # the fused norm runs where kernels do; its codes meet the product
    quantized, _ = norm.into((layer,), x)
    layer.implementation = KERNEL
    with kernels():
        np.testing.assert_array_equal(layer(quantized), y)


def test_a_checkpoints_layers(checkpoints_dir):
    folder = checkpoints_dir / "ct_w4a8_int_llama"
    loaded = checkpoint.load(folder, implementation=KERNEL, prepack=True, progress=False)
    layer = loaded.model.model.layers[0].mlp.down_proj
    w = layer.weight.get_value()
    assert w.format.storage == "wgmma8" and w.format.block_shape == (1, 128)
    x = normal(2, 3, w.shape[1])
    with kernels():
        y = layer(x)
    expected = qjax.dot(x, w, activation_format=layer.activation_format, out_dtype=jnp.float32)
    assert relative_error(y, expected) <= 2e-3
