"""Prompts in, completions out: batches them, schedules the compiled steps and reads the tokens."""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from typing import Any

import jax
import numpy as np

from qjax.generation._schedule import bucket, run
from qjax.generation._sequence import Completion, Increment, Sequence
from qjax.generation._steps import Steps
from qjax.kv_cache import PAGE_SIZE
from qjax.nn import CausalLM
from qjax.recipe import KVCacheFormat, kv_cache_format
from qjax.sampling import SamplingParams
from qjax.tokenizer import Tokenizer

Prompt = str | Many[int] | np.ndarray | Many[Mapping[str, object]]
"""A text, token ids, or the messages of a chat ({"role": ..., "content": ...} each)."""

SMALLEST_CACHE = 256


class Generator:
    """Generates completions with a model.

    Prompts beyond the batch size wait; as soon as a sequence ends, the next one takes its place. The
    cache is as long as the prompts at hand need, so that memory and time follow the use. Lengths come in
    steps (powers of two and 1.5 times those), and a step that was seen before is not compiled again.

    Attributes:
        max_len: Tokens of prompt and completion together.
        batch_size: Sequences that are generated at a time.
        steps: The compiled functions; `steps.trace_counts` counts their traces.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer | None = None,
        *,
        max_len: int | None = None,
        batch_size: int = 8,
        kv_cache: str | KVCacheFormat | None = None,
        page_size: int = PAGE_SIZE,
        prefill_chunk: int = 1024,
        tokens_per_call: int | None = None,
    ):
        """Takes a loaded model.

        Args:
            model: Its parameters are shared, not copied.
            tokenizer: Without one, prompts are token ids and completions have no text.
            max_len: Tokens of prompt and completion together; default what the model was made for.
            batch_size: Sequences at a time, rounded up to the mesh's data axis.
            kv_cache: Storage of keys and values, default the model's dtype.
            page_size: Tokens per page of the cache.
            prefill_chunk: Longer prompts are processed in parts of this many tokens.
            tokens_per_call: Tokens that the device draws for each sequence before the host sees them: more cost
                the host less, but a sequence that ends among them computes the rest in vain. Default 8 on a GPU,
                where a small model's step takes less time than its dispatch, else 1.

        Raises:
            ValueError: If a size is not positive or the model has no such context.
        """
        context = _context(model)
        self.max_len = model.config.max_position_embeddings if max_len is None else max_len
        if tokens_per_call is None:
            tokens_per_call = 8 if jax.default_backend() == "gpu" else 1
        sizes = dict(
            batch_size=batch_size, prefill_chunk=prefill_chunk, tokens_per_call=tokens_per_call
        )
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"Generator: {name} must be positive; found {value}")
        if not 2 <= self.max_len <= context:
            raise ValueError(
                f"Generator: max_len must be in 2..{context}, the model's context; found {max_len}"
            )
        if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
            raise ValueError(
                f"Generator: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary only "
                f"{model.vocab_size}; use the model's own tokenizer"
            )
        self.tokenizer, self.vocab_size = tokenizer, model.vocab_size
        format = None if kv_cache is None else kv_cache_format(kv_cache)
        self.steps = Steps(model, format, page_size, tokens_per_call)
        self.batch_size = _up(batch_size, self.steps.data_shards)
        self.prefill_chunk = prefill_chunk

    def generate(
        self,
        prompts: Many[Prompt],
        params: SamplingParams | Many[SamplingParams] = SamplingParams(),  # noqa: B008 (frozen)
    ) -> list[Completion]:
        """The completions of these prompts, in their order.

        Args:
            prompts: Texts, token ids or chats; they may be mixed.
            params: For all prompts, or one per prompt.

        Raises:
            ValueError: If a prompt is empty or does not fit into the context.
        """
        done = {
            step.index: step.completion
            for step in self.stream(prompts, params)
            if step.completion is not None
        }
        return [done[i] for i in range(len(prompts))]

    def stream(
        self,
        prompts: Many[Prompt],
        params: SamplingParams | Many[SamplingParams] = SamplingParams(),  # noqa: B008 (frozen)
    ) -> Iterator[Increment]:
        """The same token by token, as they come; arguments are checked before the first.

        Args:
            prompts: See `generate`.
            params: See `generate`.

        Raises:
            ValueError: See `generate`.
        """
        if isinstance(prompts, str | Mapping):
            raise ValueError(
                f"generate: prompts must be a list of prompts; found one {type(prompts).__name__}: wrap it in [...]"
            )
        rows = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(rows) != len(prompts):
            raise ValueError(
                f"generate: params must be one, or one per prompt; found {len(rows)} for {len(prompts)} prompts"
            )
        return self._run(
            [self._sequence(i, *pair) for i, pair in enumerate(zip(prompts, rows, strict=True))]
        )

    def _sequence(self, index: int, prompt: Prompt, params: SamplingParams) -> Sequence:
        where = f"generate: prompt {index}"
        ids = self._token_ids(prompt, where)
        if not ids:
            raise ValueError(f"{where} is empty; give it at least one token")
        if len(ids) >= self.max_len:
            raise ValueError(
                f"{where} has {len(ids)} tokens; with a token to generate it must fit into the context of "
                f"{self.max_len}: shorten it or raise max_len"
            )
        outside = [i for i in (*ids, *params.stop_token_ids) if not 0 <= i < self.vocab_size]
        if outside:
            raise ValueError(
                f"{where}: token ids must be in 0..{self.vocab_size - 1}, the model's vocabulary; found {outside[:5]}"
            )
        if params.stop and self.tokenizer is None:
            raise ValueError(f"{where}: stop texts need a tokenizer; use stop_token_ids")
        limit = min(params.max_new_tokens, self.max_len - len(ids))
        return Sequence(index, ids, params, limit, self.tokenizer)

    def _token_ids(self, prompt: Prompt, where: str) -> list[int]:
        items: list[Any] = [] if isinstance(prompt, str) else list(prompt)
        if not isinstance(prompt, str) and all(isinstance(i, int | np.integer) for i in items):
            return [int(i) for i in items]
        if self.tokenizer is None:
            raise ValueError(f"{where}: without a tokenizer a prompt must be token ids")
        if isinstance(prompt, str):
            # Only a beginning token would be left of an empty text.
            return self.tokenizer.encode(prompt) if prompt else []
        if all(isinstance(message, Mapping) for message in items):
            return self.tokenizer.apply_chat_template(items)
        raise ValueError(
            f"{where} must be a text, a list of token ids or a list of messages; found a "
            f"{type(prompt).__name__} of {sorted({type(i).__name__ for i in items})}"
        )

    def _run(self, sequences: list[Sequence]) -> Iterator[Increment]:
        if not sequences:
            return iter(())
        batch = min(self.batch_size, _up(bucket(len(sequences), 1), self.steps.data_shards))
        longest = max(len(s.prompt) + s.limit for s in sequences)
        max_len = min(bucket(longest, SMALLEST_CACHE), self.max_len)
        return run(self.steps, sequences, batch, max_len, self.prefill_chunk)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _context(model: CausalLM) -> int:
    """The longest sequence that the model's positions are made for, extensions by its rope included."""
    rope = getattr(model.config, "rope", None)
    factor = 1.0
    if rope is not None and rope.kind in ("linear", "dynamic", "yarn"):
        factor = max(1.0, float(dict(rope.parameters).get("factor", 1.0)))
    return int(model.config.max_position_embeddings * factor)
