"""Inputs of linear layers that are quantized once, for all that take them, and fused with what computes them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from qjax.formats import WHOLE, ActivationFormat
from qjax.ops._activation import silu_mul
from qjax.ops._dispatch import device_reason
from qjax.ops._dot_kernels import fp8_pair, quantized_operand, w4a8_pair
from qjax.pallas_kernels import fp8_quantize_fused_sm90 as fused
from qjax.qarray import QArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedInput:
    """An input [..., K] in FP8, as the FP8 products read it; `qjax.ops.dot` takes it in place of x.

    Attributes:
        like: Zeros [..., K] in the dtype of what was quantized, whose gradient is that of the input: nothing
            reads their values, so compiled code never holds them.
        codes: [M', K] with M' >= M, the product of the leading axes; the rows past M are padding.
        scale: float32, tokens last: [ceil(K/128), M''], M'' >= M, or [M], or [1] for all tokens.
        activation: The format.
    """

    like: Array
    codes: Array
    scale: Array
    activation: ActivationFormat = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., K]."""
        return self.like.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.like.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of what was quantized."""
        return self.like.dtype

    def qarray(self) -> QArray:
        """The same codes and scales as a QArray [M, K]."""
        k = self.shape[-1]
        m = self.like.size // k
        if self.scale.ndim == 2:
            scale = self.scale[:, :m].T
        else:
            scale = self.scale.reshape(-1, 1)
        format = self.activation.format
        return QArray.from_parts(format, self.codes[:m], scale, dtype=self.dtype)


def takes_quantized_input(w: Array | QArray, activation: ActivationFormat | None) -> bool:
    """Whether `dot` with this weight takes a `QuantizedInput` of this format."""
    if not isinstance(w, QArray) or activation is None or w.column_perm is not None:
        return False
    inputs = activation.format
    w4a8 = w.format.storage == "wgmma8" and w4a8_pair(w.format, inputs, w.shape[-1])
    fp8 = inputs.element.startswith("float8") and (w4a8 or fp8_pair(w.format, inputs) is not None)
    if not fp8 or inputs.scale_dtype != "float32":
        return False
    return activation.static == (inputs.block_shape[0] == WHOLE)


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], *, eps: float) -> Array:
    """x / rms(x) * weight in x's dtype, computed in float32 (arXiv:1910.07467)."""
    f = x.astype(jnp.float32)
    f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + eps)
    return (f * weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def quantized_rms_norm(
    x: Float[Array, "... D"],
    weight: Float[Array, " D"],
    activation: ActivationFormat,
    *,
    eps: float,
    scale: Array | None = None,
    residual: Float[Array, "... D"] | None = None,
    implementation: str | None = None,
) -> tuple[QuantizedInput, Array]:
    """`rms_norm` of x, or of x + residual, quantized; differentiable, quantization as the identity.

    Args:
        x: 16-bit for the fused kernel.
        weight: The norm's.
        activation: A format for which `takes_quantized_input` is true.
        eps: Added to the mean square.
        scale: float32 scalar of a static format.
        residual: Like x.
        implementation: "xla", or None for a kernel where there is one.

    Returns:
        The quantized norm, and x + residual (x without one).
    """
    arrays = {"x": x, "weight": weight}
    if residual is not None:
        arrays["residual"] = residual
    quantized_and_sum: Any = _quantized(_Norm(eps), activation, implementation, arrays, scale)
    return quantized_and_sum


def quantized_silu_mul(
    gate: Float[Array, "... F"],
    up: Float[Array, "... F"],
    activation: ActivationFormat,
    *,
    scale: Array | None = None,
    implementation: str | None = None,
) -> QuantizedInput:
    """`silu_mul` quantized; arguments as `quantized_rms_norm`."""
    arrays = {"x": gate, "up": up}
    quantized_and_none: Any = _quantized(_Gate(), activation, implementation, arrays, scale)
    return quantized_and_none[0]


@dataclasses.dataclass(frozen=True)
class _Norm:
    """RMSNorm of a sum: its plain form, and its kernel on rows."""

    eps: float

    def plain(self, x, weight, residual=None):
        total = x if residual is None else x + residual
        return rms_norm(total, weight, eps=self.eps), total

    def kernel(self, x, weight, residual=None, **options):
        codes, scale, *total = fused.fp8_quantize_rms_norm(
            x, weight, eps=self.eps, residual=residual, **options
        )
        return codes, scale, (total[0] if total else x)


@dataclasses.dataclass(frozen=True)
class _Gate:
    """SiLU-mul likewise."""

    def plain(self, x, up):
        return silu_mul(x, up), None

    def kernel(self, x, up, **options):
        return *fused.fp8_quantize_silu_mul(x, up, **options), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _quantized(op: _Norm | _Gate, activation, implementation, arrays, scale):
    x = arrays["x"]
    k = x.shape[-1]
    scaling = _scaling(activation)
    reason = device_reason("9.0") or fused.unsupported_reason(
        x.size // k, k, scaling=scaling, norm=isinstance(op, _Norm), x_dtype=x.dtype
    )
    same_dtype = all(a.dtype == x.dtype for a in arrays.values())
    if implementation == "xla" or reason or not same_dtype:
        y, total = op.plain(**arrays)
        codes, scales = quantized_operand(
            y.reshape(-1, k), activation, scale, implementation=implementation
        )
    else:
        rows = {name: a.reshape(-1, k) if a.ndim > 1 else a for name, a in arrays.items()}
        codes, scales, total = op.kernel(
            **rows,
            scaling=scaling,
            scale=None if scale is None else scale.astype(jnp.float32).reshape(1),
            dtype=activation.format.element,
            amax_min=activation.amax_min,
            amax_max=activation.amax_max,
        )
        total = None if total is None else total.reshape(x.shape)
    return QuantizedInput(jnp.zeros_like(x), codes, scales, activation), total


def _scaling(activation: ActivationFormat) -> str:
    if activation.static:
        return "static"
    return "1x128" if activation.format.block_shape == (1, 128) else "per_token"


def _forward(op, activation, implementation, arrays, scale):
    return _quantized(op, activation, implementation, arrays, scale), arrays


def _backward(op, activation, implementation, arrays, cotangents):
    del activation, implementation
    quantized, total = cotangents
    _, pull = jax.vjp(lambda arrays: op.plain(**arrays), arrays)
    return *pull((quantized.like, total)), None


_quantized.defvjp(_forward, _backward)


def matching_weight(x: QuantizedInput, w: Array | QArray) -> QArray:
    """The weight, if it fits the input.

    Raises:
        ValueError: If it is plain, permuted, or its scales are no partner of x's.
    """
    if isinstance(w, QArray) and takes_quantized_input(w, x.activation):
        return w
    format = x.activation.format
    found = f"{w.format}" if isinstance(w, QArray) else f"{w.dtype}{list(w.shape)}"
    raise ValueError(
        f"dot: an input in {format.element} {format.block_shape} needs an FP8 weight with scales for "
        f"blocks or rows to match, its columns in order; found {found}"
    )
