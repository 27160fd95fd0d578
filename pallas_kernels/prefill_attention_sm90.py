"""Prefill attention for Hopper: many new queries per sequence over contiguous or paged keys and values.

`_prefill_attention_sm90` has the kernel. Here is what it takes, how its tiles are chosen and the checks.
"""

import functools
import heapq

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qjax.pallas_kernels import _prefill_attention_widen_sm90 as widening
from qjax.pallas_kernels._paged_attention_registers_sm90 import FP4, SCALE_BLOCK, Storage
from qjax.pallas_kernels._prefill_attention_plan_sm90 import (
    LOG2E,
    Q_TILE,
    SCALE_ROW,
    WARPGROUPS,
    Plan,
    TileConfig,
    scratch,
)
from qjax.pallas_kernels._prefill_attention_sm90 import kernel

SECTION_BYTES = 24 * 2**20  # of keys and values that share the L2 cache
SMEM_BYTES = 225 * 1024  # of one CTA's 227, for tiles; the rest is for barriers
DTYPES = ("bfloat16", "float16")
NARROW_DTYPES = ("float8_e4m3fn", "float8_e5m2", FP4)


def choose_tile(
    dim: int, value_dim: int, *, page_size: int | None = None, narrow: bool = False
) -> TileConfig:
    """The largest tile whose logits, probabilities and outputs fit the registers, and two stages shared memory.

    Args:
        dim: H.
        value_dim: Hv.
        page_size: Tokens of a page, None for contiguous keys.
        narrow: Whether keys and values are 8- or 4-bit codes; widening them takes registers from the math
            warpgroups, and a thread for each token.
    """
    if value_dim > 128:
        return TileConfig(keys=64, stages=2, separate_output=False, overlap=not narrow)
    for keys in (128, 64) if narrow else (128, 96, 64):
        config = TileConfig(keys=keys, stages=2, separate_output=True, overlap=True)
        whole = page_size is None or keys % page_size == 0 or page_size % keys == 0
        if whole and config.smem_bytes(dim, value_dim) <= SMEM_BYTES:
            return config
    raise ValueError(f"prefill_attention: no tile of whole pages; found page_size {page_size}")


