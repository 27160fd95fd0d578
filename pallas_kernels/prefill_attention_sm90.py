"""Prefill attention for Hopper: many new queries per sequence over contiguous or paged keys and values.

`_prefill_attention_sm90` has the kernel. Here is what it takes, how its tiles are chosen and the checks.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qjax.pallas_kernels._prefill_attention_sm90 import (
    LOG2E,
    Q_TILE,
    WARPGROUPS,
    Plan,
    TileConfig,
    kernel,
    scratch,
)

SECTION_BYTES = 24 * 2**20  # of keys and values that share the L2 cache
SMEM_BYTES = 225 * 1024  # of one CTA's 227, for tiles; the rest is for barriers
DTYPES = ("bfloat16", "float16")


def choose_tile(dim: int, value_dim: int, page_size: int | None = None) -> TileConfig:
    """The largest tile whose logits, probabilities and outputs fit the registers, and two stages shared memory."""
    if value_dim > 128:
        return TileConfig(keys=64, stages=2, separate_output=False)
    for keys in (128, 112, 64):
        config = TileConfig(keys=keys, stages=2, separate_output=True)
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
    if page_size is not None:
        if page_size % 8 or (64 % page_size and page_size % 64):
            return f"page_size must be 8, 16, 32 or a multiple of 64; found {page_size}"
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
            for the others means nothing.
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
        key_pages: [P, K, page_size, H] of the query's dtype.
        value_pages: [P, K, page_size, Hv] likewise.
        page_table: int32 [B, pages]; entries past a sequence's pages may be anything.
        lengths: int32 [B]: keys of each sequence, those of its queries included.
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
    _expect("key_pages", key_pages, (pages, kv_heads, page_size, query.shape[3]), query.dtype)
    _expect("value_pages", value_pages, (*key_pages.shape[:3], value_pages.shape[3]), query.dtype)
    _expect("page_table", page_table, (batch, *page_table.shape[1:2]), jnp.int32)
    return _attend(
        query,
        key_pages,
        value_pages,
        page_table,
        lengths,
        page_size=page_size,
        ragged=True,
        capacity=page_table.shape[1] * page_size,
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
    kv_heads, value_dim = key.shape[2 if page_size is None else 1], value.shape[3]
    reason = unsupported_reason(
        q_heads, kv_heads, dim, value_dim, dtype=query.dtype, page_size=page_size
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
    for name, vector, size, dtype in (
        ("lengths", lengths, batch, jnp.int32),
        ("query_lengths", query_lengths, batch, jnp.int32),
        ("query_offsets", query_offsets, batch, jnp.int32),
        ("sinks", sink_logits, q_heads, jnp.float32),
    ):
        _expect(name, vector, (size,), dtype)
    tile = choose_tile(dim, value_dim, page_size) if tile is None else tile
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
        section=_section(batch * kv_heads, 2 * capacity * (dim + value_dim)),
        ctas=min(num_sms, batch * q_heads * pl.cdiv(rows, Q_TILE)),
    )
    scale = dim**-0.5 if scale is None else scale
    logit_scale = jnp.full((kv_heads,), scale * LOG2E, jnp.float32)
    if rows % 8:
        query = jnp.pad(query, ((0, 0), (0, -rows % 8), (0, 0), (0, 0)))
    out = plgpu.kernel(
        functools.partial(kernel, plan=plan),
        out_type=jax.ShapeDtypeStruct((*query.shape[:3], value_dim), query.dtype),
        grid=(plan.ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        kernel_name="prefill_attention",
        scratch_types=scratch(plan, query.dtype),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(
        query,
        key,
        value,
        page_table,
        query_offsets,
        query_lengths,
        lengths,
        logit_scale,
        sink_logits * LOG2E,
    )
    return out[:, :rows] if rows % 8 else out


def _section(pairs: int, bytes_each: int) -> int:
    """Pairs of sequence and KV head to take together: the most that divide all and fit the cache."""
    fit = max(1, SECTION_BYTES // bytes_each)
    return max(n for n in range(1, pairs + 1) if pairs % n == 0 and n <= fit)
