"""Fake quantization inside Flax's own layers, NNX and Linen: values, gradients, conversion, the examples."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import linen, nnx

from qjax import qat, quantize
from qjax.quantization import quantize_activation
from qjax.recipe import SCHEMES, QuantSpec, Recipe, Rule


class Model(nnx.Module):
    """Each of Flax's layers, and expert weights of one's own."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(32, 64, rngs=rngs)
        self.dense = nnx.Linear(64, 96, rngs=rngs)
        self.heads = nnx.LinearGeneral(96, (4, 32), rngs=rngs)
        self.out = nnx.LinearGeneral((4, 32), 64, axis=(-2, -1), rngs=rngs)
        self.mix = nnx.Einsum("btd,dhf->bthf", (64, 2, 32), rngs=rngs)
        self.experts = nnx.Param(0.1 * jax.random.normal(jax.random.key(3), (3, 64, 32)))

    def __call__(self, ids):
        x = self.out(self.heads(self.dense(self.embed(ids))))
        x = x + self.mix(x).reshape(x.shape)
        return jnp.einsum("btk,ekn->betn", x, self.experts[...])


EXPERTS = {"experts": qat.Axes((1,), (0,))}
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 5)), jnp.int32)
RULES = (Rule(("Linear", "Experts"), SCHEMES["W4A16_G32"]), Rule(("embed",), SCHEMES["W8A16"]))


def kept(w, axes, format="W4A16_G32"):
    rows = quantize(
        axes.to_rows(w), format if not isinstance(format, str) else SCHEMES[format].weights
    )
    return axes.from_rows(rows.dequantize(), w.shape)


def test_axes_of_a_weight():
    w = jax.random.normal(jax.random.key(0), (3, 4, 5, 6))
    axes = qat.Axes((2, 1), (3,))
    rows = axes.to_rows(w)
    assert rows.shape == (6, 3, 20)
    np.testing.assert_array_equal(rows[2, 1], np.asarray(w)[1, :, :, 2].T.reshape(-1))
    np.testing.assert_array_equal(axes.from_rows(rows, w.shape), w)
    with pytest.raises(ValueError, match="does not fit a weight of 2 axes"):
        qat.Axes((0,), (0,)).to_rows(w[0, 0])


def expected_model(formats):
    model = Model(nnx.Rngs(0))
    for (module, name), (axes, format) in formats(model).items():
        variable = getattr(module, name)
        variable.set_value(kept(variable.get_value(), axes, format))
    return model


def weights_of(model, word="W4A16_G32"):
    return {
        (model.dense, "kernel"): (qat.Axes((0,)), word),
        (model.heads, "kernel"): (qat.Axes((0,)), word),
        (model.out, "kernel"): (qat.Axes((0, 1)), word),
        (model.mix, "kernel"): (qat.Axes((0,)), word),
        (model, "experts"): (EXPERTS["experts"], word),
    }


