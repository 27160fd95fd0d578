"""FP8 and FP4 weights: DeepSeek's blocks, per-tensor and per-channel FP8, FBGEMM, MXFP4, MXFP8, NVFP4."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.checkpoint.schemes._base import (
    EXPONENTS,
    WIDE,
    Codec,
    Group,
    Parts,
    Quantization,
    Settings,
    Tensors,
    check_shape,
    part_of_name,
    scales,
)
from qjax.formats import ActivationFormat, QFormat, qformat
from qjax.recipe import QuantSpec, kv_cache_format

_TENSOR = qformat("fp8_e4m3_tensor")
_CHANNEL = qformat("fp8_e4m3_channel")
_STATIC_TENSOR = ActivationFormat(_TENSOR, static=True)


def fp8_parts(scale_name: str, input_name: str | None = None):
    """The decoder of plain FP8 weights with multiplying scales."""

    def decode(tensors: Tensors, format: QFormat, shape: tuple[int, ...]) -> Parts:
        weight = check_shape(tensors, "weight", shape)
        if weight.dtype.name != format.element:
            raise ValueError(f"weight must be {format.element}; found {weight.dtype.name}")
        parts = {"qvalue": weight, "scale": scales(tensors, scale_name, format, shape)}
        if input_name is not None and input_name in tensors:
            parts["activation_scale"] = scalar(tensors, input_name)
        return parts

    return decode


def scalar(tensors: Tensors, name: str) -> np.ndarray:
    """A tensor of one value as a float32 scalar.

    Raises:
        ValueError: If it has more.
    """
    if tensors[name].size != 1:
        raise ValueError(f"{name} must hold one value; found {list(tensors[name].shape)}")
    return np.asarray(tensors[name], np.float32).reshape(())


def reciprocal(value: np.ndarray, name: str) -> np.ndarray:
    """1 / value of a scale that divides.

    Raises:
        ValueError: If it is not a positive number.
    """
    if not (np.isfinite(value) & (value > 0)).all():
        raise ValueError(f"{name} must be positive; found {value}")
    return np.asarray(np.float32(1) / value.astype(np.float32))


def packed_fp4(tensors: Tensors, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """FP4 codes, two per byte, low nibble first: stored as `QArray` stores them."""
    if shape[-1] % 2:
        raise ValueError(f"{name}: FP4 weights need an even K; found {list(shape)}")
    found = check_shape(tensors, name, (*shape[:-1], shape[-1] // 2))
    if found.dtype != np.uint8:
        raise ValueError(f"{name} must be uint8; found {found.dtype}")
    return found


def nvfp4_parts(weight: str, global_name: str, input_name: str, *, divides: bool):
    """The decoder of NVFP4 weights, whose global scale divides (compressed-tensors) or multiplies (ModelOpt)."""

    def decode(tensors: Tensors, format: QFormat, shape: tuple[int, ...]) -> Parts:
        factor = scalar(tensors, global_name)
        parts = {
            "qvalue": packed_fp4(tensors, weight, shape),
            "scale": scales(tensors, "weight_scale", format, shape),
            "global_scale": (reciprocal(factor, global_name) if divides else factor).reshape(1, 1),
        }
        if input_name in tensors:
            factor = scalar(tensors, input_name)
            parts["activation_scale"] = reciprocal(factor, input_name) if divides else factor
        return parts

    return decode


def _mxfp4_parts(tensors: Tensors, format: QFormat, shape: tuple[int, ...]) -> Parts:
    return {
        "qvalue": packed_fp4(tensors, "weight_packed", shape),
        "scale": scales(tensors, "weight_scale", format, shape),
    }


def _gpt_oss_parts(tensors: Tensors, format: QFormat, shape: tuple[int, ...]) -> Parts:
    *lead, k = shape
    if k % 32:
        raise ValueError(f"blocks: groups of 32 must divide K; found a weight {list(shape)}")
    blocks = check_shape(tensors, "blocks", (*lead, k // 32, 16))
    return {
        "qvalue": blocks.reshape(*lead, k // 2),
        "scale": scales(tensors, "scales", format, shape),
    }


FP8_DTYPES = {
    "weight": ("F8_E4M3",),
    "weight_scale": (*WIDE, "F8_E8M0"),
    "weight_scale_inv": (*WIDE, "F8_E8M0"),
    "input_scale": WIDE,
}
_NVFP4_DTYPES = {
    "weight_packed": ("U8",),
    "weight": ("U8",),
    "weight_scale": ("F8_E4M3",),
    "weight_global_scale": WIDE,
    "weight_scale_2": WIDE,
    "input_global_scale": WIDE,
    "input_scale": WIDE,
}
FP8_BLOCK = Codec(
    "fp8 in blocks",
    ("weight", "weight_scale_inv"),
    "weight_scale_inv",
    fp8_parts("weight_scale_inv"),
    dtypes=FP8_DTYPES,
    aliases={"weight_scale_inv": "weight_scale"},
)
FP8 = Codec(
    "fp8",
    ("weight", "weight_scale"),
    "weight_scale",
    fp8_parts("weight_scale", "input_scale"),
    optional=("input_scale",),
    accepted=("input_zero_point", "weight_zero_point"),
    dtypes=FP8_DTYPES,
    # transformers' own fp8 layers call them so, for whole tensors too
    aliases={"weight_scale": "weight_scale_inv", "input_scale": "activation_scale"},
)
NVFP4_CT = Codec(
    "nvfp4-pack-quantized",
    ("weight_packed", "weight_scale", "weight_global_scale"),
    "weight_scale",
    nvfp4_parts("weight_packed", "weight_global_scale", "input_global_scale", divides=True),
    optional=("input_global_scale",),
    dtypes=_NVFP4_DTYPES,
)
NVFP4_MODELOPT = Codec(
    "modelopt NVFP4",
    ("weight", "weight_scale", "weight_scale_2"),
    "weight_scale",
    nvfp4_parts("weight", "weight_scale_2", "input_scale", divides=False),
    optional=("input_scale",),
    dtypes=_NVFP4_DTYPES,
)
MXFP4_CT = Codec(
    "mxfp4-pack-quantized",
    ("weight_packed", "weight_scale"),
    "weight_scale",
    _mxfp4_parts,
    dtypes={"weight_packed": ("U8",), "weight_scale": EXPONENTS},
)
MXFP8_CT = Codec(
    "mxfp8-quantized",
    ("weight", "weight_scale"),
    "weight_scale",
    fp8_parts("weight_scale"),
    dtypes={"weight": ("F8_E4M3",), "weight_scale": EXPONENTS},
)
GPT_OSS = Codec(
    "mxfp4",
    ("blocks", "scales"),
    "scales",
    _gpt_oss_parts,
    dtypes={"blocks": ("U8",), "scales": EXPONENTS},
    joiner="_",
)

_HEAD = part_of_name("lm_head")


def block_activations(ue8m0: bool) -> ActivationFormat:
    """DeepSeek-V3's activations: per token and 128 columns, amax at least 1e-4."""
    return ActivationFormat(qformat("fp8_e4m3_1x128" + "_ue8m0" * ue8m0), amax_min=1e-4)


