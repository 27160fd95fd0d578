"""Qwen3 mixture of experts (arXiv:2505.09388): Qwen3's attention, routed feed-forward layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax import Array
from jaxtyping import Float

from qjax.kv_cache import LayerCache
from qjax.models._config import Fields
from qjax.nn import (
    Attention,
    CausalLM,
    Context,
    Decoder,
    GatedMLP,
    MoE,
    RMSNorm,
    Rope,
    Routing,
    Tokens,
)
from qjax.recipe import QuantSpec
from qjax.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and options; names as in config.json.

    Attributes:
        sliding_window: Positions that a token sees, None for all.
        routing: How the routers choose experts.
        dense_layers: Layers without experts.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    tie_word_embeddings: bool
    attention_bias: bool
    sliding_window: int | None
    routing: Routing
    dense_layers: frozenset[int]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Reads a config.json.

        Raises:
            ValueError: If a field is missing, malformed or not supported.
        """
        f = Fields(config)
        model_type = f.choice("model_type", ("qwen3_moe",))
        f.choice("hidden_act", ("silu",), "silu")
        hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
        kv_heads = f.integer("num_key_value_heads", 4)
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_key_value_heads = {kv_heads} must divide num_attention_heads = {heads}"
            )
        head_dim = f.integer("head_dim", hidden // heads)
        if head_dim % 2:
            raise ValueError(f"config.json: head_dim = {head_dim} must be even")
        # transformers 5 writes num_local_experts, earlier releases num_experts.
        experts = f.integer("num_experts", f.optional_integer("num_local_experts"), maximum=65536)
        f.choice("num_local_experts", (experts,), experts)
        window = f.optional_integer("sliding_window", 4096)
        layers = f.layers()
        built = cls(
            model_type=model_type,
            vocab_size=f.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=f.integer("intermediate_size"),
            moe_intermediate_size=f.integer("moe_intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=f.number("rms_norm_eps", 1e-6),
            max_position_embeddings=f.integer("max_position_embeddings"),
            rope=Rope.from_hf(config, head_dim),
            tie_word_embeddings=f.flag("tie_word_embeddings", False),
            attention_bias=f.flag("attention_bias", False),
            sliding_window=window if f.flag("use_sliding_window", False) else None,
            routing=Routing(
                experts,
                f.integer("num_experts_per_tok", 8),
                normalize=f.flag("norm_topk_prob", False),
            ),
            dense_layers=_dense_layers(f, layers),
        )
        f.finish()
        return built


def _dense_layers(f: Fields, layers: int) -> frozenset[int]:
    """Layers that are listed, and those between every `decoder_sparse_step`-th one."""
    step = f.integer("decoder_sparse_step", 1)
    listed = f.raw("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(isinstance(i, int) for i in listed):
        raise ValueError(
            f"config.json: mlp_only_layers must be a list of layer numbers; found {listed!r}"
        )
    return frozenset(listed) | frozenset(i for i in range(layers) if (i + 1) % step)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, config: Config, index: int, context: Context):
        """Builds layer `index` with abstract parameters."""
        path = f"model.layers.{index}"
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, context, eps=eps)
        self.self_attn = Attention(
            size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.rope,
            f"{path}.self_attn",
            context,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm_eps=eps,
            sliding_window=config.sliding_window,
        )
        self.post_attention_layernorm = RMSNorm(size, context, eps=eps)
        if index in config.dense_layers:
            self.mlp = GatedMLP(size, config.intermediate_size, f"{path}.mlp", context)
        else:
            self.mlp = MoE(
                size, config.moe_intermediate_size, config.routing, f"{path}.mlp", context
            )

    def __call__(
        self, x: Float[Array, "B T D"], tokens: Tokens, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Hidden states after this layer, and its updated cache."""
        normed, x = self.input_layernorm.into(self.self_attn.input_layers, x)
        attended, cache = self.self_attn(normed, tokens, cache)
        normed, x = self.post_attention_layernorm.into(self.mlp.input_layers, attended, x)
        return x + self.mlp(normed), cache


class Model(CausalLM):
    """The language model; see `qjax.nn.CausalLM`."""

    def __init__(
        self,
        config: Config,
        *,
        specs: Mapping[str, QuantSpec] | None = None,
        dtype: str = "bfloat16",
        sharding: Sharding | None = None,
        implementation: str | None = None,
    ):
        """Builds the model with abstract parameters.

        Args:
            config: Sizes and options.
            specs: {module path: quantization}, as `Recipe.resolve` gives.
            dtype: Dtype of plain parameters and activations.
            sharding: Mesh and rules.
            implementation: Which implementation the ops use.
        """
        context = Context(specs or {}, dtype, sharding or Sharding(), implementation)
        layers = [DecoderLayer(config, i, context) for i in range(config.num_hidden_layers)]
        decoder = Decoder(
            config.vocab_size, config.hidden_size, layers, config.rms_norm_eps, context
        )
        super().__init__(
            decoder, config.vocab_size, config.hidden_size, config.tie_word_embeddings, context
        )
        self.config = config
