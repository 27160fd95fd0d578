"""Cases of latent attention's decode step for `bench_kernels`: full caches of shuffled pages, plain and FP8."""

import jax
import jax.numpy as jnp

from qjax.formats import qformat
from qjax.ops import latent_attention
from qjax.qarray import QArray
from qjax.quantization import quantize

PAGE_SIZE = 64
LATENT_DIM, VALUE_DIM = 576, 512
SCALE = 192**-0.5
BYTES = {"bf16": 2 * LATENT_DIM, "fp8_e4m3_1x128": VALUE_DIM + 4 * 4 + 2 * 64}  # of a token
CASES = tuple(  # format, batch, context, heads
    (format, batch, context, heads)
    for format in BYTES
    for heads in (128, 16)
    for context in (4096, 16384)
    for batch in (1, 32, 128)
)


def decode_case(format: str, batch: int, context: int, heads: int) -> dict:
    """The fields of a benchmark case of one new token per sequence, random data."""
    key = jax.random.split(jax.random.key(batch + context), 3)
    pages = batch * context // PAGE_SIZE
    query = jax.random.normal(key[0], (batch, 1, heads, LATENT_DIM), jnp.bfloat16)
    pool = jax.random.normal(key[1], (pages, 1, PAGE_SIZE, LATENT_DIM), jnp.bfloat16)
    pools = (pool,)
    if format != "bf16":
        latents = jax.jit(lambda x: quantize(x[..., :VALUE_DIM], format))(pool)
        pools = (latents.qvalue, latents.scale, pool[..., VALUE_DIM:])
    table = jax.random.permutation(key[2], pages).reshape(batch, -1).astype(jnp.int32)
    positions = jnp.full((batch, 1), context - 1, jnp.int32)

    def attend(query, table, positions, *pools, implementation="pallas_mosaic_gpu"):
        pages, rotated = pools[0], None
        if format != "bf16":
            pages = QArray.from_parts(qformat(format), *pools[:2])
            rotated = pools[2]
        return latent_attention(
            query,
            pages,
            table,
            rotated_pages=rotated,
            positions=positions,
            value_dim=VALUE_DIM,
            scale=SCALE,
            implementation=implementation,
        )

    def error(out):  # of the first sequence: the float32 cache of all would not fit
        first = (query[:1], table[:1], positions[:1])
        expected = attend(*first, *pools, implementation="xla").astype(jnp.float32)
        difference = out[:1].astype(jnp.float32) - expected
        return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected))

    return dict(
        op="latent_attention",
        format=format,
        shape={"batch": batch, "context": context, "heads": heads},
        fn=jax.jit(attend),
        args=(query, table, positions, *pools),
        error=error,
        flops=2.0 * batch * heads * context * (LATENT_DIM + VALUE_DIM),
        nbytes=float(batch * (context * BYTES[format] + heads * 2 * (LATENT_DIM + VALUE_DIM))),
        unit="bf16",
    )
