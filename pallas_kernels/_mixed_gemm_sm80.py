"""The kernel of the mixed-input product for Ampere; `mixed_gemm_sm80` draws it and says what its operands are."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.pallas_kernels._async_copy_sm80 import SWIZZLED, commit_copies, copy_tile, wait_copies
from qjax.pallas_kernels._mixed_gemm_registers_sm90 import (
    ELEMENTS,
    UNITS,
    dequantize,
    words_layout,
)
from qjax.pallas_kernels._mixed_gemm_tiles_sm80 import TileConfig
from qjax.pallas_kernels._mma_sm80 import products, store_columns
from qjax.wgmma_layout import BLOCK


def launch(
    operands: dict[str, Array],
    sizes: tuple[int, int, int],
    element: str,
    group_size: int,
    zero: int,
    config: TileConfig,
) -> Array:
    """The product [M, N], or with splits its parts float32 [splits, M, N] without the bias.

    Args:
        operands: {"x": [M, K], "codes": words, "scale": [N/64, groups, 64]}, and where there are such "zero_point"
            and "minimum" (like scale), "sums" (float32 [groups, tokens], the columns of each group, or of a step
            where that is shorter, of x added; tokens a multiple of the tile's) with "minimum", and "bias" [N/64, 64].
        sizes: M, N, K.
        element: The codes' element.
        group_size: Columns that share a scale, K or at most 128.
        zero: The zero point of all weights, without "zero_point".
        config: The tiling.
    """
    m, n, k = sizes
    bits, unit = ELEMENTS[element], UNITS[ELEMENTS[element]]
    grouped = group_size != k
    codes = operands["codes"]
    operands = operands | {"codes": codes.reshape(codes.shape[0], -1)}
    words = (config.depth // unit, bits * unit // 128, 256)
    scratch = dict(
        x_smem=plgpu.SMEM(
            (config.stages, config.columns, config.depth), operands["x"].dtype, transforms=SWIZZLED
        ),
        codes_smem=plgpu.SMEM((config.stages, config.blocks, *words), jnp.int32),
    )
    streams = ["x", "codes"]
    for name in ("scale", "zero_point", "minimum", "sums"):
        if name not in operands or not grouped:
            continue
        streams.append(name)
        if name == "sums":
            shape = (config.stages, config.depth // min(group_size, config.depth), config.columns)
        else:
            shape = (config.stages, config.blocks, max(config.depth // group_size, 1), BLOCK)
            operands[name] = operands[name].reshape(operands[name].shape[0], -1)
        scratch[name + "_smem"] = plgpu.SMEM(shape, operands[name].dtype)
    tiles = (pl.cdiv(n, config.rows), pl.cdiv(m, config.columns))
    out = jax.ShapeDtypeStruct((m, n), operands["x"].dtype)
    if config.splits > 1:
        out = jax.ShapeDtypeStruct((config.splits * m, n), jnp.float32)
    body = functools.partial(
        _kernel,
        streams=tuple(streams),
        config=config,
        element=element,
        group_size=group_size,
        zero=zero,
        sizes=(m, *tiles, pl.cdiv(k, config.depth)),
    )

    def kernel(*refs, **scratch):
        body(dict(zip(operands, refs, strict=False)), refs[len(operands)], scratch)

    found = plgpu.kernel(
        kernel,
        out_type=out,
        grid=(tiles[0] * tiles[1], config.splits),
        grid_names=("tile", "split"),
        kernel_name="mixed_gemm_sm80",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*operands.values())
    return found if config.splits == 1 else found.reshape(config.splits, m, n)


def _kernel(gmem, out, smem, *, streams, config: TileConfig, element, group_size, zero, sizes):
    m, row_tiles, column_tiles, steps = sizes
    tile, split = lax.axis_index("tile"), lax.axis_index("split")
    row_tile, column_tile = plgpu.planar_snake(tile, (row_tiles, column_tiles), 0, 8)
    block, token = row_tile * config.blocks, column_tile * config.columns
    begin, end = split * steps // config.splits, (split + 1) * steps // config.splits
    grouped, unit = "scale" in streams, UNITS[ELEMENTS[element]]
    # Codes of more columns would fill the registers.
    width = min(group_size if grouped else 64, 64 if config.blocks > 1 else 128, config.depth)
    shape = (BLOCK, config.columns)
    spread = functools.partial(lax.broadcast_in_dim, shape=shape, broadcast_dimensions=[0])

    def load(step):
        slot = lax.rem(step - begin, config.stages)
        group = lax.div(step * config.depth, min(group_size, config.depth))
        first_column = step * config.depth
        copy_tile(gmem["x"], smem["x_smem"].at[slot], token, first_column, swizzled=True)
        for name in streams[1:]:
            target = smem[name + "_smem"].at[slot]
            if name == "sums":
                copy_tile(gmem[name], target, group, token)
                continue
            count = target.size // config.blocks if name == "codes" else None
            column = step * count if count else lax.div(first_column, group_size) * BLOCK
            copy_tile(gmem[name], target, block, column)

    def load_if_any(step):
        pl.when(step < end)(lambda: load(step))
        commit_copies()

    def row_values(ref):
        layout = plgpu.Layout.WGMMA.reduce(1)
        return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

    def minimums(minimum_ref, sums_ref):
        """What the minimums of a group add: their outer product with the sums of x."""
        sums = plgpu.load(sums_ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        return spread(row_values(minimum_ref)) * lax.broadcast_in_dim(sums, shape, [1])

    # Rows past the last block are computed from zeros with another block's scales, and are not stored.
    blocks = [lax.min(block + b, gmem["codes"].shape[0] - 1) for b in range(config.blocks)]
    row_zeros = [None] * config.blocks
    if "zero_point" in gmem and not grouped:
        row_zeros = [row_values(gmem["zero_point"].at[b, 0]) for b in blocks]

    def multiply(step, totals):
        wait_copies(config.stages - 2)
        load_if_any(step + config.stages - 1)
        slot = lax.rem(step - begin, config.stages)
        for first in range(0, config.depth, width):
            group = first // group_size
            weights = []
            for b in range(config.blocks):
                zero_point = row_zeros[b]
                if "zero_point" in streams:
                    zero_point = row_values(smem["zero_point_smem"].at[slot, b, group])
                units = pl.ds(first // unit, -(-(first % unit + width) // unit))
                codes = smem["codes_smem"].at[slot, b, units]
                words = plgpu.load(codes, layout=words_layout(codes.shape))
                options = dict(first=first % unit, width=width, zero=zero, ampere=True)
                weights.append(dequantize(words, element, gmem["x"].dtype, zero_point, **options))
            if not grouped:
                totals = products(weights, smem["x_smem"].at[slot], totals, first=first)
                continue
            parts = products(weights, smem["x_smem"].at[slot], first=first)
            added = []
            for b, (total, part) in enumerate(zip(totals, parts, strict=True)):
                if "minimum" in streams and first % min(group_size, config.depth) == 0:
                    total = total + minimums(
                        smem["minimum_smem"].at[slot, b, group],
                        smem["sums_smem"].at[slot, first // min(group_size, config.depth)],
                    )
                scale = row_values(smem["scale_smem"].at[slot, b, group])
                added.append(total + part * spread(scale))
            totals = tuple(added)
        return totals

    pl.loop(begin, begin + config.stages - 1)(load_if_any)
    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    totals = lax.fori_loop(begin, end, multiply, (zeros,) * config.blocks)
    for b, (at, total) in enumerate(zip(blocks, totals, strict=True)):
        if not grouped:
            total = total * spread(row_values(gmem["scale"].at[at, 0]))
            if "minimum" in gmem:
                tokens = gmem["sums"].at[0, pl.ds(token, config.columns)]
                # All columns' sums are added once.
                once = lax.select(split == 0, jnp.float32(1), jnp.float32(0))
                total = total + minimums(gmem["minimum"].at[at, 0], tokens) * once
        if "bias" in gmem:
            total = total + spread(row_values(gmem["bias"].at[at]))
        row = (block + b) * BLOCK
        store_columns(total.astype(out.dtype), out, row, split * m + token, (split + 1) * m)
