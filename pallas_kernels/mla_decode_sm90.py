"""Decode attention over a paged cache of latents (DeepSeek-V2/V3, absorbed), for Hopper (split-KV).

All heads of a sequence share its latents [tokens, 576]: scores are over all columns, values are the first 512. One CTA
for 64 rows (query heads x queries) of a sequence and a split of its context; a tile of 64 latents serves as keys and
as values::

    producer warpgroup          math warpgroup w of two
    ------------------          -----------------------
    TMA q                       s = q latents[half w].T of tile 0; p = softmax(s) -> p_smem[w]
    for each tile:              for each further tile j:
      wait empty[slot]            wait full[j], both halves of p
      TMA pages -> ring[slot]     s = q latents[half w].T of tile j; out += p values[:, half w] of tile j - 1
      (tokens past the end        p = softmax(s), its maximum shared between the warpgroups
       become zeros)              out is there: arrive empty[j - 1]; out *= rescale; p -> p_smem[w]
                                out += p values of the last tile; out / sum -> ring -> TMA

The softmax of one tile is computed while the values of the tile before are multiplied. With more than one split each
CTA returns its normalized part and the logarithm of its sum, from which `combine` makes the whole.
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
from qjax.pallas_kernels._mla_decode_wgmma_sm90 import HALF, ROWS, TOKENS
from qjax.pallas_kernels._paged_attention_combine_sm90 import LOG2E

LATENT_DIM = 576
VALUE_DIM = 512
MAX_QUERIES = 8
PAGE_SIZES = (16, 32, 64, 128)
MASKED = -(2.0**99)  # finite, so that differences of two masked logits are numbers
LOWEST = float(jnp.finfo(jnp.float32).min)  # below every scaled masked logit
STAGES = 2
REGISTERS = (40, 232)  # of the producer's threads and of the math warpgroups'
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
    plan = Plan(heads, steps, page_size, 1, float(scale))
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
    out = out.reshape(batch, splits, -1, VALUE_DIM)[:, :, :rows]
    out, logs = combine(out, logs[:, :, :rows], dtype=query.dtype)
    shape = (batch, steps, heads)
    return out.reshape(*shape, VALUE_DIM), logs.reshape(shape)


def combine(parts: Array, log_sums: Array, *, dtype: DTypeLike) -> tuple[Array, Array]:
    """The attention of all parts of the context (FlashDecoding).

    Args:
        parts: [B, S, R, H], each normalized.
        log_sums: float32 [B, S, R]: base-2 logarithms of the softmaxes' denominators.
        dtype: Of the result.

    Returns:
        [B, R, H] and the natural logarithm of the whole denominator, float32 [B, R].
    """
    top = jnp.max(log_sums, axis=1, keepdims=True)
    weights = jnp.exp2(log_sums - top)
    total = jnp.sum(weights, axis=1, keepdims=True)
    if parts.shape[1] == 1:
        out = parts[:, 0].astype(dtype)
    else:
        out = jnp.sum(parts * (weights / total)[..., None], axis=1).astype(dtype)
    logs = jnp.where(top > 0.5 * MASKED, (top + jnp.log2(total)) / LOG2E, -jnp.inf)
    return out, logs[:, 0]


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
    latents = plgpu.SMEM((STAGES, TOKENS, LATENT_DIM), bf16, transforms=tiled(128, bf16))
    output = plgpu.SMEM((2, ROWS, VALUE_DIM // 2), out_dtype, transforms=tiled(128, out_dtype))
    return dict(
        q_smem=plgpu.SMEM((ROWS, LATENT_DIM), bf16, transforms=tiled(128, bf16)),
        ring_or_output=plgpu.RefUnion(latents, output),
        p_smem=plgpu.SMEM((2, ROWS, HALF), bf16, transforms=tiled(64, bf16)),
        exchange=plgpu.SMEM((2, 2, ROWS), jnp.float32),
        q_full=plgpu.Barrier(),
        full=plgpu.Barrier(num_arrivals=plan.pieces, num_barriers=STAGES),
        empty=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        arrived=plgpu.Barrier(num_arrivals=plan.pieces),
        exchanged=plgpu.Barrier(num_arrivals=2),
        p_full=plgpu.Barrier(num_arrivals=2),
        p_free=plgpu.Barrier(num_arrivals=2),
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
        queries = q_gmem.at[sequence, pl.ds(row, ROWS)]
        plgpu.copy_gmem_to_smem(queries, scratch["q_smem"], scratch["q_full"])
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
        # Tokens that a row sees, counted from this warpgroup's half of the first tile.
        end = end - (first * TOKENS + wg * HALF)
        out, logs = _attend(end, count, wg, plan=plan, **scratch)
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
        return following

    lax.fori_loop(0, count, load, table(first))


def page_numbers(table_gmem, sequence, tile, *, plan: Plan):
    """Pages of a tile; those past the table repeat its last."""
    first, last = lax.div(tile * TOKENS, plan.page_size), table_gmem.shape[1] - 1
    return tuple(table_gmem[sequence, lax.min(first + j, last)] for j in range(plan.pieces))


def _load_tile(
    j, token, valid, numbers, pages_gmem, *, plan: Plan, ring_or_output, full, empty, arrived, **_
):
    """The producer's part of a tile."""
    slot = lax.rem(j, STAGES)
    target = ring_or_output[0].at[slot]
    piece = TOKENS // plan.pieces
    offset = pl.multiple_of(lax.rem(token, plan.page_size), piece)

    def copy(barrier):
        for i, number in enumerate(numbers):
            source = pages_gmem.at[number, pl.ds(offset, piece)]
            plgpu.copy_gmem_to_smem(source, target.at[pl.ds(i * piece, piece)], barrier)

    @pl.when(j >= STAGES)
    def _():
        plgpu.barrier_wait(empty.at[slot])
        plgpu.commit_smem()  # orders reads by the math warpgroups before the TMA's writes

    @pl.when(valid >= TOKENS)
    def _():
        copy(full.at[slot])

    # What was never written may be NaN, and 0 * NaN is not 0.
    @pl.when(valid < TOKENS)
    def _():
        copy(arrived)
        plgpu.barrier_wait(arrived)
        layout = plgpu.Layout.WGMMA
        for column in range(0, LATENT_DIM, 64):
            part = target.at[:, pl.ds(column, 64)]
            x = plgpu.load(part, layout=layout)
            token = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout)
            part[...] = jnp.where(token < valid, x, jnp.zeros_like(x))
        plgpu.commit_smem()
        for _ in range(plan.pieces):
            plgpu.barrier_arrive(full.at[slot])


