"""The persistent, warp-specialized FP8 matrix product that the block-scaled and the rowwise GEMM share.

Both operands lie with K contiguous. `left` gives the rows of the CTA's tile and `right` its columns; with
``config.swap`` left is the weight and the tile is the transpose of the output's, so that a few tokens fill
the narrow side of wgmma (its N can be 8) and not the wide one (its M is always 64).

One CTA an SM (or a cluster of two), 1 + `warpgroups` warpgroups::

    producer warpgroup                            math warpgroups (each `sub` x 64 rows)
    ------------------                            --------------------------------------
    for each unit (tile, part of K):              for each unit:
      for each 128 of K:                            for each 128 of K:
        wait   empty[slot]        <---------------+   wait   full[slot]
        TMA left  tile -> left_smem[slot]         |   for each 64 rows:
        TMA right tile -> right_smem[slot]        |     part = wgmma(left_smem, right_smem)   tensor cores
        TMA x scales   -> scale_smem[slot]        |     sum += part * scales                  float32 FMA
        (each arrives on full[slot]) -----------> +-- arrive empty[slot], on both CTAs of a cluster
                                                    sum -> out_smem -> TMA store, while the producer
                                                    already loads the next unit

Promotion: Hopper's FP8 wgmma keeps about 14 bits of its running sum, so every 128 of K go to float32
registers (DeepSeek-V3 report, section 3.3.2), where the scales of that block apply at no further cost.
Split-K writes float32 partial sums that XLA adds up.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qjax.pallas_kernels._wgmma_sm90 import fp8_product

BLOCK_K = 128
MAX_SMEM = 227 * 1024
SWAPPED_COLUMNS = (8, 16, 32, 64, 128)

FP8_DTYPES = ("float8_e4m3fn", "float8_e5m2")
OUT_DTYPES = ("bfloat16", "float16")

Scaling = Literal["block", "row"]


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How the product is cut.

    Attributes:
        swap: Whether the weight is the left operand (few tokens).
        columns: Columns of a CTA's tile: 64 or 128, with `swap` one of `SWAPPED_COLUMNS`.
        sub: 64-row pieces of each math warpgroup, promoted one after the other.
        warpgroups: Math warpgroups: 1 to 3, with one piece each if they are 3.
        stages: 128-wide slices of K in flight.
        splits: Parts of K that are summed by XLA.
        cluster: CTAs (1 or 2) side by side along the columns that share each left tile by multicast.
    """

    swap: bool
    columns: int
    sub: int
    warpgroups: int
    stages: int
    splits: int = 1
    cluster: int = 1

    @property
    def rows(self) -> int:
        """Rows of a CTA's tile."""
        return 64 * self.sub * self.warpgroups

    def smem_bytes(self) -> int:
        """Shared memory for the operand stages and the epilogue."""
        stage = (self.rows + self.columns) * BLOCK_K + 4 * _scale_slots(self)
        if self.splits > 1:
            epilogue = 64 * self.columns * 4
        else:
            epilogue = 64 * (self.columns if self.swap else 128) * 2
        alignment = 6 * 1024  # each buffer starts at a multiple of 1 KiB; the barriers are one
        return self.stages * stage + self.warpgroups * epilogue + alignment


def _scale_slots(config: TileConfig) -> int:
    # A TMA destination must be 128-byte aligned in every stage.
    return pl.cdiv(config.columns if config.swap else config.rows, 32) * 32


def unsupported_reason(
    m: int,
    n: int,
    k: int,
    *,
    x_dtype: DTypeLike = "float8_e4m3fn",
    w_dtype: DTypeLike = "float8_e4m3fn",
    out_dtype: DTypeLike = "bfloat16",
) -> str | None:
    """Why the kernel can't take x [m, k] and w [n, k], None if it can."""
    x_dtype, w_dtype, out_dtype = (jnp.dtype(d).name for d in (x_dtype, w_dtype, out_dtype))
    if x_dtype not in FP8_DTYPES or w_dtype not in FP8_DTYPES:
        return f"x and w must be one of {FP8_DTYPES}; found {x_dtype} and {w_dtype}"
    if out_dtype not in OUT_DTYPES:
        return f"the output must be one of {OUT_DTYPES}; found {out_dtype}"
    if min(m, n, k) < 1:
        return f"M, N and K must be positive; found {m}, {n}, {k}"
    if n % 8 or k % 16 or (k > BLOCK_K and k % 32):
        return (
            f"N must be a multiple of 8 and K of 32 (of 16 up to {BLOCK_K}), the tiles that TMA moves; "
            f"found N={n}, K={k}"
        )
    return None


