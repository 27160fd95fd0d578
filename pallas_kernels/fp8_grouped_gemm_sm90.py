"""Grouped FP8 matrix products for Hopper: each group of rows (a mixture's tokens of one expert) meets its own weight.

``out[t, n] = sum_kb x_scale[kb, t] * w_scale[e, n // 128, kb] * sum_{k in block kb} x[t, k] * w[e, n, k]``, e the
group of row t; or with one scale for each token and one for each channel. The scheme is DeepSeek-V3's (report,
section 3.3; peer: DeepGEMM's contiguous and masked layouts). `_fp8_grouped_gemm_sm90` says how it runs.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from qjax.pallas_kernels._fp8_grouped_gemm_sm90 import (
    BLOCK_K,
    MAX_SMEM,
    GroupedTileConfig,
    grouped_gemm,
)

__all__ = [
    "BLOCK_K",
    "GroupedTileConfig",
    "choose_tiles",
    "fp8_block_grouped_gemm",
    "fp8_rowwise_grouped_gemm",
    "unsupported_reason",
]

FP8_DTYPES = ("float8_e4m3fn", "float8_e5m2")
OUT_DTYPES = ("bfloat16", "float16")


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


def choose_tiles(rows: float, groups: int, n: int, k: int, *, num_sms: int) -> GroupedTileConfig:
    """The tiling with the least modelled time for so many rows a group; see `modelled_us`."""
    return min(
        candidate_tiles(rows, n),
        key=lambda config: modelled_us(config, rows, groups, n, k, num_sms=num_sms),
    )


def candidate_tiles(rows: float, n: int) -> list[GroupedTileConfig]:
    """The tilings worth considering, each with as many stages as fit, 8 at most."""
    parts = [(True, tokens, 64, 1) for tokens in (8, 16, 32, 64)]
    for cluster in (1, 2) if n > 128 else (1,):
        parts += [(True, tokens, 128, cluster) for tokens in (8, 16, 24, 32, 48, 64, 96, 128, 176)]
        if rows > 64:
            parts += [(False, tokens, 128, cluster) for tokens in (128, 256)]
    return [with_stages(*part) for part in parts]


def with_stages(swap: bool, tokens: int, weights: int, cluster: int = 1) -> GroupedTileConfig:
    """The tiling with as many stages as fit, 8 at most."""
    halves = not swap and tokens == 256
    configs = [
        GroupedTileConfig(swap, tokens, weights, stages, cluster, halves)
        for stages in range(8, 1, -1)
    ]
    return next((c for c in configs if c.smem_bytes() <= MAX_SMEM), configs[-1])


def modelled_us(
    config: GroupedTileConfig, rows: float, groups: int, n: int, k: int, *, num_sms: int
) -> float:
    """Microseconds by counting waves of tiles, if groups have 0.7 to 1.3 times `rows` rows.

    Rates fit times on an H200. 128 of K of one tile take the longest of: its bytes through the L2 cache at
    47 GB/s of each SM; its products, of which a swapped tile's cost more shared memory reads for the scales;
    the weight's bytes from memory, of which one SM draws at most twice its share. Half tiles save little,
    because the stages of a whole tile are few.
    """
    steps, tiles_n = pl.cdiv(k, BLOCK_K), pl.cdiv(n, config.weights * config.cluster)
    l2 = (config.tokens / config.cluster + config.weights) * BLOCK_K / 47
    product = 150 + 3.4 * config.tokens if config.swap else 260 + 2.2 * config.tokens
    step_ns = max(l2, product, config.weights * BLOCK_K / 65)
    tiles = cost = 0.0
    for share in (0.7, 0.85, 1.0, 1.15, 1.3):
        whole, rest = divmod(math.ceil(max(rows * share, 1)), config.tokens)
        half = config.halves and 0 < rest <= config.tokens // 2
        tiles += (whole + (rest > 0)) / 5
        cost += (whole + (0.95 if half else 1.0) * (rest > 0)) / 5
    active = min(groups, math.ceil(rows * groups))
    units = active * tiles * tiles_n * config.cluster
    waves = math.ceil(units / num_sms) if units < 8 * num_sms else units / num_sms
    total = 1e-3 * waves * steps * step_ns * cost / tiles
    memory = (active * n * k + rows * groups * (k + 2 * n)) / 4.2e6
    return (
        max(total, memory) + 0.05 * total
    )  # of tilings that wait for memory, the one with least to do


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
    _check(op, x, x_scale, w, w_scale, group_sizes, bias, out_dtype)
    groups, n, k = w.shape
    rows, blocks_k = math.prod(x.shape[:-1]), pl.cdiv(k, BLOCK_K)
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
    num_sms = jax.devices()[0].core_count if num_sms is None else num_sms
    if config is None:
        rows = math.prod(x.shape[:-1]) / groups if expected_rows is None else expected_rows
        config = choose_tiles(rows, groups, n, k, num_sms=num_sms)
    return grouped_gemm(
        "block",
        x,
        x_scale,
        w,
        w_scale,
        group_sizes,
        bias,
        out_dtype=jnp.dtype(out_dtype),
        config=config,
        num_sms=num_sms,
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
    _check(op, x, x_scale, w, w_scale, group_sizes, bias, out_dtype)
    groups, n, k = w.shape
    if x_scale.shape != x.shape[:-1] or w_scale.shape != w.shape[:-1]:
        raise ValueError(
            f"{op}: x_scale must be {list(x.shape[:-1])} and w_scale {list(w.shape[:-1])}; "
            f"found {list(x_scale.shape)} and {list(w_scale.shape)}"
        )
    num_sms = jax.devices()[0].core_count if num_sms is None else num_sms
    if config is None:
        rows = math.prod(x.shape[:-1]) / groups if expected_rows is None else expected_rows
        config = choose_tiles(rows, groups, n, k, num_sms=num_sms)
    return grouped_gemm(
        "row",
        x,
        x_scale,
        w,
        w_scale,
        group_sizes,
        bias,
        out_dtype=jnp.dtype(out_dtype),
        config=config,
        num_sms=num_sms,
    )


def _check(op, x, x_scale, w, w_scale, group_sizes, bias, out_dtype) -> None:
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
    if x_scale.dtype != jnp.float32 or w_scale.dtype != jnp.float32:
        raise ValueError(f"{op}: scales must be float32; found {x_scale.dtype} and {w_scale.dtype}")
