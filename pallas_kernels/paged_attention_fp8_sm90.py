"""Decode attention of one new query per sequence over a paged FP8 KV cache, for Hopper (split-KV).

The G query heads of one KV head fill rows of a 64-row tile. Tensor work is cheap here, reading the cache is
what takes time, so K and V travel as 8-bit pages and become float16 (exactly) next to the tensor cores.

One CTA for each (sequence, KV head, split of the context); its two math warpgroups take the tiles of 64 tokens in
turn, each with its own maximum, sum and output, like two more splits::

    producer warpgroup                         two math warpgroups, every other tile each
    ------------------                         ------------------------------------------
    TMA q -> q_smem                            wait q_full
    for each tile of the split:                for each of my tiles:
      wait  k_empty[slot]      <-------------+   wait k_full[slot]
      TMA pages of K -> k_smem[slot]         |   k_smem -> registers -> float16 -> k_wide[wg]
      wait  v_empty[slot]      <------------+|   arrive k_empty[slot]
      TMA pages of V -> v_smem[slot]        |+-  s = wgmma(q_smem, k_wide.T); mask; running maximum
      (the page table of the next tile      |    wait v_full[slot]
       is read ahead)                       |    v_smem -> registers -> float16 -> v_wide[wg]
                                            +--  arrive v_empty[slot]
                                                 p = exp2(s - maximum);  out = out * rescale + wgmma(p, v_wide)
                                               out / sum -> k_wide[wg] -> TMA; log2 of the sum -> memory

Splits return normalized float16 parts and the logarithm of their sums; XLA combines them exactly.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

TILE = 64  # tokens
ROWS = 64  # of wgmma; G of them are used
STAGES = 6
WARPGROUPS = 2
MASKED = -1e30  # finite, so that differences of two masked logits are numbers
PAGE_DTYPES = ("float8_e4m3fn", "float8_e5m2")
QUERY_DTYPES = ("bfloat16", "float16")


def unsupported_reason(
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    *,
    page_dtype: DTypeLike = "float8_e4m3fn",
    query_dtype: DTypeLike = "bfloat16",
) -> str | None:
    """Why the kernel can't attend with these sizes, None if it can."""
    page_dtype, query_dtype = jnp.dtype(page_dtype).name, jnp.dtype(query_dtype).name
    if page_dtype not in PAGE_DTYPES or query_dtype not in QUERY_DTYPES:
        return (
            f"pages must be one of {PAGE_DTYPES} and queries of {QUERY_DTYPES}; "
            f"found {page_dtype} and {query_dtype}"
        )
    if q_heads % kv_heads or q_heads // kv_heads > ROWS:
        return (
            f"{kv_heads} KV heads must divide the query heads, at most {ROWS} each; found {q_heads}"
        )
    if head_dim not in (64, 128):
        return f"head_dim must be 64 or 128; found {head_dim}"
    if page_size % 8 or (TILE % page_size and page_size % TILE):
        return f"page_size must be 8, 16, 32 or a multiple of {TILE}; found {page_size}"
    return None


