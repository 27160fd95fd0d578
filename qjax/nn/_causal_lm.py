"""What all causal language models share: layers in order, logits, the cache."""

import functools
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from qjax import kv_cache
from qjax.kv_cache import KVCache
from qjax.nn._attention import Tokens
from qjax.nn._linear import Embedding, Linear, RMSNorm
from qjax.nn._moe import ExpertLinear
from qjax.nn._params import Context, modules
from qjax.ops import choice_context
from qjax.recipe import KVCacheFormat, QuantSpec, Recipe, fit_group
from qjax.registry import model_module


class Decoder(nnx.Module):
    """Embedding, decoder layers and final norm: `model.` in checkpoints."""

    def __init__(
        self, vocab_size: int, hidden_size: int, layers: list, eps: float, context: Context
    ):
        """Takes the family's decoder layers; each maps (x, tokens, cache) to (x, cache)."""
        self.embed_tokens = Embedding(vocab_size, hidden_size, "model.embed_tokens", context)
        self.layers = nnx.List(layers)
        self.norm = RMSNorm(hidden_size, context, eps=eps)


# Traced and lowered once for all layers that are the same function of their parameters.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_layer(graphdef: nnx.GraphDef, _: Hashable, state: Any, x, tokens, cache):
    return nnx.merge(graphdef, state)(x, tokens, cache)


class CausalLM(nnx.Module):
    """A decoder-only language model with Hugging Face's parameter names.

    Attributes:
        config: The family's configuration, set by its `Model`.
    """

    config: Any

    def __init__(
        self, decoder: Decoder, vocab_size: int, hidden_size: int, tied: bool, context: Context
    ):
        """Takes the family's decoder; a tied head reads the embedding."""
        self.model = decoder
        axis = context.sharding.axis("vocab", vocab_size)
        head = Linear(hidden_size, vocab_size, "lm_head", context, out_axis=axis)
        self.lm_head = None if tied else head
        self.vocab_size = vocab_size
        self.dtype, self.sharding = context.dtype, context.sharding
        self.implementation = context.implementation

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        cache: KVCache | None = None,
        num_tokens: Int[Array, " B"] | None = None,
        *,
        last_token_only: bool = False,
    ) -> tuple[Float[Array, "..."], KVCache | None]:
        """Logits of each next token, and the cache with these tokens in it.

        Args:
            input_ids: Tokens, padded on the right.
            cache: Earlier tokens of the same sequences; None starts at position 0 and keeps nothing.
            num_tokens: Real tokens of each row, default all.
            last_token_only: Logits of each row's last real token only.

        Returns:
            float32 [B, T, V], or [B, V] with last_token_only; and the cache (donate the old one).
        """
        b, t = input_ids.shape
        start = jnp.zeros((b,), jnp.int32) if cache is None else cache.lengths
        count = jnp.full((b,), t, jnp.int32) if num_tokens is None else num_tokens
        step = jnp.arange(t, dtype=jnp.int32)
        tokens = Tokens(
            positions=start[:, None] + step[None, :],
            valid=step[None, :] < count[:, None],
            lengths=start + count,
            page_table=None if cache is None else cache.page_table,
        )
        x = self.model.embed_tokens(input_ids)
        updated = []
        for i, layer in enumerate(self.model.layers):
            layer_cache = None if cache is None else cache.layers[i]
            graphdef, state = nnx.split(layer)
            x, layer_cache = _run_layer(graphdef, choice_context(), state, x, tokens, layer_cache)
            updated.append(layer_cache)
        if last_token_only:
            last = jnp.maximum(count - 1, 0)[:, None, None]
            x = jnp.take_along_axis(x, last, axis=1)[:, 0]
        logits = self.logits(self.model.norm(x))
        if cache is not None:
            cache = KVCache(tuple(updated), cache.page_table, tokens.lengths)
        return logits, cache

    def like(self, specs: Mapping[str, QuantSpec]) -> "CausalLM":
        """This model with other quantization, its parameters abstract."""
        return model_module(self.config.model_type).Model(
            self.config,
            specs=specs,
            dtype=self.dtype,
            sharding=self.sharding,
            implementation=self.implementation,
        )

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits of normed hidden states, float32."""
        if self.lm_head is None:
            return self.model.embed_tokens.attend(x)
        return self.lm_head(x).astype(jnp.float32)

    def init_cache(
        self,
        batch: int,
        max_len: int,
        format: KVCacheFormat | None = None,
        *,
        page_size: int = kv_cache.PAGE_SIZE,
    ) -> KVCache:
        """An empty cache for `batch` sequences of up to `max_len` tokens; see `qjax.kv_cache.create`."""
        layers = [layer.self_attn for layer in self.model.layers]
        return kv_cache.create(
            batch,
            max_len,
            [a.cache_shape() for a in layers],
            KVCacheFormat(self.dtype) if format is None else format,
            scales=[a.cache_scales() for a in layers],
            page_size=page_size,
            sharding=self.sharding,
        )


def resolve(recipe: Recipe, model: nnx.Module) -> dict[str, QuantSpec]:
    """{path: quantization} of a model's modules under a recipe, groups fitted to each module's K.

    Raises:
        ValueError: As `Recipe.resolve` and `qjax.recipe.fit_group` do.
    """
    columns = {}
    for path, module in modules(model):
        if isinstance(module, Linear | Embedding | ExpertLinear):
            k = module.weight.get_value().shape[-1]
            stacked = isinstance(module, ExpertLinear)
            columns |= dict.fromkeys(module.checkpoint_paths(path) if stacked else [path], k)
    specs = recipe.resolve(quantizable(model))
    return {path: fit_group(spec, columns[path], path) for path, spec in specs.items()}


def quantizable(model: nnx.Module) -> Mapping[str, str]:
    """{path: class word} of everything that a recipe may quantize, by checkpoint names.

    Experts that the checkpoint stores one by one are listed one by one.
    """
    kinds = {}
    for path, module in modules(model):
        if isinstance(module, Linear):
            kinds[path] = "Linear"
        elif isinstance(module, Embedding):
            kinds[path] = "Embedding"
        elif isinstance(module, ExpertLinear):
            kinds |= dict.fromkeys(module.checkpoint_paths(path), module.kind)
    return kinds
