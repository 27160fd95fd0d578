"""The "wgmma" storage of 4-bit weights: the order in which Hopper's wgmma wants its left operand in registers.

A block of 64 rows by 64 columns is 2 KiB of contiguous memory in which each thread of a warpgroup finds its 32
codes in 16 bytes: bit ``16e + 8p + 4h`` of word ``4 * thread + j`` starts the code of row ``16w + 8h + r``, column
``16j + 8p + 2q + e``, where ``thread = 32w + 4r + q`` (PTX ISA, wgmma's fragment of a 64x16 matrix of 16-bit
elements). Scales of 64 rows lie together for each group of columns.
"""

import jax.numpy as jnp
from jax import Array, lax

BLOCK = 64
"""Rows and columns of a block."""

WORDS = 512
"""32-bit words of a block."""


def codes_shape(n: int, k: int) -> tuple[int, int, int, int]:
    """Shape of the words of codes [n, k], both multiples of 64."""
    return (n // BLOCK, k // BLOCK, 2, WORDS // 2)


def to_words(codes: Array) -> Array:
    """int32 [..., N/64, K/64, 2, 256] of codes uint8 [..., N, K/2], the even column in the low nibble."""
    *lead, n, half = codes.shape
    b = codes.reshape(-1, n // BLOCK, 4, 2, 8, half * 2 // BLOCK, 4, 2, 4)
    # Axes: row block, column block, warp, row, pair of columns, 16 columns, 8 columns, row half.
    b = b.transpose(0, 1, 5, 2, 4, 8, 6, 7, 3)
    top, bottom = b[..., 0], b[..., 1]
    even = (top & jnp.uint8(15)) | (bottom << jnp.uint8(4))
    odd = (top >> jnp.uint8(4)) | (bottom & jnp.uint8(0xF0))
    shape = codes_shape(n, half * 2)
    quads = jnp.stack([even, odd], axis=-2)  # a word's bytes e, p, the lowest first
    return lax.bitcast_convert_type(quads.reshape(*lead, *shape, 4), jnp.int32)


def from_words(words: Array) -> Array:
    """The inverse of `to_words`."""
    *lead, row_blocks, column_blocks, _, _ = words.shape
    quads = lax.bitcast_convert_type(words, jnp.uint8)
    quads = quads.reshape(-1, row_blocks, column_blocks, 4, 8, 4, 4, 2, 2)
    even, odd = quads[..., 0, :], quads[..., 1, :]
    top = (even & jnp.uint8(15)) | (odd << jnp.uint8(4))
    bottom = (even >> jnp.uint8(4)) | (odd & jnp.uint8(0xF0))
    b = jnp.stack([top, bottom], axis=-1).transpose(0, 1, 3, 8, 4, 2, 6, 7, 5)
    return b.reshape(*lead, row_blocks * BLOCK, column_blocks * BLOCK // 2)


def to_row_blocks(values: Array) -> Array:
    """[..., N/64, G, 64] of one value for each row and group [..., N, G]."""
    *lead, n, groups = values.shape
    return values.reshape(*lead, n // BLOCK, BLOCK, groups).swapaxes(-1, -2)


def from_row_blocks(values: Array) -> Array:
    """The inverse of `to_row_blocks`."""
    *lead, row_blocks, groups, _ = values.shape
    return values.swapaxes(-1, -2).reshape(*lead, row_blocks * BLOCK, groups)
