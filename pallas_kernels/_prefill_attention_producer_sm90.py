"""The producer warpgroup of prefill attention: queries, keys and values from device to shared memory."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.pallas_kernels import _prefill_attention_widen_sm90 as widening
from qjax.pallas_kernels._paged_attention_registers_sm90 import Storage
from qjax.pallas_kernels._prefill_attention_plan_sm90 import ROWS, WARPGROUPS, Item, Plan

STREAM_PARTS = ("smem", "narrow", "blocks", "full", "empty", "arrived")


@dataclasses.dataclass(frozen=True)
class Stream:
    """What the producer needs to load keys, or values.

    Attributes:
        source: Device memory.
        block_source: Device memory: FP4's block scales, or None.
        tiles: Shared memory: 16-bit tiles, one for each stage.
        narrow: Shared memory: a tile of 8- or 4-bit codes on its way to become one of them, or None.
        blocks: Shared memory: the block scales of that tile, or None.
        full: Barriers of the stages' loads.
        empty: Barriers of the stages' reads.
        arrived: Barrier of a tile that the producer changes before the others may see it.
    """

    source: Any
    block_source: Any
    tiles: Any
    narrow: Any
    blocks: Any
    full: Any
    empty: Any
    arrived: Any


def token_scales(item: Item, tile, plan: Plan, table_gmem, *scales) -> tuple:
    """Relative scales of a tile's keys and values, a thread's own token's each; none if tokens have none."""
    if not plan.token_scales:
        return None, None
    *pools, key_factor, value_factor = scales
    assert plan.page_size is not None
    found = widening.token_scales(
        table_gmem,
        tuple(pools),
        item.sequence,
        item.kv_head,
        lax.max(tile, 0),
        tokens=plan.tile.keys,
        page_size=plan.page_size,
    )
    factors = (key_factor[item.kv_head], value_factor[item.kv_head])
    return tuple(x * factor for x, factor in zip(found, factors, strict=True))


def load_item(
    item: Item,
    i,
    done,
    plan: Plan,
    q_gmem,
    table_gmem,
    keys,
    values,
    scales_of,
    q_smem,
    q_full,
    q_empty,
):
    """The producer's part of an item; returns the number of tiles of keys loaded so far."""
    rows, stages, page_size = plan.tile.keys, plan.tile.stages, plan.page_size
    count = item.last - item.first

    def copy(stream, target, tile, full):
        source = stream.source
        if page_size is None:
            part = pl.ds(tile * rows, rows)
            plgpu.copy_gmem_to_smem(source.at[item.sequence, part, item.kv_head], target, full)
            return
        piece, last = rows // plan.pieces, table_gmem.shape[1] - 1
        offset = lax.rem(tile * rows, page_size) if page_size > rows else 0

        # A bound that the compiler cannot know: unrolled, the loop would need more registers than there are.
        @pl.loop(0, lax.select(done >= 0, plan.pieces, 0))
        def _(j):
            # Pages past the table repeat its last entry and are masked.
            at = lax.min(lax.div(tile * rows, page_size) + j, last)
            page = (table_gmem[item.sequence, at], item.kv_head)
            plgpu.copy_gmem_to_smem(
                source.at[(*page, pl.ds(offset, piece))],
                target.at[pl.ds(pl.multiple_of(j * piece, piece), piece)],
                full,
            )
            if stream.blocks is not None:
                per_row = rows // stream.blocks.shape[0]  # tokens
                count = piece // per_row
                plgpu.copy_gmem_to_smem(
                    stream.block_source.at[(*page, pl.ds(lax.div(offset, per_row), count))],
                    stream.blocks.at[pl.ds(j * count, count)],
                    full,
                )

    def load(stream: Stream, j, scale, clean: bool):
        """Tile j from the last; `clean` zeroes the tokens past the sequence's end, which may be NaN."""
        at, tile = done + j, item.last - 1 - j
        slot = lax.rem(at, stages)
        target, full = stream.tiles.at[slot], stream.full.at[slot]
        valid = item.length - tile * rows

        @pl.when(at >= stages)
        def _():
            plgpu.barrier_wait(stream.empty.at[slot])
            plgpu.commit_smem()  # orders reads by the math warpgroups before the TMA's writes

        def change():
            """Takes the tile that arrived from where it is to `target`, and tells the others."""
            plgpu.barrier_wait(stream.arrived)
            if plan.narrow:
                storage = Storage(plan.narrow, target.shape[1])
                bound = valid if clean else None
                widening.widen(stream.narrow, target, bound, scale, stream.blocks, storage=storage)
            else:
                _clean(target, plan, valid)
            plgpu.commit_smem()
            for _ in range(1 if plan.narrow else plan.pieces):
                plgpu.barrier_arrive(full)

        if plan.narrow:
            change()

            @pl.when(j + 1 < count)
            def _():
                copy(stream, stream.narrow, tile - 1, stream.arrived)

        elif clean:

            @pl.when(valid >= rows)
            def _():
                copy(stream, target, tile, full)

            @pl.when(valid < rows)
            def _():
                copy(stream, target, tile, stream.arrived)
                change()

        else:
            copy(stream, target, tile, full)

    if plan.narrow:
        for stream in (keys, values):
            copy(stream, stream.narrow, item.last - 1, stream.arrived)
    scales = scales_of(item.last - 1)
    load(keys, 0, scales[0], False)
    for wg in range(WARPGROUPS):

        @pl.when(i > 0)
        def _(wg=wg):
            plgpu.barrier_wait(q_empty.at[wg])
            plgpu.commit_smem()

        part = pl.ds(item.row + wg * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(
            q_gmem.at[item.sequence, part, item.head], q_smem.at[wg], q_full.at[wg]
        )
    load(values, 0, scales[1], plan.ragged)

    def step(j, scales):
        following = scales_of(item.last - 2 - j)  # on its way before the next tile's turn
        load(keys, j, scales[0], False)
        load(values, j, scales[1], plan.ragged)
        return following

    lax.fori_loop(1, count, step, scales_of(item.last - 2))
    return done + count


def _clean(tile, plan: Plan, valid) -> None:
    """Makes a tile's rows from `valid` on zeros."""
    rows, dim = tile.shape
    columns = plan.swizzle // 2  # of whole swizzled rows
    layout = plgpu.Layout.WGMMA
    for row in [*range(0, rows - ROWS, ROWS), rows - ROWS]:  # the last rows may come twice

        @pl.when(valid < row + ROWS)
        def _(row=row):
            for column in range(0, dim, columns):
                index = (pl.ds(row, ROWS), pl.ds(column, columns))
                x = plgpu.load(tile.at[index], layout=layout)
                token = row + plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout)
                tile.at[index][...] = jnp.where(token < valid, x, jnp.zeros_like(x))
