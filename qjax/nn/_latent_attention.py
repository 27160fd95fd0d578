"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values from one low-rank latent."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from qjax.kv_cache import LayerCache, LayerShape, latent_page_format, latent_values
from qjax.nn._attention import HeadSharding, Tokens, attend
from qjax.nn._linear import Linear, RMSNorm
from qjax.nn._params import Context, KVScale
from qjax.nn._rope import Rope
from qjax.ops import (
    QuantizedInput,
    gather_pages,
    kv_cache_write,
    latent_attention,
    straight_through,
)
from qjax.qarray import QArray
from qjax.quantization import quantize_activation
from qjax.recipe import KVCacheFormat
from qjax.sharding import array_specs

# The two inner norms do not take the config's epsilon, in DeepSeek's code and in transformers.
_EPS = 1e-6

MAX_ABSORBED = 8
"""New tokens of a sequence up to which they attend in the latent space; the decode kernel takes as many."""


class LatentAttention(nnx.Module):
    """Attention that caches per token one latent [R] and one rotated key [rope_dim], for all heads.

    For a few new tokens kv_b_proj is absorbed: queries are mapped into the latent space, attend to the cache there,
    and their averaged latents are expanded to values, so cached keys and values never exist per head. Its weight is
    dequantized where it is used; no second copy is kept. For more tokens, or without a cache, keys and values are
    expanded, which takes fewer operations per logit: those of the new tokens where nothing is before them, else those
    of all pages.

    A quantized cache is what every token attends to, itself included, whichever way its prompt is cut.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        rope: Rope,
        path: str,
        context: Context,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        nope_dim: int,
        value_dim: int,
        scale: float,
        use_bias: bool = False,
    ):
        """Builds the layer with abstract parameters.

        Args:
            hidden_size: D.
            num_heads: N.
            rope: Rotary embedding of the decoupled channels.
            path: The module's path.
            context: Specs, dtype, sharding.
            q_lora_rank: Rank of the queries' projection, None for a single full one.
            kv_lora_rank: R.
            nope_dim: Channels of a head's key without position.
            value_dim: Channels of a head's value.
            scale: Factor on the logits.
            use_bias: Whether q_a_proj, kv_a_proj_with_mqa and o_proj have biases.
        """
        axis = context.sharding.axis("heads", num_heads)
        query, self.num_heads = num_heads * (nope_dim + rope.dim), num_heads
        self.rank, self.nope_dim, self.value_dim = kv_lora_rank, nope_dim, value_dim
        self.rope, self.scale = rope, scale
        self.heads_axis = axis
        self.sharding, self.implementation = context.sharding, context.implementation

        def linear(name, n_in, n_out, **kwargs):
            return Linear(n_in, n_out, f"{path}.{name}", context, **kwargs)

        low, rank = q_lora_rank is not None, q_lora_rank or 0
        self.q_proj = None if low else linear("q_proj", hidden_size, query, out_axis=axis)
        self.q_a_proj = linear("q_a_proj", hidden_size, rank, use_bias=use_bias) if low else None
        self.q_a_layernorm = RMSNorm(rank, context, eps=_EPS) if low else None
        self.q_b_proj = linear("q_b_proj", rank, query, out_axis=axis) if low else None
        self.kv_a_proj_with_mqa = linear(
            "kv_a_proj_with_mqa", hidden_size, kv_lora_rank + rope.dim, use_bias=use_bias
        )
        self.kv_a_layernorm = RMSNorm(kv_lora_rank, context, eps=_EPS)
        expanded = num_heads * (nope_dim + value_dim)
        self.kv_b_proj = linear("kv_b_proj", kv_lora_rank, expanded, out_axis=axis)
        self.o_proj = linear(
            "o_proj", num_heads * value_dim, hidden_size, use_bias=use_bias, in_axis=axis
        )
        self.k_scale = KVScale(jnp.ones((1,), jnp.float32))
        self.v_scale = KVScale(jnp.ones((1,), jnp.float32))
        self.fake_kv_cache: KVCacheFormat | None = None  # while it trains: `qjax.qat.prepare`

    def cache_shape(self) -> LayerShape:
        """What this layer caches per token: values are the latent part of the key."""
        return LayerShape(1, self.rank + self.rope.dim, 0, rotated_dim=self.rope.dim)

    def cache_scales(self) -> tuple[Array, Array]:
        """(key, value) scales; there are no cached values."""
        return self.k_scale.get_value(), self.v_scale.get_value()

    @property
    def input_layers(self) -> tuple[Linear, ...]:
        """The layers that see the input."""
        query = self.q_a_proj if self.q_proj is None else self.q_proj
        assert query is not None
        return query, self.kv_a_proj_with_mqa

    def __call__(
        self, x: Float[Array, "B T D"] | QuantizedInput, tokens: Tokens, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attention output and the layer's updated cache."""
        b, t = x.shape[:2]
        query = self._queries(x).reshape(b, t, self.num_heads, -1)
        compressed = self.kv_a_proj_with_mqa(x)
        latent = self.kv_a_layernorm(compressed[..., : self.rank])
        cos, sin = self.rope.angles(tokens.positions, tokens.lengths)
        rotated_query = self.rope.rotate(query[..., self.nope_dim :], cos, sin)
        rotated_key = self.rope.rotate(compressed[:, :, None, self.rank :], cos, sin)
        if self.fake_kv_cache is not None and cache is None:
            latent, rotated_key = self._faked(latent, rotated_key, self.fake_kv_cache)
        query = jnp.concatenate([query[..., : self.nope_dim], rotated_query], axis=-1)
        if cache is None:
            out = self._expanded(query, latent, rotated_key, tokens)
        else:
            latent = self._quantized_latent(latent)
            cache = self._write(latent, rotated_key, tokens, cache)
            out = self._cached(query, latent, rotated_key, tokens, cache)
        return self.o_proj(out.reshape(b, t, -1)), cache

    def _queries(self, x: Float[Array, "B T D"] | QuantizedInput) -> Float[Array, "B T q"]:
        if self.q_proj is not None:
            return self.q_proj(x)
        assert self.q_a_proj is not None and self.q_b_proj is not None
        assert self.q_a_layernorm is not None
        normed, _ = self.q_a_layernorm.into([self.q_b_proj], self.q_a_proj(x))
        return self.q_b_proj(normed)

    def _faked(self, latent, rotated_key, format: KVCacheFormat):
        """What a cache of this format would keep, differentiable."""
        if (pages := latent_page_format(format)) is None:
            kept, rounded = (x.astype(format.element) for x in (latent, rotated_key))
        else:
            kept, rounded = latent_values(latent, pages), rotated_key.astype(jnp.bfloat16)
        return (
            straight_through(x, y.astype(x.dtype))
            for x, y in ((latent, kept), (rotated_key, rounded))
        )

    def _expanded(self, query, latent, rotated_key, tokens):
        """Every head's own keys and values."""
        b, s = latent.shape[:2]
        expanded = self.kv_b_proj(latent).reshape(b, s, self.num_heads, -1)
        shared = jnp.broadcast_to(rotated_key, (b, s, self.num_heads, self.rope.dim))
        axis = self.heads_axis
        out, _ = attend(
            query,
            jnp.concatenate([expanded[..., : self.nope_dim], shared], axis=-1),
            expanded[..., self.nope_dim :],
            tokens,
            None,
            sharding=self.sharding,
            heads=HeadSharding(axis, axis, axis, 1),
            scale=self.scale,
            implementation=self.implementation,
        )
        return out

    def _cached(self, query, latent, rotated_key, tokens, cache: LayerCache):
        """Attention of tokens that are in the cache already."""
        if query.shape[1] <= MAX_ABSORBED:
            return self._absorbed(query, tokens, cache)
        if isinstance(cache.key, QArray) and cache.rotated is not None:
            latent = latent_values(latent, cache.key.format)
            rotated_key = rotated_key.astype(cache.rotated.dtype)
        else:
            latent, rotated_key = (x.astype(cache.key.dtype) for x in (latent, rotated_key))

        def fresh(query, latent, rotated_key, tokens, cache):
            del cache
            return self._expanded(query, latent, rotated_key, tokens)

        def continued(query, latent, rotated_key, tokens, cache):
            new = latent.dtype, rotated_key.dtype
            latent, rotated_key = self._read(tokens, cache)
            return self._expanded(query, latent.astype(new[0]), rotated_key.astype(new[1]), tokens)

        start = jnp.all(tokens.positions[:, 0] == 0)
        keys = latent.astype(query.dtype), rotated_key.astype(query.dtype)
        return jax.lax.cond(start, fresh, continued, query, *keys, tokens, cache)

    def _absorbed(self, query, tokens, cache: LayerCache):
        """q.(W_k c) = (W_k^T q).c and sum(p W_v c) = W_v sum(p c): attention over latents c."""
        mapped = self._times_kv_b(
            "btnh,nhr->btnr", query[..., : self.nope_dim], slice(None, self.nope_dim)
        )

        def local(query, tokens, cache):
            return latent_attention(
                query,
                cache.key,
                tokens.page_table,
                rotated_pages=cache.rotated,
                positions=tokens.positions,
                lengths=tokens.lengths,
                value_dim=self.rank,
                scale=self.scale,
                implementation=self.implementation,
            )

        heads = P(self._rows(query), None, self.heads_axis)
        query = jnp.concatenate([mapped, query[..., self.nope_dim :]], axis=-1)
        out = self._shard(local, (heads, *self._specs(query)), heads)(query, tokens, cache)
        return self._times_kv_b("btnr,nvr->btnv", out, slice(self.nope_dim, None))

    def _write(self, latent, rotated_key, tokens, cache: LayerCache) -> LayerCache:
        """The cache with the new tokens."""

        def local(latent, rotated_key, tokens, cache):
            where = {"positions": tokens.positions, "valid": tokens.valid}
            key, value = latent[:, :, None], rotated_key
            if cache.rotated is None:
                key, value = jnp.concatenate([key, value], axis=-1), None
            _, pages, rotated = kv_cache_write(
                key,  # queries: none are rotated here
                key,
                value,
                cache.key,
                cache.rotated,
                tokens.page_table,
                **where,
                implementation=self.implementation,
            )
            assert not isinstance(rotated, QArray)
            return LayerCache(pages, None, rotated)

        rows = P(self._rows(latent))
        specs = (rows, rows, *self._specs(latent))
        return self._shard(local, specs, rows)(latent, rotated_key, tokens, cache)

    def _read(self, tokens, cache: LayerCache):
        """(latents [B, S, R], rotated keys [B, S, 1, rope_dim]) of all pages."""

        def local(tokens, cache):
            pages = gather_pages(cache.key, tokens.page_table)
            if cache.rotated is None:
                return pages[:, :, 0, : self.rank], pages[..., self.rank :]
            return pages[:, :, 0], gather_pages(cache.rotated, tokens.page_table)

        rows = P(self._rows(tokens.positions))
        return self._shard(local, self._specs(tokens.positions), rows)(tokens, cache)

    def _rows(self, x: Array) -> str | None:
        return self.sharding.axis("batch", x.shape[0])

    def _specs(self, x: Array) -> tuple[P, P]:
        """Of tokens and the cache: both are cut over sequences only."""
        return P(self._rows(x)), P(self._rows(x))

    def _shard(self, local, in_specs, out_specs):
        if self.sharding.mesh is None:
            return local
        return jax.shard_map(
            local,
            mesh=self.sharding.mesh,
            in_specs=tuple(in_specs),
            out_specs=out_specs,
            check_vma=False,
        )

    def _quantized_latent(self, latent: Float[Array, "B T R"]) -> Float[Array, "B T R"]:
        """The values that kv_b_proj's activation format keeps: keys and values are linear in them."""
        activation, scale = self.kv_b_proj.activation_format, self.kv_b_proj.activation_scale
        if activation is None:
            return latent
        scale = None if scale is None else scale.get_value()
        q = quantize_activation(latent.reshape(-1, self.rank), activation, scale=scale)
        return straight_through(latent, q.dequantize(latent.dtype).reshape(latent.shape))

    def _times_kv_b(self, product: str, x: Float[Array, "B T N _"], rows: slice) -> Array:
        """x of each head times these rows of its part of kv_b_proj, in x's dtype."""

        def local(x, w):
            w = w.dequantize(x.dtype) if isinstance(w, QArray) else w.astype(x.dtype)
            w = w.reshape(x.shape[2], -1, self.rank)[:, rows]
            return jnp.einsum(product, x, w, preferred_element_type=jnp.float32).astype(x.dtype)

        w = self.kv_b_proj.weight_value()
        heads = P(self._rows(x), None, self.heads_axis)
        specs = (heads, array_specs(w, P(self.heads_axis, None)))
        return self._shard(local, specs, heads)(x, w)
