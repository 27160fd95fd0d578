"""Write moe_families/: outputs of tiny deepseek_v3, kimi_k2, gpt_oss and qwen3_moe models.

Run from the repository root, in an environment with torch and transformers:

    PYTHONPATH=tests python -m references.make_moe_families [case ...]
"""

import sys
from pathlib import Path

from transformers import DeepseekV3Config, GptOssConfig, Qwen3MoeConfig

from references.transformers_reference import Case, write_case

COMMON = dict(
    vocab_size=160, hidden_size=64, num_hidden_layers=2, bos_token_id=1, eos_token_id=2,
    max_position_embeddings=128,
)  # fmt: skip
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN_ROPE = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip

DEEPSEEK = COMMON | dict(
    intermediate_size=96, moe_intermediate_size=32, num_attention_heads=4, num_key_value_heads=4,
    q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
    first_k_dense_replace=1, routed_scaling_factor=2.5, norm_topk_prob=True,
    num_nextn_predict_layers=0,
)  # fmt: skip


def _deepseek(**changes) -> DeepseekV3Config:
    return DeepseekV3Config(**DEEPSEEK | changes)


def deepseek_cases() -> list[Case]:
    """The deepseek_v3 variants: query rank, expert groups, YaRN, odd head count, dense layers."""
    both_mscales = YARN_ROPE | {"mscale": 0.8, "mscale_all_dim": 0.5}
    return [
        Case("deepseek_v3_no_q_lora", _deepseek(q_lora_rank=None, norm_topk_prob=False),
             ablations=({"norm_topk_prob": True}, {"rope_interleave": False})),
        Case("deepseek_v3_groups",
             _deepseek(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4,
                       num_hidden_layers=3),
             ablations=({"n_group": 1, "topk_group": 1}, {"routed_scaling_factor": 1.0})),
        Case("deepseek_v3_yarn_mscale", _deepseek(rope_parameters=both_mscales), seq_len=40,
             ablations=({"rope_parameters": DEFAULT_ROPE}, {"rope_parameters": YARN_ROPE},
                        {"rope_parameters": YARN_ROPE | {"mscale": 0.5, "mscale_all_dim": 0.5}})),
        Case("deepseek_v3_odd_heads",
             _deepseek(num_attention_heads=3, num_key_value_heads=3, first_k_dense_replace=0,
                       v_head_dim=24, qk_nope_head_dim=24), seq_len=24),
        # Two shared experts are stored as one MLP of twice the width.
        Case("deepseek_v3_two_shared",
             _deepseek(n_shared_experts=2, num_hidden_layers=3, norm_topk_prob=False,
                       attention_bias=True)),
    ]  # fmt: skip


def kimi_cases() -> list[Case]:
    """kimi_k2, which is deepseek_v3 under another model_type and with transformers 4 configs."""
    rope = YARN_ROPE | {"rope_theta": 50000.0, "beta_fast": 1.0, "mscale": 1.0,
                        "mscale_all_dim": 1.0, "factor": 4.0}  # fmt: skip
    config = _deepseek(
        n_routed_experts=12, num_experts_per_tok=3, routed_scaling_factor=2.827,
        num_hidden_layers=3, rope_parameters=rope,
    )  # fmt: skip
    legacy = {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "bos_token_id": 1, "eos_token_id": 2,
        "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 64,
        "initializer_range": 0.02, "intermediate_size": 96, "kv_lora_rank": 32,
        "max_position_embeddings": 128, "model_type": "deepseek_v3", "moe_intermediate_size": 32,
        "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 12, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_attention_heads": 4, "num_experts_per_tok": 3,
        "num_hidden_layers": 3, "num_key_value_heads": 4, "num_nextn_predict_layers": 0,
        "pretraining_tp": 1, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "rms_norm_eps": 1e-06, "rope_theta": 50000.0,
        "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 4.0, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "original_max_position_embeddings": 32,
                         "type": "yarn"},
        "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16", "transformers_version": "4.48.3", "use_cache": True,
        "v_head_dim": 16, "vocab_size": 160,
    }  # fmt: skip
    return [
        Case("kimi_k2", config, legacy=legacy, written_changes={"model_type": "kimi_k2"},
             ablations=({"rope_parameters": DEFAULT_ROPE},)),
    ]  # fmt: skip


def gpt_oss_cases() -> list[Case]:
    """gpt_oss with odd head counts, a window shorter than the text, untruncated YaRN."""
    rope = YARN_ROPE | {"rope_theta": 150000.0, "truncate": False}
    shape = COMMON | dict(hidden_size=96, intermediate_size=64, num_attention_heads=9,
                          num_key_value_heads=3, head_dim=32, num_local_experts=6,
                          num_experts_per_tok=2, sliding_window=8, num_hidden_layers=3)  # fmt: skip
    legacy = {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "experts_per_token": 2, "head_dim": 32,
        "hidden_act": "silu", "hidden_size": 96, "initial_context_length": 32,
        "initializer_range": 0.02, "intermediate_size": 64,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 128, "model_type": "gpt_oss", "num_attention_heads": 9,
        "num_experts_per_tok": 2, "num_hidden_layers": 3, "num_key_value_heads": 3,
        "num_local_experts": 6, "output_router_logits": False, "rms_norm_eps": 1e-05,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"},
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 8,
        "swiglu_limit": 7.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.55.0", "use_cache": True, "vocab_size": 160,
    }  # fmt: skip
    return [
        Case("gpt_oss", GptOssConfig(**shape, rope_parameters=rope), seq_len=40, legacy=legacy,
             ablations=({"rope_parameters": DEFAULT_ROPE}, {"sliding_window": 7},
                        {"rope_parameters": rope | {"truncate": True}}, {"swiglu_limit": 100.0},
                        {"layer_types": ["full_attention"] * 3})),
    ]  # fmt: skip


def qwen3_moe_cases() -> list[Case]:
    """qwen3_moe with dense layers chosen by step and by list, and both weight normalizations."""
    shape = COMMON | dict(intermediate_size=96, moe_intermediate_size=32, num_experts=8,
                          num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2,
                          head_dim=32)  # fmt: skip
    return [
        Case("qwen3_moe_norm", Qwen3MoeConfig(**shape, norm_topk_prob=True),
             ablations=({"norm_topk_prob": False},)),
        Case("qwen3_moe_sparse_step",
             Qwen3MoeConfig(**shape | dict(num_hidden_layers=3), decoder_sparse_step=2,
                            norm_topk_prob=False), ablations=({"norm_topk_prob": True},)),
        Case("qwen3_moe_mlp_only",
             Qwen3MoeConfig(**shape | dict(num_hidden_layers=3), mlp_only_layers=[1],
                            norm_topk_prob=True, tie_word_embeddings=True)),
    ]  # fmt: skip


if __name__ == "__main__":
    for case in deepseek_cases() + kimi_cases() + gpt_oss_cases() + qwen3_moe_cases():
        if len(sys.argv) == 1 or case.name in sys.argv[1:]:
            write_case(case, Path(__file__).parent / "moe_families")
