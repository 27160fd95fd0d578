"""The two compiled functions of generation, and the state on the device that they pass on."""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, Int

from qjax.kv_cache import KVCache
from qjax.nn import CausalLM
from qjax.recipe import KVCacheFormat
from qjax.sampling import SamplingArrays, sample


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Room for B sequences on the device; a slot is reused once its sequence has ended.

    Attributes:
        cache: Their keys and values.
        seen: Tokens that occur in each sequence: bool [B, V].
    """

    cache: KVCache
    seen: Bool[Array, "B V"]


class Steps:
    """`prefill` and `decode` of a model, each compiled once per shape.

    Attributes:
        tokens_per_call: Tokens that `decode` draws for each slot: a GPU is faster than the host that calls it.
        data_shards: Parts that the mesh cuts a batch into; slots come in multiples of it.
        trace_counts: How often each function was traced, for tests.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_cache: KVCacheFormat | None,
        page_size: int,
        tokens_per_call: int = 1,
    ):
        """Takes a loaded model; its weights become arguments of the compiled functions."""
        self._model, self._format, self._page_size = model, kv_cache, page_size
        self.tokens_per_call = tokens_per_call
        self._graphdef, state = nnx.split(model)
        # A flat list is what jit dispatches fastest.
        self._weights, self._state_tree = jax.tree.flatten(state)
        self.trace_counts: collections.Counter[str] = collections.Counter()
        mesh = model.sharding.mesh
        self._rows_axis = model.sharding.axis("batch", 1 if mesh is None else mesh.size)
        self.data_shards = model.sharding.size(self._rows_axis)
        self._replicated = None
        options: dict[str, Any] = {}
        if jax.default_backend() == "cpu":
            # XLA's scheduler for concurrency dequantizes all weights before it uses the first: 540 MB instead
            # of 113 for 135M parameters, and half the speed, which goes into page faults.
            scheduler = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
            options["compiler_options"] = scheduler
        if mesh is not None:
            self._replicated = NamedSharding(mesh, PartitionSpec())
            # What one step returns must lie as the next one was compiled for.
            shardings = jax.tree.map(lambda a: a.sharding, self.new_slots(self.data_shards, 1))
            options["out_shardings"] = (shardings, self._replicated)
        self._prefill = jax.jit(self._traced_prefill, donate_argnums=1, **options)
        if mesh is not None:
            options["out_shardings"] = (*options["out_shardings"], self._replicated)
        self._decode = jax.jit(self._traced_decode, donate_argnums=1, **options)

    def new_slots(self, batch: int, max_len: int) -> Slots:
        """Empty slots for `batch` sequences of up to `max_len` tokens."""
        cache = self._model.init_cache(batch, max_len, self._format, page_size=self._page_size)
        seen = jnp.zeros((batch, self._model.vocab_size), bool)
        if self._model.sharding.mesh is not None:
            seen = jax.device_put(seen, self._model.sharding.named(self._rows_axis))
        return Slots(cache, seen)

    def put(self, tree):
        """Host arrays on the device, whole on each."""
        return jax.device_put(tree, self._replicated)

    def prefill(
        self,
        slots: Slots,
        tokens: Int[Array, " B"],
        rows: Int[np.ndarray, " R"],
        ids: Int[np.ndarray, "R T"],
        start: int,
        num_tokens: Int[np.ndarray, " R"],
        sampling: SamplingArrays,
    ) -> tuple[Slots, Int[Array, " B"]]:
        """Writes a part of some prompts into their slots and draws the token after it.

        Args:
            slots: Donated.
            tokens: Last token of each slot.
            rows: The prompts' slots, as many of each data shard.
            ids: Tokens `start`.. of the prompts, padded on the right.
            start: Tokens of these prompts that were written before; 0 empties the slots first.
            num_tokens: How many of ids are real; a row without any leaves its slot as it is.
            sampling: Parameters of these rows.

        Returns:
            The slots, and `tokens` with those drawn for these rows.
        """
        where = np.asarray(start, np.int32)
        return self._prefill(self._weights, slots, tokens, rows, ids, where, num_tokens, sampling)

    def decode(
        self,
        slots: Slots,
        tokens: Int[Array, " B"],
        wanted: Int[Array, " B"],
        sampling: SamplingArrays,
    ) -> tuple[Slots, Int[Array, " B"], Int[Array, "S B"]]:
        """Appends each slot's last token and draws its next one, `tokens_per_call` times.

        Args:
            slots: Donated.
            tokens: Last token of each slot.
            wanted: Tokens to draw for each slot, at most `tokens_per_call`; 0 for those without a sequence.
            sampling: Parameters of all slots.

        Returns:
            The slots, the last token of each, and those that were drawn, in order: slots that want no more
            repeat their last.
        """
        return self._decode(self._weights, slots, tokens, wanted, sampling)

    def _run(self, weights, ids, cache, num_tokens) -> tuple[Array, KVCache]:
        model = nnx.merge(self._graphdef, jax.tree.unflatten(self._state_tree, weights))
        logits, cache = model(ids, cache, num_tokens, last_token_only=True)
        if self._model.sharding.mesh is not None:  # draws need all of a row's vocabulary
            logits = jax.lax.with_sharding_constraint(
                logits, self._model.sharding.named(self._rows_axis, None)
            )
        assert cache is not None
        return logits, cache

    def _traced_prefill(self, weights, slots, tokens, rows, ids, start, num_tokens, sampling):
        self.trace_counts["prefill"] += 1
        cache, valid = slots.cache, jnp.arange(ids.shape[1])[None] < num_tokens[:, None]
        part = KVCache(
            cache.layers,
            jnp.take(cache.page_table, rows, axis=0),
            jnp.full(rows.shape, start, jnp.int32),
        )
        logits, part = self._run(weights, ids, part, num_tokens)
        seen = jnp.where(start == 0, False, jnp.take(slots.seen, rows, axis=0))
        seen = seen.at[jnp.arange(ids.shape[0])[:, None], ids].max(valid)
        drawn = sample(logits, sampling, part.lengths, seen)
        # Rows that only fill up a shard repeat a slot: an index past the end writes nothing.
        written = jnp.where(num_tokens > 0, rows, tokens.shape[0])
        cache = KVCache(
            part.layers,
            cache.page_table,
            cache.lengths.at[written].set(part.lengths, mode="drop"),
        )
        slots = Slots(cache, slots.seen.at[written].set(seen, mode="drop"))
        return slots, tokens.at[written].set(drawn, mode="drop")

    def _traced_decode(self, weights, slots, tokens, wanted, sampling):
        self.trace_counts["decode"] += 1

        def step(carry, i):
            (slots, tokens), active = carry, i < wanted
            seen = slots.seen.at[jnp.arange(tokens.shape[0]), tokens].max(active)
            valid = active.astype(jnp.int32)
            logits, cache = self._run(weights, tokens[:, None], slots.cache, valid)
            drawn = sample(logits, sampling, cache.lengths, seen)
            tokens = jnp.where(active, drawn, tokens)
            return (Slots(cache, seen), tokens), tokens

        if self.tokens_per_call == 1:
            (slots, tokens), drawn = step((slots, tokens), 0)
            return slots, tokens, drawn[None]
        # Within a loop buffers stay where they are, so that the steps' CUDA graph is not updated.
        numbers = jnp.arange(self.tokens_per_call, dtype=wanted.dtype)
        (slots, tokens), drawn = jax.lax.scan(step, (slots, tokens), numbers)
        return slots, tokens, drawn
