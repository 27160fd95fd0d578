"""DeepSeek-V3, Kimi K2, GPT-OSS and Qwen3-MoE against transformers' float32 outputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import build
from references.write_folder import case_names, load_case

from qjax import Sharding, kv_cache, make_mesh, recipe
from qjax.models import deepseek_v3, gpt_oss, qwen3_moe
from qjax.nn import QuantizedParam, Tokens, quantizable
from qjax.recipe import kv_cache_format
from qjax.registry import model_module

CASES = case_names("moe_families")
ONE_PER_FAMILY = ("deepseek_v3_groups", "gpt_oss", "qwen3_moe_norm")
SHARDED_QUANTIZED = (
    ("deepseek_v3_groups", "FP8_BLOCK"),
    ("gpt_oss", "MXFP4A16"),
    ("qwen3_moe_norm", "W4A16_G32"),
)
MESHES = ("tensor=2", "expert=2", "tensor=2,expert=2,data=2")


def _call(model):
    """The jitted model: (ids, cache, num_tokens, last_token_only) -> (logits, cache)."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def call(state, ids, cache, num_tokens):
        return nnx.merge(graphdef, state)(ids, cache, num_tokens)

    return lambda ids, cache=None, num_tokens=None: call(
        state, jnp.asarray(ids, jnp.int32), cache, num_tokens
    )


