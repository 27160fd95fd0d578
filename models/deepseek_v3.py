"""DeepSeek-V3, R1 and V3.1 (arXiv:2412.19437) and Kimi K2: latent attention and a mixture of experts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax import Array
from jaxtyping import Float

from qjax.kv_cache import LayerCache
from qjax.models._config import Fields
from qjax.nn import (
    CausalLM,
    Context,
    Decoder,
    ExpertLinear,
    GatedMLP,
    LatentAttention,
    Linear,
    MoE,
    RMSNorm,
    Rope,
    Routing,
    Tokens,
    modules,
    yarn_mscale,
)
from qjax.recipe import QuantSpec
from qjax.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and options; names as in config.json.

    Attributes:
        routing: How the router chooses experts.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    tie_word_embeddings: bool
    attention_bias: bool
    first_k_dense_replace: int
    n_shared_experts: int
    routing: Routing

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Reads a config.json.

        Raises:
            ValueError: If a field is missing, malformed or not supported.
        """
        f = Fields(config)
        model_type = f.choice("model_type", ("deepseek_v3", "kimi_k2"))
        f.choice("hidden_act", ("silu",), "silu")
        heads = f.integer("num_attention_heads")
        f.choice("num_key_value_heads", (heads,), heads)
        nope, rotated = f.integer("qk_nope_head_dim"), f.integer("qk_rope_head_dim")
        if rotated % 2:
            raise ValueError(f"config.json: qk_rope_head_dim = {rotated} must be even")
        # Sums and names of other fields, which transformers 5 writes as well.
        f.choice("qk_head_dim", (nope + rotated,), nope + rotated)
        f.choice("head_dim", (rotated,), rotated)
        for name in ("ep_size", "aux_loss_alpha", "seq_aux"):  # of training
            f.raw(name)
        built = cls(
            model_type=model_type,
            vocab_size=f.integer("vocab_size"),
            hidden_size=f.integer("hidden_size"),
            intermediate_size=f.integer("intermediate_size"),
            moe_intermediate_size=f.integer("moe_intermediate_size"),
            num_hidden_layers=f.layers(),
            num_nextn_predict_layers=_predict_layers(f),
            num_attention_heads=heads,
            q_lora_rank=f.optional_integer("q_lora_rank"),
            kv_lora_rank=f.integer("kv_lora_rank"),
            qk_nope_head_dim=nope,
            v_head_dim=f.integer("v_head_dim"),
            rms_norm_eps=f.number("rms_norm_eps", 1e-6),
            max_position_embeddings=f.integer("max_position_embeddings"),
            rope=Rope.from_hf(config, rotated, interleaved=f.flag("rope_interleave", True)),
            tie_word_embeddings=f.flag("tie_word_embeddings", False),
            attention_bias=f.flag("attention_bias", False),
            first_k_dense_replace=f.integer("first_k_dense_replace", 0, minimum=0),
            n_shared_experts=f.optional_integer("n_shared_experts", minimum=0) or 0,
            routing=_routing(f),
        )
        f.finish()
        return built

    @property
    def softmax_scale(self) -> float:
        """Factor on the attention logits: YaRN's temperature over all channels enters squared."""
        scale = (self.qk_nope_head_dim + self.rope.dim) ** -0.5
        p = dict(self.rope.parameters)
        if p.get("mscale_all_dim"):
            scale *= yarn_mscale(p["factor"], p["mscale_all_dim"]) ** 2
        return scale


def _predict_layers(f: Fields) -> int:
    """Layers for multi-token prediction, which checkpoints hold behind the model's own."""
    old = f.integer("num_nextn_predict_layers", 0, minimum=0)
    return f.integer("num_mtp_layers", old, minimum=0)


def _routing(f: Fields) -> Routing:
    f.choice("scoring_func", ("sigmoid",), "sigmoid")
    f.choice("topk_method", ("noaux_tc",), "noaux_tc")
    f.choice("moe_layer_freq", (1,), 1)
    experts = f.integer("n_routed_experts", f.optional_integer("num_local_experts"), maximum=65536)
    f.choice("num_local_experts", (experts,), experts)
    return Routing(
        experts,
        f.integer("num_experts_per_tok"),
        "sigmoid",
        f.flag("norm_topk_prob", True),
        f.integer("n_group", 1),
        f.integer("topk_group", 1),
        f.number("routed_scaling_factor", 1.0),
    )


class DecoderLayer(nnx.Module):
    """Pre-norm attention and a feed-forward layer, dense in the first layers."""

    def __init__(self, config: Config, index: int, context: Context):
        """Builds layer `index` with abstract parameters."""
        path = f"model.layers.{index}"
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, context, eps=eps)
        self.self_attn = LatentAttention(
            size,
            config.num_attention_heads,
            config.rope,
            f"{path}.self_attn",
            context,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            nope_dim=config.qk_nope_head_dim,
            value_dim=config.v_head_dim,
            scale=config.softmax_scale,
            use_bias=config.attention_bias,
        )
        self.post_attention_layernorm = RMSNorm(size, context, eps=eps)
        if index < config.first_k_dense_replace:
            self.mlp = GatedMLP(size, config.intermediate_size, f"{path}.mlp", context)
        else:
            self.mlp = MoE(
                size,
                config.moe_intermediate_size,
                config.routing,
                f"{path}.mlp",
                context,
                correction=True,
                shared_size=config.n_shared_experts * config.moe_intermediate_size,
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

    @staticmethod
    def unused_tensor_names(config: Config) -> set[str]:
        """Tensors that checkpoints may hold and the model does not use.

        These are the layers for multi-token prediction and the rotary frequencies that old exporters
        saved. Linear modules are named with the parts of every quantized layout.
        """
        first, count = config.num_hidden_layers, config.num_nextn_predict_layers
        names = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(first + count)}
        extra = ("enorm", "hnorm", "embed_tokens", "shared_head.norm")
        for i in range(first, first + count):
            path = f"model.layers.{i}"
            names |= {f"{path}.{name}.weight" for name in extra}
            names |= _linear_names([f"{path}.eh_proj", f"{path}.shared_head.head"])
            names |= _tensor_names(DecoderLayer(config, i, Context()), path)
        return names


def _tensor_names(layer: nnx.Module, prefix: str) -> set[str]:
    """Checkpoint names of a layer's parameters, plain or quantized."""
    names = set()
    for path, module in modules(layer):
        path = f"{prefix}.{path}"
        paths = module.checkpoint_paths(path) if isinstance(module, ExpertLinear) else [path]
        own = [n for n, v in vars(module).items() if isinstance(v, nnx.Param)]
        names |= {f"{p}.{n}" for p in paths for n in own}
        if isinstance(module, Linear | ExpertLinear):
            names |= _linear_names(paths)
    return names


def _linear_names(paths: list[str]) -> set[str]:
    """A linear module's weight, and its parts as quantized checkpoints name them."""
    parts = """
        weight weight_scale_inv weight_scale weight_packed weight_shape weight_zero_point weight_g_idx
        weight_global_scale weight_scale_2 input_scale input_global_scale qweight qzeros scales g_idx
    """.split()
    return {f"{path}.{part}" for path in paths for part in parts}
