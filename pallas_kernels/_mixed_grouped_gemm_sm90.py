"""The persistent, warp-specialized grouped product of 4-bit weights: launch and kernel body.

`mixed_grouped_gemm_sm90` draws it.
"""

import dataclasses
import functools
import itertools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.pallas_kernels._fp8_terms_sm90 import transposed_terms
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
    fp8_register_products,
    load_columns,
    mixed_accumulate,
)
from qjax.wgmma_layout import BLOCK, WORDS

MAX_SMEM = 227 * 1024
MAX_COLUMNS = 256
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

    @property
    def bound(self) -> float:
        """The largest magnitude of a result; infinite without a limit."""
        if self.limit is None:
            return math.inf
        # x * sigmoid(alpha * x) is least where alpha * x = -1.2785.
        return max(self.limit, 0.2785 / self.alpha) * (self.limit + abs(self.offset))


@dataclasses.dataclass(frozen=True)
class MixedTileConfig:
    """How the product is cut.

    Attributes:
        columns: Tokens of a tile, a multiple of 8 up to `MAX_COLUMNS`.
        blocks: Warpgroups side by side along the weight's rows, 1 to 4.
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
    def widths(self) -> tuple[int, ...]:
        """Tokens that are multiplied in tiles of few rows, of more, and of all: a group's last tile is a short one."""
        columns = self.columns
        if self.parts > 1 or columns < 64:
            return (columns,)
        return (_eights(columns / 4), _eights(columns / 2), columns)

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


def _eights(columns: float) -> int:
    return 8 * math.ceil(columns / 8)


