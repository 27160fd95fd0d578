"""Calibrated quantization of a whole model, one decoder layer at a time."""

import dataclasses
import logging
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qjax.calibration._autoround import AutoRound, autoround
from qjax.calibration._awq import AWQ, clipped, scale_channels
from qjax.calibration._gptq import GPTQ, gptq, output_error
from qjax.calibration._observe import input_hessians, linears, run_layer
from qjax.formats import QFormat
from qjax.nn import CausalLM, ExpertLinear, QuantizedParam, modules
from qjax.qarray import QArray
from qjax.quantization import quantize
from qjax.recipe import KVCacheFormat, QuantSpec

_log = logging.getLogger(__name__)

Method = GPTQ | AWQ | AutoRound


@dataclasses.dataclass(frozen=True)
class ModuleError:
    """What quantization cost one module.

    Attributes:
        path: The module.
        output_error: Relative L2 error of its output on the calibration inputs.
        nearest_error: The same for rounding to nearest.
    """

    path: str
    output_error: float
    nearest_error: float


def calibrate(
    model: CausalLM,
    specs: Mapping[str, QuantSpec],
    token_windows: np.ndarray,
    method: Method,
    *,
    batch: int = 4,
    on_layer: Callable[[int, int, list[ModuleError]], None] = lambda i, n, errors: None,
) -> tuple[CausalLM, list[ModuleError]]:
    """Quantizes the decoder layers' linear modules by GPTQ, AWQ or AutoRound; others round to nearest.

    Each layer sees the inputs that the quantized layers before it produce. One layer's float32 inputs,
    outputs and Hessians are held at a time, apart from the model.

    Args:
        model: A model with plain weights; its layers' weights are scaled in place by AWQ.
        specs: {module path: quantization}, as `Recipe.resolve` gives.
        token_windows: int32 [n, T], the calibration text.
        method: The method and its options.
        batch: Windows that go through a layer at once.
        on_layer: Called with (layers done, layers in all, errors of the last one).

    Returns:
        The quantized model, and the error of each calibrated module.

    Raises:
        ValueError: If the model is quantized already.
    """
    if any(isinstance(v, QuantizedParam) for _, v in nnx.to_flat_state(nnx.state(model))):
        raise ValueError(
            "calibrate: the model is quantized already; load it with plain weights (recipe 'bf16')"
        )
    formats = {p: s.weights for p, s in specs.items() if s.weights is not None}
    if any(isinstance(module, ExpertLinear) for _, module in modules(model)):
        _log.info("experts are rounded to nearest: calibration covers linear layers")
    rows = [jnp.asarray(token_windows[i : i + batch]) for i in range(0, len(token_windows), batch)]
    hidden = [model.model.embed_tokens(ids) for ids in rows]
    weights: dict[str, QArray] = {}
    errors: list[ModuleError] = []
    count = len(model.model.layers)
    for i, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{i}."
        local = {p: formats[prefix + p] for p in linears(layer) if prefix + p in formats}
        found, layer_errors = _layer(layer, hidden, local, method, model.dtype)
        weights |= {prefix + p: w for p, w in found.items()}
        errors += [dataclasses.replace(e, path=prefix + e.path) for e in layer_errors]
        with _values(layer, found):
            run = run_layer(layer)
            hidden = [run(x) for x in hidden]
        on_layer(i + 1, count, layer_errors)
    return _rebuild(model, specs, weights), errors


