"""INT4 codes that `repack` laid out, as wgmma's left operand in registers.

``bits | u`` is a number ``bias + u``, so one ``lop3`` makes two 16-bit floats from nibbles i and i + 4 of a word.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from qjax.wgmma_layout import BLOCK

MINUS_ONES = "0xBF80BF80"
"""Two bfloat16 numbers."""

# 128 + u and 1024 + u are the numbers whose bits end in u.
_BIAS = {"bfloat16": (0x4300, 128), "float16": (0x6400, 1024)}


def bias_of(dtype: DTypeLike) -> float:
    """What 16-bit float bits | u exceed q by: the bits' bias and the code's."""
    return float(_BIAS[jnp.dtype(dtype).name][1] + 8)


def dequantize(
    words: Array,
    dtype: DTypeLike,
    offset: Array | None,
    *,
    first: int,
    width: int,
    zero: int = 0,
    ampere: bool = False,
) -> Array:
    """Differences q - zero_point as 16-bit floats.

    Args:
        words: int32 [blocks, 2, 256] from `repack`, in ``Layout.WG_STRIDED`` with 4 words a thread.
        dtype: bfloat16 or float16.
        offset: zero_point plus 136 (bfloat16) or 1032, [64] in ``Layout.WGMMA.reduce(1)`` and `dtype`; None
            where all are `zero`.
        first: First column wanted, a multiple of 16.
        width: Columns wanted, a multiple of 16.
        zero: The zero point of all weights, where `offset` is None.
        ampere: Whether to use no instruction that compute capability 8.0 lacks.

    Returns:
        [64, width] in ``Layout.WGMMA``.
    """
    shape, dtype = (BLOCK, width), jnp.dtype(dtype)

    def emit(ctx, words, *offset):
        del ctx
        return _emit_dequantize(words, offset, first, shape, dtype, zero, ampere)

    def reference(words, *offset):
        w = lax.bitcast_convert_type(words.reshape(-1, 4, 8, 4, 4), jnp.uint32)
        shifts = [16 * e + 8 * p + 4 * h for h in (0, 1) for p in (0, 1) for e in (0, 1)]
        w = (w[..., None] >> jnp.array(shifts, jnp.uint32).reshape(1, 1, 1, 1, 1, 8)) & jnp.uint32(
            15
        )
        w = w.reshape(
            *w.shape[:5], 2, 2, 2
        )  # block, warp, row, pair, 16 columns, half, 8 columns, e
        w = w.transpose(1, 5, 2, 0, 4, 6, 3, 7).reshape(BLOCK, -1)[:, first : first + width]
        subtrahend = offset[0][:, None].astype(jnp.float32) if offset else bias_of(dtype) + zero
        return (w.astype(jnp.float32) + (bias_of(dtype) - 8) - subtrahend).astype(dtype)

    emit.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    offsets = () if offset is None else (offset,)
    return plgpu.inline_mgpu(
        arg_types=(
            plgpu.Layout.WG_STRIDED(words.shape, vec_size=4),
            *(plgpu.Layout.WGMMA.reduce(1) for _ in offsets),
        ),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.WGMMA),
    )(emit)(words, *offsets)


def subtraction(dtype: DTypeLike, target: str, a: str, b: str, *, ampere: bool) -> str:
    """PTX of target = a - b in pairs of 16-bit floats, rounded once; c must hold `MINUS_ONES`."""
    if jnp.dtype(dtype) == jnp.float16:
        return f"sub.f16x2 {target}, {a}, {b};"
    if ampere:  # sub.bf16x2 is of compute capability 9.0
        return f"fma.rn.bf16x2 {target}, {b}, c, {a};"
    return f"sub.rn.bf16x2 {target}, {a}, {b};"


def _emit_dequantize(
    words, offset, first: int, shape, dtype, zero: int, ampere: bool
) -> fa.FragmentedArray:
    bits, _ = _BIAS[dtype.name]
    i32 = ir.IntegerType.get_signless(32)
    element = ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get()
    pair = ir.VectorType.get((2,), element)
    lines = ["{", ".reg .b32 t<4>, c;", f"mov.b32 c, {MINUS_ONES};", "mov.b32 t0, $4;"]
    lines += [f"shr.b32 t{i}, $4, {4 * i};" for i in (1, 2, 3)]
    for i in range(4):  # register i: 8 columns i / 2, row half i % 2
        lines.append(f"lop3.b32 t{i}, t{i}, 0x000F000F, {bits * 0x10001:#x}, 0xEA;")  # (a & b) | c
        lines.append(subtraction(dtype, f"${i}", f"t{i}", f"${5 + i % 2}", ampere=ampere))
    ptx = "\n".join([*lines, "}"])
    symmetric = int(np.asarray(bias_of(dtype) + zero, dtype).view(np.uint16)) * 0x10001
    offsets = [llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, symmetric)).result] * 2
    if offset:
        halves = [offset[0].registers[0, 0, half, 0, 0] for half in (0, 1)]
        offsets = [utils.bitcast(utils.vector_concat([v, v]), i32) for v in halves]
    out = np.empty(fa.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
    registers = list(words.registers.flat)
    for j in range(shape[1] // 16):
        block, word = divmod(first // 16 + j, 4)
        code = vector.extract(registers[block], [], [word])
        results = llvm.inline_asm(
            llvm.StructType.get_literal([i32] * 4),
            [code, *offsets],
            ptx,
            "=&r,=&r,=&r,=&r,r,r,r",
        )
        for i in range(4):
            value = utils.bitcast(llvm.extractvalue(i32, results, [i]), pair)
            out[0, 2 * j + i // 2, 0, 0, i % 2, 0, 0, 0, 0] = value
    return fa.FragmentedArray(_registers=out, _layout=fa.WGMMA_LAYOUT, _is_signed=None)
