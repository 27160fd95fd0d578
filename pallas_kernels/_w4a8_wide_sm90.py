"""The kernel of `w4a8_gemm_sm90` for many tokens: 128 weight rows by up to 256 tokens a CTA, one CTA an SM.

Two warpgroups have 64 rows each. They decode a group of weights once, multiply it by 128 tokens and then by the rest,
and take turns at the tensor cores (`_w4a8_product_sm90`): while one multiplies, the other adds up and decodes::

    producer warpgroup                          math warpgroups (64 rows)
    ------------------                          -------------------------
    for each tile:                              for each tile:
      wait scales_empty; TMA x_scale -> scales_full
      for each 128 of K:                          for each 128 of K:
        wait  empty[slot]        <--------------+   wait  full[slot]
        TMA x     -> x_smem[slot]               |   for each group:
        TMA codes -> codes_smem[slot]           |     sums += scale * (weights @ x)
        TMA scale -> scale_smem[slot]           +-  arrive empty[slot], on both CTAs of a cluster
        (each arrives on full[slot]) -------->    wait scales_full
                                                  sums * x_scale -> out_smem (transposed) -> TMA store

The CTAs of a cluster have adjacent rows and share x by multicast.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qjax.pallas_kernels._mixed_gemm_registers_sm90 import words_layout
from qjax.pallas_kernels._mixed_gemm_tiles_sm90 import MAX_SMEM
from qjax.pallas_kernels._w4a8_product_sm90 import add_product, close_turns, open_turns
from qjax.pallas_kernels._w4a8_registers_sm90 import eight_bit_factor
from qjax.pallas_kernels._wgmma_sm90 import load_columns
from qjax.wgmma_layout import BLOCK

STEP = 128
_WARPGROUPS = 2
_PIECE, _BUFFERS = 64, 3  # tokens that are stored at once, and buffers of a warpgroup for them


@dataclasses.dataclass(frozen=True)
class WideTileConfig:
    """How the product of many tokens is cut.

    Attributes:
        columns: Tokens of a CTA's tile, a multiple of 8 up to 256.
        stages: Pipeline stages of 128 columns of K.
        cluster: CTAs (1 or 2) side by side along the weight rows.
    """

    columns: int
    stages: int
    cluster: int = 1

    @property
    def rows(self) -> int:
        """Weight rows of a CTA's tile."""
        return BLOCK * _WARPGROUPS

    def tiles(self, m: int, n: int) -> tuple[int, int]:
        """Tiles of all CTAs of a cluster along the rows and along the tokens."""
        return pl.cdiv(n, self.rows * self.cluster), pl.cdiv(m, self.columns)

    def smem_bytes(self, scale_bytes: float) -> float:
        """Shared memory, with so many bytes of scales and zero points for each weight."""
        stage = STEP * (self.rows * (0.5 + scale_bytes) + self.columns)
        piece = math.gcd(_PIECE, self.columns)
        epilogue = _WARPGROUPS * _BUFFERS * piece * BLOCK * 2 + 8 * self.columns
        return self.stages * stage + epilogue + 4 * 1024

    def deepest(self, scale_bytes: float) -> "WideTileConfig":
        """The same with as many stages as fit, 6 at most."""
        fitting = (dataclasses.replace(self, stages=s) for s in range(6, 1, -1))
        return next(c for c in fitting if c.smem_bytes(scale_bytes) <= MAX_SMEM)


def launch_wide(
    operands,
    sizes,
    group_size: int,
    config: WideTileConfig,
    num_sms: int,
    *,
    out_dtype: DTypeLike,
    kernel_name: str,
):
    """The product [M, N]; arguments as `_mixed_gemm_sm90.launch` takes them."""
    m, n, k = sizes
    tiles = config.tiles(m, n)
    workers = max(min(num_sms // config.cluster, tiles[0] * tiles[1]), 1)
    if operands["x_scale"].shape[0] == 1:
        operands = operands | {"x_scale": jnp.broadcast_to(operands["x_scale"], (m,))}
    streams = ["x", "codes"]
    if group_size != k:
        streams += [name for name in ("scale", "zero_point") if name in operands]
    body = functools.partial(
        _kernel,
        streams=tuple(streams),
        config=config,
        group_size=group_size,
        counts=(*tiles, pl.cdiv(k, STEP), workers),
    )

    def kernel(*refs, **scratch):
        body(dict(zip(operands, refs, strict=False)), refs[len(operands)], scratch)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n), jnp.dtype(out_dtype)),
        grid=(workers,),
        grid_names=("worker",),
        cluster=(config.cluster,),
        cluster_names=("cta",),
        num_threads=_WARPGROUPS + 1,
        thread_name="wg",
        kernel_name=kernel_name,
        scratch_types=_scratch(operands, streams, group_size, config, out_dtype),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*operands.values())


