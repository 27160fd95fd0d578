"""Grouped matrix product of a mixture of experts: each group of rows meets its own expert's weight."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from qjax.formats import WHOLE, ActivationFormat
from qjax.ops._dispatch import choose, device_reason, num_sms
from qjax.ops._dot import straight_through
from qjax.ops._dot_kernels import describe, fp8_pair, prepackable, quantized_operand
from qjax.pallas_kernels import fp8_grouped_gemm_sm90, mixed_grouped_gemm_sm90
from qjax.pallas_kernels.mixed_grouped_gemm_sm90 import FP8Rows
from qjax.qarray import QArray, decode_scale, dequantize_stored
from qjax.quantization import quantize_activation
from qjax.wgmma_layout import pair_rows, unpair_rows


def ragged_dot(
    lhs: Array | QArray,
    rhs: Array | QArray,
    group_sizes: Int[Array, " E"],
    *,
    bias: Float[Array, "E N"] | None = None,
    activation_format: ActivationFormat | None = None,
    activation_scale: Array | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """lhs[rows of expert e] @ rhs[e].T for consecutive groups of rows, summed in float32.

    Gradients flow to lhs (and to a plain rhs); quantization of lhs is differentiated as the identity.

    Args:
        lhs: [M, K], rows sorted by expert, floating; or a QArray, then already quantized.
        rhs: [E, N, K], plain or quantized.
        group_sizes: Rows of each expert; rows past their sum come out as zeros.
        bias: [E, N], added in float32.
        activation_format: Quantizes lhs first.
        activation_scale: The scale of a static activation format, a scalar or one per expert [E].
        out_dtype: Result's dtype; default lhs's.
        implementation: "pallas_mosaic_gpu", "xla" or None for the kernel where there is one.

    Raises:
        ValueError: If the shapes disagree, or the implementation asked for can't take the arguments.
    """
    found = f"{list(lhs.shape)}, {list(rhs.shape)}, {list(group_sizes.shape)}"
    if lhs.ndim != 2 or rhs.ndim != 3 or rhs.shape[::2] != (*group_sizes.shape, lhs.shape[-1]):
        raise ValueError(
            f"ragged_dot: needs lhs [M, K], rhs [E, N, K], group_sizes [E]; found {found}"
        )
    if isinstance(rhs, QArray) and rhs.column_perm is not None:
        raise ValueError("ragged_dot: experts with a column permutation are not supported")
    out_dtype = jnp.dtype(lhs.dtype if out_dtype is None else out_dtype)
    if isinstance(rhs, QArray):
        reason = unsupported_reason(
            lhs, rhs, activation_format=activation_format, out_dtype=out_dtype
        )
        if choose("ragged_dot", implementation, reason) == "pallas_mosaic_gpu":
            run = grouped_product if isinstance(lhs, QArray) else _differentiable
            return run((activation_format, out_dtype.name), lhs, rhs, group_sizes, bias)
    expert = expert_of_rows(group_sizes, lhs.shape[0])
    inside = (expert < rhs.shape[0])[:, None]
    expert = jnp.minimum(expert, rhs.shape[0] - 1)
    dtype = jnp.float32 if isinstance(lhs, QArray) else lhs.dtype
    x = dequantize_stored(lhs) if isinstance(lhs, QArray) else lhs.astype(jnp.float32)
    if activation_format is not None and not isinstance(lhs, QArray):
        x = straight_through(x, _quantized(lhs, activation_format, activation_scale, expert))
    if isinstance(rhs, QArray):
        y = _xla(x, rhs, group_sizes)
    else:
        y = jax.lax.ragged_dot(
            x.astype(dtype),
            jnp.swapaxes(rhs, 1, 2).astype(dtype),
            group_sizes.astype(jnp.int32),
            preferred_element_type=jnp.float32,
        )
    if bias is not None:
        y = y + jnp.take(bias.astype(jnp.float32), expert, axis=0)
    return jnp.where(inside, y, 0.0).astype(out_dtype)


def unsupported_reason(
    lhs: Array | QArray,
    rhs: Array | QArray,
    *,
    activation_format: ActivationFormat | None = None,
    out_dtype: DTypeLike | None = None,
) -> str | None:
    """Why no kernel takes this product on the default device, None if one does."""
    reason = device_reason("9.0")
    if reason or not isinstance(rhs, QArray):
        return reason or "no kernel for plain experts: XLA's product is the fast one"
    inputs = (
        lhs.format if isinstance(lhs, QArray) else activation_format and activation_format.format
    )
    out_dtype = lhs.dtype if out_dtype is None else out_dtype
    if lhs.shape[0] == 0:
        return "there are no rows"
    if rhs.format.ordered:
        return _mixed_reason(lhs, rhs, inputs, out_dtype)
    if prepackable(rhs) and inputs is None:
        return "the experts have a checkpoint's layout: qjax.prepack(w) once for the kernel"
    pair = fp8_pair(rhs.format, inputs) if rhs.format.element.startswith("float8") else None
    if pair is None:
        return f"no kernel for experts of {describe(rhs.format)} with {describe(inputs)} inputs"
    if activation_format is not None and activation_format.static:
        return "static scales differ between experts: their inputs are quantized by XLA"
    assert inputs is not None
    return fp8_grouped_gemm_sm90.unsupported_reason(
        *rhs.shape[1:],
        x_dtype=inputs.element,
        w_dtype=rhs.format.element,
        out_dtype=out_dtype,
    )


def _mixed_reason(lhs, rhs: QArray, inputs, out_dtype) -> str | None:
    """Why the kernel of 4-bit experts can't take this product, None if it can."""
    f = rhs.format
    per_token = inputs is not None and inputs.block_shape == (1, WHOLE)
    if inputs is not None and not (per_token and inputs.element.startswith("float8")):
        return f"no kernel for experts of {describe(f)} with {describe(inputs)} inputs"
    if inputs is None and jnp.dtype(out_dtype) != lhs.dtype:
        return f"the kernel's output has lhs' dtype {lhs.dtype}; found {jnp.dtype(out_dtype)}"
    if f.storage == "wgmma" and (f.element != "int4" or f.offset or inputs is not None):
        return f"no kernel for experts of {describe(f)} with {describe(inputs)} inputs"
    return mixed_grouped_gemm_sm90.unsupported_reason(
        *rhs.shape[1:],
        element=f.element,
        group_size=f.block_size(rhs.shape)[1],
        x_dtype=out_dtype,
        scale_dtype=rhs.scale.dtype,
    )


