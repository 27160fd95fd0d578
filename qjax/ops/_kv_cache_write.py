"""Writing keys and values into a paged cache, with the rotary embedding before it."""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from qjax.formats import WHOLE
from qjax.ops._dispatch import choose, device_reason
from qjax.pallas_kernels import kv_cache_write_sm90 as kernel_sm90
from qjax.qarray import QArray
from qjax.quantization import Grid, compute_grid, quantize

Rotation = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
"""(cos, sin) of each token's channel pairs (i, i + half), float32."""


def kv_cache_write(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"] | None,
    key_pages: Array | QArray,
    value_pages: Array | QArray | None,
    page_table: Int[Array, "B pages"],
    *,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    rotation: Rotation | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Array | QArray, Array | QArray | None]:
    """Rotates queries and keys and writes keys and values into their pages, quantized as those are.

    Args:
        query: Queries; returned as they are where there is nothing to rotate.
        key: Keys of the same tokens.
        value: Their values; None where only keys are cached.
        key_pages: [P, K, page_size, H], an array or a QArray of that logical shape.
        value_pages: [P, K, page_size, Hv]; None without values.
        page_table: Pages of each sequence in order.
        positions: Where each token goes in its sequence.
        valid: Tokens that are real; the others are not written, nor are those beyond the table's pages or on
            pages that the pool lacks.
        rotation: Of each token; its channels from 2 * half on are left as they are. None: rotated already.
        implementation: "pallas_mosaic_gpu", "xla" or None.

    Returns:
        The rotated queries, and the pools; donate or drop the old ones for writes in place.

    Raises:
        ValueError: If there are more tokens than pages hold, or the implementation asked for can't take the
            arguments.
    """
    capacity = page_table.shape[1] * key_pages.shape[2]
    if key.shape[1] > capacity:
        raise ValueError(
            f"kv_cache_write: {key.shape[1]} new tokens of a sequence don't fit its {page_table.shape[1]} pages of "
            f"{key_pages.shape[2]} tokens; make a cache for longer sequences"
        )
    reason = unsupported_reason(query, key, value, key_pages, value_pages, rotation=rotation)
    where = (page_table, positions, valid)
    if choose("kv_cache_write", implementation, reason) == "pallas_mosaic_gpu":
        return _kernel(query, key, value, key_pages, value_pages, where, rotation)
    if rotation is not None:
        query, key = rotate(query, *rotation), rotate(key, *rotation)
    key_pages = write_pages(key_pages, *where, key)
    if value is not None and value_pages is not None:
        value_pages = write_pages(value_pages, *where, value)
    return query, key_pages, value_pages


def unsupported_reason(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"] | None,
    key_pages: Array | QArray,
    value_pages: Array | QArray | None,
    *,
    rotation: Rotation | None = None,
) -> str | None:
    """Why the kernel can't write these keys and values on this device, None if it can."""
    if reason := device_reason("9.0"):
        return reason
    dtypes = {x.dtype for x in (query, key, value) if x is not None}
    if len(dtypes) > 1:
        return f"queries, keys and values must have one dtype; found {sorted(map(str, dtypes))}"
    return kernel_sm90.unsupported_reason(
        _pool(key_pages),
        None if value_pages is None else _pool(value_pages),
        x_dtype=key.dtype,
        rotary_dim=0 if rotation is None else 2 * rotation[0].shape[-1],
    )


def _pool(pages: Array | QArray) -> kernel_sm90.Pool:
    if isinstance(pages, QArray):
        return kernel_sm90.Pool(pages.qvalue, pages.scale, pages.global_scale)
    return kernel_sm90.Pool(pages)


def _kernel(
    query: Array,
    key: Array,
    value: Array | None,
    key_pages: Array | QArray,
    value_pages: Array | QArray | None,
    where: tuple[Array, Array, Array],
    rotation: Rotation | None,
) -> tuple[Array, Array | QArray, Array | QArray | None]:
    num_pages, _, page_size, _ = key_pages.shape
    # The same for every layer of a step: compiled once.
    page, place = _places(*where, num_pages, page_size)
    slots = jnp.where(page < num_pages, page * page_size + place, -1)
    cos, sin = (None, None) if rotation is None else rotation
    rotated, key_pool, value_pool = kernel_sm90.kv_cache_write(
        _by_token(query),
        _by_token(key),
        None if value is None else _by_token(value),
        slots.reshape(-1),
        _pool(key_pages),
        None if value_pages is None else _pool(value_pages),
        cos=None if cos is None else _by_token(cos),
        sin=None if sin is None else _by_token(sin),
    )
    return (
        query if rotated is None else rotated.reshape(query.shape),
        _pages(key_pages, key_pool),
        None if value_pages is None or value_pool is None else _pages(value_pages, value_pool),
    )


def _by_token(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def _pages(like: Array | QArray, pool: kernel_sm90.Pool) -> Array | QArray:
    if not isinstance(like, QArray):
        return pool.codes
    return dataclasses.replace(like, qvalue=pool.codes, scale=pool.scale)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """x with channel pairs (i, i + half) rotated, in float32; channels from 2 * half on stay."""
    half = cos.shape[-1]
    f, cos, sin = x.astype(jnp.float32), cos[:, :, None], sin[:, :, None]
    a, b, rest = jnp.split(f, (half, 2 * half), axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def _places(page_table, positions, valid, num_pages: int, page_size: int) -> tuple[Array, Array]:
    """(page, place on it) of each token; `num_pages` where nothing is to be written."""
    page = jnp.take_along_axis(page_table, positions // page_size, axis=1, mode="clip")
    inside = valid & (positions >= 0) & (positions < page_table.shape[1] * page_size)
    inside &= (page >= 0) & (page < num_pages)  # a negative one would count from the end
    return jnp.where(inside, page, num_pages), positions % page_size


def write_pages(
    pages: Array | QArray,
    page_table: Int[Array, "B pages"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    values: Float[Array, "B T K H"],
) -> Array | QArray:
    """The pool with these tokens' keys or values written at their positions: the reference.

    Args:
        pages: The pool.
        page_table: Pages of each sequence.
        positions: Where each token goes in its sequence.
        valid: Tokens that are real; the others are not written.
        values: The tokens' keys or values, quantized here as the pool is.
    """
    # Out of range means dropped; a page of its own would have to be allocated otherwise.
    page, slot = _places(page_table, positions, valid, pages.shape[0], pages.shape[-2])

    def put(pool, new):
        return pool.at[page, :, slot].set(new.astype(pool.dtype), mode="drop")

    if not isinstance(pages, QArray):
        return put(pages, values)
    x = values[..., None, :]  # one row per token and head
    f = pages.format
    if f.block_shape == (WHOLE, WHOLE):
        scale = jnp.take(pages.scale, page, axis=0, mode="clip")
        q = quantize(x, f, grid=Grid(scale))
        return dataclasses.replace(pages, qvalue=put(pages.qvalue, q.qvalue[..., 0, :]))
    global_scale = None
    if pages.global_scale is not None:
        global_scale = jnp.take(pages.global_scale, page, axis=0, mode="clip")
    q = quantize(x, f, grid=compute_grid(x, f, global_scale=global_scale))
    return dataclasses.replace(
        pages,
        qvalue=put(pages.qvalue, q.qvalue[..., 0, :]),
        scale=put(pages.scale, q.scale[..., 0, :]),
    )
