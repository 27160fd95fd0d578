"""What the grouped products share: which tiles there are, and the store of a tile that groups cut short."""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def tile_table(group_sizes: Array, lead: tuple[int, ...], tokens: int) -> Array:
    """int32 [most tiles, 4]: each tile's group, first row and number of rows, and the number of tiles.

    Rows of the contiguous layout past the last group are group E, which the kernel fills with zeros.
    """
    groups = group_sizes.shape[0]
    order = jnp.arange(groups)
    if len(lead) == 2:
        sizes = jnp.clip(group_sizes, 0, lead[1])
        starts = order * lead[1]
        most = groups * pl.cdiv(lead[1], tokens)
    else:
        # Sums over [E, E] fuse into one small kernel; a cumulative sum would be several.
        before = order[:, None] >= order[None, :]
        ends = jnp.sum(jnp.where(before, jnp.maximum(group_sizes, 0)[None, :], 0), axis=1)
        ends = jnp.minimum(ends, lead[0])
        starts = jnp.append(jnp.int32(0), ends)
        sizes = jnp.append(ends, jnp.int32(lead[0])) - starts
        groups += 1
        most = (lead[0] + min(groups, lead[0]) * (tokens - 1)) // tokens
    order = jnp.arange(groups)
    counts = (sizes + tokens - 1) // tokens
    ends = jnp.sum(jnp.where(order[:, None] >= order[None, :], counts[None, :], 0), axis=1)
    tile = jnp.arange(most)
    group = jnp.sum((tile[:, None] >= ends[None, :]).astype(jnp.int32), axis=1)
    group = jnp.minimum(group, groups - 1)
    offset = (tile - (ends - counts)[group]) * tokens
    rows = jnp.minimum(sizes[group] - offset, tokens)
    total = jnp.broadcast_to(ends[-1], (most,))
    return jnp.stack([group, starts[group] + offset, rows, total], axis=1).astype(jnp.int32)


def store_rows(smem, out_gmem, token, weight, rows):
    """Stores the first `rows` rows (any number) of `smem`, in pieces of a power of two rows.

    Args:
        smem: [tokens, 64].
        out_gmem: [T, N]; TMA cuts columns past its last.
        token: Where the first row goes.
        weight: Where the first column goes.
        rows: How many rows are stored; none if it is not positive.
    """
    whole, columns = smem.shape[0], pl.ds(weight, 64)

    @pl.when(rows >= whole)
    def _():
        plgpu.copy_smem_to_gmem(smem, out_gmem.at[pl.ds(token, whole), columns])

    @pl.when(rows < whole)
    def _():
        left, offset = lax.max(rows, 0), 0
        size = 1 << (whole - 1).bit_length() - 1
        while size:

            def copy(size=size, offset=offset):
                target = out_gmem.at[pl.ds(token + offset, size), columns]
                plgpu.copy_smem_to_gmem(smem.at[pl.ds(offset, size)], target)

            pl.when(left & size != 0)(copy)
            offset += left & size
            size //= 2