def grouped_product(static, lhs, rhs: QArray, group_sizes, bias) -> Array:
    """By a kernel; `static` is the activation format and the name of the output's dtype."""
    activation_format, out_dtype = static
    if rhs.format.ordered:
        pairs = rhs.format.storage == "wgmma8_pairs"
        if pairs and bias is not None:
            bias = pair_rows(bias[..., None])[..., 0]
        y = mixed_grouped_gemm_sm90.mixed_grouped_gemm(
            mixed_rows(lhs, activation_format),
            mixed_weights(rhs, bias),
            group_sizes.astype(jnp.int32),
            out_dtype=out_dtype,
            num_sms=num_sms(),
            **mixed_options(rhs),
        )
        return unpair_rows(y.T).T if pairs else y
    rows = lhs.shape[0]
    codes, x_scale = quantized_operand(lhs, activation_format, None)
    w_scale = decode_scale(rhs.scale)
    inputs = lhs.format if isinstance(lhs, QArray) else activation_format.format
    block = fp8_pair(rhs.format, inputs) == "fp8_block"
    if not block:
        x_scale = jnp.broadcast_to(x_scale, (rows,)) if x_scale.size == 1 else x_scale
        x_scale = jnp.pad(x_scale, (0, codes.shape[0] - rows))
        w_scale = jnp.broadcast_to(w_scale[..., 0], rhs.shape[:2])
    kernel = (
        fp8_grouped_gemm_sm90.fp8_block_grouped_gemm
        if block
        else fp8_grouped_gemm_sm90.fp8_rowwise_grouped_gemm
    )
    y = kernel(
        codes,
        x_scale,
        rhs.qvalue,
        w_scale,
        group_sizes.astype(jnp.int32),
        bias=bias,
        out_dtype=out_dtype,
        num_sms=num_sms(),
    )
    return y[:rows]


