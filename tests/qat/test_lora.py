"""Adapters on frozen layers: gradients, values, merging, meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qjax import QuantSpec, Sharding, dot, make_mesh, qformat, quantize
from qjax.checkpoint import export
from qjax.nn import Context, Linear, QuantizedParam, initialize, modules, resolve
from qjax.qarray import QArray
from qjax.qat import add_lora, merge_lora
from qjax.recipe import recipe
from qjax.registry import model_module

CONFIG = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
FORMATS = [None, "int4_1x32", "int4_1x32_asym", "mxfp4", "nvfp4", "int8_channel"]


def normal(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def linear(format, n=48, k=64, bias=True):
    spec = QuantSpec() if format is None else QuantSpec(qformat(format))
    layer = Linear(k, n, "proj", Context({"proj": spec}, "float32"), use_bias=bias)
    initialize(layer, jax.random.key(0), scale=0.3)
    return layer


def adapted(format, rank=4, alpha=8.0):
    layer = linear(format)
    add_lora(layer, rank, alpha, ("",), key=jax.random.key(1))
    layer.lora.b.set_value(normal((48, rank), 2) * 0.1)
    return layer


def weight(layer):
    w = layer.weight.get_value()
    return np.asarray(w.dequantize("float32") if isinstance(w, QArray) else w, np.float64)


def tiny(recipe_name, sharding=None, dtype="float32"):
    family = model_module("llama")
    config = family.Config.from_hf(CONFIG)
    specs = resolve(recipe(recipe_name), family.Model(config))
    model = family.Model(config, specs=specs, dtype=dtype, sharding=sharding)
    initialize(model, jax.random.key(0), scale=0.1)
    return model


@pytest.mark.parametrize("format", FORMATS)
def test_outputs_and_gradients_against_the_dequantized_layer(format):
    """y = x (W + s b a)^T + bias, and its derivatives by x, a and b, in float64."""
    layer, x, g = adapted(format), normal((5, 64), 3), normal((5, 48), 4)
    a, b = (np.asarray(v.get_value(), np.float64) for v in (layer.lora.a, layer.lora.b))
    w = weight(layer) + 2.0 * b @ a  # alpha / rank = 2

    def loss(layer, x):
        return jnp.sum(layer(x) * g)

    only = nnx.DiffState(0, nnx.LoRAParam)
    gradients, dx = nnx.grad(loss, argnums=(only, 1))(layer, x)
    x, g = np.asarray(x, np.float64), np.asarray(g, np.float64)
    # float32 sums over at most 64 products of order one
    close = {"rtol": 2e-5, "atol": 2e-5}
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), x @ w.T, **close)
    np.testing.assert_allclose(dx, g @ w, **close)
    np.testing.assert_allclose(gradients.lora.a.get_value(), 2.0 * (g @ b).T @ x, **close)
    np.testing.assert_allclose(gradients.lora.b.get_value(), 2.0 * g.T @ (x @ a.T), **close)


@pytest.mark.parametrize("format", FORMATS)
def test_a_merged_layer_computes_what_the_adapted_one_did(format):
    layer, x = adapted(format), normal((5, 64), 3)
    before, wanted = layer(x), weight(layer) + np.asarray(layer.lora.delta(), np.float64)
    assert merge_lora(layer) == [""] and layer.lora is None
    if format is None:
        np.testing.assert_array_equal(layer.weight.get_value(), wanted.astype(np.float32))
        np.testing.assert_allclose(layer(x), before, rtol=1e-5, atol=1e-5)
        return
    w = layer.weight.get_value()
    assert isinstance(layer.weight, QuantizedParam) and w.format == qformat(format)
    exact = quantize(jnp.asarray(wanted, jnp.float32), format, dtype="float32")
    # The compiled sum is rounded once where NumPy's is rounded twice: the last bit of a scale.
    np.testing.assert_allclose(w.dequantize(), exact.dequantize(), rtol=1e-6)
    np.testing.assert_allclose(layer(x), dot(x, exact), rtol=1e-5, atol=1e-5)
    # Rounding to nearest moves a weight by half a step at most.
    bits = {"int8_channel": 8}.get(format, 4)
    limit = {8: 0.02, 4: 0.25}[bits] * np.linalg.norm(np.asarray(before))
    assert 0 < np.linalg.norm(np.asarray(layer(x) - before)) < limit


def test_merging_keeps_the_order_of_permuted_columns():
    layer = linear("int4_1x32")
    w = layer.weight.get_value()
    order = jax.random.permutation(jax.random.key(7), 64).astype(jnp.int32)
    layer.weight.set_value(dataclasses.replace(w, column_perm=order))
    add_lora(layer, 4, 8.0, ("",), key=jax.random.key(1))
    layer.lora.b.set_value(normal((48, 4), 2))
    wanted = weight(layer) + np.asarray(layer.lora.delta())
    merge_lora(layer)
    merged = layer.weight.get_value()
    np.testing.assert_array_equal(merged.column_perm, order)
    stored = quantize(jnp.asarray(wanted[:, order], jnp.float32), "int4_1x32", dtype="float32")
    # A value between two codes may fall to either with the last bit of its scale.
    assert np.mean(np.asarray(merged.qvalue) != np.asarray(stored.qvalue)) < 0.005
    np.testing.assert_allclose(merged.scale, stored.scale, rtol=1e-6)


@pytest.mark.parametrize("name", ["bf16", "W4A16_G32"])
def test_training_touches_nothing_but_adapters(name):
    model = tiny(name)
    ids = jax.random.randint(jax.random.key(1), (2, 12), 0, 48)
    plain = model(ids)[0]
    paths = add_lora(model, 4, key=jax.random.key(2))
    assert len(paths) == 2 * 7 and all(path.endswith("_proj") for path in paths)
    np.testing.assert_array_equal(model(ids)[0], plain)  # b is zero
    frozen = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.LoRAParam)))
    kept = [(path, jax.tree.map(np.asarray, v.get_value())) for path, v in frozen]
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    moments = [
        path for path, v in nnx.to_flat_state(nnx.state(optimizer)) if v.get_value().ndim == 2
    ]
    assert len(moments) == 2 * 2 * len(paths) and all("lora" in path for path in moments)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logp = jax.nn.log_softmax(model(ids)[0][:, :-1])
            return -jnp.mean(jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1))

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        assert all("lora" in path for path, _ in nnx.to_flat_state(gradients))
        optimizer.update(model, gradients)
        return value

    with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer step with floats
        losses = [float(step(model, optimizer)) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.1
    after = dict(nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.LoRAParam))))
    for path, value in kept:
        jax.tree.map(np.testing.assert_array_equal, after[path].get_value(), value)
    trained = model(ids)[0]
    assert merge_lora(model) == paths
    error = np.linalg.norm(model(ids)[0] - trained) / np.linalg.norm(trained)
    assert error < (1e-5 if name == "bf16" else 0.25)


@pytest.mark.parametrize("name", ["bf16", "W4A16_G32"])
def test_a_mesh_changes_neither_outputs_nor_gradients_nor_the_merged_weights(name):
    mesh = Sharding(make_mesh("tensor=2,data=2", devices=jax.devices()[:4]))
    ids = jax.random.randint(jax.random.key(1), (4, 12), 0, 48)
    results = []
    for sharding in (None, mesh):
        model = tiny(name, sharding)
        add_lora(model, 4, key=jax.random.key(2))
        for path, module in modules(model):
            if path.endswith(".lora"):
                b = module.b.get_value()
                value = 0.05 * normal(b.shape, len(path))
                module.b.set_value(jax.device_put(value, b.sharding))

        def loss(model):
            return jnp.mean(jax.nn.logsumexp(model(ids)[0], axis=-1))

        only = nnx.DiffState(0, nnx.LoRAParam)
        value, gradients = nnx.jit(nnx.value_and_grad(loss, argnums=only))(model)
        gradients = [np.asarray(v.get_value()) for _, v in nnx.to_flat_state(gradients)]
        merge_lora(model)
        merged = [
            np.asarray(w.dequantize() if isinstance(w, QArray) else w)
            for _, m in modules(model)
            if isinstance(m, Linear)
            for w in [m.weight.get_value()]
        ]
        results.append((value, gradients, merged))
    (value, gradients, merged), (meshed, mesh_gradients, mesh_merged) = results
    np.testing.assert_allclose(meshed, value, rtol=1e-5)
    for one, many in zip(gradients, mesh_gradients, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-6)  # sums in another order
    for one, many in zip(merged, mesh_merged, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-6, atol=1e-6)


def test_mistakes_are_named(tmp_path):
    model = tiny("bf16")
    key = jax.random.key(0)
    for options, message in (
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 33}, r"k_proj is \[32, 64\]: rank 33 must be at most 32"),
        ({"rank": 4, "targets": ("Experts",)}, r"targets \['Experts'\] match no linear layer"),
        ({"rank": 4, "targets": ()}, "match no linear layer"),
        ({"rank": 4, "ignore": ("Linear",)}, "leaves no layer"),
    ):
        with pytest.raises(ValueError, match=message):
            add_lora(model, key=key, **options)
    with pytest.raises(ValueError, match="has no adapters"):
        merge_lora(model)
    only = add_lora(model, 4, targets=("re:.*q_proj",), key=key)
    assert only == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(model, 4, key=key)
    with pytest.raises(ValueError, match=r"q_proj.lora.a is an adapter's; merge_lora"):
        export(model, tmp_path / "out", format="bf16", source=CONFIG, progress=False)
    assert not (tmp_path / "out").exists()
