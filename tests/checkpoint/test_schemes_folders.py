"""Exporters' folders, tensor by tensor: each weight decodes to its reference and encodes to the stored bits."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT

from qjax.checkpoint import _encode
from qjax.checkpoint._read_folder import Folder
from qjax.checkpoint.schemes import Group
from qjax.qarray import QArray

_FOLDERS = ROOT.parent / "shared" / "checkpoints"
NAMES = sorted(f.parent.name for f in _FOLDERS.glob("*/config.json")) or ["none"]
_MARKS = ("weight_scale", "weight_scale_inv", "qweight")
ENCODERS = {
    "pack-quantized": _encode.pack_quantized,
    "int-quantized": _encode.int_quantized,
    "float-quantized": _encode.float_quantized,
    "nvfp4-pack-quantized": _encode.nvfp4_pack_quantized,
    "mxfp4-pack-quantized": _encode.mxfp4_pack_quantized,
    "mxfp8-quantized": _encode.mxfp8_quantized,
    "gptq": functools.partial(_encode.gptq, version="gptq"),
    "gptq_v2": functools.partial(_encode.gptq, version="gptq_v2"),
    "awq gemm": _encode.awq,
    "fp8": _encode.modelopt_fp8,
    "fp8 in blocks": _encode.fp8,
    "fbgemm_fp8": _encode.fbgemm_fp8,
    "modelopt NVFP4": _encode.modelopt_nvfp4,
    "mxfp4": _encode.gpt_oss,
}


def quantized_modules(folder: Folder) -> dict[str, Group]:
    """Group of every module that has quantization tensors; none may be missed."""
    kinds = {}
    for name in folder.infos:
        module, _, suffix = name.rpartition(".")
        if suffix in _MARKS:
            kinds[module] = "Linear"
        elif suffix.endswith("_scales"):
            kinds[name.removesuffix("_scales")] = "Experts"
    groups = folder.groups(kinds)
    assert groups.keys() == kinds.keys()
    return groups


def logical_shape(folder: Folder, path: str, group: Group) -> tuple[int, ...]:
    """The weight's shape, from tensors that state it more directly than the codes."""
    infos = folder.infos
    if group.codec.name == "mxfp4":
        *lead, blocks, _ = infos[f"{path}_blocks"].shape
        return (*lead, blocks * 32)
    config = folder.config
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    kv = config["num_key_value_heads"] * head_dim
    sizes = {
        "q_proj": (heads * head_dim, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, heads * head_dim),
        "gate_proj": (config["intermediate_size"], hidden),
        "up_proj": (config["intermediate_size"], hidden),
        "down_proj": (hidden, config["intermediate_size"]),
    }
    if "kv_lora_rank" not in config:
        return sizes[path.rpartition(".")[2]]
    if f"{path}.weight_shape" in infos:
        return tuple(int(n) for n in folder.read(f"{path}.weight_shape"))
    return infos[f"{path}.weight"].shape


def decoded(folder: Folder, path: str, group: Group) -> tuple[QArray, dict[str, np.ndarray]]:
    """The weight, host arrays inside, and the stored tensors."""
    format = folder.format(path, group)
    names = group.codec.tensor_names(path, folder.infos)
    tensors = {suffix: folder.read(name) for suffix, name in names.items()}
    parts = group.codec.decode(tensors, format, logical_shape(folder, path, group))
    scale = parts.pop("activation_scale", None)
    activations = group.spec.activations
    if activations is not None and activations.static:
        assert scale.shape == () and scale.dtype == np.float32 and scale > 0
    w = QArray(**parts, format=format)
    w.validate()
    return w, tensors


@pytest.mark.parametrize("name", NAMES)
def test_probes_are_exact(checkpoints_dir, name):
    folder = Folder(checkpoints_dir / name)
    groups = quantized_modules(folder)
    reference = np.load(checkpoints_dir / name / "reference.npz")
    probes = [key for key in reference if key.startswith("deq::")]
    for key in probes:
        path = key.removeprefix("deq::")
        w, _ = decoded(folder, path, groups[path])
        got, want = np.asarray(jax.tree.map(jnp.asarray, w).dequantize("float32")), reference[key]
        if name.startswith("ct_nvfp4"):  # compressed-tensors itself rounds NVFP4 to bfloat16
            got = got.astype(ml_dtypes.bfloat16).astype(np.float32)
        if got.ndim == 3:  # the first experts, as transformers' parameters lie: [E, in, out]
            want = want.swapaxes(1, 2)
        np.testing.assert_array_equal(got[: len(want)], want, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_encodes_to_the_stored_bits(checkpoints_dir, name):
    folder = Folder(checkpoints_dir / name)
    for path, group in quantized_modules(folder).items():
        w, stored = decoded(folder, path, group)
        if group.codec.name == "awq gemv":  # a format that is read only: its bytes are ours
            assert w.qvalue.tobytes() == stored["qweight"].tobytes()
            continue
        name = "fbgemm_fp8" if folder.quantization.method == "fbgemm_fp8" else group.codec.name
        written = ENCODERS[name](w)
        if "weight_shape" in stored:  # exporters do not agree on its width
            written["weight_shape"] = written["weight_shape"].astype(stored["weight_shape"].dtype)
        activations = {"input_scale", "input_global_scale"}
        assert stored.keys() - activations <= written.keys(), path
        assert written.keys() - stored.keys() <= {"g_idx"}, path
        for suffix in stored.keys() & written.keys():
            a, b = written[suffix], stored[suffix]
            assert a.shape == b.shape and a.dtype == b.dtype, (path, suffix)
            if suffix == "weight_global_scale":  # floats beyond sqrt(2) share their reciprocals
                a, b = np.float32(1) / a, np.float32(1) / b
            assert a.tobytes() == b.tobytes(), (path, suffix)


def test_narrow_codes_without_act_order_are_not_copied(checkpoints_dir):
    folder = Folder(checkpoints_dir / "kimi_k2_int4_g32_experts_tiny")
    groups = quantized_modules(folder)
    for path, group in groups.items():
        w, stored = decoded(folder, path, group)
        assert np.shares_memory(w.qvalue, stored["weight_packed"])
    assert len(groups) == 48


def test_a_corrupted_header_names_the_tensor(checkpoints_dir, tmp_path):
    source = checkpoints_dir / "autogptq_w4g128_sym_qwen2"
    relabelled = relabel(source, tmp_path / "x", "k_proj.qweight", "I32", "F32")
    folder = Folder(relabelled)
    path = "model.layers.0.self_attn.k_proj"
    with pytest.raises(ValueError, match=rf"{path}\.qweight: gptq has it in I32; found F32"):
        folder.format(path, quantized_modules(folder)[path])


def relabel(source: Path, target: Path, name: str, old: str, new: str) -> Path:
    """A copy of a folder in which tensors of this name claim another dtype."""
    target.mkdir()
    for file in source.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    data = (source / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for tensor, entry in header.items():
        if tensor.endswith(name):
            assert entry["dtype"] == old
            entry["dtype"] = new
    text = json.dumps(header).encode()
    file = len(text).to_bytes(8, "little") + text + data[start:]
    (target / "model.safetensors").write_bytes(file)
    return target
