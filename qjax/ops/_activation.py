"""Gated activations of feed-forward layers."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from qjax.pallas_kernels.mixed_grouped_gemm_sm90 import GatedActivation

SILU = GatedActivation()


def gated_activation(
    gate: Float[Array, "... F"], up: Float[Array, "... F"], activation: GatedActivation
) -> Float[Array, "... F"]:
    """``gate * sigmoid(alpha * gate) * (up + offset)``, both clamped, in gate's dtype.

    The gated half is computed in float32 and rounded before the product, as the models' own code does.
    """
    if activation.limit is not None:
        gate = jnp.minimum(gate, activation.limit)
        up = jnp.clip(up, -activation.limit, activation.limit)
    f = gate.astype(jnp.float32)
    f = f * jax.nn.sigmoid(f if activation.alpha == 1 else activation.alpha * f)
    return f.astype(gate.dtype) * (up + activation.offset if activation.offset else up)


def silu_mul(gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Array:
    """silu(gate) * up (arXiv:2002.05202): silu in float32, it and the product rounded to gate's dtype."""
    return gated_activation(gate, up, SILU)
