"""Causal attention over a paged cache of latents (DeepSeek-V2, absorbed)."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qjax.formats import qformat
from qjax.ops._attention import dot_product_attention, gather_pages
from qjax.ops._dispatch import choose, device_reason, num_sms
from qjax.pallas_kernels import mla_decode_fp8_sm90, mla_decode_sm90
from qjax.qarray import QArray


def latent_attention(
    query: Float[Array, "B T N H"],
    pages: Array | QArray,
    page_table: Int[Array, "B pages"],
    *,
    rotated_pages: Float[Array, "P 1 page_size Hr"] | None = None,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None = None,
    value_dim: int,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
    """Causal attention of new queries over cached latents: values are the keys' first channels.

    The kernels take a few queries of each sequence over pages of bfloat16, or of E4M3 with scales of 128 channels.

    Args:
        query: Queries mapped into the latent space, rotated part last; prefill and decode alike.
        pages: [P, 1, page_size, H], an array or a QArray of that logical shape; or [P, 1, page_size, H - Hr].
        rotated_pages: The last Hr channels of the keys, where `pages` have them not; None where they have.
        page_table: Pages of each sequence in order; entries past its length may be anything in range.
        positions: Position of each query, one more from query to query; its latent is in the cache already.
        lengths: Tokens of each sequence, default up to the last query's: queries past them are padding.
        value_dim: Channels of a value.
        scale: Default 1/sqrt(H).
        implementation: "pallas_mosaic_gpu", "xla" or None.

    Raises:
        ValueError: If the implementation asked for can't take the arguments.
    """
    reason = unsupported_reason(query, pages, rotated_pages, value_dim=value_dim)
    factor = float(query.shape[3] ** -0.5 if scale is None else scale)
    if choose("latent_attention", implementation, reason) == "pallas_mosaic_gpu":
        seen = positions + 1 if lengths is None else jnp.minimum(positions + 1, lengths[:, None])
        where, options = (page_table, seen), {"scale": factor, "num_sms": num_sms()}
        if isinstance(pages, QArray):
            assert rotated_pages is not None
            pools = (pages.qvalue[:, 0], pages.scale[:, 0], rotated_pages[:, 0])
            return mla_decode_fp8_sm90.mla_decode_fp8_attention(query, *pools, *where, **options)[0]
        return mla_decode_sm90.mla_decode_attention(query, pages[:, 0], *where, **options)[0]
    key = gather_pages(pages, page_table)
    value = key[..., :value_dim]
    if rotated_pages is not None:
        rotated = gather_pages(rotated_pages, page_table).astype(key.dtype)
        key = jnp.concatenate([key, rotated], axis=-1)
    return dot_product_attention(
        query, key, value, positions=positions, lengths=lengths, scale=factor, implementation="xla"
    )


def unsupported_reason(
    query: Float[Array, "B T N H"],
    pages: Array | QArray,
    rotated_pages: Array | None = None,
    *,
    value_dim: int,
) -> str | None:
    """Why no kernel can attend to these latents on this device, None if one can."""
    if reason := device_reason("9.0"):
        return reason
    if pages.ndim != 4 or pages.shape[1] != 1:
        return f"pages must be [P, 1, page_size, H]; found {list(pages.shape)}"
    quantized = isinstance(pages, QArray)
    if quantized and (pages.format != qformat("fp8_e4m3_1x128") or rotated_pages is None):
        apart = "without" if rotated_pages is None else "with"
        return (
            "quantized latents must be fp8_e4m3_1x128, their rotated channels apart; found "
            f"{pages.format.element} {pages.format.block_shape} {apart} rotated_pages"
        )
    if not quantized and rotated_pages is not None:
        return "plain pages must hold the rotated channels too; found rotated_pages"
    kernel = mla_decode_fp8_sm90 if quantized else mla_decode_sm90
    return kernel.unsupported_reason(
        query.shape[2],
        query.shape[3],
        value_dim,
        pages.shape[2],
        queries=query.shape[1],
        dtype=query.dtype,
        page_dtype=pages.qvalue.dtype if quantized else pages.dtype,
    )
