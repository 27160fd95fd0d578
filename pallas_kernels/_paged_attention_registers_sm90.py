"""Arrays of the decode attention kernel: what each thread has of keys, values, logits and queries.

The queries that share a KV head fill 16 rows. ``wgmma`` would need 64, and its second operand in shared memory
in 16 bits; ``mma.sync`` takes both operands from registers, so narrow keys and values are read from shared
memory once, become float16 in registers (exactly) and never go back. The four warps of a warpgroup work on
different tokens of a tile without waiting for each other.

An array is [64, columns] in ``Layout.WGMMA``: rows 16w .. 16w+15 are the 16 queries as warp w sees them. Its
columns are tokens of that warp, or channels.

Where at most eight queries are real, the products are turned: tokens, and channels of the result, are the rows of the
tensor instructions, and the queries their eight columns. Of each 16 tokens a warp's array then has 16 rows of eight
columns: [64, tokens / 2], element (16w + i, 8c + j) for token 16c + i and query j. Channels likewise.

Narrow channels need no shuffles if both operands agree on another order of the channels: `Storage.key_order` and
`Storage.value_order`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

ROWS = 16  # of one mma
WARPS = 4
FP4 = "float4_e2m1fn"
SCALE_BLOCK = 16  # channels of FP4 that share a scale
SCALAR = plgpu.Layout.WGMMA  # any: scalars have no layout
_CVT_TYPES = {"float8_e4m3fn": "e4m3x2", "float8_e5m2": "e5m2x2"}


@dataclasses.dataclass(frozen=True)
class Storage:
    """How keys and values of one page dtype lie in shared memory and become operands.

    Attributes:
        dtype: Of the pages; float4_e2m1fn in bytes of two, even channels low, with an e4m3 scale for each 16.
        dim: Channels of a head.
    """

    dtype: str
    dim: int

    @classmethod
    def of(cls, dtype: DTypeLike, dim: int) -> "Storage":
        """For pages of this dtype."""
        return cls(jnp.dtype(dtype).name, dim)

    @property
    def bits(self) -> int:
        """Of a channel."""
        return 4 if self.dtype == FP4 else 8 * jnp.dtype(self.dtype).itemsize

    @property
    def stored(self) -> tuple[str, int]:
        """Dtype of the pages' arrays, and their last axis."""
        return ("uint8", self.dim // 2) if self.bits == 4 else (self.dtype, self.dim)

    @property
    def unit(self) -> float:
        """What an operand of one stands for: e2m1's bits in the places of e4m3's are 2^-6 times it."""
        return 2.0**6 if self.bits == 4 else 1.0

    @property
    def operand(self) -> str:
        """The dtype of the tensor instructions' operands."""
        return self.dtype if self.bits == 16 else "float16"

    @property
    def tokens(self) -> int:
        """Of a tile per warp. Matrices come in fours: of four blocks of 8 tokens, or two of each of two blocks."""
        return 16 if self.bits == 16 or self.dim == 256 else 32

    @property
    def tile(self) -> int:
        """Tokens of a warpgroup's tile."""
        return WARPS * self.tokens

    @property
    def row_bytes(self) -> int:
        """Of a token."""
        return self.dim * self.bits // 8

    @property
    def token_bytes(self) -> int:
        """Of a token, its scales included."""
        return self.row_bytes + (self.dim // SCALE_BLOCK if self.bits == 4 else 0)

    @property
    def swizzle(self) -> int:
        """Bytes: the widest swizzle that divides a token; 16 is none."""
        return next(s for s in (128, 64, 32, 16) if self.row_bytes % s == 0)

    @property
    def transforms(self) -> tuple:
        """Of a tile in shared memory."""
        if self.swizzle == 16:
            return ()
        columns = self.swizzle // jnp.dtype(self.stored[0]).itemsize
        return (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(self.swizzle))

    def key_order(self) -> np.ndarray:
        """Channel of each column of the queries, and of each step of their products with keys."""
        column = np.arange(self.dim)
        if self.bits == 16:
            return column
        h, t, e = column // 8 % 2, column // 2 % 4, column % 2
        if self.bits == 8:
            return column // 16 * 16 + 4 * t + 2 * h + e
        return column // 32 * 32 + 8 * t + 4 * (column // 16 % 2) + h + 2 * e

    def value_order(self) -> np.ndarray:
        """Channel of each column of the products with values."""
        column = np.arange(self.dim)
        if self.bits == 16:
            return column
        per_word = 16 // self.bits
        return (
            column // (8 * per_word) * 8 * per_word
            + per_word * (column % 8)
            + column // 8 % per_word
        )


def turn(values: Array) -> Array:
    """[64, n / 2], turned, from the first eight rows of each warp's [16, n]."""
    n = values.shape[1]
    blocks = values.reshape(WARPS, ROWS, n // 16, 16)[:, :8]
    return blocks.transpose(0, 3, 2, 1).reshape(64, n // 2)


def turn_back(values: Array) -> Array:
    """[64, n] from turned ones, zeros in rows 8-15 of each warp."""
    half = values.shape[1]
    rows = values.reshape(WARPS, 16, half // 8, 8).transpose(0, 3, 2, 1).reshape(WARPS, 8, 2 * half)
    return jnp.concatenate([rows, jnp.zeros_like(rows)], axis=1).reshape(64, 2 * half)


def tiled(storage: Storage) -> plgpu.RefType:
    """The type of a tile in shared memory."""
    return plgpu.RefType(storage.transforms)


def inline(fn: Callable, kinds: Sequence, shape: tuple[int, int], dtype: DTypeLike) -> Callable:
    """`plgpu.inline_mgpu` for a function that returns one array in ``Layout.WGMMA``.

    Args:
        fn: The function, with its `interpret_impl`.
        kinds: Of each argument: None for global memory, `SCALAR`, or a layout or type.
        shape: Of the result.
        dtype: Of the result.
    """
    types = tuple(plgpu.RefType() if kind is None else kind for kind in kinds)
    out = plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.WGMMA)
    return plgpu.inline_mgpu(arg_types=types, return_type=out)(fn)


def array(registers, columns: int, *, signed: bool | None = None) -> fa.FragmentedArray:
    """[64, columns] of pairs: of each 8 columns, rows 0-7 of the warp's 16 and then rows 8-15."""
    layout = fa.WGMMA_LAYOUT
    found = np.array(registers, dtype=object).reshape(layout.registers_shape((64, columns)))
    return fa.FragmentedArray(_registers=found, _layout=layout, _is_signed=signed)


def i32(value: int) -> ir.Value:
    """A constant."""
    return utils.c(value, ir.IntegerType.get_signless(32))


def value_of(scalar: fa.FragmentedArray) -> ir.Value:
    """A scalar argument's value."""
    return scalar.registers.item()


def thread() -> ir.Value:
    """Index of the thread in its warpgroup."""
    return arith.remui(utils.thread_idx(), i32(128))


def lane() -> ir.Value:
    """Index of the thread in its warp."""
    return arith.remui(utils.thread_idx(), i32(32))


def warp() -> ir.Value:
    """Index of the warp in its warpgroup."""
    return arith.divui(thread(), i32(32))


def shared_words(base: ir.Value, offset: int, count: int) -> list[ir.Value]:
    """1, 2 or 4 words of shared memory."""
    names = ", ".join(f"${i}" for i in range(count))
    kind, names = ("b32", names) if count == 1 else (f"v{count}.b32", f"{{{names}}}")
    found = utils.inline_ptx(
        f"ld.shared.{kind} {names}, [${count}+{offset}];",
        base,
        result_types=[ir.IntegerType.get_signless(32)] * count,
        has_side_effects=True,
    )
    return list(found)


def widen_bytes(word: ir.Value, dtype: str) -> list[ir.Value]:
    """Four 8-bit numbers in float16, two to a word."""
    kind = _CVT_TYPES[dtype]
    found = utils.inline_ptx(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2; "
        f"cvt.rn.f16x2.{kind} $0, low; cvt.rn.f16x2.{kind} $1, high; }}",
        word,
        result_types=[ir.IntegerType.get_signless(32)] * 2,
    )
    return list(found)


def widen_pair(halfword: ir.Value) -> ir.Value:
    """The two e4m3 numbers in a word's low half in float16."""
    return utils.inline_ptx(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.rn.f16x2.e4m3x2 $0, low; }",
        halfword,
        result_types=ir.IntegerType.get_signless(32),
    )
