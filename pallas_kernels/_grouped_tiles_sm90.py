"""What the grouped products share: which tiles there are, and the store of a tile that groups cut short."""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def tile_table(group_sizes: Array, lead: tuple[int, ...], tokens: int) -> Array:
    """int32 [most tiles, 4]: each tile's group, first row and number of rows, and the number of tiles.

    Rows of the contiguous layout past the last group are group E, which the kernel fills with zeros; groups that
    reach past the array are cut, so that no tile does. Only sums over pairs of groups and of a tile and a group,
    because XLA makes one kernel of each such step: cumulative sums and gathers would be many small ones.
    """
    groups = group_sizes.shape[0]
    group = jnp.arange(groups + 1)
    before = group[:, None] > group[None, :groups]
    sizes = jnp.maximum(group_sizes, 0).astype(jnp.int32)
    if len(lead) == 2:
        sizes = jnp.minimum(sizes, lead[1])
        starts, rest, most = group * lead[1], 0, groups * pl.cdiv(lead[1], tokens)
        end = groups * lead[1]
    else:
        starts = jnp.sum(jnp.where(before, sizes[None, :], 0), axis=1)
        rest = end = lead[0]
        most = (lead[0] + min(groups + 1, lead[0]) * (tokens - 1)) // tokens
    counts = (sizes + tokens - 1) // tokens
    first_tiles = jnp.sum(jnp.where(before, counts[None, :], 0), axis=1)
    sizes = jnp.where(group == groups, rest, jnp.pad(sizes, (0, 1)))
    sizes = jnp.clip(sizes, 0, jnp.maximum(end - starts, 0))
    counts = (sizes + tokens - 1) // tokens
    offset = jnp.arange(most)[:, None] - first_tiles[None, :]
    mine = (offset >= 0) & (offset < counts[None, :])
    offset = offset * tokens
    rows = jnp.minimum(sizes[None, :] - offset, tokens)
    group = jnp.broadcast_to(group[None, :], mine.shape)
    columns = [jnp.where(mine, value, 0) for value in (group, starts[None, :] + offset, rows)]
    last = jnp.where(group == groups, (first_tiles + counts)[None, :], 0)
    table = jnp.sum(jnp.stack([*columns, last], axis=1), axis=2)
    return table.astype(jnp.int32)


def store_rows(smem, out_gmem, token, weight, rows):
    """Stores the first `rows` rows (any number) of `smem`, in pieces of a power of two rows.

    Args:
        smem: [tokens, columns].
        out_gmem: [T, N]; TMA cuts columns past its last.
        token: Where the first row goes.
        weight: Where the first column goes.
        rows: How many rows are stored; none if it is not positive.
    """
    whole, columns = smem.shape[0], pl.ds(weight, smem.shape[1])

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
