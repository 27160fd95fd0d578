"""The attention over a whole context of latents from that over its parts (FlashDecoding).

A CTA for each row: a row's parts are few bytes, and with few sequences there are few rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qjax.pallas_kernels._paged_attention_combine_sm90 import LOG2E

MASKED = -(2.0**99)  # finite, so that differences of two masked logits are numbers


def combine(parts: Array, log_sums: Array, *, dtype: DTypeLike) -> tuple[Array, Array]:
    """The attention of all parts.

    Args:
        parts: float32 [B, S, R, H], each normalized, H a multiple of 512; or one part of any dtype.
        log_sums: float32 [B, S, R]: base-2 logarithms of the softmaxes' denominators.
        dtype: Of the result.

    Returns:
        [B, R, H] and the natural logarithm of the whole denominator, float32 [B, R].
    """
    top = jnp.max(log_sums, axis=1, keepdims=True)
    weights = jnp.exp2(log_sums - top)
    total = jnp.sum(weights, axis=1, keepdims=True)
    logs = jnp.where(top > 0.5 * MASKED, (top + jnp.log2(total)) / LOG2E, -jnp.inf)[:, 0]
    if parts.shape[1] == 1:
        return parts[:, 0].astype(dtype), logs
    batch, splits, rows, dim = parts.shape
    layout = plgpu.Layout.WG_STRIDED((dim,), vec_size=4)

    def kernel(parts, log_sums, out):
        sequence, row = lax.axis_index("sequence"), lax.axis_index("row")
        logs = [log_sums[sequence, s, row] for s in range(splits)]
        top = functools.reduce(jnp.maximum, logs)
        weights = [jnp.exp2(log - top) for log in logs]
        scale = 1 / functools.reduce(lax.add, weights)
        whole = jnp.zeros((dim,), jnp.float32)
        for s, weight in enumerate(weights):
            part = plgpu.load(parts.at[sequence, s, row], layout=layout, optimized=False)
            whole = whole + part * (weight * scale)
        out.at[sequence, row][...] = whole.astype(dtype)

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, rows, dim), dtype),
        grid=(rows, batch),
        grid_names=("row", "sequence"),
        num_threads=1,
        thread_name="wg",
        kernel_name="combine_latent_attention_parts",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(parts, log_sums)
    return out, logs
