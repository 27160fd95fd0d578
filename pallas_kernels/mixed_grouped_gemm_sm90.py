"""Grouped products of 16-bit activations and 4-bit weights for Hopper: each expert's tokens meet its own weight.

``out[t, n] = sum_k w[e, n, k] * x[t, k] + bias[e, n]``, e the group of row t; or, gated, of two such products
``out = act(gate) * (up + offset)``, in one kernel that never stores gate and up. Weights are MXFP4 (float4_e2m1fn
with an e8m0 scale for each 32 columns: OCP Microscaling formats, version 1.0) or INT4 with scales of x's dtype for
each group, in "wgmma" storage (`qjax.wgmma_layout`).

FP4 weights meet FP8 tensor cores, because FP4 times a power of two is FP8, made by few instructions. Activations of 16
bits go in as two FP8 terms (`fp8_split_sm90`): e4m3 keeps a number's first four bits and e5m2 the rest, so nothing of
bfloat16 is lost but what is 2^-21 times the row's largest. Activations that were quantized to e4m3 are one term, at
twice the speed. INT4 weights meet 16-bit tensor cores.

The tile is the transpose of the output's, 64 weight rows by some tokens for each block, and a line of the
table that `_grouped_tiles_sm90` describes: a tile starts wherever its group starts, and rows that belong to the
next group are multiplied but not stored. Weights are scaled in registers:

    producer warpgroup                         math warpgroups (a block of 64 rows, a part of a step's K)
    ------------------                         --------------------------------------------------------
    for each tile and row tile of this CTA:    for each tile and row tile of this CTA:
      for each `step` of K:                      for each `step` of K:
        wait  empty[slot]        <-------------+   wait  full[slot]
        TMA x      -> x_smem[slot]             |   for each 128 bytes of the part's x, for each piece:
        TMA codes  -> codes_smem[slot]         |     codes * scales -> weights in registers
        TMA scales -> scale_smem[slot]         |     sums[piece] += wgmma(weights, x_smem)
        (all arrive on full[slot]) --------->  +-- arrive empty[slot]
                                                 parts > 0: sums -> sum_smem -> part 0
                                                 activation, bias -> out_smem (transposed) -> TMA stores

The pieces of a gated product are a block of gate and the same block of up, which are two operands, or blocks of one
operand that alternate.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from qjax.pallas_kernels import fp8_split_sm90
from qjax.pallas_kernels._mixed_grouped_gemm_sm90 import (
    MAX_COLUMNS,
    MAX_SMEM,
    Element,
    GatedActivation,
    MixedTileConfig,
    launch,
)
from qjax.pallas_kernels.fp8_split_sm90 import fp8_split
from qjax.wgmma_layout import BLOCK, WORDS

WEIGHTS = 40
"""As many tokens cost as much as the weights of a tile, on an H200."""

__all__ = [
    "MAX_SMEM",
    "FP8Rows",
    "GatedActivation",
    "GroupedWeights",
    "MixedTileConfig",
    "choose_tiles",
    "mixed_gated_grouped_gemm",
    "mixed_grouped_gemm",
    "unsupported_reason",
    "with_stages",
]


def unsupported_reason(
    n: int,
    k: int,
    *,
    element: str,
    group_size: int,
    x_dtype: DTypeLike = "bfloat16",
    scale_dtype: DTypeLike = "float8_e8m0fnu",
) -> str | None:
    """Why the kernel can't take x [T, k] and weights [E, n, k], None if it can.

    Args:
        n: Weight rows.
        k: Columns.
        element: The weights' element.
        group_size: Columns that share a scale.
        x_dtype: The activations' dtype, also the output's.
        scale_dtype: The scales' dtype.
    """
    x_dtype, scale_dtype = jnp.dtype(x_dtype).name, jnp.dtype(scale_dtype).name
    if element == "float4_e2m1fn":
        if (x_dtype, scale_dtype, group_size) != ("bfloat16", "float8_e8m0fnu", 32):
            return (
                "FP4 weights need bfloat16 x and float8_e8m0fnu scales of 32 columns; "
                f"found {x_dtype}, {scale_dtype} and {group_size}"
            )
    elif element != "int4":
        return f"weights must be float4_e2m1fn or int4; found {element}"
    elif x_dtype not in ("bfloat16", "float16") or scale_dtype != x_dtype:
        return (
            "INT4 weights need bfloat16 or float16 x and scales of its dtype; "
            f"found {x_dtype} and {scale_dtype}"
        )
    elif group_size not in (32, 64) and group_size % 128:
        return f"groups must be of 32, 64 or a multiple of 128 columns; found {group_size}"
    if n < BLOCK or n % BLOCK or k < BLOCK or k % BLOCK:
        return f"N and K must be multiples of {BLOCK}; found N={n}, K={k}"
    return fp8_split_sm90.unsupported_reason(k) if element == "float4_e2m1fn" else None


class FP8Rows(NamedTuple):
    """Activations [T, K] as scaled sums of FP8 arrays: ``scale[:, None] * sum(terms)``.

    Attributes:
        terms: One or two arrays [T, K], float8_e4m3fn or float8_e5m2.
        scale: float32 [T], or more: what follows is not read. Or one number for all rows.
    """

    terms: tuple[Array, ...]
    scale: Array | float


def choose_tiles(
    rows: float, *, element: Element = "float4_e2m1fn", gated: bool, group_size: int = 32
) -> MixedTileConfig:
    """The tiling for so many rows of each group that has any.

    Few tokens: a block of rows for each two warpgroups, which share K, so that each SM has many loads in
    flight. More: three warpgroups with two blocks each, so that two can scale weights while one multiplies; of
    one product, where each expert has many, two with as many tokens as registers hold.
    """
    few = rows <= 20
    columns = range(8, 33, 8) if few else range(40, MAX_COLUMNS, 8)
    options = [_tiling(c, rows, element, gated, group_size) for c in columns]
    return min((c for c in options if c is not None), key=lambda config: _work(config, rows))


def _tiling(
    columns: int, rows: float, element: Element, gated: bool, group_size: int
) -> MixedTileConfig | None:
    """The tiling of so many columns, None if there is none."""
    if columns <= 32:
        shape = 2, 2, 2 if gated or rows > 4 else 1
    elif element == "int4":
        shape = (2, 1, 2) if columns <= 128 else None
    elif columns <= 72:  # more would spill
        shape = 3, 1, 2
    else:
        shape = (2, 1, 1) if 128 <= columns <= 176 and not gated else None
    if shape is None:
        return None
    depth = 128 if element == "float4_e2m1fn" or group_size > 64 or columns == 64 else 64
    return with_stages(MixedTileConfig(columns, *shape, depth, 2))


def _work(config: MixedTileConfig, rows: float) -> float:
    """What a group of about so many rows costs: its tokens in tiles' widths, and the weights once for each tile.

    Tokens choose experts at random, so that the rows of one are about Poisson distributed.
    """
    # Where a CTA has fewer weights, it has them for more tiles; a short tile's tokens are all loaded.
    weights = (WEIGHTS if config.pieces == 2 else 1.5 * WEIGHTS) + config.columns / 3
    spread = range(max(int(rows - 4 * rows**0.5), 1), int(rows + 4 * rows**0.5) + 2)
    cost = total = 0.0
    for r in spread:
        chance = math.exp(r * math.log(rows) - rows - math.lgamma(r + 1))
        whole, rest = divmod(r, config.columns)
        last = next(w for w in config.widths if w >= rest) + weights if rest else 0
        cost += chance * (whole * (config.columns + weights) + last)
        total += chance
    return cost / total


def with_stages(config: MixedTileConfig) -> MixedTileConfig:
    """The tiling with as many stages as fit, 12 at most."""
    options = [dataclasses.replace(config, stages=s) for s in range(12, 1, -1)]
    return next((c for c in options if c.smem_bytes() <= MAX_SMEM), options[-1])


class GroupedWeights(NamedTuple):
    """One operand: the weights of all groups.

    Attributes:
        codes: int32 [E, N/64, K/64, 2, 256] of `qjax.wgmma_layout`.
        scale: [E, N/64, G, 64], a scale for each group of columns and row: float8_e8m0fnu codes relative to
            `global_scale` for FP4 (at most 127, the code of 1; greater ones stand for those below 0, which
            round to zeros), numbers of x's dtype for INT4, where groups of more than 128 columns are repeated
            for each 128.
        global_scale: float32 [E], powers of two, for FP4.
        bias: [E, N], floating, added in float32; or None.
    """

    codes: Array
    scale: Array
    global_scale: Array | None = None
    bias: Array | None = None


def mixed_grouped_gemm(
    x: Array | FP8Rows,
    weights: GroupedWeights,
    group_sizes: Array,
    *,
    element: Element,
    group_size: int,
    out_dtype: DTypeLike = "bfloat16",
    expected_rows: float | None = None,
    config: MixedTileConfig | None = None,
    num_sms: int | None = None,
) -> Array:
    """Rows of each group of x times their own dequantized w[e].T.

    Args:
        x: [T, K], rows sorted by group, no padding between groups: 16 bits, or FP8 terms for FP4 weights
            (which `fp8_split` makes of 16 bits here).
        weights: The groups' weights.
        group_sizes: int32 [E], rows of each group, any that are not negative; their sum is at most T.
        element: "float4_e2m1fn" or "int4" (u = q + 8).
        group_size: Columns that share a scale.
        out_dtype: bfloat16 or float16; x's where x has 16 bits and the weights are INT4.
        expected_rows: Rows of a group to choose the tiling for; default those of an even spread of x's rows.
        config: Tiling; default `choose_tiles`.
        num_sms: SMs to run on; default those of the first device.

    Returns:
        [T, N] in out_dtype, rows past the groups zeros.

    Raises:
        ValueError: If shapes or dtypes are not those above, or `unsupported_reason` has a reason.
    """
    return _grouped(
        "mixed_grouped_gemm",
        x,
        (weights,),
        group_sizes,
        activation=None,
        element=element,
        group_size=group_size,
        out_dtype=out_dtype,
        expected_rows=expected_rows,
        config=config,
        num_sms=num_sms,
    )


def mixed_gated_grouped_gemm(
    x: Array | FP8Rows,
    gate: GroupedWeights,
    up: GroupedWeights | None,
    group_sizes: Array,
    *,
    element: Element,
    group_size: int,
    activation: GatedActivation,
    out_dtype: DTypeLike = "bfloat16",
    expected_rows: float | None = None,
    config: MixedTileConfig | None = None,
    num_sms: int | None = None,
    fp8_terms: bool = False,
) -> Array | FP8Rows:
    """The gated activation of two grouped products of the same x.

    Args:
        x: As `mixed_grouped_gemm`'s.
        gate: The weights of the gate.
        up: Those of up; None if `gate` has both, 2N rows: blocks of 64 alternate in codes and scales, the first
            gate's, and numbers of the bias.
        group_sizes: As `mixed_grouped_gemm`'s.
        element: As `mixed_grouped_gemm`'s.
        group_size: As `mixed_grouped_gemm`'s.
        activation: What becomes of gate and up.
        out_dtype: As `mixed_grouped_gemm`'s.
        expected_rows: As `mixed_grouped_gemm`'s.
        config: As `mixed_grouped_gemm`'s.
        num_sms: As `mixed_grouped_gemm`'s.
        fp8_terms: Whether the result is two FP8 terms, as the next product of FP4 weights takes them. The
            activation's limit settles their scale: numbers below 2^-14 of its bound lose bits.

    Returns:
        [T, N] in out_dtype, rows past the groups zeros; or the terms, T rounded up to 8.

    Raises:
        ValueError: As `mixed_grouped_gemm`, and for terms of an activation without a limit.
    """
    if fp8_terms and activation.limit is None:
        raise ValueError(
            f"mixed_gated_grouped_gemm: FP8 terms need an activation with a limit; found {activation}"
        )
    return _grouped(
        "mixed_gated_grouped_gemm",
        x,
        (gate,) if up is None else (gate, up),
        group_sizes,
        activation=activation,
        element=element,
        group_size=group_size,
        out_dtype=out_dtype,
        expected_rows=expected_rows,
        config=config,
        num_sms=num_sms,
        out_scale=2.0 ** -math.floor(math.log2(448 / activation.bound)) if fp8_terms else None,
    )


def _grouped(
    op,
    x,
    weights,
    group_sizes,
    *,
    activation,
    element,
    group_size,
    out_dtype,
    expected_rows,
    config,
    num_sms,
    out_scale=None,
) -> Any:
    out_dtype = jnp.dtype(out_dtype)
    n = weights[0].codes.shape[1] * BLOCK
    rows, k = x.terms[0].shape if isinstance(x, FP8Rows) else x.shape
    _check(op, x, k, weights, group_sizes, n, element, group_size, out_dtype)
    gated = activation is not None
    if gated and len(weights) == 1:
        if n % (2 * BLOCK):
            raise ValueError(f"{op}: gate and up together must be pairs of {BLOCK} rows; found {n}")
        n //= 2
    if config is None:
        even = rows / group_sizes.shape[0] if expected_rows is None else expected_rows
        config = choose_tiles(math.ceil(even), element=element, gated=gated, group_size=group_size)
    least = 128 if element == "float4_e2m1fn" or group_size > 64 else 64
    if (gated and config.pieces != 2) or config.depth < least:
        raise ValueError(
            f"{op}: needs a depth of at least {least}{' and 2 pieces' * gated}; found {config}"
        )
    if element == "float4_e2m1fn" and not isinstance(x, FP8Rows):
        first, rest, scale = fp8_split(x)
        x = FP8Rows((first, rest), scale)
    terms, scale = x if isinstance(x, FP8Rows) else ((x,), None)
    if terms[0].shape[0] % 8:  # TMA wants the array's rows in whole tiles
        terms = tuple(jnp.pad(t, ((0, -rows % 8), (0, 0))) for t in terms)
    needed = terms[0].shape[0] + MAX_COLUMNS
    if isinstance(scale, Array) and scale.shape[0] < needed:  # plain loads know no bounds
        scale = jnp.pad(scale, (0, needed - scale.shape[0]))
    out = launch(
        terms,
        scale,
        weights,
        group_sizes,
        n=n,
        element=element,
        group_size=group_size,
        activation=activation,
        out_dtype=out_dtype,
        config=config,
        num_sms=jax.devices()[0].core_count if num_sms is None else num_sms,
        out_scale=out_scale,
    )
    return out[:rows] if out_scale is None else FP8Rows(out, out_scale)


def _check(op, x, k, weights, group_sizes, n, element, group_size, out_dtype) -> None:
    """Raises a ValueError that says what is wrong."""

    def expect(name, array, shape, dtype):
        if tuple(array.shape) != tuple(shape) or (dtype is not None and array.dtype != dtype):
            dtype = "" if dtype is None else f"{jnp.dtype(dtype).name} "
            raise ValueError(
                f"{op}: {name} must be {dtype}{list(shape)}; found {array.dtype} {list(array.shape)}"
            )

    terms = x.terms if isinstance(x, FP8Rows) else (x,)
    dtypes = [t.dtype.name for t in terms]
    if any(t.ndim != 2 or t.shape != terms[0].shape or 0 in t.shape for t in terms):
        raise ValueError(
            f"{op}: x must be [T, K], not empty; found {[list(t.shape) for t in terms]}"
        )
    if isinstance(x, FP8Rows) and (
        len(terms) > 2
        or element != "float4_e2m1fn"
        or not set(dtypes) <= {"float8_e4m3fn", "float8_e5m2"}
    ):
        raise ValueError(
            f"{op}: FP4 weights take one or two terms of FP8; found {dtypes} for {element}"
        )
    reason = unsupported_reason(
        n,
        k,
        element=element,
        group_size=group_size,
        x_dtype=out_dtype if isinstance(x, FP8Rows) else x.dtype,
        scale_dtype=weights[0].scale.dtype,
    )
    if reason:
        raise ValueError(f"{op}: {reason}")
    groups, groups_k = group_sizes.shape[0], pl.cdiv(k, min(group_size, 128))
    blocks = n // BLOCK
    expect("group_sizes", group_sizes, (groups,), jnp.int32)
    for codes, scale, global_scale, bias in weights:
        expect("codes", codes, (groups, blocks, k // BLOCK, 2, WORDS // 2), jnp.int32)
        expect("scale", scale, (groups, blocks, groups_k, BLOCK), weights[0].scale.dtype)
        if (global_scale is not None) != (element == "float4_e2m1fn"):
            raise ValueError(f"{op}: FP4 weights, and no others, have a global_scale")
        if global_scale is not None:
            expect("global_scale", global_scale, (groups,), jnp.float32)
        if bias is not None:
            expect("bias", bias, (groups, n), None)
