"""The producer warpgroup of prefill attention: queries, keys and values from device to shared memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.pallas_kernels import _prefill_attention_widen_sm90 as widening
from qjax.pallas_kernels._paged_attention_registers_sm90 import Storage
from qjax.pallas_kernels._prefill_attention_plan_sm90 import ROWS, WARPGROUPS, Item, Plan

STREAM_PARTS = ("smem", "narrow", "blocks", "scales", "full", "empty", "arrived")


@dataclasses.dataclass(frozen=True)
class Stream:
    """What the producer needs to load keys, or values.

    Attributes:
        source: Device memory.
        block_source: Device memory: FP4's block scales, or None.
        tiles: Shared memory: the tiles that are multiplied, one for each stage.
        narrow: Shared memory: a tile of 8- or 4-bit codes on its way to become a 16-bit one, or None.
        blocks: Shared memory: the block scales of that tile, or None.
        scales: Shared memory: scales of the tokens of tiles that are multiplied as they are stored, or None.
        full: Barriers of the stages' loads.
        empty: Barriers of the stages' reads.
        arrived: Barrier of a tile that the producer changes before the others may see it.
    """

    source: Any
    block_source: Any
    tiles: Any
    narrow: Any
    blocks: Any
    scales: Any
    full: Any
    empty: Any
    arrived: Any


@dataclasses.dataclass(frozen=True)
class TokenScales:
    """What the producer needs to load the scales of tokens, or of their pages.

    Attributes:
        table: Device memory: pages of each sequence.
        pools: Device memory: scales of keys and of values; none if they are the same for all tokens of a head.
        factors: Device memory: what makes them relative, for each head.
    """

    table: Any
    pools: Sequence[Any]
    factors: Sequence[Any]

    def pages(self, item: Item, tile, plan: Plan):
        """The page of each thread's token of a tile."""
        if not self.pools:
            return None
        where = (item.sequence, lax.max(tile, 0))
        sizes = dict(tokens=plan.tile.keys, page_size=plan.page_size)
        return widening.token_pages(self.table, *where, **sizes)

    def load(self, pages, item: Item, tile, plan: Plan) -> tuple:
        """Relative scales of keys and values, of each thread's token of a tile."""
        if not self.pools:
            return None, None
        where = (pages, item.kv_head, lax.max(tile, 0))
        sizes = dict(tokens=plan.tile.keys, page_size=plan.page_size)
        found = widening.token_scales(tuple(self.pools), *where, **sizes)
        factors = [factor[item.kv_head] for factor in self.factors]
        return tuple(x * factor for x, factor in zip(found, factors, strict=True))


def load_item(
    item: Item,
    i,
    done,
    plan: Plan,
    queries_gmem,
    table_gmem,
    keys,
    values,
    token_scales,
    queries,
    q_full,
    q_empty,
):
    """The producer's part of an item; returns the number of tiles of keys loaded so far."""
    rows, page_size = plan.tile.keys, plan.page_size
    count = item.last - item.first

    def pages(tile):
        """Page numbers of a tile, None for a loop to read them. Those past the table repeat its last; masked."""
        if page_size is None or plan.pieces > 4:
            return None
        first, last = lax.div(lax.max(tile, 0) * rows, page_size), table_gmem.shape[1] - 1
        return [table_gmem[item.sequence, lax.min(first + j, last)] for j in range(plan.pieces)]

    def copy(stream, target, tile, full, numbers=None):
        source = stream.source
        if page_size is None:
            part = pl.ds(tile * rows, rows)
            plgpu.copy_gmem_to_smem(source.at[item.sequence, part, item.kv_head], target, full)
            return
        piece, last = rows // plan.pieces, table_gmem.shape[1] - 1
        offset = lax.rem(tile * rows, page_size) if page_size > rows else 0

        def copy_page(j, number):
            page = (number, item.kv_head)
            start = j * piece if isinstance(j, int) else pl.multiple_of(j * piece, piece)
            plgpu.copy_gmem_to_smem(
                source.at[(*page, pl.ds(offset, piece))],
                target.at[pl.ds(start, piece)],
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

        if numbers is not None:
            for j, number in enumerate(numbers):
                copy_page(j, number)
            return

        # A bound that the compiler cannot know: unrolled, the loop would need more registers than there are.
        @pl.loop(0, lax.select(done >= 0, plan.pieces, 0))
        def _(j):
            at = lax.min(lax.div(tile * rows, page_size) + j, last)
            copy_page(j, table_gmem[item.sequence, at])

    def load(stream: Stream, j, scale, clean: bool):
        """Tile j from the last; `clean` zeroes the tokens past the sequence's end, which may be NaN."""
        at, tile, stages = done + j, item.last - 1 - j, stream.tiles.shape[0]
        slot = lax.rem(at, stages)
        target, full = stream.tiles.at[slot], stream.full.at[slot]
        valid = item.length - tile * rows

        # On their way before their turn.
        numbers = pages(tile) if stream.scales is not None else None
        following = pages(tile - 1) if stream.narrow is not None else None

        @pl.when(at >= stages)
        def _():
            plgpu.barrier_wait(stream.empty.at[slot])
            if stream.narrow is None:
                plgpu.commit_smem()  # orders reads by the math warpgroups before the TMA's writes

        def change():
            """Takes the tile that arrived from where it is to `target`, and tells the others."""
            plgpu.barrier_wait(stream.arrived)
            if stream.narrow is not None:
                storage = Storage(plan.narrow, target.shape[1])
                bound = valid if clean else None
                widening.widen(stream.narrow, target, bound, scale, stream.blocks, storage=storage)
            else:
                _clean(target, plan, valid)
            plgpu.commit_smem()
            for _ in range(1 if plan.narrow else plan.pieces):
                plgpu.barrier_arrive(full)

        if stream.scales is not None:
            copy(stream, target, tile, full, numbers)
            stream.scales.at[slot][...] = scale
            plgpu.commit_smem()
            plgpu.barrier_arrive(full)
        elif stream.narrow is not None:
            change()

            @pl.when(j + 1 < count)
            def _():
                copy(stream, stream.narrow, tile - 1, stream.arrived, following)

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

    for stream in (keys, values):
        if stream.narrow is not None:
            copy(stream, stream.narrow, item.last - 1, stream.arrived)
    # The pages of tokens and then their scales, two tiles and one before their turn.
    tile = item.last - 1
    scales = token_scales.load(token_scales.pages(item, tile, plan), item, tile, plan)
    load(keys, 0, scales[0], False)
    for wg in range(WARPGROUPS):

        @pl.when(i > 0)
        def _(wg=wg):
            plgpu.barrier_wait(q_empty.at[wg])
            plgpu.commit_smem()

        where = (item.sequence, pl.ds(item.row + wg * ROWS, ROWS), item.head)
        for source, target in zip(queries_gmem, queries, strict=True):
            plgpu.copy_gmem_to_smem(source.at[where], target.at[wg], q_full.at[wg])
    load(values, 0, scales[1], plan.ragged)

    def step(j, carry):
        scales, numbers = carry
        tile = item.last - 1 - j
        following = token_scales.load(numbers, item, tile - 1, plan)
        numbers = token_scales.pages(item, tile - 2, plan)
        load(keys, j, scales[0], False)
        load(values, j, scales[1], plan.ragged)
        return following, numbers

    scales = token_scales.load(token_scales.pages(item, tile - 1, plan), item, tile - 1, plan)
    lax.fori_loop(1, count, step, (scales, token_scales.pages(item, tile - 2, plan)))
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
