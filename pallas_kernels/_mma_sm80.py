"""``mma.sync`` products of 16-bit weights in registers and tokens in shared memory, and the store of their sums.

Arrays are [64, columns] in ``Layout.WGMMA``: the four warps of a warpgroup have 16 rows each, so wgmma's fragment of
64x16 weights is four fragments of mma.m16n8k16, and its sums of 64x8 are too.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from qjax.pallas_kernels import _paged_attention_registers_sm90 as reg
from qjax.pallas_kernels._async_copy_sm80 import SWIZZLE, SWIZZLED

_PTX_TYPES = {"bfloat16": "bf16", "float16": "f16"}


def products(
    weights: Sequence[Array], tokens, sums: Sequence[Array] = (), *, first: int
) -> tuple[Array, ...]:
    """``sums[i] + weights[i] @ tokens[:, first : first + width].T`` for each i; tokens are read once for all.

    Args:
        weights: 16-bit floats [64, width], width a multiple of 32.
        tokens: Shared memory [columns, depth] of the same dtype, with the transforms `SWIZZLED`.
        sums: float32 [64, columns], one for each of the weights; none for zeros.
        first: First of the tokens' columns, a multiple of 32.

    Returns:
        float32 [64, columns] each.
    """
    dtype, width = jnp.dtype(weights[0].dtype).name, weights[0].shape[1]
    columns, depth = tokens.shape

    count = len(weights)

    def emit(ctx, tokens, *arrays):
        del ctx
        i32, zero = ir.IntegerType.get_signless(32), utils.c(0.0, ir.F32Type.get())
        words = [[utils.bitcast(r, i32) for r in w.registers.flat] for w in arrays[:count]]
        sums = [_quads(s) for s in arrays[count:]]
        sums = sums or [[[zero] * 4 for _ in range(columns // 8)] for _ in words]
        fragments = _Fragments(tokens, columns, depth)
        for step in range(width // 16):
            right = fragments.load(first // 16 + step)
            for of_block, left in zip(sums, words, strict=True):
                for j, pair in enumerate(right):
                    of_block[j] = mma(dtype, left[4 * step : 4 * step + 4], pair, of_block[j])
        return tuple(reg.array(pairs(of_block), columns) for of_block in sums)

    def reference(tokens, *arrays):
        x = tokens[:, first : first + width].astype(jnp.float32).T
        found = [jnp.matmul(w.astype(jnp.float32), x, precision="highest") for w in arrays[:count]]
        return tuple(s + f for s, f in zip(arrays[count:] or [0.0] * count, found, strict=True))

    emit.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    out = plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=plgpu.Layout.WGMMA)
    return plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(SWIZZLED), *[plgpu.Layout.WGMMA] * (count + len(sums))),
        return_type=(out,) * count,
    )(emit)(tokens, *weights, *sums)


class _Fragments:
    """The right operands of mma, 16 columns by 8 tokens, four 8x8 matrices with one ldmatrix."""

    def __init__(self, tokens, columns: int, depth: int):
        self.columns, self.blocks_per_row = columns, depth // 64
        self.quads = columns == 8  # four chunks of 8 tokens, else two chunks of 16 tokens
        lane = reg.lane()
        row, matrix = arith.remui(lane, reg.i32(8)), arith.divui(lane, reg.i32(8))
        chunk = matrix if self.quads else arith.remui(matrix, reg.i32(2))
        offset = arith.addi(
            arith.muli(row, reg.i32(SWIZZLE)),
            arith.muli(arith.xori(row, chunk), reg.i32(16)),
        )
        if not self.quads:
            block = arith.divui(matrix, reg.i32(2))
            offset = arith.addi(
                offset, arith.muli(block, reg.i32(8 * SWIZZLE * self.blocks_per_row))
            )
        i32 = ir.IntegerType.get_signless(32)
        self.base = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(tokens)), offset)
        self.kept: dict[int, list[list[ir.Value]]] = {}

    def load(self, step: int) -> list[list[ir.Value]]:
        """Two words for each 8 tokens, of the step's 16 columns."""
        if self.quads:
            if step not in self.kept:
                even = step - step % 2
                found = self._matrices(2 * even, 0)
                self.kept = {even: [found[:2]], even + 1: [found[2:]]}
            return self.kept[step]
        right = []
        for pair in range(self.columns // 16):
            found = self._matrices(2 * step, pair)
            right += [found[:2], found[2:]]
        return right

    def _matrices(self, chunk: int, pair: int) -> list[ir.Value]:
        block, inner = divmod(chunk, 8)
        at = arith.xori(self.base, reg.i32(16 * inner))
        step = 8 * SWIZZLE
        at = arith.addi(at, reg.i32(step * (block + 2 * pair * self.blocks_per_row)))
        found = utils.inline_ptx(
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];",
            at,
            result_types=[ir.IntegerType.get_signless(32)] * 4,
            has_side_effects=True,
            convergent=True,
        )
        return list(found)


