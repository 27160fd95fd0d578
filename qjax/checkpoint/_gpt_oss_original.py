"""OpenAI's original layout of GPT-OSS, read as if it were the Hugging Face one."""

from pathlib import Path
from typing import Any

import numpy as np

from qjax.checkpoint._read_folder import Folder
from qjax.checkpoint.schemes import TensorInfo, parse_quantization
from qjax.registry import model_module


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of the original layout, which names no model_type."""
    return "model_type" not in config and "rope_ntk_alpha" in config


class OriginalGptOss(Folder):
    """A folder in the original layout; attributes and tensor names are Hugging Face's."""

    def __init__(self, path: Path):
        """Reads the folder as `Folder` does.

        Raises:
            ValueError: As `Folder` does, or if a field of the original config is missing.
        """
        super().__init__(path)
        family = model_module("gpt_oss")
        self.config = family.hf_config(self.config)
        where = f"{path}/config.json"
        self.quantization = parse_quantization(self.config["quantization_config"], where)
        self._names = family.original_names(family.Config.from_hf(self.config))
        stored, used = self.infos, {original for original, _ in self._names.values()}
        mapped = {
            name: _cut(stored[original], rows)
            for name, (original, rows) in self._names.items()
            if original in stored
        }
        # Tensors of other names stay, so that the loader lists them.
        self.infos = mapped | {n: info for n, info in stored.items() if n not in used}

    def read(self, name: str) -> np.ndarray:
        """A tensor by its Hugging Face name."""
        original, rows = self._names.get(name, (name, None))
        tensor = super().read(original)
        return tensor if rows is None else tensor[slice(*rows)]


def _cut(info: TensorInfo, rows: tuple[int, int] | None) -> TensorInfo:
    if rows is None:
        return info
    start, stop, _ = slice(*rows).indices(info.shape[0])
    return TensorInfo(info.dtype, (max(stop - start, 0), *info.shape[1:]))
