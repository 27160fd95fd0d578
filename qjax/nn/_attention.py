"""Grouped-query self-attention over a paged cache or over the tokens at hand."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from qjax.kv_cache import LayerCache, LayerShape, stored_values
from qjax.nn._linear import Linear, RMSNorm
from qjax.nn._params import Context, KVScale, abstract_param
from qjax.nn._rope import Rope
from qjax.ops import (
    QuantizedInput,
    Rotation,
    dot_product_attention,
    kv_cache_write,
    paged_attention,
    straight_through,
)
from qjax.recipe import KVCacheFormat
from qjax.sharding import Sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Where the tokens of one call stand.

    Attributes:
        positions: int32 [B, T].
        valid: Real tokens, not padding: bool [B, T].
        lengths: Sequence lengths with these tokens: int32 [B].
        page_table: The cache's table, None without a cache.
    """

    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    lengths: Int[Array, " B"]
    page_table: Int[Array, "B pages"] | None = None


@dataclasses.dataclass(frozen=True)
class HeadSharding:
    """How heads are cut over the mesh.

    Attributes:
        heads: Mesh axis of the query heads, None where they stay whole.
        kv_heads: Mesh axis of the cached key heads.
        projection: Mesh axis of the key and value projections' outputs.
        repeat: Times each key head is repeated, so that each device has the one that its queries need.
    """

    heads: str | None
    kv_heads: str | None
    projection: str | None
    repeat: int

    @classmethod
    def plan(cls, sharding: Sharding, heads: int, kv_heads: int) -> "HeadSharding":
        """Cuts both where both divide, repeats key heads where only queries do, else cuts nothing."""
        axis = sharding.axis("heads", heads)
        size = sharding.size(axis)
        if axis is None:
            return cls(None, None, None, 1)
        if kv_heads % size == 0:
            kv_axis = sharding.axis("kv_heads", kv_heads)
            return cls(axis, kv_axis, kv_axis, 1) if kv_axis else cls(None, None, None, 1)
        if size % kv_heads == 0:
            return cls(axis, axis, None, size // kv_heads)
        return cls(None, None, None, 1)


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    tokens: Tokens,
    cache: LayerCache | None,
    *,
    sharding: Sharding,
    heads: HeadSharding,
    rotation: Rotation | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N Hv"], LayerCache | None]:
    """Writes the new keys and values, then attends; each device has its batch rows and heads.

    Args:
        query: Queries, rotated unless there is a `rotation`.
        key: Keys of the same tokens, likewise; without a cache, of positions 0..S-1.
        value: Their values.
        tokens: Where they stand.
        cache: The layer's pages; None attends among the tokens at hand.
        sharding: Mesh and rules.
        heads: How heads are cut.
        rotation: What to rotate queries and keys by when they are written; only with a cache.
        scale: Factor on the logits, default 1/sqrt(H).
        sliding_window: See `qjax.ops.dot_product_attention`.
        logit_soft_cap: See `qjax.ops.dot_product_attention`.
        sinks: See `qjax.ops.dot_product_attention`.
        implementation: See `qjax.ops`.
    """
    if heads.repeat > 1:
        key = jnp.repeat(key, heads.repeat, axis=2)
        value = jnp.repeat(value, heads.repeat, axis=2)
    options = {
        "scale": scale,
        "sliding_window": sliding_window,
        "logit_soft_cap": logit_soft_cap,
        "implementation": implementation,
    }

    def local(query, key, value, tokens, cache, sinks, rotation):
        stand = {"positions": tokens.positions, "lengths": tokens.lengths, "sinks": sinks}
        if cache is None:
            return dot_product_attention(query, key, value, **stand, **options), None
        query, key_pages, value_pages = kv_cache_write(
            query,
            key,
            value,
            cache.key,
            cache.value,
            tokens.page_table,
            positions=tokens.positions,
            valid=tokens.valid,
            rotation=rotation,
            implementation=implementation,
        )
        cache = LayerCache(key_pages, value_pages)
        out = paged_attention(
            query,
            cache.key,
            cache.value,
            tokens.page_table,
            **stand,
            **options,
        )
        return out, cache

    if sharding.mesh is None:
        return local(query, key, value, tokens, cache, sinks, rotation)
    rows = sharding.axis("batch", query.shape[0])
    kv = P(rows, None, heads.kv_heads)
    pages = jax.tree.map(lambda _: P(rows, heads.kv_heads), cache)
    return jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(P(rows, None, heads.heads), kv, kv, P(rows), pages, P(heads.heads), P(rows)),
        out_specs=(P(rows, None, heads.heads), pages),
        check_vma=False,
    )(query, key, value, tokens, cache, sinks, rotation)


