"""Safetensors files written tensor by tensor: the headers come from shapes, so nothing is collected first.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, data).
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

_DTYPE_NAMES = {
    np.dtype(dtype): name
    for dtype, name in (
        (np.float64, "F64"),
        (np.float32, "F32"),
        (np.float16, "F16"),
        (ml_dtypes.bfloat16, "BF16"),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3"),
        (ml_dtypes.float8_e5m2, "F8_E5M2"),
        (ml_dtypes.float8_e8m0fnu, "F8_E8M0"),
        (np.int64, "I64"),
        (np.int32, "I32"),
        (np.int16, "I16"),
        (np.int8, "I8"),
        (np.uint8, "U8"),
        (np.bool_, "BOOL"),
    )
}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written.

    Attributes:
        name: Its name in the checkpoint.
        shape: Its shape.
        dtype: Its NumPy dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """The tensors of a checkpoint, in one file or in shards with an index."""

    def __init__(self, directory: Path, tensors: Iterable[TensorSpec], max_shard_bytes: int):
        """Lays out the files; a tensor larger than a shard gets one of its own.

        Args:
            directory: An existing folder.
            tensors: All tensors, in the order in which they will come.
            max_shard_bytes: Bound of one file's data.

        Raises:
            ValueError: If two tensors have one name, or a dtype has no safetensors name.
        """
        shards: list[list[TensorSpec]] = [[]]
        size = 0
        for tensor in tensors:
            if tensor.dtype not in _DTYPE_NAMES:
                raise ValueError(f"{tensor.name}: safetensors has no dtype {tensor.dtype}")
            if shards[-1] and size + tensor.nbytes > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += tensor.nbytes
        self._directory = directory
        self._left = [len(shard) for shard in shards]
        self._files: dict[int, BinaryIO] = {}
        self._headers: list[bytes] = []
        self._place: dict[str, tuple[int, int, TensorSpec]] = {}
        self.total_bytes = 0
        for i, shard in enumerate(shards):
            self._headers.append(self._lay_out(i, shard))

    def _lay_out(self, index: int, shard: list[TensorSpec]) -> bytes:
        """Gives each tensor of a shard its place; returns the file's beginning."""
        header: dict = {"__metadata__": {"format": "pt"}}
        offset, places = 0, []
        # Wide elements first: then every tensor is aligned to its element.
        for tensor in sorted(shard, key=lambda t: -t.dtype.itemsize):
            if tensor.name in self._place or tensor.name in header:
                raise ValueError(f"two tensors are named {tensor.name}")
            header[tensor.name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            places.append((tensor, offset))
            offset += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for tensor, start in places:
            self._place[tensor.name] = (index, 8 + len(text) + start, tensor)
        self.total_bytes += offset
        return len(text).to_bytes(8, "little") + text

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor; files open with their first tensor and close after their last."""
        index, offset, spec = self._place.pop(name)
        found = TensorSpec(name, array.shape, array.dtype)
        if found != spec:
            raise AssertionError(f"planned {spec}, got {found}")
        if index not in self._files:
            self._files[index] = (self._directory / self._file_name(index)).open("wb")
            self._files[index].write(self._headers[index])
        file = self._files[index]
        file.seek(offset)
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._left[index] -= 1
        if not self._left[index]:
            self._files.pop(index).close()

    def finish(self) -> None:
        """Checks that everything was written and writes the index where there are several files."""
        if self._place:
            raise AssertionError(f"planned but never written: {sorted(self._place)}")
        if len(self._headers) == 1:
            return
        weight_map = {}
        for i, header in enumerate(self._headers):
            names = json.loads(header[8:])
            weight_map |= {name: self._file_name(i) for name in names if name != "__metadata__"}
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        path = self._directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        """Closes what is open, after a failure."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file_name(self, index: int) -> str:
        count = len(self._left)
        if count == 1:
            return "model.safetensors"
        return f"model-{index + 1:05d}-of-{count:05d}.safetensors"
