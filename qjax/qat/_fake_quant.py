"""Fake quantization: the values that quantization keeps, with gradients for training."""

import jax
import jax.numpy as jnp
from jax import Array

from qjax.formats import QFormat, qformat
from qjax.ops import straight_through
from qjax.qarray import expand_blocks
from qjax.quantization import Grid, compute_grid, quantize, round_to_element


def fake_quant(
    x: Array,
    format: str | QFormat,
    *,
    grid: Grid | None = None,
    rounding: Array | None = None,
    clip: bool = False,
) -> Array:
    """``quantize(x, format).dequantize()``, bit for bit, with straight-through gradients.

    Without `grid` the scales follow x's extreme values and the gradient is the identity
    (arXiv:1308.3432), or with `clip` the identity inside the grid and 0 where x saturates. A given grid
    is learned: its scale (and x, inside the grid) get the gradients of learned step sizes
    (arXiv:1902.08153, without its gradient scaling). `rounding` is learned likewise (arXiv:2309.05516).

    Args:
        x: [..., N, K], floating.
        format: A `QFormat` or its name.
        grid: Learned scales, float32 in `grid.scale` whatever the format's scale dtype: they are rounded
            to it here. Zero points are constants.
        rounding: Learned offsets [..., N, K] in units of the scale.
        clip: Whether saturated values get no gradient.

    Returns:
        An array like x.
    """
    format = qformat(format)
    if grid is None:
        grid = compute_grid(jax.lax.stop_gradient(x), format)
        stored = grid
    else:
        stored = grid._replace(scale=stored_scale(grid.scale, format.scale_dtype))
        grid = grid._replace(scale=straight_through(grid.scale, stored.scale.astype(jnp.float32)))
        clip = True
    hard = jax.lax.stop_gradient(quantize(x, format, grid=stored, rounding=rounding).dequantize())
    if not clip and rounding is None:
        return straight_through(x, hard)
    return straight_through(_differentiable(x, format, grid, rounding).astype(x.dtype), hard)


def _differentiable(x: Array, format: QFormat, grid: Grid, rounding: Array | None) -> Array:
    """The quantizer as a function whose derivatives are those we want; its values are not used."""
    element = format.spec
    block = format.block_size(x.shape)

    def expand(part: Array) -> Array:
        return expand_blocks(part.astype(jnp.float32), x.shape, block)

    scale = expand(grid.scale)
    if grid.global_scale is not None:
        scale = scale * grid.global_scale
    shift = jnp.zeros_like(scale)  # of the grid, in units of the scale
    low, high = element.min, element.max
    if grid.minimum is not None:
        shift = expand(grid.minimum) / jax.lax.stop_gradient(scale)
        low, high = 0.0, 2.0**element.bits - 1
    elif grid.zero_point is not None:
        shift = -expand(grid.zero_point)
    u = x.astype(jnp.float32) / scale
    if rounding is not None:
        u = u + rounding.astype(jnp.float32)
    u = u - jax.lax.stop_gradient(shift)
    nearest = jax.lax.stop_gradient(u if element.is_float else jnp.round(u))
    inside = (nearest >= low) & (nearest <= high)
    rounded = round_to_element(nearest, element) if element.is_float else nearest
    # A mask, since the derivative of a clip is one half for values on the grid's ends.
    u = jnp.where(inside, straight_through(u, rounded), jnp.clip(nearest, low, high))
    return (u + jax.lax.stop_gradient(shift)) * scale


def stored_scale(scale: Array, dtype: str) -> Array:
    """A learned scale as the format stores it, neither 0 nor beyond the dtype's range; e8m0 to the nearest."""
    scale = jax.lax.stop_gradient(scale)
    if dtype == "float8_e8m0fnu":
        exponent = jnp.clip(jnp.round(jnp.log2(jnp.abs(scale))) + 127, 1, 254)
        return jax.lax.bitcast_convert_type(exponent.astype(jnp.uint8), jnp.float8_e8m0fnu)
    info = jnp.finfo(dtype)
    smallest = float(info.smallest_subnormal if dtype == "float8_e4m3fn" else info.tiny)
    magnitude = jnp.clip(jnp.abs(scale), smallest, float(info.max))
    return jnp.copysign(magnitude, scale).astype(dtype)
