"""Real exporters' folders against the logits recorded beside them."""

import contextlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import qjax
from qjax.checkpoint import load
from qjax.evaluation import forward
from qjax.models import gpt_oss
from qjax.nn import CausalLM, ExpertLinear, KVScale, Linear, modules
from qjax.ops._dispatch import simulate_gpu
from qjax.recipe import kv_cache_format

WEIGHT_ONLY = """
autoawq_gemv_w4g128_llama autoawq_w4g128_asym_qwen2 autogptq_w4g128_asym_qwen2 autogptq_w4g128_sym_qwen2
autoround_awqpack_w4g128_asym_mistral autoround_gptqpack_w2g64_sym_llama autoround_gptqpack_w4g128_sym_llama
autoround_w3g128_sym_llama ct_mxfp4a16_llama ct_pack_int3_g128_sym_llama ct_pack_int4_g128_asym_qwen2
ct_pack_int4_g32_sym_llama ct_pack_int8_g128_sym_llama gpt_oss_mxfp4_tiny_h192
gptqmodel_gptq_w4g128_sym_descact_qwen2 gptqmodel_gptqv2_w4g128_asym_descact_llama
kimi_k2_int4_g32_experts_tiny
""".split()
QUANTIZED_ACTIVATIONS = """
autoround_fp8_block ct_fp8_block_llama ct_fp8_dynamic_llama ct_fp8_static_llama ct_int8_w8a8_llama ct_mxfp8_llama
ct_w4a8_int_llama deepseek_v3_fp8_block_tiny fbgemm_fp8_llama31_tiny llmc_fp8_kvfp8_llama modelopt_export_nvfp4
modelopt_fp8_llama
""".split()
# Folders in which no code flips between our float32 sums and the recorded ones: bit-equal activations.
EXACT_ACTIVATIONS = {"fbgemm_fp8_llama31_tiny", "modelopt_fp8_llama", "ct_mxfp8_llama"}


# Models of which Hopper has no kernel for some product or head.
PARTLY_XLA = {
    "ct_int8_w8a8_llama",
    "ct_mxfp8_llama",
    "deepseek_v3_fp8_block_tiny",
    "kimi_k2_int4_g32_experts_tiny",
    "modelopt_export_nvfp4",
}


def reference(folder):
    with np.load(folder / "reference.npz") as file:
        return dict(file)


def logits(model: CausalLM, arrays, cache=None) -> np.ndarray:
    return np.asarray(forward(model, cache)(jnp.asarray(arrays["input_ids"], jnp.int32)))


def float_activations(model: CausalLM) -> None:
    for _, module in modules(model):
        if isinstance(module, Linear | ExpertLinear):
            module.activation_format = None


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weight_only(checkpoints_dir, name):
    arrays = reference(checkpoints_dir / name)
    model = load(checkpoints_dir / name, dtype="float32", progress=False).model
    assert np.abs(logits(model, arrays) - arrays["logits"]).max() < 1e-4


@pytest.mark.parametrize("name", ["ct_nvfp4a16_llama", "ct_nvfp4_w4a4_llama"])
def test_nvfp4_on_weights_rounded_as_the_reference_has_them(checkpoints_dir, name):
    """compressed-tensors decompresses NVFP4 to bfloat16, and so are the recorded logits' weights."""
    arrays = reference(checkpoints_dir / name)
    exact = load(checkpoints_dir / name, dtype="float32", progress=False).model
    quantized = dict(modules(exact))
    activations = {p: m.activation_format for p, m in quantized.items() if isinstance(m, Linear)}
    float_activations(exact)
    drift = np.linalg.norm(logits(exact, arrays) - arrays["logits"])
    assert drift / np.linalg.norm(arrays["logits"]) < 5e-3
    rounded = load(checkpoints_dir / name, recipe="bf16", dtype="float32", progress=False).model
    for path, module in modules(rounded):
        if isinstance(module, Linear) and path != "lm_head":
            w = np.asarray(module.weight.get_value()).astype(ml_dtypes.bfloat16)
            module.weight.set_value(jnp.asarray(w.astype(np.float32)))
    assert np.abs(logits(rounded, arrays) - arrays["logits"]).max() < 1e-4
    if "logits_actq" in arrays:
        for path, module in modules(rounded):
            if isinstance(module, Linear):
                module.activation_format = activations[path]
                module.activation_scale = nnx.data(quantized[path].activation_scale)
        assert np.abs(logits(rounded, arrays) - arrays["logits_actq"]).max() < 1e-4


@pytest.mark.parametrize("name", QUANTIZED_ACTIVATIONS)
def test_activation_quantized(checkpoints_dir, name):
    arrays = reference(checkpoints_dir / name)
    model = load(checkpoints_dir / name, dtype="float32", progress=False).model
    if "logits_actq" in arrays:
        expected = arrays["logits_actq"]
        found = logits(model, arrays)
        relative = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        # One code on the other side of a tie (float32 noise of 1e-7) changes a random model's logits by
        # 1e-2; with mixtures of experts it may change a route as well.
        assert relative < (1e-4 if name in EXACT_ACTIVATIONS else 6e-2)
        same = np.mean(found.argmax(-1) == expected.argmax(-1))
        assert same > 0.85
    float_activations(model)
    assert np.abs(logits(model, arrays) - arrays["logits"]).max() < 1e-4


def cached_step(model):
    """(its state, the jitted (state, ids, cache) -> (logits, cache))."""
    graphdef, state = nnx.split(model)
    return state, jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args))


