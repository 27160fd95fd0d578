"""The formats that models are exported in: what each can hold, its config, its tensors."""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from qjax.checkpoint import _encode
from qjax.checkpoint._export_config import (
    compress_targets,
    compressed_tensors_config,
    kv_cache_args,
    packing,
)
from qjax.checkpoint._model_tensors import Layer
from qjax.formats import WHOLE, QFormat, qformat
from qjax.qarray import QArray
from qjax.recipe import KVCacheFormat, QuantSpec

NVFP4, FP8_TENSOR = qformat("nvfp4"), qformat("fp8_e4m3_tensor")

Encode = Callable[[QArray], _encode.Tensors]


@dataclasses.dataclass(frozen=True)
class Export:
    """How one model is written in one format.

    Attributes:
        config: The quantization_config, None for plain weights.
        encoders: {module path: encoder} of the quantized layers; the others are written plain.
        dtype: Dtype of the plain tensors, None to keep the model's.
        scale_divides: Whether NVFP4's global activation scales are stored as divisors.
        vector_scales: Whether per-tensor activation scales have shape [1] instead of [].
    """

    config: dict[str, Any] | None
    encoders: Mapping[str, Encode]
    dtype: str | None = None
    scale_divides: bool = False
    vector_scales: bool = True


Planner = Callable[[Mapping[str, Layer], Mapping[str, str], KVCacheFormat | None], Export]


def _quantized(layers: Mapping[str, Layer], format: str) -> dict[str, Layer]:
    found = {path: layer for path, layer in layers.items() if layer.spec.weights is not None}
    if not found:
        raise ValueError(
            f"export: format {format!r} is for quantized models and no module of this one is quantized; "
            "use 'bf16', 'f16' or 'f32', or quantize first"
        )
    return found


def _refuse(layer: Layer, format: str, needs: str, fix: str):
    raise ValueError(
        f"export: {layer.path}: format {format!r} needs {needs}; found {layer.spec}; {fix}"
    )


def _specs(layers: Mapping[str, Layer]) -> dict[str, QuantSpec]:
    return {name: layer.spec for layer in layers.values() for name in layer.names}


def _plain_names(layers: Mapping[str, Layer], words: Mapping[str, str]) -> list[str]:
    """Checkpoint names of the linear layers that are not quantized."""
    quantized = _specs({p: x for p, x in layers.items() if x.spec.weights is not None})
    return [name for name, word in words.items() if word == "Linear" and name not in quantized]


def _compressed_tensors(layers, words, kv_cache) -> Export:
    quantized = {p: x for p, x in layers.items() if x.spec.weights is not None}
    if not quantized and kv_cache is None:
        _quantized(layers, "compressed-tensors")
    for layer in quantized.values():
        if layer.stacked:
            _refuse(
                layer,
                "compressed-tensors",
                "one tensor per expert",
                "export 'mxfp4' if the experts are MXFP4, else 'bf16'",
            )
    encode = {
        "pack-quantized": _encode.pack_quantized,
        "int-quantized": _encode.int_quantized,
        "float-quantized": _encode.float_quantized,
        "nvfp4-pack-quantized": _encode.nvfp4_pack_quantized,
        "mxfp4-pack-quantized": _encode.mxfp4_pack_quantized,
        "mxfp8-quantized": _encode.mxfp8_quantized,
    }
    return Export(
        compressed_tensors_config(
            _specs(quantized),
            words,
            [name for layer in quantized.values() if layer.permuted for name in layer.names],
            kv_cache,
        ),
        {path: encode[packing(layer.spec, path)] for path, layer in quantized.items()},
        scale_divides=True,
    )


def _one_spec(quantized: Mapping[str, Layer], format: str) -> QuantSpec:
    first = next(iter(quantized.values()))
    for layer in quantized.values():
        if layer.spec != first.spec:
            _refuse(
                layer, format, f"one quantization, as {first.path} has", "use compressed-tensors"
            )
    return first.spec