def choose_splits(batch: int, kv_heads: int, max_tokens: int, *, num_sms: int) -> int:
    """Parts of the context: three CTAs for every SM even out the lengths, but each has at least eight tiles."""
    wanted = pl.cdiv(3 * num_sms, batch * kv_heads)
    return max(1, min(wanted, max_tokens // (8 * TILE), 64))


def paged_decode_attention(
    query: Array,
    key_pages: Array,
    value_pages: Array,
    page_table: Array,
    lengths: Array,
    *,
    key_scale: Array,
    value_scale: Array,
    scale: float | None = None,
    sliding_window: int | None = None,
    sinks: Array | None = None,
    splits: int | None = None,
    num_sms: int | None = None,
) -> Array:
    """softmax(scale * q k^T) v of each sequence's newest query over its whole cache.

    Args:
        query: [B, N, H], bfloat16 or float16; head n attends with KV head n // (N // K).
        key_pages: [P, K, page_size, H], e4m3 or e5m2; key = code * key_scale.
        value_pages: Like key_pages.
        page_table: int32 [B, pages]; entries past a sequence's pages may be anything.
        lengths: int32 [B]: tokens that the query sees, its own included; 0 gives zeros.
        key_scale: float32 [K].
        value_scale: float32 [K].
        scale: Default 1/sqrt(H).
        sliding_window: Only the last this many tokens are seen.
        sinks: float32 [N]: logits that take part in the softmax and carry no value.
        splits: Parts of the context; default `choose_splits`.
        num_sms: SMs to fill; default those of the first device.

    Returns:
        [B, N, H] in the query's dtype.

    Raises:
        ValueError: If shapes or dtypes are not those above, or `unsupported_reason` has a reason.
    """
    _check(query, key_pages, value_pages, page_table, lengths, key_scale, value_scale)
    (batch, q_heads, dim), (_, kv_heads, page_size, _) = query.shape, key_pages.shape
    group = q_heads // kv_heads
    if splits is None:
        num_sms = jax.devices()[0].core_count if num_sms is None else num_sms
        splits = choose_splits(batch, kv_heads, page_table.shape[1] * page_size, num_sms=num_sms)
    scale = float(dim**-0.5 if scale is None else scale)
    # Rows of a TMA tile come in eights.
    rows = pl.cdiv(group, 8) * 8
    q = query.reshape(batch, kv_heads, group, dim).astype(jnp.float16)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    logit_scale = key_scale * (scale * math.log2(math.e))
    body = functools.partial(
        _kernel,
        rows=rows,
        splits=splits,
        window=sliding_window,
        page_size=page_size,
    )
    parts, log_sums = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, splits * WARPGROUPS, rows, dim), jnp.float16),
            jax.ShapeDtypeStruct((batch, kv_heads, splits * WARPGROUPS, ROWS), jnp.float32),
        ),
        grid=(splits, kv_heads, batch),
        grid_names=("split", "head", "sequence"),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        kernel_name="paged_decode_attention",
        scratch_types=_scratch(dim, page_size, key_pages.dtype),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(q, key_pages, value_pages, page_table, lengths, logit_scale)
    out = _combine(parts, log_sums[..., :rows], group, sinks)
    out = out * value_scale[None, :, None, None]
    return out.reshape(batch, q_heads, dim).astype(query.dtype)


def _combine(parts: Array, log_sums: Array, group: int, sinks: Array | None) -> Array:
    """The attention of all splits: float32 [B, K, G, H]."""
    parts, log_sums = parts[..., :group, :].astype(jnp.float32), log_sums[..., :group]
    if sinks is not None:  # a part of value zero
        shape = (parts.shape[0], parts.shape[1], 1, group)
        sink = sinks.astype(jnp.float32).reshape(1, parts.shape[1], 1, group) * math.log2(math.e)
        log_sums = jnp.concatenate([log_sums, jnp.broadcast_to(sink, shape)], axis=2)
        parts = jnp.concatenate([parts, jnp.zeros((*shape, parts.shape[-1]))], axis=2)
    weights = jnp.exp2(log_sums - jnp.max(log_sums, axis=2, keepdims=True))
    total = jnp.sum(weights, axis=2)
    out = jnp.sum(parts * weights[..., None], axis=2)
    # A sequence of no tokens: every part is masked, and its values are zeros.
    return out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]