def mixed_rows(lhs, activation_format) -> Array | FP8Rows:
    """lhs as the kernel of 4-bit experts reads it."""
    if isinstance(lhs, FP8Rows) or (activation_format is None and not isinstance(lhs, QArray)):
        return lhs
    codes, scale = quantized_operand(lhs, activation_format, None)
    return FP8Rows((codes[: lhs.shape[0]],), scale)


def mixed_weights(rhs: QArray, bias=None) -> mixed_grouped_gemm_sm90.GroupedWeights:
    """Re-laid out weights as that kernel takes them, the bias in the order of the stored rows."""
    scale = None if rhs.global_scale is None else rhs.global_scale.reshape(-1)
    return mixed_grouped_gemm_sm90.GroupedWeights(rhs.qvalue, rhs.scale, scale, bias)


def mixed_options(rhs: QArray) -> dict[str, Any]:
    """What that kernel must know of the weights' format."""
    return dict(element=rhs.format.element, group_size=rhs.format.block_size(rhs.shape)[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(static, lhs, rhs, group_sizes, bias):
    return grouped_product(static, lhs, rhs, group_sizes, bias)


def _forward(static, lhs, rhs, group_sizes, bias):
    return grouped_product(static, lhs, rhs, group_sizes, bias), (lhs, rhs, group_sizes, bias)


def _backward(static, residuals, g):
    del static
    lhs, rhs, group_sizes, bias = residuals
    g = g.astype(jnp.float32)
    like = jax.ShapeDtypeStruct(lhs.shape, jnp.float32)
    (d_lhs,) = jax.linear_transpose(lambda x: _xla(x, rhs, group_sizes), like)(g)
    d_bias = None
    if bias is not None:
        rows = jax.nn.one_hot(expert_of_rows(group_sizes, lhs.shape[0]), rhs.shape[0])
        d_bias = jnp.einsum("me,mn->en", rows, g).astype(bias.dtype)
    return d_lhs.astype(lhs.dtype), None, None, d_bias


_differentiable.defvjp(_forward, _backward)


def expert_of_rows(group_sizes: Int[Array, " E"], rows: int) -> Int[Array, " M"]:
    """The expert of each of so many sorted rows, E for rows past the groups."""
    ends = jnp.cumsum(group_sizes)
    return jnp.searchsorted(ends, jnp.arange(rows, dtype=ends.dtype), side="right")


def _quantized(lhs, activation_format, scale, expert) -> Array:
    """lhs as its quantized values, float32; one scale per expert means one per row here."""
    if scale is None or scale.size == 1:
        return dequantize_stored(quantize_activation(lhs, activation_format, scale=scale))
    rows = jnp.take(scale.reshape(-1), expert)

    def one(row, row_scale):
        return dequantize_stored(quantize_activation(row[None], activation_format, scale=row_scale))

    return jax.vmap(one)(lhs, rows)[:, 0]


def _xla(x: Array, rhs: QArray, group_sizes: Array) -> Array:
    """The reference, float32: one expert at a time, so that only one is ever dequantized."""
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(x.shape[0])

    def expert(carry, item):
        w, start, end = item
        mine = ((rows >= start) & (rows < end))[:, None]
        product = jax.lax.dot_general(
            jnp.where(mine, x, 0.0),
            dequantize_stored(w),
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        )
        return carry + product, None

    y = jnp.zeros((x.shape[0], rhs.shape[1]), jnp.float32)
    return jax.lax.scan(expert, y, (rhs, ends - group_sizes, ends))[0]