@pytest.mark.parametrize("name", ["ct_fp8_dynamic_llama", "gpt_oss_mxfp4_tiny_h192"])
def test_prefill_and_decode_run_on_kernels_alone(checkpoints_dir, name):
    with simulate_gpu(), qjax.require_kernels():
        model = load(checkpoints_dir / name, dtype="bfloat16", progress=False).model
        state, step = cached_step(model)
        cache = model.init_cache(2, 64)
        for tokens in (24, 1):
            ids = jax.ShapeDtypeStruct((2, tokens), jnp.int32)
            out, _ = step.eval_shape(state, ids, cache)
            assert out.shape == (2, tokens, 512)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*WEIGHT_ONLY, *QUANTIZED_ACTIVATIONS])
def test_gpu_prefill_and_decode_in_bfloat16(checkpoints_dir, name):
    """The recorded float32 logits, to what bfloat16, flipped codes and routes leave of them through XLA too."""
    arrays = reference(checkpoints_dir / name)
    expected = arrays.get("logits_actq", arrays["logits"])
    kernels = contextlib.nullcontext() if name in PARTLY_XLA else qjax.require_kernels()
    ids = jnp.asarray(arrays["input_ids"], jnp.int32)
    with kernels:
        model = load(checkpoints_dir / name, dtype="bfloat16", progress=False).model
        state, step = cached_step(model)
        cache, parts = model.init_cache(len(ids), 64), []
        for part in (ids[:, :-2], ids[:, -2:-1], ids[:, -1:]):
            found, cache = step(state, part, cache)
            parts.append(np.asarray(found, np.float32))
    found = np.concatenate(parts, axis=1)
    relative = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    flips = 0.1 if name in QUANTIZED_ACTIVATIONS else 0.0
    routes = 0.2 if name.startswith(("deepseek", "kimi")) else 0.0
    assert relative < max(2e-2, flips, routes), relative
    assert np.mean(found.argmax(-1) == expected.argmax(-1)) > 0.8


@pytest.mark.parametrize(
    ("key", "name", "scale"),
    [
        ("e4m3_scale1", "fp8_e4m3", 1.0),
        ("e4m3_calib", "fp8_e4m3", None),
        ("e5m2", "fp8_e5m2", None),
        ("nvfp4_global1", "nvfp4", 1.0),
        ("nvfp4_calib", "nvfp4", None),
        ("e4m3_per_token_head", "fp8_e4m3_token_head", None),
    ],
)
def test_quantized_kv_caches(checkpoints_dir, key, name, scale):
    folder = checkpoints_dir / "kv_cache_fp8_scales_llama"
    arrays = reference(folder)
    loaded = load(folder, dtype="float32", progress=False)
    assert loaded.kv_cache == kv_cache_format("fp8_e4m3")
    if scale is not None:
        for _, module in modules(loaded.model):
            for variable in vars(module).values():
                if isinstance(variable, KVScale):
                    variable.set_value(jnp.full_like(variable.get_value(), scale))
    found = logits(loaded.model, arrays, kv_cache_format(name))
    assert np.abs(found - arrays[f"logits_kv_{key}"]).max() < 1e-4


@pytest.mark.parametrize(
    "name", ["ct_pack_int4_g32_sym_llama", "deepseek_v3_fp8_block_tiny", "gpt_oss_mxfp4_tiny_h192"]
)
def test_bfloat16_compute(checkpoints_dir, name):
    arrays = reference(checkpoints_dir / name)
    model = load(checkpoints_dir / name, dtype="bfloat16", progress=False).model
    float_activations(model)
    found, expected = logits(model, arrays), arrays["logits"]
    limit = 2e-2 if name.startswith("ct") else 2e-1  # routes flip in bfloat16
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < limit


def test_gpt_oss_in_openais_original_layout(checkpoints_dir, tmp_path):
    """The same tensors under OpenAI's names, queries, keys and values in one."""
    source = checkpoints_dir / "gpt_oss_mxfp4_tiny_h192"
    config, tensors = json.loads((source / "config.json").read_text()), {}
    stored = load_file(source / "model.safetensors")
    names = gpt_oss.original_names(gpt_oss.Config.from_hf(config))
    fused: dict[str, list[np.ndarray]] = {}
    for name, tensor in stored.items():
        original, rows = names[name]
        if rows is None:
            tensors[original] = tensor
    for part in ("weight", "bias"):
        for i in range(config["num_hidden_layers"]):
            parts = [stored[f"model.layers.{i}.self_attn.{p}_proj.{part}"] for p in "qkv"]
            fused[f"block.{i}.attn.qkv.{part}"] = parts
    tensors |= {name: np.concatenate(parts) for name, parts in fused.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    rope = config.get("rope_scaling") or config["rope_parameters"]
    same = ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "head_dim",
            "swiglu_limit", "num_attention_heads", "num_key_value_heads", "sliding_window")  # fmt: skip
    original = {k: config[k] for k in same if k in config}
    original |= {
        "num_experts": config["num_local_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "initial_context_length": rope["original_max_position_embeddings"],
        "rope_theta": config.get("rope_theta", rope.get("rope_theta")),
        "rope_scaling_factor": rope["factor"],
        "rope_ntk_alpha": rope["beta_slow"],
        "rope_ntk_beta": rope["beta_fast"],
    }
    (tmp_path / "config.json").write_text(json.dumps(original))
    arrays = reference(source)
    model = load(tmp_path, dtype="float32", progress=False).model
    assert np.abs(logits(model, arrays) - arrays["logits"]).max() < 1e-4
