"""compressed-tensors: every weight format of its config groups, and the KV cache's scheme."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.checkpoint.schemes._base import (
    WIDE,
    Codec,
    Group,
    Parts,
    Quantization,
    Settings,
    Tensors,
    check_shape,
    prefix_pattern,
    scales,
)
from qjax.checkpoint.schemes._bits import (
    from_stream,
    repack_rows,
    signed_zero_points,
    sorted_columns,
    unpack_stream,
    words_as_bytes,
)
from qjax.checkpoint.schemes._floating import (
    FP8_DTYPES,
    MXFP4_CT,
    MXFP8_CT,
    NVFP4_CT,
    block_shape,
    fp8_parts,
    scalar,
)
from qjax.formats import WHOLE, ActivationFormat, QFormat, integer_format, qformat
from qjax.recipe import KVCacheFormat, QuantSpec


def _column_order(tensors: Tensors, format: QFormat, shape: tuple[int, ...]) -> np.ndarray | None:
    if "weight_g_idx" not in tensors:
        return None
    group = format.block_size(shape)[1]
    return sorted_columns(tensors["weight_g_idx"], shape[1], group, "weight_g_idx")


def _packed(tensors: Tensors, format: QFormat, shape: tuple[int, ...]) -> Parts:
    n, k = shape
    bits = format.bits
    stored = tuple(int(x) for x in tensors["weight_shape"]) if "weight_shape" in tensors else shape
    if stored != tuple(shape):
        raise ValueError(f"weight_shape must be {list(shape)}; found {list(stored)}")
    dense, padded = -(-k * bits // 32), -(-k // (32 // bits))
    packed, perm = tensors["weight_packed"], _column_order(tensors, format, shape)
    # Before version 0.18 a word held whole elements only; the two differ in their number of columns.
    legacy = packed.shape == (n, padded) and padded != dense
    if not legacy:
        check_shape(tensors, "weight_packed", (n, dense))
    format.storage_shape(shape)

    def codes(start: int, end: int) -> np.ndarray:
        rows = _codes(packed[start:end], bits, k, legacy)
        return rows if perm is None else rows[:, perm]

    if perm is None and not legacy:
        qvalue = from_stream(words_as_bytes(packed), bits, k)
    else:
        qvalue = repack_rows(codes, (n, k), bits)
    parts = {"qvalue": qvalue, "scale": scales(tensors, "weight_scale", format, shape)}
    if perm is not None:
        parts["column_perm"] = perm
    if "input_scale" in tensors:
        parts["activation_scale"] = scalar(tensors, "input_scale")
    if format.offset is not None:
        zero = tensors["weight_zero_point"]
        if zero.dtype == np.int32:  # packed along the rows
            dense, padded = -(-n * bits // 32), -(-n // (32 // bits))
            groups = format.scale_shape(shape)[1]
            # Where both packings fill as many words, zero points are packed as the weight is.
            legacy = zero.shape == (padded, groups) and (padded != dense or legacy)
            if not legacy:
                check_shape(tensors, "weight_zero_point", (dense, groups))
            unsigned = _codes(zero.T, bits, n, legacy)
            zero = signed_zero_points(np.ascontiguousarray(unsigned.T), bits)
        parts["zero_point"] = _zero_point(zero, format, shape)
    return parts


def _codes(words: np.ndarray, bits: int, count: int, legacy: bool) -> np.ndarray:
    """Unsigned codes uint8 [R, count] of int32 [R, words]."""
    if legacy:
        return _padded_words(np.ascontiguousarray(words), bits, count)
    return unpack_stream(words_as_bytes(words), bits, count)


def _padded_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of words that each hold 32 // bits elements and some unused bits."""
    per_word = 32 // bits
    shifts = (np.arange(per_word) * bits).astype(np.uint32)
    fields = (words.view(np.uint32)[:, :, None] >> shifts) & np.uint32(2**bits - 1)
    return fields.astype(np.uint8).reshape(len(words), -1)[:, :count]


def _zero_point(zero: np.ndarray, format: QFormat, shape: tuple[int, ...]) -> np.ndarray:
    wanted = format.scale_shape(shape)
    if zero.size != int(np.prod(wanted)):
        raise ValueError(
            f"weight_zero_point must have shape {list(wanted)}; found {list(zero.shape)}"
        )
    return zero.astype(format.zero_point_dtype).reshape(wanted)


