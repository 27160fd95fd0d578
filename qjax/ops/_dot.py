"""Matrix product with a quantized weight: ``y[..., n] = sum_k x[..., k] * w[n, k]``."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from qjax.formats import ActivationFormat
from qjax.ops._dispatch import choose, device_reason
from qjax.ops._dot_kernels import kernel_of, product, unsupported_reason
from qjax.ops._quantized_input import QuantizedInput, matching_weight
from qjax.qarray import QArray, dequantize_stored
from qjax.quantization import quantize_activation


def dot(
    x: Array | QArray | QuantizedInput,
    w: Array | QArray,
    *,
    bias: Float[Array, " N"] | None = None,
    activation_format: ActivationFormat | None = None,
    activation_scale: Array | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Array:
    """x @ w.T for a weight stored (out, in), plain or quantized.

    Products are summed in float32 over the dequantized values. Gradients flow to x (and to a plain w);
    quantization of x is differentiated as the identity.

    Args:
        x: [..., K], floating; or already quantized: a QArray [M, K], or a `QuantizedInput`, through which
            gradients flow and which needs an FP8 weight.
        w: [N, K].
        bias: [N], added in float32.
        activation_format: Quantizes x first, if it is not quantized yet.
        activation_scale: The scale of a static activation format.
        out_dtype: Result's dtype; default x's.
        implementation: "pallas_mosaic_gpu", "xla" or None for the kernel where there is one.

    Returns:
        [..., N].

    Raises:
        ValueError: If the shapes disagree, or the implementation asked for can't take the arguments.
    """
    k = w.shape[-1]
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(
            f"dot: needs x [..., K] and w [N, K] of one K; found x {list(x.shape)}, w {list(w.shape)}"
        )
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    lead = x.shape[:-1]
    if isinstance(x, QuantizedInput):
        return _dot_of_quantized(x, w, bias, out_dtype, implementation)
    if isinstance(w, QArray) and w.column_perm is not None:
        if isinstance(x, QArray):
            raise ValueError("dot: permute x's columns by w.column_perm before quantizing x")
        x = jnp.take(x, w.column_perm, axis=-1)
        w = dataclasses.replace(w, column_perm=None)
    if isinstance(w, QArray):
        flat = x if isinstance(x, QArray) else x.reshape(-1, k)
        y = _kernel_product(
            flat, w, bias, activation_format, activation_scale, out_dtype, implementation
        )
        if y is not None:
            return y.reshape(*lead, w.shape[0])
    quantized = x
    if activation_format is not None and not isinstance(x, QArray):
        quantized = quantize_activation(x.reshape(-1, k), activation_format, scale=activation_scale)
        if not isinstance(w, QArray):  # quantization-aware training: values on the grid
            kept: Array = straight_through(x, quantized.dequantize().reshape(x.shape))
            x = quantized = kept
    if not isinstance(w, QArray) and not isinstance(x, QArray):
        # A 16-bit result keeps cotangents 16 bits wide, so that the gradients' products are as fast.
        narrow = bias is None and out_dtype == x.dtype
        if x.size == k and x.dtype.itemsize == 2 and device_reason("9.0") is None:
            # XLA reads weights for one row at 1 to 2 TB/s as a product, at 2.8 to 4.3 as a sum (on an H200).
            row, w = x.reshape(1, k).astype(jnp.float32), w.astype(x.dtype)
            y = jnp.sum(row * w.astype(jnp.float32), axis=1)
            y = y.reshape(*lead, w.shape[0])
        else:
            y = jax.lax.dot_general(
                x,
                w.astype(x.dtype),
                (((x.ndim - 1,), (1,)), ((), ())),
                preferred_element_type=out_dtype if narrow else jnp.float32,
            )
    else:
        xf = _float32(quantized).reshape(-1, k)
        if not isinstance(x, QArray) and quantized is not x:
            xf = straight_through(x.reshape(-1, k), xf)
        y = _xla(xf, _float32(w)).reshape(*lead, w.shape[0])
    if bias is not None:
        y = y + bias.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
    return y.astype(out_dtype)


def _dot_of_quantized(
    x: QuantizedInput, w: Array | QArray, bias, out_dtype, implementation
) -> Array:
    w = matching_weight(x, w)
    like, operand = x.like.reshape(-1, x.shape[-1]), (x.codes, x.scale)
    y = _kernel_product(like, w, bias, x.activation, None, out_dtype, implementation, operand)
    if y is None:
        y = _xla(straight_through(like, _float32(x.qarray())), _float32(w))
        if bias is not None:
            y = y + bias.astype(jnp.float32)[None, :]
    return y.reshape(*x.shape[:-1], w.shape[0]).astype(out_dtype)


def _kernel_product(
    x: Array | QArray,
    w: QArray,
    bias,
    activation_format,
    activation_scale,
    out_dtype,
    implementation,
    operand=None,
) -> Array | None:
    """The product [M, N] by a kernel, or None where XLA is to compute it."""
    kernel, _ = kernel_of(x, w, activation_format, out_dtype)
    reason = unsupported_reason(x, w, activation_format=activation_format, out_dtype=out_dtype)
    if choose("dot", implementation, reason) != "pallas_mosaic_gpu":
        return None
    assert kernel is not None
    return product(
        kernel,
        x,
        w,
        bias,
        activation_format=activation_format,
        activation_scale=activation_scale,
        out_dtype=out_dtype,
        operand=operand,
    )


def _xla(x: Float[Array, "M K"], w: Float[Array, "N K"]) -> Float[Array, "M N"]:
    """The reference on dequantized float32 operands."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)


def straight_through(x: Array, quantized: Array) -> Array:
    """`quantized`, differentiated as if it were x (arXiv:1308.3432)."""
    # Without this, reverse mode would keep all that the quantization needs to carry zeros back.
    return _straight_through(x, jax.lax.stop_gradient(quantized))


@jax.custom_vjp
def _straight_through(x: Array, quantized: Array) -> Array:
    return quantized


_straight_through.defvjp(
    lambda x, quantized: (quantized, jnp.zeros((0,), x.dtype)),
    lambda like, g: (g.astype(like.dtype), jnp.zeros_like(g)),
)


def _float32(a: Array | QArray) -> Array:
    return dequantize_stored(a) if isinstance(a, QArray) else a.astype(jnp.float32)
