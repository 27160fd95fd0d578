"""Formats as data: sizes, names, refusals; packing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax import FORMATS, QArray, QFormat, qformat, quantize
from qjax.qarray import pack, pack_bits, unpack, unpack_bits

jitted_pack_bits = jax.jit(pack_bits, static_argnums=1)
jitted_unpack_bits = jax.jit(unpack_bits, static_argnums=1)


def test_sizes():
    assert qformat("int3_1x32").nbytes((4, 64)) == 4 * 64 * 3 // 8 + 4 * 2 * 4
    assert qformat("mxfp4").nbytes((4, 64)) == 4 * 32 + 4 * 2
    assert qformat("nvfp4").nbytes((2, 4, 64)) == 2 * (4 * 32 + 4 * 4 + 4)
    assert qformat("int4_1x32_asym").nbytes((4, 64)) == 4 * 32 + 4 * 2 * (4 + 1)
    assert qformat("fp8_e4m3_128x128").scale_shape((576, 7168)) == (5, 56)
    assert qformat("int8_tensor").scale_shape((3, 5, 7)) == (3, 1, 1)


def test_names():
    assert qformat("int5_1x48_asym") == QFormat(
        "int5", (1, 48), offset="zero_point", storage="packed"
    )
    assert qformat("int4_channel").block_shape == (1, -1)
    assert set(FORMATS) >= {"mxfp4", "nvfp4", "mxfp8", "fp8_e4m3_128x128", "fp8_e5m2_tensor_ue8m0"}
    assert qformat("int2_8x16_min").block_shape == (8, 16)
    assert qformat("int2_8x16_min").offset == "minimum"
    for name, format in FORMATS.items():
        assert qformat(name) == format and qformat(format) is format
        assert hash(format) == hash(dataclasses.replace(format))
    with pytest.raises(TypeError):
        FORMATS["mine"] = qformat("mxfp4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        qformat("mxfp4").element = "int4"


@pytest.mark.parametrize(
    "name",
    ["int9_1x32", "int1_1x32", "int4", "int4_", "int4_32", "int4_1x", "int4_1x32_sym", "INT4_1x32",
     "int4_1x32_asym_min", "int4_channel_tensor", "uint4_1x32", "fp8_e4m3_1x64", "mxfp4_asym", ""],
)  # fmt: skip
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=f"unknown format '{name}': use one of"):
        qformat(name)
    with pytest.raises(ValueError, match="block_shape must be two positive sizes"):
        qformat("int4_1x0")


@pytest.mark.parametrize(("bits", "multiple"), [(2, 4), (3, 8), (4, 2), (5, 8), (6, 8), (7, 8)])
def test_rows_fill_whole_bytes(bits, multiple):
    format = qformat(f"int{bits}_channel")
    assert format.k_multiple == multiple
    assert format.storage_shape((5, 3 * multiple)) == (5, 3 * multiple * bits // 8)
    wrong = 3 * multiple + 1
    message = rf"int{bits} packs K in whole bytes: K must be a multiple of {multiple}; found shape \(5, {wrong}\)"
    with pytest.raises(ValueError, match=message):
        format.storage_shape((5, wrong))
    assert qformat("int8_channel").storage_shape((5, wrong)) == (5, wrong)


def test_blocks_of_a_shape():
    blocks = qformat("fp8_e4m3_128x128")
    assert blocks.block_size((576, 100)) == (128, 128)
    assert blocks.scale_shape((2, 576, 100)) == (2, 5, 1)
    assert qformat("fp8_e4m3_1x128").scale_shape((7, 300)) == (7, 3)
    assert qformat("fp8_e4m3_tensor").block_size((576, 100)) == (576, 100)
    assert qformat("int8_channel").scale_shape((2, 7, 300)) == (2, 7, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"element": "int9"}, "element must be one of"),
        ({"block_shape": (0, 1)}, "block_shape must be two positive sizes"),
        ({"scale_dtype": "int8"}, "scale_dtype must be one of"),
        ({"offset": "zero"}, "offset must be"),
        ({"element": "float8_e4m3fn", "offset": "zero_point"}, "only integer elements"),
        ({"scale_rule": "mx"}, "'mx' rule makes float8_e8m0fnu"),
        ({"element": "int4"}, "narrower ones 'packed'"),
        ({"storage": "packed"}, "8-bit elements are stored 'plain'"),
        ({"element": "float4_e2m1fn", "storage": "packed", "offset": "minimum"}, "only integer"),
        ({"block_shape": (1, 32, 1)}, "block_shape must be two positive sizes"),
        ({"block_shape": (-2, 32)}, "or -1 for a whole axis"),
        ({"scale_rule": "ceil"}, "scale_rule must be 'amax' or 'mx'"),
    ],
)
def test_contradictions_are_refused(fields, message):
    good = {"element": "int8", "block_shape": (1, 32)}
    with pytest.raises(ValueError, match=message):
        QFormat(**{**good, **fields})


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), words=st.sampled_from([1, 5]), seed=st.integers(0, 99))
def test_bit_streams_round_trip(bits, words, seed):
    rows = 3
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, 8 * words)).astype(np.uint8)
    packed = np.asarray(jitted_pack_bits(jnp.asarray(codes), bits))
    # Little-endian: bit i of code k is bit k * bits + i of the row's stream.
    stream = (codes[:, :, None] >> np.arange(bits)) & 1
    expected = np.packbits(stream.reshape(rows, -1).astype(np.uint8), axis=-1, bitorder="little")
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(jitted_unpack_bits(jnp.asarray(packed), bits), codes)


@pytest.mark.parametrize(
    "name", ["int2_channel", "int3_channel", "int5_channel", "int8_channel", "mxfp4"]
)
def test_packing_keeps_codes(name):
    format = qformat(name)
    rng = np.random.default_rng(0)
    if format.spec.is_float:
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
        codes = np.tile(values, 8).reshape(2, 64).astype(np.float32)
    else:
        half = 2 ** (format.bits - 1)
        codes = rng.integers(-half, half, (2, 64)).astype(np.int32)
    stored = pack(jnp.asarray(codes), format)
    assert stored.shape == format.storage_shape((2, 64)) and stored.dtype == format.storage_dtype
    back = np.asarray(unpack(stored, format))
    np.testing.assert_array_equal(back, codes)
    np.testing.assert_array_equal(np.signbit(back), np.signbit(codes))


def test_parts_are_validated():
    q = quantize(jnp.ones((4, 64)), "int4_1x32")
    with pytest.raises(ValueError, match=r"scale must be float32\[4, 2\]; found float32\[4, 1\]"):
        QArray.from_parts(q.format, q.qvalue, q.scale[:, :1])
    with pytest.raises(ValueError, match="zero_point must be None"):
        QArray.from_parts(q.format, q.qvalue, q.scale, zero_point=jnp.zeros((4, 2), jnp.int8))
    with pytest.raises(ValueError, match="global_scale must be present"):
        QArray.from_parts(qformat("nvfp4"), q.qvalue, jnp.ones((4, 4), jnp.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"qvalue must be uint8"):
        QArray.from_parts(q.format, q.qvalue.astype(jnp.int8), q.scale)
