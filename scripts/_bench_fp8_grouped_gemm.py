"""Cases of the grouped FP8 products for `bench_kernels`: DeepSeek-V3's experts, as DeepGEMM's benchmark sizes them."""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.pallas_kernels.fp8_grouped_gemm_sm90 import (
    GroupedTileConfig,
    fp8_block_grouped_gemm,
    fp8_rowwise_grouped_gemm,
)

MASKED = (  # groups, expected rows of a group, N, K
    (1, 1024, 4096, 7168),
    (4, 256, 4096, 7168),
    (4, 256, 7168, 2048),
    (32, 192, 6144, 7168),
    (32, 20, 6144, 7168),
    (32, 20, 7168, 3072),
    (256, 8, 4096, 7168),
    (256, 8, 7168, 2048),
)
CONTIGUOUS = (
    (4, 8192, 6144, 7168),
    (8, 4096, 4096, 7168),
    (8, 4096, 7168, 2048),
    (256, 128, 4096, 7168),
    (256, 128, 7168, 2048),
)


def group_sizes(groups: int, rows: int) -> np.ndarray:
    """Rows of each group, 0.7 to 1.3 times the expected ones."""
    share = np.random.default_rng(groups + rows).uniform(0.7, 1.3, groups)
    return (rows * share).astype(np.int32)


def grouped_case(
    op: str,
    groups: int,
    rows: int,
    n: int,
    k: int,
    *,
    masked: bool = False,
    config: GroupedTileConfig | None = None,
) -> dict:
    """The fields of a benchmark case of random data; its error is that of the first and last rows of groups."""
    block = op == "fp8_block_grouped_gemm"
    kernel = fp8_block_grouped_gemm if block else fp8_rowwise_grouped_gemm
    sizes = group_sizes(groups, rows)
    total, most = int(sizes.sum()), 2 * rows
    lead = (groups, most) if masked else (total,)
    starts = np.arange(groups) * most if masked else np.cumsum(sizes) - sizes
    slots = -(-int(np.prod(lead)) // 4) * 4
    if block:
        scale_shapes = (-(-k // 128), slots), (groups, -(-n // 128), -(-k // 128))
    else:
        scale_shapes = lead, (groups, n)

    @jax.jit
    def data():
        keys = jax.random.split(jax.random.key(groups + rows + n + k), 4)
        x = jax.random.normal(keys[0], (*lead, k), jnp.bfloat16).astype(jnp.float8_e4m3fn)
        w = jax.lax.map(  # all at once, random bits would need four times the memory
            lambda key: jax.random.normal(key, (n, k), jnp.bfloat16).astype(jnp.float8_e4m3fn),
            jax.random.split(keys[1], groups),
        )
        x_scale, w_scale = (
            jax.random.uniform(key, shape, minval=0.5, maxval=2.0)
            for key, shape in zip(keys[2:], scale_shapes, strict=True)
        )
        return x, x_scale, w, w_scale

    x, x_scale, w, w_scale = data()

    @jax.jit
    def probe(out, x, x_scale, w, w_scale, first, group):
        """Squared norms of the error and of the reference over four rows."""
        picked = jax.lax.dynamic_slice_in_dim(x.reshape(-1, k), first, 4).astype(jnp.float32)
        weight, scale = w[group].astype(jnp.float32), w_scale[group]
        if block:
            mine = jax.lax.dynamic_slice_in_dim(x_scale, first, 4, axis=1)
            picked = picked * jnp.repeat(mine.T, 128, axis=1)[:, :k]
            weight = weight * jnp.repeat(jnp.repeat(scale, 128, axis=0), 128, axis=1)[:n, :k]
        else:
            mine = jax.lax.dynamic_slice_in_dim(x_scale.reshape(-1), first, 4)
            picked, weight = picked * mine[:, None], weight * scale[:, None]
        expected = jnp.matmul(picked, weight.T, precision="highest")
        found = jax.lax.dynamic_slice_in_dim(out.reshape(-1, n), first, 4).astype(jnp.float32)
        return jnp.sum((found - expected) ** 2), jnp.sum(expected**2)

    def error(out):
        sums = []
        for group in sorted({0, groups // 3, int(sizes.argmax()), groups - 1}):
            for first in (starts[group], starts[group] + sizes[group] - 4):
                sums.append(probe(out, x, x_scale, w, w_scale, first, group))
        wrong, right = np.sum(np.asarray(sums, np.float64), axis=0)
        return float(np.sqrt(wrong / right))

    def run(x, x_scale, w, w_scale, sizes):
        return kernel(x, x_scale, w, w_scale, sizes, expected_rows=rows, config=config)

    scale_bytes = 4 * (total * (k // 128 if block else 1) + w_scale.size)
    return dict(
        op=op,
        format="fp8_e4m3_128x128" if block else "fp8_e4m3_channel",
        shape={"groups": groups, "rows": rows, "n": n, "k": k, "masked": int(masked)},
        fn=jax.jit(run),
        args=(x, x_scale, w, w_scale, jnp.asarray(sizes)),
        error=error,
        flops=2.0 * total * n * k,
        nbytes=float(total * k + groups * n * k + 2 * total * n + scale_bytes),
        unit="fp8",
    )
