"""Decode attention over a paged cache of FP8 latents (DeepSeek-V2/V3, absorbed), for Hopper (split-KV).

The math is that of `mla_decode_sm90`, on float16 tiles (but for their rotated columns), which hold code * scale with
eleven bits; two packed products and one conversion widen two codes. The producer warpgroup makes the tiles. A token is
512 E4M3 codes, four float32 scales of 128 codes each, and 64 rotated channels in bfloat16, 656 bytes where bfloat16
takes 1152. There is no shared memory left to land codes in: they are loaded into registers, three quarters of a tile
ahead of the widening::

    producer warpgroup, for each tile j
    -----------------------------------
    for each half of the columns, that of the slot first:
      wait until it is empty; TMA rotated channels with the second
      for each 128 of its columns:
        code * scale -> float16 -> ring; tokens past the end become zeros
        load the columns that are three such steps ahead
      arrive
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from qjax.pallas_kernels import _attention_wgmma_sm90 as attention
from qjax.pallas_kernels import mla_decode_sm90
from qjax.pallas_kernels.mla_decode_sm90 import (
    FLOAT16_MAX,
    HALF,
    ROTATED_DIM,
    TOKENS,
    VALUE_DIM,
    Plan,
    attend,
    expect,
    page_numbers,
)

BLOCK = 128  # columns of a scale
BLOCKS = VALUE_DIM // BLOCK
WIDTH = 64  # columns of a load
AHEAD = BLOCKS - 1  # blocks in registers; as many as there is room for
PAGE_SIZES = (64, 128)  # a tile is of one page
REGISTERS = (104, 200)  # of the producer's threads and of the math warpgroups'
MAX_SCALE = FLOAT16_MAX / 448 * 2.0**8  # keeps the largest code's value in float16's range
# A thread has 8 columns next to one another: 8 bytes of codes in global memory, 16 of float16 in shared memory.
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
        query: bfloat16 [B, T, N, 576], absorbed: already mapped into the latent space, rotated part last; the others
            saturate at 65504.
        code_pages: float8_e4m3fn [P, page_size, 512].
        scale_pages: float32 [P, page_size, 4]: c is code * scale of its 128 columns, up to 65504; larger
            scales saturate, and what is smaller than 2^-14 loses bits.
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
        tile_dtype="float16",
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
    rotated,
    full_first,
    full_rest,
    empty_first,
    empty_rest,
    **_,
):
    """Loads and widens `count` tiles from the `first` on of a sequence of this length."""

    def tile_of(j):
        # There is none after the last, which is loaded once more: its bytes are near.
        return first + lax.min(j, count - 1)

    def step(j, carry):
        loaded, (number,), (next_number,) = list(carry[0]), *carry[1:]
        following = page_numbers(table_gmem, sequence, tile_of(j + 2), plan=plan)
        slot, valid = lax.rem(j, 2), length - (first + j) * TOKENS
        rotated_source = pools[2].at[number, _tokens(first + j, plan)]
        i = 0
        for turn, (full, empty) in enumerate(((full_first, empty_first), (full_rest, empty_rest))):

            @pl.when(j >= 2)
            def _(empty=empty):
                plgpu.barrier_wait(empty.at[slot])

            if turn:
                # By TMA, or, if the tile is not full, last: there are few registers before.
                @pl.when(valid >= TOKENS)
                def _():
                    plgpu.commit_smem()  # orders accesses by the math warpgroups before the TMA's writes
                    plgpu.copy_gmem_to_smem(rotated_source, rotated.at[slot], full_rest.at[slot])

            half = ring_or_output[0].at[slot, 1 - slot if turn else slot]
            for column in range(0, HALF, BLOCK):
                # The next block is loaded where this one leaves the registers, before the barrier: the compiler
                # moves loads that come after it to their use.
                _widen(loaded.pop(0), half.at[:, pl.ds(column, BLOCK)], valid)
                where = (next_number, tile_of(j + 1), 1 - slot) if i else (number, first + j, slot)
                loaded.append(_load((i + AHEAD) % BLOCKS, pools, *where, plan=plan))
                i += 1
            plgpu.commit_smem()
            plgpu.barrier_arrive(full.at[slot])

        @pl.when(valid < TOKENS)
        def _():
            _copy_rotated(rotated_source, rotated.at[slot], valid)
            plgpu.commit_smem()
            plgpu.barrier_arrive(full_rest.at[slot])

        return tuple(loaded), (next_number,), following

    numbers = page_numbers(table_gmem, sequence, first, plan=plan)
    following = page_numbers(table_gmem, sequence, tile_of(1), plan=plan)
    loaded = tuple(_load(i, pools, numbers[0], first, 0, plan=plan) for i in range(AHEAD))
    lax.fori_loop(0, count, step, (loaded, numbers, following))


def _tokens(tile, plan: Plan):
    """Where a tile's tokens are in its page."""
    return pl.ds(pl.multiple_of(lax.rem(tile * TOKENS, plan.page_size), TOKENS), TOKENS)


