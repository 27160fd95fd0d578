"""Decode attention of the newest queries of each sequence over a paged KV cache, for Hopper (split-KV).

Reading the cache is what takes time: pages travel as they are stored, in a ring of tiles, and become operands in
registers (`_paged_attention_registers_sm90`). One CTA for each (sequence, KV head, split of the context). It is one
warpgroup, or two that share the tiles where more than 16 rows (query heads of the KV head x queries) need them::

    TMA the first tiles -> ring
    for each tile of the split:
      wait for its keys;    s = q k^T; scale, cap, mask; each warp its running maximum and sum
      wait for its values;  out = out * rescale + p v
      all warps are done with the tile: TMA the tile after the ring's last one into its place
    the four warps' parts -> shared memory -> their sum -> memory

Up to eight rows are columns of the tensor instructions, whose rows are tokens: half as many as with rows of queries,
of which there must be 16. Several CTAs share an SM, so that one computes while others wait. With one split the result
is final; with more, each returns its normalized part and the logarithm of its sum, which a second kernel combines
exactly.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qjax.pallas_kernels import _paged_attention_loads_sm90 as loads
from qjax.pallas_kernels import _paged_attention_mma_sm90 as mma
from qjax.pallas_kernels import _paged_attention_registers_sm90 as reg
from qjax.pallas_kernels._paged_attention_combine_sm90 import combine
from qjax.pallas_kernels._paged_attention_plan_sm90 import Plan, choose_splits, ring_stages, scratch

MASKED = -1e30  # finite, so that differences of two masked logits are numbers
LOWEST = MASKED / 2  # so that the weights of masked logits are zero though nothing else is seen
MAX_ROWS = 64
MAX_QUERIES = 8
PAGE_DTYPES = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", reg.FP4)
QUERY_DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_SIZES = (8, 16, 32, 64, 128)


def unsupported_reason(
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    *,
    queries: int = 1,
    page_dtype: DTypeLike = "bfloat16",
    query_dtype: DTypeLike = "bfloat16",
) -> str | None:
    """Why the kernel can't attend with these sizes, None if it can."""
    page_dtype, query_dtype = jnp.dtype(page_dtype).name, jnp.dtype(query_dtype).name
    if page_dtype not in PAGE_DTYPES or query_dtype not in QUERY_DTYPES:
        return (
            f"pages must be one of {PAGE_DTYPES} and queries of {QUERY_DTYPES}; "
            f"found {page_dtype} and {query_dtype}"
        )
    if q_heads % kv_heads or q_heads // kv_heads > MAX_ROWS:
        return f"{kv_heads} KV heads must divide the query heads, at most {MAX_ROWS} each; found {q_heads}"
    if not 1 <= queries <= MAX_QUERIES or queries * q_heads // kv_heads > MAX_ROWS:
        return (
            f"at most {MAX_QUERIES} queries of a sequence, and {MAX_ROWS} times the query heads of a "
            f"KV head; found {queries} times {q_heads // kv_heads}"
        )
    if head_dim not in HEAD_DIMS:
        return f"head_dim must be one of {HEAD_DIMS}; found {head_dim}"
    if page_size not in PAGE_SIZES:
        return f"page_size must be one of {PAGE_SIZES}; found {page_size}"
    if page_dtype == reg.FP4 and (head_dim not in (64, 128) or page_size * head_dim % 2048):
        return (
            "FP4 pages need a head_dim of 64 or 128, and pages of 2048 numbers or a multiple; "
            f"found {head_dim} and {page_size} tokens"
        )
    return None


