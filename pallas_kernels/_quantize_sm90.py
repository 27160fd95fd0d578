"""What the quantizing kernels share: register layouts, scales, exact division, SiLU.

Rounding is to nearest, ties to even; values past the grid saturate, infinities too, and do not count in an
amax; NaN stays NaN.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, vector
from jaxlib.mlir.dialects import math as mlir_math

THREADS = 128  # of a warpgroup
TINY = float(jnp.finfo(jnp.float32).tiny)


def row_major_layout(shape: tuple[int, ...], *, per_thread: int = 0):
    """The layout of a small array whose consecutive elements lie in consecutive threads.

    Unlike ``Layout.WG_STRIDED`` it can be reduced along one axis.

    Args:
        shape: Sizes, powers of two.
        per_thread: Elements of a thread, at least as many as divide evenly (the default); where they are more,
            warps and lanes hold the same.
    """
    size, rank = math.prod(shape), len(shape)
    per_thread = per_thread or max(size // THREADS, 1)
    in_warp = min(32 * per_thread, size)
    copies, lane_copies = 4 * in_warp // size, 32 * per_thread // in_warp
    lanes, left = [], in_warp
    for n in reversed(shape):
        lanes.insert(0, min(n, left))
        left //= lanes[0]
    vector_tile = (*(1 for _ in shape[1:]), per_thread)
    warp_dims = tuple(range(-3 * rank, -2 * rank))
    layout = fa.TiledLayout(
        fa.Tiling((shape, tuple(lanes), vector_tile)),
        (*((fa.Replicated(copies),) if copies > 1 else ()), *warp_dims),
        (
            *((fa.Replicated(lane_copies),) if lane_copies > 1 else ()),
            *range(-2 * rank, -rank),
        ),
        -1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def chunks(first, blocks: int, *, most: int, least: int = 1) -> list[tuple]:
    """(first block, blocks) of the parts of a row, powers of two, which `row_major_layout` needs.

    Args:
        first: Where the row's blocks begin, a number or a traced one.
        blocks: How many there are, at least `least`.
        most: Of a part, a power of two.
        least: Likewise; the last part may repeat blocks.
    """
    parts, done = [], 0
    while done < blocks:
        size = min(most, max(1 << ((blocks - done).bit_length() - 1), least))
        parts.append((first + min(done, blocks - size), size))
        done += size
    return parts


def largest(dtype: DTypeLike) -> float:
    """The dtype's largest finite value."""
    return float(jnp.finfo(dtype).max)


def finite_magnitude(x: Array) -> Array:
    """|x|, but 0 for infinities."""
    magnitude = jnp.abs(x)
    return jnp.where(magnitude == jnp.inf, 0.0, magnitude)


def row_amax(x: Array) -> Array:
    """The float32 largest finite magnitudes of the rows of a 16-bit array, NaN of rows that have one.

    On the bits, two elements an instruction: magnitudes order as integers do, with infinity and then NaN at the
    end, which an offset turns into negative ones.
    """
    infinity = 0x7F80 if x.dtype == jnp.bfloat16 else 0x7C00
    offset = 2**15 - infinity
    magnitude = lax.bitcast_convert_type(x, jnp.int16) & 0x7FFF
    finite = jnp.maximum(jnp.max(magnitude + offset, axis=1), offset) - offset
    amax = lax.bitcast_convert_type(finite, x.dtype).astype(jnp.float32)
    return jnp.where(jnp.max(magnitude, axis=1) > infinity, jnp.nan, amax)


def scale_of(
    amax: Array, end: float, *, amax_min: float = 0.0, amax_max: float | None = None
) -> Array:
    """The float32 scales that map amax, bounded first, to the grid's end; 1 where it is 0."""
    if amax_min:
        amax = jnp.maximum(amax, amax_min)
    if amax_max is not None:
        amax = jnp.minimum(amax, amax_max)
    # Correctly rounded without a division, as in `quantize`: end is 7 * 2**i, so the remainder is exact in parts.
    reciprocal = float(np.float32(1 / end))
    scale = lax.optimization_barrier(amax * reciprocal)
    remainder = (amax - scale * (end * 8 / 7)) + scale * (end / 7)
    scale = scale + remainder * reciprocal
    return jnp.where(amax == 0, 1.0, jnp.maximum(scale, TINY))


