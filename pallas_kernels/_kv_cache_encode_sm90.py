"""What writing a KV cache needs besides `_quantize_sm90`: rotation in fused steps, and NVFP4's codes and scales.

Hopper has no instructions for float4_e2m1fn: codes are made of float32 bits.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector
from jaxlib.mlir.dialects import math as mlir_math

from qjax.pallas_kernels import _quantize_sm90 as tools

E4M3_SMALLEST, E4M3_NORMAL, E4M3_LARGEST = 2.0**-9, 2.0**-6, 448.0
E2M1_LARGEST = 6.0


def multiply_add(x: Array, y: Array, z: Array, layout) -> Array:
    """x * y + z of float32, rounded once, as XLA compiles it for GPUs."""

    def emit(ctx, x, y, z):
        del ctx
        return tools._map_registers(mlir_math.fma, x, y, z)

    emit.interpret_impl = lambda x, y, z: x * y + z  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(layout,) * 3,
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout),
    )(emit)(x, y, z)


def e4m3_block_scale(amax: Array, global_scale: Array, layout) -> tuple[Array, Array]:
    """NVFP4's scales of blocks: float8_e4m3fn codes as uint8, and their float32 values.

    amax / 6 / global_scale, correctly rounded in each step, never rounded to 0; 1 where amax is 0.

    Args:
        amax: float32.
        global_scale: float32 of amax's shape.
        layout: Layout of both and of the results.
    """
    reciprocal = float(np.float32(1 / E2M1_LARGEST))
    sixth = lax.optimization_barrier(amax * reciprocal)
    # Each part of the remainder is exact.
    remainder = (amax - sixth * 8.0) + sixth * 2.0
    scale = tools.quantize(sixth + remainder * reciprocal, global_scale, jnp.float32, layout)
    scale = jnp.minimum(jnp.maximum(scale, E4M3_SMALLEST), E4M3_LARGEST)
    scale = jnp.where(amax == 0, 1.0, scale)
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    even = lax.shift_right_logical(bits, jnp.int32(20)) & 1
    normal = lax.bitcast_convert_type((bits + 0x7FFFF + even) & ~0xFFFFF, jnp.float32)
    # Adding 2**14, whose neighbours are 2**-9 away, rounds to multiples of that.
    subnormal = lax.optimization_barrier(scale + 2.0**14) - 2.0**14
    value = jnp.where(scale >= E4M3_NORMAL, normal, subnormal)
    bits = lax.bitcast_convert_type(value, jnp.int32)
    code = lax.shift_right_logical(bits, jnp.int32(20)) - (120 << 3)
    counted = jnp.where(value >= E4M3_NORMAL, 0.0, value * 2.0**9).astype(jnp.int32)
    code = jnp.where(value >= E4M3_NORMAL, code, counted)
    code = jnp.where(value != value, 0x7F, code)
    return code.astype(jnp.uint8), value


def encode_e2m1(x: Array, layout, packed_layout) -> Array:
    """Packed float4_e2m1fn codes uint8 [..., K/2] of float32 [..., K], the even column in the low half.

    Rounded to nearest, ties to even, saturated at 6; NaN becomes 0.

    Args:
        x: The values.
        layout: Their layout: a thread has one vector of 2, 4 or 8 columns.
        packed_layout: The result's layout: half as many in the same thread.
    """

    def emit(ctx, x):
        del ctx
        registers = np.empty_like(x.registers)
        for index in np.ndindex(registers.shape):
            registers[index] = _emit_e2m1(x.registers[index])
        to_layout = packed_layout.to_mgpu()
        shape = to_layout.registers_shape((*x.shape[:-1], x.shape[-1] // 2))
        return fa.FragmentedArray(
            _registers=registers.reshape(shape), _layout=to_layout, _is_signed=False
        )

    def reference(x):
        a = jnp.abs(x)
        # A half-way point belongs to the even code.
        steps = (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0)
        code = sum(step.astype(jnp.uint8) for step in steps)
        code |= (jnp.signbit(x) & ~jnp.isnan(x)).astype(jnp.uint8) << jnp.uint8(3)
        return code[..., 0::2] | (code[..., 1::2] << jnp.uint8(4))

    emit.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    return plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.uint8, layout=packed_layout),
    )(emit)(x)


def _emit_e2m1(x: ir.Value) -> ir.Value:
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    (n,) = ir.VectorType(x.type).shape
    ints = ir.VectorType.get((n,), i32)

    def real(value):
        return vector.broadcast(x.type, arith.constant(f32, float(value)))

    def whole(value):
        return vector.broadcast(ints, arith.constant(i32, value))

    sign = arith.andi(arith.shrui(arith.bitcast(ints, x), whole(28)), whole(8))
    magnitude = arith.minimumf(mlir_math.absf(x), real(E2M1_LARGEST))
    # Below 2 codes are halves: 2**22, whose neighbours are a half away, rounds to them.
    low = arith.andi(arith.bitcast(ints, arith.addf(magnitude, real(2**22))), whole(7))
    # From 2 on they are the upper bits, one of the mantissa; 1.0 has code 2 and exponent 127.
    bits = arith.bitcast(ints, magnitude)
    even = arith.andi(arith.shrui(bits, whole(22)), whole(1))
    high = arith.addi(arith.addi(bits, whole(0x1FFFFF)), even)
    high = arith.subi(arith.shrui(high, whole(22)), whole(2 * 127 - 2))
    below = arith.cmpf(arith.CmpFPredicate.OLT, magnitude, real(2))
    code = arith.ori(arith.select(below, low, high), sign)
    code = arith.select(arith.cmpf(arith.CmpFPredicate.UNO, x, x), whole(0), code)
    packed = arith.constant(i32, 0)
    for i in range(n):
        shift = arith.constant(i32, 4 * i)
        packed = arith.ori(packed, arith.shli(vector.extract(code, [], [i]), shift))
    word = ir.IntegerType.get_signless(4 * n)
    packed = packed if n == 8 else arith.trunci(word, packed)
    packed = vector.broadcast(ir.VectorType.get((1,), word), packed)
    return vector.bitcast(ir.VectorType.get((n // 2,), ir.IntegerType.get_signless(8)), packed)
