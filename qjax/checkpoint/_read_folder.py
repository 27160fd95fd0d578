"""Hugging Face folders and hub ids: configs, the index, and the tensors of all shards under one roof."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax.checkpoint._safetensors import SafetensorsFile
from qjax.checkpoint.schemes import Group, Quantization, TensorInfo, parse_quantization
from qjax.formats import QFormat
from qjax.recipe import KVCacheFormat

_INDEX = "model.safetensors.index.json"
_QUANTIZATION_FILES = ("quantize_config.json", "quantization_config.json", "quant_config.json",
                       "hf_quant_config.json")  # fmt: skip


class Folder:
    """A Hugging Face model folder.

    Attributes:
        path: The folder.
        config: config.json.
        generation_config: generation_config.json, empty where there is none.
        tokenizer: Where the tokenizer lies.
        quantization: What its quantization config says, None for plain weights.
        infos: {tensor name: dtype word and shape}.
    """

    def __init__(self, path: Path):
        """Reads configs and headers, no tensor.

        Raises:
            ValueError: If a file is missing, truncated or malformed; all faults of weight files at once.
        """
        self.path = self.tokenizer = path
        if not (path / "config.json").is_file():
            raise ValueError(f"{path}: no config.json: this is no Hugging Face model folder")
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        self.quantization = self._quantization()
        files = {name: self._open(name) for name in self._file_names()}
        faults = [str(f) for f in files.values() if isinstance(f, ValueError)]
        self._files: dict[str, SafetensorsFile] = {}
        for file in files.values():
            if isinstance(file, SafetensorsFile):
                twice = sorted(set(file.infos) & set(self._files))
                faults += [f"{file.path}: tensors {twice} are in another file too"] * bool(twice)
                self._files |= dict.fromkeys(file.infos, file)
        faults += self._index_faults()
        if faults:
            raise ValueError("\n".join([f"{path}: {len(faults)} faults in weight files:", *faults]))
        self.infos: Mapping[str, TensorInfo] = {
            name: file.infos[name] for name, file in self._files.items()
        }

    def _quantization(self) -> Quantization | None:
        config = self.config.get("quantization_config")
        where = f"{self.path}/config.json"
        if config is None:
            for name in _QUANTIZATION_FILES:
                if (self.path / name).is_file():
                    where = f"{self.path}/{name}"
                    config = read_json(self.path / name)
                    method = "modelopt" if name.startswith("hf_") else "gptq"
                    config = {"quant_method": method, **config}
                    break
        if config is None:
            return None
        if not isinstance(config, Mapping):
            raise ValueError(f"{where}: quantization_config must be an object; found {config!r}")
        return parse_quantization(config, where)

    def _file_names(self) -> list[str]:
        index = self.path / _INDEX
        self._weight_map: dict[str, str] = {}
        if not index.is_file():
            if not (self.path / "model.safetensors").is_file():
                raise ValueError(
                    f"{self.path}: neither model.safetensors nor {_INDEX}: weights must be safetensors"
                )
            return ["model.safetensors"]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(v, str) and Path(v).name == v for v in weight_map.values()
        ):
            raise ValueError(f"{index}: weight_map must name a file of this folder for each tensor")
        self._weight_map = weight_map
        return sorted(set(weight_map.values()))

    def _open(self, name: str) -> SafetensorsFile | ValueError:
        if not (self.path / name).is_file():
            return ValueError(f"{self.path / name}: named in {_INDEX} but absent")
        try:
            return SafetensorsFile(self.path / name)
        except ValueError as error:
            return error

    def _index_faults(self) -> list[str]:
        """Tensors that are not where the index says, of files that could be read."""
        read = {file.path.name for file in self._files.values()}
        return [
            f"{self.path / file}: has no tensor {name!r}, which {_INDEX} says it has"
            for name, file in sorted(self._weight_map.items())
            if file in read and (name not in self._files or self._files[name].path.name != file)
        ]

    def read(self, name: str) -> np.ndarray:
        """A tensor, mapped from its file."""
        return self._files[name].read(name)

    def groups(self, kinds: Mapping[str, str]) -> dict[str, Group]:
        """{path: group} of the quantized modules."""
        return {} if self.quantization is None else self.quantization.resolve(kinds)

    def format(self, path: str, group: Group) -> QFormat:
        """The format of a module's weight, completed from the headers."""
        assert group.codec is not None and group.spec is not None and group.spec.weights is not None
        names = group.codec.tensor_names(path, self.infos)
        infos = {suffix: self.infos[name] for suffix, name in names.items()}
        return group.codec.complete(group.spec.weights, infos, path)

    @property
    def kv_cache(self) -> KVCacheFormat | None:
        """Storage of the KV cache that the folder asks for."""
        return None if self.quantization is None else self.quantization.kv_cache


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: If it is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object; found {type(value).__name__}")
    return value


def download(repo_id: str, *, progress: bool) -> Path:
    """The local snapshot of a hub id, downloaded where needed.

    Raises:
        ValueError: If it is no hub id, or the hub can't be reached and nothing is cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not progress:
        disable_progress_bars()
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.gguf"]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except Exception as error:  # the hub's many error types all mean the same here
        raise ValueError(
            f"{repo_id}: neither a folder nor a hub id that could be downloaded: {error}"
        ) from error
