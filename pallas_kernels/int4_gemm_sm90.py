"""Matrix product of 16-bit activations and INT4 weights for Hopper, weights in wgmma's own register order.

``out[m, n] = sum_g scale[n, g] * sum_{k in g} (q[n, k] - zero_point[n, g]) * x[m, k] + bias[n]``

`repack` re-lays the weights out once: 64 rows by 64 columns are one contiguous block of 2 KiB, in which each
thread of a warpgroup finds its 32 codes in 16 bytes, ready for wgmma's left operand. So a stage of the pipeline
is one copy of contiguous bytes, a thread reads its codes with one conflict-free 16-byte load, and neither the
codes nor x are shuffled afterwards. The tile is the transpose of the output's: 64 weight rows by up to 128
tokens a warpgroup. The CTAs of a cluster cut K among themselves and add their float32 sums through L2:

    producer warpgroup                          math warpgroups (block of 64 rows, part of a step's K)
    ------------------                          -------------------------------------------------
    for each tile of the cluster:               for each tile of the cluster:
      for each `step` of this CTA's K:            for each `step` of this CTA's K:
        wait  empty[slot]        <--------------+   wait  full[slot]
        TMA x     -> x_smem[slot, part]         |   for each group of the part's columns:
        TMA codes -> codes_smem[slot]           |     codes -> 16-bit floats: shift, lop3, exact subtraction
        TMA scale -> scale_smem[slot]           |     product = wgmma(codes, x_smem)
        (each arrives on full[slot]) -------->  |     sum += product * scale[row, group]      float32
                                                +-  arrive empty[slot]
                                                  parts > 0: wait taken; sum -> sum_smem; arrive added
                                                  part 0: wait added; add the parts; arrive taken
                                                    splits: sum -> workspace; arrive summed on every CTA
                                                      wait summed; one of the CTAs adds the splits
                                                    sum -> out_smem (transposed) -> TMA store

Dequantization costs 11 instructions for 8 weights: ``0x4300 | u`` is the bfloat16 number 128 + u, and one
``lop3`` makes two of them from nibbles i and i + 4 of a 32-bit word. The offset is subtracted in 16 bits,
exactly, and the group's scale multiplies the float32 sum, where it loses nothing.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from qjax.pallas_kernels._int4_gemm_registers_sm90 import bias_of, dequantize
from qjax.pallas_kernels._wgmma_sm90 import mixed_product
from qjax.wgmma_layout import BLOCK, WORDS, to_row_blocks, to_words

MAX_SMEM = 227 * 1024
MAX_SCALE_BYTES = 6 / 32  # a float32 scale and a zero point for each 32 weights
COLUMNS = (8, 16, 32, 64, 128)
X_DTYPES = ("bfloat16", "float16")
SCALE_DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How the product is cut.

    Attributes:
        columns: Tokens of a CTA's tile, one of `COLUMNS`.
        blocks: Blocks of 64 weight rows of a CTA's tile (1, 2 or 4).
        parts: Math warpgroups for each block, each with a part of a stage's columns; blocks * parts <= 4.
        depth: Columns of K in a stage for each part, 128 or 256.
        stages: Pipeline stages.
        splits: CTAs of a cluster (1, 2 or 4), each with a part of K.
    """

    columns: int
    blocks: int
    parts: int
    depth: int
    stages: int
    splits: int = 1

    @property
    def rows(self) -> int:
        """Weight rows of a CTA's tile."""
        return BLOCK * self.blocks

    @property
    def step(self) -> int:
        """Columns of K in a pipeline stage."""
        return self.depth * self.parts

    def smem_bytes(self, scale_bytes: float) -> float:
        """Shared memory for the stages and the epilogue.

        Args:
            scale_bytes: Bytes of scales and zero points for each weight.
        """
        stage = self.step * (self.rows * (0.5 + scale_bytes) + 2 * self.columns)
        epilogue = self.rows * self.columns * (2 + 4 * (self.parts - 1))
        return self.stages * stage + epilogue + 8 * 1024


