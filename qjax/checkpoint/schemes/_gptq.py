"""GPTQ (v1 and v2) and AWQ (GEMM and GEMV): words of integer codes, packed along either axis."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.checkpoint.schemes._base import (
    REGEX_CHARACTERS,
    WIDE,
    Codec,
    Group,
    Parts,
    Quantization,
    Settings,
    Tensors,
    check_shape,
    part_of_name,
    prefix_pattern,
    search_pattern,
    substring,
)
from qjax.checkpoint.schemes._bits import (
    from_stream,
    repack_rows,
    signed_zero_points,
    sorted_columns,
    unpack_stream,
    words_as_bytes,
)
from qjax.formats import WHOLE, QFormat, integer_format
from qjax.recipe import QuantSpec

_CHUNK = 1 << 20
"""Words that are unpacked at once."""
_HEAD = part_of_name("lm_head")
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Nibble of an AWQ word that holds each of its eight columns."""


def _zeros(parts: Parts, codes: np.ndarray, format: QFormat) -> Parts:
    """Adds zero points; a symmetric format's must all stand for 0."""
    signed = signed_zero_points(codes, format.bits)
    if format.offset is not None:
        parts["zero_point"] = signed
    elif signed.any():
        raise ValueError(
            "qzeros: the config says symmetric, but zero points differ from the middle code: "
            f"found {signed.min()}..{signed.max()} around it"
        )
    return parts


