"""The FP8 product of weight gradients for Hopper: scales for each row and 128 tokens on both sides.

``out[n, k] = sum_tb left_scale[tb, n] * right_scale[tb, k] * sum_{t in block tb} left[n, t] * right[k, t]``

The weight gradient of DeepSeek-V3's recipe (report, section 3.3; peer: DeepGEMM's 1D1D kernel): what is summed
over are tokens, so both operands, gradients [N, T] and activations [K, T], are quantized along them, and lie with
tokens contiguous as FP8 wgmma wants them; `fp8_quantize_transposed_sm90` writes both.

One CTA an SM, two math warpgroups and a producer::

    producer warpgroup                            math warpgroups (each `sub` x 64 rows)
    ------------------                            --------------------------------------
    for each tile of the output:                  for each tile of the output:
      for each 128 tokens:                          for each 128 tokens:
        wait   empty[slot]        <---------------+   wait   full[slot]
        TMA left  tile -> left_smem[slot]         |   for each 64 rows:
        TMA right tile -> right_smem[slot]        |     part = wgmma(left_smem, right_smem)   tensor cores
        TMA both scales -> scale_smem[slot]       |     sum += part * scale[column] * scale[row]
        (each arrives on full[slot]) -----------> +-- arrive empty[slot]
                                                    sum -> out_smem -> TMA store or TMA add, 32 or 64 columns
                                                    at a time, while the producer already loads the next tile

The promotion to float32 needs a multiplication more an element than `_fp8_gemm_sm90`'s, whose weights have
one scale for 128 columns: of 64x128 sums that is 64 FMUL and 64 FFMA a thread, 128 issue slots beside the 256
cycles that their wgmma takes. The two warpgroups alternate, so that one promotes while the other's wgmma runs, and
the tensor cores stay the bound. Column scales are read from shared memory where they are used: 32 registers a
thread for them are not left beside the sums of 128x128.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qjax.pallas_kernels._wgmma_sm90 import fp8_product

BLOCK_T = 128
MAX_SMEM = 227 * 1024
WARPGROUPS = 2

FP8_DTYPES = ("float8_e4m3fn", "float8_e5m2")
OUT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class WgradTileConfig:
    """How the product is cut.

    Attributes:
        sub: 64-row pieces of each of the two math warpgroups, promoted one after the other: 1 or 2.
        columns: Columns of a CTA's tile: 64 or 128.
        stages: Blocks of 128 tokens in flight.
    """

    sub: int
    columns: int
    stages: int

    def __post_init__(self):
        if self.sub not in (1, 2) or self.columns not in (64, 128) or self.stages < 1:
            raise ValueError(
                f"WgradTileConfig: no such tile; its docstring lists them; found {self}"
            )

    @property
    def rows(self) -> int:
        """Rows of a CTA's tile."""
        return 64 * self.sub * WARPGROUPS

    def smem_bytes(self) -> int:
        """Shared memory for the operand stages and the epilogue."""
        stage = (self.rows + self.columns) * (BLOCK_T + 4)
        alignment = 6 * 1024  # each buffer starts at a multiple of 1 KiB; the barriers are one
        return self.stages * stage + WARPGROUPS * 2 * 64 * 128 + alignment


def unsupported_reason(
    n: int,
    k: int,
    tokens: int,
    *,
    left_dtype: DTypeLike = "float8_e4m3fn",
    right_dtype: DTypeLike = "float8_e4m3fn",
    out_dtype: DTypeLike = "float32",
) -> str | None:
    """Why the kernel can't take left [n, tokens] and right [k, tokens], None if it can."""
    left_dtype, right_dtype, out_dtype = (
        jnp.dtype(d).name for d in (left_dtype, right_dtype, out_dtype)
    )
    if left_dtype not in FP8_DTYPES or right_dtype not in FP8_DTYPES:
        return f"the operands must be of {FP8_DTYPES}; found {left_dtype} and {right_dtype}"
    if out_dtype not in OUT_DTYPES:
        return f"the output must be one of {OUT_DTYPES}; found {out_dtype}"
    if min(n, k, tokens) < 1 or tokens % 16:
        return (
            f"tokens must be a multiple of 16, which TMA moves; found N={n}, K={k}, {tokens} tokens"
        )
    if k % 8:
        return f"K must be a multiple of 8, whole 16 bytes of the output; found K={k}"
    return None


