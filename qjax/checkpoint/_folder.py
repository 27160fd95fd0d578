"""The folder around the weights: written whole or not at all, with the files of its source."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Files that say how the source's weights were stored, which the new folder states anew.
_OWN_FILES = {"config.json", "quantize_config.json", "quantization_config.json", "quant_config.json",
              "hf_quant_config.json", "recipe.yaml"}  # fmt: skip
_CARRIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md", ""}

# What other loaders choose their model class by, which a GGUF file does not say.
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@contextlib.contextmanager
def new_folder(directory: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder beside `directory` that takes its place at the end, and vanishes after a failure.

    Raises:
        ValueError: If `directory` exists and is not to be overwritten, or is no folder.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"export: {directory} is a file; choose a folder")
    if directory.exists() and not overwrite and any(directory.iterdir()):
        raise ValueError(
            f"export: {directory} exists and is not empty; choose another folder or pass overwrite=True"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if directory.exists():
            old = directory.with_name(f".{directory.name}.replaced-{os.getpid()}")
            directory.rename(old)
            partial.rename(directory)
            shutil.rmtree(old)
        else:
            partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def carry_files(source: Path, directory: Path) -> list[str]:
    """Copies tokenizer, generation config, templates and model code; returns the names."""
    carried = []
    for file in sorted(source.iterdir()):
        kept = file.suffix in _CARRIED_SUFFIXES and not file.name.endswith(".index.json")
        if (
            file.is_file()
            and kept
            and not file.name.startswith(".")
            and file.name not in _OWN_FILES
        ):
            shutil.copyfile(file, directory / file.name)
            carried.append(file.name)
    return carried


def write_config(
    directory: Path, config: Mapping[str, Any], quantization: dict[str, Any] | None, dtype: str
) -> None:
    """Writes config.json with this quantization_config and dtype, the other fields as they were."""
    config = {k: v for k, v in config.items() if k not in ("quantization_config", "dtype")}
    # transformers 4 and the older loaders know only the longer name.
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if "architectures" not in config and config.get("model_type") in _ARCHITECTURES:
        config["architectures"] = [_ARCHITECTURES[config["model_type"]]]
    if quantization is not None:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
