"""The kernel of the mixed-input product; `mixed_gemm_sm90` draws it and says what its operands are."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from qjax.pallas_kernels._mixed_gemm_registers_sm90 import (
    ELEMENTS,
    UNITS,
    dequantize,
    words_layout,
)
from qjax.pallas_kernels._mixed_gemm_tiles_sm90 import MIN_SUMS, TileConfig
from qjax.pallas_kernels._mma_sm80 import products
from qjax.pallas_kernels._w4a8_product_sm90 import add_product, close_turns, open_turns
from qjax.pallas_kernels._w4a8_registers_sm90 import eight_bit_factor
from qjax.pallas_kernels._wgmma_sm90 import load_columns, mixed_product
from qjax.wgmma_layout import BLOCK

# Of each math warpgroup, by their number: with the producer's 40 they fill the registers of an SM.
_REGISTERS = {1: 232, 2: 232, 3: 152, 4: 104}


def launch(
    operands,
    sizes,
    element: str,
    group_size: int,
    zero: int,
    config: TileConfig,
    num_sms: int,
    *,
    out_dtype: DTypeLike | None = None,
    kernel_name: str = "mixed_gemm",
):
    """The product [M, N].

    Args:
        operands: {"x": [M', K], "codes": words, "scale": [N/64, groups, 64]}, and where there are such
            "zero_point" and "minimum" (like scale), "sums" (float32 [groups, tokens], the columns of each group
            of x added; tokens a multiple of 32 and of the tile's) with "minimum", "bias" [N/64, 64], and
            "x_scale" (float32 [M]) with x of 8 bits.
        sizes: M, N, K.
        element: The codes' element.
        group_size: Columns that share a scale, K or at most 128.
        zero: The zero point of all weights, without "zero_point".
        config: The tiling.
        num_sms: SMs to run on.
        out_dtype: The output's dtype; default x's.
        kernel_name: In profiles.
    """
    m, n, k = sizes
    bits, unit = ELEMENTS[element], UNITS[ELEMENTS[element]]
    words = operands["codes"].shape
    # A unit is what a thread loads at once.
    shape = (words[0], words[1] * BLOCK // unit, bits * unit // 128, 256)
    operands = operands | {"codes": operands["codes"].reshape(shape)}
    x, out_dtype = operands["x"], jnp.dtype(out_dtype or operands["x"].dtype)
    row_tiles, column_tiles = pl.cdiv(n, config.rows), pl.cdiv(m, config.columns)
    warpgroups = config.blocks * config.parts
    if config.tail or config.share:  # a cluster takes so many whole tiles together
        row_tiles = pl.cdiv(row_tiles, config.splits)
    clusters = max(min(num_sms // config.splits, row_tiles * column_tiles), 1)
    grouped = group_size != k
    out_type = [jax.ShapeDtypeStruct((m, n), out_dtype)]
    scratch = dict(
        codes_smem=plgpu.SMEM(
            (config.stages, config.blocks, config.step // unit, *shape[2:]), jnp.int32
        ),
        x_smem=_x_smem(config, x.dtype),
        out_smem=plgpu.SMEM(
            (config.blocks, config.columns, BLOCK),
            out_dtype,
            transforms=(plgpu.SwizzleTransform(128),),
        ),
    )
    releases = dict(num_arrivals=warpgroups, num_barriers=config.stages)
    if config.share:
        scratch["empty"] = plgpu.ClusterBarrier(collective_axes=("split",), **releases)
    else:
        scratch["empty"] = plgpu.Barrier(**releases)
    streams = ["x", "codes"]
    for name in ("scale", "zero_point", "minimum", "sums"):
        if grouped and name in operands:
            streams.append(name)
            shape = (config.stages, config.blocks, config.step // group_size, BLOCK)
            if name == "sums":
                tokens = max(config.columns, MIN_SUMS)
                shape = (config.stages, config.step // group_size, tokens)
            scratch[name + "_smem"] = plgpu.SMEM(shape, operands[name].dtype)
    arrivals = len(streams) - 1 + config.parts * _x_chunks(config, x.dtype)
    scratch["full"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=config.stages)
    scratch |= part_sums(config.parts, config.blocks, config.blocks, config.columns)
    rounds = config.rounds(m, n, clusters)
    if config.splits > 1 and rounds[1]:
        # Two buffers: a part is overwritten after the barrier that follows its addition.
        shape = (clusters, 2, config.splits, config.blocks, BLOCK, config.columns)
        out_type.append(jax.ShapeDtypeStruct(shape, jnp.float32))
        scratch["summed"] = plgpu.ClusterBarrier(
            collective_axes=("split",), num_barriers=config.blocks
        )
    body = functools.partial(
        _kernel,
        streams=tuple(streams),
        config=config,
        element=element,
        group_size=group_size,
        zero=zero,
        counts=(row_tiles, column_tiles, pl.cdiv(k, config.step), clusters),
        rounds=rounds,
    )

    def kernel(*refs, **scratch):
        inputs = dict(zip(operands, refs, strict=False))
        outputs = refs[len(operands) :]
        body(inputs, outputs, scratch)

    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(config.splits,),
        cluster_names=("split",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        kernel_name=kernel_name,
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*operands.values())[0]


def _x_chunks(config: TileConfig, dtype) -> int:
    """Copies of x that fill a part of a stage."""
    return config.depth // 128 if dtype.itemsize == 1 else 1


def _x_smem(config: TileConfig, dtype):
    """Where a stage's x goes: K is a multiple of 64, so rows of 128 columns of 8 bits may not be tiles of the array."""
    if dtype.itemsize == 1:
        shape = (config.stages, config.parts, config.depth // 128, config.columns, 128)
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(128),))
    return plgpu.SMEM(
        (config.stages, config.parts, config.columns, config.depth),
        dtype,
        transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
    )


def part_sums(parts: int, blocks: int, row_blocks: int, columns: int) -> dict:
    """Scratch in which the warpgroups that share K hand their sums to the first; none if there is one.

    Args:
        parts: Warpgroups that share K.
        blocks: Groups of such warpgroups.
        row_blocks: Blocks of 64 weight rows of all of them.
        columns: Tokens.
    """
    if parts == 1:
        return {}
    swizzle = plgpu.find_swizzle(math.gcd(columns, 32) * 32)
    return dict(
        sum_smem=plgpu.SMEM(
            (parts - 1, row_blocks, BLOCK, columns),
            jnp.float32,
            transforms=(plgpu.TilingTransform((8, swizzle // 4)), plgpu.SwizzleTransform(swizzle)),
        ),
        added=plgpu.Barrier(num_arrivals=parts - 1, num_barriers=blocks),
        taken=plgpu.Barrier(num_barriers=blocks),
    )


def _kernel(
    gmem, outputs, smem, *, streams, config: TileConfig, element, group_size, zero, counts, rounds
):
    row_tiles, column_tiles, steps, clusters = counts
    full, empty, x_smem = smem["full"], smem["empty"], smem["x_smem"]
    wg, cluster, split = (lax.axis_index(name) for name in ("wg", "cluster", "split"))
    alone, cut = rounds
    if cut:
        my_tiles = alone + (cut - cluster + clusters - 1) // clusters
    else:
        my_tiles = (row_tiles * column_tiles - cluster + clusters - 1) // clusters
    begin, end = split * steps // config.splits, (split + 1) * steps // config.splits
    if config.share:  # CTAs that wait for each other take equally many steps; beyond K all is zero
        part = pl.cdiv(steps, config.splits)
        begin, end = split * part, (split + 1) * part
    step_groups = config.step // group_size if "scale" in streams else 1
    unit = UNITS[ELEMENTS[element]]
    warpgroups = config.blocks * config.parts

    def tile(i):
        """First block of rows, first token, first and last step of this CTA's i-th tile."""
        index, steps_of = cluster + i * clusters, (begin, end)
        order = functools.partial(plgpu.planar_snake, shape=(row_tiles, column_tiles))
        if not alone:
            row, column = order(index, minor_dim=0, tile_width=8)
            return row * config.blocks, column * config.columns, *steps_of
        whole, j = i < alone, index - alone * clusters  # j-th of those cut
        index = lax.select(whole, index, alone * clusters + lax.div(j, config.splits))
        row, column = order(index, minor_dim=0, tile_width=8)
        row = row * config.splits + lax.select(whole, split, lax.rem(j, config.splits))
        pairs = zip((jnp.int32(0), jnp.int32(steps)), steps_of, strict=True)
        steps_of = tuple(lax.select(whole, a, b) for a, b in pairs)
        return row * config.blocks, column * config.columns, *steps_of

    @pl.when(wg == warpgroups)
    def producer():
        plgpu.set_max_registers(40, action="decrease")

        def load_tile(i, count):
            row, column, begin, end = tile(i)
            rows = pl.ds(row, config.blocks)

            def load_step(step, count):
                slot = lax.rem(count, config.stages)

                @pl.when(count >= config.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])
                    plgpu.commit_smem()  # orders the math warpgroups' reads before the next TMA writes

                chunks = _x_chunks(config, x_smem.dtype)
                width = config.depth // chunks
                for part, chunk in itertools.product(range(config.parts), range(chunks)):
                    first = step * config.step + part * config.depth + chunk * width
                    place = (part, chunk) if len(x_smem.shape) == 5 else (part,)
                    copy_x = functools.partial(
                        plgpu.copy_gmem_to_smem,
                        gmem["x"].at[pl.ds(column, config.columns), pl.ds(first, width)],
                        x_smem.at[slot, *place],
                        full.at[slot],
                    )
                    if not config.share:
                        copy_x()
                    elif not cut:
                        copy_x(collective_axes="split")
                    else:
                        pl.when(i < alone)(lambda copy_x=copy_x: copy_x(collective_axes="split"))
                        pl.when(i >= alone)(copy_x)
                for name in streams[1:]:
                    count_of = config.step // unit if name == "codes" else step_groups
                    steps_part = pl.ds(step * count_of, count_of)
                    if name == "sums":
                        tokens = pl.ds(column, smem["sums_smem"].shape[-1])
                        source = gmem[name].at[steps_part, tokens]
                    else:
                        source = gmem[name].at[rows, steps_part]
                    plgpu.copy_gmem_to_smem(
                        source,
                        smem[name + "_smem"].at[slot],
                        full.at[slot],
                    )
                return count + 1

            return lax.fori_loop(begin, end, load_step, count)

        count = lax.fori_loop(0, my_tiles, load_tile, 0)

        @pl.loop(lax.max(count - config.stages, 0), count)
        def _(i):
            plgpu.barrier_wait(empty.at[lax.rem(i, config.stages)])

    @pl.when(wg < warpgroups)
    def math():
        plgpu.set_max_registers(_REGISTERS[warpgroups], action="increase")
        grouped = "scale" in streams
        width = min(group_size if grouped else 128, config.depth)
        part_groups = config.depth // width
        mine, k_part = lax.div(wg, config.parts), lax.rem(wg, config.parts)
        shape = (BLOCK, config.columns)
        eight_bits = x_smem.dtype.itemsize == 1
        turns = eight_bits and (config.columns, config.blocks, config.parts) == (128, 2, 1)
        if turns:
            open_turns()
        # Integers of rows with one scale stay integers until K is through.
        whole = x_smem.dtype == jnp.int8 and not grouped
        row_layout = plgpu.Layout.WGMMA.reduce(1)
        spread = functools.partial(lax.broadcast_in_dim, shape=shape, broadcast_dimensions=[0])

        def row_values(ref):
            return plgpu.load(ref, layout=row_layout, optimized=False).astype(jnp.float32)

        def minimums(minimum_ref, sums_ref, counts=None):
            """What the minimums of a group add, if it counts: their outer product with the sums of x."""
            sums = plgpu.load(sums_ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
            sums = lax.broadcast_in_dim(sums, shape, [1])
            values = row_values(minimum_ref)
            if counts is not None:
                values = values * lax.select(counts, jnp.float32(1), jnp.float32(0))
            return spread(values) * sums

        def multiply_tile(i, count):
            row, column, begin, end = tile(i)
            # A warpgroup past the last row computes rows that TMA does not store.
            block = lax.min(row + mine, gmem["codes"].shape[0] - 1)
            row_zero = None
            if "zero_point" in gmem and not grouped:
                row_zero = row_values(gmem["zero_point"].at[block, 0])

            def multiply_step(step, carry):
                count, total = carry
                slot = lax.rem(count, config.stages)
                plgpu.barrier_wait(full.at[slot])
                part = None
                for g in range(part_groups):
                    first = g * width
                    group, is_first = k_part * part_groups + g, None
                    if width < group_size and grouped:  # parts share a group
                        group = lax.div(k_part, group_size // width)
                        is_first = lax.rem(k_part, group_size // width) == 0
                    if "minimum" in streams:  # before the product: then each takes one multiply-add
                        total = total + minimums(
                            smem["minimum_smem"].at[slot, mine, group],
                            smem["sums_smem"].at[slot, group, pl.ds(0, config.columns)],
                            is_first,
                        )
                    zero_point = row_zero
                    if "zero_point" in streams:
                        zero_point = row_values(smem["zero_point_smem"].at[slot, mine, group])
                    low, high = first // unit, -(-(first + width) // unit)
                    units = pl.ds(k_part * (config.depth // unit) + low, high - low)
                    codes = smem["codes_smem"].at[slot, mine, units]
                    words = plgpu.load(codes, layout=words_layout(codes.shape))
                    scales = smem["scale_smem"].at[slot, mine, group] if grouped else None
                    if eight_bits and grouped:  # one piece of code takes them with the product
                        scales = row_values(scales)
                    place = dict(first=first % unit, width=width)
                    last = first + width == config.depth
                    if eight_bits:
                        chunk, within = divmod(first, 128)
                        tokens = x_smem.at[slot, k_part, chunk]
                        total = add_product(
                            total,
                            words,
                            tokens,
                            zero_point,
                            scales,
                            **place,
                            x_first=within,
                            turns=turns,
                        )
                        if last:
                            plgpu.barrier_arrive(empty.at[slot])
                        continue
                    weights = dequantize(
                        words, element, x_smem.dtype, zero_point, zero=zero, **place
                    )
                    tokens = x_smem.at[slot, k_part]
                    if config.mma:
                        (part,) = products((weights,), tokens, first=first)
                    else:
                        part = mixed_product(weights, tokens, first=first, recycle=part)
                    if last and not grouped:
                        plgpu.barrier_arrive(empty.at[slot])
                    if grouped:
                        part_scales = spread(row_values(scales))
                        if last:
                            plgpu.barrier_arrive(empty.at[slot])
                        total = lax.optimization_barrier(total + part * part_scales)
                    else:
                        total = lax.optimization_barrier(total + part)
                return count + 1, total

            zeros = jnp.zeros(shape, jnp.int32 if whole else jnp.float32)
            zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
            count, total = lax.fori_loop(begin, end, multiply_step, (count, zeros))
            total = total.astype(jnp.float32)

            def store(total):
                if not grouped:
                    total = total * spread(row_values(gmem["scale"].at[block, 0]))
                    if "minimum" in gmem:
                        tokens = gmem["sums"].at[0, pl.ds(column, config.columns)]
                        total = total + minimums(gmem["minimum"].at[block, 0], tokens)
                if "x_scale" in gmem:
                    scales = load_columns(gmem["x_scale"], column, columns=config.columns)
                    factor = eight_bit_factor(x_smem.dtype, zeros="zero_point" in gmem)
                    total = total * lax.broadcast_in_dim(scales * factor, shape, [1])
                if "bias" in gmem:
                    total = total + spread(row_values(gmem["bias"].at[block]))
                _store(total, smem["out_smem"].at[mine], outputs[0], column, (row + mine) * BLOCK)

            def finish(total):
                if not cut or config.splits == 1:
                    store(total)
                elif alone:
                    pl.when(i < alone)(lambda: store(total))
                    pl.when(i >= alone)(lambda: add_splits(total))
                else:
                    add_splits(total)

            def add_splits(total):
                sums = outputs[1].at[cluster, lax.rem(i, 2)]
                sums.at[split, mine][...] = total
                _fence()
                plgpu.barrier_arrive(smem["summed"].at[mine])
                plgpu.barrier_wait(smem["summed"].at[mine])

                @pl.when(lax.rem(mine + i, config.splits) == split)
                def _():
                    _fence()
                    values = [
                        plgpu.load(sums.at[s, mine], layout=plgpu.Layout.WGMMA, optimized=False)
                        for s in range(config.splits)
                    ]
                    store(functools.reduce(jnp.add, values))

            if config.parts == 1:
                finish(total)
                return count

            @pl.when(k_part > 0)
            def _():
                @pl.when(i > 0)
                def _():
                    plgpu.barrier_wait(smem["taken"].at[mine])

                smem["sum_smem"].at[k_part - 1, mine][...] = total
                plgpu.barrier_arrive(smem["added"].at[mine])

            @pl.when(k_part == 0)
            def _():
                plgpu.barrier_wait(smem["added"].at[mine])
                values = [
                    plgpu.load(smem["sum_smem"].at[p, mine], layout=plgpu.Layout.WGMMA)
                    for p in range(config.parts - 1)
                ]
                plgpu.barrier_arrive(smem["taken"].at[mine])
                finish(functools.reduce(jnp.add, values, total))

            return count

        lax.fori_loop(0, my_tiles, multiply_tile, 0)
        if turns:
            close_turns()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if config.parts > 1:

            @pl.when(k_part > 0)
            def _():
                plgpu.barrier_wait(smem["taken"].at[mine])


def _store(total, out_smem, out_gmem, column, row) -> None:
    values = plgpu.layout_cast(total.astype(out_smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_smem.T[...] = values
    plgpu.commit_smem()
    columns = out_smem.shape[0]
    plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[pl.ds(column, columns), pl.ds(row, BLOCK)])


def _fence() -> None:
    """Orders a warpgroup's accesses to device memory before and after it meets others of its cluster.

    A single thread of the warpgroup arrives on a cluster's barrier, so all of them must be done before.
    """

    def emit(ctx):
        del ctx
        fence = "fence.acq_rel.cluster;"
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], fence, "", has_side_effects=True)
        utils.warpgroup_barrier()

    emit.interpret_impl = lambda: ()  # pyright: ignore[reportFunctionMemberAccess]
    plgpu.inline_mgpu()(emit)()
