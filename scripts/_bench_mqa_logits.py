"""Cases of the indexer's logits for `bench_kernels`: prompts over keys in one array, and decode over pages."""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.ops import mqa_logits, paged_mqa_logits

HEADS, DIM = 64, 128
PAGE_SIZE = 64
PREFILL = (  # queries, keys, heads, whether query s sees the keys up to keys - queries + s only
    (4096, 32768, 64, True),
    (4096, 32768, 64, False),
    (4096, 32768, 32, False),
    (8192, 8192, 64, True),
    (512, 131072, 64, True),
)
PAGED = tuple(  # batch, new queries, context
    (batch, queries, context)
    for batch in (1, 64)
    for queries in (1, 2)
    for context in (4096, 32768, 131072)
)
CHECKED = 4  # queries at each end whose logits are compared


def prefill_case(queries: int, count: int, heads: int, causal: bool) -> dict:
    """The fields of a benchmark case of a prompt's last queries over all its keys."""
    key = jax.random.split(jax.random.key(queries + count), 4)
    query = jax.random.normal(key[0], (queries, heads, DIM), jnp.bfloat16)
    keys = jax.random.normal(key[1], (count, DIM), jnp.bfloat16)
    query, keys = (x.astype(jnp.float8_e4m3fn) for x in (query, keys))
    weights = jax.random.normal(key[2], (queries, heads))
    scale = jax.random.uniform(key[3], (count,), minval=0.5, maxval=2.0)
    last = count - queries + 1 + np.arange(queries)
    end = jnp.asarray(last if causal else np.full(queries, count), jnp.int32)
    start = jnp.zeros_like(end)
    seen = int(np.sum(end))

    def error(out):
        rows = np.r_[:CHECKED, queries - CHECKED : queries]
        expected = mqa_logits(
            query[rows],
            weights[rows],
            keys,
            scale,
            start[rows],
            end[rows],
            implementation="xla",
        )
        return _error(out[rows], expected)

    return dict(
        op="mqa_logits",
        format="fp8_e4m3",
        shape=_shape(heads) | {"queries": queries, "keys": count, "causal": int(causal)},
        fn=jax.jit(lambda *args: mqa_logits(*args, implementation="pallas_mosaic_gpu")),
        args=(query, weights, keys, scale, start, end),
        error=error,
        flops=2.0 * heads * DIM * seen,
        nbytes=float(query.size + keys.size + 4 * (weights.size + count + queries * count)),
        unit="fp8",
    )


def paged_case(batch: int, queries: int, context: int) -> dict:
    """The fields of a benchmark case of a decode step over full caches of shuffled pages."""
    key = jax.random.split(jax.random.key(batch + context), 5)
    pages = batch * context // PAGE_SIZE
    query = jax.random.normal(key[0], (batch, queries, HEADS, DIM), jnp.bfloat16)
    pool = jax.random.normal(key[1], (pages, PAGE_SIZE, DIM), jnp.bfloat16)
    query, pool = (x.astype(jnp.float8_e4m3fn) for x in (query, pool))
    weights = jax.random.normal(key[2], (batch, queries, HEADS))
    scale = jax.random.uniform(key[3], (pages, PAGE_SIZE), minval=0.5, maxval=2.0)
    table = jax.random.permutation(key[4], pages).reshape(batch, -1).astype(jnp.int32)
    lengths = jnp.full((batch,), context, jnp.int32)

    def error(out):
        expected = paged_mqa_logits(
            query[:1], weights[:1], pool, scale, table[:1], lengths[:1], implementation="xla"
        )
        return _error(out[:queries], expected)

    seen = batch * sum(context - i for i in range(queries))
    return dict(
        op="paged_mqa_logits",
        format="fp8_e4m3",
        shape=_shape(HEADS) | {"batch": batch, "queries": queries, "context": context},
        fn=jax.jit(lambda *args: paged_mqa_logits(*args, implementation="pallas_mosaic_gpu")),
        args=(query, weights, pool, scale, table, lengths),
        error=error,
        flops=2.0 * HEADS * DIM * seen,
        nbytes=float(query.size + pool.size + 4 * (scale.size + batch * queries * context)),
        unit="fp8",
    )


def _shape(heads: int) -> dict[str, int]:
    return {"heads": heads, "head_dim": DIM}


def _error(out, expected) -> float:
    """Relative error of the finite logits; infinite if others are finite."""
    seen = jnp.isfinite(expected)
    if bool(jnp.any(seen != jnp.isfinite(out))):
        return float("inf")
    difference = jnp.where(seen, out - expected, 0)
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(jnp.where(seen, expected, 0)))
