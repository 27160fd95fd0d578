"""A Llama of a few thousand weights with a byte tokenizer and a chat template, as a Hugging Face folder."""

import json
from pathlib import Path

import jax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from qjax.checkpoint import export
from qjax.nn import initialize
from qjax.registry import model_module

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
MOE_CONFIG = CONFIG | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "head_dim": 16,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """Bytes as tokens 0..255, then <|im_start|> and <|im_end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    marks = ("<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(folder: Path, config: dict = CONFIG, *, scale: float = 0.1) -> Path:
    """The folder, with float32 weights of a fixed draw."""
    family = model_module(config["model_type"])
    model = family.Model(family.Config.from_hf(config), dtype="float32")
    initialize(model, jax.random.key(0), scale=scale)
    export(model, folder, format="f32", source=config, progress=False)
    write_tokenizer(folder)
    return folder
