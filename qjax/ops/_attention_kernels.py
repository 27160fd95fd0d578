"""What attention's kernels take of the ops' arguments, and how they get it."""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qjax.formats import WHOLE
from qjax.ops._dispatch import device_reason, num_sms
from qjax.pallas_kernels import paged_attention_sm90 as decode_sm90
from qjax.pallas_kernels import prefill_attention_sm90 as prefill_sm90
from qjax.qarray import QArray


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static in an attention; see `qjax.ops.dot_product_attention`."""

    scale: float | None
    sliding_window: int | None
    logit_soft_cap: float | None


def prefill_unsupported_reason(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"]
) -> str | None:
    """Why the prefill kernel can't attend to these keys on this device, None if it can."""
    if reason := device_reason("9.0"):
        return reason
    if not query.dtype == key.dtype == value.dtype:
        found = f"{query.dtype}, {key.dtype} and {value.dtype}"
        return f"queries, keys and values must have one dtype; found {found}"
    return prefill_sm90.unsupported_reason(
        query.shape[2], key.shape[2], query.shape[3], value.shape[3], dtype=query.dtype
    )


def prefill(query, key, value, query_offsets, lengths, sinks, options: Options) -> Array:
    """The prefill kernel over contiguous keys; `lengths` None says that every query is real."""
    real = {}
    if lengths is not None:
        real = {
            "lengths": jnp.minimum(lengths, key.shape[1]),
            "query_lengths": jnp.clip(lengths - query_offsets, 0, query.shape[1]),
        }
    return prefill_sm90.prefill_attention(
        query, key, value, query_offsets=query_offsets, **real, **_options(sinks, options)
    )


def paged_kernel(
    query: Float[Array, "B T N H"],
    key_pages: Array | QArray,
    value_pages: Array | QArray | None,
) -> tuple[str | None, str | None]:
    """The kernel for these pages on this device, "decode" or "prefill"; or None and why there is none."""
    if reason := _pages_reason(query, key_pages, value_pages):
        return None, reason
    assert value_pages is not None
    _, kv_heads, page_size, dim = key_pages.shape
    steps, value_dim, page_dtype = query.shape[1], value_pages.shape[3], _dtype(key_pages)
    reason = None
    if steps <= decode_sm90.MAX_QUERIES:
        reason = decode_sm90.unsupported_reason(
            query.shape[2],
            kv_heads,
            dim,
            page_size,
            queries=steps,
            page_dtype=page_dtype,
            query_dtype=query.dtype,
        )
        if value_dim != dim:
            reason = f"decode needs keys and values of one size; found {dim} and {value_dim}"
        if reason is None:
            return "decode", None
    other = prefill_sm90.unsupported_reason(
        query.shape[2],
        kv_heads,
        dim,
        value_dim,
        dtype=query.dtype,
        page_size=page_size,
        page_dtype=page_dtype,
    )
    return ("prefill", None) if other is None else (None, reason or other)


def _pages_reason(query, key_pages, value_pages) -> str | None:
    """Why no kernel can attend to these pages on this device."""
    if reason := device_reason("9.0"):
        return reason
    if value_pages is None:
        return "no kernel for values that are the keys' first channels (latent attention)"
    if key_pages.ndim != 4 or query.ndim != 4:
        return f"pages and queries must have 4 axes; found {key_pages.ndim} and {query.ndim}"
    if key_pages.shape[:3] != value_pages.shape[:3]:
        found = f"{list(key_pages.shape)} and {list(value_pages.shape)}"
        return f"keys and values must have as many pages, heads and tokens; found {found}"
    formats = [p.format if isinstance(p, QArray) else None for p in (key_pages, value_pages)]
    dtypes = [_dtype(p) for p in (key_pages, value_pages)]
    if formats[0] != formats[1] or dtypes[0] != dtypes[1]:
        return f"keys and values must be stored alike; found {' and '.join(dtypes)}"
    if f := formats[0]:
        blocks = (f.block_shape, f.scale_dtype, f.global_scale, f.storage)
        eight = [((n, WHOLE), "float32", False, "plain") for n in (1, WHOLE)]
        four = ((1, 16), "float8_e4m3fn", True, "packed")
        if blocks not in (eight if f.bits == 8 else [four]) or f.offset is not None:
            return f"no kernel for pages of {f.element} {f.block_shape}"
    return None


def attend_pages(
    kernel: str,
    query: Float[Array, "B T N H"],
    key_pages: Array | QArray,
    value_pages: Array | QArray,
    page_table: Int[Array, "B pages"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None,
    sinks: Float[Array, " N"] | None,
    options: Options,
) -> Array:
    """What `paged_kernel` chose; arguments as in `qjax.ops.paged_attention`."""
    arrays = (query, _stored(key_pages), _stored(value_pages), page_table)
    scales = dict(
        key_scale=_scale(key_pages),
        value_scale=_scale(value_pages),
        key_block_scale=_block_scale(key_pages),
        value_block_scale=_block_scale(value_pages),
    )
    if kernel == "decode":
        return decode_sm90.paged_decode_attention(
            *arrays, positions + 1, **scales, **_options(sinks, options)
        )
    start = positions[:, 0]
    if lengths is None:
        lengths = start + query.shape[1]
    return prefill_sm90.paged_prefill_attention(
        *arrays,
        jnp.minimum(lengths, page_table.shape[1] * key_pages.shape[2]),
        query_offsets=start,
        query_lengths=jnp.clip(lengths - start, 0, query.shape[1]),
        **scales,
        **_options(sinks, options),
    )


def _options(sinks: Array | None, options: Options) -> dict:
    """Arguments that both kernels have."""
    return dict(
        scale=options.scale,
        sliding_window=options.sliding_window,
        logit_soft_cap=options.logit_soft_cap,
        sinks=None if sinks is None else sinks.astype(jnp.float32),
        num_sms=num_sms(),
    )


def _dtype(pages: Array | QArray) -> str:
    return pages.format.element if isinstance(pages, QArray) else pages.dtype.name


def _stored(pages: Array | QArray) -> Array:
    return pages.qvalue if isinstance(pages, QArray) else pages


def _scale(pages: Array | QArray) -> Array | None:
    """float32 scales of pages [P, K] or of their tokens [P, K, page_size]."""
    if not isinstance(pages, QArray):
        return None
    if pages.global_scale is not None:
        return jnp.squeeze(pages.global_scale, (2, 3))
    return jnp.squeeze(pages.scale, (2, 3) if pages.format.block_shape[0] == WHOLE else 3)


def _block_scale(pages: Array | QArray) -> Array | None:
    """Scales of blocks of channels: [P, K, page_size, blocks]."""
    return pages.scale if isinstance(pages, QArray) and pages.format.global_scale else None
