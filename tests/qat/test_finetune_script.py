"""scripts/finetune_qat.py: curves on any mesh, killed and resumed, through recipes and adapters, exported."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import _training_model as training_model
import _training_step as steps
import finetune_qat as script
import jax
import numpy as np
import pytest
from qat_tiny_model import CONFIG, MOE_CONFIG, write_model

from qjax import evaluation
from qjax.checkpoint import export, load
from qjax.nn import modules
from qjax.recipe import Recipe
from qjax.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]

SHORT = ("--seq-len", 32, "--batch", 8, "--eval-windows", 4, "--lr", 3e-3, "--dtype", "float32")
TIMES = {"seconds", "tokens_per_second", "compiled"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("finetune") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("finetune") / "text.txt"
    file.write_text(evaluation.default_text()[:20000])
    return file


def run(out: Path, *options: object) -> list[dict]:
    """The curve of a run of the script, in this process."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer step with floats
        script.main(["--quiet", "--out", str(out), *map(str, options)])
    return curve(out)


def curve(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]


def untimed(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def perplexities(rows: list[dict]) -> list[float]:
    return [row["eval_perplexity"] for row in rows if "eval_perplexity" in row]


@pytest.fixture(scope="module")
def control(folder, text, tmp_path_factory) -> tuple[list[dict], tuple]:
    """The curve of a run without quantization, and its options."""
    options = (*SHORT, "--model", folder, "--data", text, "--recipe", "none", "--steps", 12)
    out = tmp_path_factory.mktemp("runs") / "control"
    return run(out, *options, "--eval-every", 6), options


def test_the_loss_goes_down(control):
    rows, _ = control
    assert [row["step"] for row in rows] == [0, *range(1, 7), 6, *range(7, 13), 12]
    assert losses(rows)[-1] < losses(rows)[0] - 1.5
    first, middle, last = perplexities(rows)
    assert last < middle < 0.4 * first
    row = rows[1]
    tokens = 8 * 32
    assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
    np.testing.assert_allclose(row["loss"], np.log(first), rtol=0.05)  # nothing was learned yet


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (("--accumulate", 4), 1e-5),
        (("--remat",), 1e-5),
        (("--fsdp", 2), 1e-3),
        (("--fsdp", 4, "--tensor", 2, "--accumulate", 2), 1e-3),
    ],
    ids=str,
)
def test_how_it_is_computed_does_not_change_the_curve(control, tmp_path, options, tolerance):
    rows, common = control
    found = run(tmp_path / "run", *common, *options, "--eval-every", 6)
    np.testing.assert_allclose(losses(found), losses(rows), rtol=tolerance)
    np.testing.assert_allclose(perplexities(found), perplexities(rows), rtol=10 * tolerance)


def test_products_in_fp8_learn_alike(control, tmp_path):
    rows, common = control
    found = run(tmp_path / "run", *common, "--fp8-training", "e5m2", "--eval-every", 6)
    np.testing.assert_allclose(losses(found), losses(rows), rtol=0.1)
    assert losses(found) != losses(rows)


def test_experts_on_eight_devices(text, tmp_path):
    folder = write_model(tmp_path / "moe", MOE_CONFIG)
    options = (*SHORT, "--model", folder, "--data", text, "--recipe", "W4A16_G32", "--steps", 4)
    one = run(tmp_path / "one", *options)
    eight = run(tmp_path / "eight", *options, "--expert", 2, "--fsdp", 2, "--tensor", 2)
    np.testing.assert_allclose(losses(eight), losses(one), rtol=1e-3)
    assert losses(one)[-1] < losses(one)[0] - 0.3


