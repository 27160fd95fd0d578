"""Exporters' folders: loaded, exported in their own format and loaded again, everything is the same."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint.model_bits import assert_same_bits, variables
from conftest import ROOT

from qjax import checkpoint
from qjax.qarray import QArray
from qjax.sharding import Sharding, make_mesh
from qjax.tokenizer import Tokenizer

_FOLDERS = ROOT.parent / "shared" / "checkpoints"
NAMES = sorted(f.parent.name for f in _FOLDERS.glob("*/config.json")) or ["none"]


def natural_format(folder: Path) -> str:
    """The export format of the folder's own quant_method."""
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    method = config.get("quant_method", "gptq")
    packing = config.get("packing_format", "") if method == "auto-round" else method
    return max((f for f in checkpoint.EXPORT_FORMATS if f in packing), key=len)


@pytest.mark.parametrize("name", NAMES)
def test_natural_format_reads_back_bit_for_bit(checkpoints_dir, tmp_path, name):
    source = checkpoints_dir / name
    loaded = checkpoint.load(source, progress=False)
    out = checkpoint.export(
        loaded.model, tmp_path / "x", format=natural_format(source), source=loaded, progress=False
    )
    again = checkpoint.load(out, progress=False)
    assert_same_bits(again.model, loaded.model)
    assert again.recipe.kv_cache == loaded.recipe.kv_cache
    ids = jnp.arange(8, dtype=jnp.int32)[None]
    assert np.array_equal(again.model(ids)[0], loaded.model(ids)[0])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v3_fp8_block_tiny",
        "gpt_oss_mxfp4_tiny_h192",
        "kimi_k2_int4_g32_experts_tiny",
        "ct_fp8_block_llama",
    ],
)
def test_export_from_a_mesh_writes_the_same_bytes(checkpoints_dir, tmp_path, name):
    source = checkpoints_dir / name
    format = natural_format(source)
    files = []
    for mesh in (None, "tensor=2,expert=2"):
        sharding = Sharding() if mesh is None else Sharding(make_mesh(mesh))
        loaded = checkpoint.load(source, sharding=sharding, progress=False)
        out = tmp_path / str(mesh)
        checkpoint.export(loaded.model, out, format=format, source=loaded, progress=False)
        files.append({f.name: f.read_bytes() for f in out.iterdir()})
    assert files[0].keys() == files[1].keys()
    assert all(files[0][n] == files[1][n] for n in files[0])


@pytest.mark.parametrize("name", ["deepseek_v3_fp8_block_tiny", "gpt_oss_mxfp4_tiny_h192"])
def test_dequantized_export_loads_as_plain_weights(checkpoints_dir, tmp_path, name):
    loaded = checkpoint.load(checkpoints_dir / name, dtype="float32", progress=False)
    out = tmp_path / "x"
    checkpoint.export(loaded.model, out, format="f32", source=loaded, progress=False)
    plain = variables(checkpoint.load(out, dtype="float32", progress=False).model)
    for path, value in variables(loaded.model).items():
        if path.endswith(".activation_scale"):
            continue
        want = value.dequantize("float32") if isinstance(value, QArray) else value
        np.testing.assert_array_equal(plain[path], want, err_msg=path)


def test_gguf_minimums_are_refused(tmp_path):
    loaded = checkpoint.load(checkpoint.default_model_path(), progress=False)
    with pytest.raises(ValueError, match=r"no minimum per group .* requantize"):
        checkpoint.export(loaded.model, tmp_path / "x", source=loaded, progress=False)


def test_gguf_model_becomes_a_folder_with_its_tokenizer(tmp_path):
    source = checkpoint.default_model_path()
    loaded = checkpoint.load(source, recipe="W4A16_G32", progress=False)
    out = checkpoint.export(loaded.model, tmp_path / "x", source=loaded, progress=False)
    again = checkpoint.load(out, progress=False)
    assert_same_bits(again.model, loaded.model)
    assert again.config["architectures"] == ["LlamaForCausalLM"]
    was, now = Tokenizer.load(source), Tokenizer.load(again.tokenizer)
    text = "Hello world 123 <|im_start|>user\n ünï 中文"
    assert now.encode(text) == was.encode(text)
    assert (now.bos_id, now.eos_ids) == (was.bos_id, was.eos_ids)
    assert (now.chat_template, now.named_tokens) == (was.chat_template, was.named_tokens)


@pytest.mark.parametrize("name", ["kimi_k2_int4_g32_experts_tiny", "gpt_oss_mxfp4_tiny_h192"])
def test_orbax_keeps_experts_and_column_orders(checkpoints_dir, tmp_path, name):
    loaded = checkpoint.load(checkpoints_dir / name, progress=False)
    checkpoint.save(tmp_path / "c", loaded.model)
    sharding = Sharding(make_mesh("tensor=2,expert=2"))
    sharded = checkpoint.restore(tmp_path / "c", sharding=sharding).model
    checkpoint.save(tmp_path / "d", sharded)
    assert_same_bits(checkpoint.restore(tmp_path / "d").model, loaded.model)


def test_orbax_keeps_act_order(checkpoints_dir, tmp_path):
    source = checkpoints_dir / "gptqmodel_gptq_w4g128_sym_descact_qwen2"
    loaded = checkpoint.load(source, dtype="float32", progress=False)
    checkpoint.save(tmp_path / "c", loaded.model)
    sharding = Sharding(make_mesh("tensor=2"))
    sharded = checkpoint.restore(tmp_path / "c", sharding=sharding).model
    ids = jnp.arange(8, dtype=jnp.int32)[None]
    np.testing.assert_allclose(sharded(ids)[0], loaded.model(ids)[0], rtol=0, atol=1e-4)
    checkpoint.save(tmp_path / "d", sharded)
    assert_same_bits(checkpoint.restore(tmp_path / "d").model, loaded.model)


@pytest.mark.parametrize(
    "name",
    [
        "ct_pack_int4_g32_sym_llama",
        "autoawq_w4g128_asym_qwen2",
        "gptqmodel_gptq_w4g128_sym_descact_qwen2",
        "ct_pack_int8_g128_sym_llama",
        "ct_pack_int3_g128_sym_llama",
        "autoround_gptqpack_w2g64_sym_llama",
        "ct_mxfp4a16_llama",
        "gpt_oss_mxfp4_tiny_h192",
        "kimi_k2_int4_g32_experts_tiny",
    ],
)
def test_weights_laid_out_for_kernels_are_written_as_before(checkpoints_dir, tmp_path, name):
    source = checkpoints_dir / name
    files = []
    for prepack in (False, True):
        loaded = checkpoint.load(source, prepack=prepack, progress=False)
        mlp = loaded.model.model.layers[-1].mlp
        experts = getattr(mlp, "experts", None)
        weight = (mlp.up_proj if experts is None else experts.down_proj).weight
        assert weight.get_value().format.ordered == prepack
        out = tmp_path / str(prepack)
        checkpoint.export(
            loaded.model, out, format=natural_format(source), source=loaded, progress=False
        )
        files.append({f.name: f.read_bytes() for f in out.iterdir()})
    assert files[0] == files[1]
    checkpoint.save(tmp_path / "c", loaded.model)
    plain = checkpoint.load(source, progress=False).model
    assert_same_bits(checkpoint.restore(tmp_path / "c", model=loaded.model).model, plain)
