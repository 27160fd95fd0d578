"""FP8 quantization of training's weights for Hopper: one scale for each 128x128 block, codes and transposed codes.

The forward pass multiplies with the codes and the input's gradient with the transposed ones, both with the same
scales. XLA needs several passes over the weight for them, a float32 one for the scales of its elements among them.

A CTA of two warpgroups takes a block::

    TMA 128x128 -> x_smem; wait
    warpgroup w: 64 rows -> registers -> amax of each -> amax_smem
    meet; 128 amaxes -> amax of the block -> scale
    registers -> codes -> q_smem -> TMA store
    warpgroup w: 64 columns, read transposed and shuffled into pairs of rows -> codes -> t_smem -> TMA store

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

BLOCK = 128
HALF = 64  # a warpgroup's rows
IN_DTYPES = ("float32", "bfloat16")
OUT_DTYPES = ("float8_e4m3fn", "float8_e5m2")


def unsupported_reason(n: int, k: int, *, w_dtype: DTypeLike = "float32") -> str | None:
    """Why the kernel can't take w [n, k], None if it can."""
    if jnp.dtype(w_dtype).name not in IN_DTYPES:
        return f"w must be one of {IN_DTYPES}; found {jnp.dtype(w_dtype).name}"
    columns = 128 // jnp.dtype(w_dtype).itemsize
    if n < 1 or k < 1 or n % 16 or k % columns:
        return (
            f"N must be a multiple of 16 and K of {columns}, the tiles that TMA moves; "
            f"found N={n}, K={k}"
        )
    return None


def fp8_quantize_128x128(
    w: Array, *, dtype: DTypeLike = "float8_e4m3fn"
) -> tuple[Array, Array, Array]:
    """Quantizes w with one scale for each 128x128 block; w.T's codes are the transposed ones.

    Args:
        w: [N, K], float32 or bfloat16.
        dtype: float8_e4m3fn or float8_e5m2.

    Returns:
        Codes [N, K], the same transposed [K, N], and float32 scales [ceil(N/128), ceil(K/128)].

    Raises:
        ValueError: If `unsupported_reason` has a reason, or the dtype is none of those.
    """
    op = "fp8_quantize_128x128"
    if w.ndim != 2:
        raise ValueError(f"{op}: w must be [N, K]; found {list(w.shape)}")
    (n, k), dtype = w.shape, jnp.dtype(dtype)
    reason = unsupported_reason(n, k, w_dtype=w.dtype)
    if dtype.name not in OUT_DTYPES:
        reason = f"the codes must be one of {OUT_DTYPES}; found {dtype.name}"
    if reason:
        raise ValueError(f"{op}: {reason}")
    blocks = (pl.cdiv(n, BLOCK), pl.cdiv(k, BLOCK))
    # Tiled, since a row of 64 columns that is read transposed is longer than a swizzle.
    tiled = (plgpu.TilingTransform((8, 128 // w.dtype.itemsize)), plgpu.SwizzleTransform(128))
    swizzled = (plgpu.SwizzleTransform(128),)
    codes, transposed, scale = plgpu.kernel(
        functools.partial(_kernel, dtype=dtype),
        out_type=(
            jax.ShapeDtypeStruct((n, k), dtype),
            jax.ShapeDtypeStruct((k, n), dtype),
            jax.ShapeDtypeStruct(blocks, jnp.float32),
        ),
        grid=blocks,
        grid_names=("row", "column"),
        num_threads=2,
        thread_name="wg",
        kernel_name=op,
        scratch_types=dict(
            w_smem=plgpu.SMEM((BLOCK, BLOCK), w.dtype, transforms=tiled),
            q_smem=plgpu.SMEM((2, HALF, BLOCK), dtype, transforms=swizzled),
            t_smem=plgpu.SMEM((2, HALF, BLOCK), dtype, transforms=swizzled),
            amax_smem=plgpu.SMEM((BLOCK,), jnp.float32),
            scale_smem=plgpu.SMEM((HALF,), jnp.float32),
            loaded=plgpu.Barrier(num_arrivals=2),
            met=plgpu.Barrier(num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(w)
    return codes, transposed, scale


def _kernel(
    w_gmem,
    q_gmem,
    t_gmem,
    scale_gmem,
    *,
    dtype,
    w_smem,
    q_smem,
    t_smem,
    amax_smem,
    scale_smem,
    loaded,
    met,
):
    row, column = lax.axis_index("row"), lax.axis_index("column")
    wg = lax.axis_index("wg")
    mine = pl.ds(wg * HALF, HALF)  # rows, and then columns, of the block
    rows, columns = pl.ds(row * BLOCK, BLOCK), pl.ds(column * BLOCK, BLOCK)
    my_rows = pl.ds(row * BLOCK + wg * HALF, HALF)
    my_columns = pl.ds(column * BLOCK + wg * HALF, HALF)
    layout, transposed = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED

    plgpu.copy_gmem_to_smem(w_gmem.at[my_rows, columns], w_smem.at[mine], loaded)
    plgpu.barrier_wait(loaded)
    values = plgpu.load(w_smem.at[mine], layout=layout).astype(jnp.float32)
    amax_smem[mine] = jnp.max(tools.finite_magnitude(values), axis=1)
    plgpu.barrier_arrive(met)
    plgpu.barrier_wait(met)
    # Along the columns of a tile each thread has some of the 128, along its rows the four that share a row meet.
    amax = plgpu.load(amax_smem, layout=layout.reduce(0))
    amax = jnp.max(lax.broadcast_in_dim(amax, (HALF, BLOCK), [1]), axis=1)
    scale = tools.scale_of(amax, tools.largest(dtype))
    by_element = lax.broadcast_in_dim(scale, (HALF, BLOCK), [0])

    def store(values, q_smem, target):
        q_smem[...] = tools.quantize(values, by_element, dtype, layout)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, target)

    store(values, q_smem.at[wg], q_gmem.at[my_rows, columns])
    values = plgpu.load(w_smem.at[:, mine].T, layout=transposed).astype(jnp.float32)
    store(plgpu.layout_cast(values, layout), t_smem.at[wg], t_gmem.at[my_columns, rows])

    @pl.when(wg == 0)
    def _():
        scale_smem[...] = scale
        plgpu.commit_smem()
        scale_gmem[row, column] = scale_smem[0]

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
