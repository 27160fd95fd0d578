"""The persistent, warp-specialized grouped FP8 product that block and row scales share.

The warpgroups, barriers and promotion to float32 are those that `_fp8_gemm_sm90` draws. What differs:

- A tile is a line of a table (group, first row, rows, number of tiles) that XLA computes from the group sizes
  and the kernel reads as scalars, one unit ahead. Empty groups have no line, so nothing runs for them.
- A tile starts wherever its group starts. TMA takes any first row, because the operands lie in shared memory
  swizzled but not tiled: 128 columns of FP8 are one swizzle, so the bytes are those that wgmma reads.
- A tile's last rows may belong to the next group: they are multiplied, for nothing, but not stored. The
  store of a short tile goes in pieces of a power of two rows. With `halves`, a tile that is at most half
  full takes half the loads and products.
- The two CTAs of a cluster take two tiles of the weight and share the tokens by multicast.
- Tiles that run together are those of the same group, which then share their weight in the L2 cache.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.pallas_kernels._grouped_tiles_sm90 import store_rows, tile_table
from qjax.pallas_kernels._wgmma_sm90 import fp8_product, load_columns

BLOCK_K = 128
MAX_SMEM = 227 * 1024

Scaling = Literal["block", "row"]


@dataclasses.dataclass(frozen=True)
class GroupedTileConfig:
    """How a grouped product is cut.

    Attributes:
        swap: Whether the weight is wgmma's left operand, whose 64 rows it always fills, and the tokens its
            right one, which may have as few as 8.
        tokens: Rows of x in a tile: 128 or 256, with `swap` a multiple of 8 up to 256.
        weights: Rows of w in a CTA's tile: 64 or 128, with `swap` 64, 128 or 256.
        stages: 128-wide slices of K in flight.
        cluster: CTAs (1, 2 or 4) side by side along N that share each tile of tokens by multicast.
        halves: Whether tiles with at most half the rows are computed as half tiles; `tokens` is then 256,
            with `swap` a multiple of 16.
        band: Tiles of tokens that meet the same tiles of the weight before the next ones do.

    Raises:
        ValueError: If a size is none of these.
    """

    swap: bool
    tokens: int
    weights: int
    stages: int
    cluster: int = 1
    halves: bool = False
    band: int = 8

    def __post_init__(self):
        if self.swap:
            unit = 16 if self.halves else 8
            fine = self.tokens in range(unit, 257, unit) and self.weights in (64, 128, 256)
        else:
            fine = self.tokens in ((256,) if self.halves else (128, 256))
            fine = fine and self.weights in (64, 128)
        if not fine or self.cluster not in (1, 2, 4) or self.tokens % self.cluster:
            raise ValueError(
                f"GroupedTileConfig: no such tile; its docstring lists them; found {self}"
            )

    @property
    def rows(self) -> int:
        """Rows of wgmma's left operand in a CTA's tile."""
        return self.weights if self.swap else self.tokens

    @property
    def warpgroups(self) -> int:
        """Math warpgroups."""
        return min(2, self.rows // 64)

    @property
    def sub(self) -> int:
        """64-row pieces of each math warpgroup, promoted one after the other."""
        return self.rows // (64 * self.warpgroups)

    @property
    def scale_slots(self) -> int:
        """Scales of x in a stage, from up to three rows before the tile.

        TMA reads from multiples of 16 bytes (or it is an illegal instruction) and writes to multiples of 128.
        """
        return pl.cdiv(self.tokens + 3, 32) * 32

    @property
    def scale_copies(self) -> list[tuple[int, int]]:
        """First slot and number of slots of each copy of scales; TMA moves at most 256 elements."""
        slots = self.scale_slots
        return [(begin, min(256, slots - begin)) for begin in range(0, slots, 256)]

    def smem_bytes(self) -> int:
        """Shared memory for the operand stages and the epilogue."""
        stage = (self.tokens + self.weights) * BLOCK_K + 4 * self.scale_slots
        epilogue = self.warpgroups * 64 * 2 * (self.tokens if self.swap else 128)
        return (
            self.stages * stage + epilogue + 6 * 1024
        )  # each buffer starts at a multiple of 1 KiB


def grouped_gemm(
    scaling: Scaling,
    x: Array,
    x_scale: Array,
    w: Array,
    w_scale: Array,
    group_sizes: Array,
    bias: Array | None,
    *,
    out_dtype: jnp.dtype,
    config: GroupedTileConfig,
    num_sms: int,
) -> Array:
    """The product [*x.shape[:-1], N] of arguments that the callers checked; their docstrings tell the rest."""
    (*lead, k), n = x.shape, w.shape[1]
    x = x.reshape(-1, k)
    tiles_n = pl.cdiv(n, config.weights * config.cluster)
    table = tile_table(group_sizes, tuple(lead), config.tokens)
    workers = min(num_sms // config.cluster, table.shape[0] * tiles_n)
    operands = {"table": table, "x": x, "w": w, "x_scale": x_scale, "w_scale": w_scale}
    # Plain loads know no bounds: these vectors cover whole tiles.
    cover_n = ((0, 0), (0, tiles_n * config.weights * config.cluster - n))
    if scaling == "row":
        operands["x_scale"] = jnp.pad(x_scale.reshape(-1), (0, config.tokens))
        operands["w_scale"] = jnp.pad(w_scale, cover_n)
    if bias is not None:
        operands["bias"] = jnp.pad(bias.astype(jnp.float32), cover_n)
    body = functools.partial(
        _kernel,
        names=tuple(operands),
        config=config,
        scaling=scaling,
        tiles_n=tiles_n,
        workers=workers,
    )
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((x.shape[0], n), out_dtype),
        grid=(workers,),
        grid_names=("worker",),
        cluster=(config.cluster,),
        cluster_names=("cluster",),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        kernel_name=f"fp8_{scaling}_grouped_gemm",
        scratch_types=_scratch(config, x.dtype, w.dtype, out_dtype, scaling),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*operands.values())
    return out.reshape(*lead, n)


def _scratch(config: GroupedTileConfig, x_dtype, w_dtype, out_dtype, scaling: Scaling) -> dict:
    swizzled = (plgpu.SwizzleTransform(128),)
    out_shape = (1, config.tokens, 64) if config.swap else (2, 64, 64)
    arrivals = dict(num_arrivals=config.warpgroups, num_barriers=config.stages)
    if config.cluster > 1:
        empty = plgpu.ClusterBarrier(collective_axes=("cluster",), **arrivals)
    else:
        empty = plgpu.Barrier(**arrivals)
    stages, copies = config.stages, 2
    if scaling == "block":
        copies += len(config.scale_copies)
    scratch = dict(
        x_smem=plgpu.SMEM((stages, config.tokens, BLOCK_K), x_dtype, transforms=swizzled),
        w_smem=plgpu.SMEM((stages, config.weights, BLOCK_K), w_dtype, transforms=swizzled),
        out_smem=plgpu.SMEM((config.warpgroups, *out_shape), out_dtype, transforms=swizzled),
        full=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        empty=empty,
    )
    if scaling == "block":
        scratch["scale_smem"] = plgpu.SMEM((stages, config.scale_slots), jnp.float32)
    return scratch


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A CTA's unit of work: a line of the table and the first row of the weight's tile."""

    group: Array
    first: Array
    rows: Array
    weight: Array


