"""Quantization as `quantization_config` states it: compressed-tensors' groups, and lists of module names.

compressed-tensors: config_groups.{g}.{targets, weights, input_activations, format}; an exact name goes
before a pattern, a pattern before a class word, which the order of our groups repeats.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from qjax.formats import WHOLE, ActivationFormat, QFormat
from qjax.recipe import KVCacheFormat, QuantSpec


def compress_targets(paths: Iterable[str], others: Iterable[str]) -> list[str]:
    """Few targets that name these modules and no others: ``re:`` patterns over layers and experts.

    Args:
        paths: Modules to name.
        others: Modules that no target may match.
    """
    left, others = set(paths), set(others)
    targets: list[str] = []
    # First any layer and any expert, then any expert of one layer; what remains is named exactly.
    for generalize in (_any_number, _any_last_number):
        taken = {generalize(path) for path in others}
        groups = defaultdict(set)
        for path in left:
            groups[generalize(path)].add(path)
        for pattern, members in groups.items():
            if pattern not in taken and len(members) > 1:
                targets.append(f"re:{pattern}$")
                left -= members
    return sorted(targets) + sorted(left)


def _any_number(path: str) -> str:
    return r"\.".join(r"\d+" if p.isdigit() else re.escape(p) for p in path.split("."))


def _any_last_number(path: str) -> str:
    parts = path.split(".")
    last = max((i for i, p in enumerate(parts) if p.isdigit()), default=-1)
    return r"\.".join(r"\d+" if i == last else re.escape(p) for i, p in enumerate(parts))


def packing(spec: QuantSpec, path: str) -> str:
    """compressed-tensors' word for how a weight of this spec is stored.

    Raises:
        ValueError: If no compressed-tensors format holds the spec.
    """
    format = spec.weights
    assert format is not None
    name = format.element

    def refuse(what: str, fix: str):
        raise ValueError(f"export: {path}: compressed-tensors has no {what}; {fix}")

    if format.offset == "minimum":
        refuse(
            "minimum per group (GGUF's Q4_1), only integer zero points",
            "requantize to a zero-point format such as int4_1x32_asym, or export 'bf16'",
        )
    if name == "float4_e2m1fn":
        if format.global_scale and format.scale_dtype == "float8_e4m3fn":
            if format.block_shape == (1, 16):
                return "nvfp4-pack-quantized"
        elif format.scale_dtype == "float8_e8m0fnu" and format.block_shape == (1, 32):
            return "mxfp4-pack-quantized"
        refuse(f"4-bit float storage like {format}", "requantize to nvfp4 or mxfp4")
    if format.global_scale or format.scale_dtype == "float8_e4m3fn":
        refuse(f"two-level scales for {name}", "requantize")
    if name == "float8_e5m2":
        refuse("float8_e5m2 weights", "requantize to float8_e4m3fn")
    if name == "float8_e4m3fn":
        mx = format.scale_dtype == "float8_e8m0fnu" and format.block_shape == (1, 32)
        return "mxfp8-quantized" if mx else "float-quantized"
    if format.scale_dtype == "float8_e8m0fnu":
        refuse("power-of-two scales for integers", "requantize with bfloat16 scales")
    if format.block_shape[0] != 1 and format.block_shape != (WHOLE, WHOLE):
        refuse(f"integer blocks of {format.block_shape}", "requantize by group or channel")
    activations = spec.activations
    integer = activations is not None and not activations.format.spec.is_float
    return "int-quantized" if integer else "pack-quantized"


def weight_args(format: QFormat, *, permuted: bool = False) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs of a weight."""
    args = _args(format, whole_rows="channel")
    return {
        **args,
        "dynamic": False,
        "actorder": "group" if permuted else None,
        "observer": "minmax",
    }


