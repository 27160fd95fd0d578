"""Host-side unpacking and repacking of integer codes, a few rows at a time."""

from collections.abc import Callable

import numpy as np

_CHUNK = 1 << 22
"""Codes that are unpacked at once: some megabytes, whatever the tensor's size."""


def unpack_stream(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unsigned codes uint8 [R, count] of a little-endian bit stream along the rows of uint8 [R, bytes]."""
    rows = packed.shape[0]
    if 8 % bits == 0:
        mask = np.uint8(2**bits - 1)
        fields = [(packed >> np.uint8(shift)) & mask for shift in range(0, 8, bits)]
        return np.stack(fields, axis=-1).reshape(rows, -1)[:, :count]
    stream = np.unpackbits(packed, axis=-1, bitorder="little")[:, : count * bits]
    stream = stream.reshape(rows, count, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]


def from_stream(rows: np.ndarray, bits: int, k: int) -> np.ndarray:
    """`QArray.qvalue` of rows uint8 [N, bytes] that are already streams of unsigned codes along K.

    Below 8 bits this is a view: the bytes are QArray's own but for padding at the rows' ends.
    """
    codes = rows[:, : k * bits // 8]
    return (codes ^ np.uint8(128)).view(np.int8) if bits == 8 else codes


def words_as_bytes(words: np.ndarray) -> np.ndarray:
    """Rows of 32-bit words as rows of bytes, lowest first; a view where the words are contiguous."""
    return np.ascontiguousarray(words).view(np.uint8).reshape(words.shape[0], -1)


def canonical(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes uint8 [R, K] as `QArray.qvalue` stores them."""
    rows, count = codes.shape
    if bits == 8:
        return (codes ^ np.uint8(128)).view(np.int8)
    if 8 % bits == 0:
        per_byte = 8 // bits
        groups = codes.reshape(rows, count // per_byte, per_byte)
        packed = np.zeros(groups.shape[:2], np.uint8)
        for i in range(per_byte):
            packed |= groups[:, :, i] << np.uint8(i * bits)
        return packed
    stream = np.unpackbits(codes[:, :, None], axis=2, bitorder="little")[:, :, :bits]
    return np.packbits(stream.reshape(rows, count * bits), axis=-1, bitorder="little")


def repack_rows(
    codes_of: Callable[[int, int], np.ndarray], shape: tuple[int, int], bits: int
) -> np.ndarray:
    """`QArray.qvalue` [N, K*bits/8] (int8 [N, K] for 8 bits) from codes made for a few rows at a time.

    Args:
        codes_of: (first row, end row) -> unsigned codes uint8 [rows, K].
        shape: (N, K).
        bits: Width of a code.
    """
    n, k = shape
    out = np.empty((n, k * bits // 8), np.int8 if bits == 8 else np.uint8)
    step = max(8, _CHUNK // max(k, 1) // 8 * 8)
    for start in range(0, n, step):
        end = min(start + step, n)
        out[start:end] = canonical(codes_of(start, end), bits)
    return out


def signed_zero_points(codes: np.ndarray, bits: int) -> np.ndarray:
    """Zero points in units of the signed code, of the dtype that QArray asks for."""
    signed = codes.astype(np.int16) - np.int16(2 ** (bits - 1))
    return signed if bits == 8 else signed.astype(np.int8)


def sorted_columns(g_idx: np.ndarray, k: int, group: int, name: str) -> np.ndarray | None:
    """The column permutation that makes groups contiguous, None where they are.

    Raises:
        ValueError: If the groups are not all of one size.
    """
    if g_idx.shape != (k,):
        raise ValueError(f"{name} must have shape [{k}]; found {list(g_idx.shape)}")
    expected = np.arange(k) // group
    if np.array_equal(g_idx, expected) or (k and (g_idx == -1).all()):  # -1: never reordered
        return None
    order = np.argsort(g_idx, kind="stable")
    if not np.array_equal(g_idx[order], expected):
        raise ValueError(f"{name}: every group must have {group} columns; found other sizes")
    return order.astype(np.int32)