def _kernel(
    *refs,
    names: tuple[str, ...],
    config: GroupedTileConfig,
    scaling: Scaling,
    tiles_n: int,
    workers: int,
    x_smem,
    w_smem,
    out_smem,
    full,
    empty,
    scale_smem=None,
):
    gmem = dict(zip(names, refs[:-1], strict=True))
    table, groups = gmem["table"], gmem["w"].shape[0]
    k_steps = pl.cdiv(gmem["w"].shape[2], BLOCK_K)
    wg = lax.axis_index("wg")
    cta = lax.axis_index("cluster")
    worker = lax.axis_index("worker")
    total = table[0, 3]
    my_units = (total * tiles_n - worker + workers - 1) // workers
    half = config.tokens // 2

    def line(i):
        """The scalars of this worker's i-th tile; of the last one also if i is beyond."""
        index = worker + lax.max(lax.min(i, my_units - 1), 0) * workers
        tile, column = plgpu.planar_snake(index, (lax.max(total, 1), tiles_n), 0, config.band)
        tile = lax.min(tile, table.shape[0] - 1)
        weight = (column * config.cluster + cta) * config.weights
        return table[tile, 0], table[tile, 1], table[tile, 2], weight

    def each_tile(body, count):
        """body(tile, number of steps, count) -> count for each tile, whose scalars load one tile ahead."""

        def step(i, carry):
            count, scalars = carry
            following = line(i + 1)
            tile = _Tile(*scalars)
            steps = jnp.where(tile.group < groups, k_steps, 0)
            return body(tile, steps, count), following

        return lax.fori_loop(0, my_units, step, (count, line(0)))[0]

    @pl.when(wg == config.warpgroups)
    def producer():
        plgpu.set_max_registers(40, action="decrease")

        def load_x(tile, depth, slot, tokens):
            plgpu.copy_gmem_to_smem(
                gmem["x"].at[pl.ds(tile.first, tokens), depth],
                x_smem.at[slot, pl.ds(0, tokens)],
                full.at[slot],
                **(dict(collective_axes="cluster") if config.cluster > 1 else {}),
            )

        def load_tile(tile, steps, count):
            def load_step(step, count):
                slot = lax.rem(count, config.stages)

                @pl.when(count >= config.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])
                    plgpu.commit_smem()  # orders the math warpgroups' reads before the next TMA writes

                depth = pl.ds(step * BLOCK_K, BLOCK_K)
                if config.halves:
                    short = tile.rows <= half
                    pl.when(short)(lambda: load_x(tile, depth, slot, half))
                    pl.when(~short)(lambda: load_x(tile, depth, slot, config.tokens))
                else:
                    load_x(tile, depth, slot, config.tokens)
                plgpu.copy_gmem_to_smem(
                    gmem["w"].at[tile.group, pl.ds(tile.weight, config.weights), depth],
                    w_smem.at[slot],
                    full.at[slot],
                )
                for begin, size in config.scale_copies if scaling == "block" else ():
                    first = tile.first - lax.rem(tile.first, 4) + begin
                    plgpu.copy_gmem_to_smem(
                        gmem["x_scale"].at[step, pl.ds(first, size)],
                        scale_smem.at[slot, pl.ds(begin, size)],
                        full.at[slot],
                    )
                return count + 1

            return lax.fori_loop(0, steps, load_step, count)

        count = each_tile(load_tile, 0)

        # No CTA may leave while the other still arrives on its barriers.
        @pl.loop(lax.max(count - config.stages, 0), count)
        def _(i):
            plgpu.barrier_wait(empty.at[lax.rem(i, config.stages)])

    @pl.when(wg < config.warpgroups)
    def math():
        plgpu.set_max_registers(232, action="increase")
        multiply = functools.partial(
            _multiply,
            wg=wg,
            gmem=gmem,
            smem=(x_smem, w_smem, scale_smem),
            barriers=(full, empty),
            config=config,
        )

        def multiply_tile(tile, steps, count):
            def run(tokens):
                sums = multiply(tile, steps, count, tokens)
                _store(sums, tile, gmem, refs[-1], out_smem, wg, config)

            if config.halves:
                # Even of an upright tile that is loaded whole, a warpgroup skips a piece that has no rows.
                short = tile.rows <= (half if config.swap else _left_row(1, wg, config))
                pl.when(short)(lambda: run(half))
                pl.when(~short)(lambda: run(config.tokens))
            else:
                run(config.tokens)
            return count + steps

        each_tile(multiply_tile, 0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _left_row(j: int, wg, config: GroupedTileConfig):
    """First row of a warpgroup's j-th 64-row piece of wgmma's left operand."""
    if config.swap:  # 128 rows of a weight share their scales
        return 64 * (config.sub * wg + j)
    return 64 * (config.warpgroups * j + wg)  # a half tile is the first piece of each warpgroup


def _multiply(tile: _Tile, steps, count, tokens: int, *, wg, gmem, smem, barriers, config):
    """Scaled sums [64, columns] of this warpgroup's pieces over K."""
    (x_smem, w_smem, scale_smem), (full, empty) = smem, barriers
    left_smem, right_smem = (w_smem, x_smem) if config.swap else (x_smem, w_smem)
    columns = tokens if config.swap else config.weights
    pieces = config.sub if config.swap else tokens // (64 * config.warpgroups)
    # x's scales run along the tile's columns if it is the right operand, else along its rows.
    x_axis, shift = 1 if config.swap else 0, lax.rem(tile.first, 4)
    weight = tile.weight + (_left_row(0, wg, config) if config.swap else 0)

    def w_scale(step):
        if scale_smem is None:
            return None
        block = lax.min(weight // BLOCK_K, gmem["w_scale"].shape[1] - 1)
        return gmem["w_scale"][tile.group, block, step]

    def multiply_step(step, carry):
        count, sums = carry
        slot = lax.rem(count, config.stages)
        scale = w_scale(step)  # its latency hides behind the first product
        plgpu.barrier_wait(full.at[slot])
        new_sums, product = [], None
        for j, total in enumerate(sums):
            row, scales = _left_row(j, wg, config), None
            if scale_smem is not None and config.swap:
                scales = load_columns(scale_smem.at[slot, pl.ds(shift, columns)])
            elif scale_smem is not None:
                ref = scale_smem.at[slot, pl.ds(shift + row, 64)]
                scales = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))
            part = product = fp8_product(
                left_smem.at[slot, pl.ds(row, 64)],
                right_smem.at[slot, pl.ds(0, columns)],
                swizzle=128,
                tiled=False,
                recycle=product if gmem["w"].shape[2] > BLOCK_K else None,
            )
            if j == len(sums) - 1:
                plgpu.barrier_arrive(empty.at[slot])
            if scales is not None and scale is not None:
                part = part * lax.broadcast_in_dim(scales * scale, total.shape, [x_axis])
            new_sums.append(lax.optimization_barrier(total + part))
        return count + 1, tuple(new_sums)

    zeros = plgpu.layout_cast(jnp.zeros((64, columns), jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(0, steps, multiply_step, (count, (zeros,) * pieces))[1]


def _store(sums, tile: _Tile, gmem, out_gmem, out_smem, wg, config: GroupedTileConfig):
    """Finishes this warpgroup's pieces and moves them through shared memory to `out_gmem`."""
    groups = gmem["w"].shape[0]
    group = lax.min(tile.group, groups - 1)

    def vector(ref, first, shape, axis):
        ref = ref.at[pl.ds(first, shape[axis])]
        if axis:
            values = load_columns(ref)
        else:
            values = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        return lax.broadcast_in_dim(values, shape, [axis])

    def finish(values, token, weight):
        """Applies what an epilogue applies to a piece of the tile."""
        x_axis = 1 if config.swap else 0
        shape, scaled = values.shape, values
        if gmem["x_scale"].ndim == 1:
            scaled = scaled * vector(gmem["x_scale"], token, shape, x_axis)
            scaled = scaled * vector(gmem["w_scale"].at[group], weight, shape, 1 - x_axis)
        if "bias" in gmem:
            scaled = scaled + vector(gmem["bias"].at[group], weight, shape, 1 - x_axis)
        if scaled is not values:  # rows past the groups stay zeros
            scaled = jnp.where(lax.broadcast(tile.group, shape) < groups, scaled, values)
        return scaled.astype(out_gmem.dtype)

    def stage(slot, in_flight, values, token, weight, rows):
        count = values.shape[1] if config.swap else 64
        # A short piece is several copies, so what is in flight is counted among whole pieces only.
        for counted, most in ((rows >= count, in_flight), (rows < count, 0)):
            pl.when(counted)(functools.partial(plgpu.wait_smem_to_gmem, most, wait_read_only=True))
        buffer = out_smem.at[wg, slot, pl.ds(0, count)]
        if config.swap:
            buffer.T[...] = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)
        else:
            buffer[...] = values
        plgpu.commit_smem()
        store_rows(buffer, out_gmem, token, weight, rows)

    for j, total in enumerate(sums):
        row = _left_row(j, wg, config)
        if config.swap:
            weight = tile.weight + row
            stage(0, 0, finish(total, tile.first, weight), tile.first, weight, tile.rows)
            continue
        token, pieces = tile.first + row, config.weights // 64
        # Two buffers alternate, across tiles too if a tile has an even number of pieces.
        in_flight = 1 if pieces % 2 == 0 else 0
        for c in range(pieces):
            weight = tile.weight + 64 * c
            values = finish(total[:, 64 * c : 64 * (c + 1)], token, weight)
            stage((j * pieces + c) % 2, in_flight, values, token, weight, tile.rows - row)
