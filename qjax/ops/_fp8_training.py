"""The block-scaled FP8 product of training: all three of its matrix products on FP8 operands.

The recipe of the DeepSeek-V3 report, section 3.3: activations and gradients with a scale for each row and 128
columns of what a product sums over, weights with one for each 128x128 block, float32 sums.

On a GPU the forward pass and the input's gradient run on `fp8_block_gemm`, the latter on the transposed codes of
the forward pass's weight. The weight's gradient sums over tokens, so it needs both operands quantized along them
and transposed: `fp8_quantize_both_axes` writes those beside the codes of the other two products in one read,
`fp8_wgrad_gemm` multiplies them, and of x only its transposed codes are kept for the backward pass, half the bytes
of 16-bit activations; `fp8_quantize_128x128` writes the weight's codes in both orders. Where those kernels don't
take the arguments, XLA quantizes the weight, and multiplies dequantized values for its gradient: of bfloat16 on a
GPU, unless XLA is asked for, and of float32 elsewhere.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from qjax.formats import ActivationFormat, qformat
from qjax.ops._dispatch import choose, device_reason, num_sms
from qjax.ops._dot import dot
from qjax.ops._quantized_input import QuantizedInput
from qjax.pallas_kernels import (
    fp8_quantize_128x128_sm90,
    fp8_quantize_both_axes_sm90,
    fp8_wgrad_gemm_sm90,
)
from qjax.qarray import QArray
from qjax.quantization import quantize, quantize_activation

GRADIENT_ELEMENTS = ("float8_e4m3fn", "float8_e5m2")
_AMAX_MIN = 1e-4  # of activations, as the published inference code has it; gradients are smaller
_E4M3 = qformat("fp8_e4m3_1x128")
_INPUTS = ActivationFormat(_E4M3, amax_min=_AMAX_MIN)
_WEIGHTS = qformat("fp8_e4m3_128x128")


def fp8_dot(
    x: Array,
    w: Array,
    *,
    gradient_element: str = "float8_e4m3fn",
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Array:
    """x @ w.T for training in FP8: quantized(x) @ quantized(w).T, and both gradients of quantized operands.

    ``dx = quantized(dy) @ quantized(w)`` with the codes of the forward pass, ``dw = quantized(dy.T) @
    quantized(x.T).T`` with scales for each 128 tokens. Rounding itself is differentiated as the identity.

    Args:
        x: Activations [..., K].
        w: Weight [N, K], usually float32.
        gradient_element: FP8 element of dy: "float8_e4m3fn" (DeepSeek-V3) or "float8_e5m2".
        out_dtype: Result's dtype; default x's.
        implementation: "pallas_mosaic_gpu", "xla" or None.

    Returns:
        [..., N].

    Raises:
        ValueError: If the shapes disagree or the element is unknown, or the implementation asked for can't take
            the arguments; of the backward pass's kernels that shows when the product is differentiated.
    """
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"fp8_dot: needs x [..., K] and w [N, K] of one K; found x {list(x.shape)}, w {list(w.shape)}"
        )
    if gradient_element not in GRADIENT_ELEMENTS:
        raise ValueError(
            f"fp8_dot: gradient_element must be one of {GRADIENT_ELEMENTS}; found {gradient_element!r}"
        )
    out = jnp.dtype(x.dtype if out_dtype is None else out_dtype).name
    static = _Static(gradient_element, out, implementation)
    y: Any = _product(static, x.reshape(-1, x.shape[-1]), w)
    return y.reshape(*x.shape[:-1], w.shape[0])


def training_kernels_reason(x: Array, w: Array, *, out_dtype: DTypeLike) -> str | None:
    """Why no kernels quantize x [T, K] and w [N, K] and compute dw on the default device, None if they do."""
    (tokens, k), n = x.shape, w.shape[0]
    quantizer, product = fp8_quantize_both_axes_sm90, fp8_wgrad_gemm_sm90
    return (
        device_reason("9.0")
        or quantizer.unsupported_reason(tokens, k, x_dtype=x.dtype)
        or quantizer.unsupported_reason(tokens, n, x_dtype=out_dtype)
        or fp8_quantize_128x128_sm90.unsupported_reason(n, k, w_dtype=w.dtype)
        or product.unsupported_reason(n, k, quantizer.padded_tokens(tokens))
    )


class _Static(NamedTuple):
    """What a product's trace depends on beside its arrays."""

    gradient_element: str
    out_dtype: str
    implementation: str | None

    def by_kernels(self, x: Array, w: Array) -> bool:
        """Whether kernels quantize and compute dw."""
        reason = training_kernels_reason(x, w, out_dtype=self.out_dtype)
        return choose("fp8_dot", self.implementation, reason) == "pallas_mosaic_gpu"