def unsupported_reason(
    m: int,
    n: int,
    k: int,
    *,
    group_size: int,
    x_dtype: DTypeLike = "bfloat16",
    scale_dtype: DTypeLike = "bfloat16",
) -> str | None:
    """Why the kernel can't take x [m, k] and a weight [n, k], None if it can.

    Args:
        m: Tokens.
        n: Weight rows.
        k: Columns.
        group_size: Columns that share a scale; k for one scale a row. The last group may be short.
        x_dtype: The activations' dtype, also the output's.
        scale_dtype: The scales' dtype.
    """
    x_dtype, scale_dtype = jnp.dtype(x_dtype).name, jnp.dtype(scale_dtype).name
    if x_dtype not in X_DTYPES or scale_dtype not in SCALE_DTYPES:
        return (
            f"x must be one of {X_DTYPES} and the scales of {SCALE_DTYPES}; "
            f"found {x_dtype} and {scale_dtype}"
        )
    if m < 1 or n < 8 or n % 8 or k < 8 or k % 8:
        return f"N and K must be multiples of 8 and M positive; found M={m}, N={n}, K={k}"
    if group_size not in (32, 64) and group_size % 128 and group_size != k:
        return (
            f"groups must be of 32, 64, a multiple of 128 or all K={k} columns; found {group_size}"
        )
    return None


