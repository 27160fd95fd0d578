"""The block-scaled FP8 product of training: all three of its matrix products on FP8 operands.

The recipe of the DeepSeek-V3 report, section 3.3: activations and gradients with a scale for each row and 128
columns of what a product sums over, weights with one for each 128x128 block, float32 sums.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from qjax.formats import ActivationFormat, qformat
from qjax.ops._dot import dot
from qjax.qarray import QArray
from qjax.quantization import quantize, quantize_activation

GRADIENT_ELEMENTS = ("float8_e4m3fn", "float8_e5m2")
_AMAX_MIN = 1e-4  # of activations, as the published inference code has it; gradients are smaller
_E4M3 = qformat("fp8_e4m3_1x128")


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
        implementation: See `qjax.ops.dot`; the weight gradient's product has no kernel and runs through XLA.

    Returns:
        [..., N].

    Raises:
        ValueError: If the shapes disagree or the element is unknown.
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
    y: Any = _product((gradient_element, out, implementation), x.reshape(-1, x.shape[-1]), w)
    return y.reshape(*x.shape[:-1], w.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static, x, w):
    return _forward(static, x, w)[0]


def _forward(static, x, w):
    _, out_dtype, implementation = static
    packed = quantize(w.astype(jnp.float32), "fp8_e4m3_128x128")
    inputs = ActivationFormat(_E4M3, amax_min=_AMAX_MIN)
    y = dot(x, packed, activation_format=inputs, out_dtype=out_dtype, implementation=implementation)
    return y, (x, packed, jnp.zeros((0,), w.dtype))


def _backward(static, residuals, dy):
    gradient_element, _, implementation = static
    x, packed, w_like = residuals
    gradients = ActivationFormat(dataclasses.replace(_E4M3, element=gradient_element))
    transposed = QArray.from_parts(
        packed.format, packed.qvalue.T, packed.scale.T, dtype=packed.dtype
    )
    dx = dot(
        dy,
        transposed,
        activation_format=gradients,
        out_dtype=x.dtype,
        implementation=implementation,
    )
    columns = quantize_activation(x.T, ActivationFormat(_E4M3, amax_min=_AMAX_MIN))
    dw = dot(quantize_activation(dy.T, gradients), columns, out_dtype=jnp.float32)
    return dx, dw.astype(w_like.dtype)


_product.defvjp(_forward, _backward)
