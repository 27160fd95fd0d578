"""scripts/quantize.py and scripts/convert.py: what they write is what was quantized, bit for bit."""

import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint.model_bits import assert_same_bits, variables
from references.write_folder import load_case, write_folder
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from qjax import checkpoint
from qjax.qarray import QArray
from qjax.recipe import recipe

SCRIPTS = Path(__file__).parents[1] / "scripts"
CASE = "qwen2"


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = write_folder(load_case(CASE), tmp_path_factory.mktemp("source") / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    words = ["[UNK]", *(f"word{i}" for i in range(150))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("W4A16_G32", "compressed-tensors"),
        ("INT8", "compressed-tensors"),
        ("FP8_DYNAMIC", "compressed-tensors"),
        ("MXFP4", "compressed-tensors"),
        ("NVFP4A16", "compressed-tensors"),
        ("W4A16_G32", "gptq"),
        ("W4A16_G32", "awq"),
    ],
)
def test_written_folder_reads_back_bit_for_bit(source, tmp_path, capsys, name, format):
    out = tmp_path / "out"
    options = ["--model", str(source), "--recipe", name, "--out", str(out), "--format", format]
    assert script("quantize").main([*options, "--quiet"]) == 0
    summary = capsys.readouterr().out.strip()
    assert summary.count("\n") == 0 and name in summary and " MB " in summary
    want = checkpoint.load(source, recipe=recipe(name), progress=False)
    got = checkpoint.load(out, progress=False)
    assert_same_bits(got.model, want.model)
    ids = jnp.arange(8, dtype=jnp.int32)[None]
    assert np.array_equal(got.model(ids)[0], want.model(ids)[0])
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 3}


def test_kv_cache_is_stated_and_read_back(source, tmp_path):
    out = tmp_path / "out"
    options = ["--model", str(source), "--recipe", "bf16", "--kv-cache", "fp8_e4m3"]
    options += ["--calibration-tokens", "64", "--window", "32"]
    assert script("quantize").main([*options, "--out", str(out), "--quiet"]) == 0
    loaded = checkpoint.load(out, progress=False)
    assert loaded.recipe.kv_cache == recipe("bf16", kv_cache="fp8_e4m3").kv_cache
    scale = float(loaded.model.model.layers[0].self_attn.k_scale.get_value()[0])
    assert 1e-4 < scale < 0.5  # calibrated: the default is 1


@pytest.mark.parametrize("method", ["gptq", "awq", "autoround"])
def test_calibrated_methods_write_what_they_built(source, tmp_path, capsys, method):
    out, nearest = tmp_path / "out", tmp_path / "nearest"
    options = ["--model", str(source), "--recipe", "W4A16_G32", "--dtype", "float32", "--quiet"]
    text = tmp_path / "text"
    text.write_text(" ".join(f"word{i * i % 151}" for i in range(512)))
    calibrated = [
        "--text",
        str(text),
        "--method",
        method,
        "--calibration-tokens",
        "64",
        "--window",
        "32",
        "--steps",
        "2",
    ]
    assert script("quantize").main([*options, "--out", str(nearest)]) == 0
    assert script("quantize").main([*options, *calibrated, "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    got, plain = (checkpoint.load(f, progress=False).model for f in (out, nearest))
    ids = jnp.arange(8, dtype=jnp.int32)[None]
    assert np.isfinite(got(ids)[0]).all()
    # AutoRound keeps rounding to nearest where so few steps find nothing better.
    assert method == "autoround" or not np.array_equal(got(ids)[0], plain(ids)[0])


def test_convert_keeps_codes_and_dequantizes(source, tmp_path, capsys):
    first, second, plain = tmp_path / "ct", tmp_path / "awq", tmp_path / "plain"
    options = ["--model", str(source), "--recipe", "W4A16_G32", "--out", str(first), "--quiet"]
    assert script("quantize").main(options) == 0
    convert = script("convert").main
    options = ["--model", str(first), "--quiet", "--format"]
    assert convert([*options, "awq", "--out", str(second)]) == 0
    want = checkpoint.load(first, progress=False).model
    assert_same_bits(checkpoint.load(second, progress=False).model, want)
    assert convert([*options, "f32", "--out", str(plain), "--dtype", "float32"]) == 0
    got = variables(checkpoint.load(plain, dtype="float32", progress=False).model)
    for name, value in variables(want).items():
        if isinstance(value, QArray):
            np.testing.assert_array_equal(got[name], value.dequantize("float32"))
    capsys.readouterr()
    assert convert([*options, "fp8", "--out", str(tmp_path / "fp8")]) == 2
    assert "format 'fp8' needs float8_e4m3fn" in capsys.readouterr().err
    assert not (tmp_path / "fp8").exists()


def test_mistakes_are_one_line(source, tmp_path, capsys):
    main = script("quantize").main
    assert main(["--model", str(source), "--recipe", "W5", "--out", str(tmp_path / "x")]) == 2
    assert "unknown recipe 'W5'" in capsys.readouterr().err
    assert main(["--model", str(tmp_path), "--recipe", "INT8", "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "config.json" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
