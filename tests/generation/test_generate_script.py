"""scripts/generate.py: its flags, its output and its errors, with a tiny model in a Hugging Face folder."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from references.write_folder import load_case, write_folder
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from qjax import checkpoint
from qjax.generation import Generator
from qjax.sampling import SamplingParams
from qjax.tokenizer import Tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"
CASE = load_case("llama3_2_tied")


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("scripts_generate", SCRIPTS / "generate.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A reference model whose token i is the word "wi"."""
    folder = write_folder(CASE, tmp_path_factory.mktemp("model") / "tiny", dtype="float32")
    backend = Backend(models.WordLevel({f"w{i}": i for i in range(160)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}w7"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def words(ids) -> str:
    return " ".join(f"w{i}" for i in ids)


def run(script, capsys, *argv) -> tuple[int, str, str]:
    code = script.main([*map(str, argv), "--quiet"])
    out = capsys.readouterr()
    return code, out.out, out.err


GREEDY = ("--no-chat", "--ignore-eos", "--max-new-tokens", 12)
PROMPTS = [words(CASE.arrays[f"prompt_{i}"]) for i in range(2)]
ANSWERS = [words(CASE.arrays[f"greedy_{i}"]) for i in range(2)]


def test_continues_as_transformers_does(script, folder, capsys):
    assert run(script, capsys, PROMPTS[0], "--model", folder, *GREEDY) == (0, ANSWERS[0] + "\n", "")


def test_several_prompts_in_order_streamed_or_not(script, folder, capsys):
    expected = f"[1] {ANSWERS[0]}\n[2] {ANSWERS[1]}\n[3] {ANSWERS[0]}\n"
    prompts = [*PROMPTS, PROMPTS[0]]
    for option in ("--stream", "--no-stream"):
        argv = (*prompts, "--model", folder, *GREEDY, option, "--batch-size", 2)
        assert run(script, capsys, *argv) == (0, expected, "")


def test_json_lines(script, folder, capsys):
    code, out, err = run(script, capsys, *PROMPTS, "--model", folder, *GREEDY, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, err, len(lines)) == (0, "", 2)
    for i, line in enumerate(lines):
        assert line["text"] == ANSWERS[i]
        np.testing.assert_array_equal(line["token_ids"], CASE.arrays[f"greedy_{i}"])
        assert line["prompt_tokens"] == len(CASE.arrays[f"prompt_{i}"])
        assert (line["new_tokens"], line["finish_reason"]) == (12, "length")
        assert line["ttft_s"] > 0 and line["tokens_per_s"] > 0


def test_prompt_files_and_chats(script, folder, capsys, tmp_path):
    file = tmp_path / "p.jsonl"
    chat = [{"role": "user", "content": PROMPTS[1]}]
    ids = CASE.arrays["prompt_1"].tolist()
    lines = [json.dumps(p) for p in (PROMPTS[1], chat, [*ids, 7], ids)]
    file.write_text("\n\n".join(lines))
    argv = (
        "--model",
        folder,
        "--prompts-file",
        file,
        "--ignore-eos",
        "--max-new-tokens",
        12,
        "--json",
    )
    out = [json.loads(line) for line in run(script, capsys, *argv)[1].splitlines()]
    assert (
        out[0]["token_ids"] == out[1]["token_ids"] == out[2]["token_ids"]
    )  # the template ends in w7
    assert out[3]["text"] == ANSWERS[1] != out[0]["text"]
    text = tmp_path / "p.txt"
    text.write_text(PROMPTS[0] + "\n\n" + PROMPTS[1] + "\n")
    argv = ("--model", folder, "--prompts-file", text, *GREEDY)
    assert run(script, capsys, *argv)[1] == f"[1] {ANSWERS[0]}\n[2] {ANSWERS[1]}\n"


def test_sampling_flags_reach_the_generator(script, folder, capsys):
    flags = ("--temperature", 0.8, "--top-k", 40, "--top-p", 0.9, "--min-p", 0.01, "--seed", 5,
             "--repetition-penalty", 1.3, "--stop", "w11", "--stop", "w12", "--stop-token-id", 13)  # fmt: skip
    code, out, _ = run(script, capsys, PROMPTS[0], "--model", folder, *GREEDY, *flags)
    params = SamplingParams(
        temperature=0.8,
        top_k=40,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.3,
        seed=5,
        stop=("w11", "w12"),
        stop_token_ids=(13,),
        max_new_tokens=12,
        ignore_eos=True,
    )
    loaded = checkpoint.load(folder, dtype="float32", progress=False)
    (expected,) = Generator(loaded.model, Tokenizer.load(folder)).generate([PROMPTS[0]], params)
    assert (code, out) == (0, expected.text + "\n")
    assert expected.text != ANSWERS[0]


def test_recipe_mesh_cache_and_implementation(script, folder, capsys):
    flags = ("--recipe", "INT8", "--dtype", "float32", "--implementation", "xla", "--max-len", 64)
    argv = (PROMPTS[0], "--model", folder, *GREEDY, *flags)
    code, out, _ = run(script, capsys, *argv, "--kv-cache", "float32")
    meshed = run(script, capsys, *argv, "--kv-cache", "float32", "--mesh", "tensor=2,data=2")
    assert meshed == (0, out, "")
    assert code == 0 and out.split()[:2] == ANSWERS[0].split()[:2]
    assert run(script, capsys, *argv, "--kv-cache", "fp8_e4m3")[0] == 0


def test_dry_run_prints_how_weights_would_be_stored(script, folder, capsys):
    argv = ("--model", folder, "--recipe", "W4A16_G32", "--dry-run")
    code, out, _ = run(script, capsys, *argv)
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == ["module", "shape", "weights", "activations", "bytes"]
    (q,) = [line for line in lines if line.startswith("model.layers.0.self_attn.q_proj ")]
    assert "64x64" in q and "int4 (1, 32) bfloat16" in q
    assert q.split()[-1] == str(64 * 64 // 2 + 64 * 2 * 2)  # packed codes, bfloat16 scales
    rows = checkpoint.resolve(folder, recipe="W4A16_G32", dtype="float32", progress=False)
    assert lines[-1].startswith(f"{len(rows)} weights, ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "absent/model/folder", "w1"], "absent/model/folder"),
        (["--recipe", "INT7", "w1"], "unknown recipe 'INT7'"),
        (["--mesh", "tensors=2", "w1"], "mesh 'tensors=2'"),
        (["--mesh", "tensor=64", "w1"], "needs 64 devices; there are 8"),
        (["--temperature", "-1", "w1"], "temperature must be finite and at least 0; found -1.0"),
        (["--max-new-tokens", "0", "w1"], "max_new_tokens must be a positive integer"),
        (["--max-len", "513", "w1"], "max_len must be in 2..512"),
        (["--no-chat", ""], "prompt 0 is empty"),
        (["--no-chat", words(range(100)), "--max-len", "40"], "context of 40"),
        (["--implementation", "pallas_mosaic_gpu", "--no-chat", "w1"], "kernel can't run"),
        (["--prompts-file", "absent.txt"], "--prompts-file absent.txt: can't be read"),
        (["--prompts-file", "EMPTY"], "no prompt in it"),
        (["--prompts-file", "BROKEN.jsonl"], "BROKEN.jsonl:2: not valid JSON"),
        (["--prompts-file", "NUMBER.jsonl"], "must be a string or a list; found int"),
    ],
)
def test_errors_take_one_line_and_exit_code_2(
    script, folder, capsys, tmp_path, monkeypatch, argv, message
):
    monkeypatch.chdir(tmp_path)
    for name, text in {"EMPTY": " \n", "BROKEN.jsonl": '"w1"\n[', "NUMBER.jsonl": "3"}.items():
        Path(name).write_text(text)
    code, out, err = run(script, capsys, "--model", folder, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("generate: ") and err.count("\n") == 1 and message in err


def test_model_without_a_chat_template_asks_for_no_chat(script, folder, capsys, tmp_path):
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    code, _, err = run(script, capsys, "--model", plain, PROMPTS[0])
    assert code == 2 and "no chat template" in err and "--no-chat" in err
    assert run(script, capsys, "--model", plain, PROMPTS[0], *GREEDY)[:2] == (0, ANSWERS[0] + "\n")


def test_no_prompt_is_a_usage_error(script, capsys):
    with pytest.raises(SystemExit) as exit_:
        script.main([])
    assert exit_.value.code == 2 and "give a prompt" in capsys.readouterr().err
