"""Llama 3.x, Mistral, Qwen2/2.5 and Qwen3: dense decoders that differ by a few fields."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax import Array
from jaxtyping import Float

from qjax.kv_cache import LayerCache
from qjax.models._config import Fields
from qjax.nn import Attention, CausalLM, Context, Decoder, GatedMLP, RMSNorm, Rope, Tokens
from qjax.recipe import QuantSpec
from qjax.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and options of a dense decoder; names as in config.json.

    Attributes:
        sliding_windows: Per layer, the positions that a token sees, None for all.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Reads a config.json.

        Raises:
            ValueError: If a field is missing, malformed or not supported.
        """
        f = Fields(config)
        model_type = f.choice("model_type", ("llama", "mistral", "qwen2", "qwen3"))
        f.choice("hidden_act", ("silu",), "silu")
        hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
        layers = f.layers()
        kv_default = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(model_type, heads)
        kv_heads = f.integer("num_key_value_heads", kv_default)
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_key_value_heads = {kv_heads} must divide num_attention_heads = {heads}"
            )
        head_dim = f.integer("head_dim", 128 if model_type == "qwen3" else hidden // heads)
        if head_dim % 2:
            raise ValueError(f"config.json: head_dim = {head_dim} must be even")
        attention_bias = f.flag("attention_bias", model_type == "qwen2")
        built = cls(
            model_type=model_type,
            vocab_size=f.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=f.integer("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=f.number("rms_norm_eps", 1e-6),
            max_position_embeddings=f.integer("max_position_embeddings"),
            rope=Rope.from_hf(config, head_dim),
            tie_word_embeddings=f.flag("tie_word_embeddings", False),
            qkv_bias=attention_bias or model_type == "qwen2",
            output_bias=attention_bias and model_type != "qwen2",
            mlp_bias=f.flag("mlp_bias", False),
            qk_norm=model_type == "qwen3",
            sliding_windows=_sliding_windows(f, model_type, layers),
        )
        f.finish()
        return built


def _sliding_windows(f: Fields, model_type: str, layers: int) -> tuple[int | None, ...]:
    """Each layer's window: Mistral's everywhere, Qwen's by layer_types or from max_window_layers on."""
    window = f.optional_integer("sliding_window", 4096)
    types = f.raw("layer_types")
    if model_type in ("qwen2", "qwen3"):
        if not f.flag("use_sliding_window", False):
            window = None
        first = f.integer("max_window_layers", 28, minimum=0)
        sliding = [i >= first for i in range(layers)]
    else:
        sliding = [model_type == "mistral"] * layers
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if (
            not isinstance(types, list)
            or len(types) != layers
            or any(t not in known for t in types)
        ):
            raise ValueError(
                f"config.json: layer_types must be {layers} of {known}; found {types!r}"
            )
        sliding = [t == "sliding_attention" for t in types]
    return tuple(window if on else None for on in sliding)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, config: Config, index: int, context: Context):
        """Builds layer `index` with abstract parameters."""
        path = f"model.layers.{index}"
        eps = config.rms_norm_eps
        self.input_layernorm = RMSNorm(config.hidden_size, context, eps=eps)
        self.self_attn = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.rope,
            f"{path}.self_attn",
            context,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
            qk_norm_eps=eps if config.qk_norm else None,
            sliding_window=config.sliding_windows[index],
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, context, eps=eps)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            f"{path}.mlp",
            context,
            use_bias=config.mlp_bias,
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