def _int_plain(tensors: Tensors, format: QFormat, shape: tuple[int, ...]) -> Parts:
    """int8 values whatever the number of bits."""
    weight = check_shape(tensors, "weight", shape)
    if weight.dtype != np.int8:
        raise ValueError(f"weight must be int8; found {weight.dtype}")
    bits, half = format.bits, np.int16(2 ** (format.bits - 1))
    perm = _column_order(tensors, format, shape)

    def codes(start: int, end: int) -> np.ndarray:
        rows = weight[start:end].astype(np.int16) + half
        if rows.size and (rows.min() < 0 or rows.max() >= 2 * half):
            raise ValueError(f"weight holds values outside {bits} bits")
        rows = rows.astype(np.uint8)
        return rows if perm is None else rows[:, perm]

    parts = {"scale": scales(tensors, "weight_scale", format, shape)}
    parts["qvalue"] = (
        weight if bits == 8 and perm is None else repack_rows(codes, (shape[0], shape[1]), bits)
    )
    if perm is not None:
        parts["column_perm"] = perm
    if format.offset is not None:
        parts["zero_point"] = _zero_point(tensors["weight_zero_point"], format, shape)
    if "input_scale" in tensors:
        parts["activation_scale"] = scalar(tensors, "input_scale")
    return parts