def _load(i: int, pools, number, tile, slot, *, plan: Plan) -> tuple[list[Array], Array]:
    """The i-th block that a slot gets, in registers: codes of 64 columns each, and their scales."""
    codes_gmem, scales_gmem, _ = pools
    half = 1 - slot if i * BLOCK >= HALF else slot  # its own half of a slot is first
    block, tokens = half * (HALF // BLOCK) + i % (HALF // BLOCK), _tokens(tile, plan)
    codes = []
    for column in range(0, BLOCK, WIDTH):
        start = block * BLOCK + column
        if not isinstance(start, int):
            start = pl.multiple_of(start, WIDTH)
        source = codes_gmem.at[number, tokens, pl.ds(start, WIDTH)]
        codes.append(plgpu.load(source, layout=_LAYOUT, optimized=False))
    source = scales_gmem.at[number, tokens, block]
    return codes, plgpu.load(source, layout=_LAYOUT.reduce(1), optimized=False)


def _widen(loaded: tuple[list[Array], Array], target, valid):
    """Writes a block as float16; tokens from `valid` on become zeros: codes and scales never written may be NaN."""
    codes, scales = loaded
    token = plgpu.broadcasted_iota(jnp.int32, scales.shape, 0, layout=_LAYOUT.reduce(1))
    written = token < valid
    # 2^-8 code is exact in float16, and scales from 2^-22 on are at full precision. A scale that is NaN, whose codes
    # are masked or NaN themselves, becomes a number.
    scales = scales * 2.0**8
    scales = jnp.where(scales < MAX_SCALE, scales, MAX_SCALE).astype(jnp.float16)
    kept = jnp.where(written, jnp.int16(-1), jnp.int16(0))
    for i, x in enumerate(codes):
        scale, keep = (lax.broadcast_in_dim(v, x.shape, [0]) for v in (scales, kept))
        target.at[:, pl.ds(i * WIDTH, WIDTH)][...] = _products(x, scale, keep)


def _products(codes: Array, scales: Array, kept: Array) -> Array:
    """2^-8 code * scale in float16, the codes masked by the bits of `kept`."""

    def widen(ctx, codes, scales, kept):
        del ctx
        i32 = ir.IntegerType.get_signless(32)

        def words(register):
            kind = ir.VectorType(register.type)
            count = kind.shape[0] * utils.bitwidth(kind.element_type) // 32
            register = utils.bitcast(register, ir.VectorType.get((count,), i32))
            return [vector.extract(register, [], [i]) for i in range(count)]

        def product(register, scale, kept):
            found = []
            for word in words(register):
                found += attention._asm(
                    [i32, i32], [word, words(scale)[0], words(kept)[0]], _WIDEN, "=&r,=&r,r,r,r"
                )
            pairs = vector.from_elements(ir.VectorType.get((len(found),), i32), found)
            return utils.bitcast(pairs, ir.VectorType.get((2 * len(found),), ir.F16Type.get()))

        arrays = (codes.registers, scales.registers, kept.registers)
        registers = np.empty_like(codes.registers)
        for index in np.ndindex(registers.shape):
            registers[index] = product(*(array[index] for array in arrays))
        return fa.FragmentedArray(_registers=registers, _layout=codes.layout, _is_signed=None)

    def reference(codes, scales, kept):
        codes = jnp.where(kept != 0, codes.astype(jnp.float16), 0)
        return codes * jnp.float16(2.0**-8) * scales

    widen.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(_LAYOUT, _LAYOUT, _LAYOUT),
        return_type=plgpu.ShapeDtypeStruct(codes.shape, jnp.float16, layout=_LAYOUT),
    )(widen)(codes, scales, kept)


# Four codes: masked before their conversion, which is one instruction for two.
_WIDEN = """{
.reg .b32 codes, small; .reg .b16 low, high;
mov.b32 small, 0x1C001C00;
and.b32 codes, $2, $4;
mov.b32 {low, high}, codes;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
mul.rn.f16x2 $0, $0, small;
mul.rn.f16x2 $1, $1, small;
mul.rn.f16x2 $0, $0, $3;
mul.rn.f16x2 $1, $1, $3;
}"""


def _copy_rotated(source, target, valid):
    """Copies the rotated channels of a tile; tokens from `valid` on become zeros."""
    x = plgpu.load(source, layout=_LAYOUT, optimized=False)
    token = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=_LAYOUT)
    target[...] = jnp.where(token < valid, x, jnp.zeros_like(x))
