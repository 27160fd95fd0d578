"""The order in which a mixture's experts take their tokens."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

COMPARED = 1024
"""Up to so many rows are compared with each other; more are in chunks, whose rows are."""

CHUNK = 128
"""Rows of a chunk, eight times as many where there are many chunks."""


def expert_order(
    experts: Int[Array, "T k"], num_experts: int
) -> tuple[Int[Array, " M"], Int[Array, " M"], Int[Array, " E"]]:
    """The rows T * k of tokens that go to k experts each, by expert, those of one expert in the tokens' order.

    The result is the same whatever runs first on the device.

    Args:
        experts: Each token's; `num_experts` and more for rows that no expert here takes, which come last.
        num_experts: E.

    Returns:
        (tokens, places, group_sizes): tokens[p] is the token of the row that comes p-th, places[t * k + j] where
        the row of experts[t, j] comes, and the number of rows of each expert.
    """
    k = experts.shape[1]
    experts = jnp.minimum(experts.reshape(-1), num_experts)
    if experts.shape[0] > COMPARED:
        places, sizes = _places_by_chunks(experts, num_experts)
        rows = jnp.arange(experts.shape[0], dtype=jnp.int32)
        tokens = jnp.zeros_like(rows).at[places].set(rows // k, unique_indices=True)
        return tokens, places, sizes
    rows = jnp.arange(experts.shape[0], dtype=jnp.int32)
    numbers = jnp.arange(num_experts, dtype=experts.dtype)
    mine, other = experts[:, None], experts[None, :]
    before = (other < mine) | ((other == mine) & (rows[None, :] < rows[:, None]))
    places = jnp.sum(before, axis=1, dtype=jnp.int32)
    found = places[None, :] == rows[:, None]
    tokens = jnp.sum(jnp.where(found, rows[None, :] // k, 0), axis=1)
    sizes = jnp.sum(other == numbers[:, None], axis=1, dtype=jnp.int32)
    return tokens, places, sizes


def _places_by_chunks(
    experts: Int[Array, " M"], num_experts: int
) -> tuple[Int[Array, " M"], Int[Array, " E"]]:
    """Where each row comes, and the experts' rows: sums over pairs, because XLA sorts and scans in many kernels."""
    count = experts.shape[0]
    width = CHUNK if count <= CHUNK**2 else 8 * CHUNK
    numbers = jnp.arange(num_experts + 1, dtype=experts.dtype)
    padded = jnp.pad(experts, (0, -count % width), constant_values=num_experts)
    chunks = padded.reshape(-1, width)
    counts = jnp.sum(chunks[:, None, :] == numbers[None, :, None], axis=2, dtype=jnp.int32)
    sizes = jnp.sum(counts, axis=0, dtype=jnp.int32)
    smaller = numbers[None, :] < numbers[:, None]
    starts = jnp.sum(jnp.where(smaller, sizes[None, :], 0), axis=1, dtype=jnp.int32)
    index, inside = (jnp.arange(n, dtype=jnp.int32) for n in chunks.shape)
    earlier = (index[None, :] < index[:, None])[:, :, None]
    above = jnp.sum(jnp.where(earlier, counts[None], 0), axis=1, dtype=jnp.int32)
    same = chunks[:, None, :] == chunks[:, :, None]
    before = (inside[None, :] < inside[:, None])[None]
    rank = jnp.sum(same & before, axis=2, dtype=jnp.int32)
    places = jnp.take_along_axis(above + starts[None], chunks, axis=1, mode="clip") + rank
    return places.reshape(-1)[:count], sizes[:num_experts]