def _fp8(layers, words, kv_cache) -> Export:
    del kv_cache
    quantized = _quantized(layers, "fp8")
    fix = "requantize to FP8_BLOCK or FP8, or export 'compressed-tensors'"
    for layer in quantized.values():
        format, activations = layer.format, layer.spec.activations
        blocks = format.block_shape == (128, 128)
        if (
            format.element != "float8_e4m3fn"
            or layer.stacked
            or not (blocks or format.block_shape == (WHOLE, WHOLE))
        ):
            _refuse(layer, "fp8", "float8_e4m3fn in 128x128 blocks or per tensor", fix)
        if activations is None or activations.format.element != "float8_e4m3fn":
            _refuse(layer, "fp8", "float8_e4m3fn activations", fix)
        else:
            per_tensor = (WHOLE, WHOLE) if activations.static else (1, WHOLE)
            if activations.format.block_shape != ((1, 128) if blocks else per_tensor):
                needs = "activations 1x128 with blocks, else per tensor if static, per token if not"
                _refuse(layer, "fp8", needs, fix)
    spec = _one_spec(quantized, "fp8")
    assert spec.weights is not None and spec.activations is not None
    config: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "static" if spec.activations.static else "dynamic",
    }
    if spec.weights.block_shape == (128, 128):
        config["weight_block_size"] = [128, 128]
    if spec.activations.format.scale_dtype == "float8_e8m0fnu":
        config["scale_fmt"] = "ue8m0"
    config["modules_to_not_convert"] = _plain_names(layers, words)
    return Export(config, dict.fromkeys(quantized, _encode.fp8), vector_scales=False)


def _fbgemm_fp8(layers, words, kv_cache) -> Export:
    del kv_cache
    quantized = _quantized(layers, "fbgemm_fp8")
    spec = _one_spec(quantized, "fbgemm_fp8")
    format, activations = spec.weights, spec.activations
    assert format is not None
    if format.element != "float8_e4m3fn" or format.block_shape != (1, WHOLE) or activations is None:
        fix = "export 'compressed-tensors'"
        _refuse(next(iter(quantized.values())), "fbgemm_fp8", "fp8 rows and fp8 tokens", fix)
    assert activations is not None
    config = {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": activations.amax_max,
        "modules_to_not_convert": _plain_names(layers, words),
    }
    return Export(config, dict.fromkeys(quantized, _encode.fbgemm_fp8))


def _modelopt(layers, words, kv_cache) -> Export:
    quantized = _quantized(layers, "modelopt")
    spec = _one_spec(quantized, "modelopt")
    first, activations = next(iter(quantized.values())), spec.activations
    nvfp4 = first.format == NVFP4
    per_tensor = first.format == FP8_TENSOR
    if activations is None or not activations.static or not (nvfp4 or per_tensor) or first.stacked:
        fix = "export 'compressed-tensors'"
        _refuse(first, "modelopt", "NVFP4 or per-tensor fp8 with static activation scales", fix)
    args: dict[str, Any] = {"dynamic": False, "num_bits": first.format.bits, "type": "float"}
    args |= {"group_size": 16} if nvfp4 else {}
    config: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4" if nvfp4 else "FP8",
        "config_groups": {
            "group_0": {"input_activations": args, "weights": args, "targets": ["Linear"]}
        },
        "ignore": _plain_names(layers, words),
        "producer": {"name": "modelopt"},
    }
    if kv_cache is not None:
        config["kv_cache_scheme"] = {
            k: v for k, v in kv_cache_args(kv_cache).items() if k in ("dynamic", "num_bits", "type")
        }
    encode = _encode.modelopt_nvfp4 if nvfp4 else _encode.modelopt_fp8
    return Export(config, dict.fromkeys(quantized, encode), vector_scales=False)


def _check_weight_only(layer: Layer, format: str, bits: tuple[int, ...]) -> None:
    """GPTQ and AWQ: grouped integers with 16-bit scales, 32-bit words along both axes."""
    f, shape = layer.format, layer.value.shape
    fix = "requantize, or export 'compressed-tensors'"
    grouped = f.block_shape[0] == 1
    if (
        f.spec.is_float
        or f.bits not in bits
        or not grouped
        or f.offset == "minimum"
        or layer.stacked
    ):
        _refuse(
            layer, format, f"{bits}-bit integers with zero points or none, in groups along K", fix
        )
    if layer.spec.activations is not None:
        _refuse(layer, format, "unquantized activations, which it cannot describe,", fix)
    if f.scale_dtype not in ("float16", "bfloat16"):
        _refuse(layer, format, "float16 or bfloat16 scales", fix)
    if any(size * f.bits % 32 for size in shape[-2:]):
        _refuse(layer, format, f"rows and columns that fill 32-bit words (here {shape})", fix)


def _group_size(format: QFormat) -> int:
    return -1 if format.block_shape[1] == WHOLE else format.block_shape[1]