_FP8_HARMLESS = frozenset({"quant_method", "_comment", "producer", "version", "dequantize"})


def parse_fp8(config: Mapping[str, Any], where: str) -> Quantization:
    """`quant_method` "fp8": DeepSeek's 128x128 blocks, or per-tensor scales."""
    s = Settings(config, where, _FP8_HARMLESS)
    s.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    scheme = s.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    ue8m0 = s.choice("scale_fmt", ("ue8m0", "float"), "float") == "ue8m0"
    skipped = (*s.strings("modules_to_not_convert"), *s.strings("ignored_layers"))
    block = s.get("weight_block_size")
    s.finish()
    if block is None:
        act = _STATIC_TENSOR if scheme == "static" else ActivationFormat(_CHANNEL)
        group = Group(("Linear",), QuantSpec(_TENSOR, act), FP8)
    else:
        format = dataclasses.replace(_TENSOR, block_shape=block_shape(block, where))
        if scheme != "dynamic" or format.block_shape[1] != 128:
            raise ValueError(
                f"{where}: weight_block_size {block} with {scheme} activations is not supported"
            )
        group = Group(("Linear",), QuantSpec(format, block_activations(ue8m0)), FP8_BLOCK)
    return Quantization("fp8", (group,), (_HEAD, *map(part_of_name, skipped)))


