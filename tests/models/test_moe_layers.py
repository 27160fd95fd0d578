"""Routers against numpy; dispatch, activation formats and sharding of experts against a loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax import Sharding, checkpoint, make_mesh, nn, require_kernels, testing
from qjax.formats import ActivationFormat, qformat
from qjax.nn import Context, ExpertLinear, Experts, Routing, initialize, route
from qjax.ops._dispatch import simulate_gpu
from qjax.qarray import QArray
from qjax.quantization import quantize_activation, refine_blocks
from qjax.recipe import SCHEMES, QuantSpec

E, D, F = 6, 64, 32
LAYERS = ("gate_proj", "up_proj", "down_proj")


def _softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def _route_one(logits, r, correction):
    """(experts, weights) of one token, written out."""
    scores = {
        "softmax": _softmax,
        "softmax_of_chosen": lambda x: x,
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    }[r.scoring](logits)
    choice = scores + correction
    size = len(logits) // r.groups
    by_group = [np.sort(choice[g * size : (g + 1) * size])[-2:].sum() for g in range(r.groups)]
    for g in np.argsort(by_group)[: r.groups - r.open_groups]:
        choice[g * size : (g + 1) * size] = -np.inf
    experts = np.argsort(-choice, kind="stable")[: r.top_k]
    weights = scores[experts]
    if r.scoring == "softmax_of_chosen":
        weights = _softmax(weights)
    if r.normalize:
        weights = weights / weights.sum()
    return experts, weights * r.scale


@pytest.mark.parametrize(
    "routing",
    [
        Routing(12, 3, "softmax"),
        Routing(12, 3, "softmax", normalize=True),
        Routing(12, 4, "softmax_of_chosen"),
        Routing(12, 3, "sigmoid", normalize=True, scale=2.827),
        Routing(12, 4, "sigmoid", normalize=True, groups=4, open_groups=2, scale=2.5),
        Routing(12, 3, "sigmoid", groups=3, open_groups=1),
        Routing(12, 2, "sigmoid", groups=12, open_groups=5),
    ],
    ids=lambda r: f"{r.scoring}-{r.groups}-{r.normalize}",
)
def test_router_equals_numpy(routing):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 12)).astype(np.float32) * 2
    corrections = (None,) if routing.scoring != "sigmoid" else (None, rng.normal(size=12))
    for correction in corrections:
        bias = None if correction is None else jnp.asarray(correction, jnp.float32)
        weights, experts = jax.jit(route, static_argnums=1)(jnp.asarray(logits), routing, bias)
        for i, row in enumerate(logits.astype(np.float64)):
            shift = np.zeros(12) if correction is None else correction
            want_experts, want_weights = _route_one(row, routing, shift)
            assert np.asarray(experts[i]).tolist() == want_experts.tolist()
            assert np.abs(np.asarray(weights[i]) - want_weights).max() < 1e-6


def test_equal_scores_go_to_the_lower_number():
    weights, experts = route(jnp.zeros((2, 8)), Routing(8, 3, "softmax", normalize=True))
    assert np.asarray(experts).tolist() == [[0, 1, 2]] * 2
    assert np.allclose(weights, 1 / 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scoring": "relu"}, "scoring must be one of"),
        ({"groups": 5}, "must divide into 5 groups"),
        ({"groups": 4, "open_groups": 5}, "1 to 4 are open"),
        ({"top_k": 4, "groups": 4, "open_groups": 1}, "must be 1 to 3"),
    ],
)
def test_contradicting_counts_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Routing(**{"num_experts": 12, "top_k": 2} | fields)


PLAIN = QuantSpec()


def _experts(spec=PLAIN, mesh=None, scales=None, key=0):
    """Experts with the same weights on every mesh."""
    paths = {f"mlp.experts.{e}.{name}": spec for e in range(E) for name in LAYERS}
    whole = Experts(E, D, F, "mlp.experts", Context(paths, "float32"))
    initialize(whole, jax.random.key(key), scale=0.2)
    sharding = Sharding() if mesh is None else Sharding(make_mesh(mesh))
    cut = Experts(E, D, F, "mlp.experts", Context(paths, "float32", sharding))
    for name in LAYERS:
        source, target = getattr(whole, name), getattr(cut, name)
        value, like = source.weight.get_value(), target.weight.get_value()
        if isinstance(value, QArray):
            value = refine_blocks(value, like.format.block_shape)
        target.weight.set_value(_place(value, like))
        if target.activation_scale is not None:
            target.activation_scale.set_value(
                _place(jnp.asarray(scales), target.activation_scale.get_value())
            )
    return cut


def _place(value, like):
    return jax.tree.map(
        lambda x, s: x if s.sharding is None else jax.device_put(x, s.sharding), value, like
    )


def _run(experts, *tokens):
    graphdef, state = nnx.split(experts)
    return np.asarray(jax.jit(lambda state, *t: nnx.merge(graphdef, state)(*t))(state, *tokens))


def _tokens(key=1):
    keys = jax.random.split(jax.random.key(key), 2)
    x = jax.random.normal(keys[0], (2, 5, D))
    return x, *route(jax.random.normal(keys[1], (2, 5, E)), Routing(E, 2, normalize=True))


def _loop(experts, x, weights, chosen, quantized=lambda name, e, rows: rows):
    """Token by token, expert by expert."""
    w = {}
    for name in LAYERS:
        value = getattr(experts, name).weight.get_value()
        w[name] = np.asarray(value.dequantize() if isinstance(value, QArray) else value)
    out = np.zeros(x.shape)
    for index in np.ndindex(*chosen.shape):
        e, row = int(chosen[index]), np.asarray(x[index[:2]])[None]
        gate = quantized("gate_proj", e, row) @ w["gate_proj"][e].T
        up = quantized("up_proj", e, row) @ w["up_proj"][e].T
        hidden = np.asarray(gate / (1 + np.exp(-gate)) * up, np.float32)
        down = quantized("down_proj", e, hidden) @ w["down_proj"][e].T
        out[index[:2]] += float(weights[index]) * down[0]
    return out


def test_dispatch_equals_a_loop():
    experts, tokens = _experts(), _tokens()
    assert np.abs(_run(experts, *tokens) - _loop(experts, *tokens)).max() < 1e-5


def test_all_tokens_on_one_expert():
    experts, (x, weights, chosen) = _experts(), _tokens()
    for mesh in (None, "expert=3,tensor=2"):
        experts = _experts(mesh=mesh)
        one = jnp.full_like(chosen, E - 1)
        want = _loop(_experts(), x, weights, one)
        assert np.abs(_run(experts, x, weights, one) - want).max() < 1e-5


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_DYNAMIC", "MXFP8", "NVFP4", "W8A8"])
def test_activation_formats_do_not_depend_on_the_mesh(scheme):
    spec, tokens = SCHEMES[scheme], _tokens()
    want = _run(_experts(spec), *tokens)
    weights_only = _experts(dataclasses.replace(spec, activations=None))
    assert np.abs(want - _run(weights_only, *tokens)).max() > 1e-3
    for mesh in ("tensor=2", "expert=2,tensor=2,data=2"):
        y = _run(_experts(spec, mesh), *tokens)
        # A code may flip where two orders of summation differ in the last bit.
        assert np.linalg.norm(y - want) < 1e-3 * np.linalg.norm(want), mesh


@pytest.mark.parametrize("mesh", [None, "tensor=2", "expert=2,data=2", "expert=6"])
def test_static_scale_per_expert(mesh):
    spec = SCHEMES["FP8"]
    scales = np.array([0.02, 0.01, 0.005, 0.03, 0.001, 0.015], np.float32)
    assert spec.activations is not None and spec.activations.static

    def quantized(name, e, rows):
        q = quantize_activation(jnp.asarray(rows), spec.activations, scale=jnp.asarray(scales[e]))
        return np.asarray(q.dequantize())

    want = _loop(_experts(spec, scales=scales), *_tokens(), quantized)
    y = _run(_experts(spec, mesh, scales), *_tokens())
    assert np.linalg.norm(y - want) < 1e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("mesh", [None, "tensor=2,expert=2"])
def test_gradients(mesh):
    """Of inputs and of plain weights, against the dense sum over all experts."""
    x, weights, chosen = _tokens()
    experts = _experts(mesh=mesh)
    dense = np.zeros((*chosen.shape[:2], E), np.float32)
    np.put_along_axis(dense, np.asarray(chosen), np.asarray(weights), axis=2)

    graphdef, state = nnx.split(experts)

    def reference(x, state):
        w = {name: state[name]["weight"].get_value() for name in LAYERS}
        gate = jnp.einsum("btd,efd->btef", x, w["gate_proj"])
        hidden = jax.nn.silu(gate) * jnp.einsum("btd,efd->btef", x, w["up_proj"])
        return jnp.sum(jnp.einsum("btef,edf,bte->btd", hidden, w["down_proj"], dense) ** 2)

    def loss(x, state):
        return jnp.sum(nnx.merge(graphdef, state)(x, weights, chosen) ** 2)

    got, want = (jax.jit(jax.grad(fn, argnums=(0, 1)))(x, state) for fn in (loss, reference))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-4 * np.abs(b).max() + 1e-6


def test_experts_of_one_layer_need_one_spec():
    specs = {f"mlp.experts.{e}.up_proj": SCHEMES["MXFP4A16"] for e in range(E - 1)}
    with pytest.raises(ValueError, match=r"mlp.experts.5.up_proj has QuantSpec\(weights=None"):
        ExpertLinear(E, D, F, "mlp.experts.up_proj", Context(specs))


def test_dynamic_scale_of_the_whole_tensor_covers_all_devices():
    """The row with the largest amax sits on one data shard only."""
    activation = ActivationFormat(qformat("fp8_e4m3_tensor"))
    spec = QuantSpec(qformat("fp8_e4m3_tensor"), activation)
    x, weights, chosen = _tokens()
    x = x.at[1, 0].multiply(50.0)
    want = _run(_experts(spec), x, weights, chosen)
    for mesh in ("data=2", "tensor=2,expert=2,data=2"):
        y = _run(_experts(spec, mesh), x, weights, chosen)
        assert np.linalg.norm(y - want) < 1e-3 * np.linalg.norm(want), mesh


@pytest.mark.parametrize("name", ["gpt_oss_mxfp4_tiny_h192", "kimi_k2_int4_g32_experts_tiny"])
def test_experts_of_checkpoints_run_on_the_grouped_kernel(checkpoints_dir, name):
    loaded = checkpoint.load(checkpoints_dir / name, prepack=False, progress=False)
    experts = loaded.model.model.layers[-1].mlp.experts
    count, size = experts.num_experts, experts.down_proj.weight.get_value().shape[1]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 3, size)).astype(jnp.bfloat16)
    weights = jax.nn.softmax(jax.random.normal(keys[1], (2, 3, 2)))
    chosen = jax.random.randint(keys[2], (2, 3, 2), 0, count)
    exact = np.asarray(experts(x.astype(jnp.float32), weights, chosen))
    assert nn.prepack(loaded.model) > 0
    if name.startswith("gpt_oss"):
        assert experts.gate_up_proj.weight.get_value().format.storage == "wgmma8_pairs"
    with testing.interpret(), simulate_gpu(), require_kernels():
        y = experts(x, weights, chosen)
    assert y.dtype == x.dtype
    error = np.linalg.norm(np.asarray(y, np.float32) - exact) / np.linalg.norm(exact)
    assert error <= 6e-3  # three roundings to bfloat16, and INT4's weights


@pytest.mark.parametrize(
    ("mesh", "storage"), [("tensor=2", "wgmma8_pairs"), ("tensor=4", "wgmma8")]
)
def test_alternating_rows_are_paired_within_a_device(mesh, storage):
    """A layer of 256 rows: halves are whole pairs of blocks, quarters are not."""
    context = Context({"gate_up_proj": SCHEMES["MXFP4A16"]}, "bfloat16", Sharding(make_mesh(mesh)))
    options = dict(stacked_in_checkpoint=True, alternating=True, out_axis="tensor")
    layer = ExpertLinear(2, 128, 256, "gate_up_proj", context, **options)
    initialize(layer, jax.random.key(0))
    before = layer.weight.get_value()
    assert nn.prepack(layer) == 1
    after = layer.weight.get_value()
    assert after.format.storage == storage
    np.testing.assert_array_equal(after.dequantize(), before.dequantize())
    parts = [after.qvalue, after.scale]
    for one, other in zip(
        *(sorted(p.addressable_shards, key=lambda s: s.index[1].start) for p in parts), strict=True
    ):
        rows = slice(one.index[1].start * 64, one.index[1].stop * 64)
        local = dataclasses.replace(after, qvalue=one.data, scale=other.data)
        local = dataclasses.replace(local, global_scale=np.asarray(after.global_scale))
        np.testing.assert_array_equal(local.dequantize(), before.dequantize()[:, rows])
