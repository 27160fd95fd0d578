"""Llama, Mistral, Qwen2 and Qwen3 against transformers' float32 outputs, one device against eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import build
from references.write_folder import case_names, load_case

from qjax import Sharding, make_mesh, recipe
from qjax.nn import QuantizedParam, initialize, resolve
from qjax.recipe import QuantSpec
from qjax.registry import model_module

CASES = case_names("llama_family")
LEGACY = [name for name in CASES if load_case(name).legacy_config is not None]
MESHES = ("tensor=2", "tensor=4,data=2")


def calls(model):
    """The jitted model: (ids, cache, num_tokens) -> (logits, cache)."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def call(state, ids, cache, num_tokens):
        return nnx.merge(graphdef, state)(ids, cache, num_tokens)

    return lambda ids, cache=None, num_tokens=None: call(
        state, jnp.asarray(ids, jnp.int32), cache, num_tokens
    )


def weights_only(specs):
    return {path: QuantSpec(spec.weights) for path, spec in specs.items()}


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    case = load_case(name)
    logits, cache = calls(build(case))(case.arrays["input_ids"])
    assert cache is None
    assert np.abs(logits - case.arrays["logits"]).max() < 1e-4


@pytest.mark.parametrize("name", LEGACY)
def test_configs_of_transformers_4_mean_the_same(name):
    case = load_case(name)
    config = model_module(case.config["model_type"]).Config
    assert config.from_hf(case.legacy_config) == config.from_hf(case.config)


@pytest.mark.parametrize("name", CASES)
def test_prefill_and_decode_give_the_greedy_tokens(name):
    """Two prompts of different lengths in one padded batch, continued token by token."""
    case = load_case(name)
    model = build(case)
    call = calls(model)
    prompts = [case.arrays[f"prompt_{i}"] for i in range(2)]
    steps = len(case.arrays["greedy_0"])
    lengths = np.array([len(p) for p in prompts], np.int32)
    padded = np.zeros((2, int(lengths.max())), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = model.init_cache(2, int(lengths.max()) + steps)
    logits, cache = call(padded, cache, lengths)
    last = np.asarray(logits)[np.arange(2), lengths - 1]
    for step in range(steps):
        tokens = last.argmax(-1).astype(np.int32)
        for i in range(2):
            if case.arrays[f"greedy_margin_{i}"][step] > 1e-4:
                assert tokens[i] == case.arrays[f"greedy_{i}"][step]
        tokens = np.array([case.arrays[f"greedy_{i}"][step] for i in range(2)], np.int32)
        logits, cache = call(tokens[:, None], cache)
        last = np.asarray(logits)[:, 0]
    np.testing.assert_array_equal(cache.lengths, lengths + steps)


@pytest.mark.parametrize(
    "name", ["llama3_2_tied", "llama_odd_heads", "qwen3_yarn_bias", "mistral_sliding_window"]
)
def test_a_cache_filled_in_two_steps_equals_one_pass(name):
    case = load_case(name)
    model = build(case)
    ids = case.arrays["input_ids"]
    call, half = calls(model), ids.shape[1] // 2
    first, cache = call(ids[:, :half], model.init_cache(2, ids.shape[1]))
    second, _ = call(ids[:, half:], cache)
    both = np.concatenate([first, second], axis=1)
    assert np.abs(both - case.arrays["logits"]).max() < 1e-4


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    "name", ["llama3_1_rope", "llama3_2_tied", "llama_odd_heads", "qwen2", "qwen3_tied"]
)
def test_meshes_give_the_same_logits(name, mesh):
    case = load_case(name)
    model = build(case, sharding=Sharding(make_mesh(mesh)))
    ids = case.arrays["input_ids"]
    call = calls(model)
    plain, _ = call(ids)
    cached, _ = call(ids, model.init_cache(2, ids.shape[1]))
    for logits in (plain, cached):
        assert np.abs(logits - case.arrays["logits"]).max() < 1e-4


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("word", ["W4A16_G32", "FP8_BLOCK", "NVFP4", "W4A16_ASYM"])
def test_quantized_meshes_give_the_same_logits(word, mesh):
    """Shards cut 128x128 blocks and groups here; scales are repeated, so that nothing changes.

    Weights only: a sum in another order may move an activation across a rounding boundary, after which
    random weights amplify the step of one code far beyond float32 noise.
    """
    case = load_case("llama3_1_rope")
    specs = weights_only(resolve(recipe(word), build(case)))
    ids = case.arrays["input_ids"]
    expected, _ = calls(build(case, specs=specs))(ids)
    sharded = build(case, specs=specs, sharding=Sharding(make_mesh(mesh)))
    logits, _ = calls(sharded)(ids)
    assert np.abs(np.asarray(logits) - np.asarray(expected)).max() < 1e-4


@pytest.mark.parametrize("word", ["W4A16_G32", "MXFP4A16", "FP8_BLOCK"])
def test_quantized_weights_compute_with_the_values_they_keep(word):
    case = load_case("qwen2")
    specs = weights_only(resolve(recipe(word), build(case)))
    quantized, dequantized = build(case, specs=specs), build(case, specs=specs, dequantized=True)
    ids = case.arrays["input_ids"]
    a, b = calls(quantized)(ids)[0], calls(dequantized)(ids)[0]
    assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-4
    assert np.abs(np.asarray(a) - case.arrays["logits"]).max() > 1e-2


def test_initialize_fills_every_parameter():
    case = load_case("llama3_2_tied")
    module = model_module("llama")
    config = module.Config.from_hf(case.config)
    plain = module.Model(config, dtype="float32")
    model = module.Model(config, specs=resolve(recipe("W4A16_G32"), plain), dtype="float32")
    initialize(model, jax.random.key(0))
    state = nnx.state(model, nnx.Any(nnx.Param, QuantizedParam))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    logits, _ = calls(model)(case.arrays["input_ids"])
    assert np.isfinite(logits).all() and np.std(logits) > 0
