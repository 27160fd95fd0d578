"""Quality of a model: perplexity on a text, divergence from a baseline, distance to stored logits."""

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.nn import CausalLM
from qjax.recipe import KVCacheFormat

Progress = Callable[[Iterable[np.ndarray]], Iterable[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text, and how far it is from a baseline.

    Attributes:
        tokens: Predicted tokens.
        nll: Mean negative log-likelihood per token, nats.
        kl: Mean KL(baseline || model) per token, nats; None without a baseline.
        top1_agreement: Fraction of positions where both rank the same token first; None without one.
    """

    tokens: int
    nll: float
    kl: float | None = None
    top1_agreement: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


@dataclasses.dataclass(frozen=True)
class LogitsError:
    """Distance of logits to reference logits.

    Attributes:
        max_abs: Largest absolute difference.
        rel_l2: L2 norm of the difference over that of the reference.
        argmax_agreement: Fraction of positions with the same largest logit.
    """

    max_abs: float
    rel_l2: float
    argmax_agreement: float


def default_text() -> str:
    """English prose that every CPython carries: the help topics of `pydoc_data`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def windows(token_ids: list[int], window: int, max_tokens: int | None = None) -> np.ndarray:
    """Consecutive windows [n, window] of a token sequence; a shorter rest is dropped.

    Raises:
        ValueError: If the text does not fill one window.
    """
    count = len(token_ids) if max_tokens is None else min(len(token_ids), max_tokens)
    n = count // window
    if n == 0:
        raise ValueError(
            f"evaluate: the text's {len(token_ids)} tokens do not fill one window of {window}; "
            "use a longer text or a shorter window"
        )
    return np.asarray(token_ids[: n * window], np.int32).reshape(n, window)


def forward(
    model: CausalLM, kv_cache: KVCacheFormat | None = None
) -> Callable[[jax.Array], jax.Array]:
    """The jitted function int32 [B, T] -> float32 logits [B, T, V].

    Args:
        model: A loaded model.
        kv_cache: Runs through a cache of this format, as generation does; None attends without one.
    """
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, ids):
        merged = nnx.merge(graphdef, state)
        cache = (
            None if kv_cache is None else merged.init_cache(ids.shape[0], ids.shape[1], kv_cache)
        )
        return merged(ids, cache)[0]

    return lambda ids: run(state, ids)


def score_text(
    model: CausalLM,
    token_windows: np.ndarray,
    *,
    baseline: CausalLM | None = None,
    kv_cache: KVCacheFormat | None = None,
    progress: Progress = iter,
) -> TextScore:
    """Scores a model on windows of tokens, each of which sees nothing before it.

    Args:
        model: A loaded model.
        token_windows: int32 [n, T].
        baseline: The model to compare with, over the same vocabulary.
        kv_cache: See `forward`.
        progress: Wraps the windows to show progress.
    """
    run = forward(model, kv_cache)
    run_baseline = None if baseline is None else forward(baseline)
    totals = np.zeros(3)
    for row in progress(token_windows):
        ids = jnp.asarray(row[None])
        logits = run(ids)
        expected = logits if run_baseline is None else run_baseline(ids)
        totals += np.asarray(_compare(logits, expected, ids), np.float64)
    count = token_windows.shape[0] * (token_windows.shape[1] - 1)
    nll, kl, agree = (float(x) for x in totals / count)
    if baseline is None:
        return TextScore(count, nll)
    return TextScore(count, nll, kl, agree)


@jax.jit
def _compare(logits: jax.Array, expected: jax.Array, ids: jax.Array) -> jax.Array:
    """Sums over positions of -log p(next token), KL(expected || logits), same-argmax."""
    logp = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    logq = jax.nn.log_softmax(expected[:, :-1], axis=-1)
    nll = -jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1)
    kl = jnp.sum(jnp.exp(logq) * (logq - logp), axis=-1)
    agree = jnp.argmax(logp, axis=-1) == jnp.argmax(logq, axis=-1)
    return jnp.stack([jnp.sum(nll), jnp.sum(kl), jnp.sum(agree.astype(jnp.float32))])


def logits_error(logits: np.ndarray, reference: np.ndarray) -> LogitsError:
    """Distance of logits [..., V] to reference logits of the same shape.

    Raises:
        ValueError: If the shapes differ.
    """
    if logits.shape != reference.shape:
        raise ValueError(
            f"evaluate: logits {list(logits.shape)} and reference {list(reference.shape)} must agree"
        )
    difference = logits.astype(np.float64) - reference.astype(np.float64)
    same = np.argmax(logits, axis=-1) == np.argmax(reference, axis=-1)
    return LogitsError(
        float(np.abs(difference).max()),
        float(np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64))),
        float(same.mean()),
    )
