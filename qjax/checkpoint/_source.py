"""Where an exported folder's config, tokenizer and other files come from."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qjax.checkpoint._folder import carry_files
from qjax.recipe import KVCacheFormat
from qjax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Source:
    """The origin of a model.

    Attributes:
        config: Its config.json.
        files: Its folder, or the GGUF file that holds its tokenizer; None where there is neither.
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
        return cls(
            source.config,
            Path(tokenizer) if isinstance(tokenizer, str | os.PathLike) else None,
            getattr(source, "generation_config", None),
            None if recipe is None else recipe.kv_cache,
        )

    def write_files(self, directory: Path) -> None:
        """Writes everything but weights and config.json."""
        generation = dict(self.generation_config or {})
        if self.files is not None and self.files.is_dir():
            carry_files(self.files, directory)
        elif self.files is not None:
            tokenizer = Tokenizer.load(self.files)
            _write_tokenizer(tokenizer, directory)
            ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.eos_ids)}
            # The tokenizer knows every end token, the file's own fields only one.
            generation |= {k: v for k, v in ends.items() if v not in (None, [])}
        file = directory / "generation_config.json"
        if generation and not file.exists():
            _write_json(file, generation)


def _write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """A tokenizer without files of its own (GGUF's) as tokenizer.json and tokenizer_config.json."""
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"} | tokenizer.named_tokens
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    # What decoding otherwise does to spaces before punctuation.
    config["clean_up_tokenization_spaces"] = False
    _write_json(directory / "tokenizer_config.json", config)


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
