"""Matrix product of 16-bit activations and 2-, 4- or 8-bit weights for Hopper, weights in wgmma's own register order.

``out[m, n] = sum_g sum_{k in g} w[n, k] * x[m, k] + bias[n]`` where a group g of K columns shares, in each row n,
``w = (q - zero_point) * scale`` or ``w = (q - zero) * scale + minimum``; q is an integer, an FP8 or an FP4 number.

`repack` re-lays the weights out once: 64 rows by 64 columns are one contiguous block (`wgmma_layout`), in which
each thread of a warpgroup finds its 32 codes in chunks of 16 bytes, ready for wgmma's left operand. So a stage of
the pipeline is one copy of contiguous bytes, a thread reads its codes with conflict-free 16-byte loads, and neither
the codes nor x are shuffled afterwards. The tile is the transpose of the output's: 64 weight rows by up to 128
tokens a warpgroup. The CTAs of a cluster cut K among themselves and add their float32 sums through L2, for every
tile or only for those left over when all CTAs have had equally many whole tiles, neighbours that may share x by
multicast. mma.sync, whose fragments are the same, is faster for up to 8 tokens than wgmma:

    producer warpgroup                          math warpgroups (block of 64 rows, part of a step's K)
    ------------------                          -------------------------------------------------
    for each tile of the cluster:               for each tile of the cluster:
      for each `step` of this CTA's K:            for each `step` of this CTA's K:
        wait  empty[slot]        <--------------+   wait  full[slot]
        TMA x     -> x_smem[slot, part]         |   for each group of the part's columns:
        TMA codes -> codes_smem[slot]           |     codes -> exact 16-bit floats q - zero_point
        TMA scale -> scale_smem[slot]           |     product = wgmma(codes, x_smem)
        (each arrives on full[slot]) -------->  |     sum += product * scale[row, group]      float32
                                                +-  arrive empty[slot]
                                                  parts > 0: wait taken; sum -> sum_smem; arrive added
                                                  part 0: wait added; add the parts; arrive taken
                                                    splits: sum -> workspace; arrive summed on every CTA
                                                      wait summed; one of the CTAs adds the splits
                                                    sum -> out_smem (transposed) -> TMA store

Making 8 weights of their codes costs 11 instructions for INT4, 12 for INT2, 14 for INT8, 18 for FP8 and 19 for FP4
(float16: 10 for INT8): `_mixed_gemm_registers_sm90`. Minimums never meet the codes: what they add to a sum is
``minimum[n, g] * sum_{k in g} x[m, k]``, one multiply-add for each group and sum, with sums of x that XLA computes
once.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from qjax.pallas_kernels._mixed_gemm_registers_sm90 import ELEMENTS
from qjax.pallas_kernels._mixed_gemm_sm90 import launch
from qjax.pallas_kernels._mixed_gemm_tiles_sm90 import (
    COLUMNS,
    MAX_SCALE_BYTES,
    MAX_SMEM,
    MIN_SUMS,
    TileConfig,
    candidate_tiles,
    choose_tiles,
    modelled_us,
)
from qjax.wgmma_layout import BLOCK, codes_shape, to_row_blocks, to_words, to_words8

X_DTYPES = ("bfloat16", "float16")
SCALE_DTYPES = ("bfloat16", "float16", "float32")


def unsupported_reason(
    m: int,
    n: int,
    k: int,
    *,
    group_size: int,
    element: str = "int4",
    x_dtype: DTypeLike = "bfloat16",
    scale_dtype: DTypeLike = "bfloat16",
) -> str | None:
    """Why the kernel can't take x [m, k] and a weight [n, k], None if it can.

    Args:
        m: Tokens.
        n: Weight rows.
        k: Columns.
        group_size: Columns that share a scale; k for one scale a row. The last group may be short.
        element: Of the codes.
        x_dtype: The activations' dtype, also the output's.
        scale_dtype: The scales' dtype.
    """
    x_dtype, scale_dtype = jnp.dtype(x_dtype).name, jnp.dtype(scale_dtype).name
    if element not in ELEMENTS:
        return f"codes must be of {tuple(ELEMENTS)}; found {element}"
    if x_dtype not in X_DTYPES or scale_dtype not in SCALE_DTYPES:
        return (
            f"x must be one of {X_DTYPES} and the scales of {SCALE_DTYPES}; "
            f"found {x_dtype} and {scale_dtype}"
        )
    if m < 1 or n < 8 or n % 8 or k < 8 or k % 8:
        return f"N and K must be multiples of 8 and M positive; found M={m}, N={n}, K={k}"
    return group_reason(group_size, k)


def group_reason(group_size: int, k: int) -> str | None:
    """Why groups of so many columns have no kernel, None if they have."""
    if group_size not in (32, 64) and group_size % 128 and group_size != k:
        return (
            f"groups must be of 32, 64, a multiple of 128 or all K={k} columns; found {group_size}"
        )
    return None


def repack(
    codes: Array,
    scale: Array,
    offset: Array | None = None,
    *,
    group_size: int,
    element: str = "int4",
    eight_bit_inputs: bool = False,
) -> tuple[Array, Array, Array | None]:
    """Weights in the kernel's layout, from the layouts of compressed-tensors and `QArray`.

    Args:
        codes: 2 or 4 bits: uint8 [N, K * bits / 8] of u = q + 2**(bits-1) or raw FP4, the first column in the lowest
            bits.
            8 bits: [N, K] of the element's dtype.
        scale: [N, ceil(K/group_size)], of either sign.
        offset: Of scale's shape: zero points (integers in units of the signed code q, |q - zero_point| <= 256),
            minimums (of scale's dtype), or None.
        group_size: Columns that share a scale; K for one scale a row.
        element: Of the codes.
        eight_bit_inputs: Whether "int4" is for `w4a8_gemm_sm90`: "wgmma8" storage.

    Returns:
        (codes, scale, offset). codes: int32 [N/64, K/64, bits/2, 256], sizes rounded up, as `wgmma_layout`
        describes. scale and offset (zero points: bfloat16): [N/64, groups, 64]; groups of more than 128 columns,
        but not of all K, are repeated for each 128.

    Raises:
        ValueError: If shapes or dtypes are not those above.
    """
    n, k = _check_stored(codes, scale, offset, group_size, element)
    bits = ELEMENTS[element]
    if codes.dtype != jnp.uint8:
        codes = lax.bitcast_convert_type(codes, jnp.uint8)
    codes = jnp.pad(codes, ((0, -n % BLOCK), (0, (-k % BLOCK) * bits // 8)))

    def by_rows(values: Array) -> Array:
        if group_size % 128 == 0 and group_size < k:
            values = jnp.repeat(values, group_size // 128, axis=1)[:, : -(-k // 128)]
        return to_row_blocks(jnp.pad(values, ((0, -n % BLOCK), (0, 0))))

    if offset is not None:
        is_zero_point = jnp.issubdtype(offset.dtype, jnp.integer)
        offset = by_rows(offset.astype(jnp.bfloat16) if is_zero_point else offset)
    words = to_words8(codes, element) if eight_bit_inputs else to_words(codes, bits)
    return words, by_rows(scale), offset


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
        element: Of the codes, as `repack` was told: "int2", "int4", "int8", "float4_e2m1fn", "float8_e4m3fn"
            or "float8_e5m2" (whose NaN and infinities must not occur).
        minimum: Of scale's shape and dtype, from `repack`; or None.
        zero: Zero point of all integers, where `zero_point` is None.
        bias: [N], floating, added in float32.
        config: Tiling; default `choose_tiles`.
        num_sms: SMs to run on; default those of the first device.

    Returns:
        [M, N] in x's dtype.

    Raises:
        ValueError: If shapes or dtypes are not those above, or `unsupported_reason` has a reason.
    """
    m, k = check_operands(x, codes, scale, zero_point, minimum, bias, n, group_size, element, zero)
    num_sms = jax.devices()[0].core_count if num_sms is None else num_sms
    group = k if group_size == k else min(group_size, 128)
    if config is None:
        offset_bytes = 2 if zero_point is not None else 0
        if minimum is not None:
            offset_bytes = scale.dtype.itemsize
        config = choose_tiles(
            m,
            n,
            k,
            num_sms=num_sms,
            scale_bytes=(scale.dtype.itemsize + offset_bytes) / min(group_size, 128),
            bits=ELEMENTS[element],
            sums=0 if minimum is None else 1 / min(group_size, 128),
        )
    operands = {"x": x, "codes": codes, "scale": scale}
    if zero_point is not None:
        operands["zero_point"] = zero_point
    if minimum is not None:
        operands["minimum"] = minimum
        operands["sums"] = group_sums(x, group, max(config.columns, MIN_SUMS))
    if bias is not None:
        padded = jnp.pad(bias.astype(jnp.float32), (0, -n % BLOCK))
        operands["bias"] = padded.reshape(-1, BLOCK)
    if m > 8 and m % 8:  # a tiled TMA copy wants the array's rows in whole tiles
        operands["x"] = jnp.pad(x, ((0, -m % 8), (0, 0)))
    return launch(operands, (m, n, k), element, group, zero, config, num_sms)


def group_sums(x: Array, group: int, multiple: int) -> Array:
    """float32 [ceil(K/group), M'], M' the next multiple: each group's columns of x added."""
    m, k = x.shape
    # Padded first: XLA makes one kernel of it then.
    x = jnp.pad(x.astype(jnp.float32), ((0, -m % multiple), (0, -k % group)))
    return jnp.sum(x.reshape(x.shape[0], -1, group), axis=-1).T


def _expect(name: str, array: Array, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    if tuple(array.shape) != shape or array.dtype != jnp.dtype(dtype):
        raise ValueError(
            f"mixed_gemm: {name} must be {jnp.dtype(dtype).name}{list(shape)}; "
            f"found {array.dtype}{list(array.shape)}"
        )


def _check_stored(codes, scale, offset, group_size: int, element: str) -> tuple[int, int]:
    if codes.ndim != 2 or scale.ndim != 2:
        raise ValueError(
            f"mixed_gemm: repack takes codes [N, K * bits / 8] and scale [N, groups]; "
            f"found {list(codes.shape)} and {list(scale.shape)}"
        )
    bits = ELEMENTS.get(element, 8)
    n, k = codes.shape[0], codes.shape[1] * 8 // bits
    reason = unsupported_reason(
        1, n, k, group_size=group_size, element=element, scale_dtype=scale.dtype
    )
    if reason:
        raise ValueError(f"mixed_gemm: {reason}")
    _expect("codes", codes, (n, k * bits // 8), element if bits == 8 else "uint8")
    _expect("scale", scale, (n, -(-k // group_size)), scale.dtype)
    if offset is not None:
        integers = jnp.issubdtype(offset.dtype, jnp.integer)
        name, dtype = ("zero_point", offset.dtype) if integers else ("minimum", scale.dtype)
        _expect(name, offset, scale.shape, dtype)
        if not element.startswith("int"):
            raise ValueError(f"mixed_gemm: only integers take a {name}; found {element} codes")
    return n, k


def check_operands(
    x, codes, scale, zero_point, minimum, bias, n: int, group_size: int, element: str, zero: int
) -> tuple[int, int]:
    """M and K of arguments of `mixed_gemm`.

    Raises:
        ValueError: Naming what is wrong.
    """
    if x.ndim != 2:
        raise ValueError(f"mixed_gemm: x must be [M, K]; found {list(x.shape)}")
    m, k = x.shape
    reason = unsupported_reason(
        m, n, k, group_size=group_size, element=element, x_dtype=x.dtype, scale_dtype=scale.dtype
    )
    if reason:
        raise ValueError(f"mixed_gemm: {reason}")
    rows, columns = -(-n // BLOCK), -(-k // BLOCK)
    groups = 1 if group_size == k else -(-k // min(group_size, 128))
    shape = codes_shape(rows * BLOCK, columns * BLOCK, ELEMENTS[element])
    _expect("codes", codes, shape, "int32")
    _expect("scale", scale, (rows, groups, BLOCK), scale.dtype)
    if zero_point is not None:
        _expect("zero_point", zero_point, scale.shape, "bfloat16")
    if minimum is not None:
        _expect("minimum", minimum, scale.shape, scale.dtype)
    for name, offset in (("zero_point", zero_point), ("minimum", minimum)):
        if offset is not None and not element.startswith("int"):
            raise ValueError(f"mixed_gemm: only integers take a {name}; found {element} codes")
    if bias is not None:
        _expect("bias", bias, (n,), bias.dtype)
    if zero and (zero_point is not None or not element.startswith("int")):
        with_what = element if zero_point is None else "zero_point"
        raise ValueError(f"mixed_gemm: zero must be 0 with {with_what}; found {zero}")
    return m, k


__all__ = [
    "COLUMNS",
    "ELEMENTS",
    "MAX_SCALE_BYTES",
    "MAX_SMEM",
    "SCALE_DTYPES",
    "X_DTYPES",
    "TileConfig",
    "candidate_tiles",
    "choose_tiles",
    "mixed_gemm",
    "modelled_us",
    "repack",
    "unsupported_reason",
]
