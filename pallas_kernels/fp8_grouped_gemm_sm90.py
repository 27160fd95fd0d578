"""Grouped FP8 matrix products for Hopper: each group of rows (a mixture's tokens of one expert) meets its own weight.

``out[t, n] = sum_kb x_scale[kb, t] * w_scale[e, n // 128, kb] * sum_{k in block kb} x[t, k] * w[e, n, k]``, e the
group of row t; or with a scale for each row and each channel. The scheme is DeepSeek-V3's (report, section
3.3; peer: DeepGEMM's contiguous and masked layouts), the warpgroups, barriers and promotion to float32 are
those that `_fp8_gemm_sm90` draws. What differs:

- A tile is a line of a table (group, first row, rows, number of tiles) that XLA computes from the group sizes
  and the kernel reads as scalars, one unit ahead. Empty groups have no line, so nothing runs for them.
- A tile starts wherever its group starts. TMA takes any first row, because the operands lie in shared memory
  swizzled but not tiled: 128 columns of FP8 are one swizzle, so the bytes are those that wgmma reads.
- A tile's last rows may belong to the next group: they are multiplied, for nothing, but not stored. The
  store of a short tile goes in pieces of a power of two rows.
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
from jax.typing import DTypeLike

from qjax.pallas_kernels._wgmma_sm90 import fp8_product

BLOCK_K = 128
MAX_SMEM = 227 * 1024
BAND = 8  # tiles of tokens that meet the same tiles of the weight before the next ones do

FP8_DTYPES = ("float8_e4m3fn", "float8_e5m2")
OUT_DTYPES = ("bfloat16", "float16")

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
        cluster: CTAs (1 or 2) side by side along N that share each tile of tokens by multicast.
    """

    swap: bool
    tokens: int
    weights: int
    stages: int
    cluster: int = 1

    @property
    def rows(self) -> int:
        """Rows of wgmma's left operand in a CTA's tile."""
        return self.weights if self.swap else self.tokens

    @property
    def columns(self) -> int:
        """Rows of wgmma's right operand."""
        return self.tokens if self.swap else self.weights

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
        """Scales of x in a stage; a TMA destination must be 128-byte aligned in every stage."""
        return pl.cdiv(self.tokens, 32) * 32

    def smem_bytes(self) -> int:
        """Shared memory for the operand stages and the epilogue."""
        stage = (self.tokens + self.weights) * BLOCK_K + 4 * self.scale_slots
        epilogue = self.warpgroups * 64 * 2 * (self.tokens if self.swap else 128)
        return (
            self.stages * stage + epilogue + 6 * 1024
        )  # each buffer starts at a multiple of 1 KiB


def unsupported_reason(
    n: int,
    k: int,
    *,
    x_dtype: DTypeLike = "float8_e4m3fn",
    w_dtype: DTypeLike = "float8_e4m3fn",
    out_dtype: DTypeLike = "bfloat16",
) -> str | None:
    """Why the kernels can't take x [..., k] and w [E, n, k], None if they can."""
    x_dtype, w_dtype, out_dtype = (jnp.dtype(d).name for d in (x_dtype, w_dtype, out_dtype))
    if x_dtype not in FP8_DTYPES or w_dtype not in FP8_DTYPES:
        return f"x and w must be one of {FP8_DTYPES}; found {x_dtype} and {w_dtype}"
    if out_dtype not in OUT_DTYPES:
        return f"the output must be one of {OUT_DTYPES}; found {out_dtype}"
    if min(n, k) < 1 or n % 8 or k % 16:
        return (
            f"N must be a multiple of 8 and K of 16, the bytes that TMA moves; found N={n}, K={k}"
        )
    return None


def choose_tiles(rows: float, groups: int, n: int, *, num_sms: int) -> GroupedTileConfig:
    """The tiling with the least modelled time for so many rows a group; see `modelled_cycles`."""
    return min(
        candidate_tiles(rows, n),
        key=lambda c: modelled_cycles(c, rows, groups, n, num_sms=num_sms),
    )