def choose_tiles(n: int, k: int, tokens: int, *, num_sms: int) -> WgradTileConfig:
    """The tiling with the least modelled time; see `modelled_us`."""
    candidates = candidate_tiles()
    return min(candidates, key=lambda c: modelled_us(c, n, k, tokens, num_sms=num_sms))


def candidate_tiles() -> list[WgradTileConfig]:
    """The tilings worth considering, each with as many stages as fit, 6 at most."""
    candidates = []
    for sub, columns in ((2, 128), (1, 128), (1, 64)):
        fitting = (WgradTileConfig(sub, columns, stages) for stages in range(6, 1, -1))
        candidates.append(next(c for c in fitting if c.smem_bytes() <= MAX_SMEM))
    return candidates


def modelled_us(config: WgradTileConfig, n: int, k: int, tokens: int, *, num_sms: int) -> float:
    """Microseconds by counting waves, with the rates that `_fp8_gemm_sm90.modelled_us` fits to an H200's times.

    They are not measured for this kernel: its promotion is longer, and its tiles leave as float32.
    """
    tiles = pl.cdiv(n, config.rows) * pl.cdiv(k, config.columns)
    waves = pl.cdiv(tiles, num_sms)
    area = config.rows * config.columns
    overlap = 1.0 if area >= 256 * 128 else 0.95 if area >= 128 * 128 else 0.6
    math_us = 2 * area * BLOCK_T / (1.4e9 / num_sms * overlap)
    l2_us = (config.rows + config.columns) * BLOCK_T / (10e6 / num_sms)
    epilogue_us = 0.5 + 4 * area / (4.3e6 / num_sms * 2)
    memory_us = ((n + k) * tokens + 4 * n * k) / 4.3e6
    steps = pl.cdiv(tokens, BLOCK_T)
    return max(waves * (steps * max(math_us, l2_us) + epilogue_us), memory_us)