def paged_decode_attention(
    query: Array,
    key_pages: Array,
    value_pages: Array,
    page_table: Array,
    lengths: Array,
    *,
    key_scale: Array | None = None,
    value_scale: Array | None = None,
    key_block_scale: Array | None = None,
    value_block_scale: Array | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
    sinks: Array | None = None,
    splits: int | None = None,
    stages: int | None = None,
    num_sms: int | None = None,
) -> Array:
    """softmax(scale * q k^T) v of each sequence's newest queries over its whole cache.

    Args:
        query: [B, N, H] or [B, T, N, H], bfloat16 or float16; head n attends with KV head n // (N // K).
        key_pages: [P, K, page_size, H], bfloat16, float16, e4m3 or e5m2; key = stored * key_scale. Or uint8
            [P, K, page_size, H / 2]: two e2m1 codes, the even channel low (NVFP4).
        value_pages: Like key_pages.
        page_table: int32 [B, pages]; entries past a sequence's pages may be anything.
        lengths: int32 [B] or [B, T]: tokens that a query sees, its own included; 0 gives zeros.
        key_scale: float32 [K], [P, K] or [P, K, page_size]; None for 1.
        value_scale: Likewise; both are None or of as many axes.
        key_block_scale: Of e2m1 codes: e4m3 [P, K, page_size, H / 16], one more factor.
        value_block_scale: Likewise.
        scale: Default 1/sqrt(H).
        sliding_window: Only the last this many tokens are seen.
        logit_soft_cap: Logits become cap * tanh(logit / cap).
        sinks: float32 [N]: logits that take part in the softmax and carry no value.
        splits: Parts of the context; default `choose_splits`.
        stages: Tiles on their way or in use; default `ring_stages`.
        num_sms: SMs to fill; default those of the first device.

    Returns:
        Like query.

    Raises:
        ValueError: If shapes or dtypes are not those above, or `unsupported_reason` has a reason.
    """
    shape = query.shape
    if query.ndim == 3:
        query, lengths = query[:, None], lengths[:, None] if lengths.ndim == 1 else lengths
    _check(query, key_pages, value_pages, page_table, lengths, key_scale, value_scale, sinks)
    (batch, steps, q_heads, dim), (_, kv_heads, page_size, _) = query.shape, key_pages.shape
    block_scales = _block_scales(key_pages, dim, key_block_scale, value_block_scale)
    storage = reg.Storage.of(reg.FP4 if block_scales else key_pages.dtype, dim)
    rows = steps * (q_heads // kv_heads)
    default_stages, ctas = ring_stages(storage, 1 if rows <= reg.ROWS else 2)
    plan = Plan(
        storage=storage,
        page_size=page_size,
        group=q_heads // kv_heads,
        queries=steps,
        splits=1,
        stages=default_stages if stages is None else stages,
        window=sliding_window,
        logit_scale=float(dim**-0.5 if scale is None else scale),
        soft_cap=logit_soft_cap,
        sinks=sinks is not None,
    )
    if splits is None:
        num_sms = jax.devices()[0].core_count if num_sms is None else num_sms
        splits = choose_splits(
            batch * kv_heads * plan.row_blocks,
            min(page_table.shape[1] * page_size, sliding_window or 1 << 30),
            num_sms=num_sms,
            ctas=ctas,
            storage=storage,
        )
    plan = dataclasses.replace(plan, splits=splits)
    ring = plan.stages * 2 * storage.tile * storage.row_bytes
    if ring < plan.warpgroups * loads.merge_bytes(plan.merged_rows, dim):
        raise ValueError(
            f"paged_decode_attention: {plan.stages} stages have no room for the results: take more"
        )
    # NumPy's become constants of the program; jax.numpy's would be computed at each call.
    ones = np.ones((kv_heads,), np.float32)
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    arrays = [
        query,
        key_pages,
        value_pages,
        page_table,
        lengths,
        ones if key_scale is None else key_scale,
        ones if value_scale is None else value_scale,
        np.zeros((q_heads,), np.float32) if sinks is None else sinks,
        *block_scales,
    ]
    merged = plan.row_blocks * plan.warpgroups * plan.merged_rows
    out_dtype = query.dtype if splits == 1 else jnp.float32
    out, log_sums = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, splits, merged, dim), out_dtype),
            jax.ShapeDtypeStruct(
                (batch, kv_heads, splits, merged // plan.merged_rows, 64, *plan.stat_columns),
                jnp.float32,
            ),
        ),
        grid=(splits, kv_heads * plan.row_blocks, batch),
        grid_names=("split", "head", "sequence"),
        num_threads=plan.warpgroups,
        thread_name="wg",
        kernel_name="paged_decode_attention",
        scratch_types=scratch(plan),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*arrays)
    if splits == 1:
        out = out[:, :, 0]
    else:
        log_sums = log_sums.reshape(*log_sums.shape[:4], -1)
        out = combine(out, log_sums, sinks, group=plan.group, out_dtype=query.dtype)
    out = out[:, :, : plan.rows].reshape(batch, kv_heads, steps, plan.group, dim)
    return jnp.moveaxis(out, 1, 2).reshape(shape)


