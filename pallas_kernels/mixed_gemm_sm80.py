"""Matrix product of 16-bit activations and 2-, 4- or 8-bit weights for Ampere and Ada, with ``mma.sync``.

``out[m, n] = sum_g sum_{k in g} w[n, k] * x[m, k] + bias[n]``, as `mixed_gemm_sm90` computes it, whose `repack`
prepares the weights here too: wgmma's fragment of 64x16 numbers is that of mma.m16n8k16 in each of four warps, so
one storage serves all GPUs since Ampere. As in Marlin (arXiv:2408.11743) a thread finds its codes in chunks of 16
bytes, and a group's codes become 16-bit floats in registers without shuffles; but these are exactly q - zero_point,
and the scale multiplies the float32 sum of a group's products instead of each weight.

A CTA is one warpgroup with a tile of 64 or 128 weight rows and up to 64 tokens; several of them share an SM and hide
each other's waits. All threads copy, and all compute:

    for each step of K:
      cp.async.wait_group      this step's copies have arrived, `stages` - 2 steps' may be on their way
      bar.sync                 ... those of every thread; and nobody reads the last step's slot any more
      cp.async x, codes, scales, offsets of step + stages - 1 -> that slot; cp.async.commit_group
      for each group of the step's columns:
        codes   -> 16-bit floats q - zero_point            LDS.128, lop3, one fma for two weights
        product = mma.sync(codes, x)                       ldmatrix, each fragment of x for all weight rows
        sum    += product * scale[row, group]              float32
    sum -> out, or with splits -> float32 workspace [splits, M, N], which XLA adds

Rows and columns past the edges are copied as zeros and not stored. The kernel also runs on Hopper (it uses nothing
of wgmma, TMA or mbarrier), where `mixed_gemm_sm90` is the one to use.
"""

import jax
import jax.numpy as jnp
from jax import Array

from qjax.pallas_kernels._mixed_gemm_sm80 import launch
from qjax.pallas_kernels._mixed_gemm_tiles_sm80 import (
    COLUMNS,
    LEAST_SMEM,
    MAX_SMEM,
    TileConfig,
    choose_tiles,
    modelled_us,
)
from qjax.pallas_kernels.mixed_gemm_sm90 import (
    ELEMENTS,
    SCALE_DTYPES,
    X_DTYPES,
    check_operands,
    group_sums,
    repack,
    unsupported_reason,
)
from qjax.wgmma_layout import BLOCK


def mixed_gemm(
    x: Array,
    codes: Array,
    scale: Array,
    zero_point: Array | None = None,
    *,
    n: int,
    group_size: int,
    element: str = "int4",
    minimum: Array | None = None,
    zero: int = 0,
    bias: Array | None = None,
    config: TileConfig | None = None,
    num_sms: int | None = None,
) -> Array:
    """x @ dequantized(codes).T.

    Args:
        x: [M, K], bfloat16 or float16.
        codes: int32 [N/64, K/64, bits/2, 256] from `repack`.
        scale: [N/64, groups, 64] from `repack`.
        zero_point: bfloat16, of scale's shape, from `repack`; or None.
        n: Weight rows.
        group_size: Columns that share a scale, as `repack` was told.
        element: Of the codes, as `repack` was told, of `ELEMENTS`. FP8's NaN and infinities must not occur.
        minimum: Of scale's shape and dtype, from `repack`; or None.
        zero: Zero point of all integers, where `zero_point` is None.
        bias: [N], floating, added in float32.
        config: Tiling; default `choose_tiles`.
        num_sms: SMs to choose the tiling for; default those of the first device.

    Returns:
        [M, N] in x's dtype.

    Raises:
        ValueError: If shapes or dtypes are not those above, or `unsupported_reason` has a reason.
    """
    m, k = check_operands(x, codes, scale, zero_point, minimum, bias, n, group_size, element, zero)
    group = k if group_size == k else min(group_size, 128)
    if config is None:
        offset = zero_point if minimum is None else minimum
        device = jax.devices()[0]
        row_bytes = scale.dtype.itemsize + (0 if offset is None else offset.dtype.itemsize)
        config = choose_tiles(
            m,
            n,
            k,
            num_sms=device.core_count if num_sms is None else num_sms,
            bits=ELEMENTS[element],
            group_size=group,
            row_bytes=0 if group_size == k else row_bytes,
            sums=minimum is not None,
            max_smem=MAX_SMEM.get(getattr(device, "compute_capability", ""), LEAST_SMEM),
        )
    operands = {"x": x, "codes": codes, "scale": scale}
    if zero_point is not None:
        operands["zero_point"] = zero_point
    if minimum is not None:
        width = k if group_size == k else min(group, config.depth)
        operands["minimum"] = minimum
        operands["sums"] = group_sums(x, width, config.columns)
    if bias is not None and config.splits == 1:
        padded = jnp.pad(bias.astype(jnp.float32), (0, -n % BLOCK))
        operands["bias"] = padded.reshape(-1, BLOCK)
    out = launch(operands, (m, n, k), element, group, zero, config)
    if config.splits == 1:
        return out
    out = jnp.sum(out, axis=0)
    if bias is not None:
        out = out + bias.astype(jnp.float32)[None, :]
    return out.astype(x.dtype)


__all__ = [
    "COLUMNS",
    "ELEMENTS",
    "LEAST_SMEM",
    "MAX_SMEM",
    "SCALE_DTYPES",
    "X_DTYPES",
    "TileConfig",
    "choose_tiles",
    "mixed_gemm",
    "modelled_us",
    "repack",
    "unsupported_reason",
]
