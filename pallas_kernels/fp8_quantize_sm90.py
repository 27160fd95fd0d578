"""FP8 quantization of activations for Hopper, scales in the layout that the FP8 GEMMs read.

Rounding is to nearest, ties to even; values past the grid saturate, infinities too, and do not count in a
block's amax; NaN stays NaN and makes its block's scale NaN; a block of zeros gets scale 1.

`fp8_quantize_1x128` and `fp8_quantize_static`, one warpgroup a CTA, each CTA 64 rows and `TILES` x 128 columns::

    TMA all tiles -> x_smem[t] (bf16)          one barrier a tile, all copies in flight at once
    for each tile t:
      wait barrier[t]
      amax over 128 columns (registers)  ->  scale  ->  scale[k block, rows] (plain store)
      x / scale  ->  q_smem[t]  ->  TMA store, in flight until the CTA ends

`fp8_quantize_per_token`, one warpgroup a row: the row stays in registers between its amax and its division.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qjax.pallas_kernels import _quantize_sm90 as tools

ROWS = 64
BLOCK_K = 128
HALF = 64  # columns of one TMA copy: 128 bytes of bf16, one row of the swizzle
MAX_ROW = 16384  # elements of a row that fit a warpgroup's registers
IN_DTYPES = ("bfloat16", "float16")
OUT_DTYPES = ("float8_e4m3fn", "float8_e5m2")


def unsupported_reason(
    m: int, k: int, *, x_dtype: DTypeLike = "bfloat16", per_token: bool = False
) -> str | None:
    """Why the kernels can't take x [m, k], None if they can."""
    if jnp.dtype(x_dtype).name not in IN_DTYPES:
        return f"x must be one of {IN_DTYPES}; found {jnp.dtype(x_dtype).name}"
    if m < 1 or k < 16 or k % 16:
        return f"K must be a multiple of 16 (TMA moves 16 bytes) and M positive; found M={m}, K={k}"
    if per_token and (k > MAX_ROW or k % 256):
        return f"a per-token row must fit registers: K a multiple of 256 up to {MAX_ROW}; found {k}"
    return None


def padded_rows(m: int) -> int:
    """Rows of the quantized array: a multiple of 8 as the GEMM's TMA wants, or m up to 8."""
    return m if m <= 8 else pl.cdiv(m, 8) * 8


def fp8_quantize_1x128(
    x: Array,
    *,
    dtype: DTypeLike = "float8_e4m3fn",
    amax_min: float = 0.0,
    amax_max: float | None = None,
) -> tuple[Array, Array]:
    """Quantizes with one scale for each row and 128 columns.

    Args:
        x: [M, K], bfloat16 or float16.
        dtype: float8_e4m3fn or float8_e5m2.
        amax_min: Floor of a block's amax, in x's units (DeepSeek-V3: 1e-4).
        amax_max: Upper bound of a block's amax.

    Returns:
        Codes [`padded_rows(M)`, K], and float32 scales [ceil(K/128), M''], M'' = M rounded up to 64; the padding
        rows are zeros with scale 1.

    Raises:
        ValueError: If `unsupported_reason` has a reason.
    """
    return _quantize_tiles("fp8_quantize_1x128", x, None, dtype, amax_min, amax_max)


def fp8_quantize_static(x: Array, scale: Array, *, dtype: DTypeLike = "float8_e4m3fn") -> Array:
    """Quantizes with a given scale: codes [`padded_rows(M)`, K] of x [M, K].

    Args:
        x: [M, K], bfloat16 or float16.
        scale: float32 [1].
        dtype: float8_e4m3fn or float8_e5m2.

    Raises:
        ValueError: If `unsupported_reason` has a reason, or the scale is not float32 [1].
    """
    if scale.shape != (1,) or scale.dtype != jnp.float32:
        raise ValueError(
            f"fp8_quantize_static: scale must be float32 [1]; found {scale.dtype}{list(scale.shape)}"
        )
    return _quantize_tiles("fp8_quantize_static", x, scale, dtype, 0.0, None)


def fp8_quantize_per_token(
    x: Array,
    *,
    dtype: DTypeLike = "float8_e4m3fn",
    amax_min: float = 0.0,
    amax_max: float | None = None,
) -> tuple[Array, Array]:
    """Quantizes with one scale a row.

    Args:
        x: [M, K], bfloat16 or float16.
        dtype: float8_e4m3fn or float8_e5m2.
        amax_min: Floor of a row's amax, in x's units.
        amax_max: Upper bound of a row's amax (FBGEMM's activation_scale_ub).

    Returns:
        Codes [`padded_rows(M)`, K] (padding rows are not written) and float32 scales [M].

    Raises:
        ValueError: If `unsupported_reason` has a reason.
    """
    m, k = x.shape
    _check("fp8_quantize_per_token", x, dtype, per_token=True)
    vector = next(v for v in (8, 4, 2) if k % (128 * v) == 0)

    def quantize_row(x_gmem, q_gmem, scale_gmem):
        row = lax.axis_index("row")
        layout = plgpu.Layout.WG_STRIDED((k,), vec_size=vector)
        values = plgpu.load(x_gmem.at[row], layout=layout).astype(jnp.float32)
        amax = jnp.max(tools.finite_magnitude(values))
        scale = tools.scale_of(amax, tools.largest(dtype), amax_min=amax_min, amax_max=amax_max)
        spread = plgpu.layout_cast(jnp.broadcast_to(scale, values.shape), layout)
        q_gmem[row] = tools.quantize(values, spread, dtype, layout)
        scale_gmem[row] = scale

    return plgpu.kernel(
        quantize_row,
        out_type=(
            jax.ShapeDtypeStruct((padded_rows(m), k), dtype),
            jax.ShapeDtypeStruct((m,), jnp.float32),
        ),
        grid=(m,),
        grid_names=("row",),
        num_threads=1,
        thread_name="wg",
    )(x)


