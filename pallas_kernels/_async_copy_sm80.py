"""Asynchronous copies of tiles to shared memory with ``cp.async``, and the waits for them.

A copy is of 16-byte chunks, each by one thread; chunks past the array's edge become zeros and are not read.
Copies are committed in groups; `wait_copies` waits for all but the latest groups of its own thread and then for the
warpgroup, so that what any thread copied may be read by all, and what all have read may be overwritten.

In interpret mode a tile holds nothing meaningful from its copy to the wait that covers it: `qjax.testing.interpret`
knows the functions by their ``interpret_async``.
"""

import math

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from qjax.pallas_kernels import _paged_attention_registers_sm90 as reg

CHUNK = 16  # bytes, the most that a thread copies at once
THREADS = 128
SWIZZLE = 128  # bytes
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(SWIZZLE))
"""Transforms of a tile of 16-bit numbers: 8 rows of 64 columns lie together, chunk c of row r at place c ^ r."""


def copy_tile(source, target, row: ArrayLike, column: ArrayLike, *, swizzled: bool = False) -> None:
    """Starts a copy of ``source[row : row + rows, column : column + columns]``, zeros past the edges.

    Args:
        source: Global memory [R, C], C a multiple of 16 bytes.
        target: Shared memory [rows, ...], whose rows are `columns` contiguous numbers: a power of two chunks.
        row: First row.
        column: First column, a multiple of 16 bytes.
        swizzled: Whether the target has the transforms `SWIZZLED`.
    """
    (height, width), rows, columns = source.shape, target.shape[0], math.prod(target.shape[1:])
    shape = target.shape
    item = jnp.dtype(source.dtype).itemsize
    per_row = columns * item // CHUNK
    assert per_row & (per_row - 1) == 0, f"rows of {columns * item} bytes"

    def emit(ctx, source, target, row, column):
        del ctx
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        base = llvm.ptrtoint(i64, utils.memref_ptr(source))
        shared = llvm.ptrtoint(i32, utils.memref_ptr(target))
        row, column = reg.value_of(row), reg.value_of(column)
        total = rows * per_row
        for first in range(0, total, THREADS):
            chunk = arith.addi(reg.thread(), reg.i32(first))
            r = arith.divui(chunk, reg.i32(per_row))
            c = arith.remui(chunk, reg.i32(per_row))
            at_row = arith.addi(row, r)
            at_column = arith.addi(column, arith.muli(c, reg.i32(CHUNK // item)))
            slt = arith.CmpIPredicate.slt
            inside = arith.andi(
                arith.cmpi(slt, at_row, reg.i32(height)), arith.cmpi(slt, at_column, reg.i32(width))
            )
            size = arith.select(inside, reg.i32(CHUNK), reg.i32(0))
            address = arith.addi(
                arith.muli(arith.extui(i64, at_row), utils.c(width * item, i64)),
                arith.muli(arith.extui(i64, at_column), utils.c(item, i64)),
            )
            place = arith.muli(chunk, reg.i32(CHUNK))
            if swizzled:
                place = _swizzled_place(r, c, per_row)
            ends = total - first < THREADS
            utils.inline_ptx(
                "cp.async.cg.shared.global [$0], [$1], 16, $2;",
                arith.addi(shared, place),
                arith.addi(base, address),
                size,
                predicate=arith.cmpi(slt, chunk, reg.i32(total)) if ends else None,
                has_side_effects=True,
            )

    def reference(source, target, row, column):
        r, c = row + jnp.arange(rows), column + jnp.arange(columns)
        tile = source.at[r[:, None], c[None, :]].get(mode="fill", fill_value=0)
        return (tile.reshape(shape),)

    emit.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    emit.interpret_writes = (1,)  # pyright: ignore[reportFunctionMemberAccess]
    emit.interpret_async = "copy"  # pyright: ignore[reportFunctionMemberAccess]
    types = (plgpu.RefType(), plgpu.RefType(SWIZZLED if swizzled else ()), reg.SCALAR, reg.SCALAR)
    plgpu.inline_mgpu(arg_types=types)(emit)(source, target, row, column)


def _swizzled_place(row: ir.Value, chunk: ir.Value, per_row: int) -> ir.Value:
    """Bytes from the tile's start, see `SWIZZLED`."""
    inner = arith.remui(row, reg.i32(8))
    turned = arith.xori(arith.remui(chunk, reg.i32(8)), inner)
    block = arith.addi(
        arith.muli(arith.divui(row, reg.i32(8)), reg.i32(per_row // 8)),
        arith.divui(chunk, reg.i32(8)),
    )
    within = arith.addi(arith.muli(inner, reg.i32(SWIZZLE)), arith.muli(turned, reg.i32(CHUNK)))
    return arith.addi(arith.muli(block, reg.i32(8 * SWIZZLE)), within)


def commit_copies() -> None:
    """Closes a group of copies, which may be empty."""

    def emit(ctx):
        del ctx
        utils.inline_ptx("cp.async.commit_group;", has_side_effects=True)

    emit.interpret_impl = lambda: ()  # pyright: ignore[reportFunctionMemberAccess]
    emit.interpret_async = "commit"  # pyright: ignore[reportFunctionMemberAccess]
    plgpu.inline_mgpu()(emit)()


def wait_copies(pending: int) -> None:
    """Waits until at most the latest `pending` groups of each thread are unfinished, then for the warpgroup."""

    def emit(ctx):
        del ctx
        utils.inline_ptx(f"cp.async.wait_group {pending};", has_side_effects=True)
        utils.warpgroup_barrier()

    emit.interpret_impl = lambda: ()  # pyright: ignore[reportFunctionMemberAccess]
    emit.interpret_async = pending  # pyright: ignore[reportFunctionMemberAccess]
    plgpu.inline_mgpu()(emit)()