def unsupported_reason(
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    *,
    dtype: DTypeLike = "bfloat16",
    page_size: int | None = None,
    page_dtype: DTypeLike | None = None,
) -> str | None:
    """Why the kernel can't attend with these sizes, None if it can."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        return f"queries, keys and values must be one of {DTYPES}; found {name}"
    if q_heads % kv_heads:
        return f"{kv_heads} KV heads must divide the query heads; found {q_heads}"
    sizes = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
    if (head_dim, value_dim) not in sizes:
        return f"head_dim and value_dim must be one of {sizes}; found {(head_dim, value_dim)}"
    page_dtype = dtype if page_dtype is None else page_dtype
    narrow = jnp.dtype(page_dtype).name in NARROW_DTYPES
    if not narrow and jnp.dtype(page_dtype) != jnp.dtype(dtype):
        return (
            f"pages must be {name} like the queries or one of {NARROW_DTYPES}; found {page_dtype}"
        )
    if narrow and head_dim not in (64, 128, 256):
        return f"8- and 4-bit pages need head_dim 64, 128 or 256; found {head_dim}"
    if page_size is not None:
        if page_size % 8 or (64 % page_size and page_size % 64):
            return f"page_size must be 8, 16, 32 or a multiple of 64; found {page_size}"
        if jnp.dtype(page_dtype) == FP4:
            whole = 128 % page_size == 0 or page_size % 128 == 0
            if head_dim > 128 or page_size * head_dim % (SCALE_ROW * SCALE_BLOCK) or not whole:
                return (
                    "FP4 pages need a head_dim of 64 or 128, pages of 2048 numbers or a multiple, and a page "
                    f"size that divides 128 or a multiple of it; found {head_dim} and {page_size} tokens"
                )
    return None


def prefill_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool = True,
    query_offsets: Array | None = None,
    query_lengths: Array | None = None,
    lengths: Array | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
    sinks: Array | None = None,
    tile: TileConfig | None = None,
    num_sms: int | None = None,
) -> Array:
    """softmax(scale * q k^T) v over contiguous keys and values.

    Args:
        query: [B, T, N, H], bfloat16 or float16; head n attends with KV head n // (N // K).
        key: [B, S, K, H] of the query's dtype.
        value: [B, S, K, Hv] likewise.
        causal: A query sees keys at its position and before.
        query_offsets: int32 [B]: position of each sequence's first query; default lengths - query_lengths,
            so that the last query sees all keys.
        query_lengths: int32 [B]: real queries of each sequence, at most T, default T. What the kernel writes
            for the others means nothing, but is finite.
        lengths: int32 [B]: keys of each sequence, at most S, default S.
        scale: Positive; default 1/sqrt(H).
        sliding_window: A query at p sees positions p - sliding_window + 1 .. p only; needs `causal`.
        logit_soft_cap: Logits become cap * tanh(logit / cap).
        sinks: float32 [N]: logits that take part in the softmax and carry no value.
        tile: Default `choose_tile`.
        num_sms: CTAs; default the SMs of the first device.

    Returns:
        [B, T, N, Hv] in the query's dtype; zeros for queries that see no key.

    Raises:
        ValueError: If shapes, dtypes or options are not those above, or `unsupported_reason` has a reason.
    """
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ValueError(
            "prefill_attention: query, key and value must be [B, T, N, H], [B, S, K, H], [B, S, K, Hv]; found "
            f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    batch, keys, kv_heads, _ = key.shape
    _expect("key", key, (query.shape[0], keys, kv_heads, query.shape[3]), query.dtype)
    _expect("value", value, (batch, keys, kv_heads, value.shape[3]), query.dtype)
    # TMA addresses rows in groups of eight; the added ones lie past every sequence's end.
    pad = ((0, 0), (0, -keys % 8), (0, 0), (0, 0))
    key, value = (jnp.pad(x, pad) if keys % 8 else x for x in (key, value))
    ragged = lengths is not None or keys % 8 != 0
    return _attend(
        query,
        key,
        value,
        jnp.zeros((1, 1), jnp.int32),
        jnp.full((batch,), keys, jnp.int32) if lengths is None else lengths,
        page_size=None,
        ragged=ragged,
        capacity=keys,
        causal=causal,
        query_offsets=query_offsets,
        query_lengths=query_lengths,
        scale=scale,
        sliding_window=sliding_window,
        logit_soft_cap=logit_soft_cap,
        sinks=sinks,
        tile=tile,
        num_sms=num_sms,
    )


def paged_prefill_attention(
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
    causal: bool = True,
    query_offsets: Array | None = None,
    query_lengths: Array | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
    sinks: Array | None = None,
    tile: TileConfig | None = None,
    num_sms: int | None = None,
) -> Array:
    """`prefill_attention` over paged keys and values: a chunk of queries, its own keys in the pages already.

    Args:
        query: [B, T, N, H], bfloat16 or float16.
        key_pages: [P, K, page_size, H] of the query's dtype, e4m3 or e5m2. Or uint8 [P, K, page_size, H / 2]: two
            e2m1 codes, the even channel low (NVFP4).
        value_pages: [P, K, page_size, Hv] likewise.
        page_table: int32 [B, pages]; entries past a sequence's pages may be anything.
        lengths: int32 [B]: keys of each sequence, those of its queries included.
        key_scale: float32 [K], [P, K] or [P, K, page_size], positive: key = page's value * key_scale. Default 1.
            Of 16-bit pages: [K].
        value_scale: Likewise, of as many axes.
        key_block_scale: Of e2m1 codes: e4m3 [P, K, page_size, H / 16], one more factor.
        value_block_scale: Likewise.
        causal: As in `prefill_attention`, like all that follow.
        query_offsets: Default lengths - query_lengths.
        query_lengths: Default T.
        scale: Default 1/sqrt(H).
        sliding_window: Default none.
        logit_soft_cap: Default none.
        sinks: Default none.
        tile: Default `choose_tile`.
        num_sms: Default the SMs of the first device.

    Returns:
        [B, T, N, Hv] in the query's dtype; zeros for queries that see no key.

    Raises:
        ValueError: If shapes, dtypes or options are not those above, or `unsupported_reason` has a reason.
    """
    if query.ndim != 4 or key_pages.ndim != 4 or value_pages.ndim != 4:
        raise ValueError(
            "prefill_attention: query, key_pages and value_pages must be [B, T, N, H], [P, K, page_size, H], "
            f"[P, K, page_size, Hv]; found {[list(x.shape) for x in (query, key_pages, value_pages)]}"
        )
    batch, (pages, kv_heads, page_size, _) = query.shape[0], key_pages.shape
    shape, dim = (pages, kv_heads, page_size), query.shape[3]
    four = key_pages.dtype == jnp.uint8
    _expect("key_pages", key_pages, (*shape, dim // 2 if four else dim), key_pages.dtype)
    columns = key_pages.shape[3] if four else value_pages.shape[3]
    _expect("value_pages", value_pages, (*shape, columns), key_pages.dtype)
    _expect("page_table", page_table, (batch, *page_table.shape[1:2]), jnp.int32)
    for name, x in (("key", key_block_scale), ("value", value_block_scale)):
        if (x is not None) != four:
            raise ValueError("prefill_attention: uint8 pages take both block scales, others none")
        if x is not None:
            _expect(f"{name}_block_scale", x, (*shape, dim // SCALE_BLOCK), jnp.float8_e4m3fn)
    if (key_scale is None) != (value_scale is None):
        raise ValueError("prefill_attention: give both scales or none")
    if key_scale is not None and value_scale is not None:
        of_heads = key_pages.dtype == query.dtype or key_scale.ndim not in (2, 3)
        wanted = (kv_heads,) if of_heads else shape[: key_scale.ndim]
        _expect("key_scale", key_scale, wanted, jnp.float32)
        _expect("value_scale", value_scale, wanted, jnp.float32)
    return _attend(
        query,
        key_pages,
        value_pages,
        page_table,
        lengths,
        page_size=page_size,
        ragged=True,
        capacity=page_table.shape[1] * page_size,
        scales=None if key_scale is None else (key_scale, value_scale),
        block_scales=(key_block_scale, value_block_scale) if four else (),
        causal=causal,
        query_offsets=query_offsets,
        query_lengths=query_lengths,
        scale=scale,
        sliding_window=sliding_window,
        logit_soft_cap=logit_soft_cap,
        sinks=sinks,
        tile=tile,
        num_sms=num_sms,
    )


def _expect(name: str, array: Array, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"prefill_attention: {name} must be {jnp.dtype(dtype).name} {list(shape)}; "
            f"found {array.dtype.name} {list(array.shape)}"
        )


def _attend(
    query,
    key,
    value,
    page_table,
    lengths,
    *,
    page_size,
    ragged,
    capacity,
    scales=None,
    block_scales=(),
    causal,
    query_offsets,
    query_lengths,
    scale,
    sliding_window,
    logit_soft_cap,
    sinks,
    tile,
    num_sms,
):
    batch, rows, q_heads, dim = query.shape
    kv_heads, narrow = key.shape[2 if page_size is None else 1], key.dtype != query.dtype
    page_dtype = FP4 if key.dtype == jnp.uint8 else key.dtype.name
    value_dim = dim if page_dtype == FP4 else value.shape[3]
    reason = unsupported_reason(
        q_heads,
        kv_heads,
        dim,
        value_dim,
        dtype=query.dtype,
        page_size=page_size,
        page_dtype=page_dtype,
    )
    if reason:
        raise ValueError(f"prefill_attention: {reason}")
    if sliding_window is not None and (not causal or sliding_window < 1):
        raise ValueError(
            "prefill_attention: sliding_window must be positive and needs causal=True; found "
            f"{sliding_window}, causal={causal}"
        )
    for name, number in (("scale", scale), ("logit_soft_cap", logit_soft_cap)):
        if number is not None and not number > 0:
            raise ValueError(f"prefill_attention: {name} must be positive; found {number}")
    if query_lengths is None:
        query_lengths = jnp.full((batch,), rows, jnp.int32)
    if query_offsets is None:
        query_offsets = lengths - query_lengths
    sink_logits = jnp.zeros((q_heads,), jnp.float32) if sinks is None else sinks
    # Scales of pages or tokens become relative to their head's largest; the kernel's factors have that.
    scales = (np.ones((kv_heads,), np.float32),) * 2 if scales is None else scales
    pools = scales if scales[0].ndim > 1 else ()
    factors = tuple(_largest(x) if pools else x for x in scales)
    relative = (*pools, *(1 / x for x in factors)) if pools else ()
    page_scales = bool(pools) and pools[0].ndim == 2
    if page_scales:
        relative += tuple(jnp.all(x == x[:1], axis=0).astype(jnp.int32) for x in pools)
    for name, vector, size, dtype in (
        ("lengths", lengths, batch, jnp.int32),
        ("query_lengths", query_lengths, batch, jnp.int32),
        ("query_offsets", query_offsets, batch, jnp.int32),
        ("sinks", sink_logits, q_heads, jnp.float32),
    ):
        _expect(name, vector, (size,), dtype)
    if tile is None:
        tile = choose_tile(dim, value_dim, page_size=page_size, narrow=narrow)
    if narrow and tile.keys not in ((128,) if block_scales else (64, 128)):
        raise ValueError(
            f"prefill_attention: tiles of {page_dtype} need 128 keys (or 64 of 8 bits); found {tile.keys}"
        )
    num_sms = jax.devices()[0].core_count if num_sms is None else num_sms
    plan = Plan(
        batch=batch,
        q_heads=q_heads,
        kv_heads=kv_heads,
        rows=rows,
        dim=dim,
        value_dim=value_dim,
        tile=tile,
        page_size=page_size,
        causal=causal,
        ragged=ragged or capacity % tile.keys != 0,
        window=sliding_window,
        soft_cap=logit_soft_cap,
        sinks=sinks is not None,
        narrow=page_dtype if narrow else None,
        token_scales=bool(pools),
        page_scales=page_scales,
        ctas=min(num_sms, batch * q_heads * pl.cdiv(rows, Q_TILE)),
    )
    scale = dim**-0.5 if scale is None else scale
    out_dtype = query.dtype
    if narrow:  # float16 holds all these types exactly
        query = query.astype(jnp.float16)
        unit = widening.tile_unit(Storage(page_dtype, dim))
        factors = tuple(x * unit for x in factors)
    # Rows that TMA copies.
    blocks = tuple(x.reshape(*x.shape[:2], -1, SCALE_ROW) for x in block_scales)
    # Outputs that take the place of queries have their dtype until they are written.
    written = out_dtype if tile.separate_output else query.dtype
    if rows % 8:
        query = jnp.pad(query, ((0, 0), (0, -rows % 8), (0, 0), (0, 0)))
    out = plgpu.kernel(
        functools.partial(kernel, plan=plan),
        out_type=jax.ShapeDtypeStruct((*query.shape[:3], value_dim), written),
        grid=(plan.ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + plan.producers,
        thread_name="wg",
        kernel_name="prefill_attention",
        scratch_types=scratch(plan, query.dtype, written),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(
        query,
        key,
        value,
        page_table,
        jnp.asarray(_schedule(plan, capacity)),
        query_offsets,
        query_lengths,
        lengths,
        factors[0] * (scale * LOG2E),
        factors[1],
        sink_logits * LOG2E,
        *relative,
        *blocks,
    )
    return (out[:, :rows] if rows % 8 else out).astype(out_dtype)


def _largest(scales: Array) -> Array:
    """Each head's largest number, what was never written aside."""
    axes = (0, *range(2, scales.ndim))
    largest = jnp.max(jnp.where(jnp.isfinite(scales), scales, 0), axis=axes)
    return jnp.maximum(largest, float(jnp.finfo(jnp.float32).tiny))