@pytest.mark.parametrize("word", ["W4A16_G32", "FP8_BLOCK_W", "MXFP4A16", "NVFP4A16"])
def test_forward_uses_the_quantizers_values_and_gradients_pass(word):
    spec = QuantSpec(SCHEMES[word.removesuffix("_W")].weights)
    recipe = Recipe((Rule(("Linear", "Experts"), spec),))
    model = qat.prepare(Model(nnx.Rngs(0)), recipe, axes=EXPERTS)
    other = expected_model(lambda m: weights_of(m, spec.weights))
    y = model(IDS)
    np.testing.assert_allclose(y, other(IDS), rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(y - Model(nnx.Rngs(0))(IDS))).max() > 1e-4

    def loss(model):
        return jnp.sum(model(IDS) ** 2)

    found = {
        tuple(p for p in path if p != "weight"): g  # where a parameter has a stand-in
        for path, g in nnx.to_flat_state(nnx.grad(loss)(model))
    }
    wanted = dict(nnx.to_flat_state(nnx.grad(loss)(other)))
    assert found.keys() == wanted.keys()
    for path, g in wanted.items():  # straight through: the gradients at the quantized weights
        a, b = np.asarray(found[path].get_value()), np.asarray(g.get_value())
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_convert_keeps_codes_and_logits():
    model = qat.prepare(Model(nnx.Rngs(0)), Recipe(RULES), axes=EXPERTS)
    before = model(IDS)
    kernels = {
        "dense.kernel": (Model(nnx.Rngs(0)).dense.kernel.get_value(), qat.Axes((0,))),
        "out.kernel": (Model(nnx.Rngs(0)).out.kernel.get_value(), qat.Axes((0, 1))),
        "experts": (Model(nnx.Rngs(0)).experts.get_value(), EXPERTS["experts"]),
    }
    qat.convert(model)
    np.testing.assert_allclose(model(IDS), before, rtol=1e-4, atol=1e-5)
    weights = qat.quantized_weights(model)
    assert len(weights) == 6
    assert {p[-1] for p, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))} == {"bias"}
    for path, (kernel, axes) in kernels.items():
        expected = quantize(axes.to_rows(kernel), SCHEMES["W4A16_G32"].weights)
        np.testing.assert_array_equal(weights[path].qvalue, expected.qvalue)
    graphdef, state = nnx.split(model)
    jitted = jax.jit(lambda state: nnx.merge(graphdef, state)(IDS))
    np.testing.assert_allclose(jitted(state), before, rtol=1e-4, atol=1e-5)


def test_inputs_are_quantized_row_by_row():
    act = SCHEMES["W4A8"].activations
    rule = Rule(("dense",), QuantSpec(None, act))
    model = qat.prepare(Model(nnx.Rngs(0)), Recipe((rule,)))
    x = jax.random.normal(jax.random.key(1), (2, 5, 64))
    rows = quantize_activation(x.reshape(-1, 64), act).dequantize().reshape(x.shape)
    np.testing.assert_allclose(model.dense(x), Model(nnx.Rngs(0)).dense(rows), rtol=1e-5, atol=1e-5)
    before = model.dense(x)
    rule = Rule(("dense",), QuantSpec(SCHEMES["W4A16_G32"].weights, act))
    model = qat.prepare(Model(nnx.Rngs(0)), Recipe((rule,)))
    trained = model.dense(x)
    assert np.abs(np.asarray(trained - before)).max() > 1e-3
    np.testing.assert_allclose(qat.convert(model).dense(x), trained, rtol=1e-4, atol=1e-5)


def test_learned_scales_and_schedules_in_flax_layers():
    rule = Rule(("Linear", "Experts"), SCHEMES["W4A16_G32"])
    model = qat.prepare(
        Model(nnx.Rngs(0)), Recipe((rule,)), learn_scale=True, start_step=2, axes=EXPERTS
    )
    plain = Model(nnx.Rngs(0))
    np.testing.assert_allclose(model(IDS), plain(IDS), rtol=1e-5, atol=1e-6)
    qat.set_step(model, 2)
    trained = model(IDS)
    scales = nnx.to_flat_state(nnx.state(model, qat.LearnedScale))
    assert len(scales) == 5

    def loss(model):
        return jnp.sum(model(IDS) ** 2)

    grads = nnx.grad(loss, argnums=nnx.DiffState(0, qat.LearnedScale))(model)
    assert all(np.abs(np.asarray(g.get_value())).max() > 0 for _, g in nnx.to_flat_state(grads))
    np.testing.assert_allclose(qat.convert(model)(IDS), trained, rtol=1e-4, atol=1e-5)


def test_misuse_is_told():
    rule = Rule(("Linear",), SCHEMES["W4A16_G32"])
    with pytest.raises(ValueError, match="axes are given for"):
        qat.prepare(Model(nnx.Rngs(0)), Recipe((rule,)), axes={"expert": qat.Axes((0,))})
    rule8 = Rule(("Experts",), SCHEMES["W4A8"])
    with pytest.raises(ValueError, match="its inputs can't be"):
        qat.prepare(Model(nnx.Rngs(0)), Recipe((rule8,)), axes=EXPERTS)
    model = qat.prepare(Model(nnx.Rngs(0)), Recipe((rule,)))
    with pytest.raises(ValueError, match="prepared already"):
        qat.prepare(model, Recipe((rule,)))


