"""Export tiny models in every format, each with what qjax says it wrote; check_exports.py decodes them.

    python tests/references/write_exports.py OUT

Runs in the project's environment. OUT/<case>/ is an exported folder; its reference.npz holds
`deq::<module>` (float32, dequantized by qjax), `input_ids` and `logits` (float32, activations
unquantized), as decode_exports.py compares them.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qjax import nn
from qjax.checkpoint._export import export
from qjax.formats import ActivationFormat, integer_format, qformat
from qjax.models import llama
from qjax.qarray import QArray
from qjax.recipe import SCHEMES, QuantSpec, Recipe, Rule, kv_cache_format

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


def int_spec(bits: int, group: int, *, asym: bool = False, scale: str = "float16") -> QuantSpec:
    offset = "zero_point" if asym else None
    return QuantSpec(integer_format(bits, (1, group), offset=offset, scale_dtype=scale))


def cases() -> dict[str, tuple[str, Recipe]]:
    """{case: (export format, recipe)}."""

    def one(spec: QuantSpec, *rules: Rule) -> Recipe:
        return Recipe((*rules, Rule(("Linear",), spec)), ("lm_head",))

    found = {f"ct_{name}": ("compressed-tensors", one(spec)) for name, spec in SCHEMES.items()}
    mixed = Rule((r"re:.*\.1\.mlp\..*", "model.layers.0.self_attn.o_proj"), SCHEMES["FP8_DYNAMIC"])
    found["ct_mixed"] = ("compressed-tensors", one(SCHEMES["W4A16_ASYM"], mixed))
    with_cache = dataclasses.replace(
        one(SCHEMES["FP8_DYNAMIC"]), kv_cache=kv_cache_format("fp8_e4m3")
    )
    found["ct_kv_cache"] = ("compressed-tensors", with_cache)
    for bits in (3, 5, 6, 7):
        found[f"ct_int{bits}_asym"] = ("compressed-tensors", one(int_spec(bits, 64, asym=True)))
    found["fp8_block"] = ("fp8", one(SCHEMES["FP8_BLOCK"]))
    found["fp8_tensor"] = ("fp8", one(SCHEMES["FP8"]))
    static = ActivationFormat(qformat("nvfp4"), static=True)
    nvfp4 = dataclasses.replace(SCHEMES["NVFP4"], activations=static)
    found["ct_nvfp4_static"] = ("compressed-tensors", one(nvfp4))
    found["modelopt_nvfp4"] = ("modelopt", one(nvfp4))
    found["modelopt_fp8"] = ("modelopt", one(SCHEMES["FP8"]))
    for bits in (2, 3, 4, 8):
        found[f"gptq_int{bits}"] = ("gptq", one(int_spec(bits, 64)))
        found[f"gptq_int{bits}_asym"] = ("gptq", one(int_spec(bits, 128, asym=True)))
    found["gptq_channel"] = ("gptq", one(int_spec(4, -1)))
    found["awq_sym"] = ("awq", one(int_spec(4, 64)))
    found["awq_asym"] = ("awq", one(int_spec(4, 128, asym=True, scale="bfloat16")))
    return found


def build(config: dict, recipe: Recipe, dtype: str = "float32") -> llama.Model:
    """A model of random weights."""
    parsed = llama.Config.from_hf(config)
    specs = recipe.resolve(nn.quantizable(llama.Model(parsed)))
    model = llama.Model(parsed, specs=specs, dtype=dtype)
    nn.initialize(model, jax.random.key(0), scale=0.1)
    return model


def write_case(directory: Path, format: str, recipe: Recipe) -> None:
    model = build(CONFIG, recipe)
    export(model, directory, format=format, source=CONFIG, kv_cache=recipe.kv_cache, progress=False)
    arrays = {}
    for path, module in nn.modules(model):
        weight = getattr(module, "weight", None)
        if weight is not None and isinstance(weight.get_value(), QArray):
            arrays[f"deq::{path}"] = np.asarray(weight.get_value().dequantize("float32"))
        if isinstance(module, nn.Linear):
            module.activation_format = None
    ids = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (2, 12)).astype(np.int32)
    logits = np.asarray(model(jnp.asarray(ids))[0])
    np.savez(directory / "reference.npz", input_ids=ids, logits=logits, **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description="Export tiny models in every format.")
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    for name, (format, recipe) in cases().items():
        write_case(out / name, format, recipe)
        print(name)


if __name__ == "__main__":
    main()