def _attend(
    end,
    count,
    wg,
    *,
    plan: Plan,
    q_smem,
    ring_or_output,
    p_smem,
    exchange,
    q_full,
    full,
    empty,
    exchanged,
    p_full,
    p_free,
    **_,
):
    """A math warpgroup's columns of the normalized output, and the base-2 logarithm of the sums."""
    ring, halves = ring_or_output[0], (p_smem.at[0], p_smem.at[1])
    layout = plgpu.Layout.WGMMA
    row_layout = layout.reduce(1)
    logit_scale = plan.logit_scale * LOG2E

    def spread(vector, shape):
        return lax.broadcast_in_dim(vector, shape, [0])

    def of_other(vector, parity):
        """The other warpgroup's vector."""
        exchange.at[parity, wg][...] = vector
        plgpu.barrier_arrive(exchanged)
        plgpu.barrier_wait(exchanged)
        return plgpu.load(exchange.at[parity, 1 - wg], layout=row_layout)

    def softmax(s, j, top, total):
        token = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=layout)
        left = end - j * TOKENS
        s = jnp.where(token < (spread(left, s.shape) if plan.queries > 1 else left), s, MASKED)
        best = jnp.max(s, axis=1) * logit_scale
        best = jnp.maximum(best, of_other(best, lax.rem(j, 2)))
        new_top = jnp.maximum(top, best)
        p = jnp.exp2(s * logit_scale - spread(new_top, s.shape))
        rescale = jnp.exp2(top - new_top)
        return p.astype(q_smem.dtype), new_top, total * rescale + jnp.sum(p, axis=1), rescale

    def share(p):
        p_smem.at[wg][...] = p
        plgpu.commit_smem()
        plgpu.barrier_arrive(p_full)

    def step(j, carry):
        top, total, out = carry
        slot, before = lax.rem(j, STAGES), lax.rem(j - 1, STAGES)
        plgpu.barrier_wait(full.at[slot])
        plgpu.barrier_wait(p_full)
        s, out = wgmma.logits_and_values(q_smem, ring.at[slot], halves, ring.at[before], out, wg)
        p, top, total, rescale = softmax(s, j, top, total)
        out = wgmma.settle(out, p)
        plgpu.barrier_arrive(p_free)

        @pl.when(j - 1 + STAGES < count)
        def _():
            plgpu.barrier_arrive(empty.at[before])

        out = out * spread(rescale, out.shape)
        plgpu.barrier_wait(p_free)
        share(p)
        return top, total, out

    plgpu.barrier_wait(q_full)
    plgpu.barrier_wait(full.at[0])
    s = wgmma.logits(q_smem, ring.at[0], wg)
    top = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), row_layout)
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout)
    out = plgpu.layout_cast(jnp.zeros((ROWS, VALUE_DIM // 2), jnp.float32), layout)
    p, top, total, _ = softmax(s, jnp.int32(0), top, total)
    share(p)
    top, total, out = lax.fori_loop(1, count, step, (top, total, out))
    plgpu.barrier_wait(p_full)
    out = wgmma.values(halves, ring.at[lax.rem(count - 1, STAGES)], out, wg)
    # Both are done with the ring, where the output goes.
    plgpu.barrier_arrive(p_free)
    plgpu.barrier_wait(p_free)
    total = total + of_other(total, lax.rem(count, 2))
    seen = top > 0.5 * MASKED * logit_scale
    weight = jnp.where(seen, 1 / total, jnp.zeros_like(total))
    logs = jnp.where(seen, top + jnp.log2(total), jnp.full_like(top, MASKED))
    return out * spread(weight, out.shape), logs
