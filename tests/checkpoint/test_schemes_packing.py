"""Packings of integer codes: decoded against Python's big integers, for random shapes and groups."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.checkpoint import _encode
from qjax.checkpoint.schemes._base import TensorInfo
from qjax.checkpoint.schemes._compressed_tensors import INT, PACKED
from qjax.checkpoint.schemes._floating import FP8, FP8_BLOCK, NVFP4_CT, NVFP4_MODELOPT
from qjax.checkpoint.schemes._gptq import AWQ_GEMM, AWQ_GEMV, GPTQ_V1, GPTQ_V2
from qjax.formats import WHOLE, integer_format, qformat
from qjax.qarray import QArray

fuzzed = settings(max_examples=25, deadline=None)
AWQ_COLUMN = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each nibble of an AWQ word, lowest nibble first."""


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint codes [R, M] as int32 [R, ceil(M*bits/32)]: each row one big little-endian integer."""
    size = -(-codes.shape[1] * bits // 32) * 4
    rows = []
    for row in codes.tolist():
        value = sum(code << (i * bits) for i, code in enumerate(row))
        rows.append(np.frombuffer(value.to_bytes(size, "little"), np.int32))
    return np.array(rows)


def padded_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Words of 32 // bits whole codes each: compressed-tensors before 0.18."""
    per_word = 32 // bits
    blocks = np.array_split(codes, range(per_word, codes.shape[1], per_word), axis=1)
    return np.concatenate([words(block, bits) for block in blocks], axis=1)


def signed(w: QArray) -> np.ndarray:
    """Signed codes [N, K] in logical order."""
    return _encode.unsigned_codes(w).astype(np.int32) - 2 ** (w.format.bits - 1)


def build(parts: dict, format) -> QArray:
    w = QArray(**parts, format=format)
    w.validate()
    return w