_EXTRA = ("weight_zero_point", "weight_g_idx", "input_scale")
_DTYPES = {"weight_scale": WIDE, "weight_g_idx": ("I32", "I64"), "input_scale": WIDE}
PACKED = Codec(
    "pack-quantized",
    ("weight_packed", "weight_scale"),
    "weight_scale",
    _packed,
    optional=("weight_shape", *_EXTRA),
    accepted=("input_zero_point",),
    dtypes=_DTYPES
    | {
        "weight_packed": ("I32",),
        "weight_shape": ("I64", "I32"),
        "weight_zero_point": ("I32", "I8"),
    },
)
INT = Codec(
    "int-quantized",
    ("weight", "weight_scale"),
    "weight_scale",
    _int_plain,
    optional=_EXTRA,
    accepted=("input_zero_point",),
    dtypes=_DTYPES | {"weight": ("I8",), "weight_zero_point": ("I8",)},
)
FLOAT = Codec(
    "float-quantized",
    ("weight", "weight_scale"),
    "weight_scale",
    fp8_parts("weight_scale", "input_scale"),
    optional=("input_scale",),
    accepted=("input_zero_point", "weight_zero_point"),
    dtypes=FP8_DTYPES,
)
_ARGS_HARMLESS = frozenset({"observer", "observer_kwargs", "zp_dtype", "scale_dtype", "actorder"})
_HARMLESS = frozenset(
    {"quant_method", "quantization_status", "version", "global_compression_ratio",
     "moe_sparsity_config", "run_compressed", "producer", "compression_ratio"}
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    """One side's QuantizationArgs: a grid, and whether its scales are stored."""

    format: QFormat
    dynamic: bool | str


def _args(config: Mapping[str, Any], where: str, codec: Any) -> Args:
    """Weights [N, K] and activations [tokens, K] alike: the strategy names the blocks."""
    s = Settings(config, where, _ARGS_HARMLESS)
    bits = s.choice("num_bits", tuple(range(2, 9)), 8)
    kind = s.choice("type", ("int", "float"), "int")
    symmetric = s.choice("symmetric", (True, False), True)
    dynamic = s.choice("dynamic", (True, False, "local"), False)
    group = s.get("group_size")
    default = "tensor" if group is None else "channel" if group == -1 else "group"
    strategies = ("tensor", "channel", "group", "block", "token", "tensor_group")
    strategy = s.choice("strategy", strategies, default)
    structure = s.get("block_structure")
    s.finish()
    if strategy in ("group", "tensor_group"):
        group = Settings(config, where, frozenset()).group_size("group_size")
        block = (1, WHOLE if group == -1 else group)
    elif strategy == "block":
        if isinstance(structure, str):
            structure = [int(x) if x.isdecimal() else x for x in structure.split("x")]
        block = block_shape(structure, f"{where}: block_structure")
    else:
        block = (WHOLE, WHOLE) if strategy == "tensor" else (1, WHOLE)
    if kind == "int":
        offset = None if symmetric else "zero_point"
        return Args(integer_format(bits, block, offset=offset), dynamic)
    if not symmetric or bits not in (4, 8):
        raise ValueError(f"{where}: {bits}-bit floats, symmetric={symmetric} are not supported")
    if bits == 4:
        names = {(1, 16): "nvfp4", (1, 32): "mxfp4"}
        if block not in names:
            raise ValueError(f"{where}: 4-bit floats in blocks of {block} are not supported")
        return Args(qformat(names[block]), dynamic)
    if block == (1, 32) and (codec == MXFP8_CT.name or "uint8" in str(config.get("scale_dtype"))):
        return Args(qformat("mxfp8"), dynamic)
    return Args(QFormat("float8_e4m3fn", block), dynamic)


def _weights(config: Any, where: str, codec: Any) -> QFormat:
    args = _args(config, where, codec)
    if args.dynamic:
        raise ValueError(f"{where}: dynamic = {args.dynamic!r}: weights must have stored scales")
    return args.format


def _activations(config: Any, where: str, codec: Any) -> ActivationFormat | None:
    if config is None:
        return None
    args = _args(config, where, codec)
    format, static = args.format, args.dynamic is not True
    whole = format.block_shape == (WHOLE, WHOLE) or format.global_scale
    if static and not whole:
        raise ValueError(
            f"{where}: dynamic = false needs strategy 'tensor': a stored scale covers the whole input"
        )
    if args.dynamic == "local" and not format.global_scale:
        raise ValueError(f"{where}: dynamic = 'local' is for 4-bit floats in groups of 16")
    if static and format.offset is not None:
        raise ValueError(f"{where}: symmetric = false with stored scales is not supported")
    # "local": scales per group at run time below a stored global scale.
    return ActivationFormat(format, static=static)


def _codec(name: Any, format: QFormat, where: str) -> Codec:
    """The codec that a group's format names, or that its grid has by default."""
    if format.global_scale:
        fitting = (NVFP4_CT,)
    elif format.element == "float4_e2m1fn":
        fitting = (MXFP4_CT,)
    elif format.scale_rule == "mx":
        fitting = (MXFP8_CT,)
    elif format.spec.is_float:
        fitting = (FLOAT,)
    else:
        fitting = (INT, PACKED) if format.bits == 8 or name == "naive-quantized" else (PACKED, INT)
    if name in (None, "dense", "mixed-precision", "naive-quantized"):
        return fitting[0]
    names = [codec.name for codec in fitting]
    if name not in names:
        raise ValueError(
            f"{where}: format = {name!r} is not supported for {format.element} in blocks of "
            f"{format.block_shape}; supported: {names}"
        )
    return fitting[names.index(name)]


def _target(target: str, where: str) -> str:
    """compressed-tensors matches patterns at a path's beginning and class names exactly."""
    return prefix_pattern(target[3:], where) if target.startswith("re:") else target


def parse_compressed_tensors(config: Mapping[str, Any], where: str) -> Quantization:
    """`quant_method` "compressed-tensors"."""
    s = Settings(config, where, _HARMLESS)
    default = s.get("format")
    if s.mapping("sparsity_config").get("format", "dense") != "dense":
        raise ValueError(f"{where}: sparsity_config: sparse weights are not supported")
    if any(s.mapping("transform_config").values()):
        raise ValueError(f"{where}: transform_config: transforms are not supported")
    groups = tuple(
        _group(group, f"{where}: config_groups.{name}", default)
        for name, group in s.mapping("config_groups").items()
    )
    ignore = tuple(_target(t, where) for t in s.strings("ignore"))
    cache = _kv_cache(s.get("kv_cache_scheme"), where)
    s.finish()
    return Quantization("compressed-tensors", groups, ignore, cache)


def _group(config: Any, where: str, default_format: Any) -> Group:
    s = Settings(config, where, frozenset())
    targets = tuple(_target(t, where) for t in s.strings("targets"))
    weights, inputs = s.get("weights"), s.get("input_activations")
    codec = s.get("format", default_format)
    if s.get("output_activations") is not None:
        raise ValueError(f"{where}: output_activations are not supported")
    s.finish()
    if not targets or weights is None:
        raise ValueError(f"{where}: needs targets and weights: quantized inputs alone don't load")
    format = _weights(weights, f"{where}.weights", codec)
    act = _activations(inputs, f"{where}.input_activations", codec)
    return Group(targets, QuantSpec(format, act), _codec(codec, format, where))


def _kv_cache(scheme: Any, where: str) -> KVCacheFormat | None:
    if scheme is None:
        return None
    here = f"{where}: kv_cache_scheme"
    s = Settings(scheme, here, _ARGS_HARMLESS)
    bits = s.choice("num_bits", (4, 8), 8)
    s.choice("type", ("float",))
    s.choice("symmetric", (True,), True)
    s.choice("dynamic", (False,), False)
    strategy = s.choice("strategy", ("tensor", "attn_head", "tensor_group"), "tensor")
    for name in ("group_size", "block_structure"):
        s.get(name)
    s.finish()
    if bits == 4:
        return KVCacheFormat("nvfp4")
    return KVCacheFormat("float8_e4m3fn", "head" if strategy == "attn_head" else "tensor")
