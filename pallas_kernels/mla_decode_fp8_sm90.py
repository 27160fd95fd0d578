"""Decode attention over a paged cache of FP8 latents (DeepSeek-V2/V3, absorbed), for Hopper (split-KV).

The math is that of `mla_decode_sm90`, on bfloat16 tiles; its producer warpgroup makes them. A token is 512 E4M3 codes,
four float32 scales of 128 codes each, and 64 rotated channels in bfloat16, 656 bytes where bfloat16 takes 1152. There
is no shared memory left to land codes in: they are loaded into registers, one tile ahead of the widening::

    producer warpgroup, for each tile j
    -----------------------------------
    (codes, scales and rotated channels of tile j are in registers, or on their way)
    wait empty[slot]
    for each 64 columns:
      code * scale -> bfloat16 -> ring[slot]; tokens past the end become zeros
      load these columns of tile j + 1
    rotated channels likewise; arrive full[slot]
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qjax.pallas_kernels import mla_decode_sm90
from qjax.pallas_kernels.mla_decode_sm90 import (
    LATENT_DIM,
    STAGES,
    TOKENS,
    VALUE_DIM,
    Plan,
    attend,
    expect,
    page_numbers,
)

BLOCK = 128  # columns of a scale
ROTATED_DIM = LATENT_DIM - VALUE_DIM
WIDTH = 64  # columns of a tile that are loaded and widened together
PARTS = LATENT_DIM // WIDTH
PAGE_SIZES = (64, 128)  # a tile is of one page
REGISTERS = (152, 176)  # of the producer's threads and of the math warpgroups'
# A thread has 8 columns next to one another: 8 bytes of codes in global memory, 16 of bfloat16 in shared memory.
_LAYOUT = plgpu.Layout.WGMMA_UPCAST_4X


def unsupported_reason(
    heads: int,
    latent_dim: int,
    value_dim: int,
    page_size: int,
    *,
    queries: int = 1,
    dtype: DTypeLike = "bfloat16",
    page_dtype: DTypeLike = "float8_e4m3fn",
) -> str | None:
    """Why the kernel can't attend with these sizes, None if it can; `latent_dim` with the rotated channels."""
    if jnp.dtype(page_dtype).name != "float8_e4m3fn":
        return f"codes must be float8_e4m3fn; found {jnp.dtype(page_dtype).name}"
    if page_size not in PAGE_SIZES:
        return f"page_size must be one of {PAGE_SIZES}; found {page_size}"
    return mla_decode_sm90.unsupported_reason(
        heads, latent_dim, value_dim, page_size, queries=queries, dtype=dtype
    )


def mla_decode_fp8_attention(
    query: Array,
    code_pages: Array,
    scale_pages: Array,
    rotated_pages: Array,
    page_table: Array,
    lengths: Array,
    *,
    scale: float,
    splits: int | None = None,
    num_sms: int | None = None,
) -> tuple[Array, Array]:
    """softmax(scale * q [c, r]^T) c of each sequence's newest queries over its latents c and rotated keys r.

    Args:
        query: bfloat16 [B, T, N, 576], absorbed: already mapped into the latent space, rotated part last.
        code_pages: float8_e4m3fn [P, page_size, 512].
        scale_pages: float32 [P, page_size, 4]: c is code * scale of its 128 columns, rounded to bfloat16.
        rotated_pages: bfloat16 [P, page_size, 64].
        page_table: int32 [B, pages]; entries past a sequence's pages may be any page.
        lengths: int32 [B, T]: tokens that a query sees, its own included, not fewer than the query before it;
            0 gives zeros.
        scale: Positive factor on the logits.
        splits: Parts of the context; default `mla_decode_sm90.choose_splits`.
        num_sms: SMs to fill; default those of the first device.

    Returns:
        bfloat16 [B, T, N, 512], and the natural logarithm of the softmax's denominator, float32 [B, T, N] (-inf
        for queries that see nothing).

    Raises:
        ValueError: If shapes or dtypes are not those above, or `unsupported_reason` has a reason.
    """
    _check(query, code_pages, scale_pages, rotated_pages)
    return attend(
        query,
        (code_pages, scale_pages, rotated_pages),
        page_table,
        lengths,
        produce=_produce,
        registers=REGISTERS,
        name="mla_decode_fp8_attention",
        scale=scale,
        splits=splits,
        num_sms=num_sms,
    )