@functools.lru_cache(maxsize=256)
def _schedule(plan: Plan, capacity: int) -> np.ndarray:
    """The number of items and the items of each CTA: int32 [ctas, 1 + rounds].

    Each item goes to the CTA that is free first if all sequences are full, the heaviest items (the last of a causal
    sequence see most keys) first. Heads are taken in sections whose keys and values stay in the L2 cache.
    """
    tiles = pl.cdiv(plan.rows, Q_TILE)
    pairs, group = plan.batch * plan.kv_heads, plan.q_heads // plan.kv_heads
    fit = max(1, SECTION_BYTES // (2 * capacity * (plan.dim + plan.value_dim)))
    section = max(n for n in range(1, pairs + 1) if pairs % n == 0 and n <= fit)
    # [sections, tiles, heads of a section]; a head's number counts through the batch.
    heads = np.arange(pairs * group).reshape(-1, 1, section * group)
    order = np.arange(tiles)[::-1].reshape(1, -1, 1)
    items = (heads * tiles + order).reshape(-1)
    end = np.minimum(capacity - plan.rows + (order + 1) * Q_TILE, capacity)
    start = 0 if plan.window is None else np.maximum(end - Q_TILE - plan.window, 0)
    keys = end - start if plan.causal else np.full_like(end, capacity)
    # A tile of queries costs about as much as another 80 keys.
    cost = np.broadcast_to(
        np.maximum(keys, plan.tile.keys) + 80, (heads.shape[0], tiles, section * group)
    )
    free = [(0, cta) for cta in range(plan.ctas)]
    lists: list[list[int]] = [[] for _ in free]
    for item, work in zip(items.tolist(), cost.reshape(-1).tolist(), strict=True):
        time, cta = free[0]
        lists[cta].append(item)
        heapq.heapreplace(free, (time + work, cta))
    table = np.zeros((plan.ctas, 1 + max(map(len, lists))), np.int32)
    for row, taken in zip(table, lists, strict=True):
        row[0], row[1 : 1 + len(taken)] = len(taken), taken
    return table
