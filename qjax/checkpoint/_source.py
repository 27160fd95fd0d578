"""Where an exported folder's config, tokenizer and other files come from."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qjax.checkpoint._folder import carry_files
from qjax.recipe import KVCacheFormat


@dataclasses.dataclass(frozen=True)
class Source:
    """The origin of a model.

    Attributes:
        config: Its config.json.
        files: Its folder, None where it has none.
        generation_config: What generation_config.json says, where no folder holds it.
        kv_cache: Storage of the KV cache that it asks for.
    """

    config: Mapping[str, Any]
    files: Path | None = None
    generation_config: Mapping[str, Any] | None = None
    kv_cache: KVCacheFormat | None = None

    @classmethod
    def of(cls, source: Any) -> "Source":
        """The origin that `export`'s argument names: a LoadedModel, a folder or a config.

        Raises:
            ValueError: If it is none of them or has no config.json.
        """
        if isinstance(source, Mapping):
            return cls(source)
        if isinstance(source, str | os.PathLike):
            folder = Path(source)
            file = folder / "config.json"
            if not file.is_file():
                raise ValueError(f"export: source {folder} has no config.json")
            return cls(json.loads(file.read_text()), folder)
        if source is None or not isinstance(getattr(source, "config", None), Mapping):
            raise ValueError(
                "export: config.json has to come from somewhere; pass source= the loaded model, a Hugging "
                f"Face folder or a config mapping, not {type(source).__name__}"
            )
        recipe = getattr(source, "recipe", None)
        tokenizer = getattr(source, "tokenizer", None)
        folder = Path(tokenizer) if isinstance(tokenizer, str | os.PathLike) else None
        return cls(
            source.config,
            folder if folder is not None and folder.is_dir() else None,
            getattr(source, "generation_config", None),
            None if recipe is None else recipe.kv_cache,
        )

    def write_files(self, directory: Path) -> None:
        """Writes everything but weights and config.json."""
        if self.files is not None:
            carry_files(self.files, directory)
        generation = directory / "generation_config.json"
        if self.generation_config and not generation.exists():
            generation.write_text(json.dumps(dict(self.generation_config), indent=2) + "\n")
