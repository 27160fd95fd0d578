"""GPT-OSS (arXiv:2508.10925): attention sinks, alternating windows, clamped SwiGLU experts with biases."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from qjax.kv_cache import LayerCache
from qjax.models._config import Fields
from qjax.nn import (
    Attention,
    CausalLM,
    Context,
    Decoder,
    ExpertLinear,
    Experts,
    RMSNorm,
    Rope,
    Router,
    Routing,
    Tokens,
    gated_mlp,
)
from qjax.ops import GatedActivation
from qjax.recipe import QuantSpec
from qjax.sharding import Sharding

_DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and options; names as in config.json.

    Attributes:
        sliding_windows: Per layer, the positions that a token sees, None for all.
        routing: How the routers choose experts.
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
    attention_bias: bool
    swiglu_alpha: float
    swiglu_limit: float
    sliding_windows: tuple[int | None, ...]
    routing: Routing

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Reads a config.json in Hugging Face's form; see `hf_config` for OpenAI's own.

        Raises:
            ValueError: If a field is missing, malformed or not supported.
        """
        f = Fields(config)
        model_type = f.choice("model_type", ("gpt_oss",))
        f.choice("hidden_act", ("silu",), "silu")
        hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
        kv_heads = f.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_key_value_heads = {kv_heads} must divide num_attention_heads = {heads}"
            )
        head_dim = f.integer("head_dim", hidden // heads)
        if head_dim % 2:
            raise ValueError(f"config.json: head_dim = {head_dim} must be even")
        experts = f.integer("num_local_experts", f.optional_integer("num_experts"), maximum=65536)
        f.choice("num_experts", (experts,), experts)
        top_k = f.integer("num_experts_per_tok", f.optional_integer("experts_per_token"))
        f.choice("experts_per_token", (top_k,), top_k)
        f.raw("initial_context_length")  # rope's original_max_position_embeddings says it
        if not config.get("rope_parameters") and not config.get("rope_scaling"):
            config = {**config, "rope_scaling": _DEFAULT_ROPE}
        layers = f.layers()
        built = cls(
            model_type=model_type,
            vocab_size=f.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=f.integer("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=f.number("rms_norm_eps", 1e-5),
            max_position_embeddings=f.integer("max_position_embeddings"),
            rope=Rope.from_hf(config, head_dim, theta=150000.0),
            tie_word_embeddings=f.flag("tie_word_embeddings", False),
            attention_bias=f.flag("attention_bias", True),
            swiglu_alpha=f.number("swiglu_alpha", 1.702),
            swiglu_limit=f.number("swiglu_limit", 7.0),
            sliding_windows=_sliding_windows(f, layers),
            routing=Routing(experts, top_k, "softmax_of_chosen"),
        )
        f.finish()
        return built


def _sliding_windows(f: Fields, layers: int) -> tuple[int | None, ...]:
    """Each layer's window: every other layer's, from the first on, unless layer_types says else."""
    known = ("sliding_attention", "full_attention")
    types = f.raw("layer_types") or [known[i % 2] for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
        raise ValueError(f"config.json: layer_types must be {layers} of {known}; found {types!r}")
    window = f.optional_integer("sliding_window")
    if window is None and known[0] in types:
        raise ValueError("config.json: sliding_window is missing and layer_types needs it")
    return tuple(window if t == known[0] else None for t in types)


class ClampedExperts(Experts):
    """Experts whose gate and up rows alternate (even rows gate) and whose activations are clamped.

    ``down((clip(up) + 1) * g * sigmoid(alpha * g))`` with g = min(gate, limit).
    """

    def __init__(self, config: Config, path: str, context: Context):
        """Builds gate_up_proj [E, 2F, D] and down_proj [E, D, F] with abstract parameters."""
        size, channels = config.hidden_size, config.intermediate_size
        make = self.builder(
            config.routing.num_experts,
            channels,
            path,
            context,
            use_bias=True,
            stacked_in_checkpoint=True,
            transposed_in_checkpoint=True,
        )
        self.gate_up_proj = make("gate_up_proj", size, 2 * channels, alternating=True)
        self.down_proj = make("down_proj", channels, size)
        self.activation = GatedActivation(config.swiglu_alpha, 1.0, config.swiglu_limit)

    def layers(self) -> dict[str, ExpertLinear]:
        """{name: layer}, as `feed_forward` takes their products."""
        return {"gate_up_proj": self.gate_up_proj, "down_proj": self.down_proj}

    def feed_forward(
        self,
        product,
        x: Float[Array, "T D"],
        group_sizes: Int[Array, " E"],
        rows: Int[Array, " M"],
        places: Int[Array, " M"],
    ) -> Float[Array, "M D"]:
        """The experts' outputs in x's dtype for rows sorted by expert; `expert_order` has rows and places."""
        layers = product["gate_up_proj"], product["down_proj"]
        return gated_mlp(*layers, x, group_sizes, rows, places, self.activation)


class ClampedMoE(nnx.Module):
    """A router with a bias and its experts."""

    def __init__(self, config: Config, path: str, context: Context):
        """Builds `router` and `experts` with abstract parameters."""
        self.router = Router(config.hidden_size, config.routing, context, use_bias=True)
        self.experts = ClampedExperts(config, f"{path}.experts", context)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The layer's output in x's dtype."""
        return self.experts(x, *self.router(x))


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
            sliding_window=config.sliding_windows[index],
            sinks=True,
        )
        self.post_attention_layernorm = RMSNorm(size, context, eps=eps)
        self.mlp = ClampedMoE(config, f"{path}.mlp", context)

    def __call__(
        self, x: Float[Array, "B T D"], tokens: Tokens, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Hidden states after this layer, and its updated cache."""
        normed, x = self.input_layernorm.into(self.self_attn.input_layers, x)
        attended, cache = self.self_attn(normed, tokens, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


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


def hf_config(original: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face's config.json for the config.json of OpenAI's original layout (MXFP4 experts).

    Raises:
        ValueError: If a field is missing or malformed.
    """
    f = Fields(original)
    length, factor = f.integer("initial_context_length"), f.number("rope_scaling_factor")
    slow, fast = f.number("rope_ntk_alpha"), f.number("rope_ntk_beta")
    renamed = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
    rope = ("initial_context_length", "rope_scaling_factor", "rope_ntk_alpha", "rope_ntk_beta")
    return {
        **{renamed.get(k, k): v for k, v in original.items() if k not in rope},
        "model_type": "gpt_oss",
        "max_position_embeddings": int(length * factor),
        "rope_scaling": _DEFAULT_ROPE
        | {
            "factor": factor,
            "beta_fast": fast,
            "beta_slow": slow,
            "original_max_position_embeddings": length,
        },
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }


_ORIGINAL_LAYER_NAMES = {
    "input_layernorm.weight": "attn.norm.scale",
    "self_attn.sinks": "attn.sinks",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_proj_blocks": "mlp.mlp1_weight.blocks",
    "mlp.experts.gate_up_proj_scales": "mlp.mlp1_weight.scales",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_blocks": "mlp.mlp2_weight.blocks",
    "mlp.experts.down_proj_scales": "mlp.mlp2_weight.scales",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
}


def original_names(config: Config) -> dict[str, tuple[str, tuple[int, int] | None]]:
    """{Hugging Face tensor name: (name in OpenAI's original layout, its rows)}; None is all rows.

    Queries, keys and values are rows of one tensor there; all other tensors are the same under
    another name.
    """
    names: dict[str, tuple[str, tuple[int, int] | None]] = {
        "model.embed_tokens.weight": ("embedding.weight", None),
        "model.norm.weight": ("norm.scale", None),
        "lm_head.weight": ("unembedding.weight", None),
    }
    queries = config.num_attention_heads * config.head_dim
    keys = queries + config.num_key_value_heads * config.head_dim
    values = keys + config.num_key_value_heads * config.head_dim
    rows = {"q_proj": (0, queries), "k_proj": (queries, keys), "v_proj": (keys, values)}
    for i in range(config.num_hidden_layers):
        layer, block = f"model.layers.{i}", f"block.{i}"
        for ours, theirs in _ORIGINAL_LAYER_NAMES.items():
            names[f"{layer}.{ours}"] = (f"{block}.{theirs}", None)
        for name, cut in rows.items():
            for part in ("weight", "bias"):
                names[f"{layer}.self_attn.{name}.{part}"] = (f"{block}.attn.qkv.{part}", cut)
    return names