def start(out: Path, *options: object) -> subprocess.Popen:
    """A run of the script in a process of its own."""
    command = [sys.executable, ROOT / "scripts" / "finetune_qat.py", *options, "--out", out]
    return subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def killed(out: Path, step: int, *options: object) -> None:
    """Starts a run and kills it with SIGKILL once its curve has reached a step."""
    process = start(out, *options)
    try:
        deadline = time.monotonic() + 120
        while not (out / "curve.jsonl").exists() or curve_step(out) < step:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def curve_step(out: Path) -> int:
    lines = (out / "curve.jsonl").read_text().splitlines(keepends=True)
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def test_a_killed_run_goes_on_with_the_same_curve(control, tmp_path):
    """SIGKILL in the middle of steps, then in the resumed run, which starts at its last checkpoint."""
    _, common = control
    options = (*common, "--steps", 60, "--eval-every", 20, "--accumulate", 2)
    straight = run(tmp_path / "straight", *options)
    out = tmp_path / "killed"
    saving = (*options, "--save-every", 5, "--keep", 2)
    killed(out, 23, *saving)
    assert curve_step(out) >= 23
    with (out / "curve.jsonl").open("a") as file:
        file.write('{"step": 59, "lo')  # a line that the kill cut off
    (out / "checkpoints" / "step_00000099.partial").mkdir()  # a checkpoint that it cut off
    killed(out, 41, *saving, "--resume")
    process = start(out, *saving, "--resume")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and stderr == "", stderr
    assert stdout.startswith("none: 60 steps of 256 tokens, ") and stdout.count("\n") == 3
    assert untimed(curve(out)) == untimed(straight)
    resumed = [row["step"] for row in curve(out) if row.get("compiled")]
    assert len(resumed) == 3 and all(step % 5 == 1 for step in resumed) and resumed[2] > 36
    kept = sorted(entry.name for entry in (out / "checkpoints").iterdir())
    assert kept == ["step_00000055", "step_00000060"]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_told_in_one_line(control, tmp_path, folder):
    _, common = control
    out = tmp_path / "run"
    common = (*common, "--steps", 1)
    run(out, *common)
    for options, message in (
        ((), "holds a run; go on with --resume or choose another --out"),
        (("--resume", "--lr", 1), r"started with other options: lr 0.003 \(now 1.0\)"),
        (("--batch", 7, "--accumulate", 2), "--batch 7 must be a multiple of --accumulate 2"),
        (("--recipe", "stored"), "can't be trained: --lora-rank N"),
        (("--distill", 2), "must be a weight from 0 to 1"),
        (("--steps", 5, "--warmup", 5), "--warmup 5 must be less than --steps 5"),
        (("--export", tmp_path), "exists; choose another folder"),
        (("--seq-len", 2400, "--out", tmp_path / "new"), "too few to hold a tenth out"),
        (("--recipe", "W1", "--out", tmp_path / "newer"), "unknown recipe 'W1'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(out, *common, *options)
    assert not (tmp_path / "new").exists() and not (tmp_path / "newer").exists()
    text = Path(common[common.index("--data") + 1]).read_text()
    (tmp_path / "text.txt").write_text(text)
    common = (*common, "--data", tmp_path / "text.txt")
    run(tmp_path / "other", *common)
    (tmp_path / "text.txt").write_text(text.replace("the", "an"))
    with pytest.raises(ValueError, match="was started with other tokens; resume with the same"):
        run(tmp_path / "other", *common, "--resume")
    process = start(out, *common)
    assert process.communicate()[1].startswith("finetune_qat: ") and process.returncode == 2


def test_a_run_goes_on_with_other_devices(control, tmp_path):
    _, common = control
    options = (*common, "--steps", 8, "--save-every", 4)
    one = run(tmp_path / "one", *options)
    out = tmp_path / "two"
    run(out, *options, "--fsdp", 2)
    shutil.rmtree(out / "checkpoints" / "step_00000008")
    found = run(out, *options, "--fsdp", 4, "--tensor", 2, "--resume")
    assert [row["step"] for row in found if row.get("compiled")] == [1, 5]
    np.testing.assert_allclose(losses(found), losses(one), rtol=1e-3)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_distillation_starts_at_the_teacher(control, tmp_path, direction):
    rows, common = control
    options = (*common, "--steps", 3, "--temperature", 2, "--schedule", "constant")
    reverse = ("--reverse-kl",) if direction == "backward" else ()
    found = run(tmp_path / "half", *options, "--distill", 0.25, *reverse)
    first = found[1]
    assert abs(first["kl"]) < 1e-5 and first["loss"] == pytest.approx(0.75 * first["nll"], abs=1e-5)
    np.testing.assert_allclose(first["nll"], rows[1]["loss"], rtol=1e-6)
    assert found[3]["kl"] > 1e-3
    assert found[3]["loss"] == pytest.approx(
        0.75 * found[3]["nll"] + 0.25 * found[3]["kl"], rel=1e-5
    )
    only = run(tmp_path / "only", *options, "--distill", 1, *reverse)
    # Nothing to learn, but rounding, which Adam makes as large as anything, at this rate.
    assert abs(losses(only)[0]) < 1e-5


def held_out(model: Path, *options: object) -> float:
    """Perplexity of a folder on the held-out windows of a run."""
    args = script.parse([*map(str, options), "--lora-rank", "1", "--out", "x"])
    loaded = load(model, dtype="float32", progress=False)
    return np.exp(steps.evaluate(loaded.model, script.windows(args, Tokenizer.load(model))[1], 4))


def projections(model: Path) -> list:
    loaded = load(model, dtype="float32", progress=False)
    found = [m.weight.get_value() for path, m in modules(loaded.model) if path.endswith("_proj")]
    assert len(found) == 7 * CONFIG["num_hidden_layers"]
    return found


@pytest.fixture(scope="module")
def two_bits(control, tmp_path_factory) -> tuple[list[dict], tuple, Path]:
    """The curve, options and export of a run through two-bit weights."""
    _, common = control
    options = (*common, "--recipe", "int2_1x32", "--steps", 300)
    folder = tmp_path_factory.mktemp("runs")
    rows = run(folder / "run", *options, "--export", folder / "exported")
    return rows, options, folder / "exported"


def test_training_through_two_bits_beats_rounding_to_them(control, two_bits, tmp_path):
    _, common = control
    rows, options, _ = two_bits
    run(tmp_path / "plain", *common, "--steps", 300, "--export", tmp_path / "exported")
    model = load(tmp_path / "exported", dtype="float32", recipe=int2_recipe(), progress=False)
    export(model.model, tmp_path / "rounded", source=model, progress=False)
    rounded = held_out(tmp_path / "rounded", *options)
    before, *_, after = perplexities(rows)
    assert rows[0]["unquantized_perplexity"] < before
    assert after < 0.85 * rounded and after < 0.05 * before


def int2_recipe() -> Recipe:
    args = argparse.Namespace(recipe="int2_1x32", ignore=["lm_head"])
    return training_model.chosen_recipe(args, 2)


def test_the_exported_folder_is_the_model_that_was_evaluated(two_bits):
    rows, options, exported = two_bits
    assert {w.format.element for w in projections(exported)} == {"int2"}
    # Norms, embeddings and scales are bfloat16 there.
    np.testing.assert_allclose(held_out(exported, *options), perplexities(rows)[-1], rtol=0.01)


def test_schedules_and_learned_scales(control, tmp_path):
    _, common = control
    options = (*common, "--recipe", "int2_1x32", "--learn-scale", "--start-step", 4, "--clip", 0)
    late = run(tmp_path / "late", *options, "--ramp-steps", 4, "--save-every", 6)
    plain = run(tmp_path / "plain", *common, "--clip", 0)
    np.testing.assert_allclose(losses(late)[:4], losses(plain)[:4], rtol=1e-6)
    assert losses(late)[6] > losses(plain)[6] + 1e-3
    shutil.rmtree(tmp_path / "late" / "checkpoints" / "step_00000012")
    again = run(tmp_path / "late", *options, "--ramp-steps", 4, "--save-every", 6, "--resume")
    assert untimed(again) == untimed(late)
    assert perplexities(late)[-1] < 0.3 * perplexities(late)[0]


@pytest.mark.parametrize("recipe", ["W4A16_G32", "stored"])
def test_adapters_on_rounded_and_on_packed_weights(control, tmp_path, recipe):
    _, common = control
    model = common[common.index("--model") + 1]
    if recipe == "stored":
        loaded = load(model, recipe="W4A16_G32", progress=False)
        model = export(loaded.model, tmp_path / "packed", source=loaded, progress=False)
    options = (*common, "--model", model, "--recipe", recipe, "--steps", 20, "--lr", 1e-2)
    options = (*options, "--lora-rank", 8, "--save-every", 10)
    rows = run(tmp_path / "run", *options, "--export", tmp_path / "exported")
    assert losses(rows)[-1] < losses(rows)[0] - 0.5
    assert perplexities(rows)[-1] < 0.7 * perplexities(rows)[0]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000020")
    assert untimed(run(tmp_path / "run", *options, "--resume")) == untimed(rows)
    assert {w.format.block_shape for w in projections(tmp_path / "exported")} == {(1, 32)}
    exported = held_out(tmp_path / "exported", *options)
    np.testing.assert_allclose(exported, perplexities(rows)[-1], rtol=0.02)
    frozen = dict(modules(load(model, dtype="float32", progress=False).model))
    tuned = dict(modules(load(tmp_path / "exported", dtype="float32", progress=False).model))
    for path in ("model.embed_tokens", "model.norm"):
        np.testing.assert_allclose(
            tuned[path].weight.get_value(), frozen[path].weight.get_value(), rtol=2**-8
        )
