"""Choosing the next token: greedy, or drawn after penalty, temperature, top-k, top-p and min-p, in that order."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, UInt32


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one completion is generated; the words are vLLM's.

    Attributes:
        temperature: Logits are divided by it; 0 takes the most likely token.
        top_k: Draws among the k most likely tokens (ties with the k-th stay); 0 for all.
        top_p: Draws among the fewest tokens whose probabilities add up to at least this (arXiv:1904.09751).
        min_p: Drops tokens less likely than this times the most likely (arXiv:2407.01082).
        repetition_penalty: Divides positive and multiplies negative logits of tokens that occur in the prompt
            or the completion (arXiv:1909.05858).
        seed: With the position, decides every draw: a completion depends on its prompt and these
            parameters, not on what is generated beside it.
        max_new_tokens: Tokens to generate at most.
        stop: Texts that end the completion, which leaves them out.
        stop_token_ids: Tokens that end it.
        ignore_eos: Generates past the model's own end tokens.

    Raises:
        ValueError: If a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        for field in ("stop", "stop_token_ids"):  # hashable, whatever sequence was given
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        for field, (condition, met) in self._conditions().items():
            if not met:
                raise ValueError(
                    f"SamplingParams: {field} must be {condition}; found {getattr(self, field)!r}"
                )

    def _conditions(self) -> dict[str, tuple[str, bool]]:
        return {
            "temperature": ("finite and at least 0", _finite(self.temperature) and self.temperature >= 0),
            "top_k": ("an integer of at least 0 (0: off)", _integer(self.top_k) and 0 <= self.top_k < 2**31),
            "top_p": ("in (0, 1]", _finite(self.top_p) and 0 < self.top_p <= 1),
            "min_p": ("in [0, 1]", _finite(self.min_p) and 0 <= self.min_p <= 1),
            "repetition_penalty": (
                "finite and more than 0",
                _finite(self.repetition_penalty) and self.repetition_penalty > 0,
            ),
            "seed": ("an integer in [0, 2**32)", _integer(self.seed) and 0 <= self.seed < 2**32),
            "max_new_tokens": ("a positive integer", _integer(self.max_new_tokens) and self.max_new_tokens > 0),
            "stop": ("non-empty texts", all(isinstance(s, str) and s for s in self.stop)),
            "stop_token_ids": (
                "integers of at least 0",
                all(_integer(i) and i >= 0 for i in self.stop_token_ids),
            ),
        }  # fmt: skip


def _finite(value) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """`SamplingParams` of a batch, a value per row [B]; see there."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    seed: UInt32[Array, " B"]

    @classmethod
    def of(cls, rows: Sequence[SamplingParams]) -> "SamplingArrays":
        """The arrays of these rows, on the host."""
        dtypes = {"top_k": np.int32, "seed": np.uint32}
        values: list[Any] = [
            np.array([getattr(row, f.name) for row in rows], dtypes.get(f.name, np.float32))
            for f in dataclasses.fields(cls)
        ]
        return cls(*values)


def sample(
    logits: Float[Array, "B V"],
    params: SamplingArrays,
    positions: Int[Array, " B"],
    seen: Bool[Array, "B V"],
) -> Int[Array, " B"]:
    """The next token of each row.

    What no row asks for is skipped when the batch runs: all greedy rows cost an argmax, and only top-k and
    top-p sort.

    Args:
        logits: Of the next token.
        params: Each row's parameters.
        positions: Position in its sequence of the token drawn, folded into the row's seed.
        seen: Tokens that occur in the sequence.

    Returns:
        int32 [B].
    """
    penalized = penalize(logits.astype(jnp.float32), params.repetition_penalty, seen)
    greedy = jnp.argmax(penalized, axis=-1).astype(jnp.int32)
    return jax.lax.cond(
        jnp.any(params.temperature > 0),
        lambda: jnp.where(params.temperature > 0, _draw(penalized, params, positions), greedy),
        lambda: greedy,
    )


def penalize(
    logits: Float[Array, "B V"], penalty: Float[Array, " B"], seen: Bool[Array, "B V"]
) -> Float[Array, "B V"]:
    """Logits with those of seen tokens moved towards less likely."""
    by = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / by, logits * by), logits)


def filtered(logits: Float[Array, "B V"], params: SamplingArrays) -> Float[Array, "B V"]:
    """Logits over temperature, less each row's largest, with -inf where top-k, top-p and min-p exclude.

    Rows of temperature 0 are scaled by 1.
    """
    temperature = jnp.where(params.temperature > 0, params.temperature, 1.0)
    # The largest goes first: x / 1e-6 leaves float32 no digits for the differences that matter.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature[:, None]
    sorts = (params.temperature > 0) & ((params.top_k > 0) | (params.top_p < 1))
    cutoff = jax.lax.cond(
        jnp.any(sorts),
        lambda: _cutoff(scaled, params),
        lambda: jnp.full(scaled.shape[:1], -jnp.inf, scaled.dtype),
    )
    # A ratio of two probabilities survives the renormalization by top-k and top-p.
    cutoff = jnp.maximum(cutoff, jnp.log(params.min_p))
    return jnp.where(scaled >= cutoff[:, None], scaled, -jnp.inf)


def _cutoff(scaled: Float[Array, "B V"], params: SamplingArrays) -> Float[Array, " B"]:
    """The smallest logit that top-k and then top-p keep."""
    vocab = scaled.shape[-1]
    descending = jnp.sort(scaled, axis=-1, descending=True)
    k = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, vocab), vocab)
    kth = jnp.take_along_axis(descending, k[:, None] - 1, axis=-1)
    probabilities = jax.nn.softmax(jnp.where(descending >= kth, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = params.top_p[:, None]
    # The first stays even if rounding says otherwise; and 1 keeps what rounding pushes past it.
    kept = (before < top_p) | (top_p >= 1) | (jnp.arange(vocab) == 0)[None]
    kept &= descending >= kth
    return jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1)


def _draw(
    logits: Float[Array, "B V"], params: SamplingArrays, positions: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Gumbel-max: the argmax of logits plus Gumbel noise is distributed as their softmax."""
    kept = filtered(logits, params)

    def noise(seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, kept.shape[1:], jnp.float32)

    return jnp.argmax(kept + jax.vmap(noise)(params.seed, positions), axis=-1).astype(jnp.int32)