def _check(query, key_pages, value_pages, page_table, lengths, key_scale, value_scale) -> None:
    def expect(name, array, shape, dtypes):
        if array.shape != shape or array.dtype.name not in dtypes:
            raise ValueError(
                f"paged_decode_attention: {name} must be {' or '.join(dtypes)} {list(shape)}; "
                f"found {array.dtype}{list(array.shape)}"
            )

    if query.ndim != 3 or key_pages.ndim != 4:
        raise ValueError(
            "paged_decode_attention: query must be [B, N, H] and key_pages [P, K, page_size, H]; "
            f"found {list(query.shape)}, {list(key_pages.shape)}"
        )
    (batch, q_heads, dim), (_, kv_heads, page_size, _) = query.shape, key_pages.shape
    reason = unsupported_reason(
        q_heads, kv_heads, dim, page_size, page_dtype=key_pages.dtype, query_dtype=query.dtype
    )
    if reason:
        raise ValueError(f"paged_decode_attention: {reason}")
    expect("key_pages", key_pages, (*key_pages.shape[:3], dim), PAGE_DTYPES)
    expect("value_pages", value_pages, key_pages.shape, (key_pages.dtype.name,))
    expect("page_table", page_table, (batch, *page_table.shape[1:2]), ("int32",))
    expect("lengths", lengths, (batch,), ("int32",))
    expect("key_scale", key_scale, (kv_heads,), ("float32",))
    expect("value_scale", value_scale, (kv_heads,), ("float32",))


