"""Export: a model as a Hugging Face folder that vLLM, SGLang, transformers and this package load."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.checkpoint import _encode
from qjax.checkpoint._export_formats import FORMATS, Encode, Export
from qjax.checkpoint._folder import new_folder, write_config
from qjax.checkpoint._model_tensors import PARTS, Layer, class_words, layers, to_host, variables
from qjax.checkpoint._progress import progress_bar
from qjax.checkpoint._safetensors_writer import SafetensorsWriter, TensorSpec
from qjax.checkpoint._source import Source
from qjax.nn import ActivationScale, ExpertLinear, KVScale, modules
from qjax.qarray import QArray
from qjax.recipe import KVCacheFormat

MAX_SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Tensors that are made together, when their turn comes."""

    tensors: tuple[TensorSpec, ...]
    make: Callable[[], Mapping[str, np.ndarray]]


def export(
    model: nnx.Module,
    directory: str | os.PathLike,
    *,
    format: str = "compressed-tensors",
    source: Any = None,
    kv_cache: KVCacheFormat | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Writes a model as a Hugging Face folder: config.json, safetensors, tokenizer and other files.

    Codes and scales are written as they are, never quantized anew; blocks that a mesh refined are
    merged. Tensors reach the host one at a time, and the folder appears only when it is complete.

    Args:
        model: A loaded model.
        directory: The folder to make.
        format: A name of `FORMATS`: "compressed-tensors" holds every scheme but GGUF's minimums; "fp8",
            "gptq", "awq" and "mxfp4" (GPT-OSS) what their readers know; "bf16", "f16" and "f32" hold
            dequantized weights.
        source: Where config.json and the other files come from: a `LoadedModel`, a Hugging Face folder,
            or the config as a mapping (then there are no other files).
        kv_cache: Storage of the KV cache to state in the config; default the source's.
        max_shard_bytes: Bound of one safetensors file; a larger tensor gets a file of its own.
        overwrite: Whether to replace an existing folder.
        progress: Whether to draw a progress bar.

    Returns:
        The folder.

    Raises:
        ValueError: If a module's quantization does not fit the format (naming the module and what to
            do), the model is not loaded, or the folder exists.
    """
    if format not in FORMATS:
        raise ValueError(f"export: unknown format {format!r}; use one of {list(FORMATS)}")
    for path, module in modules(model):
        if getattr(module, "fake_quant", None) is not None:
            raise ValueError(
                f"export: {path} still trains to be quantized; qat.convert(model) first"
            )
    origin = Source.of(source)
    cache = origin.kv_cache if kv_cache is None else kv_cache
    cache = cache if cache is not None and cache.quantized else None
    model_dtype = jnp.dtype(model.dtype).name  # type: ignore[attr-defined]
    found = layers(model)
    parameters = dict(variables(model))
    plan = FORMATS[format](found, class_words(model), cache)
    units = list(_units(model_dtype, parameters, found, plan, cache))
    tensors = [tensor for unit in units for tensor in unit.tensors]
    directory = Path(directory).absolute()
    with new_folder(directory, overwrite=overwrite) as partial:
        writer = SafetensorsWriter(partial, tensors, max_shard_bytes)
        try:
            _write(writer, units, directory.name, progress)
        finally:
            writer.close()
        origin.write_files(partial)
        write_config(partial, origin.config, plan.config, plan.dtype or model_dtype)
    return directory


def _write(writer: SafetensorsWriter, units: list[_Unit], title: str, progress: bool) -> None:
    with progress_bar(f"writing {title}", writer.total_bytes, enabled=progress) as advance:
        for unit in units:
            arrays = unit.make()
            for tensor in unit.tensors:
                writer.write(tensor.name, arrays[tensor.name])
                advance(tensor.nbytes)
    writer.finish()


def _units(
    dtype: str,
    parameters: Mapping[str, nnx.Variable],
    found: Mapping[str, Layer],
    plan: Export,
    cache: KVCacheFormat | None,
) -> Iterator[_Unit]:
    """Everything to write, in the model's order."""
    templates: dict[tuple, dict[str, np.ndarray]] = {}
    for name, variable in parameters.items():
        path, _, leaf = name.rpartition(".")
        layer, value = found.get(path), variable.get_value()
        if isinstance(variable, nnx.LoRAParam):
            raise ValueError(
                f"export: {name} is an adapter's; merge_lora(model) before exporting it"
            )
        if layer is not None and leaf == "weight":
            for i in range(len(layer.names)):
                if path in plan.encoders:
                    yield _encoded(layer, i, plan.encoders[path], templates)
                else:
                    yield _dense(layer, i, plan, dtype)
        elif isinstance(variable, ActivationScale):
            assert layer is not None
            if plan.config is not None:
                yield from _activation_scales(layer, value, plan)
        elif isinstance(variable, KVScale):
            yield from _kv_scale(name, value, cache)
        elif layer is not None:
            for i, own in enumerate(layer.names):
                full = f"{own}_{leaf}" if layer.stacked else f"{own}.{leaf}"
                yield _plain(full, value, layer.expert(i), plan, dtype)
        else:
            yield _plain(name, value, None, plan, dtype)