def _gptq(added: int):
    """The decoder of GPTQ tensors whose stored zero points lack `added`."""

    def decode(tensors: Tensors, format: QFormat, shape: tuple[int, ...]) -> Parts:
        n, k = shape
        bits, group = format.bits, format.block_size(shape)[1]
        if k * bits % 32 or n * bits % 32 or k % group:
            raise ValueError(
                f"qweight: GPTQ packs whole words and whole groups of {group}; "
                f"found a weight {list(shape)}"
            )
        groups = k // group
        qweight = check_shape(tensors, "qweight", (k * bits // 32, n))
        qzeros = check_shape(tensors, "qzeros", (groups, n * bits // 32))
        scale = check_shape(tensors, "scales", (groups, n))
        perm = None
        if "g_idx" in tensors:
            perm = sorted_columns(tensors["g_idx"], k, group, "g_idx")

        def codes(start: int, end: int) -> np.ndarray:
            assert perm is not None
            return unpack_stream(words_as_bytes(qweight[:, start:end].T), bits, k)[:, perm]

        parts = {"scale": np.ascontiguousarray(scale.T)}
        if perm is None:  # a column of words is a row of QArray's bytes
            parts["qvalue"] = from_stream(words_as_bytes(qweight.T), bits, k)
        else:
            parts["qvalue"] = repack_rows(codes, (n, k), bits)
            parts["column_perm"] = perm
        # Asymmetric v1 stores 2**bits for a zero of 0 minus 1: added after unpacking, it comes out right.
        zero = unpack_stream(words_as_bytes(qzeros), bits, n).astype(np.int16).T + np.int16(added)
        return _zeros(parts, np.ascontiguousarray(zero), format)

    return decode


def _awq_gemm(tensors: Tensors, format: QFormat, shape: tuple[int, ...]) -> Parts:
    n, k = shape
    group = format.block_size(shape)[1]
    if n % 8 or k % group or k % 2:
        raise ValueError(
            f"qweight: AWQ packs eight outputs and whole groups of {group}; "
            f"found a weight {list(shape)}"
        )
    groups = k // group
    qweight = check_shape(tensors, "qweight", (k, n // 8))
    qzeros = check_shape(tensors, "qzeros", (groups, n // 8))
    scale = check_shape(tensors, "scales", (groups, n))
    qvalue = np.empty((n, k // 2), np.uint8)
    step = max(1, _CHUNK // k)
    for start in range(0, n // 8, step):
        words = qweight[:, start : start + step].view(np.uint32)
        for column, nibble in enumerate(_AWQ_ORDER):
            codes = ((words >> np.uint32(4 * nibble)) & np.uint32(15)).astype(np.uint8)
            pairs = codes[0::2] | (codes[1::2] << np.uint8(4))
            qvalue[8 * start + column : 8 * (start + words.shape[1]) : 8] = pairs.T
    nibbles = unpack_stream(words_as_bytes(qzeros), 4, n).reshape(groups, -1, 8)
    zero = nibbles[:, :, _AWQ_ORDER].reshape(groups, n)
    parts = {"qvalue": qvalue, "scale": np.ascontiguousarray(scale.T)}
    return _zeros(parts, np.ascontiguousarray(zero.T), format)


def _awq_gemv(tensors: Tensors, format: QFormat, shape: tuple[int, ...]) -> Parts:
    n, k = shape
    group = format.block_size(shape)[1]
    multiple = {128: 1, 64: 2, 32: 4}.get(group)
    if multiple is None or k % group:
        raise ValueError(
            f"qweight: AWQ's gemv version has whole groups of 32, 64 or 128; found groups of {group} "
            f"and a weight {list(shape)}"
        )
    groups = k // group
    words = -(-groups // (8 * multiple)) * multiple
    qweight = check_shape(tensors, "qweight", (n, k // 8))
    qzeros = check_shape(tensors, "qzeros", (n, words))
    scale = check_shape(tensors, "scales", (n, words * 8))
    parts = {
        "qvalue": from_stream(words_as_bytes(qweight), 4, k),
        "scale": np.ascontiguousarray(scale[:, :groups]),
    }
    return _zeros(parts, unpack_stream(words_as_bytes(qzeros), 4, groups), format)


_TENSORS = ("qweight", "qzeros", "scales")
_DTYPES = {"qweight": ("I32",), "qzeros": ("I32",), "scales": WIDE, "g_idx": ("I32", "I64")}
GPTQ_V1 = Codec("gptq", _TENSORS, "scales", _gptq(1), optional=("g_idx",), dtypes=_DTYPES)
GPTQ_V2 = Codec("gptq_v2", _TENSORS, "scales", _gptq(0), optional=("g_idx",), dtypes=_DTYPES)
AWQ_GEMM = Codec("awq gemm", _TENSORS, "scales", _awq_gemm, dtypes=_DTYPES)
AWQ_GEMV = Codec("awq gemv", _TENSORS, "scales", _awq_gemv, dtypes=_DTYPES)


def integer_spec(s: Settings, allowed_bits: tuple[int, ...], symmetric: bool) -> QFormat:
    """The format of grouped integers with 16-bit scales, from `bits` and `group_size`."""
    bits, group = s.choice("bits", allowed_bits), s.group_size("group_size", 128)
    block = (1, WHOLE if group == -1 else group)
    offset = None if symmetric else "zero_point"
    return integer_format(bits, block, offset=offset, scale_dtype="float16")


_GPTQ_HARMLESS = frozenset(
    """quant_method method meta damp_percent damp_auto_increment true_sequential static_groups mse
    model_name_or_path model_file_base_name is_marlin_format pack_dtype act_group_aware backend
    autoround_version data_type enable_quanted_input provider iters lr minmax_lr scale_dtype
    enable_minmax_tuning quantizer tokenizer dataset batch_size block_name_to_quantize version
    to_quant_block_names cache_block_outputs exllama_config max_input_length model_seqlen uri
    module_name_preceding_first_block pad_token_id use_cuda_fp16 use_exllama amp low_gpu_mem_usage
    nsamples seqlen train_bs gradient_accumulate_steps offload_to_disk lm_head_quantized hyb_act
    pack_impl""".split()
)


def parse_gptq(config: Mapping[str, Any], where: str) -> Quantization:
    """`quant_method` "gptq": v1 and v2, 2, 3, 4 and 8 bits, act-order, per-module `dynamic` overrides."""
    s = Settings(config, where, _GPTQ_HARMLESS)
    version = s.choice("format", ("gptq", "gptq_v2"), "gptq")
    version = s.choice("checkpoint_format", ("gptq", "gptq_v2"), version)
    base = {
        "bits": s.get("bits"),
        "group_size": s.group_size("group_size", 128),
        "sym": s.choice("sym", (True, False), True),
        "desc_act": s.choice("desc_act", (True, False), False),
    }

    def group(targets: tuple[str, ...], settings: Mapping[str, Any], name: str) -> Group:
        g = Settings(settings, f"{where}{name}", _GPTQ_HARMLESS)
        codec = GPTQ_V2 if version == "gptq_v2" else GPTQ_V1
        if g.choice("desc_act", (True, False)):  # without the order of its columns it means nothing
            codec = dataclasses.replace(codec, required=(*_TENSORS, "g_idx"), optional=())
        format = integer_spec(g, (2, 3, 4, 8), g.choice("sym", (True, False)))
        g.finish()
        return Group(targets, QuantSpec(format), codec)

    groups = []
    for pattern, override in s.mapping("dynamic").items():
        sign, regex = (pattern[0], pattern[2:]) if pattern[:2] in ("+:", "-:") else ("+", pattern)
        target = prefix_pattern(regex, f"{where}: dynamic")
        if sign == "-":
            groups.append(Group((target,), None, None))
            continue
        if not isinstance(override, Mapping):
            raise ValueError(f"{where}: dynamic.{pattern} must be an object; found {override!r}")
        groups.append(group((target,), {**base, **override}, f": dynamic.{pattern}"))
    targets = _inside_blocks(s.get("modules_in_block_to_quantize", []), where) or ("Linear",)
    head = () if s.choice("lm_head", (True, False), False) else (_HEAD,)
    skipped = map(skip_target, s.strings("modules_to_not_convert"))
    groups.append(group(targets, base, ""))
    s.finish()
    return Quantization("gptq", tuple(groups), (*head, *skipped))


def _inside_blocks(value: Any, where: str) -> tuple[str, ...]:
    """Targets of names, or lists of names that were quantized one after the other."""
    entries = value if isinstance(value, list) else [value]
    names = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: modules_in_block_to_quantize must be names; found {value!r}")
    return tuple(map(part_of_name, names))


def skip_target(entry: str) -> str:
    """AutoAWQ's lists hold substrings of paths; AutoRound adds regular expressions."""
    if any(c in entry for c in REGEX_CHARACTERS):
        return search_pattern(entry, "modules_to_not_convert")
    return substring(entry)


_AWQ_HARMLESS = frozenset(
    """quant_method method backend do_fuse fuse_max_seq_len modules_to_fuse exllama_config provider
    autoround_version data_type sym block_name_to_quantize to_quant_block_names iters desc_act
    lm_head damp_percent enable_quanted_input true_sequential meta pack_dtype""".split()
)


def parse_awq(config: Mapping[str, Any], where: str) -> Quantization:
    """`quant_method` "awq": AutoAWQ's GEMM and GEMV packings, 4 bits."""
    renamed = {"w_bit": "bits", "q_group_size": "group_size", "checkpoint_format": "version",
               "format": "version"}  # fmt: skip
    fields: dict[str, Any] = {}
    for name, value in config.items():
        name = renamed.get(name, name)
        if fields.setdefault(name, value) != value:
            raise ValueError(f"{where}: {name} is stated twice: {fields[name]!r} and {value!r}")
    s = Settings(fields, where, _AWQ_HARMLESS)
    fields["version"] = str(s.get("version", "gemm")).lower()
    codec = {"gemm": AWQ_GEMM, "gemv": AWQ_GEMV}[s.choice("version", ("gemm", "gemv"))]
    format = integer_spec(s, (4,), not s.choice("zero_point", (True, False), True))
    skipped = s.strings("modules_to_not_convert")
    s.finish()
    group = Group(("Linear",), QuantSpec(format), codec)
    return Quantization("awq", (group,), (_HEAD, *map(skip_target, skipped)))