def _scratch(dim: int, page_size: int, page_dtype) -> dict:
    swizzle = min(dim, 128)
    narrow = (plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle))
    wide = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    full = plgpu.Barrier(num_arrivals=max(TILE // page_size, 1), num_barriers=STAGES)
    empty = plgpu.Barrier(num_barriers=STAGES)
    return dict(
        q_smem=plgpu.SMEM((ROWS, dim), jnp.float16, transforms=wide),
        k_smem=plgpu.SMEM((STAGES, TILE, dim), page_dtype, transforms=narrow),
        v_smem=plgpu.SMEM((STAGES, TILE, dim), page_dtype, transforms=narrow),
        k_wide=plgpu.SMEM((WARPGROUPS, TILE, dim), jnp.float16, transforms=wide),
        v_wide=plgpu.SMEM((WARPGROUPS, TILE, dim), jnp.float16, transforms=wide),
        q_full=plgpu.Barrier(),
        k_full=full,
        v_full=full,
        k_empty=empty,
        v_empty=empty,
    )


def _kernel(
    q_gmem,
    k_gmem,
    v_gmem,
    table_gmem,
    lengths_gmem,
    logit_scale_gmem,
    out_gmem,
    log_sum_gmem,
    *,
    rows,
    splits,
    window,
    page_size,
    q_smem,
    k_smem,
    v_smem,
    k_wide,
    v_wide,
    q_full,
    k_full,
    v_full,
    k_empty,
    v_empty,
):
    split, head, sequence = (lax.axis_index(name) for name in ("split", "head", "sequence"))
    length = lengths_gmem[sequence]
    start = 0 if window is None else lax.max(length - window, 0)
    first_tile = start // TILE
    tiles = (length + TILE - 1) // TILE - first_tile
    begin = first_tile + split * tiles // splits
    end = first_tile + (split + 1) * tiles // splits
    wg = lax.axis_index("wg")
    per_tile = max(TILE // page_size, 1)
    piece = min(TILE, page_size)

    @pl.when(wg == WARPGROUPS)
    def producer():
        plgpu.set_max_registers(40, action="decrease")
        plgpu.copy_gmem_to_smem(q_gmem.at[sequence, head], q_smem.at[pl.ds(0, rows)], q_full)

        def pages(tile):
            """Page numbers of a tile; those past the table repeat its last entry and are masked."""
            first = tile * TILE // page_size
            last = table_gmem.shape[1] - 1
            return tuple(table_gmem[sequence, lax.min(first + j, last)] for j in range(per_tile))

        def copy(source, target, numbers, tile, full):
            offset = lax.rem(tile * TILE, page_size) if page_size > TILE else 0
            for j, number in enumerate(numbers):
                plgpu.copy_gmem_to_smem(
                    source.at[number, head, pl.ds(offset, piece)],
                    target.at[pl.ds(j * piece, piece)],
                    full,
                )

        def load(tile, numbers):
            count = tile - begin
            slot = lax.rem(count, STAGES)
            following = pages(tile + 1)
            for source, target, full, empty in (
                (k_gmem, k_smem, k_full, k_empty),
                (v_gmem, v_smem, v_full, v_empty),
            ):

                @pl.when(count >= STAGES)
                def _(empty=empty):
                    plgpu.barrier_wait(empty.at[slot])
                    plgpu.commit_smem()  # orders the math warpgroup's reads before the next TMA writes

                copy(source, target.at[slot], numbers, tile, full.at[slot])
            return following

        @pl.when(end > begin)
        def _():
            lax.fori_loop(begin, end, load, pages(begin))

            @pl.loop(lax.max(end - begin - STAGES, 0), end - begin)
            def _(i):
                plgpu.barrier_wait(k_empty.at[lax.rem(i, STAGES)])
                plgpu.barrier_wait(v_empty.at[lax.rem(i, STAGES)])

    @pl.when(wg < WARPGROUPS)
    def math():
        plgpu.set_max_registers(232, action="increase")
        dim = q_smem.shape[1]
        layout = plgpu.Layout.WGMMA
        row_layout = layout.reduce(1)
        logit_scale = logit_scale_gmem[head]

        def spread(vector, shape):
            return lax.broadcast_in_dim(vector, shape, [0])

        def widen(source, target, full, empty, valid=None):
            """8-bit tile to float16; tokens from `valid` on become zeros, whatever the page holds."""
            plgpu.barrier_wait(full)
            values = plgpu.load(source, layout=plgpu.Layout.WGMMA_8BIT).astype(jnp.float16)
            if valid is not None:
                token = plgpu.broadcasted_iota(
                    jnp.int32, (TILE, dim), 0, layout=plgpu.Layout.WGMMA_8BIT
                )
                values = jnp.where(token < valid, values, jnp.float16(0))
            target[...] = values
            plgpu.commit_smem()
            plgpu.barrier_arrive(empty)

        def attend(i, carry):
            total, top, out = carry
            count = i * WARPGROUPS + wg
            tile, slot = begin + count, lax.rem(count, STAGES)
            widen(k_smem.at[slot], k_wide.at[wg], k_full.at[slot], k_empty.at[slot])

            def multiply_keys(acc):
                plgpu.wgmma(acc, q_smem, k_wide.at[wg].T)
                return acc[...]

            s = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, TILE), jnp.float32)) * logit_scale
            token = tile * TILE + plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=layout)
            visible = token < length
            if window is not None:
                visible = visible & (token >= start)
            s = jnp.where(visible, s, MASKED)
            new_top = jnp.maximum(top, jnp.max(s, axis=1))
            rescale = jnp.exp2(top - new_top)
            p = jnp.exp2(s - spread(new_top, s.shape))
            total = total * rescale + jnp.sum(p, axis=1)
            widen(
                v_smem.at[slot],
                v_wide.at[wg],
                v_full.at[slot],
                v_empty.at[slot],
                length - tile * TILE,
            )

            def multiply_values(acc):
                plgpu.wgmma(acc, p.astype(jnp.float16), v_wide.at[wg])
                return acc[...]

            part = pl.run_scoped(multiply_values, plgpu.ACC((ROWS, dim), jnp.float32))
            return total, new_top, out * spread(rescale, out.shape) + part

        carry = (
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout),
            plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), row_layout),
            plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), layout),
        )
        plgpu.barrier_wait(q_full)
        mine = (end - begin - wg + WARPGROUPS - 1) // WARPGROUPS
        total, top, out = lax.fori_loop(0, mine, attend, carry)
        total = jnp.maximum(total, float(jnp.finfo(jnp.float32).tiny))
        part = split * WARPGROUPS + wg
        log_sum_gmem.at[sequence, head, part][...] = top + jnp.log2(total)
        k_wide[wg] = (out / spread(total, out.shape)).astype(jnp.float16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_wide.at[wg, pl.ds(0, rows)], out_gmem.at[sequence, head, part])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
