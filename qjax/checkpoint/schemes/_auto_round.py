"""AutoRound: GPTQ, AWQ, FP8 and compressed-tensors layouts under one config, mixed bits, signed scales."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qjax.checkpoint.schemes._base import (
    REGEX_CHARACTERS,
    Codec,
    Group,
    Quantization,
    Settings,
    part_of_name,
    prefix,
    search_pattern,
)
from qjax.checkpoint.schemes._floating import (
    FP8,
    FP8_BLOCK,
    MXFP4_CT,
    MXFP8_CT,
    NVFP4_CT,
    block_activations,
    block_shape,
)
from qjax.checkpoint.schemes._gptq import AWQ_GEMM, GPTQ_V1, integer_spec
from qjax.formats import ActivationFormat, qformat
from qjax.recipe import QuantSpec

_HARMLESS = frozenset(
    """quant_method autoround_version enable_quanted_input provider iters lr minmax_lr scale_dtype
    enable_minmax_tuning dataset batch_size amp low_gpu_mem_usage nsamples seqlen train_bs
    gradient_accumulate_steps damp_percent true_sequential desc_act static_groups backend
    to_quant_block_names fmt activation_scheme low_cpu_mem_usage quant_block_list
    enable_norm_bias_tuning enable_adam tokenizer model_seqlen meta""".split()
)
_SCHEME = ("bits", "group_size", "sym", "data_type", "act_bits", "act_group_size", "act_sym",
           "act_data_type", "act_dynamic", "super_bits", "super_group_size")  # fmt: skip

Scheme = tuple[QuantSpec, Codec]


def parse_auto_round(config: Mapping[str, Any], where: str) -> Quantization:
    """`quant_method` "auto-round": every packing that holds quantized weights; `extra_config` overrides."""
    s = Settings(config, where, _HARMLESS)
    packing = str(s.get("packing_format", "auto_round:auto_gptq")).rpartition(":")[2]
    packing = next((word for word in _PACKINGS if packing.startswith(word)), packing)
    if packing not in _PACKINGS:
        raise ValueError(
            f"{where}: packing_format = {config['packing_format']!r} is not supported; "
            f"supported: {list(_PACKINGS)}"
        )
    base = {name: s.get(name) for name in (*_SCHEME, "weight_block_size")}
    extra = s.mapping("extra_config")
    blocks = _blocks(s.get("block_name_to_quantize"), where)
    head = s.choice("lm_head", (True, False), False)
    s.finish()

    def group(targets: tuple[str, ...], settings: Mapping[str, Any], name: str) -> Group:
        g = Settings(settings, f"{where}{name}", frozenset({"weight_block_size"}))
        if g.choice("bits", (2, 3, 4, 8, 16, 32)) >= 16:
            return Group(targets, None, None)
        for field in ("super_bits", "super_group_size"):
            if g.get(field) is not None:
                raise ValueError(f"{where}{name}: {field}: scales of scales are not supported")
        spec, codec = _PACKINGS[packing](g, f"{where}{name}")
        return Group(targets, spec, codec)

    groups = []
    for name, override in extra.items():
        if not isinstance(override, Mapping):
            raise ValueError(f"{where}: extra_config.{name} must be an object; found {override!r}")
        here = f": extra_config.{name}"
        unknown = sorted(k for k, v in override.items() if k not in _SCHEME and v)
        if unknown:
            raise ValueError(f"{where}{here}: unsupported fields {unknown}")
        regex = any(c in name for c in REGEX_CHARACTERS)
        target = search_pattern(name, f"{where}: extra_config") if regex else name
        settings = {**base, **{k: v for k, v in override.items() if v is not None}}
        groups.append(group((target,), settings, here))
    groups.append(group(blocks or ("Linear",), base, ""))
    ignore = () if head or "lm_head" in extra else (part_of_name("lm_head"),)
    return Quantization("auto-round", tuple(groups), ignore)


def _blocks(value: Any, where: str) -> tuple[str, ...]:
    """Targets of the blocks that are quantized: a prefix, several after commas, or lists of names."""
    entries = value.split(",") if isinstance(value, str) else value or []
    names = [n for entry in entries for n in (entry if isinstance(entry, list) else [entry])]
    if not isinstance(entries, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: block_name_to_quantize must be names; found {value!r}")
    return tuple(prefix(name.strip()) for name in names)


def _data_type(s: Settings, name: str, words: tuple[str, ...], where: str) -> str:
    """A data type, which has to start with one of these words."""
    value = str(s.get(name, words[0]))
    if not value.startswith(words):
        raise ValueError(f"{where}: {name} = {value!r} is not supported; supported: {list(words)}")
    return value


def _integers(codec: Codec, bits: tuple[int, ...]):
    """Integer codes; with 8-bit activations these are integers per token, computed at run time."""

    def scheme(s: Settings, where: str) -> Scheme:
        _data_type(s, "data_type", ("int",), where)
        format = integer_spec(s, bits, s.choice("sym", (True, False), True))
        if s.choice("act_bits", (8, 16, 32), 16) > 8:
            return QuantSpec(format), codec
        _data_type(s, "act_data_type", ("int",), where)
        s.choice("act_dynamic", (True,), True)
        s.choice("act_sym", (True,), True)
        s.choice("act_group_size", (-1, 0), -1)
        return QuantSpec(format, ActivationFormat(qformat("int8_channel"))), codec

    return scheme


def _fp8(s: Settings, where: str) -> Scheme:
    """Blocks with dynamic activations, or one scale per tensor or channel."""
    s.choice("bits", (8,))
    if "e5m2" in _data_type(s, "data_type", ("fp",), where):
        raise ValueError(f"{where}: data_type: e5m2 weights are not supported")
    quantized = s.choice("act_bits", (8, 16, 32), 16) == 8
    group = s.get("group_size", -1)
    block = s.get("weight_block_size", group if isinstance(group, list) else None)
    if block is not None:
        shape = block_shape(block, f"{where}: weight_block_size")
        s.choice("act_dynamic", (True,), True)
        format = dataclasses.replace(qformat("fp8_e4m3_tensor"), block_shape=shape)
        return QuantSpec(format, block_activations(False) if quantized else None), FP8_BLOCK
    s.choice("group_size", (-1, 0), -1)
    format = qformat("fp8_e4m3_tensor" if group == 0 else "fp8_e4m3_channel")
    act = None
    if quantized and s.choice("act_dynamic", (True, False), True):
        act = ActivationFormat(qformat("fp8_e4m3_channel"))
    elif quantized:
        act = ActivationFormat(qformat("fp8_e4m3_tensor"), static=True)
    return QuantSpec(format, act), FP8


def _microscaled(s: Settings, where: str) -> Scheme:
    """compressed-tensors' layouts of NVFP4, MXFP4 and MXFP8, and its fp8 of one scale per row or tensor."""
    kind = _data_type(s, "data_type", ("fp", "mx_fp", "nv_fp"), where)
    if kind.startswith("fp"):
        return _fp8(s, where)
    names = {("nv_fp", 4): "nvfp4", ("mx_fp", 4): "mxfp4", ("mx_fp", 8): "mxfp8"}
    name = names.get((kind[:5], s.get("bits")))
    if name is None:
        raise ValueError(f"{where}: bits = {s.get('bits')!r} is not supported for {kind}")
    format = qformat(name)
    s.choice("group_size", (format.block_shape[1],))
    codec = {"nvfp4": NVFP4_CT, "mxfp4": MXFP4_CT, "mxfp8": MXFP8_CT}[name]
    act_bits = s.choice("act_bits", (4, 8, 16, 32), 16)
    if act_bits > 8:
        return QuantSpec(format), codec
    act_kind = _data_type(s, "act_data_type", ("mx_fp", "nv_fp"), where)
    if (act_kind[:5], act_bits) not in names:
        raise ValueError(f"{where}: act_bits = {act_bits} is not supported for {act_kind}")
    act = qformat(names[act_kind[:5], act_bits])
    static = act.global_scale and ("static" in act_kind or s.get("act_dynamic") is not True)
    return QuantSpec(format, ActivationFormat(act, static=static)), codec


_PACKINGS = {
    "auto_gptq": _integers(GPTQ_V1, (2, 3, 4, 8)),
    "gptq": _integers(GPTQ_V1, (2, 3, 4, 8)),
    "auto_awq": _integers(AWQ_GEMM, (4,)),
    "awq": _integers(AWQ_GEMM, (4,)),
    "fp8": _fp8,
    "llm_compressor": _microscaled,
    "mx_fp": _microscaled,
    "nv_fp": _microscaled,
}
"""Layouts by the word that packing_format has after "auto_round:"; what follows it is ignored."""
