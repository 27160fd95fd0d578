"""Causal attention over plain arrays and over a paged, possibly quantized KV cache."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qjax.ops._attention_kernels import (
    Options,
    attend_pages,
    paged_kernel,
    prefill,
    prefill_unsupported_reason,
)
from qjax.ops._dispatch import choose, log_fallback
from qjax.qarray import QArray


def dot_product_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    positions: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
    """Causal grouped-query attention: softmax(scale * q k^T) v in float32.

    The kernel's gradient is the reference's, computed anew from the arguments: nothing of the size T x S is kept.

    Args:
        query: Queries; head n attends with key head n // (N // K).
        key: Keys of positions 0..S-1.
        value: Values.
        positions: Position of each query, one more from query to query; default 0..T-1. A query sees keys at
            its position and before.
        lengths: Positions of each sequence that are real, default all: where queries are padded on the right,
            what their outputs are then means nothing (but is finite).
        scale: Default 1/sqrt(H).
        sliding_window: A query at p sees positions p - sliding_window + 1 .. p only.
        logit_soft_cap: Scaled logits become cap * tanh(logit / cap) (Gemma 2).
        sinks: Per-head logits that take part in the softmax and carry no value (GPT-OSS).
        implementation: "pallas_mosaic_gpu", "xla" or None.

    Raises:
        ValueError: If the head counts don't divide, or the implementation asked for can't take the arguments.
    """
    options = Options(scale, sliding_window, logit_soft_cap)
    reason = prefill_unsupported_reason(query, key, value)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(query.shape[1])[None], query.shape[:2])
    if choose("dot_product_attention", implementation, reason) == "pallas_mosaic_gpu":
        return _differentiable_prefill(options, query, key, value, sinks, positions, lengths)
    return _xla(query, key, value, positions, lengths, options, sinks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable_prefill(options, query, key, value, sinks, positions, lengths) -> Array:
    return prefill(query, key, value, positions[:, 0], lengths, sinks, options)


def _prefill_forward(options, *arrays):
    return _differentiable_prefill(options, *arrays), arrays


def _prefill_backward(options, arrays, gradient):
    *differentiable, positions, lengths = arrays
    log_fallback("the gradient of dot_product_attention", "no kernel yet")

    def reference(query, key, value, sinks):
        return _xla(query, key, value, positions, lengths, options, sinks)

    return (*jax.vjp(reference, *differentiable)[1](gradient), None, None)


_differentiable_prefill.defvjp(_prefill_forward, _prefill_backward)


def paged_attention(
    query: Float[Array, "B T N H"],
    key_pages: Array | QArray,
    value_pages: Array | QArray | None,
    page_table: Int[Array, "B pages"],
    *,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None = None,
    value_dim: int | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
    """Causal attention of new queries over the pages that hold their sequences.

    A few queries per sequence go through the decode kernel, more through the prefill kernel.

    Args:
        query: Queries, prefill and decode alike.
        key_pages: [P, K, page_size, H], an array or a QArray of that logical shape.
        value_pages: [P, K, page_size, Hv], or None where values are the keys' first `value_dim`
            channels (multi-head latent attention).
        page_table: Pages of each sequence in order; entries past its length may be anything in range.
        positions: Position of each query, one more from query to query; its key and value are in the cache
            already.
        lengths: Tokens of each sequence, default up to the last query's: queries past them are padding, see
            `dot_product_attention`.
        value_dim: Channels of a value when value_pages is None.
        scale: Default 1/sqrt(H).
        sliding_window: As in `dot_product_attention`.
        logit_soft_cap: As in `dot_product_attention`.
        sinks: As in `dot_product_attention`.
        implementation: "pallas_mosaic_gpu", "xla" or None.

    Raises:
        ValueError: If the head counts don't divide, or the implementation asked for can't take the arguments.
    """
    options = Options(scale, sliding_window, logit_soft_cap)
    kernel, reason = paged_kernel(query, key_pages, value_pages)
    if choose("paged_attention", implementation, reason) == "pallas_mosaic_gpu":
        assert kernel is not None and value_pages is not None
        pages = (key_pages, value_pages, page_table)
        return attend_pages(kernel, query, *pages, positions, lengths, sinks, options)
    key = gather_pages(key_pages, page_table)
    value = key[..., :value_dim] if value_pages is None else gather_pages(value_pages, page_table)
    return _xla(query, key, value, positions, lengths, options, sinks)


def gather_pages(pages: Array | QArray, page_table: Array) -> Float[Array, "B S K H"]:
    """The pages of each sequence, one position after the other; quantized ones in float32."""
    taken = jax.tree.map(lambda part: jnp.take(part, page_table, axis=0), pages)
    if isinstance(taken, QArray):
        taken = taken.dequantize(jnp.float32)
    b, pages_per_sequence, heads, page_size, dim = taken.shape
    return jnp.moveaxis(taken, 2, 3).reshape(b, pages_per_sequence * page_size, heads, dim)


def _xla(query, key, value, positions, lengths, options: Options, sinks) -> Array:
    """The reference: masked softmax in float32."""
    b, t, n, h = query.shape
    s, heads = key.shape[1:3]
    if n % heads:
        raise ValueError(f"attention: {heads} key heads must divide {n} query heads")
    scale = h**-0.5 if options.scale is None else options.scale
    # Past its end are what was never written and what other sequences wrote: 0 * garbage must stay 0.
    ends = positions[:, -1] + 1 if lengths is None else lengths
    inside = (jnp.arange(s)[None] < ends[:, None])[..., None, None]
    key, value = (jnp.where(inside, x.astype(jnp.float32), 0.0) for x in (key, value))
    q = query.astype(jnp.float32).reshape(b, t, heads, n // heads, h) * scale
    logits = jnp.einsum("btkgh,bskh->bkgts", q, key, precision="highest")
    if options.logit_soft_cap is not None:
        logits = options.logit_soft_cap * jnp.tanh(logits / options.logit_soft_cap)
    distance = positions[:, :, None] - jnp.arange(s)[None, None, :]
    visible = distance >= 0
    if options.sliding_window is not None:
        visible &= distance < options.sliding_window
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    # Without a sink: exp(-inf) adds nothing to the softmax's denominator.
    sink = jnp.full((n,), -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    sink = sink.reshape(1, heads, n // heads, 1, 1)
    top = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), sink)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top)
    out = jnp.einsum("bkgts,bskh->btkgh", weights / total, value, precision="highest")
    return out.reshape(b, t, n, value.shape[-1]).astype(query.dtype)
