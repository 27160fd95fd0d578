"""AutoRound: rounding and ranges learned by signed gradient descent on layer outputs (arXiv:2309.05516)."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qjax.calibration._observe import linears, positions
from qjax.formats import QFormat
from qjax.qarray import QArray
from qjax.qat import fake_quant, stored_scale
from qjax.quantization import Grid, compute_grid, quantize


@dataclasses.dataclass(frozen=True)
class AutoRound:
    """Options of AutoRound.

    Attributes:
        steps: Descent steps per decoder layer.
        batch: Calibration windows per step.
        learning_rate: First step size, falling linearly to 0; None for 1 / steps.
        seed: Order of the calibration windows.
    """

    steps: int = 200
    batch: int = 4
    learning_rate: float | None = None
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"AutoRound: steps and batch must be positive; found {self}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Learned:
    """What is learned of one weight: offsets in [-0.5, 0.5] and a factor on each block's scale in [0.5, 1.2]."""

    offsets: Array
    factor: Array


def autoround(
    layer: nnx.Module,
    inputs: Array,
    targets: Array,
    formats: Mapping[str, QFormat],
    options: AutoRound,
    *,
    dtype: str,
) -> dict[str, QArray]:
    """Quantizes a layer's linear modules so that its output on the calibration inputs changes least.

    Args:
        layer: A decoder layer with plain weights.
        inputs: Hidden states [n, T, D] before it.
        targets: The unquantized layer's output [n, T, D].
        formats: {path of a linear module in the layer: format}.
        options: Steps and sizes.
        dtype: Dtype that the results dequantize to.
    """
    found = linears(layer)
    weights = {p: found[p].weight.get_value().astype(jnp.float32) for p in formats}
    grids = {p: compute_grid(w, formats[p]) for p, w in weights.items()}
    learned = {
        p: _Learned(jnp.zeros(w.shape), jnp.ones(grids[p].scale.shape)) for p, w in weights.items()
    }
    graphdef, state = nnx.split(layer)
    frozen_formats = tuple(sorted(formats.items()))
    rate = options.learning_rate or 1.0 / options.steps
    rng = np.random.default_rng(options.seed)
    best, best_loss = learned, np.inf
    for step in range(options.steps):
        rows = rng.choice(len(inputs), min(options.batch, len(inputs)), replace=False)
        size = jnp.float32(rate * (1 - step / options.steps))
        before = learned
        loss, learned = _step(
            graphdef,
            state,
            weights,
            grids,
            learned,
            inputs[rows],
            targets[rows],
            size,
            frozen_formats,
        )
        if (loss := float(loss)) < best_loss:
            best, best_loss = before, loss
    return {
        p: quantize(
            w,
            formats[p],
            grid=_stored(grids[p], best[p], formats[p]),
            rounding=best[p].offsets,
            dtype=dtype,
        )
        for p, w in weights.items()
    }


@functools.partial(jax.jit, static_argnums=(0, 8))
def _step(graphdef, state, weights, grids, learned, x, target, rate, formats):
    """One signed gradient step; returns the loss before it."""

    def loss(learned):
        # Copied: variables may be set only under the transformation that made them.
        layer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
        found = linears(layer)
        for path, format in formats:
            grid = _grid(grids[path], learned[path])
            w = fake_quant(weights[path], format, grid=grid, rounding=learned[path].offsets)
            found[path].weight.set_value(w.astype(found[path].weight.get_value().dtype))
        y = layer(x, positions(*x.shape[:2]), None)[0]
        return jnp.mean(jnp.square(y.astype(jnp.float32) - target.astype(jnp.float32)))

    value, gradient = jax.value_and_grad(loss)(learned)
    moved = jax.tree.map(lambda p, g: p - rate * jnp.sign(g), learned, gradient)
    return value, {
        path: _Learned(jnp.clip(v.offsets, -0.5, 0.5), jnp.clip(v.factor, 0.5, 1.2))
        for path, v in moved.items()
    }


def _grid(grid: Grid, learned: _Learned) -> Grid:
    """The grid with learned float32 scales."""
    return grid._replace(scale=grid.scale.astype(jnp.float32) * learned.factor)


def _stored(grid: Grid, learned: _Learned, format: QFormat) -> Grid:
    """The learned grid as fake quantization has stored it."""
    return grid._replace(scale=stored_scale(_grid(grid, learned).scale, format.scale_dtype))