def candidate_tiles(rows: float, n: int) -> list[GroupedTileConfig]:
    """The tilings worth considering, each with as many stages as fit, 8 at most."""
    clusters = (1, 2) if n > 128 else (1,)
    parts = [(True, tokens, weights, 1) for tokens in (8, 16, 32, 64) for weights in (64, 128)]
    parts += [(True, t, 128, c) for t in (64, 96, 128, 160) for c in clusters]
    if rows > 64:
        parts += [(False, tokens, 128, c) for tokens in (128, 256) for c in clusters]
    return [with_stages(*part) for part in parts]


def with_stages(swap: bool, tokens: int, weights: int, cluster: int = 1) -> GroupedTileConfig:
    """The tiling with as many stages as fit, 8 at most."""
    config = GroupedTileConfig(swap, tokens, weights, 2, cluster)
    while config.stages < 8:
        deeper = dataclasses.replace(config, stages=config.stages + 1)
        if deeper.smem_bytes() > MAX_SMEM:
            break
        config = deeper
    return config


def modelled_cycles(
    config: GroupedTileConfig, rows: float, groups: int, n: int, *, num_sms: int
) -> float:
    """Clocks for 128 of K, if groups have between half and one and a half times `rows` rows.

    Each step of a tile costs the slowest of its bytes from memory (19 a clock and SM on an H200), its bytes
    through the L2 cache (27) and its arithmetic (8192 operations, of which a promoting kernel gets about 70 %).
    """
    spread = [max(rows * share, 1) for share in (0.5, 0.75, 1.0, 1.25, 1.5)]
    tiles = groups * sum(-(-r // config.tokens) for r in spread) / len(spread)
    units = tiles * pl.cdiv(n, config.weights * config.cluster) * config.cluster
    waves = -(-units // num_sms) if units < 8 * num_sms else units / num_sms
    l2 = (config.tokens / config.cluster + config.weights) * BLOCK_K / 27
    math = 2 * config.tokens * config.weights * BLOCK_K / (8192 * 0.7) + 60
    memory = groups * (n + rows) * BLOCK_K / (19 * num_sms)
    return max(waves * max(l2, math), memory) + 0.02 * waves * math


def fp8_block_grouped_gemm(
    x: Array,
    x_scale: Array,
    w: Array,
    w_scale: Array,
    group_sizes: Array,
    *,
    bias: Array | None = None,
    out_dtype: DTypeLike = "bfloat16",
    expected_rows: int | None = None,
    config: GroupedTileConfig | None = None,
    num_sms: int | None = None,
) -> Array:
    """Rows of each group of x times their own w[e].T, of block-scaled FP8 arrays.

    Args:
        x: e4m3 or e5m2; contiguous layout: [T, K], rows sorted by group, no padding between groups; masked
            layout: [E, M, K], of each group the first rows.
        x_scale: float32 [ceil(K/128), M''], tokens contiguous, M'' at least the rows of x (E*M of the masked
            layout) and a multiple of 4; `fp8_quantize_1x128` of x.reshape(-1, K) writes this layout.
        w: [E, N, K], e4m3 or e5m2.
        w_scale: float32 [E, ceil(N/128), ceil(K/128)].
        group_sizes: int32 [E], rows of each group, any that are not negative; in the contiguous layout their
            sum is at most T, in the masked one each is at most M.
        bias: [E, N], floating, added in float32.
        out_dtype: bfloat16 or float16.
        expected_rows: Rows of a group to choose the tiling for; default those of an even spread of x's rows.
        config: Tiling; default `choose_tiles`.
        num_sms: SMs to run on; default those of the first device.

    Returns:
        [T, N], rows past the groups zeros; or [E, M, N], rows past a group's size undefined.

    Raises:
        ValueError: If shapes or dtypes are not those above, or `unsupported_reason` has a reason.
    """
    op = "fp8_block_grouped_gemm"
    _check(op, x, w, group_sizes, bias, out_dtype)
    groups, n, k = w.shape
    rows, blocks_k = x.size // k, pl.cdiv(k, BLOCK_K)
    if w_scale.shape != (groups, pl.cdiv(n, BLOCK_K), blocks_k):
        raise ValueError(
            f"{op}: w_scale of w {list(w.shape)} must be [{groups}, {pl.cdiv(n, BLOCK_K)}, {blocks_k}]; "
            f"found {list(w_scale.shape)}"
        )
    if x_scale.ndim != 2 or x_scale.shape[0] != blocks_k or x_scale.shape[1] < rows:
        raise ValueError(
            f"{op}: x_scale must be [{blocks_k}, M''] with M'' >= {rows}, tokens last; "
            f"found {list(x_scale.shape)}"
        )
    if x_scale.shape[1] % 4:
        raise ValueError(
            f"{op}: x_scale's rows must be whole 16 bytes: pad its last axis to a multiple of 4; "
            f"found {list(x_scale.shape)}"
        )
    return _grouped(
        op,
        "block",
        x,
        x_scale,
        w,
        w_scale,
        group_sizes,
        bias,
        out_dtype,
        expected_rows,
        config,
        num_sms,
    )


def fp8_rowwise_grouped_gemm(
    x: Array,
    x_scale: Array,
    w: Array,
    w_scale: Array,
    group_sizes: Array,
    *,
    bias: Array | None = None,
    out_dtype: DTypeLike = "bfloat16",
    expected_rows: int | None = None,
    config: GroupedTileConfig | None = None,
    num_sms: int | None = None,
) -> Array:
    """Rows of each group of x times their own w[e].T, of FP8 arrays with a scale for each token and channel.

    Args:
        x: As `fp8_block_grouped_gemm`'s.
        x_scale: float32, x.shape[:-1].
        w: [E, N, K], e4m3 or e5m2.
        w_scale: float32 [E, N].
        group_sizes: int32 [E], as `fp8_block_grouped_gemm`'s.
        bias: [E, N], floating, added in float32.
        out_dtype: bfloat16 or float16.
        expected_rows: As `fp8_block_grouped_gemm`'s.
        config: Tiling; default `choose_tiles`.
        num_sms: SMs to run on; default those of the first device.

    Returns:
        As `fp8_block_grouped_gemm`.

    Raises:
        ValueError: If shapes or dtypes are not those above, or `unsupported_reason` has a reason.
    """
    op = "fp8_rowwise_grouped_gemm"
    _check(op, x, w, group_sizes, bias, out_dtype)
    if x_scale.shape != x.shape[:-1] or w_scale.shape != w.shape[:-1]:
        raise ValueError(
            f"{op}: x_scale must be {list(x.shape[:-1])} and w_scale {list(w.shape[:-1])}; "
            f"found {list(x_scale.shape)} and {list(w_scale.shape)}"
        )
    return _grouped(
        op,
        "row",
        x,
        x_scale.reshape(-1),
        w,
        w_scale,
        group_sizes,
        bias,
        out_dtype,
        expected_rows,
        config,
        num_sms,
    )


def _check(op, x, w, group_sizes, bias, out_dtype) -> None:
    if w.ndim != 3 or x.ndim not in (2, 3) or x.shape[-1] != w.shape[-1] or 0 in x.shape:
        raise ValueError(
            f"{op}: x must be [T, K] or [E, M, K] and w [E, N, K], none of them empty; "
            f"found {list(x.shape)} and {list(w.shape)}"
        )
    groups, n, k = w.shape
    reason = unsupported_reason(n, k, x_dtype=x.dtype, w_dtype=w.dtype, out_dtype=out_dtype)
    if reason:
        raise ValueError(f"{op}: {reason}")
    if x.ndim == 3 and x.shape[0] != groups:
        raise ValueError(
            f"{op}: x [E, M, K] must have the {groups} groups of w; found {list(x.shape)}"
        )
    if group_sizes.shape != (groups,) or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"{op}: group_sizes must be int32 [{groups}] as w is {list(w.shape)}; "
            f"found {group_sizes.dtype} {list(group_sizes.shape)}"
        )
    if bias is not None and bias.shape != (groups, n):
        raise ValueError(f"{op}: bias must be [{groups}, {n}]; found {list(bias.shape)}")


def _grouped(
    op,
    scaling: Scaling,
    x,
    x_scale,
    w,
    w_scale,
    group_sizes,
    bias,
    out_dtype,
    expected_rows,
    config,
    num_sms,
) -> Array:
    """The checked product."""
    if x_scale.dtype != jnp.float32 or w_scale.dtype != jnp.float32:
        raise ValueError(f"{op}: scales must be float32; found {x_scale.dtype} and {w_scale.dtype}")
    groups, n, k = w.shape
    lead = x.shape[:-1]
    x = x.reshape(-1, k)
    num_sms = jax.devices()[0].core_count if num_sms is None else num_sms
    if config is None:
        rows = x.shape[0] / groups if expected_rows is None else expected_rows
        config = choose_tiles(rows, groups, n, num_sms=num_sms)
    tiles_n = pl.cdiv(n, config.weights * config.cluster)
    table = _tile_table(group_sizes, lead, config.tokens)
    workers = min(num_sms // config.cluster, table.shape[0] * tiles_n)
    operands = {"table": table, "x": x, "w": w}
    # Plain loads know no bounds: these vectors cover whole tiles.
    cover_n = tiles_n * config.weights * config.cluster - n
    if scaling == "block":
        operands |= {"x_scale": x_scale, "w_scale": w_scale}
    else:
        operands["x_scale"] = jnp.pad(x_scale, (0, config.tokens))
        operands["w_scale"] = jnp.pad(w_scale, ((0, 0), (0, cover_n))) if cover_n else w_scale
    if bias is not None:
        operands["bias"] = jnp.pad(bias.astype(jnp.float32), ((0, 0), (0, cover_n)))
    out_type = jax.ShapeDtypeStruct((x.shape[0], n), jnp.dtype(out_dtype))
    out = plgpu.kernel(
        functools.partial(
            _kernel,
            names=tuple(operands),
            config=config,
            scaling=scaling,
            tiles_n=tiles_n,
            workers=workers,
        ),
        out_type=out_type,
        grid=(workers,),
        grid_names=("worker",),
        cluster=(config.cluster,),
        cluster_names=("cluster",),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        kernel_name=f"fp8_{scaling}_grouped_gemm",
        scratch_types=_scratch(config, x.dtype, w.dtype, out_type.dtype, scaling),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*operands.values())
    return out.reshape(*lead, n)


def _tile_table(group_sizes: Array, lead: tuple[int, ...], tokens: int) -> Array:
    """int32 [most tiles, 4]: each tile's group, first row and number of rows, and the number of tiles.

    Rows of the contiguous layout past the last group are group E, which the kernel fills with zeros.
    """
    groups = group_sizes.shape[0]
    order = jnp.arange(groups)
    if len(lead) == 2:
        sizes = jnp.clip(group_sizes, 0, lead[1])
        starts = order * lead[1]
        most = groups * pl.cdiv(lead[1], tokens)
    else:
        # Sums over [E, E] fuse into one small kernel; a cumulative sum would be several.
        before = order[:, None] > order[None, :]
        starts = jnp.sum(jnp.where(before, jnp.maximum(group_sizes, 0)[None, :], 0), axis=1)
        starts = jnp.minimum(jnp.append(starts, starts[-1] + group_sizes[-1]), lead[0])
        sizes = jnp.append(starts[1:], lead[0]) - starts
        groups += 1
        most = (lead[0] + min(groups, lead[0]) * (tokens - 1)) // tokens
    order = jnp.arange(groups)
    counts = (sizes + tokens - 1) // tokens
    ends = jnp.sum(jnp.where(order[:, None] >= order[None, :], counts[None, :], 0), axis=1)
    tile = jnp.arange(most)
    group = jnp.sum((tile[:, None] >= ends[None, :]).astype(jnp.int32), axis=1)
    group = jnp.minimum(group, groups - 1)
    offset = (tile - (ends - counts)[group]) * tokens
    rows = jnp.minimum(sizes[group] - offset, tokens)
    total = jnp.broadcast_to(ends[-1], (most,))
    return jnp.stack([group, starts[group] + offset, rows, total], axis=1).astype(jnp.int32)


def _scratch(config: GroupedTileConfig, x_dtype, w_dtype, out_dtype, scaling: Scaling) -> dict:
    swizzled = (plgpu.SwizzleTransform(128),)
    out_shape = (1, config.columns, 64) if config.swap else (2, 64, 64)
    arrivals = dict(num_arrivals=config.warpgroups, num_barriers=config.stages)
    if config.cluster > 1:
        empty = plgpu.ClusterBarrier(collective_axes=("cluster",), **arrivals)
    else:
        empty = plgpu.Barrier(**arrivals)
    stages, copies = config.stages, 3 if scaling == "block" else 2
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
class _Unit:
    """One CTA's tile: the scalars that its line of the table and its place in the order say."""

    group: Array
    first: Array
    rows: Array
    weight: Array

    @property
    def fields(self) -> tuple[Array, ...]:
        return self.group, self.first, self.rows, self.weight


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
    out_gmem = refs[-1]
    table, groups = gmem["table"], gmem["w"].shape[0]
    k_steps = pl.cdiv(gmem["w"].shape[2], BLOCK_K)
    wg = lax.axis_index("wg")
    cta = lax.axis_index("cluster")
    worker = lax.axis_index("worker")
    total = table[0, 3]
    my_units = (total * tiles_n - worker + workers - 1) // workers

    def unit(i):
        """This worker's i-th unit; of the last one also if i is beyond."""
        index = worker + lax.max(lax.min(i, my_units - 1), 0) * workers
        tile, column = plgpu.planar_snake(index, (lax.max(total, 1), tiles_n), 0, BAND)
        tile = lax.min(tile, table.shape[0] - 1)
        weight = (column * config.cluster + cta) * config.weights
        return table[tile, 0], table[tile, 1], table[tile, 2], weight

    def steps(group):
        return jnp.where(group < groups, k_steps, 0)

    def each_unit(body, state):
        """body(unit, state) for each unit; the next one's scalars load meanwhile."""

        def step(i, carry):
            state, fields = carry
            following = unit(i + 1)
            return body(_Unit(*fields), state), following

        return lax.fori_loop(0, my_units, step, (state, unit(0)))[0]

    @pl.when(wg == config.warpgroups)
    def producer():
        plgpu.set_max_registers(40, action="decrease")

        def load_unit(tile, count):
            def load_step(step, count):
                slot = lax.rem(count, config.stages)

                @pl.when(count >= config.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])
                    plgpu.commit_smem()  # orders the math warpgroups' reads before the next TMA writes

                depth = pl.ds(step * BLOCK_K, BLOCK_K)
                plgpu.copy_gmem_to_smem(
                    gmem["x"].at[pl.ds(tile.first, config.tokens), depth],
                    x_smem.at[slot],
                    full.at[slot],
                    **(dict(collective_axes="cluster") if config.cluster > 1 else {}),
                )
                plgpu.copy_gmem_to_smem(
                    gmem["w"].at[tile.group, pl.ds(tile.weight, config.weights), depth],
                    w_smem.at[slot],
                    full.at[slot],
                )
                if scaling == "block":
                    plgpu.copy_gmem_to_smem(
                        gmem["x_scale"].at[step, pl.ds(tile.first, config.scale_slots)],
                        scale_smem.at[slot],
                        full.at[slot],
                    )
                return count + 1

            return lax.fori_loop(0, steps(tile.group), load_step, count)

        count = each_unit(load_unit, 0)

        # No CTA may leave while the other still arrives on its barriers.
        @pl.loop(lax.max(count - config.stages, 0), count)
        def _(i):
            plgpu.barrier_wait(empty.at[lax.rem(i, config.stages)])

    @pl.when(wg < config.warpgroups)
    def math():
        plgpu.set_max_registers(232, action="increase")
        my_rows = 64 * config.sub * wg
        left_smem, right_smem = (w_smem, x_smem) if config.swap else (x_smem, w_smem)
        shape = (64, config.columns)
        # x's scales run along the tile's columns if it is the right operand, else along its rows.
        x_axis = 1 if config.swap else 0
        x_layout = plgpu.Layout.WGMMA.reduce(1 - x_axis)

        def multiply_unit(tile, count):
            weight = tile.weight + my_rows if config.swap else tile.weight

            def w_scale(step):
                if scaling == "row":
                    return jnp.float32(1)
                block = lax.min(weight // BLOCK_K, gmem["w_scale"].shape[1] - 1)
                return gmem["w_scale"][tile.group, block, step]

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
                        swizzle=128,
                        tiled=False,
                        recycle=product,
                    )
                    if j == len(sums) - 1:
                        plgpu.barrier_arrive(empty.at[slot])
                    if scales is not None:
                        part = part * lax.broadcast_in_dim(scales * scale, shape, [x_axis])
                    new_sums.append(lax.optimization_barrier(total + part))
                return count + 1, tuple(new_sums)

            zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
            carry = (count, (zeros,) * config.sub)
            count, sums = lax.fori_loop(0, steps(tile.group), multiply_step, carry)
            for j, total in enumerate(sums):
                _store(total, j, my_rows + 64 * j, tile, gmem, out_gmem, out_smem.at[wg], config)
            return count

        each_unit(multiply_unit, 0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store(total, j, row, tile: _Unit, gmem, out_gmem, out_smem, config: GroupedTileConfig):
    """Scales a 64-row piece of the tile by its vectors and moves it through shared memory to `out_gmem`."""
    layout, groups = plgpu.Layout.WGMMA, gmem["w"].shape[0]
    group = lax.min(tile.group, groups - 1)

    def vector(ref, first, shape, axis):
        ref = ref.at[pl.ds(first, shape[axis])]
        values = plgpu.load(ref, layout=layout.reduce(1 - axis), optimized=False)
        return lax.broadcast_in_dim(values, shape, [axis])

    def finish(values, token, weight):
        x_axis = 1 if config.swap else 0
        shape, scaled = values.shape, values
        if gmem["x_scale"].ndim == 1:
            scaled = scaled * vector(gmem["x_scale"], token, shape, x_axis)
            scaled = scaled * vector(gmem["w_scale"].at[group], weight, shape, 1 - x_axis)
        if "bias" in gmem:
            scaled = scaled + vector(gmem["bias"].at[group], weight, shape, 1 - x_axis)
        if scaled is not values:  # rows past the groups stay zeros
            inside = lax.broadcast(tile.group, shape) < groups
            scaled = jnp.where(inside, scaled, values)
        return scaled.astype(out_gmem.dtype)

    def stage(slot, in_flight, values, token, weight, rows):
        # A short piece is several copies, so what is in flight is counted among whole pieces only.
        for counted, waits in (
            (rows >= out_smem.shape[1], in_flight),
            (rows < out_smem.shape[1], 0),
        ):
            pl.when(counted)(functools.partial(plgpu.wait_smem_to_gmem, waits, wait_read_only=True))
        if config.swap:
            values = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)
            out_smem.at[slot].T[...] = values
        else:
            out_smem[slot] = values
        plgpu.commit_smem()
        _store_rows(out_smem.at[slot], out_gmem, token, weight, rows)

    if config.swap:
        weight = tile.weight + row
        stage(0, 0, finish(total, tile.first, weight), tile.first, weight, tile.rows)
        return
    pieces = config.columns // 64
    # Two buffers alternate, across units too if a unit has an even number of pieces.
    in_flight = 1 if pieces * config.sub % 2 == 0 else 0
    for c in range(pieces):
        token, weight = tile.first + row, tile.weight + 64 * c
        values = finish(total[:, 64 * c : 64 * (c + 1)], token, weight)
        stage((j * pieces + c) % 2, in_flight, values, token, weight, tile.rows - row)


def _store_rows(smem, out_gmem, token, weight, rows):
    """Stores the first `rows` rows (any number) of `smem`; TMA cuts columns past the output's last."""
    whole, columns = smem.shape[0], pl.ds(weight, 64)

    @pl.when(rows >= whole)
    def _():
        plgpu.copy_smem_to_gmem(smem, out_gmem.at[pl.ds(token, whole), columns])

    @pl.when(rows < whole)
    def _():
        left, offset = lax.max(rows, 0), 0
        size = 1 << (whole - 1).bit_length() - 1
        while size:

            def copy(size=size, offset=offset):
                target = out_gmem.at[pl.ds(token + offset, size), columns]
                plgpu.copy_smem_to_gmem(smem.at[pl.ds(offset, size)], target)

            pl.when(left & size != 0)(copy)
            offset += left & size
            size //= 2
