"""A model's prefill, chunks and decode steps run on the attention kernels."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax import nn, testing
from qjax.ops._dispatch import simulate_gpu
from qjax.recipe import kv_cache_format
from qjax.registry import model_module

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def logits(model, name):
    """Of a whole prompt without a cache, then of its two chunks and a decode step with one."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 41)), jnp.int32)
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state):
        merged = nnx.merge(graphdef, state)
        cache, found = merged.init_cache(2, 64, kv_cache_format(name)), []
        found.append(merged(ids[:, :40])[0])
        for start, stop, real in ((0, 24, (24, 24)), (24, 40, (16, 9)), (40, 41, (1, 0))):
            out, cache = merged(ids[:, start:stop], cache, jnp.asarray(real, jnp.int32))
            found += [out[b, :count] for b, count in enumerate(real) if count]
        return found

    return run(state)


def test_models_run_on_the_attention_kernels(caplog):
    family = model_module("qwen3")
    model = family.Model(family.Config.from_hf(CONFIG), dtype="bfloat16")
    nn.initialize(model, jax.random.key(0), scale=0.2)
    expected = logits(model, "fp8_e4m3")
    with contextlib.ExitStack() as stack, caplog.at_level("INFO", "qjax"):
        stack.enter_context(testing.interpret(detect_races=False))
        stack.enter_context(simulate_gpu())
        found = logits(model, "fp8_e4m3")
    assert "attention runs through XLA" not in caplog.text
    for out, wanted in zip(found, expected, strict=True):
        out, wanted = np.asarray(out), np.asarray(wanted)
        assert np.linalg.norm(out - wanted) <= 2e-2 * np.linalg.norm(wanted)
