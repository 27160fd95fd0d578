"""Matrix product of 16-bit activations and packed INT4 weights for Hopper, weights dequantized in registers.

``out[m, n] = sum_g scale[n, g] * sum_{k in g} (q[n, k] - zero_point[n, g]) * x[m, k]``

Codes are unsigned nibbles u = q + 8, two a byte, low nibble first. The weight is wgmma's left operand, in
registers, so the tile is the transpose of the output's: 64 weight rows by up to 128 tokens a warpgroup.

    producer warpgroup                         math warpgroups (64 weight rows each)
    ------------------                         -------------------------------------
    for each unit (tile, part of K):           for each unit:
      for each `depth` of K:                     for each `depth` of K:
        wait  empty[slot]       <---------------+  wait  full[slot]
        TMA codes -> codes_smem[slot]           |  codes -> registers, one 32-bit load for 8 weights
        TMA x     -> x_smem[slot]               |  u -> 16-bit floats: shift, lop3, exact subtraction
        (each arrives on full[slot]) -------->  |  for each group: part = wgmma(codes, x_smem)
                                                +- arrive empty[slot]
                                                   sum += part * scale[row, group]     float32
                                                 sum -> out_smem (transposed) -> TMA store

Dequantization costs 11 instructions for 8 weights and no shuffle: ``0x4300 | u`` is the bfloat16 number
128 + u, and one ``lop3`` makes two of them from nibbles i and i + 4 of a 32-bit word. In wgmma's register
layout these stand in columns 8i + 2t and 8i + 2t + 1 (t: lane modulo 4) of their 32 instead of 8t + i and
8t + i + 4, so x's columns are permuted alike before the kernel (`permute_columns`). The offset is subtracted
in 16 bits, exactly, and the group's scale multiplies the float32 sum, where it loses nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from qjax.pallas_kernels._wgmma_sm90 import mixed_product

CHUNK = 128  # columns that are dequantized at a time
MAX_SMEM = 227 * 1024
COLUMNS = (8, 16, 32, 64, 128)
X_DTYPES = ("bfloat16", "float16")
SCALE_DTYPES = ("bfloat16", "float16", "float32")
# 128 + u and 1024 + u are the numbers whose bits end in u.
_BIAS = {"bfloat16": (0x4300, 128), "float16": (0x6400, 1024)}


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How the product is cut.

    Attributes:
        columns: Tokens of a CTA's tile, one of `COLUMNS`.
        warpgroups: Math warpgroups (1, 2 or 4), each with 64 weight rows.
        depth: Columns of K in a pipeline stage, 128 or 256.
        stages: Pipeline stages.
        splits: Parts of K that are summed by XLA.
    """

    columns: int
    warpgroups: int
    depth: int
    stages: int
    splits: int = 1

    @property
    def rows(self) -> int:
        """Weight rows of a CTA's tile."""
        return 64 * self.warpgroups

    def smem_bytes(self) -> int:
        """Shared memory for the stages and the epilogue."""
        stage = self.rows * self.depth // 2 + self.columns * self.depth * 2
        epilogue = self.rows * self.columns * (4 if self.splits > 1 else 2)
        return self.stages * stage + epilogue + 6 * 1024


def unsupported_reason(
    m: int,
    n: int,
    k: int,
    *,
    group_size: int,
    x_dtype: DTypeLike = "bfloat16",
    scale_dtype: DTypeLike = "bfloat16",
) -> str | None:
    """Why the kernel can't take x [m, k] and codes [n, k / 2], None if it can.

    Args:
        m: Tokens.
        n: Weight rows.
        k: Columns.
        group_size: Columns that share a scale; k for one scale a row.
        x_dtype: The activations' dtype, also the output's.
        scale_dtype: The scales' dtype.
    """
    x_dtype, scale_dtype = jnp.dtype(x_dtype).name, jnp.dtype(scale_dtype).name
    if x_dtype not in X_DTYPES or scale_dtype not in SCALE_DTYPES:
        return (
            f"x must be one of {X_DTYPES} and the scales of {SCALE_DTYPES}; "
            f"found {x_dtype} and {scale_dtype}"
        )
    if m < 1 or n < 64 or n % 64 or k < 64 or k % 64:
        return f"N and K must be multiples of 64 and M positive; found M={m}, N={n}, K={k}"
    if k % group_size or (group_size not in (32, 64) and group_size % CHUNK and group_size != k):
        return f"groups must be of 32, 64, a multiple of {CHUNK} or all K={k} columns; found {group_size}"
    return None


