"""FP8 quantization for training on Hopper: along the columns and along the tokens, in one read.

Training needs activations and gradients twice: with scales for each token and 128 columns, for the products of
the forward pass and of the input's gradient; and transposed, with scales for each column and 128 tokens, for the
weight's gradient, which sums over tokens while FP8 wgmma wants what is summed over contiguous.

A CTA of two warpgroups takes a tile of 128 tokens x 128 columns::

    TMA two halves of 64 columns -> x_smem (16 bits)
    wait; then warpgroup w, on registers of its own:
      64 tokens x 128 columns:  amax of rows -> scales -> codes -> q_smem  -> TMA store
      64 columns x 128 tokens:  read x_smem transposed, in pairs of columns; one shuffle and one permutation
                                a register make them pairs of tokens; then the same -> t_smem -> TMA store

Both stores are in flight until the CTA ends. Each part reads x_smem once for the amax and again for the codes:
kept in float32 between the two, the tile would take so many registers that a second CTA had no room on the SM.
Rounding is that of `fp8_quantize_sm90`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qjax.pallas_kernels import _quantize_sm90 as tools
from qjax.pallas_kernels.fp8_quantize_sm90 import OUT_DTYPES, padded_rows, unsupported_reason

__all__ = ["fp8_quantize_both_axes", "padded_rows", "padded_tokens", "unsupported_reason"]

BLOCK = 128
HALF = 64  # a warpgroup's rows, and the columns of one TMA copy: 128 bytes, one row of the swizzle


def padded_tokens(tokens: int) -> int:
    """Columns of the transposed codes: tokens rounded up to whole blocks of 128."""
    return pl.cdiv(tokens, BLOCK) * BLOCK


def fp8_quantize_both_axes(
    x: Array,
    *,
    dtype: DTypeLike = "float8_e4m3fn",
    amax_min: float = 0.0,
    amax_max: float | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Quantizes x with scales for each token and 128 columns, and x.T with scales for each column and 128 tokens.

    Args:
        x: [T, N], bfloat16 or float16; N a multiple of 16.
        dtype: float8_e4m3fn or float8_e5m2.
        amax_min: Floor of a block's amax, in x's units (DeepSeek-V3: 1e-4).
        amax_max: Upper bound of a block's amax.

    Returns:
        Codes [`padded_rows(T)`, N] and their float32 scales [ceil(N/128), T''], T'' = `padded_tokens(T)`, as
        `fp8_block_gemm` reads them; codes [N, T''] and their float32 scales [T''/128, N''], N'' = N rounded
        up to 128, as `fp8_wgrad_gemm` does. Tokens past T count as zeros.

    Raises:
        ValueError: If `unsupported_reason` has a reason, or the dtype is none of those.
    """
    op = "fp8_quantize_both_axes"
    if x.ndim != 2:
        raise ValueError(f"{op}: x must be [T, N]; found {list(x.shape)}")
    (tokens, n), dtype = x.shape, jnp.dtype(dtype)
    reason = unsupported_reason(tokens, n, x_dtype=x.dtype)
    if dtype.name not in OUT_DTYPES:
        reason = f"the codes must be one of {OUT_DTYPES}; found {dtype.name}"
    if reason:
        raise ValueError(f"{op}: {reason}")
    blocks_t, blocks_n = pl.cdiv(tokens, BLOCK), pl.cdiv(n, BLOCK)

    def scratch(columns, dtype, swizzle):
        rows = BLOCK if columns == HALF else HALF
        return plgpu.SMEM((2, rows, columns), dtype, transforms=(plgpu.SwizzleTransform(swizzle),))

    codes, scale, transposed, transposed_scale = plgpu.kernel(
        functools.partial(_kernel, dtype=dtype, bounds=(amax_min, amax_max)),
        out_type=(
            jax.ShapeDtypeStruct((padded_rows(tokens), n), dtype),
            jax.ShapeDtypeStruct((blocks_n, blocks_t * BLOCK), jnp.float32),
            jax.ShapeDtypeStruct((n, blocks_t * BLOCK), dtype),
            jax.ShapeDtypeStruct((blocks_t, blocks_n * BLOCK), jnp.float32),
        ),
        grid=(blocks_t, blocks_n),
        grid_names=("token", "column"),
        num_threads=2,
        thread_name="wg",
        kernel_name=op,
        scratch_types=dict(
            x_smem=scratch(HALF, x.dtype, 128),
            q_smem=scratch(HALF, dtype, 64),
            t_smem=scratch(BLOCK, dtype, 128),
            barrier=plgpu.Barrier(num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(x)
    return codes, scale, transposed, transposed_scale


def _kernel(
    x_gmem,
    q_gmem,
    scale_gmem,
    t_gmem,
    t_scale_gmem,
    *,
    dtype,
    bounds,
    x_smem,
    q_smem,
    t_smem,
    barrier,
):
    token, column = lax.axis_index("token"), lax.axis_index("column")
    wg = lax.axis_index("wg")
    tokens = pl.ds(token * BLOCK, BLOCK)
    my_rows = pl.ds(wg * HALF, HALF)  # within the tile
    my_tokens = pl.ds(token * BLOCK + wg * HALF, HALF)
    my_columns = pl.ds(column * BLOCK + wg * HALF, HALF)
    layout = plgpu.Layout.WGMMA
    largest = tools.largest(dtype)

    plgpu.copy_gmem_to_smem(x_gmem.at[tokens, my_columns], x_smem.at[wg], barrier)
    plgpu.barrier_wait(barrier)

    def scale_of(amax):
        return tools.scale_of(amax, largest, amax_min=bounds[0], amax_max=bounds[1])

    def codes_of(packed, scale):
        scale = lax.broadcast_in_dim(scale, packed.shape, [0])
        return tools.quantize(packed.astype(jnp.float32), scale, dtype, layout)

    def half_row(half):
        return plgpu.load(x_smem.at[half, my_rows], layout=layout)

    scale = scale_of(jnp.maximum(tools.row_amax(half_row(0)), tools.row_amax(half_row(1))))
    scale_gmem.at[column, my_tokens][...] = scale
    plgpu.commit_smem()  # else the compiler would join the two reads
    for half in range(2):
        q_smem[half, my_rows] = codes_of(half_row(half), scale)
    plgpu.commit_smem()
    for half in range(2):
        target = q_gmem.at[my_tokens, pl.ds(column * BLOCK + half * HALF, HALF)]
        plgpu.copy_smem_to_gmem(q_smem.at[half, my_rows], target)

    def columns_of(first, count):
        ref = x_smem.at[wg, pl.ds(first, count)].T
        return plgpu.layout_cast(plgpu.load(ref, layout=plgpu.Layout.WGMMA_TRANSPOSED), layout)

    scale = scale_of(
        jnp.maximum(tools.row_amax(columns_of(0, HALF)), tools.row_amax(columns_of(HALF, HALF)))
    )
    t_scale_gmem.at[token, my_columns][...] = scale
    plgpu.commit_smem()  # likewise
    t_smem[wg] = codes_of(columns_of(0, BLOCK), scale)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(t_smem.at[wg], t_gmem.at[my_columns, tokens])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
