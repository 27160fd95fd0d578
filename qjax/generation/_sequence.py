"""One completion while it is generated: its tokens, its text, and when it ends. Host side only."""

import dataclasses
import time
from collections.abc import Iterable

from qjax.sampling import SamplingParams
from qjax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a prompt was continued with.

    Attributes:
        text: The continuation, without special tokens and without the stop text.
        token_ids: All tokens generated, with the one that ended it.
        prompt_tokens: Number of tokens of the prompt.
        new_tokens: Number of tokens generated.
        ttft_s: Seconds from the start of the prompt's prefill to its first token.
        tokens_per_s: Tokens after the first per second; 0.0 if there were none.
        finish_reason: "stop" at an end token or a stop text, "length" at max_new_tokens or a full context.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    tokens_per_s: float
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Increment:
    """What one token adds to a completion.

    Attributes:
        index: The prompt's place in the list.
        token_id: The token.
        text: The text that is certain by now and was not before; often a token late, "" inside a character
            or what may become a stop text.
        completion: The whole, with the last token; None before.
    """

    index: int
    token_id: int
    text: str
    completion: Completion | None = None


class Sequence:
    """A prompt and the state of its completion.

    Attributes:
        index: Its place among the prompts.
        prompt: Token ids.
        params: How it is sampled.
        limit: Tokens to generate at most.
        requested: Tokens that the device was asked for; those read so far lag behind.
        finish_reason: None until it is complete.
    """

    def __init__(
        self,
        index: int,
        prompt: list[int],
        params: SamplingParams,
        limit: int,
        tokenizer: Tokenizer | None,
    ):
        """Starts with no tokens. Without a tokenizer the text stays empty."""
        self.index, self.prompt, self.params, self.limit = index, prompt, params, limit
        self.requested = 0
        self.finish_reason: str | None = None
        self._ends = set(params.stop_token_ids)
        if tokenizer is not None and not params.ignore_eos:
            self._ends |= tokenizer.eos_ids
        self._stream = None if tokenizer is None else tokenizer.text_stream()
        self._token_ids: list[int] = []
        self._text, self._released = "", 0
        self._started = self._first = self._last = 0.0

    def start(self) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def push(self, token_id: int) -> Increment:
        """Takes the next token."""
        self._last = time.perf_counter()
        if not self._token_ids:
            self._first = self._last
        self._token_ids.append(token_id)
        if token_id in self._ends:
            self.finish_reason = "stop"
        else:
            self._add_text("" if self._stream is None else self._stream.push(token_id))
        if self.finish_reason is None and len(self._token_ids) == self.limit:
            self.finish_reason = "length"
        text = self._release()
        completion = None if self.finish_reason is None else self._completion(self.finish_reason)
        return Increment(self.index, token_id, text, completion)

    def _add_text(self, piece: str) -> None:
        unsearched = max(0, len(self._text) - max(map(len, self.params.stop), default=0))
        self._text += piece
        hits = [self._text.find(stop, unsearched) for stop in self.params.stop]
        hits = [hit for hit in hits if hit >= 0]
        if hits:
            self._text = self._text[: min(hits)]
            self._stream = None  # what it holds back comes after the stop text
            self.finish_reason = "stop"

    def _release(self) -> str:
        if self.finish_reason is None:
            end = len(self._text) - _partial_stop(self._text, self.params.stop)
        else:
            if self._stream is not None:
                self._text += self._stream.flush()
            end = len(self._text)
        released, self._released = self._text[self._released : end], max(end, self._released)
        return released

    def _completion(self, finish_reason: str) -> Completion:
        count, decoding = len(self._token_ids), self._last - self._first
        return Completion(
            text=self._text,
            token_ids=tuple(self._token_ids),
            prompt_tokens=len(self.prompt),
            new_tokens=count,
            ttft_s=self._first - self._started,
            tokens_per_s=(count - 1) / decoding if decoding > 0 else 0.0,
            finish_reason=finish_reason,
        )


def _partial_stop(text: str, stops: Iterable[str]) -> int:
    """Characters at the end that a stop text may begin with, to be held back."""
    longest = 0
    for stop in stops:
        for n in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:n]):
                longest = n
                break
    return longest
