"""Canonical parts of a quantized weight as the tensors that each checkpoint format stores.

Each function takes a `QArray` of host arrays [N, K] and returns {tensor name after the module's: array}.
The layouts are those of compressed-tensors 0.20, AutoGPTQ/GPTQModel (v1 and v2), AutoAWQ's GEMM packing,
DeepSeek's fp8 blocks and GPT-OSS's mxfp4 blocks.
"""

import logging

import numpy as np

from qjax.qarray import QArray

_log = logging.getLogger(__name__)

Tensors = dict[str, np.ndarray]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each nibble of an AWQ word, lowest first."""


def unsigned_codes(w: QArray) -> np.ndarray:
    """Integer codes u = q + 2**(bits-1), uint8 [N, K], columns in logical order."""
    bits, q = w.format.bits, np.asarray(w.qvalue)
    if w.format.storage == "plain":
        codes = q.view(np.uint8) ^ np.uint8(128)
    elif 8 % bits == 0:
        mask = np.uint8(2**bits - 1)
        fields = [(q >> np.uint8(shift)) & mask for shift in range(0, 8, bits)]
        codes = np.stack(fields, axis=-1).reshape(w.shape)
    else:
        stream = np.unpackbits(q, axis=-1, bitorder="little").reshape(*w.shape, bits)
        codes = np.packbits(stream, axis=-1, bitorder="little")[..., 0]
    if w.column_perm is None:
        return codes
    logical = np.empty_like(codes)
    logical[:, np.asarray(w.column_perm)] = codes
    return logical


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [R, M] as int32 [R, ceil(M*bits/32)]: a little-endian bit stream along M."""
    rows, count = codes.shape
    if 8 % bits == 0:
        per_byte = 8 // bits
        padded = np.pad(codes, ((0, 0), (0, -count % (32 // bits))))
        groups = padded.reshape(rows, -1, per_byte)
        packed = np.zeros(groups.shape[:2], np.uint8)
        for i in range(per_byte):
            packed |= groups[:, :, i] << np.uint8(i * bits)
    else:
        stream = np.unpackbits(codes[:, :, None], axis=2, bitorder="little")[:, :, :bits]
        stream = stream.reshape(rows, count * bits)
        stream = np.pad(stream, ((0, 0), (0, -(count * bits) % 32)))
        packed = np.packbits(stream, axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<i4")


def unsigned_zero_points(w: QArray) -> np.ndarray:
    """Zero points z + 2**(bits-1), int32 [N, G]; symmetric formats have 2**(bits-1)."""
    half = 2 ** (w.format.bits - 1)
    if w.zero_point is None:
        return np.full(w.scale.shape, half, np.int32)
    return np.asarray(w.zero_point).astype(np.int32) + half


def group_index(w: QArray) -> np.ndarray:
    """Group of each logical column, int32 [K]."""
    k = w.shape[-1]
    groups = (np.arange(k) // w.format.block_size(w.shape)[1]).astype(np.int32)
    if w.column_perm is None:
        return groups
    index = np.empty_like(groups)
    index[np.asarray(w.column_perm)] = groups
    return index


def pack_quantized(w: QArray) -> Tensors:
    """compressed-tensors' packed integers: words along K, zero points packed along N."""
    bits = w.format.bits
    tensors = {
        "weight_packed": pack_words(unsigned_codes(w), bits),
        "weight_scale": np.asarray(w.scale),
        "weight_shape": np.array(w.shape, np.int64),
    }
    if w.zero_point is not None:
        zero = _within(unsigned_zero_points(w), bits)
        tensors["weight_zero_point"] = np.ascontiguousarray(pack_words(zero.T, bits).T)
    if w.column_perm is not None:
        tensors["weight_g_idx"] = group_index(w)
    return tensors


def int_quantized(w: QArray) -> Tensors:
    """compressed-tensors' plain int8, which 4-bit weights with int8 activations use too."""
    half = 2 ** (w.format.bits - 1)
    codes = (unsigned_codes(w).astype(np.int16) - half).astype(np.int8)
    tensors = {"weight": codes, "weight_scale": _tensor_scale(w)}
    if w.zero_point is not None:
        zero = _within(unsigned_zero_points(w), w.format.bits).astype(np.int16) - half
        tensors["weight_zero_point"] = zero.astype(np.int8)
    if w.column_perm is not None:
        tensors["weight_g_idx"] = group_index(w)
    return tensors


def float_quantized(w: QArray) -> Tensors:
    """compressed-tensors' fp8; power-of-two scales become float32, which holds them exactly."""
    scale = _tensor_scale(w)
    wide = scale.astype(np.float32) if scale.dtype.itemsize == 1 else scale
    return {"weight": np.asarray(w.qvalue), "weight_scale": wide}


def nvfp4_pack_quantized(w: QArray) -> Tensors:
    """compressed-tensors' NVFP4, whose global scale divides."""
    return {
        "weight_packed": np.asarray(w.qvalue),
        "weight_scale": np.asarray(w.scale),
        "weight_global_scale": divisor(np.asarray(w.global_scale).reshape(1)),
    }


def mxfp4_pack_quantized(w: QArray) -> Tensors:
    """compressed-tensors' MXFP4, scales as biased exponents."""
    return {
        "weight_packed": np.asarray(w.qvalue),
        "weight_scale": np.asarray(w.scale).view(np.uint8),
    }


def mxfp8_quantized(w: QArray) -> Tensors:
    """compressed-tensors' MXFP8, scales as biased exponents."""
    return {"weight": np.asarray(w.qvalue), "weight_scale": np.asarray(w.scale).view(np.uint8)}


def fp8(w: QArray) -> Tensors:
    """DeepSeek's blocks (weight_scale_inv multiplies, whatever its name), or one scale per tensor."""
    scale = np.asarray(w.scale)
    if scale.size == 1 and w.format.block_shape == (-1, -1):
        return {"weight": np.asarray(w.qvalue), "weight_scale": scale.reshape(())}
    return {"weight": np.asarray(w.qvalue), "weight_scale_inv": scale}


def fbgemm_fp8(w: QArray) -> Tensors:
    """FBGEMM's fp8 rows, scale [N, 1]."""
    return {"weight": np.asarray(w.qvalue), "weight_scale": np.asarray(w.scale)}


def modelopt_fp8(w: QArray) -> Tensors:
    """ModelOpt's fp8 with one scale."""
    return {"weight": np.asarray(w.qvalue), "weight_scale": np.asarray(w.scale).reshape(())}


def modelopt_nvfp4(w: QArray) -> Tensors:
    """ModelOpt's NVFP4, whose global scale multiplies."""
    return {
        "weight": np.asarray(w.qvalue),
        "weight_scale": np.asarray(w.scale),
        "weight_scale_2": np.asarray(w.global_scale).reshape(()),
    }


def gptq(w: QArray, *, version: str) -> Tensors:
    """GPTQ: words along K, zero points along N, stored one less in v1 ("gptq") than in "gptq_v2"."""
    bits = w.format.bits
    zero = _within(unsigned_zero_points(w) - (version == "gptq"), bits)
    return {
        "qweight": np.ascontiguousarray(pack_words(unsigned_codes(w), bits).T),
        "qzeros": pack_words(np.ascontiguousarray(zero.T), bits),
        "scales": np.ascontiguousarray(np.asarray(w.scale).T),
        "g_idx": group_index(w),
    }


def awq(w: QArray) -> Tensors:
    """AutoAWQ's GEMM layout: words along N, eight columns in `AWQ_ORDER`."""

    def words(codes: np.ndarray) -> np.ndarray:
        rows, n = codes.shape
        return pack_words(codes.reshape(rows, n // 8, 8)[:, :, AWQ_ORDER].reshape(rows, n), 4)

    return {
        "qweight": words(np.ascontiguousarray(unsigned_codes(w).T)),
        "qzeros": words(np.ascontiguousarray(_within(unsigned_zero_points(w), 4).T)),
        "scales": np.ascontiguousarray(np.asarray(w.scale).T),
    }


def gpt_oss(w: QArray) -> Tensors:
    """GPT-OSS's stacked experts: blocks uint8 [E, N, K/32, 16] and their exponents [E, N, K/32]."""
    *lead, k = w.shape
    return {
        "blocks": np.asarray(w.qvalue).reshape(*lead, k // 32, 16),
        "scales": np.asarray(w.scale).view(np.uint8),
    }


def divisor(multiplier: np.ndarray) -> np.ndarray:
    """The float32 whose reciprocal is this one, for formats that divide by their global scale.

    Above sqrt(2) of each binade some floats are no float's reciprocal; then the nearest is taken, one
    unit in the last place away, and a warning says so (ModelOpt's format multiplies and stays exact).
    """
    one = np.float32(1)
    best = one / multiplier.astype(np.float32)
    for candidate in (
        best,
        np.nextafter(best, np.float32(0)),
        np.nextafter(best, np.float32("inf")),
    ):
        exact = one / candidate == multiplier
        best = np.where(exact & (one / best != multiplier), candidate, best)
    if not np.array_equal(one / best, multiplier):
        _log.warning(
            "a global scale is no reciprocal of a float32: it changes by one part in 2**23"
        )
    return best.astype(np.float32)


def _tensor_scale(w: QArray) -> np.ndarray:
    scale = np.asarray(w.scale)
    return scale.reshape(1) if w.format.block_shape == (-1, -1) else scale


def _within(zero: np.ndarray, bits: int) -> np.ndarray:
    """Zero points as uint8 codes.

    Raises:
        ValueError: If one is no code: GPTQ v1 can hold 2**bits, v2 and the others 0, none both.
    """
    if zero.min(initial=0) < 0 or zero.max(initial=0) >= 2**bits:
        raise ValueError(
            f"a zero point of {zero.min()}..{zero.max()} is outside the format's 0..{2**bits - 1}; "
            "requantize"
        )
    return zero.astype(np.uint8)