@st.composite
def weights(draw, bits=(2, 3, 4, 8), n_multiple=32):
    """(bits, group, codes u [N, K], zeros [N, G], scales [N, G], group of each column)."""
    b = draw(st.sampled_from(bits))
    group = draw(st.sampled_from((32, 64, 96)))
    n, groups = n_multiple * draw(st.integers(1, 3)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    k = group * groups
    codes = rng.integers(0, 2**b, (n, k))
    zeros = rng.integers(0, 2**b, (n, groups))
    scales = rng.normal(size=(n, groups)).astype(np.float16)  # of either sign, as AutoRound's
    return b, group, codes, zeros, scales, rng.permutation(np.arange(k) // group).astype(np.int32)


def expected(codes, zeros, scales, index):
    return (codes - zeros[:, index]).astype(np.float32) * scales.astype(np.float32)[:, index]


def dequantized(w: QArray, group: int) -> np.ndarray:
    """Plain NumPy on the canonical parts, columns put back into logical order."""
    k = w.shape[1]
    stored = np.arange(k) if w.column_perm is None else w.column_perm
    index = np.empty(k, int)
    index[stored] = np.arange(k) // group
    zero = np.zeros(w.scale.shape, np.int32) if w.zero_point is None else w.zero_point
    return expected(signed(w), zero.astype(np.int32), w.scale, index)


@fuzzed
@given(weights(), st.booleans(), st.booleans(), st.booleans())
def test_gptq(case, v2, act_order, whole):
    bits, group, codes, zeros, scales, g_idx = case
    if whole:
        group, zeros, scales = codes.shape[1], zeros[:, :1], scales[:, :1]
        g_idx = np.zeros_like(g_idx)
    index = g_idx if act_order else np.arange(codes.shape[1]) // group
    tensors = {
        "qweight": words(codes, bits).T,
        "qzeros": words(zeros.T, bits),
        "scales": scales.T,
    }
    if act_order:
        tensors["g_idx"] = g_idx
    block = (1, WHOLE if whole else group)
    format = integer_format(bits, block, offset="zero_point", scale_dtype="float16")
    w = build((GPTQ_V2 if v2 else GPTQ_V1).decode(tensors, format, codes.shape), format)
    want = expected(codes, zeros + (not v2), scales, index)
    np.testing.assert_array_equal(dequantized(w, group), want)
    again = _encode.gptq(w, version="gptq_v2" if v2 else "gptq")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)


@fuzzed
@given(weights(bits=(4,)), st.booleans())
def test_awq_gemm(case, symmetric):
    _, group, codes, zeros, scales, _ = case
    zeros = np.full_like(zeros, 8) if symmetric else zeros

    def packed(columns):  # [R, N]: eight neighbours to a word, in AWQ's order
        shuffled = columns.reshape(len(columns), -1, 8)[:, :, AWQ_COLUMN]
        return words(shuffled.reshape(columns.shape), 4)

    tensors = {"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": scales.T}
    offset = None if symmetric else "zero_point"
    format = integer_format(4, (1, group), offset=offset, scale_dtype="float16")
    w = build(AWQ_GEMM.decode(tensors, format, codes.shape), format)
    index = np.arange(codes.shape[1]) // group
    np.testing.assert_array_equal(dequantized(w, group), expected(codes, zeros, scales, index))
    for name, tensor in _encode.awq(w).items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


@pytest.mark.parametrize(
    ("group", "k", "columns"), [(128, 256, 1), (64, 320, 2), (32, 96, 4), (32, 1056, 8)]
)
def test_awq_gemv_pads_its_zero_points(group, k, columns):
    rng = np.random.default_rng(group)
    n, groups = 16, k // group
    codes, zeros = rng.integers(0, 16, (n, k)), rng.integers(0, 16, (n, groups))
    scales = rng.normal(size=(n, groups)).astype(np.float16)
    padding = ((0, 0), (0, columns * 8 - groups))
    tensors = {
        "qweight": words(codes, 4),
        "qzeros": words(np.pad(zeros, padding), 4),
        "scales": np.pad(scales, padding),
    }
    format = integer_format(4, (1, group), offset="zero_point", scale_dtype="float16")
    w = build(AWQ_GEMV.decode(tensors, format, (n, k)), format)
    want = expected(codes, zeros, scales, np.arange(k) // group)
    np.testing.assert_array_equal(dequantized(w, group), want)


@fuzzed
@given(
    weights(bits=(2, 3, 4, 5, 6, 7, 8), n_multiple=8), st.booleans(), st.booleans(), st.booleans()
)
def test_pack_quantized(case, dense, asymmetric, act_order):
    bits, group, codes, zeros, scales, g_idx = case
    pack = words if dense else padded_words
    tensors = {
        "weight_packed": pack(codes, bits),
        "weight_scale": scales,
        "weight_shape": np.array(codes.shape),
    }
    zeros = zeros if asymmetric else np.full_like(zeros, 2 ** (bits - 1))
    if asymmetric:
        tensors["weight_zero_point"] = pack(zeros.T, bits).T
    if act_order:
        tensors["weight_g_idx"] = g_idx
    offset = "zero_point" if asymmetric else None
    format = integer_format(bits, (1, group), offset=offset, scale_dtype="float16")
    w = build(PACKED.decode(tensors, format, codes.shape), format)
    index = g_idx if act_order else np.arange(codes.shape[1]) // group
    np.testing.assert_array_equal(dequantized(w, group), expected(codes, zeros, scales, index))
    if dense:
        for name, tensor in _encode.pack_quantized(w).items():
            if name != "weight_g_idx" or act_order:
                np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


@fuzzed
@given(weights(bits=(4, 8), n_multiple=8), st.booleans(), st.booleans())
def test_int_quantized(case, asymmetric, act_order):
    bits, group, codes, zeros, scales, g_idx = case
    half = 2 ** (bits - 1)
    zeros = zeros if asymmetric else np.full_like(zeros, half)
    tensors = {"weight": (codes - half).astype(np.int8), "weight_scale": scales}
    if asymmetric:
        tensors["weight_zero_point"] = (zeros - half).astype(np.int8)
    if act_order:
        tensors["weight_g_idx"] = g_idx
    offset = "zero_point" if asymmetric else None
    format = integer_format(bits, (1, group), offset=offset, scale_dtype="float16")
    w = build(INT.decode(tensors, format, codes.shape), format)
    index = g_idx if act_order else np.arange(codes.shape[1]) // group
    np.testing.assert_array_equal(dequantized(w, group), expected(codes, zeros, scales, index))


def test_an_unused_act_order_is_none():
    codes = np.arange(64 * 8).reshape(8, 64) % 16
    tensors = {
        "weight_packed": words(codes, 4),
        "weight_scale": np.ones((8, 2), np.float32),
        "weight_g_idx": np.full(64, -1, np.int32),
    }
    parts = PACKED.decode(tensors, integer_format(4, (1, 32)), (8, 64))
    assert parts.keys() == {"qvalue", "scale"}
    with pytest.raises(ValueError, match="every group must have 32 columns"):
        tensors["weight_g_idx"] = np.array([0] * 31 + [1] * 33, np.int32)
        PACKED.decode(tensors, integer_format(4, (1, 32)), (8, 64))


def test_decoding_many_rows_in_chunks(monkeypatch):
    from qjax.checkpoint.schemes import _bits, _gptq

    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (96, 64))
    g_idx = rng.permutation(np.arange(64) // 32).astype(np.int32)
    gptq = {
        "qweight": words(codes, 4).T,
        "qzeros": np.zeros((2, 12), np.int32),
        "scales": np.ones((2, 96), np.float16),
        "g_idx": g_idx,
    }
    awq = gptq | {"qweight": words(codes.T[:, np.tile(AWQ_COLUMN, 12) + np.arange(96) // 8 * 8], 4)}
    format = integer_format(4, (1, 32), offset="zero_point", scale_dtype="float16")
    whole = GPTQ_V2.decode(gptq, format, (96, 64)), AWQ_GEMM.decode(awq, format, (96, 64))
    monkeypatch.setattr(_bits, "_CHUNK", 640)
    monkeypatch.setattr(_gptq, "_CHUNK", 320)
    chunked = GPTQ_V2.decode(gptq, format, (96, 64)), AWQ_GEMM.decode(awq, format, (96, 64))
    for a, b in zip(whole, chunked, strict=True):
        np.testing.assert_array_equal(a["qvalue"], b["qvalue"])
    np.testing.assert_array_equal(signed(build(whole[1], format)) + 8, codes)


def test_global_scales_divide_or_multiply():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (4, 16), dtype=np.uint8)
    scale = np.ones((4, 2), "float32").astype(qformat("nvfp4").scale_dtype)
    tensors = {"weight_packed": codes, "weight_scale": scale}
    tensors |= {"weight_global_scale": np.float32([448]), "input_global_scale": np.float32([4])}
    parts = NVFP4_CT.decode(tensors, qformat("nvfp4"), (4, 32))
    assert parts["global_scale"] == np.float32(1) / np.float32(448)
    assert parts["activation_scale"] == 0.25
    tensors = {"weight": codes, "weight_scale": scale}
    tensors |= {"weight_scale_2": np.float32(0.5), "input_scale": np.float32(0.125)}
    parts = NVFP4_MODELOPT.decode(tensors, qformat("nvfp4"), (4, 32))
    assert parts["global_scale"] == 0.5 and parts["activation_scale"] == 0.125
    for bad in (0.0, -1.0, np.inf, np.nan):
        tensors = {"weight_packed": codes, "weight_scale": scale}
        with pytest.raises(ValueError, match="weight_global_scale must be positive"):
            NVFP4_CT.decode(
                tensors | {"weight_global_scale": np.float32([bad])}, qformat("nvfp4"), (4, 32)
            )


def test_fp8_blocks_end_short_and_are_never_inferred():
    format = qformat("fp8_e4m3_128x128")
    weight = np.zeros((192, 160), format.element)
    parts = FP8_BLOCK.decode(
        {"weight": weight, "weight_scale_inv": np.ones((2, 2), np.float32)}, format, weight.shape
    )
    assert parts["scale"].shape == (2, 2)
    with pytest.raises(ValueError, match=r"weight_scale_inv must have shape \[2, 2\]"):
        FP8_BLOCK.decode(
            {"weight": weight, "weight_scale_inv": np.ones((3, 2), np.float32)},
            format,
            weight.shape,
        )


def test_transformers_own_fp8_names():
    available = ["a.weight", "a.weight_scale_inv", "a.activation_scale"]
    assert FP8.tensor_names("a", dict.fromkeys(available)) == {
        "weight": "a.weight",
        "weight_scale": "a.weight_scale_inv",
        "input_scale": "a.activation_scale",
    }
    with pytest.raises(ValueError, match=r"a: fp8 needs \['a.weight_scale'\]"):
        FP8.tensor_names("a", {"a.weight": None})


BAD = {
    "rows": (GPTQ_V1, {"qweight": (8, 33)}, r"qweight must have shape \[8, 32\]"),
    "zeros": (GPTQ_V1, {"qzeros": (3, 4)}, r"qzeros must have shape \[2, 4\]"),
    "scales": (AWQ_GEMM, {"scales": (2, 31)}, r"scales must have shape \[2, 32\]"),
    "act order": (GPTQ_V1, {"g_idx": (63,)}, r"g_idx must have shape \[64\]"),
    "packed": (PACKED, {"weight_packed": (32, 9)}, r"weight_packed must have shape \[32, 8\]"),
    "scale": (PACKED, {"weight_scale": (32, 3)}, r"weight_scale must have shape \[32, 2\]"),
    "zero": (PACKED, {"weight_zero_point": (5, 2)}, r"weight_zero_point must have shape \[4, 2\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_shapes_are_named(name):
    codec, change, message = BAD[name]
    shapes = {
        "qweight": (64, 4) if codec is AWQ_GEMM else (8, 32),
        "qzeros": (2, 4),
        "scales": (2, 32),
        "weight_packed": (32, 8),
        "weight_scale": (32, 2),
        "weight_zero_point": (4, 2),
    }
    dtypes = {"scales": np.float16, "weight_scale": np.float16}
    tensors = {k: np.zeros(v, dtypes.get(k, np.int32)) for k, v in (shapes | change).items()}
    format = integer_format(4, (1, 32), offset="zero_point", scale_dtype="float16")
    with pytest.raises(ValueError, match=message):
        codec.decode(tensors, format, (32, 64))


@pytest.mark.parametrize("codec", [GPTQ_V1, AWQ_GEMM, PACKED, INT, FP8, NVFP4_CT])
def test_wrong_dtypes_are_named(codec):
    format = qformat("int4_1x32")
    for suffix, allowed in codec.dtypes.items():
        if suffix not in (*codec.required, *codec.optional):
            continue
        infos = {s: TensorInfo(codec.dtypes.get(s, ("F32",))[0], (1,)) for s in codec.required}
        codec.complete(format, infos, "m.x")
        infos[suffix] = TensorInfo("BOOL", (1,))
        assert "BOOL" not in allowed
        with pytest.raises(ValueError, match=rf"m\.x\.{suffix}: .* found BOOL"):
            codec.complete(format, infos, "m.x")


def test_symmetric_configs_want_symmetric_zero_points():
    tensors = {
        "qweight": np.zeros((8, 32), np.int32),
        "qzeros": np.full((2, 4), 0x77777777, np.int32),
        "scales": np.ones((2, 32), np.float16),
    }
    format = integer_format(4, (1, 32), scale_dtype="float16")
    assert "zero_point" not in GPTQ_V1.decode(tensors, format, (32, 64))
    with pytest.raises(ValueError, match=r"qzeros: the config says symmetric.*found -1\.\.-1"):
        GPTQ_V2.decode(tensors, format, (32, 64))
