"""Statistics of the inputs of a layer's linear modules."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from qjax.nn import Linear, Tokens


class InputStatistic(nnx.Variable):
    """A running sum over calibration inputs."""


class Observed(Linear):
    """A linear layer that adds up its inputs' second moments as it runs."""

    def __init__(self, linear: Linear):
        """Shares a layer's weight [N, K] and settings; the sums start at 0."""
        for name, value in vars(linear).items():
            if not name.startswith("_"):  # nnx's own bookkeeping
                setattr(self, name, value)
        k = linear.weight.get_value().shape[-1]
        self.hessian = InputStatistic(jnp.zeros((k, k), jnp.float32))

    def __call__(self, x: Any) -> Array:
        """The layer's output; x [..., K] is an array, since a plain weight takes no quantized input."""
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        self.hessian.set_value(self.hessian.get_value() + rows.T @ rows)
        return super().__call__(x)


def linears(module: nnx.Module) -> dict[str, Linear]:
    """{dotted path: module} of the linear modules of a layer."""
    return {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_modules(module)
        if isinstance(node, Linear)
    }


def replace(module: nnx.Module, path: str, new: nnx.Module) -> None:
    """Puts another module at a dotted path."""
    *parents, name = path.split(".")
    parent: Any = module
    for step in parents:
        parent = parent[int(step)] if step.isdigit() else getattr(parent, step)
    setattr(parent, name, new)


def positions(batch: int, length: int) -> Tokens:
    """Where the tokens of whole windows stand."""
    step = jnp.arange(length, dtype=jnp.int32)
    return Tokens(
        positions=jnp.broadcast_to(step[None], (batch, length)),
        valid=jnp.ones((batch, length), bool),
        lengths=jnp.full((batch,), length, jnp.int32),
    )


def run_layer(layer: nnx.Module) -> Callable[[Array], Array]:
    """The jitted function from hidden states [B, T, D] to the layer's output."""
    graphdef, state = nnx.split(layer)
    return lambda x: _run(graphdef, state, x)


# Compiled once for all layers of one shape: equal graph definitions are one static argument.
@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef: nnx.GraphDef, state: Any, x: Array) -> Array:
    return nnx.merge(graphdef, state)(x, positions(*x.shape[:2]), None)[0]


@functools.partial(jax.jit, static_argnums=0)
def _observe(graphdef: nnx.GraphDef, sums: Any, rest: Any, x: Array) -> Any:
    observed = nnx.merge(graphdef, sums, rest)
    observed(x, positions(*x.shape[:2]), None)
    return nnx.split(observed, InputStatistic, ...)[1]


def input_hessians(layer: nnx.Module, batches: list[Array]) -> Mapping[str, Array]:
    """{path of a linear module: sum of x x^T over its inputs, float32 [K, K]}.

    Args:
        layer: A decoder layer, unchanged afterwards.
        batches: Its inputs, hidden states [B, T, D].
    """
    found = linears(layer)
    for path, linear in found.items():
        replace(layer, path, Observed(linear))
    try:
        graphdef, sums, rest = nnx.split(layer, InputStatistic, ...)
    finally:
        for path, linear in found.items():
            replace(layer, path, linear)
    for x in batches:
        sums = _observe(graphdef, sums, rest, x)
    flat = {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(sums)}
    return {path: flat[f"{path}.hessian"] for path in found}
