"""Quantizers fused with RMSNorm and SiLU-mul, against the unfused steps and `qjax.quantization`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import testing
from qjax.pallas_kernels import fp8_quantize_fused_sm90 as fused
from qjax.pallas_kernels.fp8_block_gemm_sm90 import fp8_block_gemm
from qjax.pallas_kernels.fp8_quantize_fused_sm90 import (
    fp8_quantize_rms_norm,
    fp8_quantize_silu_mul,
    unsupported_reason,
)
from qjax.pallas_kernels.fp8_quantize_sm90 import padded_rows
from qjax.quantization import Grid, compute_grid, qformat, quantize

EPS = 1e-5
SCALE = 0.02


def rows(seed, m, k, dtype=jnp.bfloat16):
    """Rows of very different size; one of zeros, one with an infinity."""
    key, spread = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(key, (m, k)) * jnp.exp(2.0 * jax.random.normal(spread, (m, 1)))
    return x.astype(dtype).at[1].set(0).at[2, 7].set(jnp.inf)


def weights(k, dtype=jnp.bfloat16):
    return (1.0 + 0.1 * jax.random.normal(jax.random.key(9), (k,))).astype(dtype)


def norm(x, weight):
    """As `qjax.nn.RMSNorm`, one rounding at a time."""
    f = x.astype(jnp.float32)
    f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + EPS)
    return jax.block_until_ready((f * weight.astype(jnp.float32)[None]).astype(x.dtype))


def silu_mul(gate, up):
    activated = jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype)
    product = activated.astype(jnp.float32) * up.astype(jnp.float32)
    return jax.block_until_ready(product.astype(gate.dtype))


def reference(y, element, scaling, **bounds):
    """Codes, and scales as the kernels lay them out, of the quantizer."""
    if scaling == "static":
        codes = quantize(
            y, qformat(f"{element}_tensor"), grid=Grid(jnp.full((1, 1), SCALE, jnp.float32))
        ).qvalue
        return np.asarray(codes), np.float32([SCALE])
    name = f"{element}_{'1x128' if scaling == '1x128' else 'channel'}"
    q = quantize(y, name, grid=compute_grid(y, qformat(name), **bounds))
    scale = np.asarray(q.scale)
    return np.asarray(q.qvalue), scale.T if scaling == "1x128" else scale[:, 0]


def differing(found, expected) -> float:
    """Share of codes whose values differ; none may differ by more than a step of the grid."""
    values = [np.asarray(a).astype(np.float32) for a in (found, expected)]
    np.testing.assert_array_equal(*map(np.isnan, values))
    steps = [np.asarray(a).view(np.uint8).astype(int) for a in (found, expected)]
    other = (values[0] != values[1]) & ~np.isnan(values[0])
    assert np.abs(steps[0] - steps[1])[other].max(initial=0) <= 1
    return float(other.mean())


def check(found, y, *, element, scaling, exact, **bounds):
    m, k = y.shape
    codes, scale = found
    expected_codes, expected_scale = reference(y, element, scaling, **bounds)
    assert codes.shape == (padded_rows(m), k)
    assert not np.asarray(codes[m:]).view(np.uint8).any()
    scale = np.asarray(scale)
    if scaling == "1x128":
        assert scale.shape == (k // 128, -(-m // 64) * 64)
        assert (scale[:, m:] == 1).all()
        scale = scale[:, :m]
    if exact:
        np.testing.assert_array_equal(scale, expected_scale)
        np.testing.assert_array_equal(
            np.asarray(codes[:m]).view(np.uint8), expected_codes.view(np.uint8)
        )
        return
    # A float32 sum in another order moves a few bfloat16 roundings by one step, 2**-8.
    np.testing.assert_allclose(scale, expected_scale, rtol=2**-7)
    same = (scale == expected_scale) | np.isnan(scale)
    assert same.mean() >= 0.9
    if scaling == "1x128":  # [blocks, rows]
        same = np.repeat(same.T, 128, axis=1)
    same = np.broadcast_to(same.reshape(same.shape[0], -1), (m, k))
    assert differing(np.asarray(codes[:m])[same], expected_codes[same]) <= 0.01


@pytest.mark.parametrize("scaling", fused.SCALINGS)
@pytest.mark.parametrize(("m", "k"), [(5, 768), (9, 1408)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(m, k, scaling, with_residual):
    x, weight = rows(0, m, k), weights(k)
    residual = rows(1, m, k)[::-1] if with_residual else None
    scale = jnp.float32([SCALE]) if scaling == "static" else None
    with testing.interpret():
        codes, scales, *total = fp8_quantize_rms_norm(
            x, weight, eps=EPS, scaling=scaling, scale=scale, residual=residual
        )
    if residual is not None:
        x = (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(x.dtype)
        np.testing.assert_array_equal(total[0].view(np.uint16), x.view(np.uint16))
    check((codes, scales), norm(x, weight), element="fp8_e4m3", scaling=scaling, exact=False)


@pytest.mark.parametrize("scaling", fused.SCALINGS)
def test_rms_norm_has_the_unfused_bits_where_sums_are_exact(scaling):
    # Squares of small integers add up to the same float32 in any order.
    m, k = 4, 1152
    x = jax.random.randint(jax.random.key(2), (m, k), -8, 9).astype(jnp.bfloat16)
    weight = weights(k)
    scale = jnp.float32([SCALE]) if scaling == "static" else None
    with testing.interpret():
        found = fp8_quantize_rms_norm(x, weight, eps=EPS, scaling=scaling, scale=scale)
    check(found, norm(x, weight), element="fp8_e4m3", scaling=scaling, exact=True)


@pytest.mark.parametrize("scaling", fused.SCALINGS)
@pytest.mark.parametrize("element", ["fp8_e4m3", "fp8_e5m2"])
def test_silu_mul(element, scaling):
    m, k = 3, 2176
    gate, up = rows(3, m, k), rows(4, m, k)[::-1]
    dtype = qformat(f"{element}_1x128").storage_dtype
    bounds = {} if scaling == "static" else {"amax_min": 1e-4, "amax_max": 5.0}
    scale = jnp.float32([SCALE]) if scaling == "static" else None
    with testing.interpret():
        found = fp8_quantize_silu_mul(gate, up, scaling=scaling, scale=scale, dtype=dtype, **bounds)
    check(found, silu_mul(gate, up), element=element, scaling=scaling, exact=True, **bounds)


def test_float16():
    gate, up = (rows(i, 3, 256, jnp.float16) for i in (5, 6))
    with testing.interpret():
        found = fp8_quantize_silu_mul(gate, up, scaling="per_token")
    check(found, silu_mul(gate, up), element="fp8_e4m3", scaling="per_token", exact=True)


def test_scales_are_in_the_gemms_layout():
    m, n, k = 12, 136, 384
    x = jax.random.normal(jax.random.key(3), (m, k), jnp.bfloat16)
    w = quantize(jax.random.normal(jax.random.key(4), (n, k)), "fp8_e4m3_128x128")
    weight = jnp.ones((k,), jnp.bfloat16)
    with testing.interpret():
        codes, scale = fp8_quantize_rms_norm(x, weight, eps=EPS)
        out = fp8_block_gemm(codes, scale, w.qvalue, w.scale, m=m, num_sms=2)
    y = quantize(norm(x, weight), "fp8_e4m3_1x128").dequantize(jnp.float32)
    expected = np.asarray(y) @ np.asarray(w.dequantize(jnp.float32)).T
    error = np.linalg.norm(np.asarray(out, np.float32) - expected) / np.linalg.norm(expected)
    assert error <= 3e-3


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
def test_ptxas_does_not_spill():
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def add_norm(x, weight, residual):
        return fp8_quantize_rms_norm(x, weight, eps=EPS, residual=residual)

    jobs = []
    for scaling in ("1x128", "per_token"):
        norm_ = functools.partial(fp8_quantize_rms_norm, eps=EPS, scaling=scaling)
        gated = functools.partial(fp8_quantize_silu_mul, scaling=scaling)
        jobs += [(norm_, (array(64, k), array(k))) for k in (7168, 16384)]
        jobs += [(gated, (array(4096, k), array(4096, k))) for k in (768, 28672)]
    jobs.append((add_norm, (array(64, 16384), array(16384), array(64, 16384))))
    for (report,) in testing.ptxas_reports(jobs):
        report.check()


def test_bad_arguments_are_named():
    x = jnp.ones((2, 256), jnp.bfloat16)
    weight = jnp.ones(256, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"K must be a multiple of 128 .* found M=2, K=192"):
        fp8_quantize_silu_mul(x[:, :192], x[:, :192])
    with pytest.raises(
        ValueError, match=r"up must be bfloat16\[2, 256\]; found bfloat16\[1, 256\]"
    ):
        fp8_quantize_silu_mul(x, x[:1])
    with pytest.raises(ValueError, match=r"weight must be bfloat16\[256\]; found float32\[256\]"):
        fp8_quantize_rms_norm(x, weight.astype(jnp.float32), eps=EPS)
    with pytest.raises(ValueError, match="static scaling, and no other, takes a scale"):
        fp8_quantize_rms_norm(x, weight, eps=EPS, scaling="static")
    with pytest.raises(ValueError, match=r"scale must be float32 \[1\]"):
        fp8_quantize_rms_norm(x, weight, eps=EPS, scaling="static", scale=jnp.ones(2))
    with pytest.raises(ValueError, match=r"scaling must be one of .* found 'per_row'"):
        fp8_quantize_silu_mul(x, x, scaling="per_row")
    with pytest.raises(ValueError, match="codes must be one of"):
        fp8_quantize_silu_mul(x, x, dtype="int8")
    assert "up to 16384" in unsupported_reason(4, 18432, scaling="1x128", norm=True)
    assert unsupported_reason(4, 18432, scaling="1x128", norm=False) is None
    assert "up to 28672" in unsupported_reason(4, 32768, scaling="per_token", norm=False)


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", fused.SCALINGS)
@pytest.mark.parametrize(("m", "k"), [(3, 768), (129, 7168), (4096, 5120), (300, 16384)])
def test_gpu_matches_the_unfused_steps(m, k, scaling):
    scale = jnp.float32([SCALE]) if scaling == "static" else None
    options = {"scaling": scaling, "scale": scale}
    x, residual, weight = rows(0, m, k), rows(1, m, k)[::-1], weights(k)
    codes, scales, total = fp8_quantize_rms_norm(x, weight, eps=EPS, residual=residual, **options)
    expected = (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(x.dtype)
    np.testing.assert_array_equal(total.view(np.uint16), expected.view(np.uint16))
    y = norm(expected, weight)
    check((codes, scales), y, element="fp8_e4m3", scaling=scaling, exact=False)
    found = fp8_quantize_silu_mul(x, residual, **options)
    check(found, silu_mul(x, residual), element="fp8_e4m3", scaling=scaling, exact=False)
