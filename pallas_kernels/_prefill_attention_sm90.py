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

Queries are taken heaviest first (the last of a causal sequence see most keys), back and forth over the CTAs, so
that all end together. Heads are taken in sections whose keys and values stay in the L2 cache.
"""

import dataclasses
import functools
import math

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
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Sizes of one CTA's buffers.

    Attributes:
        keys: Keys in a tile, a multiple of 16.
        stages: Tiles of keys, and of values, in flight.
        separate_output: Whether outputs have their own buffer, so that the next queries load while they leave;
            else they take the place of queries of the same size.
    """

    keys: int
    stages: int
    separate_output: bool

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
    section: int  # pairs of sequence and KV head that are taken together
    ctas: int

    @property
    def q_tiles(self) -> int:
        return pl.cdiv(self.rows, Q_TILE)

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads

    @property
    def items(self) -> int:
        return self.batch * self.q_heads * self.q_tiles

    @property
    def swizzle(self) -> int:
        return 128 if self.dim % 64 == 0 and self.value_dim % 64 == 0 else 64


def scratch(plan: Plan, dtype) -> dict:
    tile, swizzle = plan.tile, plan.swizzle
    tiled = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    per_tile = 1 if plan.page_size is None else max(tile.keys // plan.page_size, 1)
    full = plgpu.Barrier(num_arrivals=per_tile, num_barriers=tile.stages)
    empty = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tile.stages)
    queries = plgpu.SMEM((WARPGROUPS, ROWS, plan.dim), dtype, transforms=tiled)
    output = plgpu.SMEM((WARPGROUPS, ROWS, plan.value_dim), dtype, transforms=tiled)
    return dict(
        qo_smem=(queries, output) if tile.separate_output else (queries,),
        k_smem=plgpu.SMEM((tile.stages, tile.keys, plan.dim), dtype, transforms=tiled),
        v_smem=plgpu.SMEM((tile.stages, tile.keys, plan.value_dim), dtype, transforms=tiled),
        q_full=plgpu.Barrier(num_barriers=WARPGROUPS),
        q_empty=plgpu.Barrier(num_barriers=WARPGROUPS),
        k_full=full,
        v_full=full,
        k_empty=empty,
        v_empty=empty,
        v_edge=plgpu.Barrier(num_arrivals=per_tile),
    )


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


def _item_at(i, plan: Plan, offsets_gmem, query_lengths_gmem, lengths_gmem) -> _Item:
    """The i-th item of this CTA: heaviest first, back and forth over the CTAs."""
    cta = lax.axis_index("cta")
    at = i * plan.ctas + lax.select(lax.rem(i, 2) == 0, cta, plan.ctas - 1 - cta)
    heads = plan.section * plan.group
    section, at = lax.div(at, heads * plan.q_tiles), lax.rem(at, heads * plan.q_tiles)
    q_tile, head = plan.q_tiles - 1 - lax.div(at, heads), lax.rem(at, heads)
    pair = section * plan.section + lax.div(head, plan.group)
    sequence, kv_head = lax.div(pair, plan.kv_heads), lax.rem(pair, plan.kv_heads)
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
        head=kv_head * plan.group + lax.rem(head, plan.group),
        kv_head=kv_head,
        row=row,
        position=position,
        length=length,
        first=first,
        low=low,
        high=high,
        last=last,
    )


def _item_count(plan: Plan):
    """Items of this CTA."""
    rounds, rest = divmod(plan.items, plan.ctas)
    cta = lax.axis_index("cta")
    position = cta if rounds % 2 == 0 else plan.ctas - 1 - cta
    return rounds + (position < rest).astype(jnp.int32)


