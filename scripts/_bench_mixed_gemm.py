"""Cases of the mixed-input product for `bench_kernels`: 16-bit activations and weights of 2 to 8 bits."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qjax.formats import WHOLE, qformat
from qjax.pallas_kernels.mixed_gemm_sm90 import mixed_gemm
from qjax.qarray import QArray, dequantize_stored, to_wgmma

FORMATS = (
    "fp8_e4m3_128x128",
    "fp8_e4m3_channel",
    "int8_1x128",
    "int8_channel",
    "int4_1x128",
    "int4_1x32_min",
    "mxfp4",
    "int2_1x128",
)
NK = ((4096, 4096), (28672, 4096), (4096, 14336))


def weight(name: str, n: int, k: int, key: jax.Array) -> QArray:
    """Random codes and scales of a format, re-laid out; scales and minimums of integers are bfloat16."""
    format = qformat(name)
    keys = jax.random.split(key, 3)
    shape = format.scale_shape((n, k))
    if format.scale_dtype == "float8_e8m0fnu":
        scale = jnp.exp2(jax.random.randint(keys[0], shape, -9, -5).astype(jnp.float32))
    else:
        if not format.spec.is_float:
            format = dataclasses.replace(format, scale_dtype="bfloat16")
        scale = jax.random.uniform(keys[0], shape, format.scale_dtype, 0.01, 0.02)
    scale = scale.astype(format.scale_dtype)
    if format.bits == 8:
        codes = (40 * jax.random.normal(keys[1], (n, k), jnp.bfloat16)).astype(format.element)
    else:
        codes = jax.random.bits(keys[1], format.storage_shape((n, k)), jnp.uint8)
    minimum = None
    if format.offset == "minimum":
        minimum = -8 * scale + jax.random.normal(keys[2], scale.shape, scale.dtype) / 64
    return to_wgmma(QArray.from_parts(format, codes, scale, minimum=minimum))


def mixed_case(
    name: str,
    m: int,
    n: int,
    k: int,
    config: Any = None,
    *,
    op: str = "mixed_gemm",
    gemm: Callable = mixed_gemm,
) -> dict:
    """The fields of a benchmark case of random data.

    Args:
        name: Format of the weights.
        m: Tokens.
        n: Weight rows.
        k: Columns.
        config: The kernel's `TileConfig`, None for its choice.
        op: The kernel's name.
        gemm: The kernel's function.
    """
    keys = jax.random.split(jax.random.key(m + n + k), 2)
    x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    w = jax.jit(weight, static_argnums=(0, 1, 2))(name, n, k, keys[1])
    f = w.format
    arrays = [w.scale] if w.minimum is None else [w.scale, w.minimum]

    def run(x, codes, scale, minimum=None):
        return gemm(
            x,
            codes,
            scale,
            minimum=minimum,
            n=n,
            group_size=k if f.block_shape[1] == WHOLE else f.block_shape[1],
            element=f.element,
            zero=0 if minimum is None else -(2 ** (f.bits - 1)),
            config=config,
        )

    @jax.jit
    def error_of(out, x, w):
        values = dequantize_stored(w)
        highest = jax.lax.Precision.HIGHEST
        expected = jnp.einsum("mk,nk->mn", x.astype(jnp.float32), values, precision=highest)
        difference = out.astype(jnp.float32) - expected
        return jnp.linalg.norm(difference) / jnp.linalg.norm(expected)

    return dict(
        op=op,
        format=name,
        shape={"m": m, "n": n, "k": k},
        fn=jax.jit(run),
        args=(x, w.qvalue, *arrays),
        error=lambda out: float(error_of(out, x, w)),
        flops=2.0 * m * n * k,
        nbytes=float(w.nbytes + 2 * m * (k + n)),
        unit="bf16",
    )
