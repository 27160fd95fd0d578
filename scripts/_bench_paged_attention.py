"""Cases of decode attention for `bench_kernels`: full caches of shuffled pages in each of the pages' formats."""

import jax
import jax.numpy as jnp

from qjax.pallas_kernels.paged_attention_sm90 import paged_decode_attention

Q_HEADS, KV_HEADS, DIM, PAGE_SIZE = 32, 8, 128, 64  # Llama-3.1-8B
FORMATS = ("fp8_e4m3_tensor", "bf16", "fp8_e4m3_page", "nvfp4")
SIZES = tuple((b, context) for context in (1024, 8192, 32768) for b in (1, 16, 64, 128))
CASES = tuple((format, *size) for format in FORMATS for size in (*SIZES, (1, 131072)))
MAGNITUDES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)  # of e2m1 codes


def decode_case(format: str, batch: int, context: int, **options) -> dict:
    """The fields of a benchmark case of one new token per sequence, random data.

    Args:
        format: Of the pages: "bf16"; e4m3 with one scale for each head ("fp8_e4m3_tensor") or, as `qjax.kv_cache`
            has them, each page and head ("fp8_e4m3_page"); or "nvfp4", which has those of pages too.
        batch: Sequences.
        context: Tokens of each.
        options: Of `paged_decode_attention`.
    """
    keys = jax.random.split(jax.random.key(batch + context), 6)
    pages = batch * context // PAGE_SIZE
    query = jax.random.normal(keys[0], (batch, Q_HEADS, DIM), jnp.bfloat16)
    pools = [_pool(key, format, pages) for key in keys[1:3]]
    scales = {}
    if format != "bf16":
        shape = (KV_HEADS,) if format == "fp8_e4m3_tensor" else (pages, KV_HEADS)
        scales["key_scale"], scales["value_scale"] = (
            jax.random.uniform(key, shape, minval=0.5, maxval=1.0) for key in keys[3:5]
        )
    if format == "nvfp4":
        scales["key_block_scale"], scales["value_block_scale"] = (scale for _, scale in pools)
    table = jax.random.permutation(keys[5], pages).reshape(batch, -1).astype(jnp.int32)
    lengths = jnp.full((batch,), context, jnp.int32)

    def attend(query, key_pages, value_pages, table, lengths, scales):
        return paged_decode_attention(
            query, key_pages, value_pages, table, lengths, **scales, **options
        )

    def error(out):
        def read(which: int, row):
            name, (stored, blocks) = ("key", "value")[which], pools[which]
            values = stored[row].astype(jnp.float32) if blocks is None else _decoded(stored[row])
            if blocks is not None:
                values = values * jnp.repeat(blocks[row].astype(jnp.float32), 16, axis=-1)
            scale = scales.get(f"{name}_scale", jnp.ones((KV_HEADS,)))
            scale = scale[None] if scale.ndim == 1 else scale[row]
            values = values * scale[:, :, None, None]
            return jnp.moveaxis(values, 2, 1).reshape(context, KV_HEADS, DIM)

        def one(q, row):  # sequence by sequence: the float32 cache of all would not fit
            q = q.astype(jnp.float32).reshape(KV_HEADS, -1, DIM)
            highest = jax.lax.Precision.HIGHEST
            logits = jnp.einsum("kgh,skh->kgs", q, read(0, row), precision=highest)
            weights = jax.nn.softmax(logits * DIM**-0.5, axis=-1)
            return jnp.einsum("kgs,skh->kgh", weights, read(1, row), precision=highest)

        expected = jax.lax.map(lambda a: one(*a), (query, table)).reshape(out.shape)
        difference = out.astype(jnp.float32) - expected
        return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected))

    args = (query, *(stored for stored, _ in pools), table, lengths, scales)
    return dict(
        op="paged_attention",
        format=format,
        shape={
            "batch": batch,
            "context": context,
            "q_heads": Q_HEADS,
            "kv_heads": KV_HEADS,
            "head_dim": DIM,
        },
        fn=jax.jit(attend),
        args=args,
        error=error,
        flops=4.0 * batch * Q_HEADS * context * DIM,
        nbytes=float(
            2 * query.nbytes
            + sum(x.nbytes for x in jax.tree.leaves(args[1:3]))
            + sum(x.nbytes for name, x in scales.items() if "block" in name)
        ),
        unit="bf16",
    )


def _pool(key, format: str, pages: int) -> tuple[jax.Array, jax.Array | None]:
    """Random pages, and the scales of their blocks if they have some."""
    shape = (pages, KV_HEADS, PAGE_SIZE, DIM)
    if format != "nvfp4":
        dtype = "bfloat16" if format == "bf16" else "float8_e4m3fn"
        return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype), None
    codes, scales = jax.random.split(key)
    blocks = jax.random.uniform(scales, (*shape[:3], DIM // 16), jnp.bfloat16, 0.25, 0.5)
    return (
        jax.random.bits(codes, (*shape[:3], DIM // 2), jnp.uint8),
        blocks.astype(jnp.float8_e4m3fn),
    )


def _decoded(stored: jax.Array) -> jax.Array:
    """The numbers of pairs of e2m1 codes, even channels low."""
    codes = jnp.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:-1], -1)
    magnitude = jnp.asarray(MAGNITUDES, jnp.float32)[codes & 7]
    return jnp.where(codes > 7, -magnitude, magnitude)
