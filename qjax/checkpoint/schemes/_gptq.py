"""GPTQ (v1 and v2), AWQ (GEMM and GEMV) and AutoRound."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.checkpoint.schemes._base import (
    Codec,
    Group,
    Parts,
    Quantization,
    Settings,
    Tensors,
    check_shape,
    part_of_name,
    prefix_pattern,
    substring,
)
from qjax.checkpoint.schemes._bits import (
    repack_rows,
    signed_zero_points,
    sorted_columns,
    unpack_stream,
)
from qjax.checkpoint.schemes._floating import FP8_BLOCK, block_activations, block_shape
from qjax.formats import WHOLE, ActivationFormat, QFormat, integer_format, qformat
from qjax.recipe import QuantSpec

_HEAD = part_of_name("lm_head")
_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Nibble of an AWQ word that holds each of its eight columns."""


def _words(tensor: np.ndarray) -> np.ndarray:
    """Rows of 32-bit words as rows of bytes, lowest first."""
    return np.ascontiguousarray(tensor).view(np.uint8).reshape(tensor.shape[0], -1)


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
        if k * bits % 32 or n * bits % 32:
            raise ValueError(f"qweight: GPTQ packs whole words; found a weight {list(shape)}")
        groups = k // group
        qweight = check_shape(tensors, "qweight", (k * bits // 32, n))
        qzeros = check_shape(tensors, "qzeros", (groups, n * bits // 32))
        scale = check_shape(tensors, "scales", (groups, n))
        perm = None
        if "g_idx" in tensors:
            perm = sorted_columns(tensors["g_idx"], k, group, "g_idx")

        def codes(start: int, end: int) -> np.ndarray:
            rows = unpack_stream(_words(qweight[:, start:end].T), bits, k)
            return rows if perm is None else rows[:, perm]

        parts = {
            "qvalue": repack_rows(codes, (n, k), bits),
            "scale": np.ascontiguousarray(scale.T),
        }
        if perm is not None:
            parts["column_perm"] = perm
        # Asymmetric v1 stores 2**bits for a zero of 0 minus 1: added after unpacking, it comes out right.
        zero = unpack_stream(_words(qzeros), bits, n).astype(np.int16).T + np.int16(added)
        return _zeros(parts, np.ascontiguousarray(zero), format)

    return decode


def _awq_gemm(tensors: Tensors, format: QFormat, shape: tuple[int, ...]) -> Parts:
    n, k = shape
    groups = k // format.block_size(shape)[1]
    qweight = check_shape(tensors, "qweight", (k, n // 8))
    qzeros = check_shape(tensors, "qzeros", (groups, n // 8))
    scale = check_shape(tensors, "scales", (groups, n))

    def columns(words: np.ndarray) -> np.ndarray:
        nibbles = unpack_stream(_words(words), 4, words.shape[1] * 8)
        return nibbles.reshape(len(words), -1, 8)[:, :, _AWQ_ORDER].reshape(len(words), -1)

    def codes(start: int, end: int) -> np.ndarray:
        return np.ascontiguousarray(columns(qweight[:, start // 8 : end // 8]).T)

    parts = {
        "qvalue": repack_rows(codes, (n, k), 4),
        "scale": np.ascontiguousarray(scale.T),
    }
    return _zeros(parts, np.ascontiguousarray(columns(qzeros).T), format)


def _awq_gemv(tensors: Tensors, format: QFormat, shape: tuple[int, ...]) -> Parts:
    n, k = shape
    group = format.block_size(shape)[1]
    groups = k // group
    multiple = {128: 1, 64: 2, 32: 4}.get(group)
    if multiple is None:
        raise ValueError(f"AWQ's gemv version has groups of 32, 64 or 128; found {group}")
    words = -(-groups // (8 * multiple)) * multiple
    qweight = check_shape(tensors, "qweight", (n, k // 8))
    qzeros = check_shape(tensors, "qzeros", (n, words))
    scale = check_shape(tensors, "scales", (n, words * 8))
    parts = {
        "qvalue": repack_rows(
            lambda start, end: unpack_stream(_words(qweight[start:end]), 4, k), (n, k), 4
        ),
        "scale": np.ascontiguousarray(scale[:, :groups]),
    }
    return _zeros(parts, unpack_stream(_words(qzeros), 4, groups), format)


_GPTQ_TENSORS = ("qweight", "qzeros", "scales")
GPTQ_V1 = Codec("gptq", _GPTQ_TENSORS, "scales", _gptq(1), optional=("g_idx",))
GPTQ_V2 = Codec("gptq_v2", _GPTQ_TENSORS, "scales", _gptq(0), optional=("g_idx",))
AWQ_GEMM = Codec("awq gemm", _GPTQ_TENSORS, "scales", _awq_gemm)
AWQ_GEMV = Codec("awq gemv", _GPTQ_TENSORS, "scales", _awq_gemv)


def _format(bits: Any, group: int, symmetric: bool, where: str, allowed: tuple) -> QFormat:
    if bits not in allowed or isinstance(bits, bool):
        raise ValueError(f"{where}: bits = {bits!r} is not supported; supported: {list(allowed)}")
    block = (1, WHOLE if group == -1 else group)
    return integer_format(
        bits, block, offset=None if symmetric else "zero_point", scale_dtype="float16"
    )


_GPTQ_HARMLESS = frozenset(
    """quant_method method meta damp_percent damp_auto_increment true_sequential static_groups model_name_or_path
    model_file_base_name is_marlin_format pack_dtype desc_act act_group_aware autoround_version data_type
    enable_quanted_input provider iters lr minmax_lr enable_minmax_tuning enable_quanted_input scale_dtype mse
    quantizer tokenizer dataset batch_size block_name_to_quantize cache_block_outputs exllama_config max_input_length
    model_seqlen module_name_preceding_first_block pad_token_id use_cuda_fp16 use_exllama backend version
    amp low_gpu_mem_usage nsamples seqlen train_bs gradient_accumulate_steps super_bits super_group_size
    act_bits act_data_type act_dynamic act_group_size act_sym modules_to_not_convert offload_to_disk
    to_quant_block_names hyb_act adapter checkpoint_format format lm_head uri lm_head_quantized""".split()
)


def parse_gptq(config: Mapping[str, Any], where: str) -> Quantization:
    """`quant_method` "gptq": v1 and v2, 2, 3, 4 and 8 bits, act-order, per-module `dynamic` overrides."""
    s = Settings(config, where, _GPTQ_HARMLESS)
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"{where}: checkpoint_format = {version!r} is not supported; supported: 'gptq', 'gptq_v2'"
        )
    codec = GPTQ_V2 if version == "gptq_v2" else GPTQ_V1
    base = {
        "bits": s.get("bits"),
        "group_size": s.group_size("group_size", 128),
        "sym": s.choice("sym", (True, False), True),
    }

    def group(targets: tuple[str, ...], settings: Mapping[str, Any]) -> Group:
        f = _format(settings["bits"], settings["group_size"], settings["sym"], where, (2, 3, 4, 8))
        return Group(targets, QuantSpec(f), codec)

    groups = []
    for pattern, override in (s.get("dynamic") or {}).items():
        sign, regex = (pattern[0], pattern[2:]) if pattern[:2] in ("+:", "-:") else ("+", pattern)
        target = prefix_pattern(regex, where)
        if sign == "-":
            groups.append(Group((target,), None, None))
        else:
            groups.append(group((target,), {**base, **override}))
    inside = s.get("modules_in_block_to_quantize")
    targets = ("Linear",)
    if inside is not None:
        names = [n for entry in inside for n in ([entry] if isinstance(entry, str) else entry)]
        targets = tuple(part_of_name(n) for n in names)
    head = () if config.get("lm_head") else (_HEAD,)
    s.finish()
    skipped = map(substring, config.get("modules_to_not_convert") or ())
    return Quantization("gptq", (*groups, group(targets, base)), (*head, *skipped))


def parse_awq(config: Mapping[str, Any], where: str) -> Quantization:
    """`quant_method` "awq": AutoAWQ's GEMM and GEMV packings, 4 bits."""
    harmless = {"quant_method", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse",
                "exllama_config", "provider", "autoround_version", "data_type", "sym",
                "block_name_to_quantize", "to_quant_block_names", "iters", "desc_act", "lm_head",
                "damp_percent", "enable_quanted_input", "true_sequential"}  # fmt: skip
    s = Settings(config, where, frozenset(harmless))
    bits = s.get("bits", s.get("w_bit"))
    group = s.group_size("group_size", config.get("q_group_size", 128))
    s.get("q_group_size")
    version = str(s.get("version", "gemm")).lower()
    if version not in ("gemm", "gemv"):
        raise ValueError(
            f"{where}: version = {version!r} is not supported; supported: 'gemm', 'gemv'"
        )
    zero_point = s.choice("zero_point", (True, False), True)
    skipped = s.strings("modules_to_not_convert")
    s.finish()
    spec = QuantSpec(_format(bits, group, not zero_point, where, (4,)))
    codec = AWQ_GEMV if version == "gemv" else AWQ_GEMM
    return Quantization(
        "awq", (Group(("Linear",), spec, codec),), (_HEAD, *map(substring, skipped))
    )


def parse_auto_round(config: Mapping[str, Any], where: str) -> Quantization:
    """`quant_method` "auto-round": AutoGPTQ, AutoAWQ and FP8 packings, mixed bits, INT8 activations."""
    from qjax.checkpoint.schemes._compressed_tensors import auto_round_codec

    s = Settings(config, where, _GPTQ_HARMLESS)
    packing = str(s.get("packing_format", s.get("backend", "auto_round:auto_gptq")))
    packing = packing.removeprefix("auto_round:").removeprefix("auto-round:")
    extra = s.get("extra_config", {})
    head = () if config.get("lm_head") or "lm_head" in extra else (_HEAD,)
    if packing == "fp8" and config.get("weight_block_size"):
        shape = block_shape(config["weight_block_size"], where)
        spec = QuantSpec(QFormat("float8_e4m3fn", shape), block_activations(False))
        return Quantization("auto-round", (Group(("Linear",), spec, FP8_BLOCK),), head)
    if packing in ("llm_compressor", "fp8"):
        return auto_round_codec(config, where, head)
    codecs = {"auto_gptq": GPTQ_V1, "gptq": GPTQ_V1, "auto_awq": AWQ_GEMM, "awq": AWQ_GEMM}
    if packing not in codecs:
        raise ValueError(
            f"{where}: packing_format = {packing!r} is not supported; supported: {sorted(codecs)}, "
            "'fp8', 'llm_compressor'"
        )
    codec = codecs[packing]
    base = {
        "bits": s.get("bits"),
        "group_size": s.group_size("group_size", 128),
        "sym": s.choice("sym", (True, False), True),
        "act_bits": config.get("act_bits", 16),
    }
    s.finish()

    def group(targets: tuple[str, ...], settings: Mapping[str, Any]) -> Group:
        if settings["bits"] >= 16:
            return Group(targets, None, None)
        allowed = (4,) if codec is AWQ_GEMM else (2, 3, 4, 8)
        f = _format(settings["bits"], settings["group_size"], settings["sym"], where, allowed)
        if settings["act_bits"] not in (8, 16):
            raise ValueError(f"{where}: act_bits = {settings['act_bits']!r} is not supported")
        act = ActivationFormat(qformat("int8_channel")) if settings["act_bits"] == 8 else None
        return Group(targets, QuantSpec(f, act), codec)

    groups = []
    for name, override in extra.items():
        settings = {**base, **{k: v for k, v in override.items() if k in base}}
        plain = not any(c in name for c in "*^$+?[]()|\\")
        targets = (name,) if plain else (prefix_pattern(f".*{name}", where),)
        groups.append(group(targets, settings))
    return Quantization("auto-round", (*groups, group(("Linear",), base)), head)
