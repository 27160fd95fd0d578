"""The paged KV cache: pools of pages, plain or quantized, and the table that says whose they are."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from qjax.formats import WHOLE, QFormat, qformat
from qjax.ops import write_pages as write
from qjax.qarray import QArray
from qjax.quantization import compute_grid, quantize
from qjax.recipe import KVCacheFormat
from qjax.sharding import Sharding

PAGE_SIZE = 64
"""Default tokens per page, one that every attention kernel takes with every format and head size that it takes.

Smaller pages waste less of a sequence's last one, but a prefill tile of 128 tokens takes more copies; and NVFP4's block
scales of a page must fill rows of 128 bytes, which takes 32 tokens of 64 channels.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's pages.

    Attributes:
        key: [P, K, page_size, H], an array or a QArray of that logical shape.
        value: [P, K, page_size, Hv]; None where values are the keys' first channels (latent attention).
        rotated: bfloat16 [P, K, page_size, Hr]: the keys' last channels, where `key` holds quantized latents
            without them; None elsewhere.
    """

    key: Array | QArray
    value: Array | QArray | None
    rotated: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """All layers' pages and the sequences that own them.

    Attributes:
        layers: One `LayerCache` per layer.
        page_table: int32 [B, pages]: page numbers of each sequence, counted within its data shard.
        lengths: int32 [B]: tokens written of each sequence.
    """

    layers: tuple[LayerCache, ...]
    page_table: Int[Array, "B pages"]
    lengths: Int[Array, " B"]

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.layers[0].key.shape[-2]

    @property
    def max_len(self) -> int:
        """Tokens that a sequence can hold."""
        return self.page_table.shape[1] * self.page_size

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.layers))


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What a layer caches per token: `heads` keys of `key_dim` channels and values of `value_dim`.

    Attributes:
        heads: K.
        key_dim: H.
        value_dim: Hv; 0 where values are the keys' first channels (latent attention).
        heads_axis: Mesh axis of the heads.
        rotated_dim: Channels at the end of a latent key that are rotated: quantized caches leave them alone.
    """

    heads: int
    key_dim: int
    value_dim: int
    heads_axis: str | None = None
    rotated_dim: int = 0


def page_format(format: KVCacheFormat) -> QFormat | None:
    """The `QFormat` of quantized pages, None for plain ones."""
    if not format.quantized:
        return None
    if format.element == "nvfp4":
        return qformat("nvfp4")
    block = (1, WHOLE) if format.scale == "token_head" else (WHOLE, WHOLE)
    return QFormat(format.element, block)


def latent_page_format(format: KVCacheFormat) -> QFormat | None:
    """The `QFormat` of quantized pages of latents, None for plain ones.

    E4M3 with a float32 scale per token and 128 channels, computed when a token is written; the rotated part of a key
    stays bfloat16: 656 bytes per token of DeepSeek-V3 (FlashMLA's FP8 cache).

    Raises:
        ValueError: If there is no such cache of latents.
    """
    if not format.quantized:
        return None
    if format != KVCacheFormat("float8_e4m3fn"):
        raise ValueError(
            "kv_cache: latents (DeepSeek-V3, Kimi K2) are cached in bfloat16, float16, float32 or fp8_e4m3, "
            f"whose scales are computed per token and 128 channels; found {format}"
        )
    return qformat("fp8_e4m3_1x128")


def latent_values(latents: Float[Array, "*lead R"], format: QFormat) -> Float[Array, "*lead R"]:
    """What pages of this format keep of latents, in their dtype."""
    rows = latents[..., None, :]
    kept = quantize(rows, format, grid=compute_grid(rows, format))
    return kept.dequantize(latents.dtype)[..., 0, :]