def choose_tiles(m: int, n: int, k: int, *, num_sms: int) -> TileConfig:
    """The tiling with the least modelled time; see `modelled_us`."""
    return min(candidate_tiles(m, k), key=lambda c: modelled_us(c, m, n, k, num_sms=num_sms))


def candidate_tiles(m: int, k: int) -> list[TileConfig]:
    """The tilings worth considering, each with as many stages as fit, 8 at most."""
    parts = []
    if m <= SWAPPED_COLUMNS[-1]:
        columns = next(c for c in SWAPPED_COLUMNS if c >= m)
        # Three warpgroups: wider sums do not fit their registers, and narrower ones need no more warpgroups.
        many = (1, 2, 3) if columns == 64 else (1, 2)
        parts += [(True, columns, 1, warpgroups, 1) for warpgroups in many]
    if m > 64:
        parts += [(False, columns, sub, 2, 1) for columns in (64, 128) for sub in (1, 2)]
        parts += [(False, 128, 1, 3, 1), (False, 128, 1, 2, 2), (False, 128, 2, 2, 2)]
    # Each part of K should keep the pipeline busy for a while; partial sums of many tokens cost too much.
    most = min(8, pl.cdiv(k, BLOCK_K) // 4) if m <= 512 else 1
    candidates = []
    for swap, columns, sub, warpgroups, cluster in parts:
        # Partial sums of three warpgroups were slower than those of one or two.
        for splits in range(1, max(most, 1) + 1 if warpgroups < 3 else 2):
            config = TileConfig(swap, columns, sub, warpgroups, 2, splits, cluster)
            while config.stages < 8:
                deeper = dataclasses.replace(config, stages=config.stages + 1)
                if deeper.smem_bytes() > MAX_SMEM:
                    break
                config = deeper
            candidates.append(config)
    return candidates


def modelled_us(config: TileConfig, m: int, n: int, k: int, *, num_sms: int) -> float:
    """Microseconds by counting waves: each step costs its bytes or its arithmetic, each unit an epilogue.

    Rates fit an H200's times of 27 sizes, the choices being at most 8% from the best: 4.3 TB/s of memory, 7 TB/s
    (swapped) or 10 TB/s of L2 reads, shared by the SMs that are busy (a cluster's multicast changed nothing
    measurable), and 1500 or 1400 TFLOP/s where a warpgroup's promotion hides behind the other's wgmma.
    """
    rows, columns = (n, m) if config.swap else (m, n)
    tiles = pl.cdiv(rows, config.rows) * pl.cdiv(columns, config.columns * config.cluster)
    units, workers = tiles * config.splits, num_sms // config.cluster
    waves = pl.cdiv(units, workers)
    busy = min(units, workers) * config.cluster
    steps = pl.cdiv(pl.cdiv(k, BLOCK_K), config.splits)
    l2_rate, math_rate = (7e6, 1.5e9) if config.swap else (10e6, 1.4e9)
    l2_us = (config.rows + config.columns) * BLOCK_K / (l2_rate / num_sms)
    area = config.rows * config.columns if config.warpgroups > 1 else 0
    if config.swap:
        overlap = 1.0 if area >= 128 * 128 else 0.7
    else:
        overlap = 1.0 if area >= 256 * 128 else 0.95 if area >= 128 * 128 else 0.6
    math_us = 2 * config.rows * config.columns * BLOCK_K / (math_rate / num_sms * overlap)
    traffic = (n + m) * k + 2 * m * n + (8 * config.splits * m * n if config.splits > 1 else 0)
    # One SM alone draws at most about twice its share of the memory's bandwidth.
    memory_us = traffic / (4.3e6 * min(1.0, 2 * busy / num_sms))
    epilogue_us = 0.5 + config.rows * config.columns / 40e3
    total = max(waves * steps * max(l2_us, math_us), memory_us) + waves * epilogue_us
    return total + (2.5 if config.splits > 1 else 0.0)


def fp8_gemm(
    op: str,
    x: Array,
    w: Array,
    x_scale: Array,
    w_scale: Array,
    *,
    scaling: Scaling,
    m: int | None,
    bias: Array | None,
    out_dtype: DTypeLike,
    config: TileConfig | None,
    num_sms: int | None,
) -> Array:
    """The product [m, N] of x [M', K] and w [N, K], scales checked by the callers, whose docstrings tell the rest."""
    n, k = w.shape
    m = x.shape[0] if m is None else m
    if x.ndim != 2 or x.shape[1] != k or not 0 < m <= x.shape[0]:
        raise ValueError(
            f"{op}: x must be [M', {k}] as w is {list(w.shape)}, and m in 1..M'; "
            f"found x {list(x.shape)}, m={m}"
        )
    reason = unsupported_reason(m, n, k, x_dtype=x.dtype, w_dtype=w.dtype, out_dtype=out_dtype)
    if reason:
        raise ValueError(f"{op}: {reason}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(
            f"{op}: bias must be [{n}] as w is {list(w.shape)}; found {list(bias.shape)}"
        )
    if x_scale.dtype != jnp.float32 or w_scale.dtype != jnp.float32:
        raise ValueError(f"{op}: scales must be float32; found {x_scale.dtype} and {w_scale.dtype}")
    out_dtype = jnp.dtype(out_dtype)
    num_sms = jax.devices()[0].core_count if num_sms is None else num_sms
    config = choose_tiles(m, n, k, num_sms=num_sms) if config is None else config
    if x.shape[0] > 8 and x.shape[0] % 8:
        x = jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))
    left, right = (w, x) if config.swap else (x, w)
    tiles = Tiles(
        rows=pl.cdiv(left.shape[0], config.rows),
        columns=pl.cdiv(right.shape[0], config.columns * config.cluster),
        steps=pl.cdiv(k, BLOCK_K),
    )
    workers = min(num_sms // config.cluster, tiles.rows * tiles.columns * config.splits)
    partial = config.splits > 1
    if partial:
        # Whole tiles of float32, which TMA can cut into 8 x 32.
        extents = (tiles.rows * config.rows, tiles.columns * config.columns * config.cluster)
        out_type = jax.ShapeDtypeStruct((config.splits, *extents), jnp.float32)
    else:
        out_type = jax.ShapeDtypeStruct((m, n), out_dtype)
    operands = {"left": left, "right": right}
    if scaling == "block":
        operands |= {"x_scale": x_scale, "w_scale": w_scale}
    if not partial:
        # Plain loads know no bounds: these vectors cover whole tiles.
        cover_left = tiles.rows * config.rows
        cover_right = tiles.columns * config.columns * config.cluster
        cover_m, cover_n = (cover_right, cover_left) if config.swap else (cover_left, cover_right)
        if scaling == "row":
            operands |= {"x_scale": _cover(x_scale, cover_m), "w_scale": _cover(w_scale, cover_n)}
        if bias is not None:
            operands["bias"] = _cover(bias.astype(jnp.float32), cover_n)
    body = functools.partial(
        _kernel,
        names=tuple(operands),
        config=config,
        scaling=scaling,
        tiles=tiles,
        workers=workers,
        swizzle=_swizzle(k),
    )
    out = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(workers,),
        grid_names=("worker",),
        cluster=(config.cluster,),
        cluster_names=("cluster",),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        kernel_name=f"fp8_{scaling}_gemm",
        scratch_types=_scratch(config, k, left.dtype, right.dtype, out_type.dtype, scaling),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*operands.values())
    if not partial:
        return out
    out = jnp.sum(out, axis=0)
    out = out[:n, :m].T if config.swap else out[:m, :n]
    if scaling == "row":
        out = out * x_scale[:m, None] * w_scale[None, :]
    if bias is not None:
        out = out + bias.astype(jnp.float32)[None, :]
    return out.astype(out_dtype)


