"""The default model end to end: transformers' float32 run of the same dequantized GGUF says what must come out."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qjax import checkpoint
from qjax.evaluation import forward, logits_error
from qjax.generation import Generator
from qjax.sampling import SamplingParams
from qjax.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
REFERENCES = ROOT / "tests" / "references"
STORED = json.loads((REFERENCES / "smollm2.json").read_text())
ARRAYS = np.load(REFERENCES / "smollm2.npz")


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return checkpoint.default_model_path()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(path):
    return checkpoint.load(path, dtype="float32", progress=False).model


def test_greedy_tokens_of_three_chats_in_one_batch(model, path):
    g = Generator(model, Tokenizer.load(path), batch_size=3)
    chats = [chat["messages"] for chat in STORED["chats"][:3]]
    for i in range(3):  # a token that nearly ties could be another in another summation order
        assert ARRAYS[f"greedy_margin_{i}"].min() > 5e-3
    got = g.generate(chats, SamplingParams(max_new_tokens=32, ignore_eos=True))
    for i, completion in enumerate(got):
        np.testing.assert_array_equal(completion.token_ids, ARRAYS[f"greedy_{i}"])
    ended = [c.text for c in g.generate(chats, SamplingParams(max_new_tokens=32))]
    assert ended[0] == "The capital of France is Paris."
    assert ended[1:] == STORED["continuations"][1:]
    assert g.steps.trace_counts == {"prefill": 1, "decode": 1}


def test_last_logits_of_the_chats(model):
    prompts = [ARRAYS[f"prompt_{i}"] for i in range(3)]
    lengths = np.array([len(p) for p in prompts], np.int32)
    ids = np.zeros((3, lengths.max()), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    logits = np.asarray(forward(model)(jnp.asarray(ids)))  # padding on the right is not seen
    for i, row in enumerate(logits):
        error = logits_error(row[lengths[i] - 1], ARRAYS[f"logits_{i}"])
        assert error.rel_l2 < 1e-3 and error.argmax_agreement == 1


def test_the_first_command_of_the_readme(path):
    command = [sys.executable, "scripts/generate.py", "What is the capital of France?"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"
    assert "8 tokens, the first after " in done.stderr
