"""Lazy reading of safetensors files: headers checked before they are believed, tensors mapped from disk."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from qjax.checkpoint.schemes import TensorInfo

DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


class SafetensorsFile:
    """One safetensors file.

    Attributes:
        path: The file.
        infos: {tensor name: dtype word and shape}.
    """

    def __init__(self, path: Path):
        """Reads and checks the header.

        Raises:
            ValueError: If the file is truncated or malformed, or holds a dtype that is not known here.
        """
        self.path = path
        try:
            # The library checks lengths, offsets and overlaps; its NumPy reader lacks the 8-bit floats.
            with safe_open(path, framework="numpy"):
                pass
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length), object_pairs_hook=_unique)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path}: no valid safetensors file: {error}") from error
        header.pop("__metadata__", None)
        self._start = 8 + length
        self._offsets = {name: entry["data_offsets"] for name, entry in header.items()}
        unknown = sorted({e["dtype"] for e in header.values()} - set(DTYPES))
        if unknown:
            raise ValueError(f"{path}: dtypes {unknown} are not supported: {sorted(DTYPES)} are")
        self.infos = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]))
            for name, entry in header.items()
        }
        self._data = np.memmap(path, np.uint8, mode="r") if any(self._offsets.values()) else None

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the mapped file: what is not touched is not read."""
        start, end = (self._start + offset for offset in self._offsets[name])
        info = self.infos[name]
        dtype = DTYPES[info.dtype]
        if start == end or self._data is None:
            return np.zeros(info.shape, dtype)
        return self._data[start:end].view(dtype).reshape(info.shape)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in the header")
    return found