def launch(
    x: tuple[Array, ...],
    x_scale: Array | float | None,
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
    out_scale: float | None = None,
) -> Array | tuple[Array, Array]:
    """The product [T, n] of arguments that the callers checked; their docstrings tell the rest.

    Args:
        x: Arrays [T, K] whose sum meets the weights: one of 16 bits for INT4, one or two of FP8 for FP4.
        x_scale: Multipliers of FP8 rows, float32 [T + `MAX_COLUMNS`], or of all of them.
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
        out_scale: If given, the output is two FP8 terms of the product divided by it.
    """
    width, gated = min(group_size, 128), activation is not None
    rows = config.blocks if gated else config.row_blocks  # of an output tile, in blocks
    tiles_n = pl.cdiv(n // BLOCK, rows)
    table = tile_table(group_sizes, x[0].shape[:1], config.columns)
    workers = min(num_sms, table.shape[0] * tiles_n)
    operands = {"table": table, **{f"x{i}": term for i, term in enumerate(x)}}
    if isinstance(x_scale, Array):
        operands["x_scale"], x_scale = x_scale, None
    if element == "float4_e2m1fn":
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
        full=plgpu.Barrier(num_arrivals=chunks * len(x) + 2 * len(weights), num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    )
    shape = (config.blocks, config.columns, BLOCK)
    if out_scale is None:
        outputs = [jax.ShapeDtypeStruct((x[0].shape[0], n), out_dtype)]
        scratch["out0_smem"] = plgpu.SMEM(shape, out_dtype, transforms=swizzled)
    else:  # pairs of FP8
        outputs = [jax.ShapeDtypeStruct((x[0].shape[0], n // 2), jnp.int16)] * 2
        for i in range(2):
            scratch[f"out{i}_smem"] = plgpu.SMEM((*shape[:2], BLOCK // 2), jnp.int16)
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
        x_scale=x_scale,
        out_scale=out_scale,
    )

    def kernel(*refs, **scratch):
        inputs, out = refs[: len(operands)], refs[len(operands) :]
        body(dict(zip(operands, inputs, strict=True)), out, scratch)

    out = plgpu.kernel(
        kernel,
        out_type=outputs,
        grid=(workers,),
        grid_names=("worker",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        kernel_name="mixed_gated_grouped_gemm" if gated else "mixed_grouped_gemm",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*operands.values())
    if out_scale is None:
        return out[0]
    kinds = (jnp.float8_e4m3fn, jnp.float8_e5m2)
    first, rest = (
        lax.bitcast_convert_type(a, kind).reshape(a.shape[0], n)
        for a, kind in zip(out, kinds, strict=True)
    )
    return first, rest


def _kernel(
    gmem,
    out,
    smem,
    *,
    terms: int,
    config: MixedTileConfig,
    width: int,
    activation: GatedActivation | None,
    tiles_n: int,
    workers: int,
    x_scale: float | None,
    out_scale: float | None,
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
    def multiply():
        plgpu.set_max_registers(_REGISTERS[warpgroups], action="increase")
        mine, k_part = lax.div(wg, config.parts), lax.rem(wg, config.parts)

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

        def multiply_step(columns, step, carry):
            del step
            count, sums = carry
            # Sums, as many products, operands, and what else takes registers.
            needed = config.pieces * (columns + 16) + 24
            together = needed <= _REGISTERS[warpgroups]
            slot = lax.rem(count, config.stages)
            plgpu.barrier_wait(full.at[slot])
            product = None
            for i in range(config.depth // chunk):
                c, new_sums = k_part * (config.depth // chunk) + i, []
                rights = [ref.at[slot, c, pl.ds(0, columns)] for ref in x_smem]

                def weights(p, slot=slot, c=c):
                    return load_weights(slot, slot_block(p, mine), c)

                # FP8 products are summed in fewer bits than float32 has: promote them.
                if fp4 and together:
                    lefts = tuple(weights(p) for p in range(len(sums)))
                    products = fp8_register_products(lefts, rights)
                    for total, product in zip(sums, products, strict=True):
                        new_sums.append(lax.optimization_barrier(total + product))
                    sums = tuple(new_sums)
                    continue
                for p, total in enumerate(sums):
                    if fp4:
                        recycle = product if k_steps > 1 else None
                        product = fp8_register_product(weights(p), rights, recycle=recycle)
                        new_sums.append(lax.optimization_barrier(total + product))
                    else:
                        new_sums.append(mixed_accumulate(total, weights(p), rights[0]))
                sums = tuple(new_sums)
            plgpu.barrier_arrive(empty.at[slot])
            return count + 1, sums

        def multiply_tile(i, scalars, steps, count):
            rows, widths = scalars[2], (-1, *config.widths)
            for fewer, columns in itertools.pairwise(widths):
                tile = functools.partial(multiply_columns, columns, i, scalars, steps, count)
                if len(config.widths) == 1:
                    tile()
                else:
                    pl.when((rows > fewer) & (rows <= columns))(tile)
            return count + steps

        def multiply_columns(columns, i, scalars, steps, count):
            """A tile of which the first so many columns have tokens."""
            zeros = jnp.zeros((BLOCK, columns), jnp.float32)
            zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
            step = functools.partial(multiply_step, columns)
            _, sums = lax.fori_loop(0, steps, step, (count, (zeros,) * config.pieces))
            if config.parts == 1:
                finish(sums, scalars)
                return
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

        def finish(sums, scalars):
            group, first, rows, row = scalars
            shape = sums[0].shape
            inside = lax.min(group, groups - 1)

            def scaled(p):
                """The p-th sum with its scales and bias."""
                total, operand = sums[p], p if operands == 2 else 0
                if fp4:
                    factor = gmem[f"global{operand}"][inside] * 2.0**-FP4_EXPONENT
                    if x_scale is None:
                        scales = load_columns(gmem["x_scale"].at[pl.ds(first, shape[1])]) * factor
                        total = total * lax.broadcast_in_dim(scales, shape, [1])
                    else:
                        total = total * (factor * x_scale)
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
                if out_scale is None:
                    value = value.astype(out[0].dtype)
                    values = [plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)]
                else:
                    values = transposed_terms(value * (1 / out_scale))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                buffers = []
                for i, value in enumerate(values):
                    buffers.append(smem[f"out{i}_smem"].at[mine, pl.ds(0, shape[1])])
                    buffers[i].T[...] = value
                plgpu.commit_smem()
                for buffer, gmem_out in zip(buffers, out, strict=True):
                    column = (row + block + mine) * buffer.shape[1]
                    # Copies of one row are not cut at the row's end, as those of several are.
                    mine_rows = jnp.where(column < gmem_out.shape[1], rows, 0)
                    store_rows(buffer, gmem_out, first, column, mine_rows)

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