def _cover(vector: Array, size: int) -> Array:
    return jnp.pad(vector, (0, size - vector.shape[0])) if size > vector.shape[0] else vector


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Numbers of row tiles, of column tiles (of all CTAs of a cluster) and of 128-wide steps of K."""

    rows: int
    columns: int
    steps: int


def _swizzle(k: int) -> int:
    # A tiled TMA copy wants the array's columns in whole tiles (or fewer than one).
    return 128 if k <= 128 else math.gcd(k, 128)


def _scratch(config: TileConfig, k: int, left_dtype, right_dtype, out_dtype, scaling) -> dict:
    swizzle = _swizzle(k)
    operand = (plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle))
    left_shape = (config.stages, config.rows, BLOCK_K)
    right_shape = (config.stages, config.columns, BLOCK_K)
    if config.splits > 1:
        out_swizzle = plgpu.find_swizzle(min(config.columns, 32) * 32)
        out_shape = (config.warpgroups, 1, 64, config.columns)
        out_transforms = (
            plgpu.TilingTransform((8, out_swizzle // 4)),
            plgpu.SwizzleTransform(out_swizzle),
        )
    elif config.swap:
        out_shape = (config.warpgroups, 1, config.columns, 64)
        out_transforms = (plgpu.SwizzleTransform(128),)
    else:
        out_shape = (config.warpgroups, 2, 64, 64)
        out_transforms = (plgpu.SwizzleTransform(128),)  # no tiling: M may be any number
    arrivals = dict(num_arrivals=config.warpgroups, num_barriers=config.stages)
    if config.cluster > 1:
        empty = plgpu.ClusterBarrier(collective_axes=("cluster",), **arrivals)
    else:
        empty = plgpu.Barrier(**arrivals)
    scratch = dict(
        left_smem=plgpu.SMEM(left_shape, left_dtype, transforms=operand),
        right_smem=plgpu.SMEM(right_shape, right_dtype, transforms=operand),
        out_smem=plgpu.SMEM(out_shape, out_dtype, transforms=out_transforms),
        full=plgpu.Barrier(num_arrivals=3 if scaling == "block" else 2, num_barriers=config.stages),
        empty=empty,
    )
    if scaling == "block":
        scratch["scale_smem"] = plgpu.SMEM((config.stages, _scale_slots(config)), jnp.float32)
    return scratch


def _kernel(
    *refs,
    names: tuple[str, ...],
    config: TileConfig,
    scaling: Scaling,
    tiles: Tiles,
    workers: int,
    swizzle: int,
    left_smem,
    right_smem,
    out_smem,
    full,
    empty,
    scale_smem=None,
):
    gmem = dict(zip(names, refs[:-1], strict=True))
    out_gmem = refs[-1]
    wg = lax.axis_index("wg")
    cta = lax.axis_index("cluster")
    worker = lax.axis_index("worker")
    units = tiles.rows * tiles.columns * config.splits
    my_units = (units - worker + workers - 1) // workers

    def unit(i):
        """First row, first column, split and range of steps of this worker's i-th unit."""
        tile, split = lax.div(worker + i * workers, config.splits), 0
        if config.splits > 1:
            split = lax.rem(worker + i * workers, config.splits)
        # Tiles that run together share rows and columns, which the L2 cache then serves.
        row, column = plgpu.planar_snake(tile, (tiles.rows, tiles.columns), 0, 8)
        begin = split * tiles.steps // config.splits
        end = (split + 1) * tiles.steps // config.splits
        column = column * config.cluster + cta
        return row * config.rows, column * config.columns, split, begin, end

    @pl.when(wg == config.warpgroups)
    def producer():
        plgpu.set_max_registers(40, action="decrease")

        def load_unit(i, count):
            row, column, _, begin, end = unit(i)

            def load_step(step, count):
                slot = lax.rem(count, config.stages)

                @pl.when(count >= config.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])
                    plgpu.commit_smem()  # orders the math warpgroups' reads before the next TMA writes

                depth = pl.ds(step * BLOCK_K, BLOCK_K)
                plgpu.copy_gmem_to_smem(
                    gmem["left"].at[pl.ds(row, config.rows), depth],
                    left_smem.at[slot],
                    full.at[slot],
                    **(dict(collective_axes="cluster") if config.cluster > 1 else {}),
                )
                plgpu.copy_gmem_to_smem(
                    gmem["right"].at[pl.ds(column, config.columns), depth],
                    right_smem.at[slot],
                    full.at[slot],
                )
                if scaling == "block":
                    first = column if config.swap else row
                    plgpu.copy_gmem_to_smem(
                        gmem["x_scale"].at[step, pl.ds(first, _scale_slots(config))],
                        scale_smem.at[slot],
                        full.at[slot],
                    )
                return count + 1

            return lax.fori_loop(begin, end, load_step, count)

        count = lax.fori_loop(0, my_units, load_unit, 0)

        # No CTA may leave while the other still arrives on its barriers.
        @pl.loop(lax.max(count - config.stages, 0), count)
        def _(i):
            plgpu.barrier_wait(empty.at[lax.rem(i, config.stages)])

    @pl.when(wg < config.warpgroups)
    def math():
        plgpu.set_max_registers(152 if config.warpgroups == 3 else 232, action="increase")
        my_rows = 64 * config.sub * wg
        shape = (64, config.columns)
        tile_layout = plgpu.Layout.WGMMA
        # x's scales run along the tile's columns if it is the right operand, else along its rows.
        x_axis = 1 if config.swap else 0
        x_layout = tile_layout.reduce(1 - x_axis)

        def multiply_unit(i, count):
            row, column, split, begin, end = unit(i)
            weight_row = row + my_rows if config.swap else column

            def w_scale(step):
                if scaling == "row":
                    return jnp.float32(1)
                block_row = lax.min(weight_row // BLOCK_K, gmem["w_scale"].shape[0] - 1)
                return gmem["w_scale"][block_row, step]

            def multiply_step(step, carry):
                count, sums = carry
                slot = lax.rem(count, config.stages)
                scale = w_scale(step)  # its latency hides behind the first product
                plgpu.barrier_wait(full.at[slot])
                new_sums, product = [], None
                for j, total in enumerate(sums):
                    piece = pl.ds(my_rows + 64 * j, 64)
                    scales = None
                    if scaling == "block":
                        where = pl.ds(0, config.columns) if config.swap else piece
                        scales = plgpu.load(scale_smem.at[slot, where], layout=x_layout)
                    part = product = fp8_product(
                        left_smem.at[slot, piece],
                        right_smem.at[slot],
                        swizzle=swizzle,
                        recycle=product if tiles.steps > 1 else None,
                    )
                    if j == len(sums) - 1:
                        plgpu.barrier_arrive(empty.at[slot])
                    if scales is not None:
                        part = part * lax.broadcast_in_dim(scales * scale, shape, [x_axis])
                    new_sums.append(lax.optimization_barrier(total + part))
                return count + 1, tuple(new_sums)

            zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), tile_layout)
            carry = (count, (zeros,) * config.sub)
            count, sums = lax.fori_loop(begin, end, multiply_step, carry)

            def finish(total, first_row, first_column):
                """Applies what an epilogue applies to a piece of the tile."""

                def vector(name, along_rows):
                    first, extent = (
                        (first_row, total.shape[0])
                        if along_rows
                        else (first_column, total.shape[1])
                    )
                    layout = tile_layout.reduce(1 if along_rows else 0)
                    values = plgpu.load(
                        gmem[name].at[pl.ds(first, extent)], layout=layout, optimized=False
                    )
                    return lax.broadcast_in_dim(values, total.shape, [0 if along_rows else 1])

                if scaling == "row" and "x_scale" in gmem:
                    total = total * vector("x_scale", not config.swap)
                    total = total * vector("w_scale", config.swap)
                return total + vector("bias", config.swap) if "bias" in gmem else total

            for j, total in enumerate(sums):
                piece = (row + my_rows + 64 * j, column, split)
                _store(total, j, finish, out_smem.at[wg], out_gmem, piece, config)
            return count

        lax.fori_loop(0, my_units, multiply_unit, 0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store(total, j, finish, out_smem, out_gmem, piece, config: TileConfig):
    """Moves a 64-row piece of the tile through shared memory to `out_gmem`; TMA cuts what is outside."""
    row, column, split = piece

    def stage(slot, in_flight, values, target, *, transpose=False):
        plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)
        if transpose:
            values = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)
            out_smem.at[slot].T[...] = values
        else:
            out_smem[slot] = values
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[slot], target)

    rows = pl.ds(row, 64)
    if config.splits > 1:
        stage(0, 0, total, out_gmem.at[split, rows, pl.ds(column, config.columns)])
    elif config.swap:
        target = out_gmem.at[pl.ds(column, config.columns), rows]
        values = finish(total, row, column).astype(out_gmem.dtype)
        stage(0, 0, values, target, transpose=True)
    else:
        pieces = config.columns // 64
        # Two buffers alternate, across units too if a unit has an even number of pieces.
        in_flight = 1 if pieces * config.sub % 2 == 0 else 0
        for c in range(pieces):
            values = finish(total[:, c * 64 : (c + 1) * 64], row, column + c * 64)
            target = out_gmem.at[rows, pl.ds(column + c * 64, 64)]
            stage((j * pieces + c) % 2, in_flight, values.astype(out_gmem.dtype), target)
