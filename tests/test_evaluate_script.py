"""scripts/evaluate.py and qjax.evaluation: what they print against transformers and NumPy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from references.write_folder import load_case, write_folder

from qjax import evaluation
from qjax.checkpoint import default_model_path, load
from qjax.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
SMOLLM2 = ROOT / "tests" / "references" / "smollm2.npz"


def evaluate(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "evaluate.py", "--quiet", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = write_folder("qwen2", tmp_path_factory.mktemp("evaluate") / "model", dtype="float32")
    arrays = load_case("qwen2").arrays
    np.savez(path / "reference.npz", input_ids=arrays["input_ids"], logits=arrays["logits"])
    return path


@pytest.mark.parametrize(
    "options", [[], ["--mesh", "tensor=2"], ["--kv-cache", "float32"]], ids=str
)
def test_reference_logits(folder, options):
    run = evaluate("--model", folder, "--reference", folder / "reference.npz", "--json", *options)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["max_abs"] < 1e-4 and found["rel_l2"] < 1e-5 and found["argmax_agreement"] == 1


def test_a_recipe_moves_the_logits_and_float_activations_less_so(folder):
    options = ["--model", folder, "--reference", folder / "reference.npz", "--json"]
    both = json.loads(evaluate(*options, "--recipe", "INT8").stdout)
    weights = json.loads(evaluate(*options, "--recipe", "INT8", "--float-activations").stdout)
    assert 1e-4 < weights["rel_l2"] < both["rel_l2"] < 0.1


def test_mistakes_are_told_in_one_line(folder, tmp_path):
    for options, message in (
        (["--reference", folder / "none.npz"], "none.npz"),
        (["--reference", folder / "reference.npz", "--key", "x"], "has no ['x']"),
        (["--recipe", "W1"], "unknown recipe 'W1'"),
        (["--mesh", "tensor=x"], "must be AXIS=SIZE"),
    ):
        run = evaluate("--model", folder, *options)
        assert run.returncode == 2 and message in run.stderr and "Traceback" not in run.stderr


def test_text_likelihood_equals_transformers():
    """Two of the four windows that transformers scored, float32."""
    with np.load(SMOLLM2) as file:
        ids, nll = file["text_ids"][:2], file["text_nll"][:2]
    model = load(default_model_path(), dtype="float32", progress=False).model
    score = evaluation.score_text(model, ids, baseline=model)
    assert score.tokens == nll.size
    np.testing.assert_allclose(score.nll, nll.mean(), rtol=1e-5)
    assert abs(score.kl) < 1e-6 and score.top1_agreement == 1
    np.testing.assert_allclose(score.perplexity, np.exp(nll.mean(dtype=np.float64)), rtol=1e-4)
    text = evaluation.default_text()
    found = Tokenizer.load(default_model_path()).encode(text[:20000])
    np.testing.assert_array_equal(evaluation.windows(found, 512, 1024), ids)


def test_divergence_and_agreement():
    rng = np.random.default_rng(0)
    logits, reference = rng.normal(size=(2, 1, 5, 7)).astype(np.float32)
    ids = rng.integers(0, 7, (1, 5)).astype(np.int32)
    p = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, reference)]
    nll = -np.log(np.take_along_axis(p[0][:, :-1], ids[:, 1:, None], -1)).sum()
    kl = (p[1] * np.log(p[1] / p[0]))[:, :-1].sum()
    same = (logits.argmax(-1) == reference.argmax(-1))[:, :-1].sum()
    np.testing.assert_allclose(
        evaluation._compare(logits, reference, ids), [nll, kl, same], rtol=1e-5
    )
    error = evaluation.logits_error(logits, reference)
    assert error.max_abs == np.abs(logits - reference).max()
    with pytest.raises(ValueError, match="must agree"):
        evaluation.logits_error(logits[:, :2], reference)
    with pytest.raises(ValueError, match="do not fill one window of 8"):
        evaluation.windows([1, 2, 3], 8)
