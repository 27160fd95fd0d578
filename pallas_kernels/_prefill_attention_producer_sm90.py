"""The producer warpgroups of prefill attention: queries, keys and values from device to shared memory."""

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

STREAM_PARTS = ("smem", "narrow", "blocks", "full", "empty", "arrived")


@dataclasses.dataclass(frozen=True)
class Stream:
    """What a producer needs to load keys, or values.

    Attributes:
        source: Device memory.
        block_source: Device memory: FP4's block scales, or None.
        pool: Device memory: scales of tokens, or of their pages; None if they are the same for all of a head.
        factors: Device memory: what makes them relative, for each head, or None.
        alike: Device memory: whether all pages of a head have one, or None.
        clean: Whether tokens past the sequence's end, which may be NaN, become zeros.
        tiles: Shared memory: 16-bit tiles, one for each stage.
        narrow: Shared memory: a tile of 8- or 4-bit codes on its way to become one of them, or None.
        blocks: Shared memory: the block scales of that tile, or None.
        full: Barriers of the stages' loads.
        empty: Barriers of the stages' reads.
        arrived: Barrier of a tile that the producer changes before the others may see it.
    """

    source: Any
    block_source: Any
    pool: Any
    factors: Any
    alike: Any
    clean: bool
    tiles: Any
    narrow: Any
    blocks: Any
    full: Any
    empty: Any
    arrived: Any


@dataclasses.dataclass(frozen=True)
class Queries:
    """What the producer of keys needs to load queries.

    Attributes:
        source: Device memory.
        tiles: Shared memory: one for each math warpgroup.
        full: Barriers of their loads.
        empty: Barriers of their reads.
    """

    source: Any
    tiles: Any
    full: Any
    empty: Any

    def load(self, item: Item, i) -> None:
        """Those of the i-th item."""
        for wg in range(WARPGROUPS):

            @pl.when(i > 0)
            def _(wg=wg):
                plgpu.barrier_wait(self.empty.at[wg])
                plgpu.commit_smem()

            part = pl.ds(item.row + wg * ROWS, ROWS)
            where = (item.sequence, part, item.head)
            plgpu.copy_gmem_to_smem(self.source.at[where], self.tiles.at[wg], self.full.at[wg])


def load_item(
    item: Item,
    i,
    done,
    plan: Plan,
    table_gmem,
    streams: Sequence[Stream],
    queries: Queries | None,
):
    """A producer's part of an item; returns the number of tiles of keys loaded so far."""
    rows, stages, page_size = plan.tile.keys, plan.tile.stages, plan.page_size
    count = item.last - item.first

    def pages(tile):
        """Page numbers of a tile, None for a loop to read them. Those past the table repeat its last; masked."""
        if page_size is None or plan.pieces > (4 if plan.producers == 1 else 2):
            return None
        first, last = lax.div(lax.max(tile, 0) * rows, page_size), table_gmem.shape[1] - 1
        return [table_gmem[item.sequence, lax.min(first + j, last)] for j in range(plan.pieces)]

    def scale_pages(tile):
        """The page of each thread's token of a tile."""
        if streams[0].pool is None:
            return None
        where = (table_gmem, item.sequence, lax.max(tile, 0))
        return widening.token_pages(*where, tokens=rows, page_size=page_size)

    def scale(stream: Stream, numbers, tile):
        """The relative scale of each thread's token of a tile."""
        if stream.pool is None:
            return None
        where = (stream.pool, numbers, item.kv_head, lax.max(tile, 0))
        found = widening.token_scales(*where, tokens=rows, page_size=page_size)
        return found * stream.factors[item.kv_head]

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

    def load(stream: Stream, alike, j, scale):
        """Tile j from the last."""
        at, tile = done + j, item.last - 1 - j
        slot = lax.rem(at, stages)
        target, full = stream.tiles.at[slot], stream.full.at[slot]
        valid = item.length - tile * rows

        following = pages(tile - 1) if plan.narrow else None  # on their way before their turn

        @pl.when(at >= stages)
        def _():
            plgpu.barrier_wait(stream.empty.at[slot])
            if not plan.narrow:
                plgpu.commit_smem()  # orders reads by the math warpgroups before the TMA's writes

        def widen(bound, scale):
            storage = Storage(plan.narrow, target.shape[1])
            widening.widen(stream.narrow, target, bound, scale, stream.blocks, storage=storage)

        def change():
            """Takes the tile that arrived from where it is to `target`, and tells the others."""
            plgpu.barrier_wait(stream.arrived)
            if not plan.narrow:
                _clean(target, plan, valid)
            elif not stream.clean and scale is None:
                widen(None, None)
            elif scale is not None and alike is None:
                widen(valid if stream.clean else None, scale)
            else:
                plain = valid >= rows if stream.clean else True
                if alike is not None:
                    plain = plain & (alike > 0)
                pl.when(plain)(lambda: widen(None, None))
                bound = valid if stream.clean else None
                pl.when(jnp.logical_not(plain))(lambda: widen(bound, scale))
            plgpu.commit_smem()
            for _ in range(1 if plan.narrow else plan.pieces):
                plgpu.barrier_arrive(full)

        if plan.narrow:
            change()

            @pl.when(j + 1 < count)
            def _():
                copy(stream, stream.narrow, tile - 1, stream.arrived, following)

        elif stream.clean:

            @pl.when(valid >= rows)
            def _():
                copy(stream, target, tile, full)

            @pl.when(valid < rows)
            def _():
                copy(stream, target, tile, stream.arrived)
                change()

        else:
            copy(stream, target, tile, full)

    for stream in streams:
        if plan.narrow:
            copy(stream, stream.narrow, item.last - 1, stream.arrived)
    # The pages of tokens and then their scales, two tiles and one before their turn.
    tile, numbers = item.last - 1, scale_pages(item.last - 1)
    alike = [None if s.alike is None else s.alike[item.kv_head] for s in streams]
    scales = tuple(scale(stream, numbers, tile) for stream in streams)
    for n, stream in enumerate(streams):
        load(stream, alike[n], 0, scales[n])
        if n == 0 and queries is not None:
            queries.load(item, i)

    def step(j, carry):
        scales, numbers = carry
        tile = item.last - 1 - j
        following = tuple(scale(stream, numbers, tile - 1) for stream in streams)
        numbers = scale_pages(tile - 2)
        for stream, same, now in zip(streams, alike, scales, strict=True):
            load(stream, same, j, now)
        return following, numbers

    numbers = scale_pages(tile - 1)
    scales = tuple(scale(stream, numbers, tile - 1) for stream in streams)
    lax.fori_loop(1, count, step, (scales, scale_pages(tile - 2)))
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