def divide(x: Array, divisor: Array) -> Array:
    """x / divisor, correctly rounded as exporters divide: XLA would multiply by the reciprocal in interpret mode."""
    return x / lax.optimization_barrier(divisor)


def round_to(x: Array, dtype: DTypeLike) -> Array:
    """The nearest values of a float8 dtype."""
    return jnp.maximum(jnp.minimum(x, largest(dtype)), -largest(dtype)).astype(dtype)


def quantize(x: Array, scale: Array, dtype: DTypeLike, layout) -> Array:
    """Codes of x / scale: three multiplications an element instead of a division, with the same result.

    The product with the rounded reciprocal is corrected by its exact remainder (Markstein, "Computation of
    elementary functions on the IBM RISC System/6000 processor", 1990).

    Args:
        x: float32.
        scale: float32 of x's shape, the same for all elements of a thread's vector.
        dtype: A float8 dtype, or float32 for the quotient itself, saturated at `QUOTIENT_MAX`.
        layout: Layout of x, scale and the result.
    """
    dtype = jnp.dtype(dtype)

    def emit(ctx, x, scale):
        del ctx
        quotient = _map_registers(_emit_quotient, x, scale)
        if dtype == jnp.float32:
            return quotient
        return quotient.astype(utils.dtype_to_ir_type(dtype))  # saturates

    def reference(x, scale):
        quotient = divide(x, scale)
        if dtype == jnp.float32:
            return jnp.clip(quotient, -QUOTIENT_MAX, QUOTIENT_MAX)
        return round_to(quotient, dtype)

    emit.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(layout, layout),
        return_type=plgpu.ShapeDtypeStruct(x.shape, dtype, layout=layout),
    )(emit)(x, scale)


QUOTIENT_MAX = (
    2.0**17
)  # past the end of every grid, and its remainder is no NaN even for an infinite x


def _emit_quotient(x: ir.Value, scale: ir.Value) -> ir.Value:
    f32, shape = ir.F32Type.get(), ir.VectorType(x.type)

    def constant(value):
        return vector.broadcast(shape, arith.constant(f32, value))

    divisor = vector.extract(scale, [], [0])
    one = arith.constant(f32, 1.0)
    # arith.divf is rcp.approx.f32 here, an ulp off; rcp.rn.f32 would be a call, around which registers spill.
    reciprocal = arith.divf(one, divisor)
    error = mlir_math.fma(arith.negf(reciprocal), divisor, one)
    reciprocal = vector.broadcast(shape, mlir_math.fma(error, reciprocal, reciprocal))
    q = arith.mulf(x, reciprocal)
    q = arith.maximumf(arith.minimumf(q, constant(QUOTIENT_MAX)), constant(-QUOTIENT_MAX))
    # The remainder's negative, so that -0 stays -0.
    excess = mlir_math.fma(q, vector.broadcast(shape, divisor), arith.negf(x))
    return mlir_math.fma(arith.negf(excess), reciprocal, q)


def silu(x: Array, layout) -> Array:
    """x * sigmoid(x) of float32, within a few units in the last place."""

    def emit(ctx, x):
        del ctx
        return _map_registers(_emit_silu, x)

    emit.interpret_impl = jax.nn.silu  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout),
    )(emit)(x)


def _emit_silu(x: ir.Value) -> ir.Value:
    f32, shape = ir.F32Type.get(), ir.VectorType(x.type)
    one, minus_log2e = (arith.constant(f32, c) for c in (1.0, -math.log2(math.e)))
    out = x
    for i in range(shape.shape[0]):
        element = vector.extract(x, [], [i])
        power = nvvm.ex2(arith.mulf(element, minus_log2e), ftz=True)
        sigmoid = nvvm.rcp_approx_ftz_f(arith.addf(power, one))
        out = vector.insert(arith.mulf(element, sigmoid), out, [], [i])
    return out


def _map_registers(fn, first: fa.FragmentedArray, *others: fa.FragmentedArray):
    registers = np.empty_like(first.registers)
    for index in np.ndindex(registers.shape):
        registers[index] = fn(*(a.registers[index] for a in (first, *others)))
    return fa.FragmentedArray(_registers=registers, _layout=first.layout, _is_signed=None)
