"""Block-scaled FP8 matrix product for Hopper.

``out[m, n] = sum_kb x_scale[kb, m] * w_scale[n // 128, kb] * sum_{k in block kb} x[m, k] * w[n, k]``

The scheme of DeepSeek-V3 (report, section 3.3; peer: DeepGEMM): x has a scale for each token and 128 columns, w
one for each 128x128 block; products of each 128 of K are summed by the tensor cores, scaled and added in
float32. `_fp8_gemm_sm90` draws the warpgroups and barriers.
"""

from jax import Array
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from qjax.pallas_kernels._fp8_gemm_sm90 import (
    BLOCK_K,
    TileConfig,
    choose_tiles,
    fp8_gemm,
    unsupported_reason,
)

__all__ = ["BLOCK_K", "TileConfig", "choose_tiles", "fp8_block_gemm", "unsupported_reason"]


def fp8_block_gemm(
    x: Array,
    x_scale: Array,
    w: Array,
    w_scale: Array,
    *,
    m: int | None = None,
    bias: Array | None = None,
    out_dtype: DTypeLike = "bfloat16",
    config: TileConfig | None = None,
    num_sms: int | None = None,
) -> Array:
    """x @ w.T of block-scaled FP8 arrays.

    Args:
        x: [M', K], e4m3 or e5m2. If M' is over 8 and no multiple of 8, x is copied to pad it.
        x_scale: float32 [ceil(K/128), M''], tokens contiguous, M'' >= m a multiple of 4; `fp8_quantize_1x128`
            writes this layout.
        w: [N, K], e4m3 or e5m2.
        w_scale: float32 [ceil(N/128), ceil(K/128)].
        m: Rows of x that count, the rest is padding; default M'.
        bias: [N], floating, added in float32.
        out_dtype: bfloat16 or float16.
        config: Tiling; default `choose_tiles`.
        num_sms: SMs to run on; default those of the first device.

    Returns:
        [m, N].

    Raises:
        ValueError: If shapes or dtypes are not those above, or `unsupported_reason` has a reason.
    """
    n, k = w.shape
    blocks_n, blocks_k = pl.cdiv(n, BLOCK_K), pl.cdiv(k, BLOCK_K)
    if w_scale.shape != (blocks_n, blocks_k):
        raise ValueError(
            f"fp8_block_gemm: w_scale of w {list(w.shape)} must be [{blocks_n}, {blocks_k}]; "
            f"found {list(w_scale.shape)}"
        )
    rows = x.shape[0] if m is None else m
    if x_scale.ndim != 2 or x_scale.shape[0] != blocks_k or x_scale.shape[1] < rows:
        raise ValueError(
            f"fp8_block_gemm: x_scale must be [{blocks_k}, M''] with M'' >= {rows}, tokens last; "
            f"found {list(x_scale.shape)}"
        )
    if x_scale.shape[1] % 4:
        raise ValueError(
            f"fp8_block_gemm: x_scale's rows must be whole 16 bytes: pad its last axis to a multiple of 4; "
            f"found {list(x_scale.shape)}"
        )
    return fp8_gemm(
        "fp8_block_gemm",
        x,
        w,
        x_scale,
        w_scale,
        scaling="block",
        m=m,
        bias=bias,
        out_dtype=out_dtype,
        config=config,
        num_sms=num_sms,
    )
