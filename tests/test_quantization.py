"""The quantizer against NumPy and ml_dtypes: grids, ties, special values, scale rules, bounds."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax import FORMATS, QArray, qformat, quantize, requantize
from qjax.formats import ELEMENTS, WHOLE, ActivationFormat
from qjax.quantization import (
    Grid,
    compute_grid,
    quantize_activation,
    quantize_dequantize,
    refine_blocks,
    round_to_element,
)

ML_DTYPES = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float4_e2m1fn": ml_dtypes.float4_e2m1fn,
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", sorted(ML_DTYPES))
def test_rounding_equals_ml_dtypes_within_the_range(name):
    """Every value of the grid, every midpoint (a tie) and its float32 neighbours."""
    dtype, element = ML_DTYPES[name], ELEMENTS[name]
    codes = np.arange(2**element.bits, dtype=np.uint8)
    values = codes.view(dtype) if element.bits == 8 else codes.astype(np.uint8).view(dtype)
    grid = np.unique(values.astype(np.float32)[np.isfinite(values.astype(np.float32))])
    ties = (grid[1:].astype(np.float64) + grid[:-1]).astype(np.float32) / 2
    x = np.concatenate([grid, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)])
    x = x.astype(np.float32)
    expected = x.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(round_to_element(jnp.asarray(x), element), expected)


def test_fp4_ties_go_to_the_even_mantissa():
    x = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0], np.float32)
    expected = [0, 1, 1, 2, 2, 4, 4, 0, -4]
    np.testing.assert_array_equal(
        round_to_element(jnp.asarray(x), ELEMENTS["float4_e2m1fn"]), expected
    )


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_round_ties_to_even_and_saturate(bits):
    element = ELEMENTS[f"int{bits}"]
    x = np.array([0.5, 1.5, -0.5, -1.5, 1e9, -1e9, np.inf, -np.inf, np.nan], np.float32)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    expected = [0, min(2, high), 0, -2, high, low, high, low, 0]
    np.testing.assert_array_equal(round_to_element(jnp.asarray(x), element), expected)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"])
def test_floats_saturate_and_keep_nan(name):
    element = ELEMENTS[name]
    x = jnp.asarray([1e30, -1e30, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    nan = np.nan if element.bits == 8 else 0.0
    expected = [element.max, -element.max, element.max, -element.max, nan]
    np.testing.assert_array_equal(round_to_element(x, element), expected)


def test_subnormals_of_fp8():
    x = np.array([2.0**-9, 2.0**-10, 1.5 * 2.0**-9, 2.0**-11], np.float32)
    expected = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(
        round_to_element(jnp.asarray(x), ELEMENTS["float8_e4m3fn"]), expected
    )
    assert expected[1] == 0 and expected[2] == 2.0**-8


def by_hand(x, bits, group):
    """Symmetric integers as compressed-tensors has them: scale = amax / ((2**bits - 1) / 2)."""
    g = x.reshape(x.shape[0], -1, group)
    scale = np.abs(g).max(-1, keepdims=True) / np.float32((2**bits - 1) / 2)
    q = np.clip(np.round(g / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return scale[..., 0], (q * scale).reshape(x.shape).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 256])
@pytest.mark.parametrize("jitted", [False, True])
def test_symmetric_groups(bits, group, jitted):
    x = normal(24, 256)
    run = jax.jit(quantize, static_argnums=1) if jitted else quantize
    q = run(jnp.asarray(x), f"int{bits}_1x{group}")
    scale, values = by_hand(x, bits, group)
    np.testing.assert_array_equal(q.scale, scale)
    np.testing.assert_array_equal(q.dequantize(), values)
    assert q.nbytes == 24 * 256 * bits // 8 + 4 * scale.size == q.format.nbytes((24, 256))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_groups(bits):
    x = normal(8, 64) + 0.7
    q = quantize(jnp.asarray(x), f"int{bits}_1x32_asym")
    g = x.reshape(8, 2, 32)
    high, low = np.maximum(g.max(-1), 0), np.minimum(g.min(-1), 0)
    scale = ((high - low) / np.float32(2**bits - 1)).astype(np.float32)
    zero = np.clip(
        np.round(-(2 ** (bits - 1)) - low / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    )
    np.testing.assert_array_equal(q.scale, scale)
    np.testing.assert_array_equal(q.zero_point, zero)
    codes = np.round(g / scale[..., None]) + zero[..., None]
    codes = np.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    expected = (codes - zero[..., None]) * scale[..., None]
    np.testing.assert_array_equal(q.dequantize(), expected.reshape(x.shape).astype(np.float32))


def test_minimum_offset_keeps_both_ends():
    x = normal(4, 64) + 3
    q = quantize(jnp.asarray(x), "int4_1x32_min")
    g = np.asarray(q.dequantize()).reshape(4, 2, 32)
    np.testing.assert_allclose(g.max(-1), x.reshape(4, 2, 32).max(-1), rtol=1e-6)


def test_short_last_blocks():
    """576 rows make five blocks of 128, the last of 64 rows."""
    x = normal(576, 192)
    q = quantize(jnp.asarray(x), "fp8_e4m3_128x128")
    assert q.scale.shape == (5, 2)
    np.testing.assert_array_equal(q.scale[4, 1], np.abs(x[512:, 128:]).max() / np.float32(448))
    block = (x[512:, 128:] / np.asarray(q.scale)[4, 1]).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(q.qvalue)[512:, 128:], block)


def test_power_of_two_scales():
    x = np.diag([448.0, 449.0, 1.0, 0.5]).astype(np.float32)
    rounded_up = quantize(jnp.asarray(x), "fp8_e4m3_channel_ue8m0").scale.astype(jnp.float32)
    np.testing.assert_array_equal(np.ravel(rounded_up), [1, 2, 2.0**-8, 2.0**-9])
    # Microscaling floors amax's exponent, once amax is rounded up from 1.75 * 2**e.
    x = np.zeros((4, 32), np.float32)
    x[:, 0] = [6.0, 6.99, 7.0, 4.0]
    floored = quantize(jnp.asarray(x), "mxfp4").scale.astype(jnp.float32)
    np.testing.assert_array_equal(np.ravel(floored), [1, 1, 2, 1])


def test_nvfp4_maps_the_largest_block_scale_to_448():
    x = normal(16, 64)
    q = quantize(jnp.asarray(x), "nvfp4")
    amax = np.abs(x).max()
    np.testing.assert_allclose(q.global_scale, [[amax / (6 * 448)]], rtol=1e-6)
    assert float(jnp.max(q.scale.astype(jnp.float32))) == 448
    scale = np.abs(x.reshape(16, 4, 16)).max(-1) / np.float32(6) / np.asarray(q.global_scale)
    np.testing.assert_array_equal(
        q.scale.astype(jnp.float32), scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )


@pytest.mark.parametrize(
    "name", ["int4_1x32", "int4_1x32_asym", "mxfp4", "nvfp4", "mxfp8", "fp8_e4m3_128x128"]
)
def test_zero_blocks_infinities_and_nan(name):
    x = normal(4, 64)
    x[0] = 0
    zero = quantize(jnp.zeros((4, 64)), name)
    np.testing.assert_array_equal(zero.dequantize(), np.zeros((4, 64)))
    x[1, 0] = np.inf
    y = np.asarray(quantize_dequantize(jnp.asarray(x), name))
    assert np.isfinite(y).all() and y[1, 0] > 0 and y[1, 0] == y[1].max()
    np.testing.assert_array_equal(y[0], 0)
    x[2, 40] = np.nan
    assert np.isnan(np.asarray(quantize_dequantize(jnp.asarray(x), name))[2, 40])


HALF_STEP = {"int2_1x32", "int3_1x64", "int4_1x32", "int4_1x32_asym", "int8_channel", "int4_tensor"}


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(HALF_STEP)),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-30, 30),
)
def test_integer_error_is_at_most_half_a_step(name, seed, exponent):
    x = np.ldexp(normal(3, 64, seed=seed), exponent)
    q = quantize(jnp.asarray(x), name)
    block = q.format.block_size(q.shape)
    scale = np.repeat(np.repeat(np.asarray(q.scale), block[0], 0), block[1], 1)[:3, :64]
    # amax itself maps half a step beyond the symmetric grid's end.
    assert (np.abs(np.asarray(q.dequantize()) - x) <= 0.5001 * scale).all()


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(
        ["mxfp8", "fp8_e4m3_128x128", "fp8_e4m3_channel", "fp8_e5m2_tensor", "mxfp4", "nvfp4"]
    ),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-20, 20),
)
def test_float_error_is_at_most_half_an_ulp(name, seed, exponent):
    x = np.ldexp(normal(3, 64, seed=seed), exponent)
    q = quantize(jnp.asarray(x), name)
    y = np.asarray(q.dequantize())
    m, smallest = q.format.spec.mantissa_bits, 2.0**q.format.spec.min_exponent
    block = q.format.block_size(q.shape)
    scale = np.asarray(q.scale.astype(jnp.float32))
    if q.global_scale is not None:
        scale = scale * np.asarray(q.global_scale)
    scale = np.repeat(np.repeat(scale, block[0], 0), block[1], 1)[:3, :64]
    # A scale that is rounded may leave values a little beyond the grid's end: they lose up to 2**-4.
    bound = np.maximum(np.abs(x) * (2.0 ** -(m + 1) + 2.0**-4), scale * smallest * 2.0 ** -(m + 1))
    assert (np.abs(y - x) <= bound).all()


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(["int4_1x32", "int8_channel", "mxfp4", "mxfp8", "nvfp4", "int4_1x32_min"]),
    seed=st.integers(0, 2**31),
)
def test_values_on_the_grid_are_kept(name, seed):
    q = quantize(jnp.asarray(normal(4, 64, seed=seed)), name)
    grid = Grid(q.scale, q.zero_point, q.minimum, q.global_scale)
    again = quantize(q.dequantize(jnp.float32), name, grid=grid)
    np.testing.assert_array_equal(np.asarray(again.dequantize()), np.asarray(q.dequantize()))


def test_group_must_divide_k():
    with pytest.raises(ValueError, match=r"quantize: group size 128 must divide K = 576"):
        quantize(jnp.zeros((8, 576)), "int4_1x128")
    with pytest.raises(ValueError, match=r"K must be a multiple of 2"):
        quantize(jnp.zeros((8, 33)), "int4_channel")
    with pytest.raises(ValueError, match="floating"):
        quantize(jnp.zeros((8, 32), jnp.int32), "int8_channel")


def test_refined_blocks_hold_the_same_values():
    q = quantize(jnp.asarray(normal(96, 320)), "fp8_e4m3_128x128")
    fine = refine_blocks(q, (32, 64))
    assert fine.scale.shape == (3, 5)
    np.testing.assert_array_equal(fine.dequantize(), q.dequantize())
    with pytest.raises(ValueError, match="must divide"):
        refine_blocks(q, (48, 64))


def test_requantize_quantizes_the_values():
    q = quantize(jnp.asarray(normal(8, 64)), "int8_1x32")
    again = requantize(q, "mxfp4")
    np.testing.assert_array_equal(
        again.dequantize(), quantize(q.dequantize(), "mxfp4").dequantize()
    )


def test_static_activations_use_the_given_scale_and_bounds_hold():
    x = jnp.asarray(normal(5, 64) * 100)
    static = ActivationFormat(qformat("fp8_e4m3_tensor"), static=True)
    q = quantize_activation(x, static, scale=jnp.float32(0.5))
    expected = (np.clip(np.asarray(x) / 0.5, -448, 448)).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(q.qvalue, expected)
    with pytest.raises(ValueError, match="static activation format needs scale"):
        quantize_activation(x, static)
    bounded = ActivationFormat(qformat("fp8_e4m3_channel"), amax_min=1.0, amax_max=50.0)
    scale = quantize_activation(x, bounded).scale
    np.testing.assert_array_equal(
        scale[:, 0], np.minimum(np.abs(np.asarray(x)).max(1), 50) / np.float32(448)
    )
    floor = quantize_activation(x * 1e-9, bounded).scale
    np.testing.assert_array_equal(floor, np.full((5, 1), 1 / np.float32(448)))


def test_learned_offsets_move_the_rounding():
    x = jnp.asarray([[0.4, 0.6, -0.4, 1.4]], jnp.float32)
    grid = Grid(jnp.ones((1, 1)))
    up = quantize(x, "int8_channel", grid=grid, rounding=jnp.full(x.shape, 0.2))
    np.testing.assert_array_equal(up.qvalue, [[1, 1, 0, 2]])


def test_negative_scales_and_column_order_dequantize():
    format = dataclasses.replace(qformat("int4_1x32"), block_shape=(1, 32))
    codes = np.arange(64, dtype=np.uint8).reshape(1, 64) % 16
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    perm = np.random.default_rng(0).permutation(64).astype(np.int32)
    q = QArray.from_parts(
        format,
        jnp.asarray(packed),
        jnp.asarray([[-2.0, 0.5]], jnp.float32),
        column_perm=jnp.asarray(perm),
        dtype="float32",
    )
    stored = (codes.astype(np.float32) - 8) * np.repeat([-2.0, 0.5], 32)
    logical = np.empty_like(stored)
    logical[:, perm] = stored
    np.testing.assert_array_equal(q.dequantize(), logical)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_named_format_round_trips_and_counts_its_bytes(name):
    x = jnp.asarray(normal(2, 160, 256))
    q = quantize(x, name)
    q.validate()
    assert q.shape == (2, 160, 256) and q.nbytes == q.format.nbytes((2, 160, 256))
    error = np.linalg.norm(np.asarray(q.dequantize()) - np.asarray(x)) / np.linalg.norm(x)
    bits = q.format.bits
    bound = {2: 0.8, 3: 0.4, 4: 0.25, 8: 0.06}[bits]
    assert error < bound and (bits == 2 or error > 0)
    block = compute_grid(x, q.format).scale.shape
    assert block == q.format.scale_shape((2, 160, 256)) and WHOLE == -1
