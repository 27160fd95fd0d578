"""The order in which a mixture's experts take their tokens."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

COMPARED = 1024
"""Up to so many rows are compared with each other: a step of decoding must not wait for sorts of many kernels."""


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
    experts = experts.reshape(-1)
    rows = jnp.arange(experts.shape[0], dtype=jnp.int32)
    numbers = jnp.arange(num_experts, dtype=experts.dtype)
    if experts.shape[0] > COMPARED:
        order = jnp.argsort(experts, stable=True).astype(jnp.int32)
        places = jnp.zeros_like(rows).at[order].set(rows, unique_indices=True)
        ends = jnp.searchsorted(jnp.take(experts, order), numbers, side="right")
        return order // k, places, jnp.diff(ends, prepend=0).astype(jnp.int32)
    mine, other = experts[:, None], experts[None, :]
    before = (other < mine) | ((other == mine) & (rows[None, :] < rows[:, None]))
    places = jnp.sum(before, axis=1, dtype=jnp.int32)
    found = places[None, :] == rows[:, None]
    tokens = jnp.sum(jnp.where(found, rows[None, :] // k, 0), axis=1)
    sizes = jnp.sum(other == numbers[:, None], axis=1, dtype=jnp.int32)
    return tokens, places, sizes