def _encoded(layer: Layer, index: int, encode: Encode, templates: dict) -> _Unit:
    """A quantized weight in the format's tensors; their shapes come from encoding ones, once per shape."""
    name = layer.names[index]
    joint = "_" if layer.stacked else "."
    w = layer.value
    lead = 0 if layer.expert(index) is None else 1
    format = layer.format
    logical = w.shape[lead:]
    key = (encode, format, logical, w.column_perm is None)
    if key not in templates:
        parts = {
            "qvalue": (format.storage_shape(logical), format.storage_dtype),
            "scale": (format.scale_shape(logical), jnp.dtype(format.scale_dtype)),
            "zero_point": (format.scale_shape(logical), format.zero_point_dtype),
            "global_scale": ((*logical[:-2], 1, 1), jnp.dtype("float32")),
        }
        ones: dict[str, Any] = {
            part: np.ones(*parts[part]) if part in parts and getattr(w, part) is not None else None
            for part in PARTS
        }
        if w.column_perm is not None:
            ones["column_perm"] = np.arange(logical[-1], dtype=np.int32)
        example = encode(QArray(**ones, format=format, dtype=w.dtype))
        templates[key] = {k: TensorSpec(k, v.shape, v.dtype) for k, v in example.items()}

    def make() -> dict[str, np.ndarray]:
        try:
            tensors = encode(layer.quantized(index))
        except ValueError as error:
            raise ValueError(f"export: {name}: {error}") from None
        return {f"{name}{joint}{k}": v for k, v in tensors.items()}

    specs = (dataclasses.replace(t, name=f"{name}{joint}{k}") for k, t in templates[key].items())
    return _Unit(tuple(specs), make)


def _dense(layer: Layer, index: int, plan: Export, dtype: str) -> _Unit:
    """A plain weight, dequantized where it is not plain already."""
    name, value, expert = layer.names[index], layer.value, layer.expert(index)
    transposed = isinstance(layer.module, ExpertLinear) and layer.module.transposed_in_checkpoint
    full = name if layer.stacked else f"{name}.weight"
    if not isinstance(value, QArray) and not transposed:
        return _plain(full, value, expert, plan, dtype)
    shape = value.shape if expert is None else value.shape[1:]
    shape = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    stored = np.dtype(jnp.dtype(plan.dtype or dtype))

    def make() -> dict[str, np.ndarray]:
        if isinstance(value, QArray):
            parts = layer.quantized(index)
            w = np.asarray(dataclasses.replace(parts, **_device_parts(parts)).dequantize("float32"))
        else:
            w = to_host(value, expert)
        return {full: (w.swapaxes(-1, -2) if transposed else w).astype(stored)}

    return _Unit((TensorSpec(full, tuple(shape), stored),), make)


def _device_parts(w: QArray) -> dict[str, Any]:
    return {part: jnp.asarray(getattr(w, part)) for part in PARTS if getattr(w, part) is not None}


def _plain(name: str, value: Any, expert: int | None, plan: Export, dtype: str) -> _Unit:
    """A plain tensor; those of the model's dtype take the export's, others (float32 biases) stay."""
    cast = plan.dtype is not None and value.dtype == jnp.dtype(dtype)
    stored = np.dtype(jnp.dtype(plan.dtype)) if cast else np.dtype(value.dtype)
    shape = tuple(value.shape if expert is None else value.shape[1:])
    return _Unit(
        (TensorSpec(name, shape, stored),),
        lambda: {name: to_host(value, expert).astype(stored, copy=False)},
    )


def _activation_scales(layer: Layer, value: Any, plan: Export) -> Iterator[_Unit]:
    activations = layer.spec.activations
    assert activations is not None
    divides = activations.format.global_scale and plan.scale_divides
    suffix = "input_global_scale" if divides else "input_scale"
    for i, own in enumerate(layer.names):
        scale = to_host(value, layer.expert(i)).astype(np.float32)
        scale = scale.reshape((1,) if plan.vector_scales else ())
        scale = _encode.divisor(scale) if divides else scale
        yield _ready(f"{own}.{suffix}", scale)


def _kv_scale(name: str, value: Any, cache: KVCacheFormat | None) -> Iterator[_Unit]:
    """A cache scale: [1] where heads share it, else [K, 1, 1]; ones of an unquantized cache are left out."""
    scale = to_host(value).astype(np.float32)
    if cache is None and (scale == 1).all():
        return
    shared = bool((scale == scale[0]).all())
    if cache is not None and cache.scale == "tensor" and not shared:
        raise ValueError(
            f"export: {name} differs between heads; export with kv_cache of scale 'head' (fp8_e4m3_head)"
        )
    per_head = not shared if cache is None else cache.scale == "head"
    yield _ready(name, scale[:, None, None] if per_head else scale[:1])


def _ready(name: str, array: np.ndarray) -> _Unit:
    return _Unit((TensorSpec(name, array.shape, array.dtype),), lambda: {name: array})
