"""The persistent, warp-specialized grouped product of 4-bit weights: launch and kernel body.

`mixed_grouped_gemm_sm90` draws it.
"""

import dataclasses
import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.pallas_kernels._grouped_tiles_sm90 import store_rows, tile_table
from qjax.pallas_kernels._mixed_gemm_sm90 import part_sums
from qjax.pallas_kernels._scaled_registers_sm90 import (
    FP4_EXPONENT,
    fp4_tables,
    fp4_weights,
    int4_weights,
)
from qjax.pallas_kernels._wgmma_sm90 import (
    fp8_register_product,
    load_columns,
    mixed_accumulate,
)
from qjax.wgmma_layout import BLOCK, WORDS

MAX_SMEM = 227 * 1024
COLUMNS = (8, 16, 32, 64, 96, 120, 128)
# Of each math warpgroup, by their number: with the producer's 40 they fill the registers of an SM.
_REGISTERS = {1: 232, 2: 232, 3: 152, 4: 104}

Element = Literal["int4", "float4_e2m1fn"]


@dataclasses.dataclass(frozen=True)
class GatedActivation:
    """``gate * sigmoid(alpha * gate) * (up + offset)`` with gate <= limit and -limit <= up <= limit.

    Attributes:
        alpha: 1 for SiLU, 1.702 for GPT-OSS.
        offset: What is added to up: 0, or 1 for GPT-OSS.
        limit: None for no limit, 7 for GPT-OSS.
    """

    alpha: float = 1.0
    offset: float = 0.0
    limit: float | None = None


@dataclasses.dataclass(frozen=True)
class MixedTileConfig:
    """How the product is cut.

    Attributes:
        columns: Tokens of a tile, one of `COLUMNS`.
        blocks: Warpgroups side by side along the weight's rows (1 or 2).
        parts: Warpgroups for each of them, each with a part of a stage's columns; blocks * parts <= 4.
        pieces: Blocks of 64 rows of each warpgroup: 2 for a gated product, else 1 or 2.
        depth: Columns of K in a stage for each part, 64 or 128; 128 for FP4.
        stages: Pipeline stages.
        band: Tiles of tokens that meet the same rows of the weight before the next ones do.
    """

    columns: int
    blocks: int
    parts: int
    pieces: int
    depth: int
    stages: int
    band: int = 8

    @property
    def step(self) -> int:
        """Columns of K in a pipeline stage."""
        return self.depth * self.parts

    @property
    def row_blocks(self) -> int:
        """Blocks of 64 weight rows of a CTA's tile."""
        return self.blocks * self.pieces

    def smem_bytes(self, scale_bytes: float = 2 / 32) -> float:
        """Shared memory for the stages and the epilogue, with 2 bytes for each element of x.

        Args:
            scale_bytes: Bytes of scales for each weight.
        """
        rows = BLOCK * self.row_blocks
        stage = self.step * (rows * (0.5 + scale_bytes) + 2 * self.columns)
        epilogue = self.blocks * BLOCK * self.columns * 2
        epilogue += (self.parts - 1) * rows * self.columns * 4
        return self.stages * stage + epilogue + 8 * 1024


