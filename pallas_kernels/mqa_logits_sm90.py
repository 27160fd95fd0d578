"""Logits of DeepSeek sparse attention's lightning indexer, for Hopper: over keys in one array, or in pages.

logits[s, t] = sum_h weights[s, h] * relu(q[s, h] . k[t] * scale[t]) for the keys t in the range of query s, else -inf
(DeepSeek-V3.2-Exp, DeepSeek-AI 2025, equation 1). Queries and keys are FP8 (e4m3), all heads share the keys.

A product is S^T = K Q^T, 64 keys by the heads of a few queries, 128 columns: the sum over heads is along a row,
mostly within a thread. Persistent CTAs of a producer and two math warpgroups::

    producer   queries, weights, bounds of a tile -> q_smem, weight_smem, bound_smem [2]   q_full, q_empty
               keys and scales of a step          -> key_smem, scale_smem [stages]         full, empty
               -inf -> output, where a whole tile sees nothing: a few between loads, the rest at the end
    math 0, 1  issue product n + 1 into the other accumulator; wait for product n;
               relu, weigh and add up product n -> out_smem [2] -> output, once a step
               many queries: a warpgroup has half of a tile's queries, both have the same 128 keys
               few queries (decode): a warpgroup has half of a step's 256 keys, both have the same queries

What follows a product must take less time than the product. For 64 keys by N columns and D = 128, the 4096 FP8
multiply-adds per clock of an SM's tensor cores take 64 N 128 / 4096 = 2 N clocks. Each of the 64 N numbers costs a
relu and a multiply-add, 128 of either per clock: N clocks if relu is an addition, x + |x| = 2 relu(x) with the 2 in
the weights (a maximum would go through another pipe at half the rate). For N = 128 a warp spends 128 issue slots on
that, and about 55 on the exchange between lanes, scales, bounds, descriptors and stores (counted in SASS). So the two
warpgroups need 2 * 183 slots of each scheduler while their two products take 512 clocks: the tensor cores remain the
bottleneck if both go on at the same time. They do, as a warpgroup queues its next product before it waits for the
last, and the two warpgroups queue independently. With D = 64 products take half as long, and the additions are the
bottleneck.

Each key is multiplied by 512 columns of a CTA (D = 128): 8 KB of keys last 1024 clocks, which is 8 bytes per clock
and SM from the L2 cache. 2 x 64 accumulators and 64 weights are 192 of a thread's 240 registers.

Keys are independent of each other. So the steps of all tiles form one line that is cut into equal parts, one for each
CTA, whatever ranges or lengths are: one long sequence fills the GPU, and causal ranges do not unbalance it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qjax.pallas_kernels import _mqa_logits_registers_sm90 as reg
from qjax.pallas_kernels._mqa_logits_plan_sm90 import (
    COLUMNS,
    KEYS,
    WARPGROUPS,
    Plan,
    TileConfig,
    choose_tiles,
    schedule,
    scratch,
)
from qjax.pallas_kernels._mqa_logits_producer_sm90 import produce

PAGE_SIZES = (32, 64, 128)  # and multiples of 256


def unsupported_reason(
    heads: int,
    dim: int,
    *,
    dtype: DTypeLike = "float8_e4m3fn",
    key_dtype: DTypeLike = "float8_e4m3fn",
    page_size: int | None = None,
) -> str | None:
    """Why the kernels can't take such queries and keys, None if they can.

    Args:
        heads: H.
        dim: D.
        dtype: Of the queries.
        key_dtype: Of the keys.
        page_size: Keys in a page, None for keys in one array.
    """
    for name, found in (("queries", dtype), ("keys", key_dtype)):
        if jnp.dtype(found).name != "float8_e4m3fn":
            return f"{name} must be float8_e4m3fn; found {jnp.dtype(found).name}"
    if heads % 8 or not 8 <= heads <= COLUMNS:
        return f"heads must be a multiple of 8 up to {COLUMNS}; found {heads}"
    if dim not in (64, 128):
        return f"a head's size must be 64 or 128; found {dim}"
    if page_size is not None and page_size not in PAGE_SIZES and (page_size % 256 or not page_size):
        return f"page_size must be one of {PAGE_SIZES} or a multiple of 256; found {page_size}"
    return None


def mqa_logits(
    query: Array,
    head_weights: Array,
    keys: Array,
    key_scale: Array,
    start: Array,
    end: Array,
    *,
    tile: TileConfig | None = None,
    num_sms: int | None = None,
) -> Array:
    """sum_h head_weights[s, h] * relu(query[s, h] . keys[t] * key_scale[t]) for start[s] <= t < end[s], else -inf.

    Args:
        query: float8_e4m3fn [S, H, D]; its scale is in the weights.
        head_weights: float32 [S, H].
        keys: float8_e4m3fn [T, D].
        key_scale: float32 [T], not negative.
        start: int32 [S].
        end: int32 [S]; what is outside 0..T does not count.
        tile: Default `choose_tiles`.
        num_sms: SMs to fill; default those of the first device.

    Returns:
        float32 [S, T].

    Raises:
        ValueError: If shapes or dtypes are not those above, or `unsupported_reason` has a reason.
    """
    check(query, head_weights, keys, key_scale, start, end)
    (queries, heads, dim), count = query.shape, keys.shape[0]
    reason = unsupported_reason(heads, dim, dtype=query.dtype, key_dtype=keys.dtype)
    if reason:
        raise ValueError(f"mqa_logits: {reason}")
    bounds = jnp.clip(jnp.stack([start, end], axis=1), 0, count)[None]
    tile = choose_tiles(queries, heads, dim) if tile is None else tile
    plan = _plan(1, queries, heads, dim, count, None, tile, num_sms)
    if (
        count < plan.step
    ):  # TMA copies whole steps, cut where an array ends, but none is larger than the array
        keys = jnp.pad(keys, ((0, plan.step - count), (0, 0)))
        key_scale = jnp.pad(key_scale, (0, plan.step - count))
    return _run(query[None], head_weights[None], keys, key_scale, {}, bounds, plan)[0]


def paged_mqa_logits(
    query: Array,
    head_weights: Array,
    pages: Array,
    page_scale: Array,
    page_table: Array,
    lengths: Array,
    *,
    tile: TileConfig | None = None,
    num_sms: int | None = None,
) -> Array:
    """`mqa_logits` of each sequence's newest queries over its pages.

    Query i of Q sees the keys up to its own: those before lengths - Q + i + 1.

    Args:
        query: float8_e4m3fn [B, Q, H, D]; its scale is in the weights.
        head_weights: float32 [B, Q, H].
        pages: float8_e4m3fn [P, page_size, D].
        page_scale: float32 [P, page_size], not negative.
        page_table: int32 [B, n]; entries past a sequence's pages may be anything.
        lengths: int32 [B], the Q new keys included, at most n * page_size.
        tile: Default `choose_tiles`.
        num_sms: SMs to fill; default those of the first device.

    Returns:
        float32 [B * Q, n * page_size].

    Raises:
        ValueError: If shapes or dtypes are not those above, or `unsupported_reason` has a reason.
    """
    check_paged(query, head_weights, pages, page_scale, page_table, lengths)
    (batch, queries, heads, dim), page_size = query.shape, pages.shape[1]
    reason = unsupported_reason(
        heads, dim, dtype=query.dtype, key_dtype=pages.dtype, page_size=page_size
    )
    if reason:
        raise ValueError(f"paged_mqa_logits: {reason}")
    count = page_table.shape[1] * page_size
    end = lengths[:, None] + jnp.arange(1 - queries, 1, dtype=jnp.int32)[None, :]
    bounds = jnp.clip(jnp.stack([jnp.zeros_like(end), end], axis=2), 0, count)
    tile = choose_tiles(queries, heads, dim) if tile is None else tile
    plan = _plan(batch, queries, heads, dim, count, page_size, tile, num_sms)
    paging = dict(table=page_table, lengths=bounds[:, -1, 1])
    out = _run(query, head_weights, pages, page_scale, paging, bounds, plan)
    return out.reshape(batch * queries, count)


def check(query, head_weights, keys, key_scale, start, end) -> None:
    """Raises ValueError if the shapes or dtypes of `mqa_logits`' arguments don't agree."""
    if query.ndim != 3 or keys.ndim != 2 or not query.size or not keys.size:
        raise ValueError(
            "mqa_logits: query must be [S, H, D] and keys [T, D], neither empty; "
            f"found {list(query.shape)} and {list(keys.shape)}"
        )
    (queries, heads, dim), count = query.shape, keys.shape[0]
    _expect(
        "mqa_logits",
        keys=(keys, (count, dim), keys.dtype),
        head_weights=(head_weights, (queries, heads), jnp.float32),
        key_scale=(key_scale, (count,), jnp.float32),
        start=(start, (queries,), jnp.int32),
        end=(end, (queries,), jnp.int32),
    )


def check_paged(query, head_weights, pages, page_scale, page_table, lengths) -> None:
    """Raises ValueError if the shapes or dtypes of `paged_mqa_logits`' arguments don't agree."""
    if (query.ndim, pages.ndim, page_table.ndim) != (4, 3, 2) or 0 in (
        query.size,
        pages.size,
        page_table.size,
    ):
        raise ValueError(
            "paged_mqa_logits: query must be [B, Q, H, D], pages [P, page_size, D] and page_table [B, n], none "
            f"empty; found {list(query.shape)}, {list(pages.shape)} and {list(page_table.shape)}"
        )
    batch, queries, heads, dim = query.shape
    _expect(
        "paged_mqa_logits",
        pages=(pages, (*pages.shape[:2], dim), pages.dtype),
        head_weights=(head_weights, (batch, queries, heads), jnp.float32),
        page_scale=(page_scale, pages.shape[:2], jnp.float32),
        page_table=(page_table, (batch, page_table.shape[1]), jnp.int32),
        lengths=(lengths, (batch,), jnp.int32),
    )


def _expect(op: str, **arguments) -> None:
    for name, (array, shape, dtype) in arguments.items():
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{op}: {name} must be {jnp.dtype(dtype).name} {list(shape)}; "
                f"found {array.dtype} {list(array.shape)}"
            )


def _plan(batch, queries, heads, dim, count, page_size, tile, num_sms) -> Plan:
    num_sms = jax.devices()[0].core_count if num_sms is None else num_sms
    plan = Plan(batch, queries, heads, dim, count, page_size, tile, num_sms)
    return Plan(
        batch, queries, heads, dim, count, page_size, tile, min(num_sms, plan.units * plan.steps)
    )


def _run(query, head_weights, keys, key_scale, paging, bounds, plan: Plan) -> Array:
    """float32 [B, Q, T]."""
    rows = plan.queries * plan.heads
    bounds, units, work = schedule(bounds, plan)
    operands = dict(
        query=query.reshape(plan.batch, rows, plan.dim),
        weights=head_weights.reshape(plan.batch, rows),
        keys=keys,
        scales=key_scale,
        bounds=bounds,
        units=units,
        work=work,
        **paging,
    )
    # TMA wants rows of whole 16 bytes, and none shorter than a copy.
    columns = max(-(-plan.keys // 4) * 4, plan.step)
    out = plgpu.kernel(
        functools.partial(_kernel, names=tuple(operands), plan=plan),
        out_type=jax.ShapeDtypeStruct((plan.batch, plan.queries, columns), jnp.float32),
        grid=(plan.workers,),
        grid_names=("worker",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        kernel_name="paged_mqa_logits" if paging else "mqa_logits",
        scratch_types=scratch(plan, query.dtype),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*operands.values())
    return out if columns == plan.keys else out[:, :, : plan.keys]


def _kernel(*refs, names: tuple[str, ...], plan: Plan, **buffers):
    gmem = dict(zip((*names, "out"), refs, strict=True))
    wg, worker = lax.axis_index("wg"), lax.axis_index("worker")

    def my(i):  # loaded by each role: what lives from before the roles part would spill
        return gmem["work"][worker, i]

    def for_each_unit(body) -> tuple[Array, Array]:
        """Calls body(unit, first step, steps, steps before, units before)."""

        def visit(unit, before):
            steps_before, units_before = before
            offset, past = gmem["units"][unit, 1], gmem["units"][unit + 1, 1]
            mine = lax.max(begin, offset)
            steps = lax.max(lax.min(end, past) - mine, 0)

            @pl.when(steps > 0)
            def _():
                first = gmem["units"][unit, 0] + mine - offset
                body(unit, first, steps, steps_before, units_before)

            return steps_before + steps, units_before + lax.min(steps, 1)

        begin, end = my(0), my(1)
        return lax.fori_loop(my(2), my(3), visit, (jnp.int32(0), jnp.int32(0)))

    @pl.when(wg == WARPGROUPS)
    def producer():
        plgpu.set_max_registers(plan.registers[0], action="decrease")
        produce(gmem, for_each_unit, worker, my(1) - my(0), plan, **buffers)

    @pl.when(wg < WARPGROUPS)
    def math():
        plgpu.set_max_registers(plan.registers[1], action="increase")
        for_each_unit(functools.partial(_multiply, gmem, wg, plan, **buffers))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _multiply(
    gmem,
    wg,
    plan: Plan,
    unit,
    first,
    steps,
    steps_before,
    units_before,
    *,
    q_smem,
    weight_smem,
    bound_smem,
    key_smem,
    scale_smem,
    out_smem,
    q_full,
    q_empty,
    full,
    empty,
    **_,
):
    """A math warpgroup's part of the logits of one unit's steps."""
    tile, rows = plan.tile, reg.ROWS
    sequence, query = plan.place(unit)
    buffer = lax.rem(units_before, 2)
    my_group = 0 if tile.by_keys else wg * plan.my_groups
    my_key = wg * KEYS if tile.by_keys else 0
    my_query = query + my_group * tile.queries
    jobs = [(key, group) for key in range(0, KEYS, rows) for group in range(plan.my_groups)]

    def slot_of(i):
        return lax.rem(steps_before + i, tile.stages)

    def issue(i, job, before=None):
        key, group = job
        keys = key_smem.at[slot_of(i), pl.ds(my_key + key, rows)]
        return reg.start(keys, q_smem.at[buffer, my_group + group], before)

    def step(i, product, *, last: bool):
        slot, parity = slot_of(i), lax.rem(steps_before + i, 2)
        first_key = (first + i) * plan.step + my_key
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the store of the step before the last one
        scales = {}
        for n, (key, group) in enumerate(jobs):
            final = n == len(jobs) - 1
            if key not in scales:
                scales[key] = plgpu.load(
                    scale_smem.at[slot, pl.ds(my_key + key, rows)],
                    layout=plgpu.Layout.WGMMA.reduce(1),
                )
            if n == 0:  # ptxas follows no product that is in flight from one iteration to the next
                product = reg.finish(product)
            if final and last:
                following, product = None, reg.finish(product)
            elif final:
                plgpu.barrier_wait(full.at[slot_of(i + 1)])
                following, product = issue(i + 1, jobs[0], product)
            else:
                following, product = issue(i, jobs[n + 1], product)
            if final:
                plgpu.barrier_arrive(empty.at[slot])
            reg.weigh(
                product,
                weights[group],
                scales[key],
                bound_smem.at[
                    buffer, pl.ds(2 * (my_group + group) * tile.queries, 2 * tile.queries)
                ],
                out_smem.at[
                    wg, parity, pl.ds(group * tile.queries, tile.queries), pl.ds(key, rows)
                ],
                first_key + key,
            )
            product = following
        plgpu.commit_smem()
        target = gmem["out"].at[sequence, pl.ds(my_query, plan.my_queries), pl.ds(first_key, KEYS)]
        plgpu.copy_smem_to_gmem(out_smem.at[wg, parity], target)
        return product

    plgpu.barrier_wait(q_full.at[buffer])
    weights = [
        0.5
        * plgpu.load(
            weight_smem.at[buffer, my_group + group, pl.ds(0, plan.columns)],
            layout=plgpu.Layout.WGMMA.reduce(0),
        )
        for group in range(plan.my_groups)
    ]
    plgpu.barrier_wait(full.at[slot_of(0)])
    product = issue(0, jobs[0])
    product = lax.fori_loop(0, steps - 1, functools.partial(step, last=False), product)
    step(steps - 1, product, last=True)
    plgpu.barrier_arrive(q_empty.at[buffer])