def _logits(model, case):
    return np.asarray(_call(model)(case.arrays["input_ids"])[0])


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    case = load_case(name)
    assert np.abs(_logits(build(case), case) - case.arrays["logits"]).max() < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_prefill_and_decode_equal_one_pass_and_give_the_greedy_tokens(name):
    """Two prompts of different lengths in one padded batch, continued token by token."""
    case = load_case(name)
    call = _call(model := build(case))
    prompts = [case.arrays[f"prompt_{i}"] for i in range(2)]
    steps = len(case.arrays["greedy_0"])
    lengths = np.array([len(p) for p in prompts], np.int32)
    padded = np.zeros((2, 16), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = model.init_cache(2, 16 + steps, page_size=8)
    logits, cache = call(padded, cache, jnp.asarray(lengths))
    last = [np.asarray(logits)[np.arange(2), lengths - 1]]
    for _ in range(steps - 1):
        logits, cache = call(last[-1].argmax(-1)[:, None], cache)
        last.append(np.asarray(logits)[:, 0])
    chosen = np.stack(last).argmax(-1)
    for i in range(2):
        clear = case.arrays[f"greedy_margin_{i}"] > 1e-3
        upto = len(clear) if clear.all() else int(clear.argmin())
        assert upto > 3
        assert chosen[:upto, i].tolist() == case.arrays[f"greedy_{i}"][:upto].tolist()
        sequence = np.concatenate([prompts[i], chosen[:-1, i]])[None]
        whole = np.asarray(_call(model)(sequence)[0])[0, lengths[i] - 1 :]
        assert np.abs(whole - np.stack(last)[:, i]).max() < 1e-4


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_sharded_logits(name, mesh):
    case = load_case(name)
    model = build(case, sharding=Sharding(make_mesh(mesh)))
    call, ids = _call(model), case.arrays["input_ids"]
    assert np.abs(np.asarray(call(ids)[0]) - case.arrays["logits"]).max() < 1e-4
    cache = model.init_cache(2, ids.shape[1])
    first, cache = call(ids[:, :20], cache)
    rest, _ = call(ids[:, 20:], cache)
    cached = np.concatenate([first, rest], axis=1)
    assert np.abs(cached - case.arrays["logits"]).max() < 1e-4


def test_counts_that_do_not_divide_are_replicated():
    """Three heads, eight experts and 32 channels over a mesh of 3 x 2 devices."""
    case = load_case("deepseek_v3_odd_heads")
    sharding = Sharding(make_mesh("tensor=2,expert=3"))
    model = build(case, sharding=sharding)
    assert model.model.layers[0].mlp.experts.expert_axis is None
    assert model.model.layers[0].mlp.experts.channel_axis == "tensor"
    assert np.abs(_logits(model, case) - case.arrays["logits"]).max() < 1e-4


@pytest.mark.parametrize("scheme", ["W4A16_G32", "MXFP4A16", "FP8_BLOCK"])
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_quantized_model_equals_its_dequantized_weights(name, scheme):
    case = load_case(name)
    kinds = quantizable(build(case))
    experts = [path for path in kinds if ".experts." in path or path.endswith("kv_b_proj")]
    specs = recipe(scheme).resolve(kinds)
    # Weights only: rounding flips of activations are no error of the model.
    specs = {path: dataclasses.replace(specs[path], activations=None) for path in experts}
    quantized = build(case, specs=specs)
    held = [v for _, v in nnx.to_flat_state(nnx.state(quantized, QuantizedParam))]
    assert held
    want = _logits(build(case, specs=specs, dequantized=True), case)
    assert np.abs(want - case.arrays["logits"]).max() > 1e-2
    assert np.abs(_logits(quantized, case) - want).max() < 1e-4
    if (name, scheme) in SHARDED_QUANTIZED:
        sharded = build(case, specs=specs, sharding=Sharding(make_mesh("tensor=2,expert=2")))
        cache = sharded.init_cache(2, case.arrays["input_ids"].shape[1])
        cached, _ = _call(sharded)(case.arrays["input_ids"], cache)
        assert np.abs(np.asarray(cached) - want).max() < 1e-4


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_DYNAMIC"])
def test_latent_cache_honours_the_activation_format_of_kv_b_proj(scheme):
    case = load_case("deepseek_v3_no_q_lora")
    path = "model.layers.0.self_attn.kv_b_proj"
    specs = {path: recipe(scheme).resolve(quantizable(build(case)))[path]}
    model = build(case, specs=specs)
    ids = case.arrays["input_ids"]
    plain, _ = _call(model)(ids)
    cached, _ = _call(model)(ids, model.init_cache(2, ids.shape[1]))
    weights_only = build(case, specs=specs, dequantized=True)
    assert np.abs(np.asarray(plain) - _logits(weights_only, case)).max() > 1e-3
    # A code may flip where the two paths' latents differ in the last bit.
    error = np.asarray(cached) - np.asarray(plain)
    assert np.linalg.norm(error) < 1e-3 * np.linalg.norm(plain)


def test_fp8_latents_equal_their_simulation():
    """A prompt, a chunk of as many tokens after it, and a single token: all see what the cache keeps."""
    model = build(case := load_case("deepseek_v3_no_q_lora"))
    call, ids = _call(model), case.arrays["input_ids"][:, :21]
    cache, logits = model.init_cache(2, 21, kv_cache_format("fp8_e4m3"), page_size=8), []
    for part in np.split(ids, [10, 20], axis=1):
        out, cache = call(part, cache)
        logits.append(np.asarray(out))
    layer, rank = cache.layers[0], model.model.layers[0].self_attn.rank
    assert layer.key.shape[-1] == rank and layer.key.scale.shape[-1] == -(-rank // 128)
    assert layer.key.qvalue.dtype == jnp.float8_e4m3fn and layer.value is None
    assert layer.rotated.dtype == jnp.bfloat16
    for block in model.model.layers:
        block.self_attn.fake_kv_cache = kv_cache_format("fp8_e4m3")
    simulated = np.asarray(_call(model)(ids)[0])
    # A code may flip where a latent differs in the last bit.
    error = np.linalg.norm(np.concatenate(logits, axis=1) - simulated)
    assert error < 1e-3 * np.linalg.norm(simulated)


def test_fp8_latents_stay_near_the_plain_cache():
    attention = build("deepseek_v3_no_q_lora").model.layers[0].self_attn
    x = jax.random.normal(
        jax.random.key(0), (1, 8, attention.kv_a_proj_with_mqa.weight_value().shape[1])
    )
    tokens = Tokens(
        jnp.arange(8)[None], jnp.ones((1, 8), bool), jnp.int32([8]), jnp.zeros((1, 1), jnp.int32)
    )

    def attend(name):
        format = kv_cache_format(name)
        cache = kv_cache.create(1, 8, [attention.cache_shape()], format, page_size=8)
        return np.asarray(attention(x, tokens, cache.layers[0])[0])

    plain, quantized = attend("float32"), attend("fp8_e4m3")
    error = np.linalg.norm(quantized - plain) / np.linalg.norm(plain)
    assert 5e-3 < error < 5e-2  # e4m3 keeps 3 bits: 2.6 % of a value, rms


@pytest.mark.parametrize("format", ["fp8_e5m2", "nvfp4", "fp8_e4m3_token_head"])
def test_latents_have_one_quantized_cache(format):
    model = build("kimi_k2")
    with pytest.raises(ValueError, match=r"latents .* bfloat16, float16, float32 or fp8_e4m3"):
        model.init_cache(1, 16, kv_cache_format(format))


@pytest.mark.parametrize("name", [n for n in CASES if load_case(n).legacy_config])
def test_both_forms_of_the_config_are_the_same_model(name):
    case = load_case(name)
    config = model_module(case.config["model_type"]).Config
    assert config.from_hf(case.config) == config.from_hf(case.legacy_config)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("kimi_k2", {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported"),
        ("kimi_k2", {"topk_method": "greedy"}, "topk_method"),
        ("kimi_k2", {"n_group": 5}, "12 experts must divide into 5 groups"),
        ("kimi_k2", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("kimi_k2", {"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ("kimi_k2", {"index_topk": 64}, r"unsupported fields \['index_topk'\]"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types must be 3 of"),
        ("gpt_oss", {"swiglu_limit": -1.0}, "swiglu_limit must be a positive number"),
        ("gpt_oss", {"experts_per_token": 3}, "experts_per_token"),
        ("gpt_oss", {"num_local_experts": "6"}, "num_local_experts must be an integer"),
        ("qwen3_moe_norm", {"mlp_only_layers": 3}, "mlp_only_layers must be a list"),
        ("qwen3_moe_norm", {"num_experts_per_tok": 9}, "experts per token must be 1 to 8"),
        ("qwen3_moe_norm", {"num_experts": 4}, "num_local_experts"),
    ],
)
def test_unsupported_configs_are_refused(name, change, message):
    config = load_case(name).config | change
    with pytest.raises(ValueError, match=message):
        model_module(config["model_type"]).Config.from_hf(config)


def test_old_names_of_fields():
    config = dict(load_case("qwen3_moe_norm").config)
    config["num_experts"] = config.pop("num_local_experts")
    assert qwen3_moe.Config.from_hf(config).routing.num_experts == 8
    assert qwen3_moe.Config.from_hf(config).dense_layers == frozenset()
    step = qwen3_moe.Config.from_hf(config | {"decoder_sparse_step": 2, "mlp_only_layers": [1]})
    assert step.dense_layers == {0, 1}


def test_prediction_layers_are_known_by_exact_name():
    case = load_case("kimi_k2")
    config = deepseek_v3.Config.from_hf(case.config | {"num_nextn_predict_layers": 1})
    names = deepseek_v3.Model.unused_tensor_names(config)
    own = {n.replace("layers.2.", "layers.3.") for n in case.shapes if "layers.2." in n}
    extra = {
        f"model.layers.3.{n}.weight"
        for n in "enorm hnorm eh_proj embed_tokens shared_head.norm shared_head.head".split()
    }
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4)}
    plain = {n for n in names if n.endswith((".weight", "_bias", ".inv_freq"))}
    assert plain == own | extra | frequencies
    assert "model.layers.3.mlp.experts.11.up_proj.weight_scale_inv" in names
    assert "model.layers.3.mlp.experts.12.up_proj.weight_scale_inv" not in names
    assert not any("norm.weight_" in n or "mlp.gate.weight_" in n for n in names)
    none = deepseek_v3.Model.unused_tensor_names(deepseek_v3.Config.from_hf(case.config))
    assert none == frequencies - {"model.layers.3.self_attn.rotary_emb.inv_freq"}


def test_gpt_oss_original_layout():
    """The mapping covers every Hugging Face tensor; the config is the released one."""
    case = load_case("gpt_oss")
    names = gpt_oss.original_names(gpt_oss.Config.from_hf(case.config))
    stacked = [n for n in case.shapes if n.endswith(("gate_up_proj", "down_proj"))]
    expected = set(case.shapes) - set(stacked)
    expected |= {f"{n}_{part}" for n in stacked for part in ("blocks", "scales")}
    assert set(names) == expected
    rows = [names[f"model.layers.1.self_attn.{p}_proj.bias"] for p in "qkv"]
    assert rows == [("block.1.attn.qkv.bias", cut) for cut in ((0, 288), (288, 384), (384, 480))]
    assert names["model.layers.2.mlp.experts.down_proj_scales"] == (
        "block.2.mlp.mlp2_weight.scales",
        None,
    )
    original = {
        "num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "vocab_size": 201088,
        "hidden_size": 2880, "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128,
        "initial_context_length": 4096, "rope_theta": 150000, "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
    }  # fmt: skip
    config = gpt_oss.Config.from_hf(gpt_oss.hf_config(original))
    assert config.max_position_embeddings == 131072
    assert config.sliding_windows[:3] == (128, None, 128)
    assert dict(config.rope.parameters) == {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    with pytest.raises(ValueError, match="rope_ntk_beta is missing"):
        gpt_oss.hf_config({k: v for k, v in original.items() if k != "rope_ntk_beta"})