def create(
    batch: int,
    max_len: int,
    layers: Sequence[LayerShape],
    format: KVCacheFormat,
    *,
    scales: Sequence[tuple[Float[Array, " K"], Float[Array, " K"]]] | None = None,
    page_size: int = PAGE_SIZE,
    sharding: Sharding | None = None,
) -> KVCache:
    """An empty cache with pages for `batch` sequences of up to `max_len` tokens.

    Args:
        batch: B.
        max_len: Tokens per sequence, rounded up to whole pages.
        layers: Shape of each layer.
        format: Storage of the pages.
        scales: (key, value) scales per layer and head [K] as checkpoints have them, amax / 448; default 1.
            E5M2 takes none. NVFP4's global scale is a sixth of them, but 1 where they are 1 (not
            calibrated). Latents take none.
        page_size: Tokens per page, a multiple of 8.
        sharding: Mesh and rules: pages are cut over batch and heads.

    Raises:
        ValueError: If a size doesn't suit.
    """
    if batch < 1 or max_len < 1 or page_size < 8 or page_size % 8:
        raise ValueError(
            "kv_cache: batch and max_len must be positive and page_size a multiple of 8; found "
            f"{batch}, {max_len}, {page_size}"
        )
    sharding = Sharding() if sharding is None else sharding
    rows = sharding.axis("batch", batch)
    pages = -(-max_len // page_size)
    per_shard = batch // sharding.size(rows)
    table = jnp.arange(per_shard * pages, dtype=jnp.int32).reshape(per_shard, pages)
    table = jnp.tile(table, (sharding.size(rows), 1))
    built = []
    for i, layer in enumerate(layers):
        key_scale, value_scale = (None, None) if scales is None else scales[i]
        shape = (batch * pages, layer.heads, page_size)
        if layer.rotated_dim and (f := latent_page_format(format)):
            pools = _latent_pools(shape, layer, f)
        else:
            key = _pool((*shape, layer.key_dim), format, key_scale)
            width = layer.value_dim
            pools = LayerCache(key, _pool((*shape, width), format, value_scale) if width else None)
        built.append(_place(pools, sharding, (rows, layer.heads_axis)))
    return KVCache(
        tuple(built),
        _place(table, sharding, (rows,)),
        _place(jnp.zeros((batch,), jnp.int32), sharding, (rows,)),
    )


def _latent_pools(shape: tuple[int, ...], layer: LayerShape, f: QFormat) -> LayerCache:
    latent = (*shape, layer.key_dim - layer.rotated_dim)
    scale = jnp.ones(f.scale_shape(latent), jnp.float32)
    key = QArray.from_parts(f, jnp.zeros(latent, f.storage_dtype), scale)
    return LayerCache(key, None, jnp.zeros((*shape, layer.rotated_dim), jnp.bfloat16))


def _pool(shape: tuple[int, ...], format: KVCacheFormat, scale: Array | None) -> Array | QArray:
    f = page_format(format)
    if f is None:
        return jnp.zeros(shape, format.element)
    if scale is None or format.element == "float8_e5m2":
        scale = jnp.ones((shape[1],), jnp.float32)
    if f.global_scale:
        scale = jnp.where(scale == 1, 1.0, scale / 6)
    scale = jnp.broadcast_to(scale.reshape(1, -1, 1, 1), (*shape[:2], 1, 1))
    if f.global_scale:
        zeros = jnp.zeros(f.scale_shape(shape), f.scale_dtype)
        return QArray.from_parts(
            f, jnp.zeros(f.storage_shape(shape), jnp.uint8), zeros, global_scale=scale
        )
    if format.scale == "token_head":
        scale = jnp.ones(f.scale_shape(shape), jnp.float32)
    return QArray.from_parts(f, jnp.zeros(shape, f.storage_dtype), scale)


def _place(tree, sharding: Sharding, lead: tuple[str | None, ...]):
    if sharding.mesh is None:
        return tree
    return jax.device_put(tree, NamedSharding(sharding.mesh, PartitionSpec(*lead)))


def stored_values(
    values: Float[Array, "B T K H"], format: KVCacheFormat, scale: Float[Array, " K"]
) -> Float[Array, "B T K H"]:
    """What a cache of this format keeps of keys or values, in their dtype.

    Args:
        values: Keys or values.
        format: The cache's storage.
        scale: Per head, as `create` takes it.
    """
    b, t, heads, dim = values.shape
    pool = _pool((1, heads, b * t, dim), format, scale)
    where = jnp.arange(b * t, dtype=jnp.int32)[None]
    tokens = values.reshape(1, b * t, heads, dim)
    table = jnp.zeros((1, 1), jnp.int32)
    pool = write(pool, table, where, jnp.ones((1, b * t), bool), tokens)
    kept = pool.dequantize(values.dtype) if isinstance(pool, QArray) else pool.astype(values.dtype)
    return kept[0].swapaxes(0, 1).reshape(values.shape)
