"""GPTQ, AWQ and AutoRound against their definitions, and against rounding to nearest on a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import qformat, quantize, recipe
from qjax.calibration import AWQ, GPTQ, AutoRound, calibrate, calibrate_kv_scales
from qjax.calibration._awq import scale_channels
from qjax.calibration._gptq import gptq, output_error
from qjax.calibration._observe import input_hessians, linears, run_layer
from qjax.evaluation import forward
from qjax.models.llama import Config, Model
from qjax.nn import initialize, quantizable
from qjax.recipe import kv_cache_format

CONFIG = Config.from_hf(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "vocab_size": 96,
        "max_position_embeddings": 128,
    }
)


def tiny_model() -> Model:
    """Random weights, and embeddings whose channels differ in size, as real activations do."""
    model = Model(CONFIG, dtype="float32")
    initialize(model, jax.random.key(0), scale=0.2)
    weight = model.model.embed_tokens.weight
    spread = jnp.exp(jax.random.normal(jax.random.key(1), (64,)))
    weight.set_value(weight.get_value() * spread[None])
    return model


def token_windows(seed=0):
    return np.random.default_rng(seed).integers(0, 96, (16, 32)).astype(np.int32)


def gptq_by_hand(w, hessian, scale, damp):
    """The paper's algorithm, one column at a time with the remaining inverse Hessian, float64."""
    w, n = w.astype(np.float64).copy(), w.shape[1]
    h = hessian.astype(np.float64) + damp * np.mean(np.diag(hessian)) * np.eye(n)
    inverse = np.linalg.inv(h)
    codes = np.zeros_like(w)
    for j in range(n):
        codes[:, j] = np.clip(np.round(w[:, j] / scale[:, 0]), -8, 7)
        error = (w[:, j] - codes[:, j] * scale[:, 0]) / inverse[j, j]
        w[:, j + 1 :] -= np.outer(error, inverse[j, j + 1 :])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def test_gptq_follows_the_papers_algorithm():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(8, 48)).astype(np.float32)
    x = rng.normal(size=(400, 48)) @ rng.normal(size=(48, 48)) * 0.3
    hessian = (x.T @ x).astype(np.float32)
    format = qformat("int4_channel")
    q = gptq(jnp.asarray(w), jnp.asarray(hessian), format, GPTQ(actorder=None), dtype="float32")
    expected = gptq_by_hand(w, hessian, np.asarray(q.scale), 0.01)
    np.testing.assert_array_equal(np.round(np.asarray(q.dequantize() / q.scale)), expected)


@pytest.mark.parametrize("actorder", [None, "weight", "group"])
@pytest.mark.parametrize("name", ["int3_1x32", "int4_1x32_asym", "mxfp4", "nvfp4", "int4_channel"])
def test_gptq_lowers_the_output_error(name, actorder):
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.normal(size=(32, 128)), jnp.float32)
    x = (rng.normal(size=(1000, 128)) @ rng.normal(size=(128, 128))) * np.exp(rng.normal(size=128))
    hessian = jnp.asarray(x.T @ x, jnp.float32)
    q = gptq(w, hessian, qformat(name), GPTQ(actorder=actorder), dtype="float32")
    permuted = actorder == "group" and name not in ("int4_channel", "nvfp4")
    assert (q.column_perm is not None) == permuted
    measured = np.linalg.norm((q.dequantize() - w) @ x.T) / np.linalg.norm(w @ x.T)
    reported = float(output_error(w, q, hessian))
    np.testing.assert_allclose(reported, measured, rtol=1e-3)
    assert reported < 0.9 * float(output_error(w, quantize(w, name), hessian))


def test_awq_scaling_leaves_the_layer_as_it_was():
    model = tiny_model()
    layer = model.model.layers[0]
    x = jax.random.normal(jax.random.key(3), (2, 16, 64)) * jnp.exp(
        jax.random.normal(jax.random.key(4), (1, 1, 64))
    )
    before = run_layer(layer)(x)
    hessians = input_hessians(layer, [x])
    formats = {p: qformat("int4_1x32") for p in linears(layer)}
    norm = np.asarray(layer.input_layernorm.weight.get_value())
    scaled = scale_channels(layer, linears(layer), hessians, formats, AWQ())
    np.testing.assert_allclose(run_layer(layer)(x), before, rtol=2e-4, atol=2e-4)
    assert np.abs(np.asarray(layer.input_layernorm.weight.get_value()) / norm - 1).max() > 0.1
    again = input_hessians(layer, [x])
    for path, hessian in scaled.items():
        np.testing.assert_allclose(
            hessian, again[path], rtol=2e-2, atol=1e-2 * float(hessian.max())
        )


@pytest.mark.parametrize(
    "method", [GPTQ(), AWQ(), AutoRound(steps=30)], ids=lambda m: type(m).__name__
)
def test_calibration_beats_rounding_to_nearest(method):
    specs = recipe("W3A16", ignore=("lm_head",)).resolve(quantizable(tiny_model()))
    specs = {p: type(s)(qformat("int3_1x32")) for p, s in specs.items()}
    ids = jnp.asarray(token_windows(1)[:8])
    exact = np.asarray(forward(tiny_model())(ids))
    nearest = tiny_model().like(specs)
    old = {p: m for p, m in _weights(tiny_model())}
    for path, module in _weights(nearest):
        w = old[path].weight.get_value()
        module.weight.set_value(quantize(w, specs[path].weights) if path in specs else w)
    built, errors = calibrate(tiny_model(), specs, token_windows(), method)
    assert {e.path for e in errors} == set(specs)

    def distance(model):
        return np.linalg.norm(np.asarray(forward(model)(ids)) - exact) / np.linalg.norm(exact)

    assert distance(built) < 0.95 * distance(nearest)


def _weights(model):
    from qjax.nn import modules

    return [(p, m) for p, m in modules(model) if hasattr(m, "weight")]


def test_a_quantized_model_is_refused():
    specs = recipe("W4A16_G32").resolve(quantizable(tiny_model()))
    built, _ = calibrate(tiny_model(), specs, token_windows()[:2], GPTQ())
    with pytest.raises(ValueError, match="quantized already"):
        calibrate(built, specs, token_windows(), GPTQ())


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e4m3_head", "nvfp4"])
def test_kv_scales_fit_the_largest_key_and_value(name):
    model, ids = tiny_model(), token_windows()
    calibrate_kv_scales(model, ids, kv_cache_format(name), batch=16)
    cache = model.init_cache(16, 32, kv_cache_format("float32"))
    _, cache = model(jnp.asarray(ids), cache)
    keys = np.abs(np.asarray(cache.layers[1].key))
    heads = keys.max(axis=(0, 2, 3)) / 448
    expected = heads if name.endswith("head") else np.full(4, heads.max())
    found = model.model.layers[1].self_attn.k_scale.get_value()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