def _check(query, code_pages, scale_pages, rotated_pages):
    op = "mla_decode_fp8_attention"
    if query.ndim != 4 or code_pages.ndim != 3:
        raise ValueError(
            f"{op}: query must be [B, T, N, 576] and code_pages [P, page_size, 512]; found "
            f"{list(query.shape)}, {list(code_pages.shape)}"
        )
    (_, steps, heads, dim), pages = query.shape, code_pages.shape[:2]
    reason = unsupported_reason(
        heads,
        dim,
        code_pages.shape[2],
        pages[1],
        queries=steps,
        dtype=query.dtype,
        page_dtype=code_pages.dtype,
    )
    if reason:
        raise ValueError(f"{op}: {reason}")
    expect(op, "scale_pages", scale_pages, (*pages, VALUE_DIM // BLOCK), "float32")
    expect(op, "rotated_pages", rotated_pages, (*pages, ROTATED_DIM), "bfloat16")


def _produce(
    pools,
    table_gmem,
    sequence,
    first,
    count,
    length,
    *,
    plan: Plan,
    ring_or_output,
    full,
    empty,
    **_,
):
    """Loads and widens `count` tiles from the `first` on of a sequence of this length."""

    def tile_of(j):
        # There is none after the last, which is loaded once more: its bytes are near.
        return first + lax.min(j, count - 1)

    def step(j, carry):
        loaded, (number,) = carry
        following = page_numbers(table_gmem, sequence, tile_of(j + 2), plan=plan)
        slot = lax.rem(j, STAGES)

        @pl.when(j >= STAGES)
        def _():
            plgpu.barrier_wait(empty.at[slot])

        target, valid = ring_or_output[0].at[slot], length - (first + j) * TOKENS
        parts = []
        # Each part of the next tile is loaded where this one's leaves the registers, before the barrier: the
        # compiler moves loads that come after it to their use.
        for i, part in enumerate(loaded):
            _widen(part, target.at[:, pl.ds(i * WIDTH, WIDTH)], valid)
            parts.append(_load(i, pools, number, tile_of(j + 1), plan=plan))
        plgpu.commit_smem()
        plgpu.barrier_arrive(full.at[slot])
        return tuple(parts), following

    (number,) = page_numbers(table_gmem, sequence, first, plan=plan)
    following = page_numbers(table_gmem, sequence, tile_of(1), plan=plan)
    loaded = tuple(_load(i, pools, number, first, plan=plan) for i in range(PARTS))
    lax.fori_loop(0, count, step, (loaded, following))


def _load(part: int, pools, number, tile, *, plan: Plan) -> tuple[Array, ...]:
    """A part of a tile in registers: codes and their scales, or the rotated channels."""
    codes_gmem, scales_gmem, rotated_gmem = pools
    tokens = pl.ds(pl.multiple_of(lax.rem(tile * TOKENS, plan.page_size), TOKENS), TOKENS)

    def load(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False)

    if part == PARTS - 1:
        return (load(rotated_gmem.at[number, tokens], _LAYOUT),)
    codes = load(codes_gmem.at[number, tokens, pl.ds(part * WIDTH, WIDTH)], _LAYOUT)
    return codes, load(scales_gmem.at[number, tokens, part * WIDTH // BLOCK], _LAYOUT.reduce(1))


def _widen(part: tuple[Array, ...], target, valid):
    """Writes a part as bfloat16; tokens from `valid` on become zeros: what was never written may be NaN."""
    x = part[0]
    if len(part) == 2:
        # float16 holds every E4M3 number.
        x = x.astype(jnp.float16).astype(jnp.float32)
        x = x * lax.broadcast_in_dim(part[1], x.shape, [0])
    token = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=_LAYOUT)
    x = jnp.where(token < valid, x, jnp.zeros_like(x))
    target[...] = x.astype(target.dtype)
