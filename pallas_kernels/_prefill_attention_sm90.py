"""The kernel of prefill attention for Hopper.

After FlashAttention-3 (Shah et al. 2024). A persistent CTA takes tiles of 128 query rows of one head, 64 rows for
each of two math warpgroups, and walks over the visible tiles of keys from the last to the first. A warpgroup
issues its products in its turn (`_attention_wgmma_sm90`) and computes its softmax in the other's::

    producer warpgroup                      two math warpgroups, 64 query rows each
    ------------------                      ---------------------------------------
    for each tile of queries:               for each tile of queries:
      wait q_empty; TMA q                     wait q_full, k_full
      for each tile of keys:                  [turn] s = q k0.T
        wait k_empty[slot]        <-------+   p = softmax(s)
        TMA k -> k_smem[slot]             |   for each further tile j of keys:
        wait v_empty[slot]        <-----+ |     wait k_full[j], v_full[j-1]
        TMA v -> v_smem[slot]           | +---  [turn] s = q kj.T;  out += p v(j-1)
        (tokens past the sequence's     +-----  arrive k_empty[j], v_empty[j-1]
         end become zeros)                      p = softmax(s); out *= rescale
                                              [turn] out += p v(last)
                                              out / sum -> o_smem -> TMA

Away from masks, `out += p v(j-1)` is still under way while `p = softmax(s)` is computed. 8-bit pages go through a
buffer of their own: the producer decodes them into the float16 tiles. The schedule says which CTA takes which tiles
of queries, so that all end together.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.pallas_kernels import _attention_wgmma_sm90 as wgmma

ROWS = 64  # of queries, for each math warpgroup
WARPGROUPS = 2
Q_TILE = ROWS * WARPGROUPS
# Finite, so that differences of two masked logits are numbers; a power of two, so that scaling is exact and a fused
# multiply-add of two equal ones gives zero.
MASKED = -(2.0**99)
LOWEST = float(jnp.finfo(jnp.float32).min)  # below every scaled masked logit
# Registers of a thread of the producer and of a math warpgroup, for 16-bit and for 8-bit keys. Together no more than
# the CTA starts with, three times 168: the math warpgroups would wait for the rest for ever.
REGISTERS = {False: (40, 232), True: (72, 216)}
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Sizes of one CTA's buffers.

    Attributes:
        keys: Keys in a tile, a multiple of 16.
        stages: Tiles of keys, and of values, in flight.
        separate_output: Whether outputs have their own buffer, so that the next queries load while they leave;
            else they take the place of queries of the same size.
        overlap: Whether the softmax of a tile starts while the values of the tile before are still being multiplied,
            where no mask or soft cap needs the registers.
    """

    keys: int
    stages: int
    separate_output: bool
    overlap: bool

    def smem_bytes(self, dim: int, value_dim: int) -> int:
        """Bytes of the tiles of 16-bit queries, keys, values and outputs."""
        tiles = self.stages * self.keys * (dim + value_dim)
        return 2 * (tiles + Q_TILE * (dim + (value_dim if self.separate_output else 0)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in one kernel."""

    batch: int
    q_heads: int
    kv_heads: int
    rows: int  # queries per sequence
    dim: int
    value_dim: int
    tile: TileConfig
    page_size: int | None
    causal: bool
    ragged: bool  # sequences may end inside a tile of keys
    window: int | None
    soft_cap: float | None
    sinks: bool
    narrow: str | None  # dtype of 8-bit pages
    ctas: int

    @property
    def pieces(self) -> int:
        """Loads that make up a tile of keys."""
        return 1 if self.page_size is None else max(self.tile.keys // self.page_size, 1)

    @property
    def swizzle(self) -> int:
        return 128 if self.dim % 64 == 0 and self.value_dim % 64 == 0 else 64


def scratch(plan: Plan, dtype, out_dtype) -> dict:
    """Shared memory and barriers of the kernel; `dtype` is what the tensor cores multiply."""
    tile, swizzle = plan.tile, plan.swizzle
    tiled = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    arrivals = 1 if plan.narrow else plan.pieces
    full = plgpu.Barrier(num_arrivals=arrivals, num_barriers=tile.stages)
    empty = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tile.stages)
    queries = plgpu.SMEM((WARPGROUPS, ROWS, plan.dim), dtype, transforms=tiled)
    output = plgpu.SMEM((WARPGROUPS, ROWS, plan.value_dim), out_dtype, transforms=tiled)
    buffers = dict(
        qo_smem=(queries, output) if tile.separate_output else (queries,),
        q_full=plgpu.Barrier(num_barriers=WARPGROUPS),
        q_empty=plgpu.Barrier(num_barriers=WARPGROUPS),
    )
    for name, dim in (("k_", plan.dim), ("v_", plan.value_dim)):
        buffers |= {
            name + "smem": plgpu.SMEM((tile.stages, tile.keys, dim), dtype, transforms=tiled),
            name + "full": full,
            name + "empty": empty,
            name + "arrived": plgpu.Barrier(num_arrivals=plan.pieces),
        }
        if plan.narrow:
            width = min(dim, 128)
            transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width))
            shape = (tile.keys, dim)
            buffers[name + "narrow"] = plgpu.SMEM(shape, plan.narrow, transforms=transforms)
    return buffers


@dataclasses.dataclass(frozen=True)
class _Item:
    """One tile of queries: scalars of the kernel.

    Attributes:
        sequence: Index in the batch.
        head: Query head.
        kv_head: KV head.
        row: First query.
        position: Position of the first query.
        length: Keys of the sequence.
        first: First visible tile of keys.
        low: First tile that every query sees from its start on.
        high: First tile that some query does not see up to its end.
        last: End of the visible tiles; at least one is visited, if only to be masked.
    """

    sequence: Array
    head: Array
    kv_head: Array
    row: Array
    position: Array
    length: Array
    first: Array
    low: Array
    high: Array
    last: Array


def _item(at, plan: Plan, offsets_gmem, query_lengths_gmem, lengths_gmem) -> _Item:
    """The item of an entry of the schedule: tile of queries + tiles * (head + heads * sequence)."""
    q_tiles = pl.cdiv(plan.rows, Q_TILE)
    q_tile, at = lax.rem(at, q_tiles), lax.div(at, q_tiles)
    head, sequence = lax.rem(at, plan.q_heads), lax.div(at, plan.q_heads)
    kv_head = lax.div(head, plan.q_heads // plan.kv_heads)
    row, keys = q_tile * Q_TILE, plan.tile.keys
    length, count = lengths_gmem[sequence], query_lengths_gmem[sequence]
    position = offsets_gmem[sequence] + row
    end = position + lax.min(Q_TILE, count - row)  # past the last query's position
    visible = lax.min(length, end) if plan.causal else length
    last = lax.max(lax.div(visible + keys - 1, keys), 1)
    last = lax.select(row < count, last, 1)
    high = lax.div(lax.max(lax.min(length, position + 1) if plan.causal else length, 0), keys)
    first = low = 0
    if plan.window is not None:
        first = lax.min(lax.div(lax.max(position - plan.window + 1, 0), keys), last - 1)
        low = lax.div(lax.max(end - plan.window, 0) + keys - 1, keys)
    return _Item(
        sequence=sequence,
        head=head,
        kv_head=kv_head,
        row=row,
        position=position,
        length=length,
        first=first,
        low=low,
        high=high,
        last=last,
    )


def kernel(
    q_gmem,
    k_gmem,
    v_gmem,
    table_gmem,
    schedule_gmem,
    offsets_gmem,
    query_lengths_gmem,
    lengths_gmem,
    logit_scale_gmem,
    value_scale_gmem,
    sinks_gmem,
    out_gmem,
    *,
    plan: Plan,
    **scratch,
):
    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    items, registers = schedule_gmem[cta, 0], REGISTERS[plan.narrow is not None]
    bounds = (plan, offsets_gmem, query_lengths_gmem, lengths_gmem)

    @pl.when(wg == WARPGROUPS)
    def producer():
        plgpu.set_max_registers(registers[0], action="decrease")

        streams = [
            _Stream(source, *(scratch.get(name + part) for part in _STREAM_PARTS))
            for source, name in ((k_gmem, "k_"), (v_gmem, "v_"))
        ]
        queries = (scratch["qo_smem"][0], scratch["q_full"], scratch["q_empty"])

        def load(i, done):
            item = _item(schedule_gmem[cta, i + 1], *bounds)
            keys, values = streams
            return _load_item(item, i, done, plan, q_gmem, table_gmem, keys, values, *queries)

        done = lax.fori_loop(0, items, load, jnp.int32(0))

        # Nobody waits for the last completions of these.
        for barrier in (scratch["k_empty"], scratch["v_empty"]):

            @pl.loop(lax.max(done - plan.tile.stages, 0), done)
            def _(count, barrier=barrier):
                plgpu.barrier_wait(barrier.at[lax.rem(count, plan.tile.stages)])

        for other in range(WARPGROUPS):
            plgpu.barrier_wait(scratch["q_empty"].at[other])

    @pl.when(wg < WARPGROUPS)
    def math_():
        plgpu.set_max_registers(registers[1], action="increase")
        pl.when(wg == 1)(wgmma.offer_first_turn)

        def attend(i, done):
            item = _item(schedule_gmem[cta, i + 1], *bounds)
            scales = (
                logit_scale_gmem[item.kv_head],
                value_scale_gmem[item.kv_head],
                sinks_gmem[item.head],
            )
            return _attend_item(item, i, done, wg, plan, scales, out_gmem, **scratch)

        lax.fori_loop(0, items, attend, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


_STREAM_PARTS = ("smem", "narrow", "full", "empty", "arrived")


@dataclasses.dataclass(frozen=True)
class _Stream:
    """What the producer needs to load keys, or values.

    Attributes:
        source: Device memory.
        tiles: Shared memory: 16-bit tiles, one for each stage.
        narrow: Shared memory: a tile of 8-bit codes on its way to become one of them, or None.
        full: Barriers of the stages' loads.
        empty: Barriers of the stages' reads.
        arrived: Barrier of a tile that the producer changes before the others may see it.
    """

    source: Any
    tiles: Any
    narrow: Any
    full: Any
    empty: Any
    arrived: Any


def _load_item(
    item: _Item, i, done, plan: Plan, q_gmem, table_gmem, keys, values, q_smem, q_full, q_empty
):
    """The producer's part of an item; returns the number of tiles of keys loaded so far."""
    rows, stages, page_size = plan.tile.keys, plan.tile.stages, plan.page_size
    count = item.last - item.first

    def copy(source, target, tile, full):
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
            plgpu.copy_gmem_to_smem(
                source.at[table_gmem[item.sequence, at], item.kv_head, pl.ds(offset, piece)],
                target.at[pl.ds(pl.multiple_of(j * piece, piece), piece)],
                full,
            )

    def load(stream: _Stream, j, clean: bool):
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
            _rewrite(stream.narrow or target, target, plan, valid if clean else None)
            plgpu.commit_smem()
            for _ in range(1 if plan.narrow else plan.pieces):
                plgpu.barrier_arrive(full)

        if plan.narrow:
            change()

            @pl.when(j + 1 < count)
            def _():
                copy(stream.source, stream.narrow, tile - 1, stream.arrived)

        elif clean:

            @pl.when(valid >= rows)
            def _():
                copy(stream.source, target, tile, full)

            @pl.when(valid < rows)
            def _():
                copy(stream.source, target, tile, stream.arrived)
                change()

        else:
            copy(stream.source, target, tile, full)

    if plan.narrow:
        for stream in (keys, values):
            copy(stream.source, stream.narrow, item.last - 1, stream.arrived)
    load(keys, 0, False)
    for wg in range(WARPGROUPS):

        @pl.when(i > 0)
        def _(wg=wg):
            plgpu.barrier_wait(q_empty.at[wg])
            plgpu.commit_smem()

        part = pl.ds(item.row + wg * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(
            q_gmem.at[item.sequence, part, item.head], q_smem.at[wg], q_full.at[wg]
        )
    load(values, 0, plan.ragged)

    @pl.loop(1, count)
    def _(j):
        load(keys, j, False)
        load(values, j, plan.ragged)

    return done + count


def _rewrite(source, target, plan: Plan, valid) -> None:
    """The source's values in the target's dtype, rows from `valid` on zeros; they may be one buffer."""
    rows, dim = target.shape
    columns = min(dim, 128) if plan.narrow else plan.swizzle // 2  # of whole swizzled rows
    layout = plgpu.Layout.WGMMA_8BIT if plan.narrow else plgpu.Layout.WGMMA
    for row in [*range(0, rows - ROWS, ROWS), rows - ROWS]:  # the last rows may come twice

        def part(row=row):
            for column in range(0, dim, columns):
                index = (pl.ds(row, ROWS), pl.ds(column, columns))
                x = plgpu.load(source.at[index], layout=layout).astype(target.dtype)
                if valid is not None:
                    token = row + plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout)
                    x = jnp.where(token < valid, x, jnp.zeros_like(x))
                target.at[index][...] = x

        if plan.narrow:
            part()
        else:
            pl.when(valid < row + ROWS)(part)


def _attend_item(
    item: _Item,
    i,
    done,
    wg,
    plan: Plan,
    scales,
    out_gmem,
    *,
    qo_smem,
    k_smem,
    v_smem,
    q_full,
    q_empty,
    k_full,
    v_full,
    k_empty,
    v_empty,
    **_,
):
    """A math warpgroup's part of an item; returns the number of tiles of keys attended so far."""
    stages, swizzle = plan.tile.stages, plan.swizzle
    layout = plgpu.Layout.WGMMA
    row_layout = layout.reduce(1)
    logit_scale, value_scale, sink = scales
    q_smem, o_smem = qo_smem[0], qo_smem[-1]
    queries, separate = q_smem.at[wg], plan.tile.separate_output

    def spread(vector, shape):
        return lax.broadcast_in_dim(vector, shape, [0])

    softmax = functools.partial(
        _softmax, plan=plan, item=item, row=wg * ROWS, logit_scale=logit_scale
    )

    def step(j, carry, masked):
        """Values of tile j - 1 and keys of tile j, counted from the last."""
        p, top, total, out = carry
        slot, before = lax.rem(done + j, stages), lax.rem(done + j - 1, stages)
        plgpu.barrier_wait(k_full.at[slot])
        plgpu.barrier_wait(v_full.at[before])
        overlap = plan.tile.overlap and not masked and plan.soft_cap is None
        s, out = wgmma.logits_and_values(
            queries,
            k_smem.at[slot],
            p,
            v_smem.at[before],
            out,
            swizzle=swizzle,
            pending=int(overlap),
        )
        plgpu.barrier_arrive(k_empty.at[slot])
        if not overlap:
            plgpu.barrier_arrive(v_empty.at[before])
        tile = item.last - 1 - j
        weights, top, total, rescale = softmax(s, top, total, tile=tile, masked=masked)
        following = weights.astype(q_smem.dtype)
        if overlap:
            out = wgmma.settle(out, p, following)
            plgpu.barrier_arrive(v_empty.at[before])
        return following, top, total, out * spread(rescale, out.shape)

    slot = lax.rem(done, stages)
    plgpu.barrier_wait(q_full.at[wg])
    plgpu.barrier_wait(k_full.at[slot])
    s = wgmma.logits(queries, k_smem.at[slot], swizzle=swizzle)
    plgpu.barrier_arrive(k_empty.at[slot])
    top = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), row_layout)
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout)
    maskable = plan.causal or plan.ragged
    p, top, total, _ = softmax(s, top, total, tile=item.last - 1, masked=maskable)
    out = plgpu.layout_cast(jnp.zeros((ROWS, plan.value_dim), jnp.float32), layout)
    carry = (p.astype(q_smem.dtype), top, total, out)
    # Tiles before the last: masked on the right, whole, masked on the left.
    end, whole, left = item.last - item.first, item.last - item.high, item.last - item.low
    if plan.causal:
        whole = lax.clamp(1, whole, end)
        carry = lax.fori_loop(1, whole, functools.partial(step, masked=True), carry)
    else:
        whole = 1
    left = lax.clamp(whole, left, end) if plan.window is not None else end
    carry = lax.fori_loop(whole, left, functools.partial(step, masked=False), carry)
    if plan.window is not None:
        carry = lax.fori_loop(left, end, functools.partial(step, masked=True), carry)
    p, top, total, out = carry

    if separate:
        plgpu.barrier_arrive(q_empty.at[wg])
    slot = lax.rem(done + end - 1, stages)
    plgpu.barrier_wait(v_full.at[slot])
    out = wgmma.values(p, v_smem.at[slot], out, swizzle=swizzle)
    plgpu.barrier_arrive(v_empty.at[slot])

    seen = top > 0.5 * MASKED * (1.0 if plan.soft_cap else logit_scale)
    weight = 1 / total
    if plan.sinks:
        best = jnp.maximum(top, sink)
        mine = jnp.exp2(top - best)
        weight = mine / (total * mine + jnp.exp2(sink - best))
    weight = jnp.where(seen, weight * value_scale, jnp.zeros_like(weight))
    out = (out * spread(weight, out.shape)).astype(o_smem.dtype)
    target = o_smem.at[wg]
    if separate:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    target[...] = out
    plgpu.commit_smem()
    rows = pl.ds(item.row + wg * ROWS, ROWS)
    plgpu.copy_smem_to_gmem(target, out_gmem.at[item.sequence, rows, item.head])
    if not separate:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(q_empty.at[wg])
    return done + end


