"""Parameters: abstract until loaded, plain or quantized, each with its sharding."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qjax.formats import QFormat
from qjax.qarray import QArray
from qjax.quantization import quantize
from qjax.recipe import QuantSpec
from qjax.sharding import Sharding, array_specs, sharded_format


class QuantizedParam(nnx.Variable):
    """A weight held as a `QArray`: no `nnx.Param`, so that no optimizer or gradient transform takes it up."""


class ActivationScale(nnx.Variable):
    """The loaded scale of a static activation format: float32, a scalar or one per expert."""


class KVScale(nnx.Variable):
    """Loaded scales of a KV cache: float32 [K], one per key head (equal where they are per tensor)."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of a model is built from.

    Attributes:
        specs: {module path: quantization}.
        dtype: Dtype of plain parameters, of activations, and of what quantized weights dequantize to.
        sharding: Mesh and rules.
        implementation: Which implementation the ops use; see `qjax.ops`.
    """

    specs: Mapping[str, QuantSpec] = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"
    sharding: Sharding = dataclasses.field(default_factory=Sharding)
    implementation: str | None = None

    def spec(self, path: str) -> QuantSpec:
        """The quantization of the module at this path."""
        return self.specs.get(path, QuantSpec())


class Adapter(nnx.Module):
    """A trained update beside a linear layer; `qjax.qat` has the implementation."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """What the update adds to the layer's output."""
        raise NotImplementedError

    def delta(self) -> jax.Array:
        """The update of the weight [N, K]."""
        raise NotImplementedError


class FakeQuantizer(nnx.Module):
    """What a layer asks while it is trained to be quantized; `qjax.qat` has the implementation."""

    def weight(self, w: jax.Array) -> jax.Array:
        """The values of the weight [..., N, K] that quantization keeps."""
        raise NotImplementedError

    def input(self, x: jax.Array) -> jax.Array:
        """The values of the layer's input [..., K] that quantization keeps."""
        raise NotImplementedError


def abstract_param(
    shape: tuple[int, ...], dtype: str, sharding: Sharding, axes: tuple[str | None, ...]
) -> nnx.Param:
    """A plain parameter that still has to be loaded."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding.named(*axes)))


def abstract_weight(
    shape: tuple[int, ...],
    format: QFormat | None,
    context: Context,
    axes: tuple[str | None, ...],
    path: str,
    *,
    permuted: bool = False,
) -> nnx.Param | QuantizedParam:
    """A weight [..., N, K] that still has to be loaded, plain or quantized.

    Args:
        shape: Logical shape.
        format: Storage, None for a plain array.
        context: Dtype and sharding.
        axes: Mesh axis of each logical axis.
        path: The module's name, for errors.
        permuted: Whether the columns are stored in another order (act-order).
    """
    if format is None:
        return abstract_param(shape, context.dtype, context.sharding, axes)
    shards = (context.sharding.size(axes[-2]), context.sharding.size(axes[-1]))
    format = sharded_format(format, shape, shards, path)

    def struct(part_shape, dtype) -> Any:  # stands where the array will be
        return jax.ShapeDtypeStruct(tuple(part_shape), jnp.dtype(dtype))

    scales = format.scale_shape(shape)
    w = QArray(
        struct(format.storage_shape(shape), format.storage_dtype),
        struct(scales, format.scale_dtype),
        struct(scales, format.zero_point_dtype) if format.offset == "zero_point" else None,
        struct(scales, format.scale_dtype) if format.offset == "minimum" else None,
        struct((*shape[:-2], 1, 1), jnp.float32) if format.global_scale else None,
        struct(shape[-1:], jnp.int32) if permuted else None,
        format=format,
        dtype=jnp.dtype(context.dtype).name,
    )
    if context.sharding.mesh is not None:
        mesh = context.sharding.mesh
        specs = array_specs(w, PartitionSpec(*axes))
        w = jax.tree.map(
            lambda s, spec: jax.ShapeDtypeStruct(
                s.shape, s.dtype, sharding=NamedSharding(mesh, spec)
            ),
            w,
            specs,
        )
    return QuantizedParam(w)


def abstract_activation_scale(
    spec: QuantSpec, shape: tuple[int, ...], sharding: Sharding, axes: tuple[str | None, ...]
) -> ActivationScale | None:
    """The scale that a static activation format has to load, None for other formats."""
    if spec.activations is None or not spec.activations.static:
        return None
    return ActivationScale(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.named(*axes)))


def modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """(dotted path, module) of every module of a model, in order."""
    for path, node in nnx.iter_modules(model):
        yield ".".join(str(p) for p in path), node


def initialize(model: nnx.Module, key: jax.Array, *, scale: float = 0.02) -> None:
    """Fills every abstract parameter in place: normal weights, ones in norms, zero biases.

    Quantized weights hold the quantized draw, rounded to nearest.

    Args:
        model: A model as its class builds it.
        key: PRNG key.
        scale: Standard deviation of the weights.
    """
    state = nnx.state(model, (nnx.Param, QuantizedParam, ActivationScale))
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        leaves = jax.tree.leaves(value)
        if not all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            continue
        key, draw = jax.random.split(key)
        variable.set_value(_initial_value(path, value, draw, scale))
    nnx.update(model, state)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantized_draw(key: jax.Array, shape: tuple[int, ...], format: QFormat, dtype: str, scale):
    # Matrix by matrix: of 128 experts the float32 draw alone is 8.5 GB.
    def draw(key):
        if key.ndim:
            return jax.lax.map(draw, key)
        return quantize(scale * jax.random.normal(key, shape[-2:]), format, dtype=dtype)

    return draw(jax.random.split(key, shape[:-2]))


def _initial_value(path: tuple, value, key: jax.Array, scale: float):
    if isinstance(value, QArray):
        drawn = _quantized_draw(key, value.shape, value.format, value.dtype, scale)
        if value.column_perm is not None:
            order = jnp.arange(value.shape[-1], dtype=jnp.int32)
            drawn = dataclasses.replace(drawn, column_perm=order)
        return jax.tree.map(_place, drawn, value)
    name = str(path[-1])
    if name == "bias" or name.endswith("_bias"):
        drawn = jnp.zeros(value.shape, value.dtype)
    elif value.ndim < 2:
        drawn = jnp.ones(value.shape, value.dtype)
    else:
        drawn = (scale * jax.random.normal(key, value.shape, jnp.float32)).astype(value.dtype)
    return _place(drawn, value)


def _place(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    return x if like.sharding is None else jax.device_put(x, like.sharding)
