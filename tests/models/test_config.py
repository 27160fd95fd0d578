"""config.json: every field is understood or refused by its name, whatever the family."""

import numpy as np
import pytest
from references.write_folder import load_case

from qjax.registry import model_module

FAMILIES = {
    "llama": "llama3_1_rope",
    "mistral": "mistral_sliding_window",
    "qwen2": "qwen2_sliding_window",
    "qwen3": "qwen3_yarn_bias",
    "qwen3_moe": "qwen3_moe_mlp_only",
    "deepseek_v3": "deepseek_v3_groups",
    "kimi_k2": "kimi_k2",
    "gpt_oss": "gpt_oss",
}
DENSE = ("llama", "mistral", "qwen2", "qwen3")
# Fields that say nothing about what a model computes.
HARMLESS = {
    "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "output_router_logits", "pad_token_id", "pretraining_tp", "router_aux_loss_coef",
    "transformers_version", "use_cache",
}  # fmt: skip
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "max_position_embeddings")  # fmt: skip


def config_of(family, **fields):
    return {**load_case(FAMILIES[family]).config, **fields}


def read(config):
    return model_module(config["model_type"]).Config.from_hf(config)


def stated_fields():
    return [
        (family, name)
        for family in FAMILIES
        for name in sorted(set(config_of(family)) - HARMLESS)
        if config_of(family)[name] is not None
    ]