def _softmax(s, top, total, *, plan: Plan, item: _Item, row, logit_scale, tile, masked: bool):
    """One step of the online softmax in base 2: probabilities, maximum, sum and the factor of earlier ones."""
    layout = plgpu.Layout.WGMMA
    row_layout = layout.reduce(1)

    def spread(vector):
        return lax.broadcast_in_dim(vector, s.shape, [0])

    if plan.soft_cap is not None:
        # cap * tanh(x / cap); tanh(y) = 1 - 2 / (1 + exp(2 y)), its reciprocal a squared rsqrt.
        root = lax.rsqrt(1 + jnp.exp2(s * (logit_scale * (2 / plan.soft_cap))))
        s = LOG2E * plan.soft_cap - (2 * LOG2E * plan.soft_cap) * root * root
        logit_scale = 1.0
    if masked:
        token = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=layout)
        end = item.length - tile * plan.tile.keys
        if plan.causal:
            query = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=row_layout)
            after = item.position + row - tile * plan.tile.keys + 1 + query
            visible = token < spread(jnp.minimum(after, end))
            if plan.window is not None:
                visible = visible & (token >= spread(after - plan.window))
        else:
            visible = token < end
        s = jnp.where(visible, s, MASKED)
    new_top = jnp.maximum(top, jnp.max(s, axis=1) * logit_scale)
    p = jnp.exp2(s * logit_scale - spread(new_top))
    rescale = jnp.exp2(top - new_top)
    return p, new_top, total * rescale + jnp.sum(p, axis=1), rescale
