"""Grouped products against a loop over experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import testing
from qjax.formats import ActivationFormat, qformat
from qjax.ops import GatedActivation, gated_ragged_dot, gated_ragged_mlp, ragged_dot
from qjax.ops._dispatch import simulate_gpu
from qjax.quantization import quantize, quantize_activation

E, N, K = 4, 24, 64
SIZES = np.array([5, 0, 7, 3])
ROWS = 19  # the last four belong to no expert


def _arrays(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    lhs = jax.random.normal(keys[0], (ROWS, K))
    rhs = jax.random.normal(keys[1], (E, N, K)) / 8
    return lhs, rhs, jax.random.normal(keys[2], (E, N))


def _loop(lhs, rhs, bias=None, sizes=SIZES):
    out = np.zeros((lhs.shape[0], rhs.shape[1]), np.float64)
    start = 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows] = np.asarray(lhs[rows], np.float64) @ np.asarray(rhs[e], np.float64).T
        if bias is not None:
            out[rows] += np.asarray(bias[e], np.float64)
        start += size
    return out


def _max_error(y, want):
    return float(np.abs(np.asarray(y, np.float64) - want).max())


@pytest.mark.parametrize(
    "format", [None, "int4_1x32", "int4_1x32_asym", "mxfp4", "nvfp4", "fp8_e4m3_128x128"]
)
def test_equals_a_loop_over_experts(format):
    lhs, rhs, bias = _arrays()
    w = rhs if format is None else quantize(rhs, format)
    plain = rhs if format is None else w.dequantize()
    y = jax.jit(ragged_dot)(lhs, w, jnp.asarray(SIZES), bias=bias)
    assert y.shape == (ROWS, N) and y.dtype == jnp.float32
    assert _max_error(y, _loop(lhs, plain, bias)) < 2e-5
    assert np.all(np.asarray(y[SIZES.sum() :]) == 0)


@pytest.mark.parametrize("sizes", [[0, 0, 0, 0], [ROWS, 0, 0, 0], [0, 0, 0, ROWS], [1, 1, 1, 1]])
def test_any_group_sizes(sizes):
    lhs, rhs, _ = _arrays(1)
    for w in (rhs, quantize(rhs, "int8_channel")):
        plain = w if w is rhs else w.dequantize()
        y = ragged_dot(lhs, w, jnp.asarray(sizes))
        assert _max_error(y, _loop(lhs, plain, sizes=sizes)) < 2e-5


def test_activation_format_and_quantized_lhs_agree():
    lhs, rhs, _ = _arrays(2)
    w = quantize(rhs, "fp8_e4m3_128x128")
    activation = ActivationFormat(qformat("fp8_e4m3_1x128"), amax_min=1e-4)
    quantized = quantize_activation(lhs, activation)
    want = _loop(quantized.dequantize(), w.dequantize())
    sizes = jnp.asarray(SIZES)
    assert _max_error(ragged_dot(lhs, w, sizes, activation_format=activation), want) < 2e-5
    assert _max_error(ragged_dot(quantized, w, sizes), want) < 2e-5
    assert np.abs(want - _loop(lhs, w.dequantize())).max() > 1e-3


def test_static_scale_per_expert():
    lhs, rhs, _ = _arrays(3)
    w = quantize(rhs, "fp8_e4m3_tensor")
    activation = ActivationFormat(qformat("fp8_e4m3_tensor"), static=True)
    scales = jnp.array([0.01, 0.02, 0.005, 0.001])
    values, start = np.zeros_like(lhs), 0
    for e, size in enumerate(SIZES):
        rows = lhs[start : start + size]
        if size:
            q = quantize_activation(rows, activation, scale=scales[e])
            values[start : start + size] = q.dequantize()
        start += size
    y = ragged_dot(
        lhs, w, jnp.asarray(SIZES), activation_format=activation, activation_scale=scales
    )
    assert _max_error(y, _loop(values, w.dequantize())) < 2e-5


def test_gradient_flows_through_quantized_weights():
    lhs, rhs, _ = _arrays(4)
    w, sizes = quantize(rhs, "int4_1x32"), jnp.asarray(SIZES)
    cotangent = jax.random.normal(jax.random.key(9), (ROWS, N))
    dx = jax.grad(lambda x: jnp.sum(ragged_dot(x, w, sizes) * cotangent))(lhs)
    want = _loop(cotangent, jnp.swapaxes(w.dequantize(), 1, 2))
    assert _max_error(dx, want) < 2e-5
    activation = ActivationFormat(qformat("int8_channel"))
    straight = jax.grad(
        lambda x: jnp.sum(ragged_dot(x, w, sizes, activation_format=activation) * cotangent)
    )(lhs)
    assert _max_error(straight, want) < 2e-5


def test_refuses_wrong_shapes():
    lhs, rhs, _ = _arrays()
    with pytest.raises(
        ValueError, match=r"ragged_dot: needs lhs .* found \[19, 64\], \[4, 24, 64\], \[3\]"
    ):
        ragged_dot(lhs, rhs, jnp.zeros((3,), jnp.int32))
    with pytest.raises(ValueError, match="ragged_dot"):
        ragged_dot(lhs[:, :32], rhs, jnp.asarray(SIZES))


BF16_SCALES = dataclasses.replace(qformat("int4_1x32"), scale_dtype="bfloat16")


@pytest.mark.parametrize(
    ("format", "inputs"), [("mxfp4", None), ("mxfp4", "fp8_e4m3_channel"), (BF16_SCALES, None)]
)
def test_prepacked_experts_meet_their_kernel(format, inputs):
    n, k, rows = 128, 256, 19
    keys = jax.random.split(jax.random.key(5), 4)
    lhs = jax.random.normal(keys[0], (rows, k)).astype(jnp.bfloat16)
    w = quantize((jax.random.normal(keys[1], (E, n, k)) / 8).astype(jnp.bfloat16), format)
    bias = jax.random.normal(keys[2], (E, n)).astype(jnp.bfloat16)
    cotangent = jax.random.normal(keys[3], (rows, n))
    activation = inputs and ActivationFormat(qformat(inputs))
    args = dict(group_sizes=jnp.asarray(SIZES), bias=bias, activation_format=activation)
    expected = ragged_dot(lhs, w, **args, out_dtype=jnp.float32)
    packed = qjax.prepack(w)
    assert packed.format.storage == ("wgmma8" if format == "mxfp4" else "wgmma")
    np.testing.assert_array_equal(packed.dequantize(), w.dequantize())

    def loss(x, w):
        return jnp.sum(ragged_dot(x, w, **args).astype(jnp.float32) * cotangent)

    gradient = jax.grad(loss)(lhs, w)
    with testing.interpret(), simulate_gpu(), qjax.require_kernels():
        y = ragged_dot(lhs, packed, **args)
        found = jax.grad(loss)(lhs, packed)
    assert y.dtype == lhs.dtype and not np.asarray(y[SIZES.sum() :], np.float32).any()
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-7, atol=2**-5)
    np.testing.assert_allclose(
        found.astype(jnp.float32), gradient.astype(jnp.float32), rtol=2**-6, atol=2**-5
    )


def test_why_experts_have_no_kernel():
    lhs, rhs, _ = _arrays(6)
    lhs = lhs.astype(jnp.bfloat16)
    rhs = jnp.resize(rhs, (E, 64, 64))
    block = ActivationFormat(qformat("fp8_e4m3_1x128"))
    packed = qjax.prepack(quantize(rhs, "mxfp4"))
    for word, w, x, args in (
        ("prepack\\(w\\) once", quantize(rhs, "mxfp4"), lhs, {}),
        ("need bfloat16 x", packed, lhs.astype(jnp.float16), {}),
        ("lhs' dtype bfloat16; found float32", packed, lhs, dict(out_dtype=jnp.float32)),
        ("with float8_e4m3fn", packed, lhs, dict(activation_format=block)),
    ):
        with simulate_gpu(), pytest.raises(ValueError, match=f"ragged_dot: .*{word}"):
            args = args | dict(implementation="pallas_mosaic_gpu")
            ragged_dot(x, w, jnp.asarray(SIZES), **args)


CLAMPED = GatedActivation(alpha=1.702, offset=1.0, limit=1.5)


@pytest.mark.parametrize("inputs", [None, "fp8_e4m3_channel"])
def test_alternating_experts_meet_one_kernel(inputs):
    n, k, rows = 128, 256, 17
    keys = jax.random.split(jax.random.key(8), 4)
    lhs = jax.random.normal(keys[0], (rows, k)).astype(jnp.bfloat16)
    w = quantize((jax.random.normal(keys[1], (E, 2 * n, k)) / 8).astype(jnp.bfloat16), "mxfp4")
    bias = jax.random.normal(keys[2], (E, 2 * n)).astype(jnp.bfloat16)
    cotangent = jax.random.normal(keys[3], (rows, n))
    options = dict(
        activation=CLAMPED, activation_format=inputs and ActivationFormat(qformat(inputs))
    )
    sizes = jnp.asarray(SIZES)
    products = _loop(lhs, w.dequantize(), bias)
    if inputs:
        codes = quantize_activation(lhs, options["activation_format"])
        products = _loop(codes.dequantize(jnp.float32), w.dequantize(), bias)
    gate, up = np.minimum(products[:, ::2], 1.5), np.clip(products[:, 1::2], -1.5, 1.5)
    expected = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)

    def loss(x, bias, w):
        y = gated_ragged_dot(x, w, None, sizes, bias=bias, **options)
        return jnp.sum(y.astype(jnp.float32) * cotangent), y

    gradients, _ = jax.grad(loss, (0, 1), has_aux=True)(lhs, bias, w)
    packed = qjax.prepack(w, pairs=True)
    assert packed.format.storage == "wgmma8_pairs"
    np.testing.assert_array_equal(packed.dequantize(), w.dequantize())
    with testing.interpret(), simulate_gpu(), qjax.require_kernels():
        found, y = jax.grad(loss, (0, 1), has_aux=True)(lhs, bias, packed)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-7, atol=2**-7)
    for one, other in zip(found, gradients, strict=True):
        np.testing.assert_allclose(
            one.astype(jnp.float32), other.astype(jnp.float32), rtol=2**-6, atol=2**-4
        )
    plain = gated_ragged_dot(lhs.astype(jnp.float32), w, None, sizes, bias=bias, **options)
    np.testing.assert_allclose(plain, expected, rtol=1e-4, atol=1e-4)
    if inputs is None:
        hidden_stays_fp8(lhs, w, packed, sizes, bias, expected)
    with pytest.raises(ValueError, match="pass up=None"):
        gated_ragged_dot(lhs, w, w, sizes, bias=bias)


def hidden_stays_fp8(lhs, w, packed, sizes, bias, hidden):
    """The whole layer, with a product that takes the hidden values `hidden`."""
    keys = jax.random.split(jax.random.key(9), 3)
    down = quantize(jax.random.normal(keys[0], (E, 128, hidden.shape[1])) / 4, "mxfp4")
    down = dataclasses.replace(down, dtype="bfloat16")
    bias2 = jax.random.normal(keys[1], (E, 128)).astype(jnp.bfloat16)
    cotangent = jax.random.normal(keys[2], (lhs.shape[0], 128))

    def loss(x, bias, bias2, *w):
        options = dict(activation=CLAMPED, bias=bias, down_bias=bias2)
        y = gated_ragged_mlp(x, w[0], None, w[1], sizes, **options).astype(jnp.float32)
        return jnp.sum(y * cotangent), y

    run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    (_, unfused), gradients = run(lhs, bias, bias2, w, down)
    kernels = packed, qjax.prepack(down)
    with testing.interpret(), simulate_gpu(), qjax.require_kernels():
        (_, y), found = run(lhs, bias, bias2, *kernels)
    expected = _loop(hidden, down.dequantize(), bias2)
    np.testing.assert_allclose(y, expected, rtol=2**-7, atol=2**-6)
    np.testing.assert_allclose(unfused, expected, rtol=2**-6, atol=2**-4)
    for one, other in zip(found, gradients, strict=True):
        one, other = (np.asarray(g, np.float32) for g in (one, other))
        assert np.linalg.norm(one - other) <= 2**-6 * np.linalg.norm(other)


@pytest.mark.parametrize("format", ["mxfp4", BF16_SCALES])
def test_gated_experts_meet_one_kernel(format):
    n, k, rows = 64, 128, 17
    keys = jax.random.split(jax.random.key(7), 4)
    lhs = jax.random.normal(keys[0], (rows, k)).astype(jnp.bfloat16)
    gate, up = (
        quantize((jax.random.normal(key, (E, n, k)) / 8).astype(jnp.bfloat16), format)
        for key in keys[1:3]
    )
    cotangent = jax.random.normal(keys[3], (rows, n))
    sizes = jnp.asarray(SIZES)
    expected = gated_ragged_dot(lhs.astype(jnp.float32), gate, up, sizes)

    def loss(x, *w):
        return jnp.sum(gated_ragged_dot(x, *w, sizes).astype(jnp.float32) * cotangent)

    gradient = jax.grad(loss)(lhs, gate, up)
    packed = qjax.prepack(gate), qjax.prepack(up)
    with testing.interpret(), simulate_gpu(), qjax.require_kernels():
        y = gated_ragged_dot(lhs, *packed, sizes)
        found = jax.grad(loss)(lhs, *packed)
    assert y.dtype == lhs.dtype and not np.asarray(y[SIZES.sum() :], np.float32).any()
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-7, atol=2**-5)
    np.testing.assert_allclose(
        found.astype(jnp.float32), gradient.astype(jnp.float32), rtol=2**-6, atol=2**-4
    )
