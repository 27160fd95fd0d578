"""A mixture's feed-forward layer: the gated product and the one that takes its result."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from qjax.ops._activation import SILU
from qjax.ops._gated_ragged_dot import gated_product, gated_ragged_dot, one_kernel
from qjax.ops._ragged_dot import grouped_product, ragged_dot, unsupported_reason
from qjax.pallas_kernels.mixed_grouped_gemm_sm90 import GatedActivation
from qjax.qarray import QArray


def gated_ragged_mlp(
    lhs: Float[Array, "T K"],
    gate: Array | QArray,
    up: Array | QArray | None,
    down: Array | QArray,
    group_sizes: Int[Array, " E"],
    *,
    rows: Int[Array, " M"] | None = None,
    places: Int[Array, " M"] | None = None,
    activation: GatedActivation = SILU,
    bias: Float[Array, "E N2"] | None = None,
    down_bias: Float[Array, "E N3"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N3"]:
    """`ragged_dot` of `gated_ragged_dot`'s result and `down`.

    Between kernels of FP4 experts the hidden values stay two FP8 terms, where the activation's limit bounds them.

    Args:
        lhs: As `gated_ragged_dot`'s.
        gate: Likewise.
        up: Likewise.
        down: [E, N3, N].
        group_sizes: As `ragged_dot`'s.
        rows: As `gated_ragged_dot`'s.
        places: With `rows`, where the rows of each token in turn come (`expert_order`): a kernel may then write
            each token to its places instead.
        activation: Likewise.
        bias: Likewise.
        down_bias: [E, N3].
        out_dtype: Result's dtype; default lhs's.
        implementation: As `ragged_dot`'s.

    Raises:
        ValueError: As the two ops.
    """
    out_dtype = jnp.dtype(lhs.dtype if out_dtype is None else out_dtype)
    if implementation != "xla" and _stays_fp8(lhs, gate, up, down, activation, out_dtype):
        static = activation, out_dtype.name
        order = rows, places
        return _differentiable(static, lhs, order, gate, up, down, group_sizes, bias, down_bias)
    options: dict[str, Any] = dict(out_dtype=out_dtype, implementation=implementation)
    hidden = gated_ragged_dot(
        lhs, gate, up, group_sizes, rows=rows, activation=activation, bias=bias, **options
    )
    return ragged_dot(hidden, down, group_sizes, bias=down_bias, **options)


def _stays_fp8(lhs, gate, up, down, activation, out_dtype) -> bool:
    if activation.limit is None or not isinstance(down, QArray) or not one_kernel(gate, up):
        return False
    formats = [w.format for w in (gate, down)]
    return (
        all(f.element == "float4_e2m1fn" for f in formats)
        and formats[1].storage == "wgmma8"
        and all(unsupported_reason(lhs, w, out_dtype=out_dtype) is None for w in (gate, down))
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(static, lhs, order, gate, up, down, group_sizes, bias, down_bias):
    (activation, out_dtype), (rows, places) = static, order
    hidden = gated_product(
        (activation, None, out_dtype),
        lhs,
        rows,
        gate,
        up,
        group_sizes,
        bias,
        places=places,
        fp8_terms=True,
    )
    count = lhs.shape[0] if rows is None else rows.shape[0]
    return grouped_product((None, out_dtype), hidden, down, group_sizes, down_bias)[:count]


def _forward(static, *operands):
    return _differentiable(static, *operands), operands


def _backward(static, residuals, g):
    activation, out_dtype = static
    lhs, (rows, _), gate, up, down, group_sizes, bias, down_bias = residuals

    def separate(lhs, bias, down_bias):
        hidden = gated_ragged_dot(
            lhs,
            gate,
            up,
            group_sizes,
            rows=rows,
            activation=activation,
            bias=bias,
            out_dtype=out_dtype,
        )
        return ragged_dot(hidden, down, group_sizes, bias=down_bias, out_dtype=out_dtype)

    d_lhs, d_bias, d_down_bias = jax.vjp(separate, lhs, bias, down_bias)[1](g)
    return d_lhs, None, None, None, None, None, d_bias, d_down_bias


_differentiable.defvjp(_forward, _backward)