def test_einsum_axes_of_ellipses_and_batches():
    axes, summed, shared = qat._flax.einsum_axes("...d,df->...f", 3, 2)
    assert (axes, summed, shared) == (qat.Axes((0,)), (2,), ())
    axes, summed, shared = qat._flax.einsum_axes("ebd,edf->ebf", 3, 3)
    assert (axes, summed, shared) == (qat.Axes((1,), (0,)), (2,), (0,))
    with pytest.raises(ValueError, match="two operands"):
        qat._flax.einsum_axes("ab->a", 2, 2)


class Linen(linen.Module):
    """Dense, DenseGeneral and Embed, and an expert parameter of one's own."""

    @linen.compact
    def __call__(self, ids):
        x = linen.Embed(32, 64, name="embed")(ids)
        x = linen.Dense(96, name="dense")(x)
        x = linen.DenseGeneral((4, 16), name="heads")(x)
        x = linen.DenseGeneral(64, axis=(-2, -1), name="out")(x)
        experts = self.param("experts", linen.initializers.normal(0.1), (3, 64, 32))
        return jnp.einsum("btk,ekn->betn", x, experts)


def test_linen_parameters_are_intercepted():
    model = Linen()
    params = model.init(jax.random.key(0), IDS)
    recipe = Recipe((Rule(("Linear", "Experts"), SCHEMES["W4A16_G32"]),))
    own = {
        "dense.kernel": qat.Axes((0,)),
        "heads.kernel": qat.Axes((0,)),
        "out.kernel": qat.Axes((0, 1)),
        "experts": EXPERTS["experts"],
    }

    def loss(params):
        with qat.fake_quant_params(recipe, axes=EXPERTS):
            return jnp.sum(model.apply(params, IDS) ** 2)

    format = SCHEMES["W4A16_G32"].weights
    stored = qat.quantize_params(params["params"], {p: (format, a) for p, a in own.items()})
    quantized = jax.tree.map(lambda x: x, params)
    for path, axes in own.items():
        *parents, name = path.split(".")
        holder = quantized["params"]
        for parent in parents:
            holder = holder[parent]
        holder[name] = axes.from_rows(stored[path].dequantize(), holder[name].shape)
    expected, wanted = jax.value_and_grad(lambda p: jnp.sum(model.apply(p, IDS) ** 2))(quantized)
    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="match no module"):
        with qat.fake_quant_params(Recipe((Rule(("dance",), SCHEMES["W4A16"]),))):
            model.apply(params, IDS)
    with pytest.raises(ValueError, match="dot_general_cls"):
        with qat.fake_quant_params("W4A8"):
            model.apply(params, IDS)
    with pytest.raises(ValueError, match="are no parameters"):
        qat.quantize_params(params["params"], {"dense.colonel": (format, qat.Axes((0,)))})


def test_linen_dot_general_quantizes_both_operands():
    x = jax.random.normal(jax.random.key(1), (5, 256))
    layer = linen.Dense(32, dot_general_cls=qat.dot_general_cls("W4A8"), use_bias=False)
    params = layer.init(jax.random.key(0), x)
    spec, kernel = SCHEMES["W4A8"], params["params"]["kernel"]
    w = quantize(kernel.T, spec.weights).dequantize()
    rows = quantize_activation(x, spec.activations).dequantize()
    np.testing.assert_allclose(layer.apply(params, x), rows @ w.T, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda p: jnp.sum(layer.apply(p, x)))(params)["params"]["kernel"]
    np.testing.assert_allclose(
        gradient, jnp.broadcast_to(rows.sum(0)[:, None], (256, 32)), rtol=1e-4
    )


@pytest.mark.parametrize("name", ["qat_nnx", "qat_linen"])
def test_examples_learn(name):
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):  # as users run it
        losses = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"](steps=60)
    assert losses[-1] < 0.3 * losses[0]
