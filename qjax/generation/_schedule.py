"""Which sequence has which slot: admission, steps, and reading tokens while the device goes on."""

import collections
from collections.abc import Iterator

import numpy as np
from jax import Array

from qjax.generation._sequence import Increment, Sequence
from qjax.generation._steps import Steps
from qjax.sampling import SamplingArrays, SamplingParams

SMALLEST_PREFILL = 16
Owners = list[tuple[int, Sequence, int]]
"""Slots, their sequences, and how many tokens were asked for."""


def bucket(n: int, smallest: int) -> int:
    """The least of `smallest` times 1, 1.5, 2, 3, 4, 6, 8, ... that is no less than n."""
    size = smallest
    while size < n:
        if size % 2 == 0 and size * 3 // 2 >= n:
            return size * 3 // 2
        size *= 2
    return size


def run(
    steps: Steps, sequences: list[Sequence], batch: int, max_len: int, prefill_chunk: int
) -> Iterator[Increment]:
    """Completes the sequences, `batch` at a time, and yields their tokens as they are read.

    A call is dispatched before the tokens of the one before are read, so that the device does not wait for
    the host. A sequence that ends in a way that only the host sees costs tokens that nobody reads: the rest of
    its call's and those of the next.

    Args:
        steps: The compiled functions.
        sequences: What to complete; those beyond `batch` wait for a slot.
        batch: Slots, a multiple of the steps' data shards.
        max_len: Tokens that a slot holds.
        prefill_chunk: Prompt tokens that one call takes at most.

    Raises:
        ValueError: If a sequence may outgrow its slot's pages, whose later tokens would not be kept.
    """
    for sequence in sequences:
        if len(sequence.prompt) + sequence.limit > max_len:
            raise ValueError(
                f"generate: prompt {sequence.index} has {len(sequence.prompt)} tokens and may get {sequence.limit} "
                f"more, but a slot's pages hold {max_len}; make slots for longer sequences"
            )
    state = _Schedule(steps, sequences, batch, max_len, prefill_chunk)
    in_flight: collections.deque[tuple[Array, Owners]] = collections.deque()
    while state.unfinished:
        admitted = state.admit()
        stepped = state.step()
        in_flight.extend(work for work in (admitted, stepped) if work is not None)
        while len(in_flight) > (stepped is not None):
            tokens, owners = in_flight.popleft()
            # No copy is started ahead of this: one that is under way when the process exits aborts it.
            for i, drawn in enumerate(np.asarray(tokens).reshape(-1, batch)):
                for row, sequence, count in owners:
                    if i < count and sequence.finish_reason is None:
                        yield sequence.push(int(drawn[row]))
                        if sequence.finish_reason is not None:
                            state.free(row)


class _Schedule:
    def __init__(
        self,
        steps: Steps,
        sequences: list[Sequence],
        batch: int,
        max_len: int,
        prefill_chunk: int,
    ):
        self._steps, self._prefill_chunk = steps, prefill_chunk
        self._waiting = collections.deque(sequences)
        self._rows: list[Sequence | None] = [None] * batch
        self._slots = steps.new_slots(batch, max_len)
        self._tokens = steps.put(np.zeros(batch, np.int32))
        self._wanted_host = np.zeros(batch, np.int32)
        self._wanted = steps.put(self._wanted_host)
        self._sampling: SamplingArrays | None = None

    @property
    def unfinished(self) -> bool:
        return bool(self._waiting) or any(row is not None for row in self._rows)

    def free(self, row: int) -> None:
        self._rows[row] = None
        self._sampling = None

    def admit(self) -> tuple[Array, Owners] | None:
        """Gives free slots to waiting sequences and prefills these; their first tokens, if there are any."""
        shards = self._steps.data_shards
        shard_rows = len(self._rows) // shards
        free = [row for row, sequence in enumerate(self._rows) if sequence is None]
        free.sort(key=lambda row: (row % shard_rows, row))  # spread over the shards
        owners: Owners = []
        for row in free[: len(self._waiting)]:
            sequence = self._rows[row] = self._waiting.popleft()
            sequence.start()
            sequence.requested = 1
            owners.append((row, sequence, 1))
        if not owners:
            return None
        self._sampling = None
        # As many rows of each shard, for its pages are its own; what a shard lacks repeats its first slot.
        by_shard = [[(r, s) for r, s, _ in owners if r // shard_rows == i] for i in range(shards)]
        count = bucket(max(map(len, by_shard)), 1)
        count = min(count, shard_rows)
        padded: list[tuple[int, Sequence | None]] = [
            pair
            for i, pairs in enumerate(by_shard)
            for pair in (*pairs, *[(i * shard_rows, None)] * (count - len(pairs)))
        ]
        self._prefill(padded)
        return self._tokens, owners

    def _prefill(self, padded: list[tuple[int, Sequence | None]]) -> None:
        rows = np.array([row for row, _ in padded], np.int32)
        prompts = [[] if s is None else s.prompt for _, s in padded]
        params = [SamplingParams() if s is None else s.params for _, s in padded]
        lengths = np.array([len(p) for p in prompts])
        longest = int(lengths.max())
        for start in range(0, longest, self._prefill_chunk):
            width = min(bucket(longest - start, SMALLEST_PREFILL), self._prefill_chunk)
            ids = np.zeros((len(rows), width), np.int32)
            for i, prompt in enumerate(prompts):
                part = prompt[start : start + width]
                ids[i, : len(part)] = part
            count = np.clip(lengths - start, 0, width).astype(np.int32)
            self._slots, self._tokens = self._steps.prefill(
                self._slots, self._tokens, rows, ids, start, count, SamplingArrays.of(params)
            )

    def step(self) -> tuple[Array, Owners] | None:
        """Decodes tokens of every sequence that needs some; None if none does."""
        most = self._steps.tokens_per_call
        owners = [
            (row, s, min(s.limit - s.requested, most))
            for row, s in enumerate(self._rows)
            if s is not None and s.requested < s.limit
        ]
        if not owners:
            return None
        wanted = np.zeros(len(self._rows), np.int32)
        for row, sequence, count in owners:
            wanted[row] = count
            sequence.requested += count
        if not np.array_equal(wanted, self._wanted_host):
            self._wanted, self._wanted_host = self._steps.put(wanted), wanted
        sampling = self._sampling
        if sampling is None:
            params = [SamplingParams() if s is None else s.params for s in self._rows]
            sampling = self._sampling = self._steps.put(SamplingArrays.of(params))
        self._slots, self._tokens, drawn = self._steps.decode(
            self._slots, self._tokens, self._wanted, sampling
        )
        return drawn, owners