def _check(query, key_pages, value_pages, page_table, lengths, key_scale, value_scale, sinks):
    def expect(name, array, shapes, dtypes):
        if array.shape not in shapes or array.dtype.name not in dtypes:
            wanted = " or ".join(str(list(s)) for s in shapes)
            raise ValueError(
                f"paged_decode_attention: {name} must be {' or '.join(dtypes)} {wanted}; "
                f"found {array.dtype}{list(array.shape)}"
            )

    if query.ndim != 4 or key_pages.ndim != 4:
        raise ValueError(
            "paged_decode_attention: query must be [B, N, H] or [B, T, N, H] and key_pages "
            f"[P, K, page_size, H]; found {list(query.shape)}, {list(key_pages.shape)}"
        )
    (batch, steps, q_heads, dim), (pool, kv_heads, page_size, _) = query.shape, key_pages.shape
    reason = unsupported_reason(
        q_heads,
        kv_heads,
        dim,
        page_size,
        queries=steps,
        page_dtype=reg.FP4 if key_pages.dtype == jnp.uint8 else key_pages.dtype,
        query_dtype=query.dtype,
    )
    if reason:
        raise ValueError(f"paged_decode_attention: {reason}")
    columns = dim // 2 if key_pages.dtype == jnp.uint8 else dim
    expect("key_pages", key_pages, [(*key_pages.shape[:3], columns)], (key_pages.dtype.name,))
    expect("value_pages", value_pages, [key_pages.shape], (key_pages.dtype.name,))
    expect("page_table", page_table, [(batch, *page_table.shape[1:2])], ("int32",))
    expect("lengths", lengths, [(batch, steps)], ("int32",))
    scales = [(kv_heads,), (pool, kv_heads), (pool, kv_heads, page_size)]
    if (key_scale is None) != (value_scale is None):
        raise ValueError("paged_decode_attention: give both scales or none")
    if key_scale is not None:
        expect("key_scale", key_scale, scales, ("float32",))
        expect("value_scale", value_scale, [key_scale.shape], ("float32",))
    if sinks is not None:
        expect("sinks", sinks, [(q_heads,)], ("float32", "bfloat16", "float16"))


