"""Decode a quantized Hugging Face folder without qjax, and compare it with what qjax says it holds.

Run in an environment with torch, transformers and compressed-tensors:

    python tests/references/decode_exports.py FOLDER [--reference NPZ] [--complete] [--logits]
        [--bfloat16] [--experts-in-out]

NPZ (FOLDER/reference.npz by default) holds `deq::<module>`, the float32 dequantized weight [out,
in] of the module, experts stored as one tensor as [experts, out, in]. Prints the largest absolute
difference per module; exits with 1 where one exceeds --tolerance times the module's largest
weight, or where a module is missing. --complete: every quantized module must have a key.
--logits: run transformers in float32 on the decoded weights and compare `logits` at `input_ids`.

compressed-tensors formats are decoded by that library's own functions, gpt-oss mxfp4 by those of
transformers; GPTQ, AWQ, fp8 and ModelOpt by the code below, written from the specifications.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Parts = dict[str, torch.Tensor]

AWQ_NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]  # nibble of a word that holds its column 0, 1, ...
CACHE_SCALES = ("q_scale", "k_scale", "v_scale", "output_scale", "q_zero_point", "k_zero_point",
                "v_zero_point")  # fmt: skip


def read_folder(folder: Path) -> tuple[dict, dict, dict[str, Parts]]:
    """(config, its quantization part, {module: {parameter: tensor}})."""
    config = json.loads((folder / "config.json").read_text())
    quantization = config.get("quantization_config")
    beside = folder / "quantize_config.json"
    if quantization is None and beside.exists():
        quantization = {"quant_method": "gptq", **json.loads(beside.read_text())}
    if quantization is None:
        raise ValueError(f"{folder}: no quantization_config in config.json")
    modules: dict[str, Parts] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            module, _, parameter = name.rpartition(".")
            if parameter in modules.setdefault(module, {}):
                raise ValueError(f"{path}: {name} is stored twice")
            modules[module][parameter] = tensor
    return config, quantization, modules


def unpack_bits(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [..., W], a little-endian bit stream per row -> int64 [..., count] of `bits` each."""
    data = np.ascontiguousarray(words.numpy()).view(np.uint8)
    stream = np.unpackbits(data, axis=-1, bitorder="little")[..., : count * bits]
    stream = stream.reshape(*stream.shape[:-1], count, bits).astype(np.int64)
    return torch.from_numpy((stream << np.arange(bits)).sum(-1))