def _gptq(layers, words, kv_cache) -> Export:
    del kv_cache
    quantized = _quantized(layers, "gptq")
    for layer in quantized.values():
        _check_weight_only(layer, "gptq", (2, 3, 4, 8))
        if layer.kind != "Linear" or layer.path == "lm_head":
            fix = "leave it out of the recipe, or export 'compressed-tensors'"
            _refuse(layer, "gptq", "an unquantized embedding and head", fix)
    version = _gptq_version(quantized)
    fields = {}
    for path, layer in quantized.items():
        f = layer.format
        fields[path] = (f.bits, _group_size(f), f.offset is None, layer.permuted)
    (bits, group_size, sym, desc_act), _ = Counter(fields.values()).most_common(1)[0]
    names = set(_specs(quantized))
    dynamic: dict[str, dict[str, Any]] = {}
    for values in sorted(set(fields.values()) - {(bits, group_size, sym, desc_act)}):
        mine = {name for p, v in fields.items() if v == values for name in layers[p].names}
        own: dict[str, Any] = dict(
            zip(("bits", "group_size", "sym", "desc_act"), values, strict=True)
        )
        for target in compress_targets(mine, words.keys() - mine):
            dynamic[f"+:{_pattern(target)}"] = own
    plain = [name for name in _plain_names(layers, words) if name != "lm_head"]
    for target in compress_targets(plain, names):
        dynamic[f"-:{_pattern(target)}"] = {}
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": desc_act,
        "lm_head": False,
        "checkpoint_format": version,
        "true_sequential": True,
    }
    if dynamic:
        config["dynamic"] = dynamic
    encode = functools.partial(_encode.gptq, version=version)
    return Export(config, dict.fromkeys(quantized, encode))


def _pattern(target: str) -> str:
    return target.removeprefix("re:") if target.startswith("re:") else re.escape(target) + "$"


def _gptq_version(quantized: Mapping[str, Layer]) -> str:
    """v1, which every loader reads, unless an unsigned zero point is 0: v1 stores one less."""
    for layer in quantized.values():
        zero = layer.value.zero_point
        if zero is not None and int(zero.min()) <= -(2 ** (layer.value.format.bits - 1)):
            return "gptq_v2"
    return "gptq"


def _awq(layers, words, kv_cache) -> Export:
    del kv_cache
    quantized = _quantized(layers, "awq")
    for layer in quantized.values():
        _check_weight_only(layer, "awq", (4,))
        if layer.permuted:
            _refuse(layer, "awq", "columns in order (no act-order)", "export 'gptq'")
    spec = _one_spec(quantized, "awq")
    assert spec.weights is not None
    names = _specs(quantized)
    skipped = []
    for plain in _plain_names(layers, words):
        # Readers of this list match substrings: a router "mlp.gate" would take "mlp.gate_proj" with it.
        inside = [name for name in names if plain in name]
        if inside and plain in layers:
            _refuse(layers[plain], "awq", f"a name not contained in {inside[0]}", "quantize both")
        if not inside:
            skipped.append(plain)
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": _group_size(spec.weights),
        "zero_point": spec.weights.offset is not None,
        "version": "gemm",
        "modules_to_not_convert": skipped or None,
    }
    return Export(config, dict.fromkeys(quantized, _encode.awq))


def _mxfp4(layers, words, kv_cache) -> Export:
    del words, kv_cache
    quantized = _quantized(layers, "mxfp4")
    for layer in quantized.values():
        f = layer.format
        mx = (f.element, f.block_shape, f.scale_dtype) == (
            "float4_e2m1fn",
            (1, 32),
            "float8_e8m0fnu",
        )
        if not mx or not layer.stacked or layer.spec.activations is not None:
            fix = "export 'compressed-tensors' for other models"
            _refuse(layer, "mxfp4", "GPT-OSS's stacked experts in weight-only MXFP4", fix)
    kept = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    config = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    return Export(config, dict.fromkeys(quantized, _encode.gpt_oss))


def _plain(dtype: str) -> Planner:
    def plan(layers, words, kv_cache) -> Export:
        del layers, words, kv_cache
        return Export(None, {}, dtype)

    return plan


FORMATS: Mapping[str, Planner] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "bf16": _plain("bfloat16"),
    "f16": _plain("float16"),
    "f32": _plain("float32"),
}
"""Names that `export` takes."""
