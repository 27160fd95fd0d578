"""The first half of a mixture's feed-forward layer: two grouped products and the activation that takes both."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from qjax.formats import ActivationFormat
from qjax.ops._activation import SILU, gated_activation
from qjax.ops._dispatch import num_sms
from qjax.ops._ragged_dot import (
    mixed_options,
    mixed_rows,
    mixed_weights,
    ragged_dot,
    unsupported_reason,
)
from qjax.pallas_kernels import mixed_grouped_gemm_sm90
from qjax.pallas_kernels.fp8_split_sm90 import fp8_split
from qjax.pallas_kernels.mixed_grouped_gemm_sm90 import FP8Rows, GatedActivation
from qjax.qarray import QArray


def gated_ragged_dot(
    lhs: Array | QArray,
    gate: Array | QArray,
    up: Array | QArray | None,
    group_sizes: Int[Array, " E"],
    *,
    rows: Int[Array, " M"] | None = None,
    activation: GatedActivation = SILU,
    bias: Float[Array, "E N2"] | None = None,
    activation_format: ActivationFormat | None = None,
    activation_scale: Array | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """The gated activation of lhs @ gate[e].T and lhs @ up[e].T for consecutive groups of rows.

    Weights that are re-laid out for the kernel of 4-bit experts meet in one kernel, in which the two products
    stay float32; others are calls of `ragged_dot`. Gradients flow to lhs, to plain weights and to the bias.

    Args:
        lhs: As `ragged_dot`'s.
        gate: [E, N, K], plain or quantized.
        up: Likewise; None if `gate` is [E, 2N, K] with both, even rows gate's and odd rows up's (one kernel needs
            them in "wgmma8_pairs" storage).
        group_sizes: As `ragged_dot`'s.
        rows: The row of lhs [T, K] that each sorted row is; default they are lhs'. The kernel gathers them itself.
        activation: Which one; default silu(gate) * up.
        bias: [E, 2N] with both, alternating, added in float32; only where `up` is None.
        activation_format: As `ragged_dot`'s.
        activation_scale: As `ragged_dot`'s.
        out_dtype: Result's dtype; default lhs's.
        implementation: As `ragged_dot`'s.

    Raises:
        ValueError: As `ragged_dot`, and for a bias beside two weights or rows of a quantized lhs.
    """
    if rows is not None and isinstance(lhs, QArray):
        raise ValueError(
            "gated_ragged_dot: rows are gathered before they are quantized: pass lhs in order, or floating; found "
            f"{lhs.format.element}{list(lhs.shape)}"
        )
    if up is not None and bias is not None:
        raise ValueError(
            "gated_ragged_dot: a bias has alternating numbers of gate and up, and so must the weight's rows: "
            f"pass up=None; found up {list(up.shape)}"
        )
    out_dtype = jnp.dtype(lhs.dtype if out_dtype is None else out_dtype)
    if implementation != "xla" and one_kernel(gate, up):
        inputs = activation_format
        if not unsupported_reason(lhs, gate, activation_format=inputs, out_dtype=out_dtype):
            run: Any = gated_product if isinstance(lhs, QArray) else _differentiable
            static = (activation, activation_format, out_dtype.name)
            return run(static, lhs, rows, gate, up, group_sizes, bias)
    return _unfused(
        activation,
        lhs,
        rows,
        gate,
        up,
        group_sizes,
        bias,
        activation_format=activation_format,
        activation_scale=activation_scale,
        out_dtype=out_dtype,
        implementation=implementation,
    )


def one_kernel(gate: Array | QArray, up: Array | QArray | None) -> bool:
    """Whether the storages are those of one kernel for both products."""
    if not isinstance(gate, QArray) or isinstance(up, Array):
        return False
    pairs = gate.format.storage == "wgmma8_pairs"
    if up is None or pairs:
        return up is None and pairs
    return up.format == gate.format and up.shape == gate.shape and gate.format.ordered


def _unfused(activation, lhs, rows, gate, up, group_sizes, bias, **options) -> Array:
    """Each product by itself, in the output's dtype."""
    lhs = _gathered(lhs, rows)
    first = ragged_dot(lhs, gate, group_sizes, bias=bias, **options)
    if up is None:
        return gated_activation(first[:, 0::2], first[:, 1::2], activation)
    return gated_activation(first, ragged_dot(lhs, up, group_sizes, **options), activation)


def _gathered(lhs, rows):
    if rows is None:
        return lhs
    return jnp.take(lhs, rows, axis=0, mode="clip")  # checked bounds would be a kernel of their own


def gated_product(
    static,
    lhs,
    rows,
    gate: QArray,
    up: QArray | None,
    group_sizes,
    bias,
    *,
    places=None,
    fp8_terms=False,
) -> Any:
    """Both products and the activation by one kernel; `static` is the activation, inputs' format and output's dtype."""
    activation, activation_format, out_dtype = static
    if rows is not None and (gate.format.element, activation_format) == ("float4_e2m1fn", None):
        *terms, scale = fp8_split(lhs, rows) if places is None else fp8_split(lhs, places=places)
        x = FP8Rows(tuple(terms), scale)
    else:
        x = mixed_rows(_gathered(lhs, rows), activation_format)
    count = lhs.shape[0] if rows is None else rows.shape[0]
    out = mixed_grouped_gemm_sm90.mixed_gated_grouped_gemm(
        x,
        mixed_weights(gate, bias),
        None if up is None else mixed_weights(up),
        group_sizes.astype(jnp.int32),
        activation=activation,
        out_dtype=out_dtype,
        expected_rows=count / gate.shape[0],
        num_sms=num_sms(),
        fp8_terms=fp8_terms,
        **mixed_options(gate),
    )
    return out if isinstance(out, FP8Rows) else out[:count]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(static, *operands):
    return gated_product(static, *operands)


def _forward(static, *operands):
    return gated_product(static, *operands), operands


def _backward(static, residuals, g):
    activation, activation_format, out_dtype = static
    lhs, rows, gate, up, group_sizes, bias = residuals

    def unfused(lhs, bias):
        options = dict(activation_format=activation_format, out_dtype=out_dtype)
        return _unfused(activation, lhs, rows, gate, up, group_sizes, bias, **options)

    d_lhs, d_bias = jax.vjp(unfused, lhs, bias)[1](g)
    return d_lhs, None, None, None, None, d_bias


_differentiable.defvjp(_forward, _backward)