def _check(op: str, x: Array, dtype: DTypeLike, *, per_token: bool = False) -> None:
    if x.ndim != 2:
        raise ValueError(f"{op}: x must be [M, K]; found {list(x.shape)}")
    reason = unsupported_reason(*x.shape, x_dtype=x.dtype, per_token=per_token)
    if jnp.dtype(dtype).name not in OUT_DTYPES:
        reason = f"the codes must be one of {OUT_DTYPES}; found {jnp.dtype(dtype).name}"
    if reason:
        raise ValueError(f"{op}: {reason}")


def _quantize_tiles(op, x, scale, dtype, amax_min, amax_max):
    _check(op, x, dtype)
    m, k = x.shape
    row_tiles, blocks = pl.cdiv(m, ROWS), pl.cdiv(k, BLOCK_K)
    # More tiles a CTA keep more copies in flight, fewer spread few tokens over more SMs.
    tiles = 4 if row_tiles * blocks >= 4 * 132 else 1
    codes = jax.ShapeDtypeStruct((padded_rows(m), k), dtype)
    scales = jax.ShapeDtypeStruct((blocks, row_tiles * ROWS), jnp.float32)
    kernel = functools.partial(
        _tiles_kernel,
        static=scale is not None,
        tiles=tiles,
        blocks=blocks,
        dtype=dtype,
        bounds=(amax_min, amax_max),
    )
    out = plgpu.kernel(
        kernel,
        out_type=codes if scale is not None else (codes, scales),
        grid=(row_tiles, pl.cdiv(blocks, tiles)),
        grid_names=("row", "column"),
        num_threads=1,
        thread_name="wg",
        kernel_name=op,
        scratch_types=dict(
            x_smem=plgpu.SMEM(
                (tiles, 2, ROWS, HALF), x.dtype, transforms=(plgpu.SwizzleTransform(128),)
            ),
            q_smem=plgpu.SMEM(
                (tiles, 2, ROWS, HALF), dtype, transforms=(plgpu.SwizzleTransform(64),)
            ),
            barrier=plgpu.Barrier(num_arrivals=2, num_barriers=tiles),
        ),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*((x,) if scale is None else (x, scale)))
    return out


def _tiles_kernel(*refs, static, tiles, blocks, dtype, bounds, x_smem, q_smem, barrier):
    if static:
        x_gmem, scale_gmem, q_gmem = refs
    else:
        x_gmem, q_gmem, scale_gmem = refs
    rows = pl.ds(lax.axis_index("row") * ROWS, ROWS)
    first = lax.axis_index("column") * tiles

    def columns(block, half):
        return pl.ds(block * BLOCK_K + half * HALF, HALF)

    for t in range(tiles):  # tiles past the last column read zeros and store nothing
        for half in range(2):
            plgpu.copy_gmem_to_smem(
                x_gmem.at[rows, columns(first + t, half)], x_smem.at[t, half], barrier.at[t]
            )
    layout = plgpu.Layout.WGMMA
    for t in range(tiles):
        plgpu.barrier_wait(barrier.at[t])
        halves = [plgpu.load(x_smem.at[t, half], layout=layout) for half in range(2)]
        halves = [h.astype(jnp.float32) for h in halves]
        if static:
            scale = plgpu.layout_cast(jnp.broadcast_to(scale_gmem[0], (ROWS, HALF)), layout)
        else:
            amax = jnp.maximum(*(jnp.max(tools.finite_magnitude(h), axis=1) for h in halves))
            scale = tools.scale_of(
                amax, tools.largest(dtype), amax_min=bounds[0], amax_max=bounds[1]
            )

            @pl.when(first + t < blocks)
            def _(scale=scale, t=t):
                scale_gmem.at[first + t, rows][...] = scale

            scale = lax.broadcast_in_dim(scale, (ROWS, HALF), [0])
        for half in range(2):
            q_smem[t, half] = tools.quantize(halves[half], scale, dtype, layout)
        plgpu.commit_smem()
        for half in range(2):
            plgpu.copy_smem_to_gmem(q_smem.at[t, half], q_gmem.at[rows, columns(first + t, half)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
