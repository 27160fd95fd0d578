"""Rows of a quantized table."""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Int

from qjax.formats import WHOLE
from qjax.qarray import QArray


def take_rows(
    w: Array | QArray, rows: Int[Array, "..."], *, dtype: DTypeLike | None = None
) -> Array:
    """w[rows]: the embedding lookup, which dequantizes only the rows that it takes.

    Args:
        w: [N, K], plain or quantized.
        rows: Row numbers; those outside 0..N-1 give the first or last row.
        dtype: Result's dtype; default w's (`QArray.dtype`).

    Returns:
        [..., K].
    """
    flat = jnp.clip(rows.reshape(-1), 0, w.shape[0] - 1)
    if not isinstance(w, QArray):
        taken = jnp.take(w, flat, axis=0)
        return taken.astype(w.dtype if dtype is None else dtype).reshape(*rows.shape, w.shape[1])
    bn, bk = w.format.block_shape
    blocks = jnp.zeros_like(flat) if bn == WHOLE else flat // bn
    scale, zero_point, minimum = (
        None if part is None else jnp.take(part, blocks, axis=0)
        for part in (w.scale, w.zero_point, w.minimum)
    )
    taken = dataclasses.replace(
        w,
        qvalue=jnp.take(w.qvalue, flat, axis=0),
        scale=scale,
        zero_point=zero_point,
        minimum=minimum,
        format=dataclasses.replace(w.format, block_shape=(1, bk)),
    )
    return taken.dequantize(dtype).reshape(*rows.shape, w.shape[1])
