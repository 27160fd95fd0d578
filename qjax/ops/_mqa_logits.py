"""Logits of DeepSeek sparse attention's lightning indexer: FP8 queries, keys shared by all heads."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qjax.ops._dispatch import choose, device_reason, num_sms
from qjax.pallas_kernels import mqa_logits_sm90


def mqa_logits(
    query: Float[Array, "S H D"],
    head_weights: Float[Array, "S H"],
    keys: Float[Array, "T D"],
    key_scale: Float[Array, " T"],
    start: Int[Array, " S"],
    end: Int[Array, " S"],
    *,
    implementation: str | None = None,
) -> Float[Array, "S T"]:
    """sum_h head_weights[s, h] * relu(query[s, h] . keys[t] * key_scale[t]) for start[s] <= t < end[s], else -inf.

    Equation 1 of DeepSeek-V3.2-Exp (DeepSeek-AI 2025). Every logit outside its query's range is -inf, so that a top-k
    needs no mask. Not differentiable: an error says so where a gradient is asked for.

    Args:
        query: float8_e4m3fn. Its scale belongs into the weights, as relu lets positive factors through.
        head_weights: float32.
        keys: float8_e4m3fn.
        key_scale: float32, not negative.
        start: int32: first key that a query sees.
        end: int32: the one past its last; what is outside 0..T does not count.
        implementation: "pallas_mosaic_gpu", "xla" or None.

    Returns:
        float32.

    Raises:
        ValueError: If shapes or dtypes don't agree, or the implementation asked for can't take the arguments; or
            while differentiating.
    """
    arrays = (query, head_weights, keys, key_scale, start, end)
    mqa_logits_sm90.check(*arrays)
    arrays = _undifferentiated("mqa_logits")(*arrays)
    reason = unsupported_reason(query, keys)
    if choose("mqa_logits", implementation, reason) == "pallas_mosaic_gpu":
        return mqa_logits_sm90.mqa_logits(*arrays, num_sms=num_sms())
    return _mqa_logits_xla(*arrays)


def paged_mqa_logits(
    query: Float[Array, "B Q H D"],
    head_weights: Float[Array, "B Q H"],
    pages: Float[Array, "P page_size D"],
    page_scale: Float[Array, "P page_size"],
    page_table: Int[Array, "B pages"],
    lengths: Int[Array, " B"],
    *,
    implementation: str | None = None,
) -> Float[Array, "BQ T"]:
    """`mqa_logits` of each sequence's newest queries over its pages; -inf past the keys that a query sees.

    Query i of Q sees the keys up to its own, those before lengths - Q + i + 1.

    Args:
        query: float8_e4m3fn; its scale is in the weights.
        head_weights: float32.
        pages: float8_e4m3fn.
        page_scale: float32, not negative.
        page_table: int32: pages of each sequence in order; entries past its length may be anything.
        lengths: int32: keys of each sequence, the new queries' included.
        implementation: "pallas_mosaic_gpu", "xla" or None.

    Returns:
        float32 [B * Q, pages * page_size].

    Raises:
        ValueError: As `mqa_logits`.
    """
    arrays = (query, head_weights, pages, page_scale, page_table, lengths)
    mqa_logits_sm90.check_paged(*arrays)
    arrays = _undifferentiated("paged_mqa_logits")(*arrays)
    reason = unsupported_reason(query, pages)
    if choose("paged_mqa_logits", implementation, reason) == "pallas_mosaic_gpu":
        return mqa_logits_sm90.paged_mqa_logits(*arrays, num_sms=num_sms())
    return _paged_mqa_logits_xla(*arrays)


def unsupported_reason(query: Array, keys: Array) -> str | None:
    """Why the kernels can't take these queries and keys, or pages, on this device, None if they can."""
    if reason := device_reason("9.0"):
        return reason
    return mqa_logits_sm90.unsupported_reason(
        *query.shape[-2:],
        dtype=query.dtype,
        key_dtype=keys.dtype,
        page_size=keys.shape[1] if keys.ndim == 3 else None,
    )


def _mqa_logits_xla(query, head_weights, keys, key_scale, start, end) -> Array:
    wide = keys.astype(jnp.float32) * key_scale[:, None]
    number = jnp.arange(keys.shape[0], dtype=jnp.int32)

    def of_query(row):  # one at a time: logits of all heads of all queries would not fit
        query, weights, start, end = row
        scores = jnp.matmul(query.astype(jnp.float32), wide.T, precision="highest")
        logits = jnp.matmul(weights, jnp.maximum(scores, 0), precision="highest")
        return jnp.where((start <= number) & (number < end), logits, -jnp.inf)

    return jax.lax.map(of_query, (query, head_weights, start, end))


def _paged_mqa_logits_xla(query, head_weights, pages, page_scale, page_table, lengths) -> Array:
    queries, dim = query.shape[1], query.shape[3]

    def of_sequence(row):
        query, weights, table, length = row
        keys, scale = (jnp.take(x, table, axis=0, mode="clip") for x in (pages, page_scale))
        end = length + jnp.arange(1 - queries, 1, dtype=jnp.int32)
        keys, scale = keys.reshape(-1, dim), scale.reshape(-1)
        return _mqa_logits_xla(query, weights, keys, scale, jnp.zeros_like(end), end)

    out = jax.lax.map(of_sequence, (query, head_weights, page_table, lengths))
    return out.reshape(-1, out.shape[2])


def _undifferentiated(op: str) -> Callable[..., tuple[Array, ...]]:
    """The identity, which raises where it is differentiated."""

    @jax.custom_jvp
    def same(*arrays):
        return arrays

    @same.defjvp
    def _(primals, tangents):
        raise ValueError(
            f"{op}: not differentiable, found a gradient asked for: put jax.lax.stop_gradient around its arguments "
            "(and train an indexer on logits of plain arrays)"
        )

    return same