def repack(
    codes: Array, scale: Array, zero_point: Array | None = None, *, group_size: int
) -> tuple[Array, Array, Array | None]:
    """Weights in the kernel's layout, from the packed layout of compressed-tensors and `QArray`.

    Args:
        codes: uint8 [N, K/2]: u = q + 8, the even column in the low nibble.
        scale: [N, ceil(K/group_size)], of either sign.
        zero_point: int8 of scale's shape in units of the signed code q, within [-120, 112], or None.
        group_size: Columns that share a scale; K for one scale a row.

    Returns:
        (codes, scale, zero_point). codes: int32 [N/64, K/64, 2, 256], sizes rounded up, as `wgmma_layout`
        describes. scale and zero_point (bfloat16): [N/64, groups, 64]; groups of more than 128 columns, but
        not of all K, are repeated for each 128.

    Raises:
        ValueError: If shapes or dtypes are not those above.
    """
    n, k = _check_packed(codes, scale, zero_point, group_size)
    codes = jnp.pad(codes, ((0, -n % BLOCK), (0, (-k % BLOCK) // 2)))

    def by_rows(values: Array) -> Array:
        if group_size % 128 == 0 and group_size < k:
            values = jnp.repeat(values, group_size // 128, axis=1)[:, : -(-k // 128)]
        return to_row_blocks(jnp.pad(values, ((0, -n % BLOCK), (0, 0))))

    offsets = None if zero_point is None else by_rows(zero_point.astype(jnp.bfloat16))
    return to_words(codes), by_rows(scale), offsets


def choose_tiles(
    m: int, n: int, k: int, *, num_sms: int, scale_bytes: float = MAX_SCALE_BYTES
) -> TileConfig:
    """The tiling with the least modelled time; see `modelled_us`."""
    candidates = candidate_tiles(m, k, scale_bytes=scale_bytes)
    return min(candidates, key=lambda c: modelled_us(c, m, n, k, num_sms=num_sms))


def candidate_tiles(m: int, k: int, *, scale_bytes: float = MAX_SCALE_BYTES) -> list[TileConfig]:
    """The tilings worth considering, each with as many stages as fit, 10 at most.

    Args:
        m: Tokens.
        k: Columns.
        scale_bytes: Bytes of scales and zero points for each weight.
    """
    columns = next((c for c in COLUMNS if c >= m), COLUMNS[-1])
    shapes = [(1, 4), (2, 2), (4, 1)] if columns <= 64 else [(2, 1)]
    candidates = []
    for (blocks, parts), depth, splits in itertools.product(shapes, (128, 256), (1, 2, 4)):
        if depth == 256 and (parts > 1 or columns > 32):
            continue  # registers are full
        config = TileConfig(columns, blocks, parts, depth, 2, splits)
        while config.stages < 10:
            deeper = dataclasses.replace(config, stages=config.stages + 1)
            if deeper.smem_bytes(scale_bytes) > MAX_SMEM:
                break
            config = deeper
        enough = splits == 1 or (k >= splits * config.step and m <= 256)
        if enough and config.smem_bytes(scale_bytes) <= MAX_SMEM:
            candidates.append(config)
    return candidates


def modelled_us(config: TileConfig, m: int, n: int, k: int, *, num_sms: int) -> float:
    """Microseconds by counting rounds of steps; constants fitted to an H200's times within 10%.

    The integer instructions of dequantization set the pace, so bytes do not appear.
    """
    tiles = pl.cdiv(n, config.rows) * pl.cdiv(m, config.columns)
    # Not every group of four SMs is free of others' borders.
    clusters = max(num_sms // config.splits * (3 if config.splits == 4 else 4) // 4, 1)
    rounds = pl.cdiv(tiles, clusters)
    steps = pl.cdiv(pl.cdiv(k, config.step), config.splits)
    step_us = 1.1e-5 * config.rows * config.step * (1 + 0.02 * config.columns) + 0.12
    outputs = config.rows / BLOCK * config.columns
    epilogue_us = 0.012 * (config.parts - 1) * outputs
    if config.splits > 1:
        epilogue_us += 0.8 + 0.0046 * config.splits * outputs
    return 3.1 + rounds * (steps * step_us + epilogue_us)


def int4_gemm(
    x: Array,
    codes: Array,
    scale: Array,
    zero_point: Array | None = None,
    *,
    n: int,
    group_size: int,
    bias: Array | None = None,
    config: TileConfig | None = None,
    num_sms: int | None = None,
) -> Array:
    """x @ dequantized(codes).T.

    Args:
        x: [M, K], bfloat16 or float16.
        codes: int32 [N/64, K/64, 2, 256] from `repack`.
        scale: [N/64, groups, 64] from `repack`.
        zero_point: bfloat16, of scale's shape, from `repack`; or None.
        n: Weight rows.
        group_size: Columns that share a scale, as `repack` was told.
        bias: [N], floating, added in float32.
        config: Tiling; default `choose_tiles`.
        num_sms: SMs to run on; default those of the first device.

    Returns:
        [M, N] in x's dtype.

    Raises:
        ValueError: If shapes or dtypes are not those above, or `unsupported_reason` has a reason.
    """
    m, k = _check(x, codes, scale, zero_point, bias, n, group_size)
    num_sms = jax.devices()[0].core_count if num_sms is None else num_sms
    if config is None:
        per_group = scale.dtype.itemsize + (0 if zero_point is None else 2)
        scale_bytes = per_group / min(group_size, 128)
        config = choose_tiles(m, n, k, num_sms=num_sms, scale_bytes=scale_bytes)
    if m > 8 and m % 8:  # a tiled TMA copy wants the array's rows in whole tiles
        x = jnp.pad(x, ((0, -m % 8), (0, 0)))
    group_size = k if group_size == k else min(group_size, 128)
    return _launch(x, codes, scale, zero_point, bias, (m, n, k), group_size, config, num_sms)


def _expect(name: str, array: Array, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    if tuple(array.shape) != shape or array.dtype != jnp.dtype(dtype):
        raise ValueError(
            f"int4_gemm: {name} must be {jnp.dtype(dtype).name}{list(shape)}; "
            f"found {array.dtype}{list(array.shape)}"
        )


def _check_packed(codes, scale, zero_point, group_size: int) -> tuple[int, int]:
    if codes.ndim != 2 or scale.ndim != 2:
        raise ValueError(
            f"int4_gemm: repack takes codes [N, K/2] and scale [N, groups]; "
            f"found {list(codes.shape)} and {list(scale.shape)}"
        )
    n, k = codes.shape[0], 2 * codes.shape[1]
    _expect("codes", codes, (n, k // 2), "uint8")
    reason = unsupported_reason(1, n, k, group_size=group_size, scale_dtype=scale.dtype)
    if reason:
        raise ValueError(f"int4_gemm: {reason}")
    _expect("scale", scale, (n, -(-k // group_size)), scale.dtype)
    if zero_point is not None:
        _expect("zero_point", zero_point, scale.shape, "int8")
    return n, k


def _check(x, codes, scale, zero_point, bias, n: int, group_size: int) -> tuple[int, int]:
    """M and K.

    Raises:
        ValueError: Naming what is wrong.
    """
    if x.ndim != 2:
        raise ValueError(f"int4_gemm: x must be [M, K]; found {list(x.shape)}")
    m, k = x.shape
    reason = unsupported_reason(
        m, n, k, group_size=group_size, x_dtype=x.dtype, scale_dtype=scale.dtype
    )
    if reason:
        raise ValueError(f"int4_gemm: {reason}")
    rows = -(-n // BLOCK)
    groups = 1 if group_size == k else -(-k // min(group_size, 128))
    _expect("codes", codes, (rows, -(-k // BLOCK), 2, WORDS // 2), "int32")
    _expect("scale", scale, (rows, groups, BLOCK), scale.dtype)
    if zero_point is not None:
        _expect("zero_point", zero_point, scale.shape, "bfloat16")
    if bias is not None:
        _expect("bias", bias, (n,), bias.dtype)
    return m, k


def _launch(x, codes, scale, zero_point, bias, sizes, group_size, config: TileConfig, num_sms):
    m, n, k = sizes
    row_tiles, column_tiles = pl.cdiv(n, config.rows), pl.cdiv(m, config.columns)
    warpgroups = config.blocks * config.parts
    clusters = max(min(num_sms // config.splits, row_tiles * column_tiles), 1)
    operands = {"x": x, "codes": codes, "scale": scale}
    if zero_point is not None:
        operands["zero_point"] = zero_point
    if bias is not None:
        padded = jnp.pad(bias.astype(jnp.float32), (0, -n % BLOCK))
        operands["bias"] = padded.reshape(-1, BLOCK)
    grouped = group_size != k
    out_type = [jax.ShapeDtypeStruct((m, n), x.dtype)]
    scratch = dict(
        codes_smem=plgpu.SMEM(
            (config.stages, config.blocks, config.step // BLOCK, 2, WORDS // 2), jnp.int32
        ),
        x_smem=plgpu.SMEM(
            (config.stages, config.parts, config.columns, config.depth),
            x.dtype,
            transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
        ),
        out_smem=plgpu.SMEM(
            (config.blocks, config.columns, BLOCK),
            x.dtype,
            transforms=(plgpu.SwizzleTransform(128),),
        ),
        empty=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=config.stages),
    )
    streams = ["x", "codes"]
    for name in ("scale", "zero_point"):
        if grouped and name in operands:
            streams.append(name)
            shape = (config.stages, config.blocks, config.step // group_size, BLOCK)
            scratch[name + "_smem"] = plgpu.SMEM(shape, operands[name].dtype)
    arrivals = len(streams) - 1 + config.parts
    scratch["full"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=config.stages)
    if config.parts > 1:
        width = plgpu.find_swizzle(min(config.columns, 32) * 32)
        scratch["sum_smem"] = plgpu.SMEM(
            (config.parts - 1, config.blocks, BLOCK, config.columns),
            jnp.float32,
            transforms=(plgpu.TilingTransform((8, width // 4)), plgpu.SwizzleTransform(width)),
        )
        scratch["added"] = plgpu.Barrier(num_arrivals=config.parts - 1, num_barriers=config.blocks)
        scratch["taken"] = plgpu.Barrier(num_barriers=config.blocks)
    if config.splits > 1:
        # Two buffers: a part is overwritten after the barrier that follows its addition.
        shape = (clusters, 2, config.splits, config.blocks, BLOCK, config.columns)
        out_type.append(jax.ShapeDtypeStruct(shape, jnp.float32))
        scratch["summed"] = plgpu.ClusterBarrier(
            collective_axes=("split",), num_barriers=config.blocks
        )
    body = functools.partial(
        _kernel,
        names=tuple(operands),
        streams=tuple(streams),
        config=config,
        group_size=group_size,
        counts=(row_tiles, column_tiles, pl.cdiv(k, config.step), clusters),
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
        kernel_name="int4_gemm",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*operands.values())[0]


def _kernel(gmem, outputs, smem, *, names, streams, config: TileConfig, group_size, counts):
    row_tiles, column_tiles, steps, clusters = counts
    full, empty, x_smem = smem["full"], smem["empty"], smem["x_smem"]
    wg, cluster, split = (lax.axis_index(name) for name in ("wg", "cluster", "split"))
    my_tiles = (row_tiles * column_tiles - cluster + clusters - 1) // clusters
    begin, end = split * steps // config.splits, (split + 1) * steps // config.splits
    step_groups = config.step // group_size if "scale" in streams else 1
    warpgroups = config.blocks * config.parts

    def tile(i):
        """First block of rows and first token of this cluster's i-th tile."""
        row, column = plgpu.planar_snake(cluster + i * clusters, (row_tiles, column_tiles), 0, 8)
        return row * config.blocks, column * config.columns

    @pl.when(wg == warpgroups)
    def producer():
        plgpu.set_max_registers(40, action="decrease")

        def load_tile(i, count):
            row, column = tile(i)
            rows = pl.ds(row, config.blocks)

            def load_step(step, count):
                slot = lax.rem(count, config.stages)

                @pl.when(count >= config.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])
                    plgpu.commit_smem()  # orders the math warpgroups' reads before the next TMA writes

                for part in range(config.parts):
                    first = step * config.step + part * config.depth
                    plgpu.copy_gmem_to_smem(
                        gmem["x"].at[pl.ds(column, config.columns), pl.ds(first, config.depth)],
                        x_smem.at[slot, part],
                        full.at[slot],
                    )
                for name in streams[1:]:
                    count_of = config.step // BLOCK if name == "codes" else step_groups
                    plgpu.copy_gmem_to_smem(
                        gmem[name].at[rows, pl.ds(step * count_of, count_of)],
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
        plgpu.set_max_registers(104 if warpgroups == 4 else 232, action="increase")
        grouped = "scale" in streams
        width = group_size if grouped else 128
        part_groups = config.depth // width
        mine, k_part = lax.div(wg, config.parts), lax.rem(wg, config.parts)
        shape = (BLOCK, config.columns)
        row_layout = plgpu.Layout.WGMMA.reduce(1)
        spread = functools.partial(lax.broadcast_in_dim, shape=shape, broadcast_dimensions=[0])

        def row_values(ref):
            return plgpu.load(ref, layout=row_layout, optimized=False).astype(jnp.float32)

        def multiply_tile(i, count):
            row, column = tile(i)
            # A warpgroup past the last row computes rows that TMA does not store.
            block = lax.min(row + mine, gmem["codes"].shape[0] - 1)
            offset = None
            if "zero_point" in gmem and not grouped:
                offset = row_values(gmem["zero_point"].at[block, 0])

            def multiply_step(step, carry):
                count, total = carry
                slot = lax.rem(count, config.stages)
                plgpu.barrier_wait(full.at[slot])
                part = None
                for g in range(part_groups):
                    first = g * width
                    group = k_part * part_groups + g
                    zero = offset
                    if "zero_point" in streams:
                        zero = row_values(smem["zero_point_smem"].at[slot, mine, group])
                    begin, end = first // BLOCK, -(-(first + width) // BLOCK)
                    blocks = pl.ds(k_part * (config.depth // BLOCK) + begin, end - begin)
                    weights = _load_weights(
                        smem["codes_smem"].at[slot, mine, blocks],
                        first % BLOCK,
                        width,
                        x_smem.dtype,
                        zero,
                    )
                    tokens = x_smem.at[slot, k_part]
                    part = mixed_product(weights, tokens, first=first, recycle=part)
                    if first + width == config.depth and not grouped:
                        plgpu.barrier_arrive(empty.at[slot])
                    scaled = part
                    if grouped:
                        scaled = part * spread(row_values(smem["scale_smem"].at[slot, mine, group]))
                        if first + width == config.depth:
                            plgpu.barrier_arrive(empty.at[slot])
                    total = lax.optimization_barrier(total + scaled)
                return count + 1, total

            zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
            count, total = lax.fori_loop(begin, end, multiply_step, (count, zeros))

            def store(total):
                if not grouped:
                    total = total * spread(row_values(gmem["scale"].at[block, 0]))
                if "bias" in gmem:
                    total = total + spread(row_values(gmem["bias"].at[block]))
                _store(total, smem["out_smem"].at[mine], outputs[0], column, (row + mine) * BLOCK)

            def add_splits(total):
                if config.splits == 1:
                    store(total)
                    return
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
                add_splits(total)
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
                add_splits(functools.reduce(jnp.add, values, total))

            return count

        lax.fori_loop(0, my_tiles, multiply_tile, 0)
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


def _load_weights(codes_smem, first: int, width: int, dtype, zero_point: Array | None) -> Array:
    """Differences q - zero_point of columns first to first + width: [64, width] in ``Layout.WGMMA``."""
    words = plgpu.load(codes_smem, layout=plgpu.Layout.WG_STRIDED(codes_smem.shape, vec_size=4))
    offset = None if zero_point is None else (zero_point + bias_of(dtype)).astype(dtype)
    return dequantize(words, dtype, offset, first=first, width=width)
