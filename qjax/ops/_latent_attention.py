"""Causal attention over a paged cache of latents (DeepSeek-V2, absorbed)."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qjax.ops._attention import paged_attention
from qjax.ops._dispatch import choose, device_reason, num_sms
from qjax.pallas_kernels import mla_decode_sm90
from qjax.qarray import QArray


def latent_attention(
    query: Float[Array, "B T N H"],
    pages: Array | QArray,
    page_table: Int[Array, "B pages"],
    *,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None = None,
    value_dim: int,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
    """Causal attention of new queries over cached latents: values are the keys' first channels.

    The kernel takes a few queries of each sequence over bfloat16 pages, and only where it is asked for by name:
    it is compiled and interpreted in tests, but has not been run on a GPU.

    Args:
        query: Queries mapped into the latent space, rotated part last; prefill and decode alike.
        pages: [P, 1, page_size, H], an array or a QArray of that logical shape.
        page_table: Pages of each sequence in order; entries past its length may be anything in range.
        positions: Position of each query, one more from query to query; its latent is in the cache already.
        lengths: Tokens of each sequence, default up to the last query's: queries past them are padding.
        value_dim: Channels of a value.
        scale: Default 1/sqrt(H).
        implementation: "pallas_mosaic_gpu", "xla" or None.

    Raises:
        ValueError: If the implementation asked for can't take the arguments.
    """
    reason = unsupported_reason(query, pages, value_dim=value_dim)
    if reason is None and implementation is None:
        reason = (
            'the kernel of latent attention must be asked for: implementation="pallas_mosaic_gpu"'
        )
    factor = float(query.shape[3] ** -0.5 if scale is None else scale)
    if choose("latent_attention", implementation, reason) == "pallas_mosaic_gpu":
        assert not isinstance(pages, QArray)
        seen = positions + 1 if lengths is None else jnp.minimum(positions + 1, lengths[:, None])
        out, _ = mla_decode_sm90.mla_decode_attention(
            query, pages[:, 0], page_table, seen, scale=factor, num_sms=num_sms()
        )
        return out
    return paged_attention(
        query,
        pages,
        None,
        page_table,
        positions=positions,
        lengths=lengths,
        value_dim=value_dim,
        scale=factor,
        implementation="xla",
    )


def unsupported_reason(
    query: Float[Array, "B T N H"], pages: Array | QArray, *, value_dim: int
) -> str | None:
    """Why the kernel can't attend to these latents on this device, None if it can."""
    if reason := device_reason("9.0"):
        return reason
    if isinstance(pages, QArray):
        return f"no kernel for quantized latents; found {pages.format.element}"
    if pages.ndim != 4 or pages.shape[1] != 1:
        return f"pages must be [P, 1, page_size, H]; found {list(pages.shape)}"
    return mla_decode_sm90.unsupported_reason(
        query.shape[2],
        query.shape[3],
        value_dim,
        pages.shape[2],
        queries=query.shape[1],
        dtype=query.dtype,
        page_dtype=pages.dtype,
    )