def activation_args(activations: ActivationFormat, path: str) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs of a layer's input.

    Raises:
        ValueError: If they cannot say it.
    """
    if activations.amax_max is not None:
        raise ValueError(
            f"export: {path}: compressed-tensors has no upper bound of activations "
            f"({activations.amax_max}); use format='fbgemm_fp8'"
        )
    args = _args(activations.format, whole_rows="token")
    if activations.static:
        # NVFP4's global scale is stored, its group scales are computed: "local".
        dynamic: bool | str = "local" if activations.format.global_scale else False
    else:
        dynamic = True
    observer = "static_minmax" if activations.static else None
    return {**args, "dynamic": dynamic, "actorder": None, "observer": observer}


def _args(format: QFormat, whole_rows: str) -> dict[str, Any]:
    rows, columns = format.block_shape
    group_size, block_structure = None, None
    if (rows, columns) == (WHOLE, WHOLE):
        strategy = "tensor"
    elif (rows, columns) == (1, WHOLE):
        strategy = whole_rows
    elif rows == 1:
        strategy, group_size = "tensor_group" if format.global_scale else "group", columns
    else:
        strategy, block_structure = "block", [rows, columns]
    stored = {"float8_e4m3fn": "torch.float8_e4m3fn"}.get(format.scale_dtype)
    if format.scale_dtype == "float8_e8m0fnu" and group_size == 32:
        stored = "torch.uint8"
    return {
        "num_bits": format.bits,
        "type": "float" if format.spec.is_float else "int",
        "symmetric": format.offset is None,
        "strategy": strategy,
        "group_size": group_size,
        "block_structure": block_structure,
        "scale_dtype": stored,
    }


def kv_cache_args(cache: KVCacheFormat) -> dict[str, Any]:
    """compressed-tensors' kv_cache_scheme.

    Raises:
        ValueError: If it cannot say it.
    """
    if cache.element != "float8_e4m3fn" or cache.scale == "token_head":
        raise ValueError(
            f"export: compressed-tensors' kv_cache_scheme holds fp8_e4m3 with a scale per tensor or head, "
            f"not {cache.element} per {cache.scale}; choose the cache when loading instead"
        )
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "attn_head" if cache.scale == "head" else "tensor",
        "dynamic": False,
    }


def compressed_tensors_config(
    specs: Mapping[str, QuantSpec],
    kinds: Mapping[str, str],
    permuted: Iterable[str],
    kv_cache: KVCacheFormat | None,
) -> dict[str, Any]:
    """The quantization_config of a model.

    Args:
        specs: {path: quantization} of the quantized modules.
        kinds: {path: class word} of all modules that other loaders may take for linear layers.
        permuted: Paths whose columns are stored in another order (act-order).
        kv_cache: Storage of the KV cache.

    Raises:
        ValueError: If a module's quantization has no compressed-tensors form.
    """
    permuted = set(permuted)
    groups: dict[tuple[QuantSpec, bool], list[str]] = defaultdict(list)
    for path, spec in specs.items():
        groups[spec, path in permuted].append(path)
    ordered = sorted(groups.items(), key=lambda item: len(item[1]))
    config_groups, words = {}, []
    for i, ((spec, acts), paths) in enumerate(ordered):
        word = packing(spec, paths[0])
        words.append(word)
        targets = compress_targets(paths, kinds.keys() - paths)
        if i == len(ordered) - 1 and any(kinds[p] == "Linear" for p in paths):
            rest = [p for p in paths if kinds[p] != "Linear"]
            targets = ["Linear", *compress_targets(rest, kinds.keys() - rest)]
        assert spec.weights is not None
        config_groups[f"group_{i}"] = {
            "targets": targets,
            "weights": weight_args(spec.weights, permuted=acts),
            "input_activations": None
            if spec.activations is None
            else activation_args(spec.activations, paths[0]),
            "output_activations": None,
            "format": word,
        }
    ignored = [p for p, kind in kinds.items() if kind == "Linear" and p not in specs]
    distinct = set(words)
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(distinct) > 1 else words[0] if words else "dense",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": compress_targets(ignored, specs),
        "kv_cache_scheme": None if kv_cache is None else kv_cache_args(kv_cache),
        "global_compression_ratio": None,
    }
