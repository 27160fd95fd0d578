"""The one quantizer: scales, rounding and codes of every format, for weights, activations, QAT and export.

Rounding is to nearest, ties to even, on every grid. Values beyond the grid saturate, infinities too. NaN
stays NaN: in fp8 as the element's own NaN, elsewhere through a NaN scale of its block (formats with
float8_e4m3fn or wider scales), so that it is never lost. A block of zeros gets scale 1.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from qjax.formats import ELEMENTS, ActivationFormat, Element, QFormat, qformat
from qjax.qarray import QArray, dequantize_stored, expand_blocks, pack, to_packed, to_wgmma


class Grid(NamedTuple):
    """The parts of a QArray that do not depend on the codes; fields as in `QArray`."""

    scale: Array
    zero_point: Array | None = None
    minimum: Array | None = None
    global_scale: Array | None = None

    def map_blocks(self, fn: Callable[[Array], Array]) -> "Grid":
        """The grid with `fn` applied to every part that has one value per block."""
        zero_point = None if self.zero_point is None else fn(self.zero_point)
        minimum = None if self.minimum is None else fn(self.minimum)
        return Grid(fn(self.scale), zero_point, minimum, self.global_scale)


def quantize(
    x: Array,
    format: str | QFormat,
    *,
    grid: Grid | None = None,
    rounding: Array | None = None,
    dtype: DTypeLike | None = None,
) -> QArray:
    """Quantizes an array by rounding to nearest.

    Args:
        x: [..., N, K], floating.
        format: A `QFormat` or a name that `qjax.formats.qformat` knows.
        grid: Scales and offsets to use instead of those of `compute_grid`.
        rounding: Added to x before it is rounded, in units of its block's scale (learned rounding).
        dtype: Dtype that the result dequantizes to; default x's.

    Raises:
        ValueError: If x has fewer than two axes or is not floating, or K does not suit the format.
    """
    format = qformat(format)
    if format.ordered:
        stored = quantize(x, format.in_checkpoints, grid=grid, rounding=rounding, dtype=dtype)
        pairs = format.storage == "wgmma8_pairs"
        return to_wgmma(stored, pairs=pairs, eight_bit=format.eight_bit)
    _check_input("quantize", x, format)
    if grid is None:
        _check_groups("quantize", x, format)
        grid = compute_grid(x, format)
    codes = round_to_grid(x, format, grid, rounding=rounding)
    return QArray.from_parts(
        format,
        pack(codes, format),
        grid.scale,
        zero_point=grid.zero_point,
        minimum=grid.minimum,
        global_scale=grid.global_scale,
        dtype=x.dtype if dtype is None else dtype,
    )


def quantize_dequantize(x: Array, format: str | QFormat, *, grid: Grid | None = None) -> Array:
    """``quantize(x).dequantize()`` in x's dtype: the value that the format keeps of x."""
    return quantize(x, format, grid=grid).dequantize()


def _check_input(op: str, x: Array, format: QFormat) -> None:
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{op}: needs a floating array of two or more axes [..., N, K]; found {x.dtype}{list(x.shape)}"
        )
    format.storage_shape(x.shape)


def _check_groups(op: str, x: Array, format: QFormat) -> None:
    bk = format.block_shape[1]
    if format.block_shape[0] == 1 and bk > 1 and x.shape[-1] % bk:
        raise ValueError(
            f"{op}: group size {bk} must divide K = {x.shape[-1]} (shape {list(x.shape)}); "
            "choose another group size or pad K"
        )