def _block_scales(key_pages: Array, dim: int, *scales: Array | None) -> list[Array]:
    """FP4's scales [P, K, page_size * H / 2048, 128], in rows that TMA copies; none of other pages."""
    if key_pages.dtype != jnp.uint8:
        if any(s is not None for s in scales):
            raise ValueError("paged_decode_attention: only uint8 pages take block scales")
        return []
    shape = (*key_pages.shape[:3], dim // reg.SCALE_BLOCK)
    for name, scale in zip(("key", "value"), scales, strict=True):
        if scale is None or scale.shape != shape or scale.dtype != jnp.float8_e4m3fn:
            found = None if scale is None else f"{scale.dtype}{list(scale.shape)}"
            raise ValueError(
                f"paged_decode_attention: {name}_block_scale must be float8_e4m3fn {list(shape)}; "
                f"found {found}"
            )
    return [s.reshape(*shape[:2], -1, 128) for s in scales if s is not None]


def _kernel(
    q_gmem,
    k_gmem,
    v_gmem,
    table_gmem,
    lengths_gmem,
    k_scale_gmem,
    v_scale_gmem,
    sinks_gmem,
    *outputs,
    plan: Plan,
    ring,
    block_scales: Any = None,
    tops,
    sums,
    keys_full,
    values_full,
    empty,
    done,
):
    *block_scales_gmem, out_gmem, log_sum_gmem = outputs
    storage, tile_tokens, page_size = plan.storage, plan.storage.tile, plan.page_size
    split, sequence = lax.axis_index("split"), lax.axis_index("sequence")
    wg = lax.axis_index("wg")
    head = lax.axis_index("head") // plan.row_blocks
    block = lax.rem(lax.axis_index("head"), plan.row_blocks) * plan.warpgroups + wg
    static_scale = len(k_scale_gmem.shape) == 1

    # Tokens from `start` to `length` are seen by a query; a row sees those up to its own end.
    lengths = [lengths_gmem[sequence, t] for t in range(plan.queries)]
    capacity = table_gmem.shape[1] * page_size
    length = lax.min(functools.reduce(lax.max, lengths), capacity)
    start = 0
    if plan.window is not None:
        start = lax.max(functools.reduce(lax.min, lengths) - plan.window, 0)
    first_tile = start // tile_tokens
    tiles = lax.max((length + tile_tokens - 1) // tile_tokens - first_tile, 0)
    begin = first_tile + split * tiles // plan.splits
    count = first_tile + (split + 1) * tiles // plan.splits - begin
    last_page = lax.max(length - 1, 0) // page_size

    def pages(i):
        """Page numbers of a tile; the last page stands for those after it, which are masked."""
        first = (begin + i) * tile_tokens // page_size
        return tuple(
            table_gmem[sequence, lax.min(first + j, last_page)] for j in range(plan.pages_per_tile)
        )

    def copy(i, numbers):
        slot = lax.rem(i, plan.stages)
        piece = min(tile_tokens, page_size)
        offset = lax.rem((begin + i) * tile_tokens, page_size) if page_size > tile_tokens else 0
        for part, (source, full) in enumerate(((k_gmem, keys_full), (v_gmem, values_full))):
            for j, number in enumerate(numbers):
                plgpu.copy_gmem_to_smem(
                    source.at[number, head, pl.ds(offset, piece)],
                    ring.at[slot, part, pl.ds(j * piece, piece)],
                    full.at[slot],
                )
                if block_scales is not None:
                    per_row = 128 * reg.SCALE_BLOCK // storage.dim  # tokens
                    rows = piece // per_row
                    plgpu.copy_gmem_to_smem(
                        block_scales_gmem[part].at[number, head, pl.ds(offset // per_row, rows)],
                        block_scales.at[slot, part, pl.ds(j * rows, rows)],
                        full.at[slot],
                    )

    # Scales of pages and tokens are read two tiles ahead: the pages' numbers, then what they point to.
    per_token = len(k_scale_gmem.shape) == 3
    options = dict(storage=storage, page_size=page_size)

    def scale_pages(i):
        if static_scale:
            return ()
        where = (sequence, begin + lax.min(i, lax.max(count - 1, 0)), last_page)
        return loads.token_pages(table_gmem, *where, **options)

    def scales(i, numbers):
        if static_scale:
            return ()
        where = (numbers, head, begin + lax.min(i, lax.max(count - 1, 0)))
        return tuple(
            loads.load_scales(s, *where, **options, turned=plan.turned)
            for s in (k_scale_gmem, v_scale_gmem)
        )

    def of_tokens(scale):
        shape = dict(storage=storage, per_token=per_token, turned=plan.turned)
        return loads.spread_scales(scale, **shape)

    def seen_scales(scale, tile):
        """Zero for tokens, or their blocks of eight, that no query sees: their scales may be NaN."""
        first = loads.scaled_tokens(
            scale.shape, storage=storage, per_token=per_token, turned=plan.turned
        )
        first = first + tile * tile_tokens
        end = first + (1 if per_token else 8)
        return jnp.where((end > start) & (first < length), scale, 0.0)

    for i in range(plan.stages):

        @pl.when((wg == 0) & (i < count))
        def _(i=i):
            copy(i, pages(i))

    layout = plgpu.Layout.WGMMA
    row_layout = layout.reduce(1)
    to_log2 = math.log2(math.e)
    query = loads.queries(q_gmem, sequence, head, block, group=plan.group, storage=storage)
    query = query.astype(jnp.float32).astype(storage.operand)
    if plan.queries == 1:
        row_end = lengths[0]
    else:
        row_end = loads.row_values(
            lengths_gmem,
            sequence * plan.queries,
            block,
            repeat=plan.group,
            count=plan.rows,
            turned=plan.turned,
        )
    # Base 2; or what the exponential that makes a tanh takes, good to 2^-22 where tanh's approximation is to 2^-11.
    logit_scale = (
        plan.logit_scale * storage.unit * to_log2 * (2 / plan.soft_cap if plan.soft_cap else 1)
    )
    if static_scale:
        logit_scale = k_scale_gmem[head] * logit_scale

    def scales_at(slot, part):
        return () if block_scales is None else (block_scales.at[slot, part],)

    # What queries have is [64], a number for each row; or turned, [64, 8], one for each column.
    stat_layout = layout if plan.turned else row_layout

    def spread(vector, shape):
        if plan.turned:
            return loads.repeat(vector, shape[1])
        return lax.broadcast_in_dim(vector, shape, [0])

    def of_queries(alike):
        return alike if plan.turned else jnp.max(alike, axis=1)

    def attend(i, carry):
        total, top, largest, out, numbers, scale_numbers, token_scale = carry
        slot = lax.rem(i, plan.stages)
        tile = begin + i
        plgpu.barrier_wait(keys_full.at[slot])
        s = mma.logits(
            query, ring.at[slot, 0], *scales_at(slot, 0), storage=storage, turned=plan.turned
        )
        if static_scale:
            s = s * logit_scale
        else:
            s = s * of_tokens(token_scale[0] * logit_scale)
        if plan.soft_cap is not None:
            s = (1 - 2 / (jnp.exp2(s) + 1)) * (plan.soft_cap * to_log2)
        token = loads.tokens(s.shape, storage=storage, turned=plan.turned)
        end, ends = length - tile * tile_tokens, row_end - tile * tile_tokens
        if plan.queries == 1:
            visible = token < lax.min(end, ends)
        else:
            ends = spread(ends, s.shape)
            visible = (token < ends) & (token < end)
        if plan.window is not None:
            visible = visible & (token >= ends - plan.window)
        s = jnp.where(visible, s, MASKED)
        best = loads.over_tokens(s, largest=True) if plan.turned else jnp.max(s, axis=1)
        new_top = jnp.maximum(top, best)
        rescale = jnp.exp2(top - new_top)
        p = jnp.exp2(s - spread(new_top, s.shape))
        if plan.turned:
            total = total * rescale + loads.over_tokens(p, largest=False, lanes=False)
        else:
            total = total * rescale + jnp.sum(p, axis=1)
        if not static_scale:
            # Values' scales may be as small as float32: relative to the largest, their products with p fit.
            value_scale = seen_scales(token_scale[1], tile)
            new_largest = loads.largest_scale(value_scale, lanes=per_token)
            new_largest = jnp.maximum(largest, new_largest)
            p = p * of_tokens(value_scale / loads.repeat(new_largest, value_scale.shape[1]))
            rescale = rescale * of_queries(largest / new_largest)
            largest = new_largest
        following = scales(i + 1, scale_numbers)
        scale_numbers = scale_pages(i + 2)
        plgpu.barrier_wait(values_full.at[slot])
        out = mma.add_values(
            p.astype(storage.operand),
            ring.at[slot, 1],
            out,
            rescale,
            start - tile * tile_tokens,
            length - tile * tile_tokens,
            *scales_at(slot, 1),
            storage=storage,
            turned=plan.turned,
        )
        refill = i + plan.stages < count
        if plan.warpgroups == 2:

            @pl.when(refill)
            def _():
                plgpu.barrier_arrive(empty.at[slot])

        @pl.when(refill & (wg == 0))
        def _():
            if plan.warpgroups == 2:
                plgpu.barrier_wait(empty.at[slot])
            plgpu.commit_smem()  # orders the reads of all warps before the next TMA writes
            copy(i + plan.stages, numbers)

        numbers = pages(i + 1 + plan.stages)
        return total, new_top, largest, out, numbers, scale_numbers, following

    def full(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    stats = (64, *plan.stat_columns)
    carry = (
        full(stats, 0.0, stat_layout),
        full(stats, LOWEST, stat_layout),
        full((64, 8), float(jnp.finfo(jnp.float32).tiny), layout),
        full((64, storage.dim // 2 if plan.turned else storage.dim), 0.0, layout),
        pages(plan.stages),
        scale_pages(1),
        scales(0, scale_pages(0)),
    )
    total, top, largest, out, *unused = lax.fori_loop(0, count, attend, carry)
    del unused
    if plan.turned:
        total = loads.over_tokens(total, largest=False)
    if plan.warpgroups == 2:
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    # The warps' maxima and sums, each row's four: read from 0, 16, 32 and 48 rows further on.
    for rows in (0, 64):
        tops.at[wg, pl.ds(rows, 64)][...] = top
        sums.at[wg, pl.ds(rows, 64)][...] = total
    plgpu.commit_smem()

    def others(ref):
        return [
            plgpu.load(ref.at[wg, pl.ds(reg.ROWS * w, 64)], layout=stat_layout)
            for w in range(reg.WARPS)
        ]

    all_tops = others(tops)
    common = functools.reduce(jnp.maximum, all_tops)
    sink = None
    if plan.splits == 1 and plan.sinks:
        sink = loads.row_values(
            sinks_gmem,
            head * plan.group,
            block,
            repeat=-plan.group,
            count=plan.rows,
            turned=plan.turned,
        )
        sink = sink * to_log2
        common = jnp.maximum(common, sink)
    whole = sum(s * jnp.exp2(t - common) for s, t in zip(others(sums), all_tops, strict=True))
    if sink is not None:
        whole = whole + jnp.exp2(sink - common)
    # The largest logit's own weight is one, so only rows that see nothing are below.
    whole = jnp.maximum(whole, 1.0)
    weight = jnp.exp2(top - common) / whole
    weight = weight * ((v_scale_gmem[head] if static_scale else of_queries(largest)) * storage.unit)
    if plan.splits > 1:
        log_sum_gmem.at[sequence, head, split, block][...] = common + jnp.log2(whole)
    out = loads.merge(
        out * spread(weight, out.shape),
        ring.at[0, 0],
        wg,
        rows=plan.merged_rows,
        storage=storage,
        turned=plan.turned,
    )
    target = out_gmem.at[sequence, head, split, pl.ds(block * plan.merged_rows, plan.merged_rows)]
    target[...] = out.astype(out_gmem.dtype)
