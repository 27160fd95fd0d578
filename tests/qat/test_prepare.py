"""prepare and convert on qjax's own models: what is touched, codes bit for bit, schedules, learned grids, export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from qat_tiny_model import CONFIG, MOE_CONFIG, write_model

from qjax import checkpoint, nn, qat, quantize
from qjax.recipe import SCHEMES, QuantSpec, Recipe, Rule, recipe
from qjax.registry import model_module
from qjax.sharding import Sharding, make_mesh

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 12)), jnp.int32)


def build(config=CONFIG, *, sharding=None):
    family = model_module(config["model_type"])
    model = family.Model(
        family.Config.from_hf(config), dtype="float32", sharding=sharding or Sharding()
    )
    nn.initialize(model, jax.random.key(0), scale=0.1)
    return model


def fake_quantized(model):
    return {path for path, m in nn.modules(model) if getattr(m, "fake_quant", None) is not None}


WORDS = ["W4A16_G32", "W4A16_ASYM", "W3A16", "W2A16", "W4A8", "INT8", "FP8_BLOCK", "FP8_DYNAMIC",
         "MXFP4A16", "MXFP4", "MXFP8", "NVFP4A16"]  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_convert_keeps_what_prepare_computed(word):
    model = qat.prepare(build(), word)
    paths = fake_quantized(model)
    assert len(paths) == 14 and all("_proj" in p for p in paths)
    before = model(IDS)[0]
    used = {p: m.weight_value() for p, m in nn.modules(model) if p in paths}
    qat.convert(model)
    assert not fake_quantized(model)
    for path, module in nn.modules(model):
        if path in paths:
            np.testing.assert_array_equal(module.weight.get_value().dequantize(), used[path])
            assert module.activation_format == SCHEMES[word].activations
    np.testing.assert_allclose(model(IDS)[0], before, rtol=1e-4, atol=1e-4)


def test_gradients_pass_to_every_weight():
    model = qat.prepare(build(), "W4A8")

    def loss(model):
        return jnp.mean(model(IDS)[0] ** 2)

    grads = nnx.to_flat_state(nnx.grad(loss)(model))
    assert all(np.abs(np.asarray(g.get_value())).max() > 0 for _, g in grads)
    plain = nnx.to_flat_state(nnx.state(build(), nnx.Param))
    assert [path for path, _ in grads] == [path for path, _ in plain]


EXPERTS = {
    f"model.layers.{i}.mlp.experts.{n}"
    for i in (0, 1)
    for n in ("gate_proj", "up_proj", "down_proj")
}


def test_published_recipes_touch_what_they_say():
    for name, format in (("KIMI_K2_INT4", "int4_1x32"), ("GPT_OSS_MXFP4", "mxfp4")):
        model = qat.prepare(build(MOE_CONFIG), name)
        assert fake_quantized(model) == EXPERTS
        formats = {m.fake_quant.weights for p, m in nn.modules(model) if p in EXPERTS}
        (found,) = formats
        assert found.element == ("int4" if "int4" in format else "float4_e2m1fn")
        assert found.block_shape == (1, 32) and found.offset is None
    config = CONFIG | {"num_hidden_layers": 4}
    model = qat.prepare(build(config), "LLAMA_FP8")
    assert fake_quantized(model) == {
        f"model.layers.{i}.mlp.{n}_proj" for i in (1, 2) for n in ("gate", "up", "down")
    }
    spec = model.model.layers[1].mlp.up_proj.spec
    assert spec.activations.amax_max == 1200.0 and spec.weights.block_shape == (1, -1)
    with pytest.raises(ValueError, match="pass num_layers"):
        recipe("LLAMA_FP8")


def test_experts_with_quantized_inputs():
    model = qat.prepare(build(MOE_CONFIG), "FP8_DYNAMIC")
    assert EXPERTS < fake_quantized(model) and not any(
        "mlp.gate" == p[-8:] for p in fake_quantized(model)
    )
    before = model(IDS)[0]
    np.testing.assert_allclose(qat.convert(model)(IDS)[0], before, rtol=1e-3, atol=1e-3)


def test_rules_and_ignored_layers():
    rules = (
        Rule(("re:.*mlp.*",), SCHEMES["MXFP4A16"]),
        Rule(("model.embed_tokens",), SCHEMES["W8A16"]),
    )
    model = qat.prepare(build(), Recipe(rules, ignore=("model.layers.0.mlp.up_proj",)))
    mlp = {f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")}
    mlp.remove("model.layers.0.mlp.up_proj")
    assert fake_quantized(model) == mlp | {"model.embed_tokens"}
    before = model(IDS)[0]
    np.testing.assert_allclose(qat.convert(model)(IDS)[0], before, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="match no module"):
        qat.prepare(build(), Recipe((Rule(("re:.*mpl.*",), SCHEMES["W4A16"]),)))


def test_misuse_is_told():
    model = qat.prepare(build(), "W4A16")
    with pytest.raises(ValueError, match="prepared already"):
        qat.prepare(model, "W4A16")
    with pytest.raises(ValueError, match="no prepared layer"):
        qat.convert(build())
    with pytest.raises(ValueError, match="static activation scales"):
        qat.prepare(build(), "FP8")
    with pytest.raises(ValueError, match="convert"):
        checkpoint.export(model, "/nonexistent", format="compressed-tensors")


def test_schedules_start_ramp_and_never_compile_anew():
    plain, model = build(), qat.prepare(build(), "W4A16_G32", start_step=3, ramp_steps=1)
    graphdef, state = nnx.split(model)
    traces = []

    @jax.jit
    def run(state, step):
        traces.append(1)
        model = nnx.merge(graphdef, state)
        qat.set_step(model, step)
        return model(IDS)[0], model.model.layers[0].mlp.up_proj.weight_value()

    outputs = [run(state, jnp.int32(step)) for step in range(6)]
    assert len(traces) == 1
    for logits, _ in outputs[:3]:
        np.testing.assert_allclose(logits, plain(IDS)[0], rtol=1e-5, atol=1e-5)
    w = plain.model.layers[0].mlp.up_proj.weight.get_value()
    quantized = quantize(w, SCHEMES["W4A16_G32"].weights).dequantize()
    np.testing.assert_allclose(outputs[3][1], (w + quantized) / 2, atol=1e-6)
    np.testing.assert_array_equal(outputs[4][1], quantized)
    np.testing.assert_array_equal(outputs[5][1], quantized)


def test_stages_pass_through_wider_formats():
    model = qat.prepare(build(), "W2A16", stages=((2, "int8_1x64"), (4, "int4_1x64")))
    layer = model.model.layers[0].mlp.up_proj
    w = layer.weight.get_value()
    names = ["int8_1x64"] * 2 + ["int4_1x64"] * 2 + [SCHEMES["W2A16"].weights]
    for step, name in enumerate(names):
        qat.set_step(model, step)
        np.testing.assert_array_equal(layer.weight_value(), quantize(w, name).dequantize())


@pytest.mark.parametrize("word", ["W4A16_G32", "W4A16_ASYM", "FP8_BLOCK", "MXFP4A16", "NVFP4A16"])
def test_learned_grids_start_as_the_computed_ones_and_convert(word):
    model = qat.prepare(build(), word, learn_scale=True, learn_rounding=True)
    layer = model.model.layers[1].mlp.down_proj
    w = layer.weight.get_value()
    plain = quantize(w, layer.fake_quant.weights)
    np.testing.assert_array_equal(layer.weight_value(), plain.dequantize())
    scale = layer.fake_quant.scale
    scale.set_value(scale.get_value() * 1.25)
    noise = 0.4 * jax.random.normal(jax.random.key(1), w.shape)
    layer.fake_quant.rounding.set_value(noise)
    used = layer.weight_value()
    assert np.abs(np.asarray(used - plain.dequantize())).max() > 0
    qat.convert(model)
    np.testing.assert_array_equal(layer.weight.get_value().dequantize(), used)


def test_learned_scale_gradient_has_the_papers_factor():
    """g = 1 / sqrt(N_W Q_P) times the sum of (round(w/s) - w/s) inside the grid (arXiv:1902.08153, section 2.2)."""
    model = qat.prepare(build(), "W4A16_G32", learn_scale=True)
    quantizer = model.model.layers[0].mlp.up_proj.fake_quant
    w = model.model.layers[0].mlp.up_proj.weight.get_value()
    s = 0.7 * quantizer.scale.get_value()
    quantizer.scale.set_value(s)
    grads = nnx.grad(lambda q: jnp.sum(q.weight(w)), argnums=nnx.DiffState(0, qat.LearnedScale))(
        quantizer
    )
    stored = np.asarray(s.astype(jnp.bfloat16), np.float64)
    u = np.asarray(w, np.float64).reshape(*s.shape, 32) / stored[..., None]
    nearest = np.round(u)
    inside = (nearest >= -8) & (nearest <= 7)
    each = np.where(inside, nearest - u, np.clip(nearest, -8, 7))
    expected = each.sum(-1) / np.sqrt(32 * 7)
    np.testing.assert_allclose(grads.scale.get_value(), expected, rtol=1e-4, atol=1e-5)


def test_rounding_offsets_are_bounded():
    model = qat.prepare(build(), "W4A16_G32", learn_rounding=True)
    layer = model.model.layers[0].mlp.up_proj
    offsets = layer.fake_quant.rounding
    half = jnp.full(offsets.get_value().shape, 0.5)
    offsets.set_value(half)
    used = layer.weight_value()
    offsets.set_value(half * 7)
    np.testing.assert_array_equal(layer.weight_value(), used)


@pytest.mark.parametrize("cache", ["fp8_e4m3", "fp8_e5m2", "nvfp4"])
@pytest.mark.parametrize("config", [CONFIG, MOE_CONFIG])
def test_kv_cache_values_are_those_of_the_cache(cache, config):
    """Layer by layer on equal inputs: one last bit of the layer before flips a code of the next."""
    model = qat.prepare(build(config), Recipe(kv_cache=recipe("none", kv_cache=cache).kv_cache))
    pages = model.init_cache(2, 16, recipe("none", kv_cache=cache).kv_cache)
    b, t = IDS.shape
    tokens = nn.Tokens(
        positions=jnp.broadcast_to(jnp.arange(t), IDS.shape),
        valid=jnp.full(IDS.shape, True),
        lengths=jnp.full((b,), t),
        page_table=pages.page_table,
    )
    x = model.model.embed_tokens(IDS)
    for layer, layer_cache in zip(model.model.layers, pages.layers, strict=True):
        trained, _ = layer(x, tokens, None)
        layer.self_attn.fake_kv_cache = None
        plain, _ = layer(x, tokens, None)
        served, _ = layer(x, tokens, layer_cache)
        np.testing.assert_allclose(trained, served, rtol=1e-5, atol=1e-6)
        assert np.abs(np.asarray(trained - plain)).max() > 1e-4
        x = trained


@pytest.mark.parametrize("word", ["W4A16_G32", "FP8_BLOCK", "MXFP4A16"])
def test_exported_folder_is_the_converted_model(tmp_path, word):
    source = write_model(tmp_path / "source")
    loaded = checkpoint.load(source, dtype="float32", progress=False)
    model = qat.prepare(loaded.model, word, learn_scale=word != "FP8_BLOCK")
    qat.convert(model)
    out = checkpoint.export(
        model, tmp_path / "out", format="compressed-tensors", source=loaded, progress=False
    )
    again = checkpoint.load(out, dtype="float32", progress=False).model
    weights, other = qat.quantized_weights(model), qat.quantized_weights(again)
    assert weights.keys() == other.keys() and len(weights) == 14
    for path, w in weights.items():
        assert w.format == other[path].format
        np.testing.assert_array_equal(w.qvalue, other[path].qvalue)
        np.testing.assert_array_equal(w.dequantize("float32"), other[path].dequantize("float32"))
    np.testing.assert_allclose(again(IDS)[0], model(IDS)[0], rtol=1e-4, atol=1e-4)


def test_quantized_checkpoint_trains_again(tmp_path):
    source = write_model(tmp_path / "source")
    loaded = checkpoint.load(source, recipe="W4A16_G32", dtype="float32", progress=False)
    before = loaded.model(IDS)[0]
    model = qat.prepare(loaded.model, "W8A16")
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, nnx.Param)
    np.testing.assert_allclose(model(IDS)[0], before, rtol=0.05, atol=0.05)


def test_on_a_mesh_as_on_one_device():
    one = qat.prepare(build(), "FP8_BLOCK")
    expected = one(IDS)[0]
    mesh = qat.prepare(build(sharding=Sharding(make_mesh("tensor=2,data=2"))), "FP8_BLOCK")
    state = nnx.state(one, nnx.Param)
    flat = dict(nnx.to_flat_state(state))
    for path, variable in nnx.to_flat_state(nnx.state(mesh, nnx.Param)):
        like = variable.get_value()
        variable.set_value(jax.device_put(flat[path].get_value(), like.sharding))
    np.testing.assert_allclose(mesh(IDS)[0], expected, rtol=1e-4, atol=1e-4)
    qat.convert(mesh)
    qat.convert(one)
    np.testing.assert_allclose(mesh(IDS)[0], expected, rtol=1e-3, atol=1e-3)
    for path, w in qat.quantized_weights(one).items():
        np.testing.assert_array_equal(
            qat.quantized_weights(mesh)[path].dequantize(), w.dequantize()
        )


def test_activations_alone():
    spec = QuantSpec(None, SCHEMES["INT8"].activations)
    model = qat.prepare(build(), Recipe((Rule(("Linear",), spec),)))
    before = model(IDS)[0]
    np.testing.assert_allclose(qat.convert(model)(IDS)[0], before, rtol=1e-4, atol=1e-4)