class _Transposed(NamedTuple):
    """Codes [K, T''] and scales [T''/128, K''] of what `fp8_quantize_both_axes` transposed."""

    codes: Array
    scale: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static: _Static, x, w):
    return _multiply(static, x, _quantized_weight(w), _INPUTS, static.out_dtype)


def _quantized_weight(w: Array) -> QArray:
    packed = quantize(w.astype(jnp.float32), _WEIGHTS)
    # Else XLA would quantize in the order of the transposed codes, transposing float32 arrays several times.
    row_major = with_layout_constraint(packed.qvalue, Layout((0, 1)))
    return dataclasses.replace(packed, qvalue=row_major)


def _weight_both_ways(w: Array) -> tuple[QArray, QArray]:
    codes, transposed, scale = fp8_quantize_128x128_sm90.fp8_quantize_128x128(w)
    return (
        QArray.from_parts(_WEIGHTS, codes, scale, dtype=w.dtype),
        QArray.from_parts(_WEIGHTS, transposed, scale.T, dtype=w.dtype),
    )


def _multiply(static: _Static, x, w: QArray, activation, out_dtype) -> Array:
    return dot(
        x,
        w,
        activation_format=activation,
        out_dtype=out_dtype,
        implementation=static.implementation,
    )


def _multiply_transposed(static: _Static, left: QArray, right: QArray) -> Array:
    """left @ right.T in float32 through XLA."""
    if static.implementation == "xla" or device_reason("9.0"):
        return dot(left, right, out_dtype=jnp.float32, implementation="xla")
    # XLA's float32 products are 10 times slower. Rounding to bfloat16 is 32 times finer than to e4m3.
    return jax.lax.dot_general(
        left.dequantize(jnp.bfloat16),
        right.dequantize(jnp.bfloat16),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _both_ways(x: Array, activation: ActivationFormat) -> tuple[QuantizedInput, _Transposed]:
    codes, scale, *transposed = fp8_quantize_both_axes_sm90.fp8_quantize_both_axes(
        x, dtype=activation.format.element, amax_min=activation.amax_min
    )
    return QuantizedInput(jnp.zeros_like(x), codes, scale, activation), _Transposed(*transposed)


def _forward(static: _Static, x, w):
    like = jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype)
    if static.by_kernels(x, w):
        operand, kept = _both_ways(x, _INPUTS)
        packed, kept_weight = _weight_both_ways(w)
    else:
        operand = kept = x
        packed = kept_weight = _quantized_weight(w)
    y = _multiply(static, operand, packed, _INPUTS, static.out_dtype)
    return y, (kept, kept_weight, like)


def _backward(static: _Static, residuals, dy):
    x, w, (x_like, w_like) = residuals
    gradients = ActivationFormat(dataclasses.replace(_E4M3, element=static.gradient_element))
    if isinstance(x, _Transposed):
        operand, dy_transposed = _both_ways(dy, gradients)
        dw = fp8_wgrad_gemm_sm90.fp8_wgrad_gemm(*dy_transposed, *x, num_sms=num_sms())
    else:
        operand, w = dy, QArray.from_parts(w.format, w.qvalue.T, w.scale.T, dtype=w.dtype)
        columns = quantize_activation(x.T, _INPUTS)
        dw = _multiply_transposed(static, quantize_activation(dy.T, gradients), columns)
    dx = _multiply(static, operand, w, gradients, x_like.dtype)
    return dx, dw.astype(w_like.dtype)


_product.defvjp(_forward, _backward)
