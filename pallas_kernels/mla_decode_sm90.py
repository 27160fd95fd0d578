"""Decode attention over a paged cache of latents (DeepSeek-V2/V3, absorbed), for Hopper (split-KV).

All heads of a sequence share its latents [tokens, 576]: scores are over all columns, values are the first 512. One CTA
for 64 rows (query heads x queries) of a sequence and a split of its context; a tile of 64 latents serves as keys and
as values. Math warpgroup w of two has columns 256 w .. of the output, and computes the probabilities of the tiles
2 n + w, which lie in slot w of the ring (FlashMLA's "seesaw"): while one computes a softmax, the tensor cores work
for the other::

    producer warpgroup           math warpgroup w, tile t = 2 n + w
    ------------------           ----------------------------------
    TMA q                        wait full[w, 0];     s = q[half w] half[w, w].T            (in flight)
    for each tile t, w = t % 2:  wait p_full[1 - w];  out += p values[half w] of tile t - 1 (in flight)
      wait empty[w, 0]           wait full[w, 1];     s += the other half and the rotated columns
      TMA -> half[w, w]          arrive empty[1 - w, 1]
      wait empty[w, 1]           p = softmax(s) after the other's maximum -> rotated[w]; arrive p_full[w]
      TMA -> half[w, 1 - w],     out += p values[half w] of tile t; arrive empty[w, 0], empty[w, 1]
             rotated[w]        out / sum -> ring -> TMA

Each warpgroup is the first to be done with its own half of its own tiles, so that half is loaded again first. The
rotated columns of a tile are keys only: its probabilities take their place. With more than one split each CTA returns
its normalized part and the logarithm of its sum, from which `combine` makes the whole.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qjax.pallas_kernels import _mla_decode_wgmma_sm90 as wgmma
from qjax.pallas_kernels._mla_decode_combine_sm90 import MASKED, combine
from qjax.pallas_kernels._mla_decode_wgmma_sm90 import ROWS, TOKENS
from qjax.pallas_kernels._paged_attention_combine_sm90 import LOG2E

LATENT_DIM = 576
VALUE_DIM = 512
HALF = VALUE_DIM // 2  # columns of the output that a math warpgroup has
ROTATED_DIM = LATENT_DIM - VALUE_DIM
MAX_QUERIES = 8
PAGE_SIZES = (16, 32, 64, 128)
LOWEST = float(jnp.finfo(jnp.float32).min)  # below every scaled masked logit
FLOAT16_MAX = float(jnp.finfo(jnp.float16).max)
REGISTERS = (72, 216)  # of the producer's threads and of the math warpgroups'
TILE_US = 2.2  # of an SM with a tile


def unsupported_reason(
    heads: int,
    latent_dim: int,
    value_dim: int,
    page_size: int,
    *,
    queries: int = 1,
    dtype: DTypeLike = "bfloat16",
    page_dtype: DTypeLike = "bfloat16",
) -> str | None:
    """Why the kernel can't attend with these sizes, None if it can."""
    dtypes = jnp.dtype(dtype).name, jnp.dtype(page_dtype).name
    if dtypes != ("bfloat16", "bfloat16"):
        return f"queries and latents must be bfloat16; found {dtypes[0]} and {dtypes[1]}"
    if (latent_dim, value_dim) != (LATENT_DIM, VALUE_DIM):
        return (
            f"latents must have {LATENT_DIM} columns, the first {VALUE_DIM} values; "
            f"found {latent_dim} and {value_dim}"
        )
    if page_size not in PAGE_SIZES:
        return f"page_size must be one of {PAGE_SIZES}; found {page_size}"
    if heads < 1 or not 1 <= queries <= MAX_QUERIES:
        return f"1 to {MAX_QUERIES} queries of a sequence; found {queries} of {heads} heads"
    return None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of one call."""

    heads: int
    queries: int
    page_size: int
    splits: int
    logit_scale: float
    tile_dtype: str = "bfloat16"  # float16, where tiles are made of FP8 latents

    @property
    def blocks(self) -> int:
        """CTAs that share the rows of a sequence."""
        return pl.cdiv(self.heads * self.queries, ROWS)

    @property
    def pieces(self) -> int:
        """Pages of a tile."""
        return max(TOKENS // self.page_size, 1)


def choose_splits(ctas: int, max_tokens: int, *, num_sms: int) -> int:
    """Parts of the context that are done soonest if all sequences are as long as they may be.

    Args:
        ctas: Of one split.
        max_tokens: Longest context that the page table can hold.
        num_sms: SMs to fill.
    """
    tiles = pl.cdiv(max_tokens, TOKENS)

    def microseconds(splits: int) -> float:
        waves = pl.cdiv(ctas * splits, num_sms)
        # Parts are written in float32, and read again.
        combining = 0.0 if splits == 1 else 4.0 + 0.08 * ctas * splits
        return waves * (pl.cdiv(tiles, splits) * TILE_US + 5.0) + combining

    return min(range(1, min(tiles, 64) + 1), key=microseconds)


def mla_decode_attention(
    query: Array,
    latent_pages: Array,
    page_table: Array,
    lengths: Array,
    *,
    scale: float,
    splits: int | None = None,
    num_sms: int | None = None,
) -> tuple[Array, Array]:
    """softmax(scale * q c^T) c[:, :512] of each sequence's newest queries over its latents c.

    Args:
        query: bfloat16 [B, T, N, 576], absorbed: already mapped into the latent space, rotated part last.
        latent_pages: bfloat16 [P, page_size, 576], rotated key last.
        page_table: int32 [B, pages]; entries past a sequence's pages may be anything.
        lengths: int32 [B, T]: tokens that a query sees, its own included, not fewer than the query before it;
            0 gives zeros.
        scale: Positive factor on the logits.
        splits: Parts of the context; default `choose_splits`.
        num_sms: SMs to fill; default those of the first device.

    Returns:
        bfloat16 [B, T, N, 512], and the natural logarithm of the softmax's denominator, float32 [B, T, N] (-inf
        for queries that see nothing).

    Raises:
        ValueError: If shapes or dtypes are not those above, or `unsupported_reason` has a reason.
    """
    _check(query, latent_pages)
    options = dict(scale=scale, splits=splits, num_sms=num_sms)
    return attend(
        query,
        (latent_pages,),
        page_table,
        lengths,
        produce=_produce,
        registers=REGISTERS,
        name="mla_decode_attention",
        **options,
    )


def attend(
    query: Array,
    pools: tuple[Array, ...],
    page_table: Array,
    lengths: Array,
    *,
    produce: Callable[..., None],
    registers: tuple[int, int],
    name: str,
    tile_dtype: str = "bfloat16",
    scale: float,
    splits: int | None,
    num_sms: int | None,
) -> tuple[Array, Array]:
    """`mla_decode_attention` of checked queries over any checked pools.

    Args:
        query: As there.
        pools: Pages, [P, page_size, ...] each.
        page_table: As there.
        lengths: As there.
        produce: The producer warpgroup's part, of the pools, the table, and where its tiles are.
        registers: Of the producer's threads and of the math warpgroups'.
        name: Of the kernel.
        tile_dtype: Of latents in shared memory, but for their rotated columns; queries and probabilities follow.
        scale: As there.
        splits: As there.
        num_sms: As there.

    Raises:
        ValueError: If the page table, the lengths or the scale are not those.
    """
    batch, steps, heads, dim = query.shape
    expect(name, "page_table", page_table, (batch, *page_table.shape[1:2]), "int32")
    expect(name, "lengths", lengths, (batch, steps), "int32")
    if not scale > 0:
        raise ValueError(f"{name}: scale must be positive; found {scale}")
    page_size = pools[0].shape[1]
    plan = Plan(heads, steps, page_size, 1, float(scale), tile_dtype)
    if splits is None:
        num_sms = jax.devices()[0].core_count if num_sms is None else num_sms
        splits = choose_splits(
            batch * plan.blocks, page_table.shape[1] * page_size, num_sms=num_sms
        )
    plan = dataclasses.replace(plan, splits=splits)
    rows = steps * heads
    query = query.reshape(batch, rows, dim)
    if rows % 8:  # TMA addresses rows in groups of eight
        query = jnp.pad(query, ((0, 0), (0, -rows % 8), (0, 0)))
    out_dtype = query.dtype if splits == 1 else jnp.float32
    out, logs = plgpu.kernel(
        functools.partial(_kernel, plan=plan, produce=produce, registers=registers),
        out_type=(
            jax.ShapeDtypeStruct((batch, splits, query.shape[1], 2, VALUE_DIM // 2), out_dtype),
            jax.ShapeDtypeStruct((batch, splits, plan.blocks * ROWS), jnp.float32),
        ),
        grid=(batch, splits, plan.blocks),
        grid_names=("sequence", "split", "block"),
        num_threads=3,
        thread_name="wg",
        kernel_name=name,
        scratch_types=_scratch(plan, out_dtype),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,  # rows are reduced by shuffles
        ),
    )(query, *pools, page_table, lengths)
    out = out.reshape(batch, splits, -1, VALUE_DIM)
    out, logs = combine(out, logs[:, :, : out.shape[2]], dtype=query.dtype)
    out, logs = out[:, :rows], logs[:, :rows]
    shape = (batch, steps, heads)
    return out.reshape(*shape, VALUE_DIM), logs.reshape(shape)


def expect(op: str, name: str, array: Array, shape: tuple[int, ...], dtype: str) -> None:
    """Raises a ValueError that says what an argument must be, unless it is that."""
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"{op}: {name} must be {dtype} {list(shape)}; found {array.dtype} {list(array.shape)}"
        )


def _check(query, latent_pages):
    if query.ndim != 4 or latent_pages.ndim != 3:
        raise ValueError(
            "mla_decode_attention: query must be [B, T, N, 576] and latent_pages [P, page_size, 576]; "
            f"found {list(query.shape)}, {list(latent_pages.shape)}"
        )
    _, steps, heads, dim = query.shape
    reason = unsupported_reason(
        heads,
        dim,
        VALUE_DIM,
        latent_pages.shape[1],
        queries=steps,
        dtype=query.dtype,
        page_dtype=latent_pages.dtype,
    )
    if reason:
        raise ValueError(f"mla_decode_attention: {reason}")
    shape = (*latent_pages.shape[:2], dim)
    expect("mla_decode_attention", "latent_pages", latent_pages, shape, "bfloat16")


def _scratch(plan: Plan, out_dtype) -> dict:
    def tiled(swizzle: int, dtype):
        columns = swizzle // jnp.dtype(dtype).itemsize
        return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)

    bf16 = jnp.bfloat16
    halves = plgpu.SMEM((2, 2, TOKENS, HALF), plan.tile_dtype, transforms=tiled(128, bf16))
    output = plgpu.SMEM((2, ROWS, HALF), out_dtype, transforms=tiled(128, out_dtype))
    return dict(
        q_halves=plgpu.SMEM((2, ROWS, HALF), bf16, transforms=tiled(128, bf16)),
        q_rotated=plgpu.SMEM((ROWS, ROTATED_DIM), bf16, transforms=tiled(128, bf16)),
        ring_or_output=plgpu.RefUnion(halves, output),
        rotated=plgpu.SMEM((2, TOKENS, ROTATED_DIM), bf16, transforms=tiled(128, bf16)),
        tops=plgpu.SMEM((2, ROWS), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=3),
        full_first=plgpu.Barrier(num_arrivals=plan.pieces, num_barriers=2),
        full_rest=plgpu.Barrier(num_arrivals=2 * plan.pieces, num_barriers=2),
        empty_first=plgpu.Barrier(num_barriers=2),
        empty_rest=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        arrived=plgpu.Barrier(num_arrivals=3 * plan.pieces),
        p_full=plgpu.Barrier(num_barriers=2),
        done=plgpu.Barrier(num_arrivals=2),
    )


def _kernel(q_gmem, *refs, plan: Plan, produce, registers, **scratch):
    *pools, table_gmem, lengths_gmem, out_gmem, logs_gmem = refs
    sequence, split = lax.axis_index("sequence"), lax.axis_index("split")
    wg, row = lax.axis_index("wg"), lax.axis_index("block") * ROWS
    length = lengths_gmem[sequence, plan.queries - 1]
    tiles = lax.div(length + (TOKENS - 1), TOKENS)
    share = lax.div(tiles + (plan.splits - 1), plan.splits)
    first = split * share
    # A split without tokens attends to a tile that is masked, so that every pipeline runs.
    count = lax.max(lax.min(share, tiles - first), 1)

    @pl.when(wg == 2)
    def producer():
        plgpu.set_max_registers(registers[0], action="decrease")
        for columns, target in (
            (pl.ds(0, HALF), scratch["q_halves"].at[0]),
            (pl.ds(HALF, HALF), scratch["q_halves"].at[1]),
            (pl.ds(VALUE_DIM, ROTATED_DIM), scratch["q_rotated"]),
        ):
            queries = q_gmem.at[sequence, pl.ds(row, ROWS), columns]
            plgpu.copy_gmem_to_smem(queries, target, scratch["q_full"])
        produce(pools, table_gmem, sequence, first, count, length, plan=plan, **scratch)

    @pl.when(wg < 2)
    def math():
        plgpu.set_max_registers(registers[1], action="increase")
        seen = [lengths_gmem[sequence, t] for t in range(plan.queries)]
        end = seen[0]
        if plan.queries > 1:
            layout = plgpu.Layout.WGMMA.reduce(1)
            number = row + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout)
            end = jnp.where(number < plan.heads, seen[0], seen[1])
            for t in range(2, plan.queries):
                end = jnp.where(number < t * plan.heads, end, seen[t])
        least = seen[0] - first * TOKENS  # tokens of this split that every row sees
        end = end - first * TOKENS  # tokens of this split that a row sees
        out, logs = _attend(end, least, count, wg, plan=plan, **scratch)
        target = scratch["ring_or_output"][1].at[wg]
        target[...] = out.astype(target.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(target, out_gmem.at[sequence, split, pl.ds(row, ROWS), wg])

        @pl.when(wg == 0)
        def _():
            logs_gmem.at[sequence, split, pl.ds(row, ROWS)][...] = logs

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _produce(pools, table_gmem, sequence, first, count, length, *, plan: Plan, **scratch):
    """Loads `count` tiles from the `first` on of a sequence of this length."""
    (pages_gmem,) = pools
    table = functools.partial(page_numbers, table_gmem, sequence, plan=plan)

    def load(j, numbers):
        following = table(first + j + 1)
        valid = length - (first + j) * TOKENS
        _load_tile(j, (first + j) * TOKENS, valid, numbers, pages_gmem, plan=plan, **scratch)

        # With one block the latents' bytes are the bound, and prefetching costs 6 % (on an H200).
        if plan.blocks > 1:

            @pl.when(jnp.logical_and(j > 0, j + 1 < count))
            def _():  # while all of the ring is full
                _prefetch_tile(first + j + 1, following, pages_gmem, plan=plan)

        return following

    lax.fori_loop(0, count, load, table(first))


def page_numbers(table_gmem, sequence, tile, *, plan: Plan):
    """Pages of a tile; those past the table repeat its last."""
    first, last = lax.div(tile * TOKENS, plan.page_size), table_gmem.shape[1] - 1
    return tuple(table_gmem[sequence, lax.min(first + j, last)] for j in range(plan.pieces))


def _prefetch_tile(tile, numbers, pages_gmem, *, plan: Plan):
    """Brings a tile's latents into the L2 cache."""
    piece = TOKENS // plan.pieces
    offset = pl.multiple_of(lax.rem(tile * TOKENS, plan.page_size), piece)
    for number in numbers:
        for start, width in ((0, HALF), (HALF, HALF), (VALUE_DIM, ROTATED_DIM)):
            plgpu.async_prefetch(pages_gmem.at[number, pl.ds(offset, piece), pl.ds(start, width)])


