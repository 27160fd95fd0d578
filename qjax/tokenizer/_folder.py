"""The tokenizer files of a Hugging Face folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no file.

    Raises:
        ValueError: If the file is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object; found {type(value).__name__}")
    return value


def read_backend(folder: Path) -> Backend:
    """The tokenizer of tokenizer.json, which neither truncates nor pads.

    Raises:
        ValueError: If the file is missing or malformed.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder}: no tokenizer.json; save the model's fast tokenizer there "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{path}: the tokenizers library can't read it ({error}); fetch the file again"
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def token_text(value: Any) -> str | None:
    """A token in tokenizer_config.json or special_tokens_map.json: a string or an object with `content`."""
    return value.get("content") if isinstance(value, Mapping) else value


def named_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """{"bos_token": "<s>", ...}: tokenizer_config.json, and special_tokens_map.json where it is silent."""
    fallback = read_json(folder / "special_tokens_map.json")
    found = {name: token_text(config.get(name, fallback.get(name))) for name in NAMED_TOKENS}
    return {name: text for name, text in found.items() if text is not None}


def add_tokens(backend: Backend, folder: Path, config: Mapping[str, Any]) -> None:
    """Adds the tokens that only tokenizer_config.json declares, and marks the special ones.

    Raises:
        ValueError: If a declared id is not the one that the token gets.
    """
    path = folder / "tokenizer_config.json"
    known = backend.get_added_tokens_decoder()
    declared = sorted(
        (int(i), fields) for i, fields in config.get("added_tokens_decoder", {}).items()
    )
    for token_id, fields in declared:
        if token_id in known and known[token_id].content == fields["content"]:
            continue
        options = {
            key: bool(fields.get(key, False))
            for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
        }
        token = AddedToken(fields["content"], **options)
        backend.add_special_tokens([token]) if options["special"] else backend.add_tokens([token])
        found = backend.token_to_id(fields["content"])
        if found != token_id:
            raise ValueError(
                f"{path}: added_tokens_decoder gives {fields['content']!r} the id {token_id}, tokenizer.json "
                f"{found}; the two files must belong together"
            )
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, Mapping) else list(extra)
    names = [*named_tokens(folder, config).values(), *map(token_text, extra)]
    special = {
        token.content for token in backend.get_added_tokens_decoder().values() if token.special
    }
    for text in names:
        # One outside the vocabulary would get an id that the model has no row for.
        if text not in special and backend.token_to_id(text) is not None:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def add_bos_and_eos(backend: Backend, bos: str | None, eos: str | None) -> None:
    """Puts these tokens around every text that is encoded with special tokens; None for neither."""
    template = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    pairs = [(text, backend.token_to_id(text)) for text in {bos, eos} if text is not None]
    if pairs:
        backend.post_processor = TemplateProcessing(
            single=template, pair=[*template, "$B:1"], special_tokens=pairs
        )


def chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template's source: chat_template.jinja, else in tokenizer_config.json, else chat_template.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if found is None:
        found = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in found}
        return named.get("default")
    return found


def eos_ids(folder: Path) -> set[int]:
    """The end tokens of generation_config.json, or of config.json where that says nothing."""
    found = read_json(folder / "generation_config.json").get("eos_token_id")
    if found is None:
        found = read_json(folder / "config.json").get("eos_token_id")
    if found is None:
        return set()
    return set(found) if isinstance(found, list) else {found}