def fp8_wgrad_gemm(
    left: Array,
    left_scale: Array,
    right: Array,
    right_scale: Array,
    *,
    accumulator: Array | None = None,
    out_dtype: DTypeLike = "float32",
    config: WgradTileConfig | None = None,
    num_sms: int | None = None,
) -> Array:
    """left @ right.T of FP8 arrays with scales for each row and 128 columns of both.

    Args:
        left: [N, T], e4m3 or e5m2: gradients, tokens contiguous. T is a multiple of 16; columns past the last
            token are zeros.
        left_scale: float32 [ceil(T/128), N''], rows contiguous, N'' >= N a multiple of 4.
        right: [K, T], e4m3 or e5m2: activations.
        right_scale: float32 [ceil(T/128), K''], likewise.
        accumulator: float32 [N, K] that the product is added to, in place where it is donated.
        out_dtype: float32 or bfloat16; float32 with an accumulator.
        config: Tiling; default `choose_tiles`.
        num_sms: SMs to run on; default those of the first device.

    Returns:
        [N, K].

    Raises:
        ValueError: If shapes or dtypes are not those above, or `unsupported_reason` has a reason.
    """
    _check(left, left_scale, right, right_scale, accumulator, out_dtype)
    (n, tokens), k = left.shape, right.shape[0]
    num_sms = jax.devices()[0].core_count if num_sms is None else num_sms
    config = choose_tiles(n, k, tokens, num_sms=num_sms) if config is None else config
    tiles = (pl.cdiv(n, config.rows), pl.cdiv(k, config.columns))
    workers = min(num_sms, tiles[0] * tiles[1])
    out_type = jax.ShapeDtypeStruct((n, k), out_dtype)
    total = None if accumulator is None else jax.new_ref(accumulator)
    out = plgpu.kernel(
        functools.partial(
            _kernel,
            config=config,
            tiles=tiles,
            workers=workers,
            steps=pl.cdiv(tokens, BLOCK_T),
            add=total is not None,
        ),
        out_type=out_type if total is None else (),
        grid=(workers,),
        grid_names=("worker",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        kernel_name="fp8_wgrad_gemm",
        scratch_types=_scratch(config, left.dtype, right.dtype, out_type.dtype),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(left, right, left_scale, right_scale, *(() if total is None else (total,)))
    return out if total is None else jax.freeze(total)


def _check(left, left_scale, right, right_scale, accumulator, out_dtype) -> None:
    op = "fp8_wgrad_gemm"
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
        raise ValueError(
            f"{op}: needs left [N, T] and right [K, T] of one T; "
            f"found {list(left.shape)} and {list(right.shape)}"
        )
    (n, tokens), k = left.shape, right.shape[0]
    reason = unsupported_reason(
        n, k, tokens, left_dtype=left.dtype, right_dtype=right.dtype, out_dtype=out_dtype
    )
    if reason:
        raise ValueError(f"{op}: {reason}")
    blocks = pl.cdiv(tokens, BLOCK_T)
    for name, scale, rows in (("left", left_scale, n), ("right", right_scale, k)):
        fits = scale.ndim == 2 and scale.shape[0] == blocks and scale.shape[1] >= rows
        if not fits or scale.shape[1] % 4 or scale.dtype != jnp.float32:
            raise ValueError(
                f"{op}: {name}_scale must be float32 [{blocks}, R], R a multiple of 4 from {rows} on; "
                f"found {scale.dtype}{list(scale.shape)}"
            )
    if accumulator is not None and (
        accumulator.shape != (n, k)
        or accumulator.dtype != jnp.float32
        or jnp.dtype(out_dtype) != jnp.float32
    ):
        raise ValueError(
            f"{op}: an accumulator must be float32 [{n}, {k}], as the output is; "
            f"found {accumulator.dtype}{list(accumulator.shape)} and an output of {jnp.dtype(out_dtype)}"
        )


def _scratch(config: WgradTileConfig, left_dtype, right_dtype, out_dtype) -> dict:
    swizzled = (plgpu.SwizzleTransform(128),)  # no tiling: rows and tokens may be any number
    stages, columns = config.stages, 128 // jnp.dtype(out_dtype).itemsize
    return dict(
        left_smem=plgpu.SMEM((stages, config.rows, BLOCK_T), left_dtype, transforms=swizzled),
        right_smem=plgpu.SMEM((stages, config.columns, BLOCK_T), right_dtype, transforms=swizzled),
        scale_smem=plgpu.SMEM((stages, config.rows + config.columns), jnp.float32),
        out_smem=plgpu.SMEM((WARPGROUPS, 2, 64, columns), out_dtype, transforms=swizzled),
        full=plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    )


def _kernel(
    left_gmem,
    right_gmem,
    left_scale_gmem,
    right_scale_gmem,
    out_gmem,
    *,
    config: WgradTileConfig,
    tiles: tuple[int, int],
    workers: int,
    steps: int,
    add: bool,
    left_smem,
    right_smem,
    scale_smem,
    out_smem,
    full,
    empty,
):
    wg = lax.axis_index("wg")
    worker = lax.axis_index("worker")
    my_tiles = (tiles[0] * tiles[1] - worker + workers - 1) // workers

    def first(i):
        """First row and column of this CTA's i-th tile."""
        # Tiles that run together share rows and columns, which the L2 cache then serves.
        row, column = plgpu.planar_snake(worker + i * workers, tiles, 0, 8)
        return row * config.rows, column * config.columns

    @pl.when(wg == WARPGROUPS)
    def producer():
        plgpu.set_max_registers(40, action="decrease")

        def load_tile(i, count):
            row, column = first(i)

            def load_step(step, count):
                slot = lax.rem(count, config.stages)

                @pl.when(count >= config.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])
                    plgpu.commit_smem()  # orders the math warpgroups' reads before the next TMA writes

                rows, columns = pl.ds(row, config.rows), pl.ds(column, config.columns)
                block = pl.ds(step * BLOCK_T, BLOCK_T)
                plgpu.copy_gmem_to_smem(
                    left_gmem.at[rows, block], left_smem.at[slot], full.at[slot]
                )
                plgpu.copy_gmem_to_smem(
                    right_gmem.at[columns, block], right_smem.at[slot], full.at[slot]
                )
                plgpu.copy_gmem_to_smem(
                    left_scale_gmem.at[step, rows],
                    scale_smem.at[slot, pl.ds(0, config.rows)],
                    full.at[slot],
                )
                plgpu.copy_gmem_to_smem(
                    right_scale_gmem.at[step, columns],
                    scale_smem.at[slot, pl.ds(config.rows, config.columns)],
                    full.at[slot],
                )
                return count + 1

            return lax.fori_loop(0, steps, load_step, count)

        count = lax.fori_loop(0, my_tiles, load_tile, 0)

        # Each arrival has its wait, so that no barrier is left in the middle of a phase.
        @pl.loop(lax.max(count - config.stages, 0), count)
        def _(i):
            plgpu.barrier_wait(empty.at[lax.rem(i, config.stages)])

    @pl.when(wg < WARPGROUPS)
    def math():
        plgpu.set_max_registers(232, action="increase")
        my_row = 64 * config.sub * wg
        shape, layout = (64, config.columns), plgpu.Layout.WGMMA

        def multiply_step(step, carry):
            count, sums = carry
            slot = lax.rem(count, config.stages)
            plgpu.barrier_wait(full.at[slot])
            new_sums, product = [], None
            for j, total in enumerate(sums):
                piece = pl.ds(my_row + 64 * j, 64)
                row_scale = plgpu.load(scale_smem.at[slot, piece], layout=layout.reduce(1))
                part = product = fp8_product(
                    left_smem.at[slot, piece],
                    right_smem.at[slot],
                    swizzle=128,
                    tiled=False,
                    recycle=product if steps > 1 else None,
                )
                column_scale = plgpu.load(
                    scale_smem.at[slot, pl.ds(config.rows, config.columns)], layout=layout.reduce(0)
                )
                part = part * lax.broadcast_in_dim(column_scale, shape, [1])
                part = part * lax.broadcast_in_dim(row_scale, shape, [0])
                new_sums.append(lax.optimization_barrier(total + part))
            plgpu.barrier_arrive(empty.at[slot])
            return count + 1, tuple(new_sums)

        def multiply_tile(i, count):
            row, column = first(i)
            zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
            count, sums = lax.fori_loop(0, steps, multiply_step, (count, (zeros,) * config.sub))
            _store(sums, out_smem.at[wg], out_gmem, row + my_row, column, add=add)
            return count

        lax.fori_loop(0, my_tiles, multiply_tile, 0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store(sums, out_smem, out_gmem, row, column, *, add: bool) -> None:
    """Moves a warpgroup's sums through two alternating buffers to `out_gmem`; TMA cuts what is outside."""
    width = out_smem.shape[-1]
    pieces = sums[0].shape[1] // width
    # Across tiles the buffers alternate too if a tile has an even number of pieces.
    in_flight = 1 if pieces * len(sums) % 2 == 0 else 0
    for j, total in enumerate(sums):
        for c in range(pieces):
            slot = (j * pieces + c) % 2
            plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)
            out_smem[slot] = total[:, c * width : (c + 1) * width].astype(out_gmem.dtype)
            plgpu.commit_smem()
            target = out_gmem.at[pl.ds(row + 64 * j, 64), pl.ds(column + c * width, width)]
            plgpu.copy_smem_to_gmem(
                out_smem.at[slot], target, **(dict(reduction_op="add") if add else {})
            )
