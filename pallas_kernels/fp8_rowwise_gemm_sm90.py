"""FP8 matrix product for Hopper with scales by row: ``out[m, n] = x_scale[m] * w_scale[n] * (x @ w.T)[m, n]``.

Per-token activations and per-channel weights (FBGEMM's rowwise scheme, compressed-tensors' FP8_DYNAMIC), and
per-tensor scales of either side. The scales apply in the epilogue; the sum still moves to float32 every 128
of K, because Hopper's FP8 wgmma keeps about 14 bits. `_fp8_gemm_sm90` draws the warpgroups and barriers.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from qjax.pallas_kernels._fp8_gemm_sm90 import (
    TileConfig,
    choose_tiles,
    fp8_gemm,
    unsupported_reason,
)

__all__ = ["TileConfig", "choose_tiles", "fp8_rowwise_gemm", "unsupported_reason"]


def fp8_rowwise_gemm(
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
    """x @ w.T of FP8 arrays with one scale a row or one in all.

    Args:
        x: [M', K], e4m3 or e5m2. If M' is over 8 and no multiple of 8, x is copied to pad it.
        x_scale: float32 [M''] with M'' >= m, or [1] for all rows.
        w: [N, K], e4m3 or e5m2.
        w_scale: float32 [N], or [1] for all rows.
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
    rows, n = x.shape[0] if m is None else m, w.shape[0]
    if x_scale.ndim != 1 or (x_scale.shape[0] != 1 and x_scale.shape[0] < rows):
        raise ValueError(
            f"fp8_rowwise_gemm: x_scale must be [1] or have the {rows} rows of x; found {list(x_scale.shape)}"
        )
    if w_scale.shape not in ((1,), (n,)):
        raise ValueError(
            f"fp8_rowwise_gemm: w_scale must be [1] or [{n}] as w is {list(w.shape)}; "
            f"found {list(w_scale.shape)}"
        )
    return fp8_gemm(
        "fp8_rowwise_gemm",
        x,
        w,
        jnp.broadcast_to(x_scale, (rows,)) if x_scale.shape[0] == 1 else x_scale,
        jnp.broadcast_to(w_scale, (n,)),
        scaling="row",
        m=m,
        bias=bias,
        out_dtype=out_dtype,
        config=config,
        num_sms=num_sms,
    )