def choose_tiles(m: int, n: int, k: int, *, num_sms: int) -> TileConfig:
    """The tiling with the least modelled time; see `modelled_us`."""
    return min(candidate_tiles(m, k), key=lambda c: modelled_us(c, m, n, k, num_sms=num_sms))


def candidate_tiles(m: int, k: int) -> list[TileConfig]:
    """The tilings worth considering, each with as many stages as fit, 8 at most."""
    columns = next((c for c in COLUMNS if c >= m), COLUMNS[-1])
    candidates = []
    for warpgroups in (1, 2, 4) if columns <= 32 else (1, 2):
        for depth in (128, 256):
            most = min(8, pl.cdiv(k, depth) // 4) if m <= 256 else 1
            if columns == 128:
                most = min(most, 2)  # registers are full: the index arithmetic of more parts spills
            for splits in range(1, max(most, 1) + 1):
                config = TileConfig(columns, warpgroups, depth, 2, splits)
                while config.stages < 8:
                    deeper = dataclasses.replace(config, stages=config.stages + 1)
                    if deeper.smem_bytes() > MAX_SMEM:
                        break
                    config = deeper
                candidates.append(config)
    return candidates


def modelled_us(config: TileConfig, m: int, n: int, k: int, *, num_sms: int) -> float:
    """Microseconds by counting waves: a step costs its bytes, its dequantization or its arithmetic.

    Rates are an H200's: 4.3 TB/s of memory, 7 TB/s of L2, 128 integer lanes an SM at 1.75 GHz, 800 TFLOP/s.
    """
    units = pl.cdiv(n, config.rows) * pl.cdiv(m, config.columns) * config.splits
    waves = pl.cdiv(units, num_sms)
    steps = pl.cdiv(pl.cdiv(k, config.depth), config.splits)
    bytes_us = config.depth * (config.rows / 2 + 2 * config.columns) / (7e6 / num_sms)
    weights = config.rows * config.depth
    # 1.4 instructions a weight, and one for each sum of a group of 128; half of the slots are lost to latency.
    issue_us = 2 * (1.4 * weights + weights / CHUNK * config.columns) / (128 * 1750)
    math_us = 2 * weights * config.columns / (8e8 / num_sms)
    # A single warpgroup does one after the other.
    compute_us = issue_us + math_us if config.warpgroups == 1 else max(issue_us, math_us)
    traffic = (
        n * k / 2 + 2 * m * k + 2 * m * n + (8 * config.splits * m * n if config.splits > 1 else 0)
    )
    memory_us = traffic / (4.3e6 * min(1.0, 2 * min(units, num_sms) / num_sms))
    epilogue_us = 0.5 + config.rows * config.columns / 40e3
    total = max(waves * steps * max(bytes_us, compute_us), memory_us) + waves * epilogue_us
    return total + (2.5 if config.splits > 1 else 0.0)


def permute_columns(x: Array) -> Array:
    """x [M, K] with the columns of each 32 in the order in which the kernel dequantizes them."""
    m, k = x.shape
    # Column 8j + 2t + h of the result is column 8t + 4h + j of x.
    return x.reshape(m, k // 32, 4, 2, 4).transpose(0, 1, 4, 2, 3).reshape(m, k)


def int4_mixed_gemm(
    x: Array,
    codes: Array,
    scale: Array,
    zero_point: Array | None = None,
    *,
    bias: Array | None = None,
    config: TileConfig | None = None,
    num_sms: int | None = None,
) -> Array:
    """x @ dequantized(codes).T.

    Args:
        x: [M, K], bfloat16 or float16.
        codes: uint8 [N, K/2]: u = q + 8, the even column in the low nibble.
        scale: [N, K/group], of either sign.
        zero_point: int8 [N, K/group] in units of the signed code q, within [-120, 112], or None.
        bias: [N], floating, added in float32.
        config: Tiling; default `choose_tiles`.
        num_sms: SMs to run on; default those of the first device.

    Returns:
        [M, N] in x's dtype.

    Raises:
        ValueError: If shapes or dtypes are not those above, or `unsupported_reason` has a reason.
    """
    group_size = _check(x, codes, scale, zero_point, bias)
    (m, k), n = x.shape, codes.shape[0]
    num_sms = jax.devices()[0].core_count if num_sms is None else num_sms
    config = choose_tiles(m, n, k, num_sms=num_sms) if config is None else config
    x = permute_columns(x)
    if m > 8 and m % 8:
        x = jnp.pad(x, ((0, -m % 8), (0, 0)))
    return _launch(x, codes, scale, zero_point, bias, m, group_size, config, num_sms)


def _check(x, codes, scale, zero_point, bias) -> int:
    """The group size.

    Raises:
        ValueError: Naming what is wrong.
    """

    def expect(name, array, shape, dtype):
        if tuple(array.shape) != shape or array.dtype != jnp.dtype(dtype):
            raise ValueError(
                f"int4_mixed_gemm: {name} must be {jnp.dtype(dtype).name}{list(shape)} for x {list(x.shape)} "
                f"and codes {list(codes.shape)}; found {array.dtype}{list(array.shape)}"
            )

    if x.ndim != 2 or codes.ndim != 2:
        raise ValueError(
            f"int4_mixed_gemm: x must be [M, K] and codes [N, K/2]; found {list(x.shape)}, {list(codes.shape)}"
        )
    (m, k), n = x.shape, codes.shape[0]
    expect("codes", codes, (n, k // 2), "uint8")
    if scale.ndim != 2 or scale.shape[0] != n or scale.shape[1] < 1 or k % scale.shape[1]:
        raise ValueError(
            f"int4_mixed_gemm: scale must be [{n}, groups] with groups a divisor of K={k}; "
            f"found {list(scale.shape)}"
        )
    if zero_point is not None:
        expect("zero_point", zero_point, scale.shape, "int8")
    if bias is not None:
        expect("bias", bias, (n,), bias.dtype)
    group_size = k // scale.shape[1]
    reason = unsupported_reason(
        m, n, k, group_size=group_size, x_dtype=x.dtype, scale_dtype=scale.dtype
    )
    if reason:
        raise ValueError(f"int4_mixed_gemm: {reason}")
    return group_size


def _launch(x, codes, scale, zero_point, bias, m, group_size, config: TileConfig, num_sms):
    n, k = codes.shape[0], x.shape[1]
    row_tiles, column_tiles = pl.cdiv(n, config.rows), pl.cdiv(m, config.columns)
    workers = min(num_sms, row_tiles * column_tiles * config.splits)
    partial = config.splits > 1
    if partial:
        extents = (row_tiles * config.rows, column_tiles * config.columns)
        out_type = jax.ShapeDtypeStruct((config.splits, *extents), jnp.float32)
        width = plgpu.find_swizzle(min(config.columns, 32) * 32)
        out_shape = (config.warpgroups, 64, config.columns)
        out_transforms = (plgpu.TilingTransform((8, width // 4)), plgpu.SwizzleTransform(width))
    else:
        out_type = jax.ShapeDtypeStruct((m, n), x.dtype)
        out_shape = (config.warpgroups, config.columns, 64)
        out_transforms = (plgpu.SwizzleTransform(128),)
    operands = {"x": x, "codes": codes, "scale": scale}
    if zero_point is not None:
        operands["zero_point"] = zero_point
    if bias is not None and not partial:
        operands["bias"] = bias.astype(jnp.float32)
    body = functools.partial(
        _kernel,
        names=tuple(operands),
        config=config,
        group_size=group_size,
        counts=(row_tiles, column_tiles, pl.cdiv(k, config.depth), workers),
    )
    # A tiled TMA copy wants the array's columns in whole tiles.
    codes_swizzle = int(np.gcd(k // 2, config.depth // 2))
    out = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(workers,),
        grid_names=("worker",),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        kernel_name="int4_mixed_gemm",
        scratch_types=dict(
            codes_smem=plgpu.SMEM(
                (config.stages, config.rows, config.depth // 2),
                jnp.uint8,
                transforms=(
                    plgpu.TilingTransform((8, codes_swizzle)),
                    plgpu.SwizzleTransform(codes_swizzle),
                ),
            ),
            x_smem=plgpu.SMEM(
                (config.stages, config.columns, config.depth),
                x.dtype,
                transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
            ),
            out_smem=plgpu.SMEM(out_shape, out_type.dtype, transforms=out_transforms),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            empty=plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*operands.values())
    if not partial:
        return out
    out = jnp.sum(out, axis=0)[:n, :m].T
    if bias is not None:
        out = out + bias.astype(jnp.float32)[None, :]
    return out.astype(x.dtype)


def _kernel(
    *refs,
    names: tuple[str, ...],
    config: TileConfig,
    group_size: int,
    counts: tuple[int, int, int, int],
    codes_smem,
    x_smem,
    out_smem,
    full,
    empty,
):
    gmem = dict(zip(names, refs[:-1], strict=True))
    out_gmem = refs[-1]
    row_tiles, column_tiles, steps, workers = counts
    wg, worker = lax.axis_index("wg"), lax.axis_index("worker")
    my_units = (row_tiles * column_tiles * config.splits - worker + workers - 1) // workers

    def unit(i):
        """First row, first column, split and range of steps of this worker's i-th unit."""
        tile, split = lax.div(worker + i * workers, config.splits), 0
        if config.splits > 1:
            split = lax.rem(worker + i * workers, config.splits)
        row, column = plgpu.planar_snake(tile, (row_tiles, column_tiles), 0, 8)
        begin, end = split * steps // config.splits, (split + 1) * steps // config.splits
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

                plgpu.copy_gmem_to_smem(
                    gmem["codes"].at[
                        pl.ds(row, config.rows),
                        pl.ds(step * (config.depth // 2), config.depth // 2),
                    ],
                    codes_smem.at[slot],
                    full.at[slot],
                )
                plgpu.copy_gmem_to_smem(
                    gmem["x"].at[
                        pl.ds(column, config.columns), pl.ds(step * config.depth, config.depth)
                    ],
                    x_smem.at[slot],
                    full.at[slot],
                )
                return count + 1

            return lax.fori_loop(begin, end, load_step, count)

        count = lax.fori_loop(0, my_units, load_unit, 0)

        @pl.loop(lax.max(count - config.stages, 0), count)
        def _(i):
            plgpu.barrier_wait(empty.at[lax.rem(i, config.stages)])

    @pl.when(wg < config.warpgroups)
    def math():
        plgpu.set_max_registers({1: 232, 2: 232, 4: 104}[config.warpgroups], action="increase")
        shape = (64, config.columns)
        row_layout = plgpu.Layout.WGMMA.reduce(1)
        dtype = x_smem.dtype
        groups = gmem["scale"].shape[1]
        per_chunk = max(CHUNK // group_size, 1)
        width = CHUNK // per_chunk

        def multiply_unit(i, count):
            row, column, split, begin, end = unit(i)
            row = row + 64 * wg
            # A warpgroup past the last row computes rows that TMA does not store.
            rows = pl.ds(lax.min(row, gmem["codes"].shape[0] - 64), 64)

            def row_values(name, group):
                group = lax.min(group, groups - 1)
                return plgpu.load(gmem[name].at[rows, group], layout=row_layout, optimized=False)

            def chunk_groups(step, chunk):
                first = step * config.depth + chunk * CHUNK
                return [(first + g * width) // group_size for g in range(per_chunk)]

            def multiply_step(step, carry):
                count, total = carry
                slot = lax.rem(count, config.stages)
                chunks = range(config.depth // CHUNK)
                # Loads from device memory start before the wait, which hides their latency.
                scales = [
                    row_values("scale", g).astype(jnp.float32)
                    for c in chunks
                    for g in chunk_groups(step, c)
                ]
                offsets = []
                if "zero_point" in gmem:
                    offsets = [
                        (row_values("zero_point", g).astype(jnp.float32) + _offset(dtype)).astype(
                            dtype
                        )
                        for c in chunks
                        for g in chunk_groups(step, c)
                    ]
                plgpu.barrier_wait(full.at[slot])
                words = plgpu.load(
                    codes_smem.at[slot, pl.ds(64 * wg, 64)], layout=plgpu.Layout.WGMMA_8BIT
                )
                part = None
                for c in chunks:
                    mine = slice(c * per_chunk, (c + 1) * per_chunk)
                    weights = dequantize(
                        words[:, c * (CHUNK // 2) : (c + 1) * (CHUNK // 2)], dtype, offsets[mine]
                    )
                    for g in range(per_chunk):
                        part = mixed_product(
                            weights[:, g * width : (g + 1) * width],
                            x_smem.at[slot],
                            first=c * CHUNK + g * width,
                            recycle=part,
                        )
                        if c == len(chunks) - 1 and g == per_chunk - 1:
                            plgpu.barrier_arrive(empty.at[slot])
                        scale = lax.broadcast_in_dim(scales[c * per_chunk + g], shape, [0])
                        total = lax.optimization_barrier(total + part * scale)
                return count + 1, total

            zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
            count, total = lax.fori_loop(begin, end, multiply_step, (count, zeros))
            if "bias" in gmem:
                bias = plgpu.load(gmem["bias"].at[rows], layout=row_layout, optimized=False)
                total = total + lax.broadcast_in_dim(bias, shape, [0])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if config.splits > 1:
                out_smem[wg] = total
                target = out_gmem.at[split, pl.ds(row, 64), pl.ds(column, config.columns)]
            else:
                values = plgpu.layout_cast(total.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                out_smem.at[wg].T[...] = values
                target = out_gmem.at[pl.ds(column, config.columns), pl.ds(row, 64)]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[wg], target)
            return count

        lax.fori_loop(0, my_units, multiply_unit, 0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _offset(dtype: DTypeLike) -> float:
    """What 16-bit float bits | u exceed q by: the bits' bias and the code's."""
    return float(_BIAS[jnp.dtype(dtype).name][1] + 8)


def dequantize(words: Array, dtype: DTypeLike, offsets: list[Array]) -> Array:
    """Differences q - zero_point as 16-bit floats, columns permuted as `permute_columns` does.

    Args:
        words: uint8 [64, K/2] in ``Layout.WGMMA_8BIT``, u = q + 8 in each nibble.
        dtype: bfloat16 or float16.
        offsets: For each group of K/len(offsets) columns, [64] in ``Layout.WGMMA.reduce(1)``: zero_point plus
            `_offset`, in `dtype`; none for zero points of 0.

    Returns:
        [64, K] in ``Layout.WGMMA``.
    """
    shape = (64, 2 * words.shape[1])
    dtype = jnp.dtype(dtype)

    def emit(ctx, words, *offsets):
        del ctx
        return _emit_dequantize(words, offsets, shape, dtype)

    def reference(words, *offsets):
        nibbles = jnp.stack([words & jnp.uint8(15), words >> jnp.uint8(4)], axis=-1)
        q = permute_columns(nibbles.reshape(shape)).astype(jnp.float32) + _BIAS[dtype.name][1]
        if not offsets:
            return (q - _offset(dtype)).astype(dtype)
        offset = jnp.stack(offsets, axis=1).astype(jnp.float32)
        return (q - jnp.repeat(offset, shape[1] // len(offsets), axis=1)).astype(dtype)

    emit.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    return plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA_8BIT, *(row_layout for _ in offsets)),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.WGMMA),
    )(emit)(words, *offsets)


def _emit_dequantize(words, offsets, shape, dtype) -> fa.FragmentedArray:
    bits, _ = _BIAS[dtype.name]
    ptx_type = "bf16x2" if dtype == jnp.bfloat16 else "f16x2"
    i32 = ir.IntegerType.get_signless(32)
    element = ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get()
    pair = ir.VectorType.get((2,), element)
    lines = ["{", ".reg .b32 t<4>;", "mov.b32 t0, $4;"]
    lines += [f"shr.b32 t{i}, $4, {4 * i};" for i in (1, 2, 3)]
    for i in range(4):
        lines.append(f"lop3.b32 t{i}, t{i}, 0x000F000F, {bits * 0x10001:#x}, 0xEA;")  # (a & b) | c
        lines.append(
            f"sub.rn.{ptx_type} ${i}, t{i}, $5;"
            if dtype == jnp.bfloat16
            else f"sub.{ptx_type} ${i}, t{i}, $5;"
        )
    ptx = "\n".join([*lines, "}"])
    symmetric = int(np.asarray(_offset(dtype), dtype).view(np.uint16)) * 0x10001
    constant = llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, symmetric)).result
    out = np.empty(fa.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
    for index, register in np.ndenumerate(words.registers):
        word, half = index[1], index[4]  # 16 bytes a word column, rows 0-7 and 8-15 of a warp's 16
        offset = constant
        if offsets:
            group = word * 32 * len(offsets) // shape[1]
            value = offsets[group].registers[0, 0, half, 0, 0]
            offset = utils.bitcast(utils.vector_concat([value, value]), i32)
        results = llvm.inline_asm(
            llvm.StructType.get_literal([i32] * 4),
            [utils.bitcast(register, i32), offset],
            ptx,
            "=&r,=&r,=&r,=&r,r,r",
        )
        for i in range(4):
            value = utils.bitcast(llvm.extractvalue(i32, results, [i]), pair)
            out[0, 4 * word + i, 0, 0, half, 0, 0, 0, 0] = value
    return fa.FragmentedArray(_registers=out, _layout=fa.WGMMA_LAYOUT, _is_signed=None)
