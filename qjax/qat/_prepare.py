"""From a model to one that trains to be quantized, and from that to the quantized model."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from qjax.formats import QFormat, qformat
from qjax.nn import (
    Attention,
    Embedding,
    ExpertLinear,
    LatentAttention,
    Linear,
    QuantizedParam,
    modules,
    resolve,
)
from qjax.qarray import QArray
from qjax.qat import _flax
from qjax.qat._fake_quantizer import GridQuantizer, Schedule, Step, Training
from qjax.quantization import refine_blocks
from qjax.recipe import QuantSpec, Recipe, fit_group
from qjax.recipe import recipe as named_recipe
from qjax.sharding import array_specs, sharded_format


def prepare[Model: nnx.Module](
    model: Model,
    recipe: str | Recipe,
    *,
    clip: bool = False,
    learn_scale: bool = False,
    learn_rounding: bool = False,
    start_step: int = 0,
    ramp_steps: int = 0,
    stages: tuple[tuple[int, str | QFormat], ...] = (),
    axes: Mapping[str, "_flax.Axes"] | None = None,
) -> Model:
    """Makes the layers that a recipe names compute with the values that quantization will keep, in place.

    Gradients pass straight through (arXiv:1308.3432); parameters stay what they are, so any optimizer and any
    training loop goes on as before. qjax's own layers and Flax's `nnx.Linear`, `nnx.LinearGeneral`,
    `nnx.Einsum` and `nnx.Embed` are found; other parameters take part if `axes` says what their axes
    mean. Norms and routers take no part, embeddings and the head only if a rule names them.

    Args:
        model: A loaded model. Quantized weights that the recipe names become float32 parameters again.
        recipe: What is quantized how, or a name that `qjax.recipe.recipe` knows.
        clip: Whether values beyond the grid get no gradient.
        learn_scale: Whether the weights' scales are trained (LSQ).
        learn_rounding: Whether rounding offsets are trained (as AutoRound does).
        start_step: First quantized step; see `set_step`.
        ramp_steps: Steps over which quantization then sets in linearly.
        stages: ((step, format), ...): formats that all weights pass through, each until its step.
        axes: {module path or parameter path: axes} of parameters that Flax's own layers do not explain,
            such as expert weights.

    Returns:
        The model itself.

    Raises:
        ValueError: If a rule matches nothing, a format does not fit a weight, or a layer is prepared already.
    """
    training = Training(
        clip=clip,
        learn_scale=learn_scale,
        learn_rounding=learn_rounding,
        schedule=Schedule(
            start_step, ramp_steps, tuple((until, qformat(format)) for until, format in stages)
        ),
    )
    own = {
        path: m for path, m in modules(model) if isinstance(m, Linear | ExpertLinear | Embedding)
    }
    foreign = _flax.quantizable(model, axes or {})
    if isinstance(recipe, str):
        layers = len(getattr(getattr(model, "model", None), "layers", ()))
        recipe = named_recipe(recipe, num_layers=layers or None)
    _check_unprepared(own, foreign)
    step = Step(jnp.zeros((), jnp.int32)) if training.schedule.counts else None
    if own and not foreign:
        specs = resolve(recipe, model)
    else:
        specs = recipe.resolve({path: weight.kind for path, weight in foreign.items()})
    for path, module in own.items():
        _prepare_own(path, module, specs, training, step)
    for path, weight in foreign.items():
        if path in specs:
            _flax.prepare(weight, fit_group(specs[path], weight.columns, path), training, step)
    if recipe.kv_cache is not None and recipe.kv_cache.quantized:
        _prepare_kv_caches(model, recipe)
    return model


def _check_unprepared(own: Mapping[str, nnx.Module], foreign: Mapping[str, "_flax.Weight"]) -> None:
    if not own and not foreign:
        raise ValueError("prepare: the model has no linear layer that qjax or flax.nnx defines")
    for path, module in own.items():
        if module.fake_quant is not None:  # type: ignore[attr-defined]
            raise ValueError(f"prepare: {path} is prepared already; convert the model first")
    for path, weight in foreign.items():
        if weight.prepared:
            raise ValueError(f"prepare: {path} is prepared already; convert the model first")


def _prepare_own(path, module, specs: Mapping[str, QuantSpec], training: Training, step) -> None:
    names = module.checkpoint_paths(path) if isinstance(module, ExpertLinear) else [path]
    found = {specs.get(name, QuantSpec()) for name in names}
    if len(found) > 1:
        raise ValueError(f"prepare: the experts of {path} need one quantization; found {found}")
    (spec,) = found
    if spec == QuantSpec():
        return
    if spec.activations is not None and spec.activations.static:
        raise ValueError(
            f"prepare: {path}: static activation scales need calibrated inputs; use a dynamic format"
        )
    value = module.weight.get_value()
    if isinstance(value, QArray):
        if spec.weights is None:
            raise ValueError(
                f"prepare: {path} is quantized already and the recipe has no format for it"
            )
        module.weight = nnx.Param(value.dequantize(jnp.float32))
    inputs = spec.activations
    if isinstance(module, ExpertLinear) and inputs is not None:
        # Scales must span all devices' rows: the layer itself quantizes where it gathers them.
        if training.schedule.counts:
            raise ValueError(
                f"prepare: {path}: experts' inputs are quantized from the first step on; use weights "
                "only, or no schedule"
            )
        module.activation_format, inputs = inputs, None
    module.fake_quant = GridQuantizer(
        spec.weights, inputs, training, step, module.weight.get_value()
    )
    module.spec = spec


def _prepare_kv_caches(model: nnx.Module, recipe: Recipe) -> None:
    found = [m for _, m in modules(model) if isinstance(m, Attention | LatentAttention)]
    if not found:
        raise ValueError(
            "prepare: the recipe has a KV cache format and the model none of qjax's attention"
        )
    for module in found:
        module.fake_kv_cache = recipe.kv_cache


def set_step(model: nnx.Module, step: int | Array) -> None:
    """Tells a prepared model which training step it is at; without a schedule nothing depends on it.

    Under `jax.jit` on a split model, set the `Step` leaves of the state instead, or call this on the merged
    model inside the function.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, GridQuantizer) and module.step is not None:
            module.step.set_value(jnp.asarray(step, jnp.int32))