def compute_grid(
    x: Array,
    format: QFormat,
    *,
    global_scale: Array | None = None,
    amax_min: float = 0.0,
    amax_max: float | None = None,
) -> Grid:
    """Scales and offsets of x's blocks from their extreme values.

    The integer rules are compressed-tensors': symmetric scale = amax / ((2**bits - 1) / 2), asymmetric
    scale = (max - min) / (2**bits - 1) over a range that includes 0. Floating grids map amax to the
    element's largest value; e8m0 scales round up to a power of two ("amax" rule) or follow the
    Microscaling rule ("mx"); NVFP4's global scale maps the largest block scale to 448.

    Args:
        x: [..., N, K].
        format: The format.
        global_scale: Use this one (float32 [..., 1, 1]) instead of computing it.
        amax_min: Floor of a block's amax.
        amax_max: Upper bound of a block's amax.
    """
    element = format.spec
    if format.offset is not None:
        return _asymmetric_grid(x, format)
    amax = _reduce_blocks(jnp.abs(x.astype(jnp.float32)), format, jnp.max)
    if amax_min:
        amax = jnp.maximum(amax, amax_min)
    if amax_max is not None:
        amax = jnp.minimum(amax, amax_max)
    if format.scale_rule == "mx":
        return Grid(_microscale(amax, element))
    half_range = element.max if element.is_float else (element.max - element.min) / 2
    scale = _divide(amax, jnp.float32(half_range))
    if format.global_scale:
        if global_scale is None:
            # A block with NaN has a NaN scale of its own; the matrix's must not follow it.
            counted = jnp.where(jnp.isnan(amax), 0.0, amax)
            largest = jnp.max(counted, axis=(-2, -1), keepdims=True)
            end = ELEMENTS["float8_e4m3fn"].max * element.max
            floor = end * float(jnp.finfo(jnp.float32).tiny)
            divisor = _divide(jnp.full_like(largest, end), jnp.maximum(largest, floor))
            # The reciprocal of a float32 divisor, so that exporters that store the divisor round-trip; the
            # barrier keeps XLA from simplifying 1 / (a / b) to b / a, which is no float's reciprocal.
            reciprocal = _divide(jnp.ones_like(divisor), divisor)
            global_scale = jnp.where(largest == 0, 1.0, reciprocal)
        scale = _divide(scale, global_scale)
    return Grid(_store_scale(scale, amax, format.scale_dtype), global_scale=global_scale)


def round_to_grid(x: Array, format: QFormat, grid: Grid, *, rounding: Array | None = None) -> Array:
    """Element values of x on this grid, float32 [..., N, K]: signed integers q, or values of a floating element."""
    block = format.block_size(x.shape)
    x = x.astype(jnp.float32)
    scale = expand_blocks(grid.scale.astype(jnp.float32), x.shape, block)
    if grid.global_scale is not None:
        scale = scale * grid.global_scale
    if grid.minimum is not None:
        x = x - expand_blocks(grid.minimum.astype(jnp.float32), x.shape, block)
    q = _divide(x, scale)
    if rounding is not None:
        q = q + rounding.astype(jnp.float32)
    if grid.minimum is not None:
        q = jnp.round(q) - 2.0 ** (format.bits - 1)
    elif grid.zero_point is not None:
        q = jnp.round(q) + expand_blocks(grid.zero_point.astype(jnp.float32), x.shape, block)
    # 0/0 and inf/inf of blocks whose scale is NaN or infinite must not become arbitrary integers.
    return round_to_element(q, format.spec)


def round_to_element(x: Array, element: Element) -> Array:
    """Rounds float32 values to the element's grid: nearest, ties to even, saturating.

    NaN gives 0 for integers and e2m1 (their block's scale carries it) and NaN for fp8.
    """
    if not element.is_float:
        return jnp.clip(jnp.round(jnp.nan_to_num(x, nan=0.0)), element.min, element.max)
    assert element.mantissa_bits is not None and element.min_exponent is not None
    magnitude = jnp.minimum(jnp.abs(x), element.max)
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
    exponent = jnp.maximum((bits >> 23) - 127, element.min_exponent)
    # The distance of neighbours on the grid is a power of two, so dividing by it is exact.
    step = jax.lax.bitcast_convert_type((exponent - element.mantissa_bits + 127) << 23, jnp.float32)
    rounded = jnp.copysign(jnp.round(magnitude / step) * step, x)
    nan = jnp.nan if element.bits == 8 else 0.0
    return jnp.where(jnp.isnan(x), nan, rounded)


