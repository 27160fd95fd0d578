"""One tokenizer class over the `tokenizers` library."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from qjax.tokenizer import _chat_template, _folder, _gguf
from qjax.tokenizer._gguf_metadata import read_metadata
from qjax.tokenizer._text_stream import TextStream


class Tokenizer:
    """Encodes and decodes text, and renders chats.

    Attributes:
        backend: The tokenizer of the `tokenizers` library.
        bos_id: The token that begins a text, None if there is none.
        eos_ids: Tokens that end generation.
        chat_template: jinja source, None if the model brought none.
        named_tokens: {"bos_token": text, ...}, variables of the template.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None = None,
        eos_ids: Collection[int] = (),
        chat_template: str | None = None,
        named_tokens: Mapping[str, str] | None = None,
    ):
        """Wraps a tokenizer; `load`, `from_folder` and `from_gguf` read one from files."""
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        self.chat_template = chat_template
        self.named_tokens = dict(named_tokens or {})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Reads a Hugging Face folder or a .gguf file.

        Raises:
            ValueError: If there is neither, or it can't be read.
        """
        path = Path(path)
        if path.is_dir():
            return cls.from_folder(path)
        if path.is_file() and path.suffix == ".gguf":
            return cls.from_gguf(path)
        raise ValueError(f"tokenizer: {path} is neither a folder nor a .gguf file")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Reads tokenizer.json and the files that complete it.

        End tokens are the eos_token and what generation_config.json (or else config.json) lists. The
        beginning token is added as tokenizer.json's post-processor does, and where it has none as
        add_bos_token says.

        Raises:
            ValueError: If a file is missing, malformed or contradicts another.
        """
        folder = Path(folder)
        backend = _folder.read_backend(folder)
        config = _folder.read_json(folder / "tokenizer_config.json")
        _folder.add_tokens(backend, folder, config)
        named = _folder.named_tokens(folder, config)
        ids: dict[str, int] = {}
        for name in ("bos_token", "eos_token"):
            token_id = backend.token_to_id(named[name]) if name in named else None
            if token_id is not None:
                ids[name] = token_id
            elif name in named:
                raise ValueError(
                    f"{folder / 'tokenizer_config.json'}: {name} {named[name]!r} is not in tokenizer.json's "
                    "vocabulary; the two files must belong together"
                )
        if backend.post_processor is None:
            _folder.add_bos_and_eos(
                backend,
                named.get("bos_token") if config.get("add_bos_token") else None,
                named.get("eos_token") if config.get("add_eos_token") else None,
            )
        own_end = {ids["eos_token"]} if "eos_token" in ids else set()
        return cls(
            backend,
            bos_id=ids.get("bos_token"),
            eos_ids=_folder.eos_ids(folder) | own_end,
            chat_template=_folder.chat_template(folder, config),
            named_tokens=named,
        )

    @classmethod
    def from_gguf(cls, path: str | os.PathLike) -> "Tokenizer":
        """Reads the metadata of a GGUF file.

        Raises:
            ValueError: If it has no tokenizer, or one that is not supported.
        """
        return cls.from_gguf_metadata(read_metadata(path, "tokenizer."))

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Builds the tokenizer that a GGUF file's `tokenizer.*` fields describe.

        Raises:
            ValueError: If they describe none, or one that is not supported.
        """
        backend = _gguf.build_backend(metadata)
        tokens = metadata["tokenizer.ggml.tokens"]
        named, ids = {}, {}
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        ):
            token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if token_id is not None and 0 <= token_id < len(tokens):
                ids[name], named[name] = int(token_id), tokens[token_id]
        _folder.add_bos_and_eos(
            backend,
            named.get("bos_token") if _gguf.adds_bos(metadata) else None,
            named.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token") else None,
        )
        return cls(
            backend,
            bos_id=ids.get("bos_token"),
            eos_ids=_gguf.end_ids(metadata),
            chat_template=metadata.get("tokenizer.chat_template"),
            named_tokens=named,
        )

    @property
    def vocab_size(self) -> int:
        """Tokens with a text; a model's embedding may be padded to more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognized.

        Args:
            text: Any text.
            add_special_tokens: Adds the beginning token, where the model wants one.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 give U+FFFD."""
        ids = [int(i) for i in ids]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def text_stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """A decoder of tokens as they come."""
        return TextStream(
            lambda ids: self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation by the model's chat template.

        Args:
            messages: {"role": ..., "content": ...} each.
            add_generation_prompt: Ends the text where the assistant's answer begins.
            variables: Further template variables, such as `tools` or `enable_thinking`.

        Raises:
            ValueError: If there is no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(
                "tokenizer: the model brought no chat template; pass plain text (generate.py: --no-chat)"
            )
        variables = {"tools": None, "documents": None, **self.named_tokens, **variables}
        return _chat_template.render(
            self.chat_template, messages, add_generation_prompt=add_generation_prompt, **variables
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation; see `render_chat`. The template writes its own special tokens."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False)
