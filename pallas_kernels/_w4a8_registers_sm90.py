"""INT4 codes in "wgmma8" storage as 8-bit numbers: wgmma's left operand in registers, exact.

With u = q + 8 a code, z = zero_point + 8, and bytes that are computed four at a time:

    int8             ``(u << 4) ^ 0x80`` is 16 q: a mask, and a shift for every other register    3 / 8 a weight
    int8, zeros      ``((u | 0x80) - z) ^ 0x80`` is u - z, and no byte borrows of its neighbour   7 / 8
    float8_e4m3fn    e4m3's codes 0 to 16 are the numbers 0 to 16 times 2^-9 (subnormal up to 7): the magnitude is
                     VABSDIFF4(u, 8), and bit 7 its sign, the inverse of u's highest bit          8 / 8
      zeros          VABSDIFF4(u, z), and bit 7 of ``0x7F + z - u``                               9 / 8

instructions, none of them float32's; shifts may become multiplications (IMAD).
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from qjax.wgmma_layout import from_words8

COLUMNS = 32
"""Columns of wgmma's fragment of 8-bit numbers: four registers of a thread."""

MAGIC = 2.0**23
"""Float32 numbers from here on end in the bits of an integer."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Instructions that make 8-bit weights.

    Attributes:
        width: Columns.
        inputs: Registers of 32 bits that the instructions read.
        lines: PTX that makes the i-th fragment's four registers, given their names and those of `inputs`.
    """

    width: int
    inputs: Sequence[ir.Value]
    lines: Callable[[int, Sequence[str], Sequence[str]], list[str]]


def eight_bit_factor(dtype: DTypeLike, *, zeros: bool) -> float:
    """What a sum of products with `eight_bit_weights` lacks."""
    if jnp.dtype(dtype) == jnp.int8:
        return 1.0 if zeros else 1 / 16
    return 2.0**9


def eight_bit_weights(
    words: Array, dtype: DTypeLike, zero_point: Array | None, *, first: int, width: int
) -> Array:
    """What `decoding` makes: differences q - zero_point of 64 rows, divided by `eight_bit_factor`.

    Args:
        words: int32 [blocks, 2, 256] of `wgmma_layout.to_words8`.
        dtype: int8 or float8_e4m3fn.
        zero_point: float32 [64], integers from -8 to 8; None for zeros.
        first: First column wanted.
        width: Columns wanted.

    Returns:
        [64, width].
    """
    codes = from_words8(words[None], "int4")
    u = jnp.stack([codes & jnp.uint8(15), codes >> jnp.uint8(4)], axis=-1)
    q = u.reshape(codes.shape[0], -1)[:, first : first + width].astype(jnp.float32) - 8
    q = q if zero_point is None else q - zero_point[:, None]
    return (q / eight_bit_factor(dtype, zeros=zero_point is not None)).astype(dtype)


def decoding(words, offset, dtype: DTypeLike, *, first: int, width: int) -> Decoding:
    """The instructions for a thread of a warpgroup, whose fragments are wgmma's.

    Args:
        words: FragmentedArray [blocks, 2, 256], int32, in ``WG_STRIDED`` with 4 words a thread.
        offset: FragmentedArray [64] in ``WGMMA.reduce(1)``: zero_point + `MAGIC` + 8; None for zeros.
        dtype: int8 or float8_e4m3fn.
        first: First column wanted, a multiple of 32.
        width: Columns wanted, a multiple of 32.
    """
    registers, codes = list(words.registers.flat), []
    for chunk in range(width // COLUMNS):
        block, j = divmod(first // COLUMNS + chunk, 2)
        codes += [vector.extract(registers[block], [], [2 * j + half]) for half in (0, 1)]
    zeros = [] if offset is None else [_repeated(offset, half) for half in (0, 1)]
    if jnp.dtype(dtype) == jnp.int8:
        ptx = _DIFFERENCES if zeros else _SYMMETRIC
    else:
        ptx = _FLOATS if zeros else _SYMMETRIC_FLOATS

    def lines(chunk, fragment, inputs):
        zeros = inputs[len(codes) :]
        found = []
        for half in (
            0,
            1,
        ):  # rows; of each 32 columns, the lower and the upper 16 are a word's outputs
            names = [*fragment[half::2], inputs[2 * chunk + half], *zeros[half : half + 1]]
            found.append(re.sub(r"\$(\d)", lambda match, names=names: names[int(match[1])], ptx))
        return found

    return Decoding(width, [*codes, *zeros], lines)


def _repeated(offset, half: int) -> ir.Value:
    """z in each byte of a register, for this thread's upper or lower row."""
    i32 = ir.IntegerType.get_signless(32)
    bits = utils.bitcast(offset.registers[0, 0, half, 0, 0], i32)
    return llvm.inline_asm(i32, [bits], "prmt.b32 $0, $1, $1, 0;", "=r,r")


def _block(*lines: str) -> str:
    return "\n".join(["{", ".reg .b32 t, u, none, eights;", *lines, "}"])


# Outputs $0 and $1 of the word $2 and z $3. lop3's tables: 0x6A is (a & b) ^ c, 0xEA (a & b) | c, 0xF8 a | (b & c),
# 0xF2 a | (~b & c). `none` is what vabsdiff4 takes the place of, byte by byte: all.
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
_SYMMETRIC_FLOATS = _block(
    "mov.b32 none, 0;",
    "mov.b32 eights, 0x08080808;",
    "and.b32 t, $2, 0x0F0F0F0F;",
    "vabsdiff4.u32.u32.u32 $0, t, eights, none;",
    "shl.b32 u, $2, 4;",
    "lop3.b32 $0, $0, u, 0x80808080, 0xF2;",
    "shr.b32 t, $2, 4;",
    "and.b32 t, t, 0x0F0F0F0F;",
    "vabsdiff4.u32.u32.u32 $1, t, eights, none;",
    "lop3.b32 $1, $1, $2, 0x80808080, 0xF2;",
)
_FLOATS = _block(
    "mov.b32 none, 0;",
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