def quantize_activation(
    x: Array, activation: ActivationFormat, *, scale: Array | None = None
) -> QArray:
    """Quantizes a layer's input [M, K] at run time; its last group of columns may be short.

    Args:
        x: [M, K], floating.
        activation: Grid, static or dynamic, bounds.
        scale: float32 scalar of a static format: the scale, or NVFP4's global scale.

    Raises:
        ValueError: If a static format comes without its scale, or a dynamic one with it.
    """
    format = activation.format
    _check_input("quantize_activation", x, format)
    if activation.static != (scale is not None):
        raise ValueError(
            f"quantize_activation: a {'static' if activation.static else 'dynamic'} activation format "
            f"{'needs' if activation.static else 'takes no'} scale"
        )
    if scale is not None:
        scale = jnp.asarray(scale, jnp.float32).reshape(1, 1)
    if scale is not None and not format.global_scale:
        grid = Grid(scale.astype(format.scale_dtype))
    else:
        grid = compute_grid(
            x,
            format,
            global_scale=scale,
            amax_min=activation.amax_min,
            amax_max=activation.amax_max,
        )
    return quantize(x, format, grid=grid)


def requantize(w: QArray, format: str | QFormat, *, dtype: DTypeLike | None = None) -> QArray:
    """Quantizes w's values anew into another format."""
    x = w.dequantize(jnp.float32)
    return quantize(x, format, dtype=w.dtype if dtype is None else dtype)


def refine_blocks(w: QArray, block_shape: tuple[int, int]) -> QArray:
    """The same values with smaller blocks: scales are repeated, codes stay, nothing is lost.

    Args:
        w: The array.
        block_shape: As in `QFormat`; `WHOLE` stays whole.

    Raises:
        ValueError: If the new blocks do not divide the old ones.
    """
    shape, w = w.shape, to_packed(w)
    format = dataclasses.replace(w.format, block_shape=tuple(block_shape))
    old, block = w.format.block_size(shape), format.block_size(shape)
    if any(o % n for o, n in zip(old, block, strict=True)):
        raise ValueError(f"refine_blocks: {block_shape} must divide the blocks {old}")
    new = format.scale_shape(shape)

    def refine(part: Array | None) -> Array | None:
        if part is None:
            return None
        for axis in (-2, -1):
            part = jnp.repeat(part, old[axis] // block[axis], axis=axis)
        return part[..., : new[-2], : new[-1]]

    return dataclasses.replace(
        w,
        scale=refine(w.scale),
        zero_point=refine(w.zero_point),
        minimum=refine(w.minimum),
        format=format,
    )


def _asymmetric_grid(x: Array, format: QFormat) -> Grid:
    x = x.astype(jnp.float32)
    high = jnp.maximum(_reduce_blocks(x, format, jnp.max), 0.0)
    low = jnp.minimum(_reduce_blocks(x, format, jnp.min), 0.0)
    scale = _divide(high - low, jnp.float32(2**format.bits - 1))
    scale = _store_scale(scale, high - low, format.scale_dtype)
    if format.offset == "minimum":
        return Grid(scale, minimum=low.astype(format.scale_dtype))
    element = format.spec
    zero_point = jnp.round(element.min - _divide(low, scale.astype(jnp.float32)))
    zero_point = jnp.clip(jnp.nan_to_num(zero_point), element.min, element.max)
    return Grid(scale, zero_point=zero_point.astype(format.zero_point_dtype))


def _reduce_blocks(x: Array, format: QFormat, reduce) -> Array:
    """[..., N, K] -> [..., ceil(N/bn), ceil(K/bk)]; infinities don't count, NaN does."""
    x = jnp.where(jnp.isinf(x), 0.0, x)
    bn, bk = format.block_size(x.shape)
    *lead, n, k = x.shape
    rows, cols = format.scale_shape(x.shape)[-2:]
    # Zeros fill a short last block: they change neither amax nor a range that includes 0.
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, rows * bn - n), (0, cols * bk - k)])
    x = x.reshape(*lead, rows, bn, cols, bk)
    # XLA's vectorized maximum on a CPU passes over NaN.
    nan = jnp.any(jnp.isnan(x), axis=(-3, -1))
    return jnp.where(nan, jnp.nan, reduce(x, axis=(-3, -1)))


