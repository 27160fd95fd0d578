"""Saving and restoring models and training state through Orbax, onto other meshes too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qjax import nn
from qjax.checkpoint._blocks import reblock
from qjax.checkpoint._orbax import restore, save
from qjax.models import llama
from qjax.quantization import quantize
from qjax.recipe import SCHEMES, recipe
from qjax.sharding import Sharding, make_mesh

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 384,  # tensor=2 leaves 192 rows: blocks of 128 are refined to 64
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


def build(scheme: str, mesh: str | None = None, *, fill: bool = True) -> llama.Model:
    config = llama.Config.from_hf(CONFIG)
    sharding = Sharding() if mesh is None else Sharding(make_mesh(mesh))
    specs = recipe(scheme).resolve(nn.quantizable(llama.Model(config)))
    model = llama.Model(config, specs=specs, dtype="float32", sharding=sharding)
    if fill:
        nn.initialize(model, jax.random.key(0), scale=0.1)
    return model


def flat(model: nnx.Module) -> dict:
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): v.get_value() for path, v in state}


def assert_same_bits(got: nnx.Module, want: nnx.Module) -> None:
    got_leaves = jax.tree_util.tree_flatten_with_path(flat(got))[0]
    want_leaves = jax.tree_util.tree_flatten_with_path(flat(want))[0]
    assert [p for p, _ in got_leaves] == [p for p, _ in want_leaves]
    for (path, a), (_, b) in zip(got_leaves, want_leaves, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.parametrize("scheme", ["bf16", "W4A16_ASYM", "W3A16", "FP8_BLOCK", "NVFP4", "FP8"])
def test_restored_model_has_the_same_bits_and_logits(tmp_path, scheme):
    model = build(scheme)
    save(tmp_path / "checkpoint", model)
    restored = restore(tmp_path / "checkpoint").model
    assert_same_bits(restored, model)
    ids = jnp.arange(6, dtype=jnp.int32)[None]
    assert np.array_equal(restored(ids)[0], model(ids)[0])
    formats = {k: v.format for k, v in flat(model).items() if hasattr(v, "format")}
    assert formats == {k: v.format for k, v in flat(restored).items() if hasattr(v, "format")}


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "W4A16_G32"])
def test_restore_onto_another_mesh_and_none(tmp_path, scheme):
    whole = build(scheme)
    save(tmp_path / "whole", whole)
    first = restore(tmp_path / "whole", sharding=Sharding(make_mesh("tensor=2"))).model
    if scheme == "FP8_BLOCK":
        up = first.model.layers[0].mlp.up_proj
        assert up.weight.get_value().format.block_shape == (64, 128)
        assert up.spec.weights.block_shape == (128, 128)
    save(tmp_path / "two", first)
    second = restore(tmp_path / "two", sharding=Sharding(make_mesh("tensor=4,data=2"))).model
    down = second.model.layers[0].mlp.down_proj.weight.get_value().qvalue
    assert down.addressable_shards[0].data.shape[1] * 4 == down.shape[1]
    save(tmp_path / "four", second)
    assert_same_bits(restore(tmp_path / "four").model, whole)
    ids = jnp.arange(6, dtype=jnp.int32)[None]
    want = whole(ids)[0]
    np.testing.assert_allclose(second(ids)[0], want, atol=1e-4 if "A16" in scheme else 2e-3)


def test_training_state_is_restored_in_its_own_types(tmp_path):
    model = build("bf16")
    _, params, rest = nnx.split(model, nnx.Param, ...)
    del rest
    optimizer = optax.adamw(1e-3)
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
        _, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    w = quantize(jax.random.normal(jax.random.key(1), (8, 32)), "int4_1x32_asym")
    extra = {"optimizer": state, "step": 7, "key": jax.random.key(3), "ema": [w, np.float64(0.5)]}
    save(tmp_path / "c", model, extra)
    restored = restore(tmp_path / "c", extra=jax.tree.map(lambda x: x, extra)).extra
    assert jax.tree.structure(restored) == jax.tree.structure(extra)
    assert restored["step"] == 7 and isinstance(restored["step"], int)
    assert isinstance(restored["ema"][1], np.float64)
    assert restored["ema"][0].format == w.format
    draw = [jax.random.bits(tree["key"], (4,)) for tree in (restored, extra)]
    assert np.array_equal(*draw)
    del restored["key"], extra["key"]
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(extra), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    untyped = restore(tmp_path / "c").extra
    assert untyped["['step']"] == 7


def test_training_state_is_restored_onto_the_templates_mesh(tmp_path):
    sharding = Sharding(make_mesh("tensor=4,data=2")).named("tensor", None)
    saved = Sharding(make_mesh("tensor=2")).named(None, "tensor")
    x = jax.device_put(jnp.arange(64.0).reshape(8, 8), saved)
    save(tmp_path / "c", build("bf16"), {"m": x})
    template = {"m": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}
    got = restore(tmp_path / "c", extra=template).extra["m"]
    assert got.sharding == sharding and np.array_equal(got, x)


def test_blocks_quantized_on_a_mesh_stay_small(tmp_path):
    """Their scales differ, so there are no larger blocks to go back to."""
    model = build("FP8_BLOCK", "tensor=2")
    save(tmp_path / "c", model)
    restored = restore(tmp_path / "c").model
    assert_same_bits(restored, model)
    assert restored.model.layers[0].mlp.up_proj.spec.weights.block_shape == (64, 128)
    assert restored.model.layers[0].mlp.gate_proj.weight.get_value().format.block_shape == (64, 128)


def test_reblock_goes_through_common_blocks_and_refuses_unequal_ones():
    scale = np.repeat(np.arange(5, dtype=np.float32), 2)[:9, None]  # 576 rows in blocks of 64
    refined = reblock(scale, (576, 8), (64, 8), (32, 8), "w")
    assert np.array_equal(refined[:, 0], np.arange(18) // 4)
    merged = reblock(scale, (576, 8), (64, 8), (128, 8), "w")
    assert np.array_equal(merged[:, 0], np.arange(5))
    via = reblock(np.float32([[1], [1], [2]]), (144, 8), (48, 8), (32, 8), "w")  # both divide 96
    assert np.array_equal(via[:, 0], [1, 1, 1, 2, 2])
    nan = np.full((2, 1), np.nan, np.float32)
    assert reblock(nan, (128, 8), (64, 8), (128, 8), "w").shape == (1, 1)
    with pytest.raises(ValueError, match="w: blocks of 64 along axis -2 have unequal scales"):
        reblock(scale, (576, 8), (64, 8), (256, 8), "w")


def test_what_cannot_be_saved_or_restored_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not loaded"):
        save(tmp_path / "c", build("bf16", fill=False))
    model = build("bf16")
    with pytest.raises(ValueError, match=r"extra\['name'\] is a str"):
        save(tmp_path / "c", model, {"name": "adam"})
    assert list(tmp_path.iterdir()) == []
    save(tmp_path / "c", model, {"step": 1})
    with pytest.raises(ValueError, match="exists"):
        save(tmp_path / "c", model)
    save(tmp_path / "c", model, {"step": 2}, overwrite=True)
    assert restore(tmp_path / "c", extra={"step": 0}).extra == {"step": 2}
    with pytest.raises(ValueError, match=r"lacks \[\"\['epoch'\]\"\]"):
        restore(tmp_path / "c", extra={"epoch": 0})
    with pytest.raises(ValueError, match="is plain there and quantized in this model"):
        restore(tmp_path / "c", model=build("W4A16_G32", fill=False))
    with pytest.raises(ValueError, match="no checkpoint"):
        restore(tmp_path)


def test_given_model_is_filled(tmp_path):
    class Small(nnx.Module):
        def __init__(self, key):
            self.kernel = nnx.Param(jax.random.normal(key, (4, 4)))

    model = Small(jax.random.key(0))
    save(tmp_path / "c", model)
    with pytest.raises(ValueError, match="pass model="):
        restore(tmp_path / "c")
    got = restore(tmp_path / "c", model=Small(jax.random.key(1))).model
    assert np.array_equal(got.kernel.get_value(), model.kernel.get_value())


def test_every_scheme_survives_the_description(tmp_path):
    from qjax.checkpoint._static import from_json, to_json
    from qjax.recipe import QuantSpec

    for name, spec in SCHEMES.items():
        assert from_json(QuantSpec, to_json(spec), name) == spec
    with pytest.raises(ValueError, match=r"QuantSpec has the fields"):
        from_json(QuantSpec, {"weights": None}, "x")
