"""Cases of the cache's write for `bench_kernels`: queries and keys are rotated, keys and values quantized, in place."""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.kv_cache import LayerShape, create
from qjax.ops import kv_cache_write
from qjax.recipe import kv_cache_format

HEADS, KV_HEADS, DIM = 32, 8, 128
PAGE_SIZE = 64
PAGE_BYTES = {
    "bfloat16": 256,
    "fp8_e4m3": 128,
    "fp8_e4m3_token_head": 132,
    "nvfp4": 72,
}  # of a head
CASES = tuple((name, 1, tokens) for name in PAGE_BYTES for tokens in (4096, 16384)) + tuple(
    (name, batch, 1) for name in PAGE_BYTES for batch in (8, 64)
)


class InPlace:
    """Threads donated pools through the calls, as a step of generation does."""

    def __init__(self, fn, pools):
        """Of fn(pools, *args) -> (out, pools)."""
        self._fn, self.pools = jax.jit(fn, donate_argnums=0), pools

    def __call__(self, *args):
        """The output; the pools are the object's."""
        out, self.pools = self._fn(self.pools, *args)
        return out

    def lower(self, *args):
        """As of a jitted function."""
        return self._fn.lower(self.pools, *args)


def write_case(name: str, batch: int, tokens: int) -> dict:
    """The fields of a benchmark case: `tokens` new tokens of each sequence."""
    length = max(tokens, 2 * PAGE_SIZE)
    shape, format = LayerShape(KV_HEADS, DIM, DIM), kv_cache_format(name)
    layer = create(batch, length, [shape], format, page_size=PAGE_SIZE).layers[0]
    pages = batch * length // PAGE_SIZE
    table = jax.random.permutation(jax.random.key(0), pages).reshape(batch, -1).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[None], (batch, tokens))
    angles = jnp.einsum("bt,h->bth", positions.astype(jnp.float32), jnp.linspace(1, 0.01, DIM // 2))
    query, key, value = (
        jax.random.normal(jax.random.key(i), (batch, tokens, heads, DIM), jnp.bfloat16)
        for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))
    )

    def write(pools, query, key, value, cos, sin, implementation="pallas_mosaic_gpu"):
        query, key_pages, value_pages = kv_cache_write(
            query,
            key,
            value,
            pools[0],
            pools[1],
            table,
            positions=positions,
            valid=jnp.ones(positions.shape, bool),
            rotation=(cos, sin),
            implementation=implementation,
        )
        return query, (key_pages, value_pages)

    args = (query, key, value, jnp.cos(angles), jnp.sin(angles))
    fn = InPlace(write, (layer.key, layer.value))
    empty = jax.tree.map(jnp.copy, fn.pools)

    def error(out):
        """Relative error of the queries; infinite if a byte of the pools in a hundred thousand is another."""
        expected, pools = write(empty, *args, implementation="xla")
        for found, wanted in zip(jax.tree.leaves(fn.pools), jax.tree.leaves(pools), strict=True):
            found, wanted = (np.asarray(x).view(np.uint8) for x in (found, wanted))
            if np.mean(found != wanted) > 1e-5:
                return float("inf")
        out, expected = (x.astype(jnp.float32) for x in (out, expected))
        return float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))

    moved = 2 * HEADS * DIM * 2 + 2 * KV_HEADS * (DIM * 2 + PAGE_BYTES[name]) + 4 * DIM
    return dict(
        op="kv_cache_write",
        format=name,
        shape={"batch": batch, "tokens": tokens, "q_heads": HEADS, "kv_heads": KV_HEADS},
        fn=fn,
        args=args,
        error=error,
        flops=0.0,
        nbytes=float(batch * tokens * moved),
        unit="copy",
    )
