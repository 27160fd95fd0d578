"""FP8 quantization of activations fused with what comes before it, for Hopper: RMSNorm or SiLU-mul.

One warpgroup a CTA. A row is cut into chunks of 8 x 128 columns, all of them in flight at once and then kept in
registers, so that memory is read and written once::

    load x, residual / gate, up   -> registers   [chunk][8, 128], 8 columns a thread
    h = x + residual              -> bfloat16    -> memory
    mean of h^2 over the row      (shared memory between the warps)
    y = h * rsqrt(..) * weight, or silu(gate) * up     -> bfloat16
    amax of 128 columns (16 lanes), or of the row      -> scale -> memory
    y / scale                     -> FP8         -> memory

SiLU-mul with scales of blocks, or a given scale, has nothing to know about its row: there a CTA takes one or two
chunks. What eights leave of a row are chunks of 4, 2 and 1 blocks.

What is rounded: the sum with the residual, the norm's output, silu(gate) and its product with up are each
rounded to x's dtype before the next step, as the models' layers round their results.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qjax.pallas_kernels import _quantize_sm90 as tools
from qjax.pallas_kernels.fp8_quantize_sm90 import (
    BLOCK_K,
    IN_DTYPES,
    MAX_ROW,
    OUT_DTYPES,
    ROWS,
    padded_rows,
)

SCALINGS = ("1x128", "per_token", "static")
CHUNK = 8  # blocks
MAX_GATED_ROW = 28672  # columns of a row that are held as 16-bit numbers


def unsupported_reason(
    m: int, k: int, *, scaling: str, norm: bool, x_dtype: DTypeLike = "bfloat16"
) -> str | None:
    """Why the kernels can't take rows [m, k], None if they can.

    Args:
        m: Rows.
        k: Columns.
        scaling: One of `SCALINGS`.
        norm: Whether RMSNorm comes before, else SiLU-mul.
        x_dtype: The rows' dtype.
    """
    if jnp.dtype(x_dtype).name not in IN_DTYPES:
        return f"x must be one of {IN_DTYPES}; found {jnp.dtype(x_dtype).name}"
    if m < 1 or k < 1 or k % BLOCK_K:
        return f"K must be a multiple of {BLOCK_K} and M positive; found M={m}, K={k}"
    limit = MAX_ROW if norm else MAX_GATED_ROW
    if k > limit and (norm or scaling == "per_token"):
        return f"a row must fit registers: K up to {limit}; found {k}"
    return None


def fp8_quantize_rms_norm(
    x: Array,
    weight: Array,
    *,
    eps: float,
    scaling: str = "1x128",
    scale: Array | None = None,
    residual: Array | None = None,
    dtype: DTypeLike = "float8_e4m3fn",
    amax_min: float = 0.0,
    amax_max: float | None = None,
) -> tuple[Array, ...]:
    """Quantizes RMSNorm(x) or, with a residual, RMSNorm(x + residual).

    Args:
        x: [M, K], bfloat16 or float16.
        weight: [K] in x's dtype.
        eps: Added to the mean square.
        scaling: "1x128", "per_token" or "static": as `fp8_quantize_1x128`, `fp8_quantize_per_token`,
            `fp8_quantize_static`.
        scale: float32 [1] of "static".
        residual: Like x.
        dtype: float8_e4m3fn or float8_e5m2.
        amax_min: Floor of an amax, in the norm's units.
        amax_max: Upper bound of an amax.

    Returns:
        Codes [`padded_rows(M)`, K], zeros in the padding rows; scales: float32 [K/128, M rounded up to 64]
        ("1x128", 1 in the padding rows), [M] ("per_token"), or the scale given; and, with a residual, the
        sum x + residual [M, K].

    Raises:
        ValueError: If `unsupported_reason` has a reason, or another argument is not as above.
    """
    op = "fp8_quantize_rms_norm"
    inputs = {"x": x, "weight": weight}
    _check(op, x, scaling, scale, dtype, norm=True)
    if weight.shape != x.shape[1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"{op}: weight must be {x.dtype}[{x.shape[1]}]; found {weight.dtype}{list(weight.shape)}"
        )
    if residual is not None:
        _check_like(op, "residual", residual, x)
        inputs["residual"] = residual
    return _quantize_rows(op, inputs, scaling, scale, dtype, (amax_min, amax_max), eps)


def fp8_quantize_silu_mul(
    gate: Array,
    up: Array,
    *,
    scaling: str = "1x128",
    scale: Array | None = None,
    dtype: DTypeLike = "float8_e4m3fn",
    amax_min: float = 0.0,
    amax_max: float | None = None,
) -> tuple[Array, Array]:
    """Quantizes silu(gate) * up (arXiv:2002.05202).

    Args:
        gate: [M, K], bfloat16 or float16.
        up: Like gate.
        scaling: As in `fp8_quantize_rms_norm`.
        scale: As there.
        dtype: float8_e4m3fn or float8_e5m2.
        amax_min: Floor of an amax, in the product's units.
        amax_max: Upper bound of an amax (FBGEMM's activation_scale_ub).

    Returns:
        Codes and scales, as `fp8_quantize_rms_norm`.

    Raises:
        ValueError: If `unsupported_reason` has a reason, or another argument is not as above.
    """
    op = "fp8_quantize_silu_mul"
    _check(op, gate, scaling, scale, dtype, norm=False)
    _check_like(op, "up", up, gate)
    inputs = {"x": gate, "up": up}
    codes, scales = _quantize_rows(op, inputs, scaling, scale, dtype, (amax_min, amax_max))
    return codes, scales


def _check(op, x, scaling, scale, dtype, *, norm) -> None:
    if x.ndim != 2:
        raise ValueError(f"{op}: x must be [M, K]; found {list(x.shape)}")
    if scaling not in SCALINGS:
        raise ValueError(f"{op}: scaling must be one of {SCALINGS}; found {scaling!r}")
    if (scaling == "static") != (scale is not None):
        raise ValueError(f"{op}: static scaling, and no other, takes a scale")
    if scale is not None and (scale.shape != (1,) or scale.dtype != jnp.float32):
        raise ValueError(f"{op}: scale must be float32 [1]; found {scale.dtype}{list(scale.shape)}")
    if jnp.dtype(dtype).name not in OUT_DTYPES:
        raise ValueError(
            f"{op}: the codes must be one of {OUT_DTYPES}; found {jnp.dtype(dtype).name}"
        )
    reason = unsupported_reason(*x.shape, scaling=scaling, norm=norm, x_dtype=x.dtype)
    if reason:
        raise ValueError(f"{op}: {reason}")


def _check_like(op, name, array, x) -> None:
    if array.shape != x.shape or array.dtype != x.dtype:
        raise ValueError(
            f"{op}: {name} must be {x.dtype}{list(x.shape)}; found {array.dtype}{list(array.shape)}"
        )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How rows are cut.

    Attributes:
        rows: M.
        blocks: Blocks of 128 columns in a row.
        each: Blocks of a CTA; its last may have fewer.
    """

    rows: int
    blocks: int
    each: int

    @classmethod
    def make(cls, rows: int, k: int, *, whole_rows: bool) -> "_Plan":
        blocks = k // BLOCK_K
        if whole_rows:
            return cls(rows, blocks, blocks)
        # Two chunks keep more reads in flight, one spreads few rows over more SMs.
        chunks = 2 if rows * blocks >= 16 * 132 * CHUNK else 1
        return cls(rows, blocks, min(blocks, chunks * CHUNK))

    @property
    def parts(self) -> int:
        return pl.cdiv(self.blocks, self.each)

    def for_each_part(self, part, body) -> None:
        """Calls body with the chunks, [(first block, blocks)], of a CTA."""
        last = self.parts - 1
        rest = tools.chunks(last * self.each, self.blocks - last * self.each, most=CHUNK)
        if not last:
            body(rest)
            return
        pl.when(part < last)(lambda: body(tools.chunks(part * self.each, self.each, most=CHUNK)))
        pl.when(part == last)(lambda: body(rest))


def _quantize_rows(op, inputs, scaling, scale, dtype, bounds, eps=0.0) -> tuple[Array, ...]:
    """All of the above: `inputs` by the names that the kernel knows them by."""
    x, dtype = inputs["x"], jnp.dtype(dtype)
    m, k = x.shape
    plan = _Plan.make(m, k, whole_rows="weight" in inputs or scaling == "per_token")
    block_rows = pl.cdiv(m, ROWS) * ROWS
    in_blocks = {
        name: array.reshape(*array.shape[:-1], plan.blocks, BLOCK_K)
        for name, array in inputs.items()
    }
    out = {"codes": jax.ShapeDtypeStruct((padded_rows(m), plan.blocks, BLOCK_K), dtype)}
    if scaling == "static":
        in_blocks["scale"] = scale
    else:
        shape = (plan.blocks, block_rows) if scaling == "1x128" else (m,)
        out["scale"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if "residual" in inputs:
        out["sum"] = jax.ShapeDtypeStruct((m, plan.blocks, BLOCK_K), x.dtype)
    body = functools.partial(
        _rows_kernel,
        names=(*in_blocks, *out),
        plan=plan,
        scaling=scaling,
        dtype=dtype,
        bounds=bounds,
        eps=eps,
    )
    results = plgpu.kernel(
        body,
        out_type=tuple(out.values()),
        # Rows last: only CUDA's x axis may be longer than 65535.
        grid=(plan.parts, block_rows if scaling == "1x128" else padded_rows(m)),
        grid_names=("part", "row"),
        num_threads=1,
        thread_name="wg",
        kernel_name=op,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*in_blocks.values())
    results = dict(zip(out, results, strict=True))
    codes = results["codes"].reshape(padded_rows(m), k)
    scales = scale if scaling == "static" else results["scale"]
    return (codes, scales, *([results["sum"].reshape(m, k)] if "sum" in results else []))


def _rows_kernel(*refs, names, plan, scaling, dtype, bounds, eps):
    gmem = dict(zip(names, refs, strict=True))
    codes, scales = gmem["codes"], gmem["scale"]
    row = lax.axis_index("row")
    amax_min, amax_max = bounds

    def scale_of(amax):
        return tools.scale_of(amax, tools.largest(dtype), amax_min=amax_min, amax_max=amax_max)

    def quantize(chunks):
        at = [pl.ds(*chunk) for chunk in chunks]
        values = _normalized(gmem, row, at, eps) if "weight" in gmem else _gated(gmem, row, at)
        values = [y.astype(jnp.float32) for y in values]
        row_scale = None  # of "1x128" scaling, whose chunks have their own
        if scaling == "static":
            row_scale = scales[0]
        elif scaling == "per_token":
            row_scale = scale_of(_reduce(jnp.maximum, jnp.max, map(tools.finite_magnitude, values)))
            scales[row] = row_scale
        for piece, y in zip(at, values, strict=True):
            if row_scale is None:
                scale = scale_of(jnp.max(tools.finite_magnitude(y), axis=1))
                scales.at[piece, row][...] = scale
                scale = lax.broadcast_in_dim(scale, y.shape, [0])
            else:
                scale = jnp.broadcast_to(row_scale, y.shape)
            layout = _layout(piece.size)
            scale = plgpu.layout_cast(scale, layout)
            codes[row, piece] = tools.quantize(y, scale, dtype, layout)

    def pad(chunks):
        for chunk in chunks:
            at, layout = pl.ds(*chunk), _layout(chunk[1])
            if scaling == "1x128":
                ones = jnp.ones((at.size,), jnp.float32)
                scales.at[at, row][...] = plgpu.layout_cast(ones, layout.reduce(1))

            @pl.when(row < codes.shape[0])
            def _(at=at, layout=layout):
                zeros = plgpu.layout_cast(jnp.zeros((at.size, BLOCK_K), jnp.float32), layout)
                codes[row, at] = zeros.astype(dtype)

    part = lax.axis_index("part")
    pl.when(row < plan.rows)(lambda: plan.for_each_part(part, quantize))
    pl.when(row >= plan.rows)(lambda: plan.for_each_part(part, pad))


def _layout(blocks: int):
    return tools.row_major_layout((blocks, BLOCK_K))


def _load(ref) -> Array:
    # "optimized" transfers are those of shared memory
    return plgpu.load(ref, layout=_layout(ref.shape[0]), optimized=False)


def _reduce(combine, reduce, arrays) -> Array:
    """The reduction of all arrays' elements: a scalar."""
    by_shape: dict[tuple[int, ...], list[Array]] = {}
    for array in arrays:
        by_shape.setdefault(array.shape, []).append(array)
    totals = (functools.reduce(combine, same) for same in by_shape.values())
    return functools.reduce(combine, [reduce(reduce(t, axis=1)) for t in totals])


def _normalized(gmem, row, at, eps) -> list[Array]:
    """RMSNorm of a row, its chunks in x's dtype; stores the sum with the residual."""
    chunks = [_load(gmem["x"].at[row, piece]) for piece in at]
    dtype = chunks[0].dtype
    if "residual" in gmem:
        added = [_load(gmem["residual"].at[row, piece]) for piece in at]
        for i, (piece, other) in enumerate(zip(at, added, strict=True)):
            total = chunks[i].astype(jnp.float32) + other.astype(jnp.float32)
            chunks[i] = total.astype(dtype)
            gmem["sum"][row, piece] = chunks[i]
    square = _reduce(jnp.add, jnp.sum, (jnp.square(h.astype(jnp.float32)) for h in chunks))
    columns = sum(piece.size for piece in at) * BLOCK_K
    factor = lax.rsqrt(square / columns + eps)
    out = []
    for piece, h in zip(at, chunks, strict=True):
        weight = _load(gmem["weight"].at[piece]).astype(jnp.float32)
        out.append((h.astype(jnp.float32) * factor * weight).astype(dtype))
    return out


def _gated(gmem, row, at) -> list[Array]:
    """silu(gate) * up of a row's chunks in gate's dtype."""
    pairs = [tuple(_load(gmem[name].at[row, piece]) for name in ("x", "up")) for piece in at]
    out = []
    for gate, up in pairs:
        activated = tools.silu(gate.astype(jnp.float32), _layout(gate.shape[0]))
        product = activated.astype(gate.dtype).astype(jnp.float32) * up.astype(jnp.float32)
        out.append(product.astype(gate.dtype))
    return out
