"""Operands of the products of 16-bit activations and weights of 2 to 8 bits, and what they should give."""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.pallas_kernels.mixed_gemm_sm90 import ELEMENTS, repack

SIZES = [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (57344, 8192)]
TOLERANCE = 2e-3
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def run(mixed_gemm, args, group, config=None, num_sms=2, element="int4", zero=0):
    """The product of what `operands` makes, by Hopper's kernel or Ampere's."""
    x, codes, scale, offset, bias = args
    n = codes.shape[0]
    by_minimum = offset is not None and offset.dtype == scale.dtype
    codes, scale, offset = repack(codes, scale, offset, group_size=group, element=element)
    return mixed_gemm(
        x,
        codes,
        scale,
        None if by_minimum else offset,
        minimum=offset if by_minimum else None,
        n=n,
        group_size=group,
        element=element,
        zero=zero,
        bias=bias,
        config=config,
        num_sms=num_sms,
    )


def operands(
    m, n, k, group, *, element="int4", offset=None, dtype="bfloat16", scale_dtype="bfloat16"
):
    """x, codes as checkpoints store them, scales, zero points or minimums or None, bias."""
    keys = jax.random.split(jax.random.key(m + n + k), 5)
    groups, bits = -(-k // group), ELEMENTS[element]
    x = jax.random.normal(keys[0], (m, k)).astype(dtype)
    codes = jax.random.bits(keys[1], (n, k * bits // 8), jnp.uint8)
    if element == "int8":
        codes = jax.lax.bitcast_convert_type(codes, jnp.int8)
    elif bits == 8:  # every code but NaN and infinities
        mask = {"float8_e4m3fn": 0x7F, "float8_e5m2": 0x7C}[element]
        finite = jnp.where((codes & mask) == mask, codes ^ jnp.uint8(0x40), codes)
        codes = jax.lax.bitcast_convert_type(finite, jnp.dtype(element))
    size = 1e-3 if bits == 8 else 0.1  # float16 products stay finite
    scale = (size * jax.random.normal(keys[2], (n, groups))).astype(scale_dtype)
    offsets = None
    if offset == "zero_point":
        limit = 2 ** (bits - 1)
        offsets = jax.random.randint(keys[3], (n, groups), -limit, limit + 1)
        offsets = offsets.astype(jnp.int16 if bits == 8 else jnp.int8)
    elif offset == "minimum":
        offsets = jax.random.normal(keys[3], (n, groups)).astype(scale_dtype)
    return x, codes, scale, offsets, jax.random.normal(keys[4], (n,))


def reference(x, codes, scale, offset, bias, group, element="int4", zero=0):
    """float32 product with the dequantized weights."""
    bits = ELEMENTS[element]
    scale, k = np.asarray(scale, np.float32), codes.shape[1] * 8 // bits
    q = np.asarray(codes, np.float32)
    if bits < 8:
        fields = [np.asarray(codes) >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
        fields = np.stack(fields, axis=-1).reshape(-1, k)
        q = E2M1[fields] if element == "float4_e2m1fn" else fields - np.float32(2 ** (bits - 1))
    spread = lambda values: np.repeat(np.asarray(values, np.float32), group, axis=1)[:, :k]  # noqa: E731
    is_zero_point = offset is not None and offset.dtype.kind == "i"
    w = (q - (spread(offset) if is_zero_point else zero)) * spread(scale)
    if offset is not None and not is_zero_point:
        w += spread(offset)
    product = jnp.matmul(np.asarray(x, np.float32), w.T, precision="highest")
    return np.asarray(product) + np.asarray(bias, np.float32)


def relative_error(out, expected):
    return np.linalg.norm(np.asarray(out, np.float32) - expected) / np.linalg.norm(expected)


def every_code(element, dtype):
    """Weights of every finite code, as the product with an identity finds them, and what they are."""
    bits, n, k = ELEMENTS[element], 64, 128
    codes = np.arange(n * k * bits // 8).astype(np.uint8).reshape(n, -1)
    values = jnp.asarray(codes)
    if bits == 8:
        values = jax.lax.bitcast_convert_type(values, jnp.dtype(element))
        finite = jnp.isfinite(values.astype(jnp.float32))
        values = jnp.where(finite, values, jnp.zeros_like(values))
    args = jnp.eye(k, dtype=dtype), values, jnp.ones((n, 1)), None, jnp.zeros(n)
    return args, reference(*args, k, element)