def _scratch(operands, streams, group_size, config: WideTileConfig, out_dtype) -> dict:
    swizzled = (plgpu.SwizzleTransform(128),)
    stages, tokens = config.stages, config.columns
    piece = math.gcd(_PIECE, tokens)
    words = operands["codes"].shape[2:]
    scratch = dict(
        x_smem=plgpu.SMEM((stages, tokens, STEP), operands["x"].dtype, transforms=swizzled),
        codes_smem=plgpu.SMEM((stages, _WARPGROUPS, STEP // BLOCK, *words), jnp.int32),
        out_smem=plgpu.SMEM(
            (_WARPGROUPS, _BUFFERS, piece, BLOCK), jnp.dtype(out_dtype), transforms=swizzled
        ),
        x_scale_smem=plgpu.SMEM((2, tokens), jnp.float32),
        full=plgpu.Barrier(num_arrivals=len(streams), num_barriers=stages),
        scales_full=plgpu.Barrier(num_barriers=2),
        scales_empty=plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=2),
    )
    for name in streams[2:]:
        shape = (stages, _WARPGROUPS, STEP // group_size, BLOCK)
        scratch[name + "_smem"] = plgpu.SMEM(shape, operands[name].dtype)
    arrivals = dict(num_arrivals=_WARPGROUPS, num_barriers=stages)
    if config.cluster > 1:
        scratch["empty"] = plgpu.ClusterBarrier(collective_axes=("cta",), **arrivals)
    else:
        scratch["empty"] = plgpu.Barrier(**arrivals)
    return scratch


def _kernel(gmem, out_gmem, smem, *, streams, config: WideTileConfig, group_size, counts):
    row_tiles, column_tiles, steps, workers = counts
    full, empty, tokens = smem["full"], smem["empty"], config.columns
    wg, worker, cta = (lax.axis_index(name) for name in ("wg", "worker", "cta"))
    my_tiles = lax.div(row_tiles * column_tiles - worker + workers - 1, workers)

    def tile(i):
        """First block of rows and first token of this CTA's i-th tile."""
        # Tiles that run together share rows and tokens, which the L2 cache then serves.
        row, column = plgpu.planar_snake(worker + i * workers, (row_tiles, column_tiles), 0, 8)
        return (row * config.cluster + cta) * _WARPGROUPS, column * tokens

    @pl.when(wg == _WARPGROUPS)
    def producer():
        plgpu.set_max_registers(40, action="decrease")

        def load_tile(i, count):
            row, column = tile(i)
            turn = lax.rem(i, 2)

            @pl.when(i >= 2)
            def _():
                plgpu.barrier_wait(smem["scales_empty"].at[turn])
                plgpu.commit_smem()  # orders the math warpgroups' reads before the next TMA writes

            plgpu.copy_gmem_to_smem(
                gmem["x_scale"].at[pl.ds(column, tokens)],
                smem["x_scale_smem"].at[turn],
                smem["scales_full"].at[turn],
            )

            def load_step(step, count):
                slot = lax.rem(count, config.stages)

                @pl.when(count >= config.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])
                    plgpu.commit_smem()

                plgpu.copy_gmem_to_smem(
                    gmem["x"].at[pl.ds(column, tokens), pl.ds(step * STEP, STEP)],
                    smem["x_smem"].at[slot],
                    full.at[slot],
                    **(dict(collective_axes="cta") if config.cluster > 1 else {}),
                )
                for name in streams[1:]:
                    columns = STEP // (BLOCK if name == "codes" else group_size)
                    plgpu.copy_gmem_to_smem(
                        gmem[name].at[pl.ds(row, _WARPGROUPS), pl.ds(step * columns, columns)],
                        smem[name + "_smem"].at[slot],
                        full.at[slot],
                    )
                return count + 1

            return lax.fori_loop(0, steps, load_step, count)

        count = lax.fori_loop(0, my_tiles, load_tile, 0)

        # No CTA may leave while the other still arrives on its barriers.
        @pl.loop(lax.max(count - config.stages, 0), count)
        def _(i):
            plgpu.barrier_wait(empty.at[lax.rem(i, config.stages)])

        @pl.loop(lax.max(my_tiles - 2, 0), my_tiles)
        def _(i):
            plgpu.barrier_wait(smem["scales_empty"].at[lax.rem(i, 2)])

    @pl.when(wg < _WARPGROUPS)
    def math_warpgroups():
        plgpu.set_max_registers(232, action="increase")
        open_turns()
        grouped = "scale" in streams
        width = min(group_size, STEP)
        # Integers of rows with one scale stay integers until K is through.
        whole = smem["x_smem"].dtype == jnp.int8 and not grouped

        def row_values(ref):
            layout = plgpu.Layout.WGMMA.reduce(1)
            return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

        def multiply_tile(i, count):
            row, column = tile(i)
            # A warpgroup past the last row computes rows that TMA does not store.
            block = lax.min(row + wg, gmem["codes"].shape[0] - 1)
            row_zero = None
            if "zero_point" in gmem and not grouped:
                row_zero = row_values(gmem["zero_point"].at[block, 0])

            def multiply_step(step, carry):
                count, total = carry
                slot = lax.rem(count, config.stages)
                plgpu.barrier_wait(full.at[slot])
                for first in range(0, STEP, width):
                    zero_point, scale = row_zero, None
                    if grouped:
                        scale = row_values(smem["scale_smem"].at[slot, wg, first // width])
                    if "zero_point" in streams:
                        zero_point = smem["zero_point_smem"].at[slot, wg, first // width]
                        zero_point = row_values(zero_point)
                    low, high = first // BLOCK, pl.cdiv(first + width, BLOCK)
                    codes = smem["codes_smem"].at[slot, wg, pl.ds(low, high - low)]
                    total = add_product(
                        total,
                        plgpu.load(codes, layout=words_layout(codes.shape)),
                        smem["x_smem"].at[slot],
                        zero_point,
                        scale,
                        first=first % BLOCK,
                        width=width,
                        x_first=first,
                        turns=True,
                    )
                plgpu.barrier_arrive(empty.at[slot])
                return count + 1, total

            zeros = jnp.zeros((BLOCK, tokens), jnp.int32 if whole else jnp.float32)
            zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
            count, total = lax.fori_loop(0, steps, multiply_step, (count, zeros))

            row_factors = {}
            if not grouped:
                row_factors["scale"] = row_values(gmem["scale"].at[block, 0])
            if "bias" in gmem:
                row_factors["bias"] = row_values(gmem["bias"].at[block])
            turn, rows = lax.rem(i, 2), pl.ds((row + wg) * BLOCK, BLOCK)
            plgpu.barrier_wait(smem["scales_full"].at[turn])
            factor = eight_bit_factor(smem["x_smem"].dtype, zeros="zero_point" in gmem)
            piece = smem["out_smem"].shape[2]
            for j in range(tokens // piece):
                values = total[:, j * piece : (j + 1) * piece].astype(jnp.float32)
                spread = functools.partial(lax.broadcast_in_dim, shape=values.shape)
                scales = load_columns(smem["x_scale_smem"].at[turn, pl.ds(j * piece, piece)])
                if j == tokens // piece - 1:
                    plgpu.barrier_arrive(smem["scales_empty"].at[turn])
                if "scale" in row_factors:
                    values = values * spread(row_factors["scale"], broadcast_dimensions=[0])
                values = values * spread(scales * factor, broadcast_dimensions=[1])
                if "bias" in row_factors:
                    values = values + spread(row_factors["bias"], broadcast_dimensions=[0])
                buffer = lax.rem(i * (tokens // piece) + j, _BUFFERS)
                target = out_gmem.at[pl.ds(column + j * piece, piece), rows]
                _store(values, smem["out_smem"].at[wg, buffer], target)
            return count

        lax.fori_loop(0, my_tiles, multiply_tile, 0)
        close_turns()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store(values, out_smem, target) -> None:
    values = plgpu.layout_cast(values.astype(out_smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.wait_smem_to_gmem(_BUFFERS - 1, wait_read_only=True)
    out_smem.T[...] = values
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, target)
