"""Matrix product of 8-bit activations and INT4 weights for Hopper, on its 8-bit tensor cores.

``out[m, n] = x_scale[m] * sum_g scale[n, g] * sum_{k in g} (q[n, k] - zero_point[n, g]) * x[m, k] + bias[n]`` where g
are groups of K columns and x is int8 or float8_e4m3fn with one scale for each token (or one for all).

Differences q - zero_point are exact in either type, so all rounding is that of x, of the sums and of the output. Sums
of int8 are int32 inside a group, and over all K where a row has one scale; those of FP8, which the tensor cores add in
fewer bits than float32 has, are promoted to float32 after each group or 128 columns.

Weights are in "wgmma8" storage (`qjax.wgmma_layout`). Few tokens take the kernel of `mixed_gemm_sm90`, which draws its
warp groups, barriers and sums over parts, splits and clusters; three things differ. A stage's x is 8 bits wide and not
tiled: rows of 128 columns, of which the last may lie beyond K, for each of which TMA takes a copy. Codes become 8-bit
numbers in registers by 3 instructions for each 8 weights (int8 without zero points), 7 (with), 8 or 9 (FP8):
`_w4a8_registers_sm90`; `_w4a8_product_sm90` does so under the product. And a tile's sums are multiplied by the tokens'
scales before they are stored. Many tokens take the kernel of `_w4a8_wide_sm90`. `_w4a8_tiles_sm90` chooses the tile.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from qjax.pallas_kernels import mixed_gemm_sm90
from qjax.pallas_kernels._mixed_gemm_sm90 import launch
from qjax.pallas_kernels._mixed_gemm_tiles_sm90 import TileConfig
from qjax.pallas_kernels._w4a8_tiles_sm90 import candidate_tiles, choose_tiles, costs, modelled_us
from qjax.pallas_kernels._w4a8_wide_sm90 import WideTileConfig, launch_wide
from qjax.wgmma_layout import BLOCK, codes_shape

X_DTYPES = ("int8", "float8_e4m3fn")
OUT_DTYPES = ("bfloat16", "float16")
SCALE_DTYPES = ("bfloat16", "float16", "float32")
MAX_K = 1 << 17
"""int32 holds the sums of fewer columns than this, whatever the codes: 128 * 128 each."""


def unsupported_reason(
    m: int,
    n: int,
    k: int,
    *,
    group_size: int,
    x_dtype: DTypeLike = "int8",
    scale_dtype: DTypeLike = "bfloat16",
    out_dtype: DTypeLike = "bfloat16",
) -> str | None:
    """Why the kernel can't take x [m, k] and a weight [n, k], None if it can.

    Args:
        m: Tokens.
        n: Weight rows.
        k: Columns.
        group_size: Columns that share a scale; k for one scale a row. The last group may be short.
        x_dtype: The activations' dtype.
        scale_dtype: The weight scales' dtype.
        out_dtype: The output's dtype.
    """
    for name, dtype, known in (
        ("x", x_dtype, X_DTYPES),
        ("the weight's scales", scale_dtype, SCALE_DTYPES),
        ("the output", out_dtype, OUT_DTYPES),
    ):
        if jnp.dtype(dtype).name not in known:
            return f"{name} must be one of {known}; found {jnp.dtype(dtype).name}"
    if m < 1 or n < 8 or n % 8 or k < 16 or k % 16 or k >= MAX_K:
        return (
            f"M must be positive, N a multiple of 8 and K one of 16 below {MAX_K}; "
            f"found M={m}, N={n}, K={k}"
        )
    return mixed_gemm_sm90.group_reason(group_size, k)


def repack(
    codes: Array, scale: Array, zero_point: Array | None = None, *, group_size: int
) -> tuple[Array, Array, Array | None]:
    """Weights in the kernel's layout, from the layouts of compressed-tensors and `QArray`.

    Args:
        codes: uint8 [N, K/2] of u = q + 8, the first column in the lower bits.
        scale: [N, ceil(K/group_size)], of either sign.
        zero_point: Integers of scale's shape, in units of q, from -8 to 8; or None.
        group_size: Columns that share a scale; K for one scale a row.

    Returns:
        (codes int32 [N/64, K/64, 2, 256], sizes rounded up, scale [N/64, groups, 64], zero_point bfloat16 likewise);
        groups of more than 128 columns, but not of all K, are repeated for each 128.

    Raises:
        ValueError: If shapes or dtypes are not those above.
    """
    return mixed_gemm_sm90.repack(
        codes, scale, zero_point, group_size=group_size, eight_bit_inputs=True
    )


def w4a8_gemm(
    x: Array,
    x_scale: Array,
    codes: Array,
    scale: Array,
    zero_point: Array | None = None,
    *,
    n: int,
    group_size: int,
    m: int | None = None,
    bias: Array | None = None,
    out_dtype: DTypeLike = "bfloat16",
    config: TileConfig | WideTileConfig | None = None,
    num_sms: int | None = None,
) -> Array:
    """(x_scale * x) @ dequantized(codes).T.

    Args:
        x: [M', K], M' >= m, int8 or float8_e4m3fn.
        x_scale: float32 [M''], M'' >= m, or [1] for all tokens.
        codes: int32 [N/64, K/64, 2, 256] from `repack`.
        scale: [N/64, groups, 64] from `repack`.
        zero_point: bfloat16, of scale's shape, from `repack`, integers from -8 to 8; or None.
        n: Weight rows.
        group_size: Columns that share a scale, as `repack` was told.
        m: Tokens; default M'.
        bias: [N], floating, added in float32.
        out_dtype: bfloat16 or float16.
        config: Tiling; default `choose_tiles`.
        num_sms: SMs to run on; default those of the first device.

    Returns:
        [m, N] in out_dtype.

    Raises:
        ValueError: If shapes or dtypes are not those above, or `unsupported_reason` has a reason.
    """
    m, k = _check(
        x,
        x_scale,
        codes,
        scale,
        zero_point,
        n=n,
        group_size=group_size,
        m=x.shape[0] if m is None and x.ndim else m,
        bias=bias,
        out_dtype=out_dtype,
    )
    num_sms = jax.devices()[0].core_count if num_sms is None else num_sms
    if config is None:
        cost = costs(
            k,
            group_size,
            integers=x.dtype == jnp.int8,
            zeros=zero_point is not None,
            scale_bytes=scale.dtype.itemsize,
        )
        config = choose_tiles(m, n, k, cost, num_sms=num_sms)
    elif isinstance(config, TileConfig) and config.depth not in (128, 256):
        raise ValueError(f"w4a8_gemm: depth must be 128 or 256; found {config}")
    operands = {"x": x, "codes": codes, "scale": scale, "x_scale": x_scale}
    if zero_point is not None:
        operands["zero_point"] = zero_point
    if bias is not None:
        operands["bias"] = jnp.pad(bias.astype(jnp.float32), (0, -n % BLOCK)).reshape(-1, BLOCK)
    group = k if group_size == k else min(group_size, 128)
    if isinstance(config, WideTileConfig):
        return launch_wide(
            operands,
            (m, n, k),
            group,
            config,
            num_sms,
            out_dtype=out_dtype,
            kernel_name="w4a8_gemm",
        )
    return launch(
        operands,
        (m, n, k),
        "int4",
        group,
        0,
        config,
        num_sms,
        out_dtype=out_dtype,
        kernel_name="w4a8_gemm",
    )


def _check(
    x, x_scale, codes, scale, zero_point, *, n, group_size, m, bias, out_dtype
) -> tuple[int, int]:
    """M and K.

    Raises:
        ValueError: Naming what is wrong.
    """

    def expect(name, array, shape, dtype):
        if tuple(array.shape) != shape or array.dtype != jnp.dtype(dtype):
            raise ValueError(
                f"w4a8_gemm: {name} must be {jnp.dtype(dtype).name}{list(shape)}; "
                f"found {array.dtype}{list(array.shape)}"
            )

    if x.ndim != 2:
        raise ValueError(f"w4a8_gemm: x must be [M, K]; found {list(x.shape)}")
    rows, k = x.shape
    if m > rows:
        raise ValueError(f"w4a8_gemm: x has {rows} rows, fewer than the {m} tokens")
    reason = unsupported_reason(
        m,
        n,
        k,
        group_size=group_size,
        x_dtype=x.dtype,
        scale_dtype=scale.dtype,
        out_dtype=out_dtype,
    )
    if reason:
        raise ValueError(f"w4a8_gemm: {reason}")
    if x_scale.ndim != 1 or x_scale.dtype != jnp.float32 or 1 != x_scale.shape[0] < m:
        raise ValueError(
            f"w4a8_gemm: x_scale must be float32 with [1] or at least [{m}] scales; "
            f"found {x_scale.dtype}{list(x_scale.shape)}"
        )
    row_blocks, column_blocks = -(-n // BLOCK), -(-k // BLOCK)
    groups = 1 if group_size == k else -(-k // min(group_size, 128))
    expect("codes", codes, codes_shape(row_blocks * BLOCK, column_blocks * BLOCK), "int32")
    expect("scale", scale, (row_blocks, groups, BLOCK), scale.dtype)
    if zero_point is not None:
        expect("zero_point", zero_point, scale.shape, "bfloat16")
    if bias is not None:
        expect("bias", bias, (n,), bias.dtype)
    return m, k


__all__ = [
    "MAX_K",
    "OUT_DTYPES",
    "SCALE_DTYPES",
    "X_DTYPES",
    "TileConfig",
    "WideTileConfig",
    "candidate_tiles",
    "choose_tiles",
    "costs",
    "modelled_us",
    "repack",
    "unsupported_reason",
    "w4a8_gemm",
]