def _layer(
    layer: nnx.Module,
    hidden: list[Array],
    formats: Mapping[str, QFormat],
    method: Method,
    dtype: str,
) -> tuple[dict[str, QArray], list[ModuleError]]:
    if not formats:
        return {}, []
    hessians = input_hessians(layer, hidden)
    found = linears(layer)
    nearest = {
        p: float(output_error(w := found[p].weight.get_value(), quantize(w, f), hessians[p]))
        for p, f in formats.items()
    }
    if isinstance(method, AutoRound):
        run = run_layer(layer)
        targets = jnp.concatenate([run(x) for x in hidden])
        inputs = jnp.concatenate(hidden)
        built = autoround(layer, inputs, targets, formats, method, dtype=dtype)
    elif isinstance(method, AWQ):
        hessians = scale_channels(layer, found, hessians, formats, method)
        built = {
            p: clipped(found[p].weight.get_value(), hessians[p], f, method, dtype=dtype)
            for p, f in formats.items()
        }
    else:
        built = {
            p: gptq(found[p].weight.get_value(), hessians[p], f, method, dtype=dtype)
            for p, f in formats.items()
        }
    errors = [
        ModuleError(p, float(output_error(found[p].weight.get_value(), q, hessians[p])), nearest[p])
        for p, q in built.items()
    ]
    return built, errors


class _values:
    """Runs a layer on its quantized values for the length of a with block."""

    def __init__(self, layer: nnx.Module, weights: Mapping[str, QArray]):
        self._kept = []
        found = linears(layer)
        for path, q in weights.items():
            variable = found[path].weight
            self._kept.append((variable, variable.get_value()))
            variable.set_value(q.dequantize())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for variable, value in self._kept:
            variable.set_value(value)


def _rebuild(
    model: CausalLM, specs: Mapping[str, QuantSpec], weights: Mapping[str, QArray]
) -> CausalLM:
    """The quantized model: calibrated weights, other quantized modules rounded to nearest, the rest shared."""
    built = model.like(specs)
    old = dict(modules(model))
    for path, module in modules(built):
        for name, variable in vars(module).items():
            if not isinstance(variable, nnx.Variable):
                continue
            value = getattr(old[path], name, None)
            value = None if value is None else value.get_value()
            if isinstance(variable, QuantizedParam):
                wanted = variable.get_value()
                value = weights.get(path, None) or _nearest(value, wanted)
            if value is not None:
                variable.set_value(value)
    return built


def _nearest(w: Array | None, like: QArray) -> QArray:
    assert w is not None  # a module of this model has a weight
    return jax.jit(quantize, static_argnums=1)(w, like.format)


def calibrate_kv_scales(
    model: CausalLM, token_windows: np.ndarray, format: KVCacheFormat, *, batch: int = 4
) -> None:
    """Sets each layer's KV scales in place, so that the text's largest key and value fit the format.

    Args:
        model: A loaded model.
        token_windows: int32 [n, T].
        format: A quantized cache format with "tensor" or "head" scales.
        batch: Windows that run at once.

    Raises:
        ValueError: If the format has no loaded scales.
    """
    if not format.calibrated:
        raise ValueError(f"calibrate_kv_scales: {format} has no scales to calibrate")
    graphdef, state = nnx.split(model)

    @jax.jit
    def amax(state, ids):
        merged = nnx.merge(graphdef, state)
        cache = merged.init_cache(ids.shape[0], ids.shape[1], KVCacheFormat("float32"))
        cache = merged(ids, cache)[1]
        assert cache is not None
        return jax.tree.map(lambda pages: jnp.max(jnp.abs(pages), axis=(0, 2, 3)), cache.layers)

    total = None
    for i in range(0, len(token_windows), batch):
        found = amax(state, jnp.asarray(token_windows[i : i + batch]))
        total = found if total is None else jax.tree.map(jnp.maximum, total, found)
    assert total is not None
    for layer, found in zip(model.model.layers, total, strict=True):
        attention = layer.self_attn
        if found.value is None:  # latents: their scales are computed when they are written
            continue
        for variable, value in ((attention.k_scale, found.key), (attention.v_scale, found.value)):
            repeat = value.shape[0] // variable.get_value().shape[0]
            heads = value[::repeat]
            heads = heads if format.scale == "head" else jnp.full_like(heads, jnp.max(heads))
            variable.set_value(jnp.maximum(heads, 1e-6) / 448)
