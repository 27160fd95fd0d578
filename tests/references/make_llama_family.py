"""Write llama_family/: outputs of tiny llama, mistral, qwen2 and qwen3 models.

Run from the repository root, in an environment with torch and transformers:

    PYTHONPATH=tests python -m references.make_llama_family [case ...]
"""

import sys
from pathlib import Path

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from references.transformers_reference import Case, write_case

COMMON = dict(
    vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, bos_token_id=1,
    eos_token_id=2, max_position_embeddings=512,
)  # fmt: skip
GQA = dict(num_attention_heads=4, num_key_value_heads=2)
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN_ROPE = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN_LENGTH = dict(max_position_embeddings=128)


def _without(d: dict, *keys: str) -> dict:
    return {k: v for k, v in d.items() if k not in keys}


def _legacy_llama31() -> dict:
    """As the config.json of meta-llama/Llama-3.1-8B-Instruct is written."""
    return {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": [2, 3], "hidden_act": "silu", "hidden_size": 64,
        "initializer_range": 0.02, "intermediate_size": 96, "max_position_embeddings": 512,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": _without(LLAMA3_ROPE, "rope_theta"),
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 160,
    }  # fmt: skip


def _legacy_qwen2_yarn() -> dict:
    """As Qwen2.5's model card says to write YaRN: `type`, and sliding window keys switched off."""
    return {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
        "intermediate_size": 96, "max_position_embeddings": 128, "max_window_layers": 28,
        "model_type": "qwen2", "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32, "type": "yarn"},
        "sliding_window": 8, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False,
        "vocab_size": 160,
    }  # fmt: skip


def llama_cases() -> list[Case]:
    """The llama variants: rope scalings, tied embeddings, head counts, biases."""
    llama31 = LlamaConfig(**COMMON | GQA | dict(eos_token_id=[2, 3]), rms_norm_eps=1e-5,
                          rope_parameters=LLAMA3_ROPE)  # fmt: skip
    llama32 = LlamaConfig(**COMMON, **GQA, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=True,
                          rope_parameters=LLAMA3_ROPE | {"factor": 32.0})  # fmt: skip
    odd = COMMON | dict(hidden_size=144, num_hidden_layers=3)
    return [
        Case("llama3_1_rope", llama31, legacy=_legacy_llama31(),
             ablations=({"rope_parameters": DEFAULT_ROPE},)),
        Case("llama3_2_tied", llama32, seq_len=40,
             ablations=({"rope_parameters": DEFAULT_ROPE},
                        {"rope_parameters": LLAMA3_ROPE | {"factor": 8.0}})),
        Case("llama_odd_heads",
             LlamaConfig(**odd, num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-5)),
        Case("llama_biases",
             LlamaConfig(**COMMON, **GQA, attention_bias=True, mlp_bias=True)),
        Case("llama_linear_rope",
             LlamaConfig(**COMMON, **GQA, rope_parameters={
                 "rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
             ablations=({"rope_parameters": DEFAULT_ROPE},)),
        # 32 positions are beyond max_position_embeddings, so the base grows with the length;
        # the greedy runs stay below it, where dynamic scaling has no effect.
        Case("llama_dynamic_rope",
             LlamaConfig(**COMMON | dict(max_position_embeddings=16), **GQA, rope_parameters={
                 "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}),
             prompt_lengths=(3, 5), ablations=({"rope_parameters": DEFAULT_ROPE},)),
    ]  # fmt: skip


def other_cases() -> list[Case]:
    """Mistral, qwen2, qwen3: sliding windows, qkv biases, q and k norms, YaRN."""
    mistral = MistralConfig(**COMMON, **GQA, head_dim=32, sliding_window=8, rms_norm_eps=1e-5)
    three = COMMON | dict(num_hidden_layers=3)
    return [
        Case("mistral_sliding_window", mistral, seq_len=40,
             ablations=({"sliding_window": None}, {"sliding_window": 7})),
        Case("qwen2", Qwen2Config(**COMMON, **GQA, rope_parameters={
            "rope_type": "default", "rope_theta": 1000000.0}),
             ablations=({"rope_parameters": DEFAULT_ROPE},)),
        Case("qwen2_yarn", Qwen2Config(**COMMON | YARN_LENGTH, **GQA, rope_parameters=YARN_ROPE),
             legacy=_legacy_qwen2_yarn(), seq_len=40,
             ablations=({"rope_parameters": DEFAULT_ROPE},
                        {"rope_parameters": YARN_ROPE | {"attention_factor": 1.0}})),
        Case("qwen2_sliding_window",
             Qwen2Config(**three, **GQA, use_sliding_window=True, sliding_window=8,
                         max_window_layers=1), seq_len=24,
             ablations=({"layer_types": ["full_attention"] * 3},
                        {"layer_types": ["sliding_attention"] * 3})),
        Case("qwen3_tied",
             Qwen3Config(**COMMON, num_attention_heads=6, num_key_value_heads=2, head_dim=32,
                         tie_word_embeddings=True, rope_parameters={
                             "rope_type": "default", "rope_theta": 1000000.0})),
        Case("qwen3_yarn_bias",
             Qwen3Config(**three | YARN_LENGTH, **GQA, head_dim=32, attention_bias=True,
                         rope_parameters=YARN_ROPE),
             ablations=({"rope_parameters": DEFAULT_ROPE},)),
    ]  # fmt: skip


if __name__ == "__main__":
    for case in llama_cases() + other_cases():
        if len(sys.argv) == 1 or case.name in sys.argv[1:]:
            write_case(case, Path(__file__).parent / "llama_family")
