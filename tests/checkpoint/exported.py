"""Exported tensors decoded by plain NumPy, from the formats' descriptions and not from the package."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open

_DTYPES = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
}
_E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_AWQ_NIBBLE = [0, 4, 1, 5, 2, 6, 3, 7]


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder; with several files, those that the index names."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    tensors = {}
    for file in files:
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        assert header.pop("__metadata__") == {"format": "pt"}
        with safe_open(file, "np") as opened:  # the format's own checks of header and size
            assert set(opened.keys()) == set(header)
        for name, entry in header.items():
            assert name not in tensors
            begin, end = (start + offset for offset in entry["data_offsets"])
            flat = np.frombuffer(data[begin:end], _DTYPES[entry["dtype"]])
            assert begin % flat.dtype.itemsize == 0
            tensors[name] = flat.reshape(entry["shape"])
        if index.exists():
            stated = json.loads(index.read_text())["weight_map"]
            assert {n for n, f in stated.items() if f == file.name} <= tensors.keys()
    return tensors


def bits_of(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The little-endian bit stream of each row of int32 words, `bits` at a time."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    stream = stream[..., : count * bits].reshape(*words.shape[:-1], count, bits)
    return (stream.astype(np.int32) << np.arange(bits, dtype=np.int32)).sum(-1)


def spread(scale: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """One value per element."""
    wide = np.repeat(np.repeat(scale.astype(np.float32), block[0], 0), block[1], 1)
    return np.broadcast_to(wide[: shape[0], : shape[1]], shape)


def decode(parts: dict[str, np.ndarray], config: dict) -> np.ndarray:
    """float32 [N, K] of one module's tensors."""
    method = config["quant_method"]
    if method == "gptq":
        return _gptq(parts, config)
    if method == "awq":
        return _awq(parts, config)
    if method == "fp8":
        scale = parts.get("weight_scale_inv", parts.get("weight_scale"))
        block = config.get("weight_block_size", parts["weight"].shape)
        scale = scale.reshape(1, 1) if scale.ndim == 0 else scale
        return parts["weight"].astype(np.float32) * spread(scale, parts["weight"].shape, block)
    if method == "modelopt":
        return _modelopt(parts)
    (group,) = config["config_groups"].values()
    return _compressed(parts, group["format"], group["weights"])


def _gptq(parts, config):
    bits, scales = config["bits"], parts["scales"].astype(np.float32)
    n = scales.shape[1]
    k = parts["qweight"].shape[0] * 32 // bits
    q = bits_of(parts["qweight"].T, bits, k)
    zero = bits_of(parts["qzeros"], bits, n) + (config["checkpoint_format"] == "gptq")
    g = parts["g_idx"]
    return (q - zero[g].T) * scales[g].T


def _awq(parts, config):
    scales = parts["scales"].astype(np.float32)
    k, n = len(parts["qweight"]), scales.shape[1]

    def columns(words):
        nibbles = bits_of(words, 4, n).reshape(len(words), n // 8, 8)
        return nibbles[:, :, _AWQ_NIBBLE].reshape(len(words), n)

    g = np.arange(k) // (k if config["group_size"] == -1 else config["group_size"])
    return ((columns(parts["qweight"]) - columns(parts["qzeros"])[g]) * scales[g]).T


def _modelopt(parts):
    weight, scale = parts["weight"], parts["weight_scale"].astype(np.float32)
    if weight.dtype != np.uint8:
        return weight.astype(np.float32) * scale
    codes = np.stack([weight & 15, weight >> 4], axis=-1).reshape(len(weight), -1)
    return _E2M1[codes] * spread(scale, codes.shape, (1, 16)) * parts["weight_scale_2"]


def _compressed(parts, form, args):
    if form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        packed = parts["weight_packed"]
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
        scale = parts["weight_scale"]
        if form.startswith("nvfp4"):
            values = _E2M1[codes] * spread(scale, codes.shape, (1, 16))
            return values * (np.float32(1) / parts["weight_global_scale"])
        scale = np.exp2(scale.astype(np.float32) - 127)
        return _E2M1[codes] * spread(scale, codes.shape, (1, 32))
    scale = parts["weight_scale"]
    if form == "pack-quantized":
        n, k = parts["weight_shape"]
        bits = args["num_bits"]
        q = bits_of(parts["weight_packed"], bits, k)
        zero = np.full(scale.shape, 2 ** (bits - 1))
        if "weight_zero_point" in parts:
            zero = bits_of(np.ascontiguousarray(parts["weight_zero_point"].T), bits, n).T
        g = parts.get("weight_g_idx", np.arange(k) // (args["group_size"] or k))
        return (q - zero[:, g]) * scale[:, g].astype(np.float32)
    weight = parts["weight"].astype(np.float32)
    if form == "mxfp8-quantized":
        scale = np.exp2(scale.astype(np.float32) - 127)
    n, k = weight.shape
    if args["strategy"] == "tensor":
        return weight * scale.astype(np.float32)
    block = args["block_structure"] or (1, args["group_size"] or k)
    return weight * spread(scale, (n, k), block)
