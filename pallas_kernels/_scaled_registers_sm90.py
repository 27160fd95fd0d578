"""4-bit codes in "wgmma" storage times their scales, as wgmma's left operand in registers.

INT4 codes become 16-bit numbers; the scale rounds each weight once, as a checkpoint's dequantization to 16 bits
does. FP4 codes become e4m3 numbers, and their scales, powers of two, move the numbers' exponents without loss: a
table of the eight magnitudes for each scale makes four weights of one byte permutation (PRMT) and their signs.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from qjax.wgmma_layout import BLOCK, from_words, from_words8

FP4_EXPONENT = 6
"""`fp4_weights` are 2 to this power times the weights, so that 6, the largest code, comes close to e4m3's 448."""

_ONE = 127  # e8m0's code of 1
_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_INT4_BITS = {"bfloat16": (0x4300, 136), "float16": (0x6400, 1032)}  # numbers 128 + u and 1024 + u


def fp4_tables() -> np.ndarray:
    """uint8 [256, 8]: e4m3 bytes of the eight magnitudes times each scale, 2 ** (code - 127 + FP4_EXPONENT).

    Scales are relative to the largest, so none exceeds 1, and codes above 127 stand for numbers below 2^-127
    (see `to_wgmma`): zeros. Magnitudes below 2^-15 of the largest weight are rounded.
    """
    exponents = np.arange(256) - _ONE
    scales = np.where(exponents <= 0, np.exp2(exponents + float(FP4_EXPONENT)), 0.0)
    values = np.outer(scales, _LEVELS).astype(np.float32)
    return np.asarray(values.astype(jnp.float8_e4m3fn)).view(np.uint8)


def fp4_weights(words: Array, scales, tables) -> Array:
    """A block of 64 rows by 128 columns of FP4 weights in registers.

    Args:
        words: int32 [2, 2, 256] of `wgmma_layout.to_words8`, in ``Layout.WG_STRIDED`` with 4 words a thread.
        scales: Shared memory [4, 64]: e8m0 codes of each 32 columns and row, as uint8.
        tables: Shared memory [512], int32: `fp4_tables`.

    Returns:
        [64, 128], float8_e4m3fn, in ``Layout.WGMMA_8BIT``, times 2 ** `FP4_EXPONENT`.
    """
    shape = (BLOCK, 2 * BLOCK)

    def emit(ctx, words, scales, tables):
        del ctx
        return _emit_fp4(words, scales, tables, shape)

    def reference(words, scales, tables):
        codes = from_words8(words[None])
        u = jnp.stack([codes & jnp.uint8(15), codes >> jnp.uint8(4)], axis=-1).reshape(shape)
        bytes_of = lax.bitcast_convert_type(tables, jnp.uint8).reshape(256, 8)
        factor = jnp.repeat(scales.T, 32, axis=1)
        found = bytes_of[factor, u & jnp.uint8(7)] | ((u >> jnp.uint8(3)) << jnp.uint8(7))
        return lax.bitcast_convert_type(found, jnp.float8_e4m3fn)

    emit.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    layout = plgpu.Layout.WG_STRIDED(words.shape, vec_size=4)
    out = plgpu.ShapeDtypeStruct(shape, jnp.float8_e4m3fn, layout=plgpu.Layout.WGMMA_8BIT)
    types = (layout, plgpu.RefType(), plgpu.RefType())
    return plgpu.inline_mgpu(arg_types=types, return_type=out)(emit)(words, scales, tables)


