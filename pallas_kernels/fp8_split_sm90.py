"""Activations of 16 bits as sums of two FP8 terms, for Hopper.

One warpgroup splits one row and writes it where each of the token's experts wants it, or it takes any row of the
input for a row of the output. The row stays in registers between its amax and its terms; see `fp8_split_reference`
for the numbers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qjax.pallas_kernels import _quantize_sm90 as tools

BLOCK = 64
CHUNK = 32  # blocks of a register array, at most; at least 2, so that every thread holds some
MAX_ROW = 16384
PAST = 264  # the rows that fill up 8, and the widest tile from there
SMALLEST = 2.0**-100  # powers below are taken for it, so that no scale is subnormal
_EXPONENT = 0x7F800000


def unsupported_reason(k: int, *, x_dtype: DTypeLike = "bfloat16") -> str | None:
    """Why the kernel can't take rows of k columns, None if it can."""
    if jnp.dtype(x_dtype) != jnp.bfloat16:
        return f"x must be bfloat16; found {jnp.dtype(x_dtype).name}"
    if k < 2 * BLOCK or k % BLOCK or k > MAX_ROW:
        return f"K must be a multiple of {BLOCK} from {2 * BLOCK} to {MAX_ROW}; found {k}"
    return None


def fp8_split_reference(x: Array) -> tuple[Array, Array, Array]:
    """What the kernel computes, by XLA: (e4m3 [T, K], e5m2 [T, K], float32 scales [T]), scale * sum of terms = x.

    A row's scale is the power of two that puts its largest number into [2^7, 2^8). e4m3 rounds a number to four
    bits, from 2^7 of a row's largest downwards; what is left over of bfloat16's eight bits are at most three and
    a half, which e5m2 holds. A row with an infinity or a NaN is NaN.
    """
    values = x.astype(jnp.float32)
    exponents = lax.bitcast_convert_type(values, jnp.int32) & _EXPONENT
    scale, inverse = _scales(jnp.max(exponents, axis=1, initial=0))
    scaled = values * inverse[:, None]
    first = scaled.astype(jnp.float8_e4m3fn)
    rest = (scaled - first.astype(jnp.float32)).astype(jnp.float8_e5m2)
    return first, rest, scale


def _scales(exponent: Array) -> tuple[Array, Array]:
    """The scale and its inverse for the exponent of a row's largest number, as float32 has it; both exact."""
    power = lax.bitcast_convert_type(exponent, jnp.float32)
    scale = jnp.maximum(power, SMALLEST) * 2.0**-7
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    inverse = lax.bitcast_convert_type(2 * (127 << 23) - bits, jnp.float32)
    infinite = power == jnp.inf
    return jnp.where(infinite, jnp.nan, scale), jnp.where(infinite, 1.0, inverse)


def fp8_split(
    x: Array, rows: Array | None = None, *, places: Array | None = None
) -> tuple[Array, Array, Array]:
    """Two FP8 terms of rows of x, as `fp8_split_reference` has them.

    Args:
        x: [T, K], bfloat16.
        rows: int32 [M], the row of x that each row of the result is; default all of them in order.
        places: Instead of `rows`, int32 [M], M a multiple of T: where the copies of each row of x in turn go,
            each row of the result once.

    Returns:
        Terms e4m3 and e5m2 [M', K], M' = M rounded up to 8, and float32 scales [M + `PAST`], as the product reads
        them; what is past M is not written.

    Raises:
        ValueError: If the shapes are not those above, or `unsupported_reason` has a reason.
    """
    index = rows if places is None else places
    if x.ndim != 2 or 0 in x.shape or (index is not None and index.ndim != 1):
        found = list(x.shape), None if index is None else list(index.shape)
        raise ValueError(f"fp8_split: x must be [T, K] and rows [M], not empty; found {found}")
    if places is not None and (rows is not None or places.shape[0] % x.shape[0]):
        raise ValueError(
            "fp8_split: without rows, places must be as many for each row of x; found "
            f"{places.shape[0]} for {x.shape[0]}"
        )
    if reason := unsupported_reason(x.shape[1], x_dtype=x.dtype):
        raise ValueError(f"fp8_split: {reason}")
    count, k = x.shape[0] if index is None else index.shape[0], x.shape[1]
    copies = 0 if places is None else count // x.shape[0]
    shape = (pl.cdiv(count, 8) * 8, k // BLOCK, BLOCK)
    first, rest, scale = plgpu.kernel(
        functools.partial(_row_kernel, copies=copies),
        out_type=(
            jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct(shape, jnp.float8_e5m2),
            jax.ShapeDtypeStruct((count + PAST,), jnp.float32),
        ),
        grid=(x.shape[0] if copies else count,),
        grid_names=("row",),
        num_threads=1,
        thread_name="wg",
        kernel_name="fp8_split",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(x.reshape(-1, *shape[1:]), *([] if index is None else [index.astype(jnp.int32)]))
    return first.reshape(-1, k), rest.reshape(-1, k), scale


def _row_kernel(x_gmem, *refs, copies: int):
    *index, first_gmem, rest_gmem, scale_gmem = refs
    row = lax.axis_index("row")
    source = index[0][row] if index and not copies else row
    targets = [index[0][row * copies + i] for i in range(copies)] or [row]
    chunks = tools.chunks(0, x_gmem.shape[1], most=CHUNK, least=2)
    values = [
        plgpu.load(x_gmem.at[source, pl.ds(*chunk)], layout=_layout(chunk[1]), optimized=False)
        for chunk in chunks
    ]
    values = [v.astype(jnp.float32) for v in values]
    exponents = [lax.bitcast_convert_type(v, jnp.int32) & _EXPONENT for v in values]
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.max(e, axis=1)) for e in exponents])
    scale = None
    for chunk, value in zip(chunks, values, strict=True):
        layout = _layout(chunk[1])
        spread = plgpu.layout_cast(jnp.broadcast_to(largest, value.shape), layout)
        scale, inverse = _scales(spread)
        scaled = value * inverse
        first = scaled.astype(jnp.float8_e4m3fn)
        rest = (scaled - first.astype(jnp.float32)).astype(jnp.float8_e5m2)
        for target in targets:
            first_gmem[target, pl.ds(*chunk)] = first
            rest_gmem[target, pl.ds(*chunk)] = rest
    assert scale is not None
    scale = jnp.max(jnp.max(scale, axis=1))
    for target in targets:
        scale_gmem[target] = scale


def _layout(blocks: int):
    return tools.row_major_layout((blocks, BLOCK))