def _load_tile(
    j,
    token,
    valid,
    numbers,
    pages_gmem,
    *,
    plan: Plan,
    ring_or_output,
    rotated,
    full_first,
    full_rest,
    empty_first,
    empty_rest,
    arrived,
    **_,
):
    """The producer's part of a tile."""
    slot = lax.rem(j, 2)
    halves, last = ring_or_output[0].at[slot], rotated.at[slot]
    piece = TOKENS // plan.pieces
    offset = pl.multiple_of(lax.rem(token, plan.page_size), piece)

    def copy(target, column, barrier):
        for i, number in enumerate(numbers):
            columns = pl.ds(column, target.shape[1])
            source = pages_gmem.at[number, pl.ds(offset, piece), columns]
            plgpu.copy_gmem_to_smem(source, target.at[pl.ds(i * piece, piece)], barrier)

    def copy_half(half, barrier):
        column = half * HALF
        if not isinstance(half, int):
            column = pl.multiple_of(column, HALF)
        copy(halves.at[half], column, barrier)

    def reuse(empty):
        @pl.when(j >= 2)
        def _():
            plgpu.barrier_wait(empty.at[slot])
            plgpu.commit_smem()  # orders accesses by the math warpgroups before the TMA's writes

    @pl.when(valid >= TOKENS)
    def _():
        reuse(empty_first)
        copy_half(slot, full_first.at[slot])
        reuse(empty_rest)
        copy_half(1 - slot, full_rest.at[slot])
        copy(last, VALUE_DIM, full_rest.at[slot])

    # What was never written may be NaN, and 0 * NaN is not 0.
    @pl.when(valid < TOKENS)
    def _():
        reuse(empty_first)
        reuse(empty_rest)
        copy_half(0, arrived)
        copy_half(1, arrived)
        copy(last, VALUE_DIM, arrived)
        plgpu.barrier_wait(arrived)
        layout = plgpu.Layout.WGMMA
        blocks = [halves.at[h, :, pl.ds(c, 64)] for h in range(2) for c in range(0, HALF, 64)]
        for part in (*blocks, last):
            x = plgpu.load(part, layout=layout)
            token = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout)
            part[...] = jnp.where(token < valid, x, jnp.zeros_like(x))
        plgpu.commit_smem()
        for barrier, arrivals in ((full_first, 1), (full_rest, 2)):
            for _ in range(arrivals * plan.pieces):
                plgpu.barrier_arrive(barrier.at[slot])


