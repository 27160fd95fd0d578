"""Causal attention over plain arrays and over a paged, possibly quantized KV cache."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qjax.formats import WHOLE
from qjax.ops._dispatch import choose, device_reason, num_sms
from qjax.pallas_kernels import paged_attention_sm90
from qjax.qarray import QArray


def dot_product_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    positions: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
    """Causal grouped-query attention: softmax(scale * q k^T) v in float32.

    Args:
        query: Queries; head n attends with key head n // (N // K).
        key: Keys of positions 0..S-1.
        value: Values.
        positions: Position of each query, default 0..T-1; it sees keys at its position and before.
        scale: Default 1/sqrt(H).
        sliding_window: A query at p sees positions p - sliding_window + 1 .. p only.
        sinks: Per-head logits that take part in the softmax and carry no value (GPT-OSS).
        implementation: "pallas_mosaic_gpu", "xla" or None.

    Raises:
        ValueError: If the head counts don't divide.
    """
    choose("dot_product_attention", implementation, device_reason("9.0") or "no kernel yet")
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(query.shape[1])[None], query.shape[:2])
    return _xla(query, key, value, positions, scale, sliding_window, sinks)


def paged_attention(
    query: Float[Array, "B T N H"],
    key_pages: Array | QArray,
    value_pages: Array | QArray | None,
    page_table: Int[Array, "B pages"],
    *,
    positions: Int[Array, "B T"],
    value_dim: int | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
    """Causal attention of new queries over the pages that hold their sequences.

    Args:
        query: Queries, prefill and decode alike.
        key_pages: [P, K, page_size, H], an array or a QArray of that logical shape.
        value_pages: [P, K, page_size, Hv], or None where values are the keys' first `value_dim`
            channels (multi-head latent attention).
        page_table: Pages of each sequence in order; entries past its length may be anything in range.
        positions: Position of each query; its key and value are in the cache already.
        value_dim: Channels of a value when value_pages is None.
        scale: Default 1/sqrt(H).
        sliding_window: As in `dot_product_attention`.
        sinks: As in `dot_product_attention`.
        implementation: "pallas_mosaic_gpu", "xla" or None.

    Raises:
        ValueError: If the head counts don't divide, or the implementation asked for can't take the arguments.
    """
    reason = unsupported_reason(query, key_pages, value_pages)
    if choose("paged_attention", implementation, reason) == "pallas_mosaic_gpu":
        assert value_pages is not None
        return paged_attention_sm90.paged_decode_attention(
            query,
            _stored(key_pages),
            _stored(value_pages),
            page_table,
            positions + 1,
            key_scale=_scale(key_pages),
            value_scale=_scale(value_pages),
            key_block_scale=_block_scale(key_pages),
            value_block_scale=_block_scale(value_pages),
            scale=scale,
            sliding_window=sliding_window,
            sinks=sinks,
            num_sms=num_sms(),
        )
    key = _gather(key_pages, page_table)
    value = key[..., :value_dim] if value_pages is None else _gather(value_pages, page_table)
    return _xla(query, key, value, positions, scale, sliding_window, sinks)


def unsupported_reason(
    query: Float[Array, "B T N H"],
    key_pages: Array | QArray,
    value_pages: Array | QArray | None,
) -> str | None:
    """Why the kernel can't attend to these pages on this device, None if it can: for decode steps mostly."""
    if reason := device_reason("9.0"):
        return reason
    if value_pages is None:
        return "no kernel for values that are the keys' first channels (latent attention)"
    if key_pages.shape != value_pages.shape:
        found = f"{list(key_pages.shape)} and {list(value_pages.shape)}"
        return f"keys and values must have the same shape; found {found}"
    pools = (key_pages, value_pages)
    formats = [p.format if isinstance(p, QArray) else None for p in pools]
    dtypes = [p.format.element if isinstance(p, QArray) else p.dtype.name for p in pools]
    if formats[0] != formats[1] or dtypes[0] != dtypes[1]:
        return f"keys and values must be stored alike; found {' and '.join(dtypes)}"
    if f := formats[0]:
        blocks = (f.block_shape, f.scale_dtype, f.global_scale, f.storage)
        eight = [((n, WHOLE), "float32", False, "plain") for n in (1, WHOLE)]
        four = ((1, 16), "float8_e4m3fn", True, "packed")
        if blocks not in (eight if f.bits == 8 else [four]) or f.offset is not None:
            return f"no kernel for pages of {f.element} {f.block_shape}"
    if key_pages.ndim != 4 or query.ndim != 4:
        return f"pages and queries must have 4 axes; found {key_pages.ndim} and {query.ndim}"
    _, kv_heads, page_size, dim = key_pages.shape
    return paged_attention_sm90.unsupported_reason(
        query.shape[2],
        kv_heads,
        dim,
        page_size,
        queries=query.shape[1],
        page_dtype=dtypes[0],
        query_dtype=query.dtype,
    )


def _stored(pages: Array | QArray) -> Array:
    return pages.qvalue if isinstance(pages, QArray) else pages


def _scale(pages: Array | QArray) -> Array | None:
    """float32 scales of pages [P, K] or of their tokens [P, K, page_size]."""
    if not isinstance(pages, QArray):
        return None
    if pages.global_scale is not None:
        return jnp.squeeze(pages.global_scale, (2, 3))
    return jnp.squeeze(pages.scale, (2, 3) if pages.format.block_shape[0] == WHOLE else 3)


def _block_scale(pages: Array | QArray) -> Array | None:
    """Scales of blocks of channels: [P, K, page_size, blocks]."""
    return pages.scale if isinstance(pages, QArray) and pages.format.global_scale else None


def _gather(pages: Array | QArray, page_table: Array) -> Float[Array, "B S K H"]:
    """The pages of each sequence, dequantized, one position after the other."""
    taken = jax.tree.map(lambda part: jnp.take(part, page_table, axis=0), pages)
    if isinstance(taken, QArray):
        taken = taken.dequantize(jnp.float32)
    b, pages_per_sequence, heads, page_size, dim = taken.shape
    return jnp.moveaxis(taken, 2, 3).reshape(b, pages_per_sequence * page_size, heads, dim)


def _xla(query, key, value, positions, scale, sliding_window, sinks) -> Array:
    """The reference: masked softmax in float32."""
    b, t, n, h = query.shape
    s, heads = key.shape[1:3]
    if n % heads:
        raise ValueError(f"attention: {heads} key heads must divide {n} query heads")
    scale = h**-0.5 if scale is None else scale
    q = query.astype(jnp.float32).reshape(b, t, heads, n // heads, h) * scale
    logits = jnp.einsum("btkgh,bskh->bkgts", q, key.astype(jnp.float32), precision="highest")
    distance = positions[:, :, None] - jnp.arange(s)[None, None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    # Without a sink: exp(-inf) adds nothing to the softmax's denominator.
    sink = jnp.full((n,), -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    sink = sink.reshape(1, heads, n // heads, 1, 1)
    top = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), sink)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top)
    # Rows of padded queries may see keys that were never written: 0 * garbage must stay 0.
    seen = jnp.any(visible, axis=1)[..., None, None]
    value = jnp.where(seen, value.astype(jnp.float32), 0.0)
    out = jnp.einsum("bkgts,bskh->btkgh", weights / total, value, precision="highest")
    return out.reshape(b, t, n, value.shape[-1]).astype(query.dtype)
