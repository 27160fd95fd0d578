"""The "wgmma" and "wgmma8" storages of weights: the order in which Hopper's wgmma wants its left operand in registers.

A block of 64 rows by 64 columns is contiguous memory in which each thread of a warpgroup finds its 32 codes in
chunks of up to 16 bytes. Thread ``32w + 4r + q`` holds the codes of rows ``16w + 8h + r`` and columns
``16j + 8p + 2q + e`` (PTX ISA, wgmma's fragment of a 64x16 matrix of 16-bit elements):

    width  words of a block  word of (thread, j, h)                              first bit
    2      256               2 * thread + j // 2                                 16e + 8 * (j % 2) + 4p + 2h
    4      512               4 * thread + j                                      16e + 8p + 4h
    8      1024              512 * (j // 2) + 4 * thread + 2 * (j % 2) + h       16e + 8p

Codes of 2 and 4 bits (FP4 too) are those of "packed" storage; 3-bit codes are stored 4 bits wide. 8-bit codes are
the bytes of "plain" storage (two's complement or FP8), and integers of 5 to 7 bits are stored like that too. Scales
of 64 rows lie together for each group of columns.

"wgmma8" storage is for 4-bit codes that become 8-bit numbers: wgmma's fragment of a 64x32 matrix of 8-bit elements.
Word ``4 * thread + 2j + h`` holds row ``16w + 8h + r``, columns ``32j + 16p + 4q + i``. INT4 codes start at bit
8i + 4p: a mask finds four bytes of numbers. Of FP4 codes, magnitudes (three bits) start at bit 16p + 4i, where PRMT
finds the selectors of four bytes; signs are bits 8i + 7 of the codes with p = 0, and 8i + 3 of those with p = 1.
"wgmma8_pairs" is the same for FP4 experts whose rows alternate between gate and up: blocks do so instead, so that a
warpgroup with two blocks finds both of what an activation takes in one thread.
"""

import jax.numpy as jnp
from jax import Array, lax

BLOCK = 64
"""Rows and columns of a block."""

WORDS = 512
"""32-bit words of a block of 4-bit codes."""


def width_of(bits: int) -> int:
    """Bits that a code of `bits` takes."""
    return 2 if bits == 2 else 4 if bits <= 4 else 8


