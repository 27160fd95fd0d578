"""Cases of prefill attention for `bench_kernels`: whole prompts, and chunks of them over a paged cache."""

import jax
import jax.numpy as jnp
import numpy as np

from qjax import dot_product_attention, paged_attention
from qjax.kv_cache import LayerShape, create, write
from qjax.recipe import kv_cache_format

HEADS, KV_HEADS = 32, 8
DENSE = (  # batch, tokens, head_dim
    (1, 8192, 128),
    (1, 16384, 128),
    (4, 2048, 128),
    (1, 8192, 64),
)
PAGED = (  # KV-cache format, queries, keys, page size
    ("bfloat16", 2048, 16384, 64),
    ("fp8_e4m3", 2048, 16384, 64),
    ("fp8_e4m3_token_head", 2048, 16384, 64),
    ("fp8_e5m2", 2048, 16384, 64),
    ("nvfp4", 2048, 16384, 64),
    ("bfloat16", 2048, 16384, 16),
    ("fp8_e4m3", 512, 4096, 64),
)
CHECKED = 4  # queries at each end whose outputs are compared


def dense_case(batch: int, tokens: int, dim: int) -> dict:
    """The fields of a benchmark case of causal attention among a prompt's tokens."""
    keys = jax.random.split(jax.random.key(tokens + dim), 3)
    q, k, v = (
        jax.random.normal(key, (batch, tokens, heads, dim), jnp.bfloat16)
        for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS), strict=True)
    )

    def reference(q, positions):
        return dot_product_attention(q, k, v, positions=positions, implementation="xla")

    return dict(
        op="prefill_attention",
        format="bf16",
        shape=_shape(batch, HEADS, dim) | {"seq": tokens, "causal": 1},
        fn=jax.jit(
            lambda q, k, v: dot_product_attention(q, k, v, implementation="pallas_mosaic_gpu")
        ),
        args=(q, k, v),
        error=lambda out: _error(out, q, reference, start=0),
        flops=2.0 * batch * HEADS * dim * tokens * (tokens + 1),
        nbytes=2.0 * (2 * q.size + k.size + v.size),
        unit="bf16",
    )


def paged_case(name: str, queries: int, tokens: int, page_size: int, dim: int = 128) -> dict:
    """The fields of a benchmark case of a prompt's last chunk over a cache of this format."""
    keys = jax.random.split(jax.random.key(tokens + dim), 3)
    shape = (1, tokens, KV_HEADS, dim)
    cache = create(
        1, tokens, [LayerShape(KV_HEADS, dim, dim)], kv_cache_format(name), page_size=page_size
    )
    order = np.random.default_rng(0).permutation(cache.page_table.size)
    table = jnp.asarray(order, jnp.int32).reshape(cache.page_table.shape)
    where = jnp.arange(tokens, dtype=jnp.int32)[None]
    pools = [
        jax.jit(write)(pool, table, where, where >= 0, jax.random.normal(key, shape, jnp.bfloat16))
        for pool, key in zip((cache.layers[0].key, cache.layers[0].value), keys, strict=False)
    ]
    q = jax.random.normal(keys[2], (1, queries, HEADS, dim), jnp.bfloat16)
    leaves, tree = jax.tree.flatten(pools)
    start = tokens - queries

    def attend(q, positions, implementation, *leaves):
        key, value = jax.tree.unflatten(tree, leaves)
        return paged_attention(
            q, key, value, table, positions=positions, implementation=implementation
        )

    def run(q, *leaves):
        return attend(q, where[:, start:], "pallas_mosaic_gpu", *leaves)

    return dict(
        op="paged_prefill_attention",
        format=name,
        shape=_shape(1, HEADS, dim) | {"queries": queries, "keys": tokens, "page_size": page_size},
        fn=jax.jit(run),
        args=(q, *leaves),
        error=lambda out: _error(
            out, q, lambda q, positions: attend(q, positions, "xla", *leaves), start=start
        ),
        flops=4.0 * HEADS * dim * queries * (start + (queries + 1) / 2),
        nbytes=float(4 * q.size + sum(leaf.nbytes for leaf in leaves)),
        unit="bf16",
    )


def _shape(batch: int, heads: int, dim: int) -> dict[str, int]:
    return {"batch": batch, "q_heads": heads, "kv_heads": KV_HEADS, "head_dim": dim}


def _error(out, q, reference, *, start: int) -> float:
    """Relative error of the first and last queries' outputs."""
    sums = np.zeros(2)
    for first in (0, q.shape[1] - CHECKED):
        positions = jnp.arange(first, first + CHECKED, dtype=jnp.int32)[None] + start
        positions = jnp.broadcast_to(positions, (q.shape[0], CHECKED))
        wanted = reference(q[:, first : first + CHECKED], positions).astype(jnp.float32)
        found = out[:, first : first + CHECKED].astype(jnp.float32)
        sums += [float(jnp.sum((found - wanted) ** 2)), float(jnp.sum(wanted**2))]
    return float(np.sqrt(sums[0] / sums[1]))