def store_columns(sums: Array, out, row: ArrayLike, column: ArrayLike, end: ArrayLike) -> None:
    """``out[column + j, row + i] = sums[i, j]`` where row + i is within the array and column + j before `end`.

    In interpret mode the whole array counts as written, so the race detector takes CTAs for racing.

    Args:
        sums: [64, columns] in ``Layout.WGMMA``, 16 or 32 bits.
        out: Global memory [M, N] of sums' dtype, N a multiple of 8.
        row: First of sums' rows.
        column: Place of sums' first column.
        end: Columns from this place on are dropped.
    """
    n = out.shape[1]
    item = jnp.dtype(out.dtype).itemsize

    def emit(ctx, sums, out, row, column, end):
        del ctx
        i64, kind = (ir.IntegerType.get_signless(bits) for bits in (64, 8 * item))
        base = llvm.ptrtoint(i64, utils.memref_ptr(out))
        row, column, end = (reg.value_of(v) for v in (row, column, end))
        group = arith.divui(reg.lane(), reg.i32(4))
        row = arith.addi(row, arith.addi(arith.muli(reg.warp(), reg.i32(16)), group))
        member = arith.muli(arith.remui(reg.lane(), reg.i32(4)), reg.i32(2))
        slt = arith.CmpIPredicate.slt
        for i, register in enumerate(sums.registers.flat):
            at_row = arith.addi(row, reg.i32(8 * (i % 2)))
            in_rows = arith.cmpi(slt, at_row, reg.i32(n))
            for j in range(2):
                place = arith.addi(arith.addi(column, member), reg.i32(8 * (i // 2) + j))
                index = arith.addi(
                    arith.muli(arith.extui(i64, place), utils.c(n, i64)),
                    arith.extui(i64, at_row),
                )
                value = utils.bitcast(vector.extract(register, [], [j]), kind)
                utils.inline_ptx(
                    f"st.global.b{8 * item} [$0], $1;",
                    arith.addi(base, arith.muli(index, utils.c(item, i64))),
                    value,
                    predicate=arith.andi(in_rows, arith.cmpi(slt, place, end)),
                    has_side_effects=True,
                )

    def reference(sums, out, row, column, end):
        places = column + jnp.arange(sums.shape[1])
        places = jnp.where(places < end, places, out.shape[0])
        rows = row + jnp.arange(64)
        return (out.at[places[:, None], rows[None, :]].set(sums.T, mode="drop"),)

    emit.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    emit.interpret_writes = (1,)  # pyright: ignore[reportFunctionMemberAccess]
    types = (plgpu.Layout.WGMMA, plgpu.RefType(), *[reg.SCALAR] * 3)
    plgpu.inline_mgpu(arg_types=types)(emit)(sums, out, row, column, end)


def mma(dtype: str, left, right, sums) -> list[ir.Value]:
    """mma.m16n8k16: words of a 16x16 and a 16x8 fragment and the four float32 sums of a thread."""
    kind = _PTX_TYPES[dtype]
    found = utils.inline_ptx(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        *left,
        *right,
        *sums,
        result_types=[ir.F32Type.get()] * 4,
        convergent=True,
    )
    return list(found)


def _quads(sums) -> list[list[ir.Value]]:
    """The numbers of 8 columns that a thread has: of rows 0-7 of its warp's 16, then of rows 8-15."""
    numbers = [vector.extract(r, [], [j]) for r in sums.registers.flat for j in range(2)]
    return [numbers[i : i + 4] for i in range(0, len(numbers), 4)]


def pairs(sums) -> list[ir.Value]:
    """The sums of each 8 columns as registers of an array in ``Layout.WGMMA``."""
    vec = ir.VectorType.get((2,), ir.F32Type.get())
    return [vector.from_elements(vec, part[i : i + 2]) for part in sums for i in (0, 2)]