def _emit_fp4(words, scales, tables, shape) -> fa.FragmentedArray:
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    vec4 = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
    out = np.empty(fa.WGMMA_LAYOUT_8BIT.registers_shape(shape), dtype=object)
    flat = out.reshape(-1)
    registers = list(words.registers.flat)
    rows = [_row(half) for half in (0, 1)]
    for block in range(shape[1] // BLOCK):
        for j in range(2):
            group = 2 * block + j
            for half in (0, 1):
                scale = memref.load(scales, [arith.constant(index, group), rows[half]])
                first = arith.shli(arith.extui(i32, scale), utils.c(1, i32))
                table = _load_pair(tables, first)
                code = vector.extract(registers[block], [], [2 * j + half])
                results = llvm.inline_asm(
                    llvm.StructType.get_literal([i32] * 2),
                    [code, *table],
                    _FP4_PTX,
                    "=&r,=&r,r,r,r",
                )
                for p in (0, 1):
                    value = llvm.extractvalue(i32, results, [p])
                    flat[4 * group + 2 * p + half] = utils.bitcast(value, vec4)
    return fa.FragmentedArray(_registers=out, _layout=fa.WGMMA_LAYOUT_8BIT, _is_signed=None)


# Magnitudes are selectors of the table's bytes; lop3 0xEA: (a & b) | c adds the signs.
_FP4_PTX = """{
.reg .b32 m, s;
and.b32 m, $2, 0x77777777;
prmt.b32 $0, $3, $4, m;
lop3.b32 $0, $2, 0x80808080, $0, 0xEA;
shr.b32 m, m, 16;
shl.b32 s, $2, 4;
prmt.b32 $1, $3, $4, m;
lop3.b32 $1, s, 0x80808080, $1, 0xEA;
}"""


def _load_pair(ref, first: ir.Value) -> list[ir.Value]:
    """Two consecutive 32-bit words of shared memory, by one load."""
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    pair = vector.load(ir.VectorType.get((2,), i32), ref, [arith.index_cast(index, first)])
    return [vector.extract(pair, [], [i]) for i in (0, 1)]


def _row(half: int) -> ir.Value:
    """The row of a block that this thread's registers hold, of its two."""
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    thread = arith.remui(utils.thread_idx(), utils.c(128, i32))
    warp = arith.divui(thread, utils.c(32, i32))
    lane = arith.remui(thread, utils.c(32, i32))
    row = arith.addi(arith.muli(warp, utils.c(16, i32)), arith.divui(lane, utils.c(4, i32)))
    return arith.index_cast(index, arith.addi(row, utils.c(8 * half, i32)))


def int4_weights(words: Array, scales, dtype: DTypeLike) -> Array:
    """A block of 64 by 64 INT4 weights in registers.

    Args:
        words: int32 [1, 2, 256] of `wgmma_layout.to_words`, in ``Layout.WG_STRIDED`` with 4 words a thread.
        scales: Shared memory [G, 64] of `dtype`, G = 1 or 2 groups of columns.
        dtype: bfloat16 or float16.

    Returns:
        [64, 64] of `dtype` in ``Layout.WGMMA``.
    """
    dtype = jnp.dtype(dtype)

    def emit(ctx, words, scales):
        del ctx
        return _emit_int4(words, scales, dtype)

    def reference(words, scales):
        codes = from_words(words[None])  # [64, 32]
        u = jnp.stack([codes & jnp.uint8(15), codes >> jnp.uint8(4)], axis=-1).reshape(BLOCK, BLOCK)
        factor = jnp.repeat(scales.T.astype(jnp.float32), BLOCK // scales.shape[0], axis=1)
        return ((u.astype(jnp.float32) - 8) * factor).astype(dtype)

    emit.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_STRIDED(words.shape, vec_size=4), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((BLOCK, BLOCK), dtype, layout=plgpu.Layout.WGMMA),
    )(emit)(words, scales)


def _emit_int4(words, scales, dtype) -> fa.FragmentedArray:
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    kind = ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get()
    pair, i16 = ir.VectorType.get((2,), kind), ir.IntegerType.get_signless(16)
    groups = ir.MemRefType(scales.type).shape[0]

    def factor(group: int, half: int) -> ir.Value:
        """What multiplies this thread's weights, twice in 32 bits."""
        value = memref.load(scales, [arith.constant(index, group), _row(half)])
        return arith.muli(arith.extui(i32, utils.bitcast(value, i16)), utils.c(0x00010001, i32))

    factors = [[factor(g, half) for half in (0, 1)] for g in range(groups)]
    out = np.empty(fa.WGMMA_LAYOUT.registers_shape((BLOCK, BLOCK)), dtype=object)
    (register,) = words.registers.flat
    for j in range(BLOCK // 16):
        code = vector.extract(register, [], [j])
        results = llvm.inline_asm(
            llvm.StructType.get_literal([i32] * 4),
            [code, *factors[j * groups // 4]],
            _int4_ptx(dtype),
            "=&r,=&r,=&r,=&r,r,r,r",
        )
        for i in range(4):  # 8 columns i / 2, row half i % 2
            value = utils.bitcast(llvm.extractvalue(i32, results, [i]), pair)
            out[0, 2 * j + i // 2, 0, 0, i % 2, 0, 0, 0, 0] = value
    return fa.FragmentedArray(_registers=out, _layout=fa.WGMMA_LAYOUT, _is_signed=None)


def _int4_ptx(dtype) -> str:
    bits, offset = _INT4_BITS[dtype.name]
    kind = "rn.bf16x2" if dtype == jnp.bfloat16 else "f16x2"
    subtrahend = int(np.asarray(offset, dtype).view(np.uint16)) * 0x10001
    lines = ["{", ".reg .b32 t<4>, o;", f"mov.b32 o, {subtrahend:#x};"]
    for i in range(4):
        lines.append(f"shr.b32 t{i}, $4, {4 * i};")
        lines.append(f"lop3.b32 t{i}, t{i}, 0x000F000F, {bits * 0x10001:#x}, 0xEA;")
        lines.append(f"sub.{kind} t{i}, t{i}, o;")
        lines.append(f"mul.{kind} ${i}, t{i}, ${5 + i % 2};")
    return "\n".join([*lines, "}"])
