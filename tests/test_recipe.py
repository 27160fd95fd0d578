"""Recipes: first match wins, nothing matches silently; meshes and how blocks follow them."""

import logging

import jax
import pytest
from jax.sharding import PartitionSpec as P

from qjax import QuantSpec, Recipe, Rule, Sharding, make_mesh, qformat, recipe
from qjax.recipe import SCHEMES, fit_group
from qjax.sharding import part_specs, sharded_format

MODULES = {
    "model.embed_tokens": "Embedding",
    "model.layers.0.self_attn.q_proj": "Linear",
    "model.layers.0.mlp.down_proj": "Linear",
    "model.layers.10.mlp.down_proj": "Linear",
    "lm_head": "Linear",
}
INT4, INT8 = QuantSpec(qformat("int4_1x32")), QuantSpec(qformat("int8_channel"))


def test_the_first_matching_rule_holds_and_ignored_modules_stay_plain():
    rules = (
        Rule((r"re:.*\.mlp\.down_proj",), INT8),
        Rule(("Linear",), INT4),
    )
    resolved = Recipe(rules, ignore=("lm_head",)).resolve(MODULES)
    assert resolved == {
        "model.layers.0.self_attn.q_proj": INT4,
        "model.layers.0.mlp.down_proj": INT8,
        "model.layers.10.mlp.down_proj": INT8,
    }


def test_paths_match_whole_not_as_substrings():
    rule = Rule(("model.layers.0.mlp.down_proj",), INT4)
    assert list(Recipe((rule,)).resolve(MODULES)) == ["model.layers.0.mlp.down_proj"]
    with pytest.raises(ValueError, match=r"\['re:layers'\] match no module"):
        Recipe((Rule(("re:layers",), INT4),)).resolve(MODULES)


def test_a_rule_or_ignore_entry_that_matches_nothing_raises():
    with pytest.raises(
        ValueError, match=r"\['model.layers.7.q_proj'\] match no module of this model"
    ):
        Recipe((Rule(("Linear", "model.layers.7.q_proj"), INT4),)).resolve(MODULES)
    with pytest.raises(ValueError, match=r"\['lm_heed'\] match no module"):
        Recipe((Rule(("Linear",), INT4),), ignore=("lm_heed",)).resolve(MODULES)
    allowed = Recipe((Rule(("Linear",), INT4),), ("lm_heed",), optional=frozenset({"lm_heed"}))
    assert len(allowed.resolve(MODULES)) == 4


def test_named_recipes():
    assert recipe("w4a16").resolve(MODULES)["model.layers.0.mlp.down_proj"] == SCHEMES["W4A16"]
    assert recipe("bf16").resolve(MODULES) == {}
    assert recipe("FP8_BLOCK", kv_cache="fp8_e4m3").kv_cache.element == "float8_e4m3fn"
    with pytest.raises(ValueError, match="unknown recipe 'W4A17'"):
        recipe("W4A17")


def test_groups_fit_the_columns():
    w4a16 = SCHEMES["W4A16"]
    assert fit_group(w4a16, 4096, "x") == w4a16
    assert fit_group(w4a16, 576, "x").weights.block_shape == (1, 64)
    assert fit_group(SCHEMES["FP8_BLOCK"], 577, "x") == SCHEMES["FP8_BLOCK"]
    with pytest.raises(ValueError, match=r"down_proj: no group of 128 columns.* divides K = 1000"):
        fit_group(w4a16, 1000, "down_proj")
    with pytest.raises(ValueError, match="no group of 32 columns"):
        fit_group(SCHEMES["MXFP4A16"], 48, "x")


def test_axes_follow_rules_and_indivisible_ones_are_replicated(caplog):
    sharding = Sharding(make_mesh("tensor=4,data=2"))
    assert sharding.axis("heads", 8) == "tensor" and sharding.axis("batch", 2) == "data"
    assert sharding.axis("embed", 64) is None and sharding.axis("expert", 8) is None
    with caplog.at_level(logging.INFO, logger="qjax"):
        assert sharding.axis("heads", 13) is None and sharding.axis("heads", 13) is None
    assert caplog.messages == ["heads (13) is not divisible by the mesh's tensor=4: replicated"]
    with pytest.raises(ValueError, match="unknown logical axis 'head'"):
        sharding.axis("head", 8)
    with pytest.raises(ValueError, match="a mesh axis occurs twice"):
        sharding.named("tensor", "tensor")
    with pytest.raises(ValueError, match=r"unknown logical axes \['head'\]"):
        Sharding(rules=(("head", "tensor"),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor", "must be AXIS=SIZE"),
        ("model=2", "with AXIS one of"),
        ("tensor=0", "SIZE > 0"),
        ("tensor=64", "needs 64 devices"),
    ],
)
def test_meshes_are_checked(text, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(text)


def test_mesh_axes():
    mesh = make_mesh("data=2, tensor=4")
    assert dict(mesh.shape) == {"data": 2, "expert": 1, "tensor": 4}
    assert len(set(mesh.devices.flat)) == 8 == len(jax.devices())


def test_blocks_shrink_so_that_no_shard_cuts_one():
    blocks = qformat("fp8_e4m3_128x128")
    assert sharded_format(blocks, (512, 256), (4, 1)).block_shape == (128, 128)
    assert sharded_format(blocks, (576, 256), (2, 1)).block_shape == (32, 128)
    assert sharded_format(qformat("int4_1x128"), (8, 576), (1, 4)).block_shape == (1, 16)
    assert sharded_format(qformat("int4_channel"), (8, 64), (1, 4)).block_shape == (1, -1)
    with pytest.raises(ValueError, match=r"o_proj: a shard of 12 columns of int3 does not fill"):
        sharded_format(qformat("int3_channel"), (8, 48), (1, 4), "o_proj")


def test_parts_are_cut_as_their_weight():
    specs = part_specs(qformat("int4_1x32"), P("expert", "tensor", None))
    assert specs["qvalue"] == specs["scale"] == P("expert", "tensor", None)
    channel = part_specs(qformat("int8_channel"), P(None, "tensor"))
    assert channel["qvalue"] == P(None, "tensor") and channel["scale"] == P(None, None)
    assert part_specs(qformat("nvfp4"), P("tensor", None))["global_scale"] == P(None, None)
