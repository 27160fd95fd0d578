"""Cases of the grouped products with 4-bit weights for `bench_kernels`: GPT-OSS's and Kimi K2's experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats import qformat
from qjax.ops import gated_ragged_dot, ragged_dot
from qjax.qarray import QArray, dequantize_stored, to_wgmma

MODELS = (  # format, experts, top-k, N and K of the first products, of the second
    ("mxfp4", 32, 4, (2880, 2880), (2880, 2880)),
    ("mxfp4", 128, 4, (2880, 2880), (2880, 2880)),
    ("int4_1x32", 384, 8, (2048, 7168), (7168, 2048)),
)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
CHECKED = 3  # experts whose outputs are compared


def routed(experts: int, top_k: int, tokens: int) -> np.ndarray:
    """Rows of each expert if every token takes `top_k` of them at random."""
    rng = np.random.default_rng(experts + tokens)
    chosen = [rng.permutation(experts)[:top_k] for _ in range(tokens)]
    return np.bincount(np.concatenate(chosen), minlength=experts).astype(np.int32)


def weight(name: str, experts: int, n: int, k: int, pairs: bool, key: jax.Array) -> QArray:
    """Random codes and scales, re-laid out."""
    format = qformat(name)
    if format.element == "int4":
        format = dataclasses.replace(format, scale_dtype="bfloat16")
    keys = jax.random.split(key, 2)
    shape = format.scale_shape((experts, n, k))
    scale = jnp.exp2(jax.random.randint(keys[0], shape, -9, -5).astype(jnp.float32))
    codes = jax.lax.map(  # all at once, random bits would need four times the memory
        lambda key: jax.random.bits(key, (n, k // 2), jnp.uint8), jax.random.split(keys[1], experts)
    )
    w = QArray.from_parts(format, codes, scale.astype(format.scale_dtype))
    return to_wgmma(w, pairs=pairs)


def grouped_case(
    name: str, experts: int, top_k: int, n: int, k: int, tokens: int, *, gated: bool
) -> dict:
    """The fields of a benchmark case of random data; its error is that of a few experts' rows."""
    sizes = routed(experts, top_k, tokens)
    rows, active = int(sizes.sum()), int((sizes > 0).sum())
    keys = jax.random.split(jax.random.key(experts + tokens + n), 3)
    x = jax.random.normal(keys[0], (rows, k), jnp.bfloat16)
    make = jax.jit(weight, static_argnums=(0, 1, 2, 3, 4))
    together = gated and name == "mxfp4"  # as GPT-OSS has them
    if together:
        weights = [make(name, experts, 2 * n, k, True, keys[1])]
    else:
        weights = [make(name, experts, n, k, False, key) for key in keys[1 : 2 + gated]]

    def run(x, sizes, w, up=None):
        if gated:
            return gated_ragged_dot(x, w, up, sizes, implementation="pallas_mosaic_gpu")
        return ragged_dot(x, w, sizes, implementation="pallas_mosaic_gpu")

    @jax.jit
    def expected(x, weights):
        products = [
            jnp.matmul(x.astype(jnp.float32), dequantize_stored(w).T, precision="highest")
            for w in weights
        ]
        if together:
            products = products[0][:, ::2], products[0][:, 1::2]
        return jax.nn.silu(products[0]) * products[1] if gated else products[0]

    def error(out):
        wrong = right = 0.0
        for expert in np.argsort(-sizes, kind="stable")[:CHECKED]:
            end = int(sizes[: expert + 1].sum())
            mine = slice(end - int(sizes[expert]), end)
            one = jax.tree.map(lambda part, e=expert: part[e], weights)
            found = expected(x[mine], one)
            wrong += float(jnp.sum((out[mine].astype(jnp.float32) - found) ** 2))
            right += float(jnp.sum(found**2))
        return float(np.sqrt(wrong / right))

    bits = 4 + 8 * weights[0].scale.dtype.itemsize / 32
    products = 2 if gated else 1
    return dict(
        op="mixed_gated_grouped_gemm" if gated else "mixed_grouped_gemm",
        format=name,
        shape={"experts": experts, "top_k": top_k, "tokens": tokens, "n": n, "k": k},
        fn=jax.jit(run),
        args=(x, jnp.asarray(sizes), *weights),
        error=error,
        flops=2.0 * products * rows * n * k,
        nbytes=float(products * active * n * k * bits / 8 + 2 * rows * (n + k)),
        unit="bf16",
    )


def grouped_cases(gated: bool):
    """Arguments of `grouped_case` for each model and number of tokens."""
    for name, experts, top_k, first, second in MODELS:
        for tokens in TOKENS:
            yield name, experts, top_k, *(first if gated else second), tokens