def block_shape(value: Any, where: str) -> tuple[int, int]:
    """A pair of block sizes.

    Raises:
        ValueError: If it is no pair of positive integers.
    """
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value)
    ):
        raise ValueError(f"{where}: block sizes must be two positive integers; found {value!r}")
    return (value[0], value[1])


def parse_fbgemm(config: Mapping[str, Any], where: str) -> Quantization:
    """`quant_method` "fbgemm_fp8": scales per output channel and per token, the latter bounded."""
    s = Settings(config, where, frozenset({"quant_method", "modules_to_not_convert"}))
    bound = s.get("activation_scale_ub", 1200.0)
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not bound > 0:
        raise ValueError(f"{where}: activation_scale_ub must be positive; found {bound!r}")
    skipped = s.strings("modules_to_not_convert")
    s.finish()
    # FBGEMM's smallest scale, 1 / (448 * 512), as a bound on amax.
    act = ActivationFormat(_CHANNEL, amax_min=1 / 512, amax_max=float(bound))
    group = Group(("Linear",), QuantSpec(_CHANNEL, act), FP8)
    return Quantization("fbgemm_fp8", (group,), (_HEAD, *map(part_of_name, skipped)))


def parse_modelopt(config: Mapping[str, Any], where: str) -> Quantization:
    """`quant_method` "modelopt": FP8 per tensor or NVFP4; also hf_quant_config.json's content."""
    # The older file has the fields one level below; either way they are read as one object.
    config = {**config, **Settings(config, where, frozenset()).mapping("quantization")}
    s = Settings(config, where, frozenset({"quant_method", "producer", "quantization", "version"}))
    algo = s.choice("quant_algo", ("FP8", "NVFP4"))
    format, codec = {"FP8": (_TENSOR, FP8), "NVFP4": (qformat("nvfp4"), NVFP4_MODELOPT)}[algo]
    if algo == "NVFP4":
        s.choice("group_size", (16,), 16)
    cache = s.choice("kv_cache_quant_algo", ("FP8", "NVFP4", "none"), "none")
    if scheme := s.mapping("kv_cache_scheme"):
        bits = scheme.get("num_bits")
        if bits not in (4, 8) or scheme.get("type") != "float":
            raise ValueError(f"{where}: kv_cache_scheme {scheme!r} is not supported")
        cache = "FP8" if bits == 8 else "NVFP4"
    skipped = (*s.strings("ignore"), *s.strings("exclude_modules"))
    static = True
    for name, group in s.mapping("config_groups").items():
        fields = Settings(group, f"{where}: config_groups.{name}", frozenset({"targets"}))
        if fields.mapping("weights").get("num_bits", format.bits) != format.bits:
            raise ValueError(f"{where}: config_groups.{name}: weights disagree with {algo}")
        static = bool(fields.mapping("input_activations"))
        fields.finish()
    s.get("group_size")
    s.finish()
    act = ActivationFormat(format, static=True) if static else None
    names = {"FP8": "fp8_e4m3", "NVFP4": "nvfp4"}
    return Quantization(
        "modelopt",
        (Group(("Linear",), QuantSpec(format, act), codec),),
        tuple(map(part_of_name, skipped)),
        None if cache == "none" else kv_cache_format(names[cache]),
    )


def parse_mxfp4(config: Mapping[str, Any], where: str) -> Quantization:
    """`quant_method` "mxfp4": GPT-OSS, whose experts are MXFP4 and the rest plain."""
    s = Settings(config, where, frozenset({"quant_method", "dequantize", "use_kernels"}))
    skipped = s.strings("modules_to_not_convert")
    s.finish()
    group = Group(("Experts",), QuantSpec(qformat("mxfp4")), GPT_OSS)
    return Quantization("mxfp4", (group,), tuple(map(part_of_name, skipped)))
