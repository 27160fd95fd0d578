"""Cases of FP8 training for `bench_kernels`: Llama-3.1-8B's linear layers, each with its three products.

Of a layer [N, K] with T tokens: the forward pass and the input's gradient are `fp8_block_gemm`, summed over K and N;
the weight's gradient is `fp8_wgrad_gemm`, summed over T. `fp8_quantize_both_axes` prepares activations and gradients,
`fp8_quantize_128x128` float32 weights.
"""

import functools

import jax
import jax.numpy as jnp

from qjax.pallas_kernels.fp8_block_gemm_sm90 import fp8_block_gemm
from qjax.pallas_kernels.fp8_quantize_128x128_sm90 import fp8_quantize_128x128
from qjax.pallas_kernels.fp8_quantize_both_axes_sm90 import fp8_quantize_both_axes
from qjax.pallas_kernels.fp8_wgrad_gemm_sm90 import WgradTileConfig, fp8_wgrad_gemm

LLAMA = (  # N, K of q/k/v together, o, gate and up together, down
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
)
TOKENS = (4096, 8192)
GRADIENT = jnp.float8_e5m2

PRODUCTS = tuple(
    (t, n, k, backward) for t in TOKENS for n, k in LLAMA for backward in (False, True)
)
WGRADS = tuple((t, n, k, add) for t in TOKENS for n, k in LLAMA for add in (False, True))
QUANTIZED = tuple((t, n) for t in TOKENS for n in sorted({n for nk in LLAMA for n in nk}))


@jax.jit
def relative_error(out: jax.Array, expected: jax.Array) -> jax.Array:
    """Frobenius norm of the difference over that of what is expected."""
    return jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)


@functools.partial(jax.jit, static_argnums=(1, 2))
def operand(key: jax.Array, rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """Normal values [rows, columns] in bfloat16, and scales for each row and 128 columns, rows last."""
    keys = jax.random.split(key)
    scale = jax.random.uniform(keys[1], (-(-columns // 128), rows), minval=0.5, maxval=2.0)
    return jax.random.normal(keys[0], (rows, columns), jnp.bfloat16), scale


def spread(scale: jax.Array, columns: int) -> jax.Array:
    """Scales [blocks, rows] as a matrix [rows, columns]."""
    return jnp.repeat(scale.T, 128, axis=1)[:, :columns]


def float32_product(left: jax.Array, right: jax.Array) -> jax.Array:
    """left @ right.T in true float32."""
    return jnp.einsum("mk,nk->mn", left, right, precision=jax.lax.Precision.HIGHEST)


def product_case(tokens: int, n: int, k: int, backward: bool) -> dict:
    """A benchmark case of the forward pass (x @ w.T) or the input's gradient (dy @ w, dy in e5m2), random data."""
    keys = jax.random.split(jax.random.key(tokens + n + k), 3)
    rows, depth = (k, n) if backward else (n, k)
    x, x_scale = operand(keys[0], tokens, depth)
    w, _ = operand(keys[1], rows, depth)
    x, w = x.astype(GRADIENT if backward else jnp.float8_e4m3fn), w.astype(jnp.float8_e4m3fn)
    blocks = (-(-rows // 128), -(-depth // 128))
    w_scale = jax.random.uniform(keys[2], blocks, minval=0.5, maxval=2.0)

    @jax.jit
    def error_of(out, x, x_scale, w, w_scale):
        left = x.astype(jnp.float32) * spread(x_scale, depth)
        right = spread(jnp.repeat(w_scale, 128, axis=0)[:rows].T, depth) * w.astype(jnp.float32)
        return relative_error(out, float32_product(left, right))

    args = (x, x_scale, w, w_scale)
    return dict(
        op="fp8_block_gemm",
        format="fp8_e4m3_128x128",
        shape={"m": tokens, "n": rows, "k": depth},
        fn=jax.jit(fp8_block_gemm),
        args=args,
        error=lambda out: float(error_of(out, *args)),
        flops=2.0 * tokens * n * k,
        nbytes=float(sum(a.nbytes for a in args) + 2 * tokens * rows),
        unit="fp8",
    )


def wgrad_case(
    tokens: int, n: int, k: int, add: bool = False, config: WgradTileConfig | None = None
) -> dict:
    """A benchmark case of the weight's gradient in float32, gradients in e5m2; with `add`, added to another one."""
    keys = jax.random.split(jax.random.key(tokens + n + k), 3)
    dy, dy_scale = operand(keys[0], n, tokens)
    x, x_scale = operand(keys[1], k, tokens)
    args = [dy.astype(GRADIENT), dy_scale, x.astype(jnp.float8_e4m3fn), x_scale]
    if add:
        args.append(jax.random.normal(keys[2], (n, k)))

    def run(*args):
        accumulator = args[4] if add else None
        return fp8_wgrad_gemm(*args[:4], accumulator=accumulator, config=config)

    @jax.jit
    def error_of(out, dy, dy_scale, x, x_scale, before=0.0):
        left = dy.astype(jnp.float32) * spread(dy_scale, tokens)
        right = x.astype(jnp.float32) * spread(x_scale, tokens)
        return relative_error(out, before + float32_product(left, right))

    return dict(
        op="fp8_wgrad_gemm",
        format="fp8_e4m3_1x128",
        shape={"n": n, "k": k, "tokens": tokens, "add": int(add)},
        fn=jax.jit(run),
        args=tuple(args),
        error=lambda out: float(error_of(out, *args)),
        flops=2.0 * tokens * n * k,
        nbytes=float(sum(a.nbytes for a in args) + 4 * n * k),
        unit="fp8",
    )


def quantize_case(tokens: int, n: int) -> dict:
    """A benchmark case of the quantizer along both axes; its error is the mean of both roundings."""
    x, _ = operand(jax.random.key(tokens + n), tokens, n)

    @jax.jit
    def error_of(out, x):
        codes, scale, transposed, transposed_scale = out
        x = x.astype(jnp.float32)
        rows = codes[:tokens].astype(jnp.float32) * spread(scale, n)[:tokens]
        columns = transposed.astype(jnp.float32) * spread(transposed_scale, transposed.shape[1])[:n]
        return (relative_error(rows, x) + relative_error(columns[:, :tokens], x.T)) / 2

    return dict(
        op="fp8_quantize_both_axes",
        format="fp8_e4m3_1x128",
        shape={"m": tokens, "k": n},
        fn=jax.jit(fp8_quantize_both_axes),
        args=(x,),
        error=lambda out: float(error_of(out, x)),
        flops=0.0,
        nbytes=4.0 * tokens * n + 8 * tokens * n / 128,
        unit="copy",
    )


def weight_case(n: int, k: int) -> dict:
    """A benchmark case of the weights' quantizer on float32; its error is infinite if the two orders differ."""
    w = jax.random.normal(jax.random.key(n + k), (n, k))

    @jax.jit
    def error_of(out, w):
        codes, transposed, scale = out
        scale = jnp.repeat(jnp.repeat(scale, 128, axis=0), 128, axis=1)[:n, :k]
        same = jnp.all(codes.T.astype(jnp.float32) == transposed.astype(jnp.float32))
        error = relative_error(codes.astype(jnp.float32) * scale, w)
        return jnp.where(same, error, jnp.inf)

    return dict(
        op="fp8_quantize_128x128",
        format="fp8_e4m3_128x128",
        shape={"n": n, "k": k},
        fn=jax.jit(fp8_quantize_128x128),
        args=(w,),
        error=lambda out: float(error_of(out, w)),
        flops=0.0,
        nbytes=6.0 * n * k + 4 * n * k / 128**2,
        unit="copy",
    )