def _store_scale(scale: Array, amax: Array, dtype: str) -> Array:
    """Rounds positive scales to their storage dtype, never to 0; blocks of zeros get 1."""
    zero_block = amax == 0
    if dtype == "float8_e8m0fnu":
        stored = _power_of_two(jnp.where(zero_block, 1.0, scale))
    elif dtype == "float8_e4m3fn":
        smallest = 2.0**-9
        rounded = jnp.maximum(round_to_element(scale, ELEMENTS[dtype]), smallest)
        stored = jnp.where(zero_block, 1.0, rounded).astype(dtype)
    else:
        info = jnp.finfo(dtype)
        bounded = jnp.clip(scale, float(info.tiny), float(info.max))
        stored = jnp.where(zero_block, 1.0, bounded).astype(dtype)
    return stored


def _power_of_two(scale: Array) -> Array:
    """The smallest power of two that is not below a positive float32, as float8_e8m0fnu."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    exponent = (bits + 0x7FFFFF) >> 23
    code = jnp.where(jnp.isnan(scale), 255, jnp.clip(exponent, 1, 254))
    return jax.lax.bitcast_convert_type(code.astype(jnp.uint8), jnp.float8_e8m0fnu)


def _microscale(amax: Array, element: Element) -> Array:
    """Microscaling's block scale: 2**(floor(log2(amax)) - emax), amax first rounded up from 1.75 * 2**e.

    That rounding (compressed-tensors', for fp4 and fp8 alike) moves an amax beyond the grid's end, and
    for fp4 one that would round up to it, into the next binade.
    """
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
    half_ulp = 1 << 21  # of a mantissa of one bit, in float32
    largest_exponent = (
        jax.lax.bitcast_convert_type(jnp.float32(element.max), jnp.int32) >> 23
    ) - 127
    code = jnp.clip(((bits + half_ulp) >> 23) - largest_exponent, 1, 254)
    code = jnp.where(amax == 0, 127, jnp.where(jnp.isnan(amax), 255, code))
    return jax.lax.bitcast_convert_type(code.astype(jnp.uint8), jnp.float8_e8m0fnu)


def _divide(x: Array, divisor: Array) -> Array:
    """x / divisor, correctly rounded as exporters have it.

    XLA turns a division by a broadcast value into a product with its reciprocal, one ulp off for every
    fourth value and on the other side of ties; the barrier hides the broadcast. On a GPU its division itself is
    up to two ulps off (div.full.f32).
    """
    divisor = jax.lax.optimization_barrier(jnp.broadcast_to(divisor, x.shape))
    return jax.lax.platform_dependent(
        x, divisor, cuda=lambda x, d: _corrected(x / d, x, d), default=jnp.divide
    )


def _corrected(quotient: Array, x: Array, divisor: Array) -> Array:
    """x / divisor, correctly rounded, from a quotient within a few ulps.

    The remainder x - quotient * divisor is a float32; it is exact from halves of 12 bits, whose products are
    (Dekker, "A floating-point technique for extending the available precision", 1971). Rounding one of more
    than 24 bits makes no difference then whether or not the compiler fuses it with a sum.
    """
    # Lifts values whose products would be subnormal.
    lift = jnp.where(jnp.abs(divisor) < 2.0**-60, jnp.float32(2.0**64), jnp.float32(1))
    dividend, divisor = x * lift, divisor * lift
    d_high, d_low = _halves(divisor)
    for _ in range(2):  # the first leaves what lies within 2**-21 ulps of a midpoint
        high, low = _halves(quotient)
        rest = dividend - high * d_high - high * d_low - low * d_high - low * d_low
        step = rest / divisor
        # A step of 0 would turn -0 to 0.
        quotient = jnp.where(jnp.isfinite(step) & (step != 0), quotient + step, quotient)
    return quotient


def _halves(x: Array) -> tuple[Array, Array]:
    """x as the sum of its upper 12 bits, rounded, and the rest."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    high = jax.lax.bitcast_convert_type((bits + 0x800) & ~0xFFF, jnp.float32)
    return high, x - high


__all__ = [
    "Grid",
    "compute_grid",
    "dequantize_stored",
    "quantize",
    "quantize_activation",
    "quantize_dequantize",
    "refine_blocks",
    "requantize",
    "round_to_element",
    "round_to_grid",
]