def kernel(
    q_gmem,
    k_gmem,
    v_gmem,
    table_gmem,
    offsets_gmem,
    query_lengths_gmem,
    lengths_gmem,
    logit_scale_gmem,
    sinks_gmem,
    out_gmem,
    *,
    plan: Plan,
    **scratch,
):
    wg = lax.axis_index("wg")
    bounds = (plan, offsets_gmem, query_lengths_gmem, lengths_gmem)

    @pl.when(wg == WARPGROUPS)
    def producer():
        plgpu.set_max_registers(40, action="decrease")

        def load(i, done):
            item = _item_at(i, *bounds)
            return _load_item(item, i, done, plan, (q_gmem, k_gmem, v_gmem, table_gmem), **scratch)

        done = lax.fori_loop(0, _item_count(plan), load, jnp.int32(0))

        # Nobody waits for the last completions of these.
        for barrier in (scratch["k_empty"], scratch["v_empty"]):

            @pl.loop(lax.max(done - plan.tile.stages, 0), done)
            def _(count, barrier=barrier):
                plgpu.barrier_wait(barrier.at[lax.rem(count, plan.tile.stages)])

        for other in range(WARPGROUPS):
            plgpu.barrier_wait(scratch["q_empty"].at[other])

    @pl.when(wg < WARPGROUPS)
    def math_():
        plgpu.set_max_registers(232, action="increase")
        pl.when(wg == 1)(wgmma.offer_first_turn)

        def attend(i, done):
            item = _item_at(i, *bounds)
            scales = (logit_scale_gmem[item.kv_head], sinks_gmem[item.head])
            return _attend_item(item, i, done, wg, plan, scales, out_gmem, **scratch)

        lax.fori_loop(0, _item_count(plan), attend, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _load_item(
    item: _Item,
    i,
    done,
    plan: Plan,
    sources,
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
    v_edge,
    **_,
):
    """The producer's part of an item; returns the number of tiles of keys loaded so far."""
    q_gmem, k_gmem, v_gmem, table_gmem = sources
    q_smem = qo_smem[0]
    keys, stages, page_size = plan.tile.keys, plan.tile.stages, plan.page_size
    count = item.last - item.first

    def copy(source, target, tile, full):
        if page_size is None:
            rows = pl.ds(tile * keys, keys)
            plgpu.copy_gmem_to_smem(source.at[item.sequence, rows, item.kv_head], target, full)
            return
        piece, last_page = min(keys, page_size), table_gmem.shape[1] - 1
        offset = lax.rem(tile * keys, page_size) if page_size > keys else 0
        for j in range(keys // piece):
            # Pages past the table repeat its last entry and are masked.
            page = table_gmem[
                item.sequence, lax.min(lax.div(tile * keys, page_size) + j, last_page)
            ]
            plgpu.copy_gmem_to_smem(
                source.at[page, item.kv_head, pl.ds(offset, piece)],
                target.at[pl.ds(j * piece, piece)],
                full,
            )

    def wait_empty(empty, at):
        @pl.when(at >= stages)
        def _():
            plgpu.barrier_wait(empty.at[lax.rem(at, stages)])
            plgpu.commit_smem()  # orders reads by the math warpgroups before the TMA's writes

    def load_keys(at, tile):
        slot = lax.rem(at, stages)
        wait_empty(k_empty, at)
        copy(k_gmem, k_smem.at[slot], tile, k_full.at[slot])

    def load_values(at, tile):
        slot = lax.rem(at, stages)
        wait_empty(v_empty, at)
        if not plan.ragged:
            copy(v_gmem, v_smem.at[slot], tile, v_full.at[slot])
            return
        valid = item.length - tile * keys

        @pl.when(valid >= keys)
        def whole():
            copy(v_gmem, v_smem.at[slot], tile, v_full.at[slot])

        @pl.when(valid < keys)
        def partial():
            # Zero times whatever lies past the sequence's end must be zero, NaN too.
            copy(v_gmem, v_smem.at[slot], tile, v_edge)
            plgpu.barrier_wait(v_edge)
            _zero_rows(v_smem.at[slot], valid, plan)
            plgpu.commit_smem()
            for _ in range(1 if page_size is None else max(keys // page_size, 1)):
                plgpu.barrier_arrive(v_full.at[slot])

    load_keys(done, item.last - 1)
    for wg in range(WARPGROUPS):

        @pl.when(i > 0)
        def _(wg=wg):
            plgpu.barrier_wait(q_empty.at[wg])
            plgpu.commit_smem()

        rows = pl.ds(item.row + wg * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(
            q_gmem.at[item.sequence, rows, item.head], q_smem.at[wg], q_full.at[wg]
        )
    load_values(done, item.last - 1)

    @pl.loop(1, count)
    def _(j):
        load_keys(done + j, item.last - 1 - j)
        load_values(done + j, item.last - 1 - j)

    return done + count


def _zero_rows(ref, valid, plan: Plan) -> None:
    """Zeroes the rows of a tile of values from `valid` on."""
    columns = plan.swizzle // 2
    last = plan.tile.keys - ROWS
    for row in [*range(0, last, ROWS), last]:  # the last rows may be visited twice

        @pl.when(valid < row + ROWS)
        def _(row=row):
            for column in range(0, plan.value_dim, columns):
                part = ref.at[pl.ds(row, ROWS), pl.ds(column, columns)]
                values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                token = plgpu.broadcasted_iota(
                    jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA
                )
                part[...] = jnp.where(token + row < valid, values, jnp.zeros_like(values))


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
    logit_scale, sink = scales
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
        s, out = wgmma.logits_and_values(
            queries, k_smem.at[slot], p, v_smem.at[before], out, swizzle=swizzle
        )
        plgpu.barrier_arrive(k_empty.at[slot])
        plgpu.barrier_arrive(v_empty.at[before])
        p, top, total, rescale = softmax(s, top, total, tile=item.last - 1 - j, masked=masked)
        return p.astype(q_smem.dtype), top, total, out * spread(rescale, out.shape)

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
    weight = jnp.where(seen, weight, jnp.zeros_like(weight))
    out = (out * spread(weight, out.shape)).astype(out_gmem.dtype)
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