def launch(
    x: tuple[Array, ...],
    x_scale: Array | None,
    weights,
    group_sizes: Array,
    *,
    n: int,
    element: Element,
    group_size: int,
    activation: GatedActivation | None,
    out_dtype,
    config: MixedTileConfig,
    num_sms: int,
) -> Array:
    """The product [T, n] of arguments that the callers checked; their docstrings tell the rest.

    Args:
        x: Arrays [T, K] whose sum meets the weights: one of 16 bits for INT4, one or two of FP8 for FP4.
        x_scale: float32 [T + 128] multipliers of FP8 rows.
        weights: For each operand (codes, scale, global scale [E] or None, bias or None); a gated product of one
            takes its blocks by twos.
        group_sizes: int32 [E].
        n: Columns of the output.
        element: The weights' element.
        group_size: Columns that share a scale.
        activation: What makes one output of two operands.
        out_dtype: The output's dtype.
        config: Tiling.
        num_sms: SMs to run on.
    """
    width, gated = min(group_size, 128), activation is not None
    rows = config.blocks if gated else config.row_blocks  # of an output tile, in blocks
    tiles_n = pl.cdiv(n // BLOCK, rows)
    table = tile_table(group_sizes, x[0].shape[:1], config.columns)
    workers = min(num_sms, table.shape[0] * tiles_n)
    operands = {"table": table, **{f"x{i}": term for i, term in enumerate(x)}}
    if x_scale is not None:
        operands["x_scale"] = x_scale
        operands["tables"] = jnp.asarray(fp4_tables().view("int32").reshape(-1))
    for i, (codes, scale, global_scale, bias) in enumerate(weights):
        if element == "float4_e2m1fn":
            scale = lax.bitcast_convert_type(scale, jnp.uint8)
        operands[f"codes{i}"], operands[f"scale{i}"] = codes, scale
        if global_scale is not None:
            operands[f"global{i}"] = global_scale
        if bias is not None:
            pairs = (2,) if gated and len(weights) == 1 else ()
            operands[f"bias{i}"] = bias.reshape(bias.shape[0], -1, BLOCK, *pairs)
    chunk = 128 // x[0].dtype.itemsize
    chunks, blocks = config.step // chunk, config.step // BLOCK
    warpgroups, stages = config.blocks * config.parts, config.stages
    swizzled = (plgpu.SwizzleTransform(128),)
    scratch = dict(
        codes_smem=plgpu.SMEM((stages, config.row_blocks, blocks, 2, WORDS // 2), jnp.int32),
        scale_smem=plgpu.SMEM(
            (stages, config.row_blocks, config.step // width, BLOCK), operands["scale0"].dtype
        ),
        out_smem=plgpu.SMEM((config.blocks, config.columns, BLOCK), out_dtype, transforms=swizzled),
        full=plgpu.Barrier(num_arrivals=chunks * len(x) + 2 * len(weights), num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    )
    for i, term in enumerate(x):
        shape = (stages, chunks, config.columns, chunk)
        scratch[f"x{i}_smem"] = plgpu.SMEM(shape, term.dtype, transforms=swizzled)
    if "tables" in operands:
        scratch["tables_smem"] = plgpu.SMEM(operands["tables"].shape, jnp.int32)
        scratch["tables_full"] = plgpu.Barrier(num_arrivals=2)
    scratch |= part_sums(config.parts, config.blocks, config.row_blocks, config.columns)
    body = functools.partial(
        _kernel,
        terms=len(x),
        config=config,
        width=width,
        activation=activation,
        tiles_n=tiles_n,
        workers=workers,
    )

    def kernel(*refs, **scratch):
        body(dict(zip(operands, refs[:-1], strict=True)), refs[-1], scratch)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((x[0].shape[0], n), out_dtype),
        grid=(workers,),
        grid_names=("worker",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        kernel_name="mixed_gated_grouped_gemm" if gated else "mixed_grouped_gemm",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*operands.values())


def _kernel(
    gmem,
    out_gmem,
    smem,
    *,
    terms: int,
    config: MixedTileConfig,
    width: int,
    activation: GatedActivation | None,
    tiles_n: int,
    workers: int,
):
    table, groups = gmem["table"], gmem["codes0"].shape[0]
    full, empty, x_smem = smem["full"], smem["empty"], [smem[f"x{i}_smem"] for i in range(terms)]
    wg, worker = lax.axis_index("wg"), lax.axis_index("worker")
    warpgroups, chunk = config.blocks * config.parts, x_smem[0].shape[-1]
    chunk_blocks, fp4 = chunk // BLOCK, "tables" in gmem
    k_steps = pl.cdiv(gmem["x0"].shape[1], config.step)
    operands = sum(name.startswith("codes") for name in gmem)
    pairs = activation is not None and operands == 1
    tile_blocks = config.blocks if activation is not None else config.row_blocks  # of the output
    copy_blocks = config.row_blocks // operands
    total = table[0, 3]
    my_units = (total * tiles_n - worker + workers - 1) // workers

    def line(i):
        """The group, first row, rows and first row block of this worker's i-th tile, or of its last."""
        index = worker + lax.max(lax.min(i, my_units - 1), 0) * workers
        tile, column = plgpu.planar_snake(index, (lax.max(total, 1), tiles_n), 0, config.band)
        tile = lax.min(tile, table.shape[0] - 1)
        return table[tile, 0], table[tile, 1], table[tile, 2], column * tile_blocks

    def slot_block(piece, block):
        """Where a warpgroup's blocks of weights lie in a slot."""
        return 2 * block + piece if pairs else piece * config.blocks + block

    def each_tile(body, count):
        """body(line, steps, count) -> count for each tile, whose scalars load one tile ahead."""

        def step(i, carry):
            count, scalars = carry
            following = line(i + 1)
            steps = jnp.where(scalars[0] < groups, k_steps, 0)
            return body(i, scalars, steps, count), following

        return lax.fori_loop(0, my_units, step, (count, line(0)))[0]

    @pl.when(wg == warpgroups)
    def producer():
        plgpu.set_max_registers(40, action="decrease")
        if fp4:
            for half in (pl.ds(0, 256), pl.ds(256, 256)):  # TMA moves at most 256 elements
                plgpu.copy_gmem_to_smem(
                    gmem["tables"].at[half], smem["tables_smem"].at[half], smem["tables_full"]
                )

        def load_tile(i, scalars, steps, count):
            del i
            group, first, _, row = scalars

            def load_step(step, count):
                slot = lax.rem(count, config.stages)

                @pl.when(count >= config.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])
                    plgpu.commit_smem()  # orders the math warpgroups' reads before the next TMA writes

                rows = pl.ds(row * 2 if pairs else row, copy_blocks)
                for i in range(operands):
                    for name, unit in (("codes", BLOCK), ("scale", width)):
                        count_of = config.step // unit
                        plgpu.copy_gmem_to_smem(
                            gmem[f"{name}{i}"].at[group, rows, pl.ds(step * count_of, count_of)],
                            smem[name + "_smem"].at[slot, pl.ds(i * copy_blocks, copy_blocks)],
                            full.at[slot],
                        )
                for i, c in itertools.product(range(terms), range(config.step // chunk)):
                    columns = pl.ds(step * config.step + c * chunk, chunk)
                    plgpu.copy_gmem_to_smem(
                        gmem[f"x{i}"].at[pl.ds(first, config.columns), columns],
                        x_smem[i].at[slot, c],
                        full.at[slot],
                    )
                return count + 1

            return lax.fori_loop(0, steps, load_step, count)

        count = each_tile(load_tile, 0)

        @pl.loop(lax.max(count - config.stages, 0), count)
        def _(i):
            plgpu.barrier_wait(empty.at[lax.rem(i, config.stages)])

    @pl.when(wg < warpgroups)
    def math():
        plgpu.set_max_registers(_REGISTERS[warpgroups], action="increase")
        mine, k_part = lax.div(wg, config.parts), lax.rem(wg, config.parts)
        shape = (BLOCK, config.columns)

        if fp4:
            plgpu.barrier_wait(smem["tables_full"])

        def load_weights(slot, block, c):
            """64 rows of weights by one chunk of columns, in registers."""
            codes = smem["codes_smem"].at[slot, block, pl.ds(c * chunk_blocks, chunk_blocks)]
            layout = plgpu.Layout.WG_STRIDED(codes.shape, vec_size=4)
            words = plgpu.load(codes, layout=layout, optimized=False)
            groups = max(chunk // width, 1)
            scales = smem["scale_smem"].at[slot, block, pl.ds(c * chunk // width, groups)]
            if fp4:
                return fp4_weights(words, scales, smem["tables_smem"])
            return int4_weights(words, scales, x_smem[0].dtype)

        def multiply_step(step, carry):
            del step
            count, sums = carry
            slot = lax.rem(count, config.stages)
            plgpu.barrier_wait(full.at[slot])
            product = None
            for i in range(config.depth // chunk):
                c, new_sums = k_part * (config.depth // chunk) + i, []
                rights = [ref.at[slot, c] for ref in x_smem]
                for p, total in enumerate(sums):
                    weights = load_weights(slot, slot_block(p, mine), c)
                    if fp4:  # FP8 products are summed in fewer bits than float32 has: promote them
                        recycle = product if k_steps > 1 else None
                        product = fp8_register_product(weights, rights, recycle=recycle)
                        new_sums.append(lax.optimization_barrier(total + product))
                    else:
                        new_sums.append(mixed_accumulate(total, weights, rights[0]))
                sums = tuple(new_sums)
            plgpu.barrier_arrive(empty.at[slot])
            return count + 1, sums

        def multiply_tile(i, scalars, steps, count):
            zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
            count, sums = lax.fori_loop(0, steps, multiply_step, (count, (zeros,) * config.pieces))
            if config.parts == 1:
                finish(sums, scalars)
                return count
            sum_smem, added, taken = smem["sum_smem"], smem["added"], smem["taken"]

            @pl.when(k_part > 0)
            def _():
                pl.when(i > 0)(lambda: plgpu.barrier_wait(taken.at[mine]))
                for p, total in enumerate(sums):
                    sum_smem.at[k_part - 1, p * config.blocks + mine][...] = total
                plgpu.barrier_arrive(added.at[mine])

            @pl.when(k_part == 0)
            def _():
                plgpu.barrier_wait(added.at[mine])
                whole = []
                for p, total in enumerate(sums):
                    for part in range(config.parts - 1):
                        ref = sum_smem.at[part, p * config.blocks + mine]
                        total = total + plgpu.load(ref, layout=plgpu.Layout.WGMMA)
                    whole.append(total)
                plgpu.barrier_arrive(taken.at[mine])
                finish(whole, scalars)

            return count

        def finish(sums, scalars):
            group, first, rows, row = scalars
            inside = lax.min(group, groups - 1)

            def scaled(p):
                """The p-th sum with its scales and bias."""
                total, operand = sums[p], p if operands == 2 else 0
                if fp4:
                    scales = load_columns(gmem["x_scale"].at[pl.ds(first, config.columns)])
                    scales = scales * (gmem[f"global{operand}"][inside] * 2.0**-FP4_EXPONENT)
                    total = total * lax.broadcast_in_dim(scales, shape, [1])
                if f"bias{operand}" in gmem:
                    # A row block past the last is computed, but TMA does not store it.
                    bias, block = gmem[f"bias{operand}"], row + mine
                    if activation is None:
                        block += p * config.blocks
                    bias = bias.at[inside, lax.min(block, bias.shape[1] - 1)]
                    if pairs:
                        bias = bias.at[:, p]
                    layout = plgpu.Layout.WGMMA.reduce(1)
                    bias = plgpu.load(bias, layout=layout, optimized=False)
                    total = total + lax.broadcast_in_dim(bias.astype(jnp.float32), shape, [0])
                # Rows past the groups stay zeros.
                return jnp.where(lax.broadcast(group, shape) >= groups, 0.0, total)

            def store(value, block):
                value = plgpu.layout_cast(
                    value.astype(out_gmem.dtype), plgpu.Layout.WGMMA_TRANSPOSED
                )
                buffer = smem["out_smem"].at[mine]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                buffer.T[...] = value
                plgpu.commit_smem()
                store_rows(buffer, out_gmem, first, (row + block + mine) * BLOCK, rows)

            if activation is not None:
                store(_activate(scaled(0), scaled(1), activation), 0)
            else:
                for p in range(config.pieces):
                    store(scaled(p), p * config.blocks)

        each_tile(multiply_tile, 0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if config.parts > 1:

            @pl.when((k_part > 0) & (my_units > 0))
            def _():
                plgpu.barrier_wait(smem["taken"].at[mine])


def _activate(gate: Array, up: Array, activation: GatedActivation) -> Array:
    if activation.limit is not None:
        gate = jnp.minimum(gate, activation.limit)
        up = jnp.maximum(jnp.minimum(up, activation.limit), -activation.limit)
    gate = gate / (1.0 + jnp.exp(gate * -activation.alpha))
    return gate * (up + activation.offset) if activation.offset else gate * up
