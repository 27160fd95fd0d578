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

Away from masks, `out += p v(j-1)` is still under way while `p = softmax(s)` is computed. 8- and 4-bit pages go through
a buffer of their own, from which the producer widens them to the float16 tiles (`_prefill_attention_widen_sm90`); FP4
has two producers, one for keys and queries and one for values, each with registers for its own tile. The
schedule says which CTA takes which tiles of queries, so that all end together.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.pallas_kernels import _attention_wgmma_sm90 as wgmma
from qjax.pallas_kernels._prefill_attention_plan_sm90 import (
    LOG2E,
    ROWS,
    WARPGROUPS,
    Item,
    Plan,
    item_at,
)
from qjax.pallas_kernels._prefill_attention_producer_sm90 import (
    STREAM_PARTS,
    Queries,
    Stream,
    load_item,
)

# Finite, so that differences of two masked logits are numbers; a power of two, so that scaling is exact and a fused
# multiply-add of two equal ones gives zero.
MASKED = -(2.0**99)
LOWEST = float(jnp.finfo(jnp.float32).min)  # below every scaled masked logit


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
    *rest,
    plan: Plan,
    **scratch,
):
    *narrow_gmem, out_gmem = rest
    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    items = schedule_gmem[cta, 0]
    bounds = (plan, offsets_gmem, query_lengths_gmem, lengths_gmem)

    of_scales = (6 if plan.page_scales else 4) if plan.token_scales else 0
    scales, blocks = narrow_gmem[:of_scales], narrow_gmem[of_scales:]

    def stream(name, source, block, scale, clean):
        pool, factors, alike = (*scale, None, None, None)[:3]
        buffers = (scratch.get(name + part) for part in STREAM_PARTS)
        return Stream(source, block, pool, factors, alike, clean, *buffers)

    key_blocks, value_blocks = blocks or (None, None)
    keys = stream("k_", k_gmem, key_blocks, scales[::2], False)
    values = stream("v_", v_gmem, value_blocks, scales[1::2], plan.ragged)
    queries = Queries(q_gmem, scratch["qo_smem"][0], scratch["q_full"], scratch["q_empty"])

    def produce(streams, queries):
        plgpu.set_max_registers(plan.registers[0], action="decrease")

        def load(i, done):
            item = item_at(schedule_gmem[cta, i + 1], *bounds)
            return load_item(item, i, done, plan, table_gmem, streams, queries)

        done = lax.fori_loop(0, items, load, jnp.int32(0))

        # Nobody waits for the last completions of these.
        for stream in streams:

            @pl.loop(lax.max(done - plan.tile.stages, 0), done)
            def _(count, stream=stream):
                plgpu.barrier_wait(stream.empty.at[lax.rem(count, plan.tile.stages)])

        for other in range(WARPGROUPS if queries else 0):
            plgpu.barrier_wait(queries.empty.at[other])

    if plan.producers == 1:
        pl.when(wg == WARPGROUPS)(lambda: produce((keys, values), queries))
    else:
        pl.when(wg == WARPGROUPS)(lambda: produce((keys,), queries))
        pl.when(wg == WARPGROUPS + 1)(lambda: produce((values,), None))

    @pl.when(wg < WARPGROUPS)
    def math_():
        plgpu.set_max_registers(plan.registers[1], action="increase")
        pl.when(wg == 1)(wgmma.offer_first_turn)

        def attend(i, done):
            item = item_at(schedule_gmem[cta, i + 1], *bounds)
            scales = (
                logit_scale_gmem[item.kv_head],
                value_scale_gmem[item.kv_head],
                sinks_gmem[item.head],
            )
            return _attend_item(item, i, done, wg, plan, scales, out_gmem, **scratch)

        lax.fori_loop(0, items, attend, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _attend_item(
    item: Item,
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


def _softmax(s, top, total, *, plan: Plan, item: Item, row, logit_scale, tile, masked: bool):
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