def decode_gptq(module: str, parts: Parts, quantization: dict) -> torch.Tensor:
    """GPTQ v1 and v2: w[k, n] = (q - zero[g[k], n]) * scale[g[k], n]."""
    scales = parts["scales"].float()
    groups, n = scales.shape
    bits = parts["qzeros"].shape[1] * 32 // n
    if not quantization.get("dynamic") and not quantization.get("extra_config"):
        if bits != quantization["bits"]:
            raise ValueError(f"{module}: {bits} bit tensors, config says {quantization['bits']}")
    k = parts["qweight"].shape[0] * 32 // bits
    q = unpack_bits(parts["qweight"].T.contiguous(), bits, k).T
    zeros = unpack_bits(parts["qzeros"], bits, n)
    version = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if version != "gptq_v2":
        zeros = zeros + 1  # v1 stores zero - 1
    group_size = quantization["group_size"]
    group_size = k if group_size == -1 else group_size
    if groups != -(-k // group_size):
        raise ValueError(f"{module}: {groups} groups for {k} inputs, group_size {group_size}")
    index = parts.get("g_idx", torch.arange(k) // group_size).long()
    return ((q - zeros[index]).float() * scales[index]).T


def decode_awq(module: str, parts: Parts, quantization: dict) -> torch.Tensor:
    """AWQ: gemm packs along the outputs in AWQ_NIBBLES order, gemv along the inputs in order."""
    group_size = quantization.get("group_size", quantization.get("q_group_size"))
    if quantization.get("version", "gemm").lower() == "gemv":
        n, k = parts["qweight"].shape[0], parts["qweight"].shape[1] * 8
        groups = k // group_size
        q = unpack_bits(parts["qweight"], 4, k)
        zeros = unpack_bits(parts["qzeros"], 4, groups)
        index = torch.arange(k) // group_size
        return (q - zeros[:, index]).float() * parts["scales"].float()[:, index]
    scales = parts["scales"].float()
    n, k = scales.shape[1], parts["qweight"].shape[0]
    group_size = k if group_size == -1 else group_size

    def columns(words: torch.Tensor) -> torch.Tensor:
        nibbles = unpack_bits(words, 4, n).reshape(len(words), n // 8, 8)
        return nibbles[:, :, AWQ_NIBBLES].reshape(len(words), n)

    index = torch.arange(k) // group_size
    q, zeros = columns(parts["qweight"]), columns(parts["qzeros"])
    return ((q - zeros[index]).float() * scales[index]).T


def decode_fp8(module: str, parts: Parts, quantization: dict) -> torch.Tensor:
    """fp8 with a scale per tensor, per channel or per block; a last block may be short."""
    scale = parts.get("weight_scale_inv", parts.get("weight_scale")).float()
    weight = parts["weight"].float()
    block = quantization.get("weight_block_size")
    if block is not None:
        expected = [-(-size // b) for size, b in zip(weight.shape, block, strict=True)]
        if list(scale.shape) != expected:
            raise ValueError(f"{module}: scales {list(scale.shape)}, expected {expected}")
        for axis in (0, 1):
            scale = scale.repeat_interleave(block[axis], axis).narrow(axis, 0, weight.shape[axis])
    return weight * scale


def decode_modelopt(module: str, parts: Parts, quantization: dict) -> torch.Tensor:
    """ModelOpt: FP8 per tensor, or NVFP4 with scale * weight_scale_2 per 16 inputs."""
    if parts["weight"].dtype != torch.uint8:
        return parts["weight"].float() * parts["weight_scale"].float()
    n, half = parts["weight"].shape
    values = unpack_fp4_from_uint8(parts["weight"], n, 2 * half, dtype=torch.float32)
    scale = parts["weight_scale"].float() * parts["weight_scale_2"]
    return values * scale.repeat_interleave(16, 1)


def _scheme(module: str, quantization: dict) -> tuple[QuantizationScheme, str]:
    """The compressed-tensors scheme and format of a module; a name goes before a class word."""
    if any(match_name(module, pattern) for pattern in quantization.get("ignore", [])):
        raise ValueError(f"{module}: quantized, yet in the ignore list")
    groups = list(quantization["config_groups"].values())
    matches = [g for g in groups if any(match_name(module, t) for t in g["targets"])]
    matches += [g for g in groups if "Linear" in g["targets"]]
    if not matches:
        raise ValueError(f"{module}: quantized, yet no config group targets it")
    weights = {k: v for k, v in matches[0]["weights"].items() if k in QuantizationArgs.model_fields}
    scheme = QuantizationScheme(targets=matches[0]["targets"], weights=QuantizationArgs(**weights))
    return scheme, matches[0].get("format") or quantization["format"]


def decode_compressed_tensors(module: str, parts: Parts, quantization: dict) -> torch.Tensor:
    """Any format of the compressed-tensors library, by its own decompression."""
    scheme, form = _scheme(module, quantization)
    parts = {name: tensor for name, tensor in parts.items() if name != "bias"}
    scale = parts["weight_scale"]
    if form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        # The library's decompress() rounds to bfloat16; its two steps do not have to.
        packed = parts["weight_packed"]
        values = unpack_fp4_from_uint8(packed, len(packed), 2 * packed.shape[1], torch.float32)
        if form == "mxfp4-pack-quantized":
            scale = torch.exp2(scale.float() - 127)
        return dequantize(
            values,
            scale.float(),
            args=scheme.weights,
            dtype=torch.float32,
            global_scale=parts.get("weight_global_scale"),
        )
    if "weight_g_idx" in parts and not bool((parts["weight_g_idx"].diff() >= 0).all()):
        raise ValueError(f"{module}: compressed-tensors {form} with act-order is not decoded here")
    if form != "mxfp8-quantized":
        parts["weight_scale"] = scale.float()  # the library computes in the dtype of the scale
    compressor = BaseCompressor.get_value_from_registry(form)
    return compressor.decompress(parts, scheme)["weight"].float()


def decode_auto_round(module: str, parts: Parts, quantization: dict) -> torch.Tensor:
    """auto-round names one of the other packings."""
    packing = quantization["packing_format"]
    decoders = {"gptq": decode_gptq, "awq": decode_awq, "fp8": decode_fp8}
    for word, decode in decoders.items():
        if word in packing:
            return decode(module, parts, quantization)
    raise ValueError(f"{module}: packing_format {packing!r} is not decoded here")


DECODERS = {
    "awq": decode_awq,
    "gptq": decode_gptq,
    "fp8": decode_fp8,
    "fbgemm_fp8": decode_fp8,
    "modelopt": decode_modelopt,
    "compressed-tensors": decode_compressed_tensors,
    "auto-round": decode_auto_round,
}
MARKS = {"qweight", "weight_packed", "weight_scale", "weight_scale_inv"}


def decode_folder(folder: Path) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(config, {quantized module: float32 weight}, {name: any other tensor})."""
    config, quantization, modules = read_folder(folder)
    method = quantization["quant_method"]
    decoded, others = {}, {}
    for module, parts in modules.items():
        if method == "mxfp4" and any(name.endswith("_blocks") for name in parts):
            for name in ("gate_up_proj", "down_proj"):
                blocks, scales = parts.pop(f"{name}_blocks"), parts.pop(f"{name}_scales")
                weight = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
                decoded[f"{module}.{name}"] = weight.transpose(1, 2)  # it returns [E, in, out]
        elif MARKS & set(parts):
            if method not in DECODERS:
                raise ValueError(f"{folder}: quant_method {method!r}, known: {sorted(DECODERS)}")
            decoded[module] = DECODERS[method](module, parts, quantization)
            parts = {name: parts[name] for name in ("bias",) if name in parts}
        others |= {f"{module}.{name}": tensor for name, tensor in parts.items()}
    return config, decoded, others


def run_logits(config: dict, decoded: dict, others: dict, input_ids: np.ndarray) -> np.ndarray:
    """Logits of transformers in float32 (eager attention) on the decoded weights."""
    config = {name: value for name, value in config.items() if name != "quantization_config"}
    if config["model_type"] == "kimi_k2":
        config["model_type"] = "deepseek_v3"
    tensors = {n: t for n, t in others.items() if n.rpartition(".")[2] not in CACHE_SCALES}
    for module, weight in decoded.items():
        stacked = weight.ndim == 3
        tensors[module if stacked else f"{module}.weight"] = weight.mT if stacked else weight
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(config))
        tensors = {n: t.float().contiguous() for n, t in tensors.items()}
        save_file(tensors, Path(name) / "model.safetensors", metadata={"format": "pt"})
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, attn_implementation="eager",
            experts_implementation="eager", output_loading_info=True,
        )  # fmt: skip
    if info["missing_keys"] or info["mismatched_keys"] or info["unexpected_keys"]:
        raise ValueError(f"transformers on the decoded weights: {info}")
    with torch.no_grad():
        return model.eval()(input_ids=torch.from_numpy(input_ids).long()).logits.numpy()


def compare(name: str, got: np.ndarray, want: np.ndarray, tolerance: float) -> bool:
    """Print one line; whether the difference stays below tolerance * max |want|."""
    if got.ndim == want.ndim == 3:
        got = got[: len(want)]  # the first experts are enough
    if got.shape != want.shape:
        print(f"{name}: decoded {got.shape}, reference {want.shape}: MISMATCH")
        return False
    error = np.abs(got.astype(np.float64) - want).max()
    good = bool(error <= tolerance * np.abs(want).max())  # False for nan
    print(f"{name}: max abs difference {error:.3g}" + ("" if good else ": MISMATCH"))
    return good


def main() -> int:
    """Compare one folder; 0 where everything agrees."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reference", type=Path, help="npz, FOLDER/reference.npz by default")
    parser.add_argument("--complete", action="store_true", help="all modules must have a key")
    parser.add_argument("--logits", action="store_true", help="compare logits as well")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="relative to max |weight|")
    parser.add_argument("--logits-tolerance", type=float, default=1e-4, help="absolute")
    parser.add_argument(
        "--experts-in-out", action="store_true", help="stacked experts are [experts, in, out]"
    )
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="round the decoded weights first, as compressed-tensors does when it decodes NVFP4",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    config, decoded, others = decode_folder(args.folder)
    if args.bfloat16:
        decoded = {name: weight.bfloat16().float() for name, weight in decoded.items()}
    reference = dict(np.load(args.reference or args.folder / "reference.npz"))
    keys = {k.removeprefix("deq::"): k for k in reference if k.startswith("deq::")}
    good = bool(decoded)
    for module, key in keys.items():
        weight = decoded.get(module, others.get(f"{module}.weight"))
        if weight is None:
            print(f"{module}: not in the folder: MISMATCH")
            good = False
            continue
        want = reference[key]
        if args.experts_in_out and want.ndim == 3:
            want = want.swapaxes(1, 2)
        good &= compare(module, weight.float().numpy(), want, args.tolerance)
    missing = sorted(decoded.keys() - keys.keys())
    if args.complete and missing:
        print(f"{len(missing)} quantized modules have no key, the first: {missing[0]}: MISMATCH")
        good = False
    if args.logits:
        logits = run_logits(config, decoded, others, reference["input_ids"])
        tolerance = args.logits_tolerance / np.abs(reference["logits"]).max()
        good &= compare("logits", logits, reference["logits"], tolerance)
    compared = len(keys) + args.logits
    print(f"{len(decoded)} quantized modules, {compared} comparisons: {'ok' if good else 'FAILED'}")
    return 0 if good and compared else 1


if __name__ == "__main__":
    sys.exit(main())