@pytest.mark.parametrize(("family", "name"), stated_fields())
def test_a_value_of_another_type_is_refused_by_name(family, name):
    """Every field of every family: numbers and flags as text, lists and objects as numbers."""
    value = config_of(family)[name]
    wrong = 7 if isinstance(value, list | dict | str) else str(value).lower()
    with pytest.raises(ValueError, match=name):
        read(config_of(family, **{name: wrong}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", REQUIRED)
def test_sizes_must_be_there_and_positive(family, name):
    config = config_of(family)
    del config[name]
    with pytest.raises(ValueError, match=f"{name} is missing"):
        read(config)
    for wrong in (0, -4, 2.5, True):
        with pytest.raises(ValueError, match=f"{name} must be (an integer|within 1 and .*); found"):
            read(config_of(family, **{name: wrong}))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_field_is_refused_by_name(family):
    with pytest.raises(ValueError, match=r"unsupported fields \['logit_scale', 'parallel_block'\]"):
        read(config_of(family, parallel_block=True, logit_scale=0.5))
    # null states nothing, and what an exporter adds about itself changes nothing
    same = config_of(family, parallel_block=None, unsloth_version="2026.1", torch_dtype="float16")
    assert read(same) == read(config_of(family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope", "factor": 4.0}, "rope_type 'longrope' is not supported"),
        ({"rope_type": "linear"}, r"rope_type 'linear' lacks \['factor'\]"),
        ({"rope_type": "llama3", "factor": 8.0}, r"lacks \['low_freq_factor', 'high_freq_factor', 'orig"),
        ({"rope_type": "default", "short_factor": [1.0]}, r"unsupported fields \['short_factor'\]"),
        ({"rope_type": "linear", "factor": "4"}, "rope fields must be positive numbers"),
        ({"rope_type": "linear", "factor": -4.0}, "rope fields must be positive numbers"),
        ({"rope_type": "linear", "factor": [4.0]}, "rope fields must be positive numbers"),
        ({"rope_type": ["linear"], "factor": 4.0}, "rope_type .* is not supported"),
        ({"rope_type": "default", "rope_theta": 0}, "rope fields must be positive numbers"),
        ({"rope_type": "default", "rope_theta": "1e4"}, "rope fields must be positive numbers"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is not"),
    ],
)  # fmt: skip
def test_rope_is_checked(family, rope, message):
    with pytest.raises(ValueError, match=message):
        read(config_of(family, rope_parameters=rope))


@pytest.mark.parametrize("family", [*DENSE, "qwen3_moe", "gpt_oss"])
def test_heads_are_checked(family):
    kv_heads = config_of(family)["num_key_value_heads"]
    with pytest.raises(ValueError, match=f"num_key_value_heads = {kv_heads} must divide"):
        read(config_of(family, num_attention_heads=kv_heads + 1))
    with pytest.raises(ValueError, match="head_dim = 33 must be even"):
        read(config_of(family, head_dim=33))


@pytest.mark.parametrize("family", DENSE)
def test_activation_and_layer_types_are_checked(family):
    with pytest.raises(ValueError, match=r"hidden_act = 'gelu' is not supported"):
        read(config_of(family, hidden_act="gelu"))
    for wrong in (["full_attention"], ["chunked_attention"] * 3, "full_attention"):
        with pytest.raises(ValueError, match="layer_types must be"):
            read(config_of(family, num_hidden_layers=3, layer_types=wrong))


def test_an_unknown_model_type_names_the_known_ones():
    with pytest.raises(ValueError, match=r"gemma3.*llama"):
        model_module("gemma3")


def plain(model_type, **fields):
    """The smallest config.json that is valid."""
    sizes = dict.fromkeys(REQUIRED, 64) | {"num_hidden_layers": 4, "num_attention_heads": 32}
    return read({"model_type": model_type, **sizes, **fields})


def test_missing_fields_have_the_family_s_defaults():
    llama, mistral, qwen2, qwen3 = (plain(family) for family in DENSE)
    assert llama.num_key_value_heads == 32 and mistral.num_key_value_heads == 8
    assert llama.head_dim == 2 and qwen3.head_dim == 128
    assert qwen2.qkv_bias and not qwen2.output_bias and not llama.qkv_bias
    assert qwen3.qk_norm and not qwen2.qk_norm
    assert all(c.rms_norm_eps == 1e-6 and c.rope.theta == 1e4 for c in (llama, mistral, qwen2))
    assert not any(c.tie_word_embeddings for c in (llama, mistral, qwen2, qwen3))


def test_biases():
    both = plain("llama", attention_bias=True, mlp_bias=True)
    assert both.qkv_bias and both.output_bias and both.mlp_bias
    assert plain("qwen3", attention_bias=True).output_bias


def test_sliding_windows():
    """Mistral slides everywhere, Qwen from max_window_layers on if at all; 4096 where nothing is said."""
    assert plain("mistral").sliding_windows == (4096,) * 4
    assert plain("mistral", sliding_window=None).sliding_windows == (None,) * 4
    assert plain("mistral", sliding_window=16).sliding_windows == (16,) * 4
    assert plain("llama", sliding_window=16).sliding_windows == (None,) * 4
    assert plain("qwen2", sliding_window=16).sliding_windows == (None,) * 4
    on = {"use_sliding_window": True, "max_window_layers": 3}
    assert plain("qwen2", sliding_window=16, **on).sliding_windows == (None, None, None, 16)
    assert plain("qwen3", **on).sliding_windows == (None, None, None, 4096)
    types = ["sliding_attention", "full_attention"] * 2
    stated = plain("qwen3", sliding_window=16, layer_types=types, **on)
    assert stated.sliding_windows == (16, None, 16, None)


def test_both_forms_of_rope_mean_the_same():
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32}
    new = plain("qwen3", rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, **yarn})
    old = plain("qwen3", rope_theta=1e6, rope_scaling={"type": "yarn", **yarn})
    assert new == old and new.rope.theta == 1e6
    assert new.rope.attention_factor == pytest.approx(0.1 * np.log(4) + 1)


def test_frequencies_of_llama_3():
    """Wavelengths beyond 8192 positions are 8 times longer, those below 2048 as trained."""
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3", "rope_theta": 5e5}  # fmt: skip
    frequencies = plain("llama", head_dim=128, rope_parameters=rope).rope.frequencies()
    trained = 5e5 ** (-np.arange(0, 128, 2) / 128)
    wavelength = 2 * np.pi / trained
    short, long = wavelength < 2048, wavelength > 8192
    np.testing.assert_allclose(frequencies[short], trained[short], rtol=1e-5)
    np.testing.assert_allclose(frequencies[long], trained[long] / 8, rtol=1e-5)
    assert short.sum() == 29 and long.sum() == 29
    between = ~(short | long)
    smooth = (8192 / wavelength[between] - 1) / 3
    blended = trained[between] * ((1 - smooth) / 8 + smooth)
    np.testing.assert_allclose(frequencies[between], blended, rtol=1e-5)