def _narrow(query):
    """Turns a half of the queries into float16, in place; what is out of its range saturates."""
    for column in range(0, HALF, 64):
        part = query.at[:, pl.ds(column, 64)]
        x = plgpu.load(part, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        x = jnp.clip(x, -FLOAT16_MAX, FLOAT16_MAX).astype(jnp.float16)
        part[...] = lax.bitcast_convert_type(x, query.dtype)
    plgpu.commit_smem()


def _attend(
    end,
    least,
    count,
    wg,
    *,
    plan: Plan,
    q_halves,
    q_rotated,
    ring_or_output,
    rotated,
    tops,
    q_full,
    full_first,
    full_rest,
    empty_first,
    empty_rest,
    p_full,
    done,
    **_,
):
    """A math warpgroup's columns of the normalized output, and the base-2 logarithm of the sums."""
    halves, other = ring_or_output[0], 1 - wg
    layout = plgpu.Layout.WGMMA
    row_layout = layout.reduce(1)
    logit_scale = plan.logit_scale * LOG2E

    def spread(vector, shape):
        return lax.broadcast_in_dim(vector, shape, [0])

    def rescale(top, new_top, total, out):
        factor = jnp.exp2(top - new_top)
        return new_top, total * factor, wgmma.rescale(out, factor)

    def first_logits():
        plgpu.barrier_wait(full_first.at[wg])
        return wgmma.logits((q_halves.at[wg],), (halves.at[wg, wg],))

    def rest_of_logits(s):
        plgpu.barrier_wait(full_rest.at[wg])
        queries, keys = (q_halves.at[other], q_rotated), (halves.at[wg, other], rotated.at[wg])
        return wgmma.logits(queries, keys, s)

    def values_of_other(top, total, out):
        """Those of the tile before, in flight."""
        plgpu.barrier_wait(p_full.at[other])
        new_top = plgpu.load(tops.at[other], layout=row_layout)
        top, total, out = rescale(top, new_top, total, out)
        return top, total, wgmma.values(rotated.at[other], halves.at[other, wg], out)

    def own_tile(j, s, top, total, out):
        """The softmax of tile j, and its values."""
        token = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=layout)
        left = end - j * TOKENS

        def mask(s):
            return jnp.where(
                token < (spread(left, s.shape) if plan.queries > 1 else left), s, MASKED
            )

        s = lax.cond(least - j * TOKENS < TOKENS, mask, lambda s: s, s)
        new_top = jnp.maximum(top, jnp.max(s, axis=1) * logit_scale)
        p = jnp.exp2(s * logit_scale - spread(new_top, s.shape))
        tops.at[wg][...] = new_top
        rotated.at[wg][...] = lax.bitcast_convert_type(p.astype(plan.tile_dtype), rotated.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(p_full.at[wg])
        added = jnp.sum(p, axis=1)
        top, total, out = rescale(top, new_top, total, out)
        (out,) = wgmma.settle(wgmma.values(rotated.at[wg], halves.at[wg, wg], out))

        @pl.when(j + 2 < count)
        def _():
            plgpu.barrier_arrive(empty_first.at[wg])
            plgpu.barrier_arrive(empty_rest.at[wg])

        return top, total + added, out

    def release_before(j):
        @pl.when(j + 1 < count)
        def _():
            plgpu.barrier_arrive(empty_rest.at[other])

    def step(n, carry):
        j = 2 * n + wg
        s = first_logits()
        top, total, out = values_of_other(*carry)
        s = rest_of_logits(s)
        wgmma.finish(pending=1)
        release_before(j)
        s, out = wgmma.settle(s, out)
        return own_tile(j, s, top, total, out)

    def first_tile(*carry):
        (s,) = wgmma.settle(rest_of_logits(first_logits()))
        return own_tile(jnp.int32(0), s, *carry)

    def last_tile(*carry):
        top, total, out = values_of_other(*carry)
        (out,) = wgmma.settle(out)
        return top, total, out

    def keep(*carry):
        return carry

    plgpu.barrier_wait(q_full)
    if plan.tile_dtype != "bfloat16":
        _narrow(q_halves.at[wg])
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)
    top = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), row_layout)
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout)
    out = plgpu.layout_cast(jnp.zeros((ROWS, HALF), jnp.float32), layout)
    carry = lax.cond(wg == 0, first_tile, keep, top, total, out)
    own = lax.div(count - wg + 1, 2)  # tiles
    carry = lax.fori_loop(1 - wg, own, step, carry)
    top, total, out = lax.cond(lax.rem(count, 2) == wg, last_tile, keep, *carry)
    # Both are done with the ring, where the output goes, and with the maxima.
    plgpu.barrier_arrive(done)
    plgpu.barrier_wait(done)
    tops.at[wg][...] = total
    plgpu.barrier_arrive(done)
    plgpu.barrier_wait(done)
    total = total + plgpu.load(tops.at[other], layout=row_layout)
    seen = top > 0.5 * MASKED * logit_scale
    weight = jnp.where(seen, 1 / total, jnp.zeros_like(total))
    logs = jnp.where(seen, top + jnp.log2(total), jnp.full_like(top, MASKED))
    return out * spread(weight, out.shape), logs