class Attention(nnx.Module):
    """Grouped-query attention with rotary embedding, as Llama, Mistral, Qwen and GPT-OSS have it."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope: Rope,
        path: str,
        context: Context,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
        sliding_window: int | None = None,
        logit_soft_cap: float | None = None,
        sinks: bool = False,
    ):
        """Builds the layer with abstract parameters.

        Args:
            hidden_size: D.
            num_heads: N.
            num_kv_heads: K.
            head_dim: H.
            rope: Rotary embedding.
            path: The module's path.
            context: Specs, dtype, sharding.
            qkv_bias: Whether q_proj, k_proj and v_proj have biases.
            output_bias: Whether o_proj has one.
            qk_norm_eps: Epsilon of the norms on each query and key head (Qwen3), None for no norms.
            sliding_window: Positions that a token sees, itself included; None for all.
            logit_soft_cap: Logits become cap * tanh(logit / cap) (Gemma 2); None for no cap.
            sinks: Whether each head has a sink logit (GPT-OSS).
        """
        self.heads = HeadSharding.plan(context.sharding, num_heads, num_kv_heads)
        q, kv = num_heads * head_dim, num_kv_heads * head_dim
        axis, kv_axis = self.heads.heads, self.heads.projection

        def projection(name, out, out_axis):
            path_ = f"{path}.{name}"
            return Linear(hidden_size, out, path_, context, use_bias=qkv_bias, out_axis=out_axis)

        self.q_proj = projection("q_proj", q, axis)
        self.k_proj = projection("k_proj", kv, kv_axis)
        self.v_proj = projection("v_proj", kv, kv_axis)
        self.o_proj = Linear(
            q, hidden_size, f"{path}.o_proj", context, use_bias=output_bias, in_axis=axis
        )
        normed = qk_norm_eps is not None
        self.q_norm = RMSNorm(head_dim, context, eps=qk_norm_eps) if normed else None
        self.k_norm = RMSNorm(head_dim, context, eps=qk_norm_eps) if normed else None
        sink = abstract_param((num_heads,), context.dtype, context.sharding, (axis,))
        self.sinks = sink if sinks else None
        self.k_scale = KVScale(jnp.ones((num_kv_heads,), jnp.float32))
        self.v_scale = KVScale(jnp.ones((num_kv_heads,), jnp.float32))
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rope, self.sliding_window = rope, sliding_window
        self.logit_soft_cap = logit_soft_cap
        self.sharding, self.implementation = context.sharding, context.implementation
        self.fake_kv_cache: KVCacheFormat | None = None  # while it trains: `qjax.qat.prepare`

    def cache_shape(self) -> LayerShape:
        """What this layer caches per token."""
        heads = self.num_kv_heads * self.heads.repeat
        return LayerShape(heads, self.head_dim, self.head_dim, self.heads.kv_heads)

    def cache_scales(self) -> tuple[Array, Array]:
        """(key, value) scales per cached head."""
        repeat = self.heads.repeat
        return (
            jnp.repeat(self.k_scale.get_value(), repeat),
            jnp.repeat(self.v_scale.get_value(), repeat),
        )

    @property
    def input_layers(self) -> tuple[Linear, ...]:
        """The layers that see the input."""
        return self.q_proj, self.k_proj, self.v_proj

    def __call__(
        self, x: Float[Array, "B T D"] | QuantizedInput, tokens: Tokens, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attention output and the layer's updated cache."""
        b, t = x.shape[:2]
        query = self.q_proj(x).reshape(b, t, self.num_heads, self.head_dim)
        key = self.k_proj(x).reshape(b, t, self.num_kv_heads, self.head_dim)
        value = self.v_proj(x).reshape(b, t, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        rotation = self.rope.angles(tokens.positions, tokens.lengths)
        if cache is None or self.rope.interleaved:
            query, key = (self.rope.rotate(x, *rotation) for x in (query, key))
            rotation = None
        if self.fake_kv_cache is not None and cache is None:
            scales = (self.k_scale.get_value(), self.v_scale.get_value())
            key, value = (
                straight_through(x, stored_values(x, self.fake_kv_cache, scale))
                for x, scale in zip((key, value), scales, strict=True)
            )
        out, cache = attend(
            query,
            key,
            value,
            tokens,
            cache,
            sharding=self.sharding,
            heads=self.heads,
            rotation=rotation,
            sliding_window=self.sliding_window,
            logit_soft_cap=self.logit_soft_cap,
            sinks=None if self.sinks is None else self.sinks.get_value(),
            implementation=self.implementation,
        )
        return self.o_proj(out.reshape(b, t, -1)), cache