def codes_shape(n: int, k: int, width: int = 4) -> tuple[int, int, int, int]:
    """Shape of the words of codes [n, k], both multiples of 64, of 2, 4 or 8 bits."""
    return (n // BLOCK, k // BLOCK, width // 2, WORDS // 2)


def to_words(codes: Array, width: int = 4) -> Array:
    """int32 [..., N/64, K/64, width/2, 256] of codes, N and K multiples of 64.

    Args:
        codes: uint8 [..., N, K * width / 8], the first column in the lowest bits.
        width: 2, 4 or 8 bits.
    """
    *lead, n, nbytes = codes.shape
    k = nbytes * 8 // width
    shape = (*lead, *codes_shape(n, k, width))
    if width == 4:
        b = codes.reshape(-1, n // BLOCK, 4, 2, 8, k // BLOCK, 4, 2, 4)
        # Axes: row block, column block, warp, row, pair of columns, 16 columns, 8 columns, row half.
        b = b.transpose(0, 1, 5, 2, 4, 8, 6, 7, 3)
        top, bottom = b[..., 0], b[..., 1]
        even = (top & jnp.uint8(15)) | (bottom << jnp.uint8(4))
        odd = (top >> jnp.uint8(4)) | (bottom & jnp.uint8(0xF0))
        quads = jnp.stack([even, odd], axis=-2)  # a word's bytes e, p, the lowest first
    elif width == 8:
        b = codes.reshape(-1, n // BLOCK, 4, 2, 8, k // BLOCK, 2, 2, 2, 4, 2)
        # Axes: row block, column block, 32 columns, warp, row, pair, 16 columns, row half, e, 8 columns.
        quads = b.transpose(0, 1, 5, 6, 2, 4, 9, 7, 3, 10, 8)
    else:
        fields = [(codes >> jnp.uint8(2 * i)) & jnp.uint8(3) for i in range(4)]
        b = jnp.stack(fields, axis=-1).reshape(-1, n // BLOCK, 4, 2, 8, k // BLOCK, 2, 2, 2, 4, 2)
        # Axes: as with 8 bits, but the fields of a byte (8 columns, row half) last.
        b = b.transpose(0, 1, 5, 2, 4, 9, 6, 10, 7, 8, 3).reshape(*b.shape[:1], -1, 4)
        quads = b[..., 0]
        for i in (1, 2, 3):
            quads = quads | (b[..., i] << jnp.uint8(2 * i))
    return lax.bitcast_convert_type(quads.reshape(*shape, 4), jnp.int32)


def from_words(words: Array, width: int = 4) -> Array:
    """The inverse of `to_words`."""
    *lead, row_blocks, column_blocks, _, _ = words.shape
    quads = lax.bitcast_convert_type(words, jnp.uint8)
    if width == 4:
        quads = quads.reshape(-1, row_blocks, column_blocks, 4, 8, 4, 4, 2, 2)
        even, odd = quads[..., 0, :], quads[..., 1, :]
        top = (even & jnp.uint8(15)) | (odd << jnp.uint8(4))
        bottom = (even >> jnp.uint8(4)) | (odd & jnp.uint8(0xF0))
        b = jnp.stack([top, bottom], axis=-1).transpose(0, 1, 3, 8, 4, 2, 6, 7, 5)
    elif width == 8:
        b = quads.reshape(-1, row_blocks, column_blocks, 2, 4, 8, 4, 2, 2, 2, 2)
        b = b.transpose(0, 1, 4, 8, 5, 2, 3, 7, 10, 6, 9)
    else:
        fields = [(quads >> jnp.uint8(2 * i)) & jnp.uint8(3) for i in range(4)]
        b = jnp.stack(fields, axis=-1)
        b = b.reshape(-1, row_blocks, column_blocks, 4, 8, 4, 2, 2, 2, 2, 2)
        b = b.transpose(0, 1, 3, 10, 4, 2, 6, 8, 9, 5, 7).reshape(*b.shape[:1], -1, 4)
        b = b[..., 0] | (b[..., 1] << 2) | (b[..., 2] << 4) | (b[..., 3] << 6)
    return b.reshape(*lead, row_blocks * BLOCK, column_blocks * BLOCK * width // 8)


def to_words8(codes: Array, element: str = "float4_e2m1fn") -> Array:
    """int32 [..., N/64, K/64, 2, 256] of 4-bit codes uint8 [..., N, K/2], the even column in the low nibble.

    Args:
        codes: Raw FP4, or u = q + 8 of INT4.
        element: "float4_e2m1fn" or "int4".
    """
    *lead, n, half = codes.shape
    b = codes.reshape(-1, n // BLOCK, 4, 2, 8, half * 2 // BLOCK, 2, 2, 4, 2)
    # Axes: row block, column block, warp, row, quad of columns, 32 columns, row half, 16 columns, byte.
    b = b.transpose(0, 1, 5, 2, 4, 8, 6, 3, 7, 9).astype(jnp.uint32)
    words = jnp.zeros(b.shape[:-2], jnp.uint32)
    for p, i, magnitude, sign in _fields8(element):
        code = b[..., p, i // 2] >> jnp.uint32(4 * (i % 2))
        words |= (code & jnp.uint32(7)) << jnp.uint32(magnitude)
        words |= ((code >> jnp.uint32(3)) & jnp.uint32(1)) << jnp.uint32(sign)
    shape = codes_shape(n, half * 2)
    return lax.bitcast_convert_type(words, jnp.int32).reshape(*lead, *shape)


def from_words8(words: Array, element: str = "float4_e2m1fn") -> Array:
    """The inverse of `to_words8`."""
    *lead, row_blocks, column_blocks, _, _ = words.shape
    w = lax.bitcast_convert_type(words, jnp.uint32)
    w = w.reshape(-1, row_blocks, column_blocks, 4, 8, 4, 2, 2)
    out = [[jnp.zeros(w.shape, jnp.uint8)] * 2 for _ in range(2)]
    for p, i, magnitude, sign in _fields8(element):
        code = (w >> jnp.uint32(magnitude)) & jnp.uint32(7)
        code |= ((w >> jnp.uint32(sign)) & jnp.uint32(1)) << jnp.uint32(3)
        out[p][i // 2] |= (code << jnp.uint32(4 * (i % 2))).astype(jnp.uint8)
    b = jnp.stack([jnp.stack(x, axis=-1) for x in out], axis=-2)
    b = b.transpose(0, 1, 3, 7, 4, 2, 6, 8, 5, 9)
    return b.reshape(*lead, row_blocks * BLOCK, column_blocks * BLOCK // 2)


def pair_rows(values: Array) -> Array:
    """[..., N, X] with the even rows of each 128 before the odd ones."""
    *lead, n, x = values.shape
    b = values.reshape(*lead, n // (2 * BLOCK), BLOCK, 2, x)
    return b.swapaxes(-3, -2).reshape(values.shape)


def unpair_rows(values: Array) -> Array:
    """The inverse of `pair_rows`."""
    *lead, n, x = values.shape
    b = values.reshape(*lead, n // (2 * BLOCK), 2, BLOCK, x)
    return b.swapaxes(-3, -2).reshape(values.shape)


def _fields8(element: str):
    """(p, i, first bit of a code's lower three, bit of its fourth) of a word's codes."""
    places = [(p, i) for p in (0, 1) for i in range(4)]
    if element == "int4":
        return [(p, i, 8 * i + 4 * p, 8 * i + 4 * p + 3) for p, i in places]
    return [(p, i, 16 * p + 4 * i, 8 * i + 7 - 4 * p) for p, i in places]


def to_row_blocks(values: Array) -> Array:
    """[..., N/64, G, 64] of one value for each row and group [..., N, G]."""
    *lead, n, groups = values.shape
    return values.reshape(*lead, n // BLOCK, BLOCK, groups).swapaxes(-1, -2)


def from_row_blocks(values: Array) -> Array:
    """The inverse of `to_row_blocks`."""
    *lead, row_blocks, groups, _ = values.shape
    return values.swapaxes(-1, -2).reshape(*lead, row_blocks * BLOCK, groups)
