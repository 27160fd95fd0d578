"""Some fields of a GGUF file's header.

The gguf package's reader makes NumPy views of every string of the vocabulary, which takes seconds.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import os
import struct
from typing import Any

# Value types by number: struct codes of the fixed-size ones.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_metadata(path: str | os.PathLike, prefix: str) -> dict[str, Any]:
    """The header fields whose names begin with `prefix`.

    Raises:
        ValueError: If the file is no GGUF of version 2 or 3, or its header is damaged.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Header(data)
            magic, version = header.take("4s"), header.take("I")
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(
                    f"begins with {magic!r}, version {version}; only GGUF 2 and 3 are supported"
                )
            header.take("Q")  # number of tensors
            fields = {}
            for _ in range(header.take("Q")):
                name = header.string()
                value = header.value(header.take("I"))
                if name.startswith(prefix):
                    fields[name] = value
            return fields
    except (OSError, ValueError, struct.error) as error:
        raise ValueError(f"{path}: not a readable GGUF file: {error}; fetch it again") from error


class _Header:
    """The header's bytes, read from the beginning."""

    def __init__(self, data: mmap.mmap):
        self._data, self._at = data, 0

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.take("Q")
        text = self._data[self._at : self._at + length]
        if len(text) < length:
            raise ValueError("its header is truncated")
        self._at += length
        return text.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"its header has a value of the unknown type {kind}")
        kind, count = self.take("I"), self.take("Q")
        if kind not in _SCALARS:
            return [self.value(kind) for _ in range(count)]
        code = f"<{count}{_SCALARS[kind]}"
        values = struct.unpack_from(code, self._data, self._at)
        self._at += struct.calcsize(code)
        return list(values)
