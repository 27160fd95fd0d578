"""Inputs quantized once for several layers: the codes, products, gradients and logits of quantizing in each layer."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import nn, ops, quantize, testing
from qjax.nn import Context, GatedMLP, Linear, RMSNorm
from qjax.ops._dispatch import simulate_gpu
from qjax.quantization import quantize_activation
from qjax.recipe import SCHEMES, QuantSpec, recipe
from qjax.registry import model_module

N, K, EPS = 136, 256, 1e-5
WORDS = ["FP8_BLOCK", "FP8_DYNAMIC", "FP8"]


def normal(*shape, seed=0, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def integers(*shape, seed=0):
    """Values whose squares add up to the same float32 in any order."""
    return jax.random.randint(jax.random.key(seed), shape, -8, 9).astype(jnp.bfloat16)


@contextlib.contextmanager
def kernels():
    with testing.interpret(), simulate_gpu(), qjax.require_kernels():
        yield


def activation_of(word):
    """The scheme's activation format and, if it is static, a scale."""
    activation = SCHEMES[word].activations
    return activation, jnp.float32(0.01) if activation.static else None


def assert_same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("path", [contextlib.nullcontext, kernels])
@pytest.mark.parametrize("word", WORDS)
def test_codes_and_products_are_those_of_single_steps(word, path):
    activation, scale = activation_of(word)
    x, residual, weight = integers(3, 2, K), integers(3, 2, K, seed=1), normal(K, seed=2)
    gate, up = normal(3, 2, K, seed=3), normal(3, 2, K, seed=4)
    w = quantize(normal(N, K, seed=5), SCHEMES[word].weights)
    y = ops.rms_norm(x + residual, weight, eps=EPS)
    gated = ops.silu_mul(gate, up)
    with path():
        normed, total = ops.quantized_rms_norm(
            x, weight, activation, eps=EPS, scale=scale, residual=residual
        )
        product = ops.quantized_silu_mul(gate, up, activation, scale=scale)
        assert_same(total, x + residual)
        for found, plain in ((normed, y), (product, gated)):
            assert found.shape == plain.shape and found.dtype == plain.dtype
            expected = quantize_activation(plain.reshape(-1, K), activation, scale=scale)
            assert_same(found.qarray(), expected)
            unfused = ops.dot(plain, w, activation_format=activation, activation_scale=scale)
            assert_same(ops.dot(found, w), unfused)


def test_columns_that_do_not_fill_blocks_are_quantized_after_the_norm():
    activation, _ = activation_of("FP8_BLOCK")
    x, weight = normal(3, 192), normal(192, seed=1)
    expected = quantize_activation(ops.rms_norm(x, weight, eps=EPS), activation)
    with kernels():
        normed, _ = ops.quantized_rms_norm(x, weight, activation, eps=EPS)
    assert_same(normed.qarray(), expected)


@pytest.mark.parametrize("path", [contextlib.nullcontext, kernels])
def test_gradients_are_those_of_single_steps(path):
    activation, _ = activation_of("FP8_BLOCK")
    w, v = (quantize(normal(N, K, seed=s), "fp8_e4m3_128x128") for s in (1, 2))
    x, residual, weight = integers(4, K), integers(4, K, seed=3), normal(K, seed=4)
    g = normal(4, N, seed=5, dtype=jnp.float32)

    def loss(fused, x, residual, weight):
        if fused:
            h, total = ops.quantized_rms_norm(x, weight, activation, eps=EPS, residual=residual)
        else:
            total = x + residual
            h = ops.rms_norm(total, weight, eps=EPS)
        gate, up = (ops.dot(h, q, activation_format=activation) for q in (w, v))
        out = jnp.sum((gate * up).astype(jnp.float32) * g)
        return out + jnp.sum(jnp.sin(total.astype(jnp.float32)))

    grad = jax.grad(loss, argnums=(1, 2, 3))
    expected = grad(False, x, residual, weight)
    with path():
        found = grad(True, x, residual, weight)
    for a, b in zip(found, expected, strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        assert np.abs(b).max() > 0
        # The products are summed, and gate and up so rounded, in another order in the kernels.
        np.testing.assert_allclose(a, b, rtol=2**-6, atol=2**-7 * float(np.abs(b).max()))


def test_weights_that_take_no_quantized_input_are_refused():
    activation, _ = activation_of("FP8_BLOCK")
    h, _ = ops.quantized_rms_norm(normal(2, K), normal(K, seed=1), activation, eps=EPS)
    for w in (normal(N, K), quantize(normal(N, K), "fp8_e4m3_channel")):
        with pytest.raises(ValueError, match=r"dot: an input in float8_e4m3fn \(1, 128\) needs an"):
            ops.dot(h, w)


def layers(*words):
    specs = {f"{i}": SCHEMES[word] if word else QuantSpec() for i, word in enumerate(words)}
    context = Context(specs, "bfloat16")
    built = nnx.List([Linear(K, N, path, context) for path in specs])
    nn.initialize(built, jax.random.key(0))
    return built


def test_layers_agree_on_a_format_or_see_the_values():
    norm = RMSNorm(K, Context(), eps=EPS)
    nn.initialize(norm, jax.random.key(0))
    x = normal(2, 3, K)
    for words, quantized in (
        (("FP8_BLOCK", "FP8_BLOCK"), True),
        (("FP8_DYNAMIC",), True),
        (("FP8",), True),
        (("FP8", "FP8"), False),  # each has its own scale
        (("FP8_BLOCK", "FP8_DYNAMIC"), False),
        (("FP8_BLOCK", None), False),
        (("INT8",), False),
        ((), False),
    ):
        h, total = norm.into(layers(*words), x)
        assert isinstance(h, ops.QuantizedInput) == quantized, words
        assert total is x or quantized


def without_sharing(monkeypatch):
    monkeypatch.setattr(Linear, "input_format", lambda self: None)


@pytest.mark.parametrize("word", WORDS)
def test_gated_mlp_shares_its_inputs(word, monkeypatch):
    context = Context(dict.fromkeys(("m.gate_proj", "m.up_proj", "m.down_proj"), SCHEMES[word]))
    mlp = GatedMLP(K, 384, "m", context)
    nn.initialize(mlp, jax.random.key(1))
    x = normal(2, 3, K)
    found = mlp(x)
    without_sharing(monkeypatch)
    assert_same(found, mlp(x))


CONFIG = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}


def test_a_model_has_the_logits_of_layers_that_quantize_by_themselves(monkeypatch):
    module = model_module("qwen3")
    config = module.Config.from_hf(CONFIG | {"model_type": "qwen3"})
    specs = nn.resolve(recipe("FP8_BLOCK"), module.Model(config))
    model = module.Model(config, specs=specs)
    nn.initialize(model, jax.random.key(2))
    ids = jax.random.randint(jax.random.key(3), (2, 5), 0, 64)
    shared = []
    original = ops.dot
    monkeypatch.setattr(
        "qjax.nn._linear.dot",
        lambda x, *args, **kw: (
            shared.append(isinstance(x, ops.QuantizedInput)) or original(x, *args, **kw)
        ),
    )
    found, _ = model(ids)
    assert sum(shared) == 6  # all of the layer's products but o_proj
    without_sharing(monkeypatch)
    expected, _ = model(ids)
    assert_same(found, expected)
