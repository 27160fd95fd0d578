"""INT4 codes in "wgmma8" storage as 8-bit numbers: wgmma's left operand in registers, exact.

With u = q + 8 a code, z = zero_point + 8, and bytes that are computed four at a time:

    int8             ``(u << 4) ^ 0x80`` is 16 q: a mask, and a shift for every other register    3 / 8 a weight
    int8, zeros      ``((u | 0x80) - z) ^ 0x80`` is u - z, and no byte borrows of its neighbour   7 / 8
    float8_e4m3fn    e4m3's codes 0 to 16 are the numbers 0 to 16 times 2^-9 (subnormal up to 7): the magnitude is
                     VABSDIFF4(u, z), and bit 7 of ``0x7F + z - u`` its sign                      9 / 8

instructions, none of them float32's. In SASS, where shifts may become multiplications (IMAD), a warp's stage of 128
columns and 16 tokens (64 weights a thread, whose products are loaded, scaled and summed as well) is 86, 128 and 125.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from qjax.pallas_kernels._mixed_gemm_registers_sm90 import words_layout
from qjax.wgmma_layout import BLOCK, from_words8

_MAGIC = 2.0**23  # float32 numbers from here on end in the bits of an integer


def eight_bit_factor(dtype: DTypeLike, *, zeros: bool) -> float:
    """What a sum of products with `eight_bit_weights` lacks."""
    if jnp.dtype(dtype) == jnp.int8:
        return 1.0 if zeros else 1 / 16
    return 2.0**9


def eight_bit_weights(
    words: Array, dtype: DTypeLike, zero_point: Array | None, *, first: int, width: int
) -> Array:
    """Differences q - zero_point of 64 rows, divided by `eight_bit_factor`.

    Args:
        words: int32 [blocks, 2, 256] of `wgmma_layout.to_words8`, in ``Layout.WG_STRIDED`` with 4 words a thread.
        dtype: int8 or float8_e4m3fn.
        zero_point: float32 [64] in ``Layout.WGMMA.reduce(1)``, integers from -8 to 8; None for zeros.
        first: First column wanted, a multiple of 32.
        width: Columns wanted, a multiple of 32.

    Returns:
        [64, width] in ``Layout.WGMMA_8BIT``.
    """
    dtype, shape = jnp.dtype(dtype), (BLOCK, width)
    zeros = zero_point is not None

    def emit(ctx, words, *offset):
        del ctx
        return _emit(words, offset, first, shape, dtype)

    def reference(words, *offset):
        codes = from_words8(words[None], "int4")
        u = jnp.stack([codes & jnp.uint8(15), codes >> jnp.uint8(4)], axis=-1).reshape(BLOCK, -1)
        z = (offset[0] - _MAGIC)[:, None] if zeros else 8.0
        q = u[:, first : first + width].astype(jnp.float32) - z
        return (q / eight_bit_factor(dtype, zeros=zeros)).astype(dtype)

    emit.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    offsets = () if zero_point is None else (zero_point + (_MAGIC + 8),)
    return plgpu.inline_mgpu(
        arg_types=(words_layout(words.shape), *(plgpu.Layout.WGMMA.reduce(1) for _ in offsets)),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.WGMMA_8BIT),
    )(emit)(words, *offsets)


def _emit(words, offset, first: int, shape, dtype) -> fa.FragmentedArray:
    i32, integers = ir.IntegerType.get_signless(32), dtype == jnp.int8
    kind = ir.IntegerType.get_signless(8) if integers else ir.Float8E4M3FNType.get()
    quad = ir.VectorType.get((4,), kind)
    if integers and not offset:
        inputs, ptx = [[], []], _SYMMETRIC
    else:
        inputs = [[_repeated(offset, half)] for half in (0, 1)]
        ptx = _DIFFERENCES if integers else _FLOATS
    count = len(inputs[0])
    constraints = ",".join(["=&r"] * 2 + ["r"] * (1 + count))
    registers = list(words.registers.flat)
    out = np.empty(fa.WGMMA_LAYOUT_8BIT.registers_shape(shape), dtype=object)
    flat = out.reshape(-1)
    for g in range(shape[1] // 32):
        block, j = divmod(first // 32 + g, 2)
        for half in (0, 1):
            code = vector.extract(registers[block], [], [2 * j + half])
            results = llvm.inline_asm(
                llvm.StructType.get_literal([i32] * 2), [code, *inputs[half]], ptx, constraints
            )
            for p in (0, 1):  # of each 32 columns, the lower and the upper 16
                flat[4 * g + 2 * p + half] = utils.bitcast(
                    llvm.extractvalue(i32, results, [p]), quad
                )
    return fa.FragmentedArray(
        _registers=out, _layout=fa.WGMMA_LAYOUT_8BIT, _is_signed=integers or None
    )


def _repeated(offset, half: int) -> ir.Value:
    """z in each byte of a register, for this thread's upper or lower row."""
    i32 = ir.IntegerType.get_signless(32)
    if not offset:
        return llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, 0x08080808)).result
    bits = utils.bitcast(offset[0].registers[0, 0, half, 0, 0], i32)
    return llvm.inline_asm(i32, [bits], "prmt.b32 $0, $1, $1, 0;", "=r,r")


def _block(*lines: str) -> str:
    return "\n".join(["{", ".reg .b32 t, u, none;", *lines, "}"])


# Outputs $0 and $1 of the word $2 and z $3. lop3's tables: 0x6A is (a & b) ^ c, 0xEA (a & b) | c, 0xF8 a | (b & c).
_SYMMETRIC = _block(
    "shl.b32 t, $2, 4;",
    "lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A;",
    "lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;",
)
_DIFFERENCES = _block(
    "lop3.b32 t, $2, 0x0F0F0F0F, 0x80808080, 0xEA;",
    "sub.u32 t, t, $3;",
    "xor.b32 $0, t, 0x80808080;",
    "shr.b32 u, $2, 4;",
    "lop3.b32 t, u, 0x0F0F0F0F, 0x80808080, 0xEA;",
    "sub.u32 t, t, $3;",
    "xor.b32 $1, t, 0x80808080;",
)
_FLOATS = _block(
    "mov.b32 none, 0;",  # what vabsdiff4 takes the place of, byte by byte: all
    "and.b32 t, $2, 0x0F0F0F0F;",
    "vabsdiff4.u32.u32.u32 $0, t, $3, none;",
    "add.u32 u, $3, 0x7F7F7F7F;",
    "sub.u32 t, u, t;",
    "lop3.b32 $0, $0, t, 0x80808080, 0xF8;",
    "shr.b32 t, $2, 4;",
    "and.b32 t, t, 0x0F0F0F0F;",
    "vabsdiff4.u32.u32.u32 $1, t, $3, none;",
    "sub.u32 t, u, t;",
    "lop3.b32 $1, $1, t, 0x80808080, 0xF8;",
)
