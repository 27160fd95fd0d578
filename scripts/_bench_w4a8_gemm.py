"""Cases of INT4 weights with 8-bit activations for `bench_kernels`: the product alone, x quantized before."""

import jax
import jax.numpy as jnp

from qjax.pallas_kernels import w4a8_gemm_sm90 as kernel

X_DTYPES = {"int4_1x128_int8": "int8", "int4_1x128_fp8": "float8_e4m3fn"}
NK = ((4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192))
TOKENS = (1, 8, 16, 32, 64, 256, 4096)
GROUP = 128
PRODUCTS = tuple((name, m, n, k) for name in X_DTYPES for n, k in NK for m in TOKENS)


def product_case(
    name: str,
    m: int,
    n: int,
    k: int,
    config: kernel.TileConfig | kernel.WideTileConfig | None = None,
) -> dict:
    """The fields of a benchmark case of random data."""
    keys = jax.random.split(jax.random.key(m + n + k), 4)
    x = jax.random.normal(keys[0], (m, k)) * 40
    dtype = jnp.dtype(X_DTYPES[name])
    x = jnp.clip(jnp.round(x), -127, 127).astype(dtype) if dtype == jnp.int8 else x.astype(dtype)
    x_scale = jax.random.uniform(keys[1], (m,), minval=0.01, maxval=0.02)
    codes = jax.random.bits(keys[2], (n, k // 2), jnp.uint8)
    scale = jax.random.uniform(keys[3], (n, k // GROUP), jnp.bfloat16, 0.01, 0.02)
    words, by_rows, _ = jax.jit(lambda c, s: kernel.repack(c, s, group_size=GROUP))(codes, scale)

    def run(x, x_scale, words, by_rows):
        return kernel.w4a8_gemm(x, x_scale, words, by_rows, n=n, group_size=GROUP, config=config)

    @jax.jit
    def error_of(out, x, x_scale, codes, scale):
        q = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(n, k).astype(jnp.float32) - 8
        w = q * jnp.repeat(scale.astype(jnp.float32), GROUP, axis=1)
        highest = jax.lax.Precision.HIGHEST
        expected = jnp.einsum("mk,nk->mn", x.astype(jnp.float32), w, precision=highest)
        expected = expected * x_scale[:, None]
        difference = out.astype(jnp.float32) - expected
        return jnp.linalg.norm(difference) / jnp.linalg.norm(expected)

    return dict(
        op="w4a8_gemm",
        format=name,
        shape={"m": m, "n": n, "k": k},
        fn=jax.jit(run),
        args=(x, x_scale, words, by_rows),
        error=lambda out: float(error_of(out, x, x_scale, codes, scale)),
        flops=2.0 * m * n * k,
        nbytes=n * k / 2 + 2.0 * n * k / GROUP + m * (k + 2.0 * n + 4),
        unit="fp8",
    )


def tilings(name: str, m: int, n: int, k: int, *, num_sms: int) -> list[tuple]:
    """(modelled microseconds, tiling) of each candidate."""
    integers = X_DTYPES[name] == "int8"
    cost = kernel.costs(k, GROUP, integers=integers, zeros=False, scale_bytes=2)
    return [
        (kernel.modelled_us(c, m, n, k, cost, num_sms=num_sms), c)
        for c in kernel.candidate_tiles(m, k, cost)
    ]