def convert[Model: nnx.Module](model: Model) -> Model:
    """Replaces every fake-quantized weight by its quantized array, in place.

    Codes are those that the forward pass used at full strength, bit for bit. Inputs are quantized from now on
    as the recipe says; learned parameters and schedules are gone. qjax's models can then be exported
    (`qjax.checkpoint.export`); of other models `quantized_weights` gives the arrays.

    Returns:
        The model itself.

    Raises:
        ValueError: If nothing is prepared, or adapters are not merged.
    """
    count = 0
    for path, module in modules(model):
        if isinstance(module, Attention | LatentAttention):
            module.fake_kv_cache = None
        if not isinstance(module, Linear | ExpertLinear | Embedding):
            continue
        quantizer = module.fake_quant
        if quantizer is None:
            continue
        assert isinstance(quantizer, GridQuantizer)
        if getattr(module, "lora", None) is not None:
            raise ValueError(f"convert: {path} has an adapter; merge_lora the model first")
        if quantizer.weights is not None:
            w = module.weight.get_value()
            module.weight = QuantizedParam(_quantized(module, quantizer, w))
        if not isinstance(module, Embedding):
            module.activation_format = module.spec.activations
        module.fake_quant = None
        count += 1
    count += _flax.convert(model)
    if not count:
        raise ValueError("convert: the model has no prepared layer; prepare(model, recipe) first")
    return model


def _quantized(module, quantizer: GridQuantizer, w: Array) -> QArray:
    """The weight in its format; on a mesh with blocks that no shard cuts, each device its part."""
    assert quantizer.weights is not None
    graphdef, state = nnx.split(quantizer)
    sharding = module.sharding
    if sharding.mesh is None:
        return _compiled(graphdef, state, w, quantizer.weights)
    if isinstance(module, Embedding):
        axes = (module.vocab_axis, None)
    else:
        axes = (module.out_axis, module.in_axis)
    shards = (sharding.size(axes[0]), sharding.size(axes[1]))
    format = sharded_format(quantizer.weights, w.shape, shards)
    q = _compiled(graphdef, state, w, format)
    lead = (module.expert_axis,) if isinstance(module, ExpertLinear) else ()
    specs = array_specs(q, PartitionSpec(*lead, *axes))
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(sharding.mesh, s)), q, specs)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _compiled(graphdef, state, w: Array, format: QFormat) -> QArray:
    q = nnx.merge(graphdef, state).quantized(w)
    if format != q.format:
        q = refine_blocks(q, format.block_shape)
    return dataclasses.replace(q, dtype=jnp.dtype(w.dtype).name)


def quantized_weights(model: nnx.Module) -> dict[str, QArray]:
    """{path: array} of a model's quantized weights, [..., N, K] with K the axis that products sum over."""
    found = {}
    for parts, module in nnx.iter_modules(model):
        if isinstance(module, _flax.QuantizedDotGeneral | _flax.QuantizedWeight):
            continue  # its weight counts where the layer has it
        for name, held in vars(module).items():
            variable = held.array if isinstance(held, _flax.QuantizedWeight) else held
            if isinstance(variable, QuantizedParam):
                found[".".join((*(str(p) for p in parts), name))] = variable.get_value()
    return found
