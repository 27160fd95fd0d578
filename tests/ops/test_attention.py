"""Attention against a loop in NumPy; paged, quantized and latent caches; the cache itself."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import QArray, Sharding, dot_product_attention, make_mesh, paged_attention, testing
from qjax.kv_cache import LayerShape, create, page_format, write
from qjax.ops._attention import unsupported_reason
from qjax.ops._dispatch import simulate_gpu
from qjax.quantization import Grid, compute_grid, quantize
from qjax.recipe import KV_CACHE_FORMATS, KVCacheFormat, kv_cache_format

B, T, N, K, H = 2, 12, 6, 2, 8


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def by_hand(q, k, v, positions, scale=None, window=None, sinks=None):
    """One query and head at a time, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(*q.shape[:3]):
        p = int(positions[b, t])
        first = 0 if window is None else max(0, p - window + 1)
        keys, values = k[b, first : p + 1, n // group], v[b, first : p + 1, n // group]
        logits = keys @ q[b, t, n] * (q.shape[-1] ** -0.5 if scale is None else scale)
        extra = [] if sinks is None else [float(sinks[n])]
        e = np.exp(np.append(logits, extra) - max(*logits, *extra, -1e9))
        out[b, t, n] = (e / e.sum())[: len(logits)] @ values
    return out


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values(window, with_sinks, scale):
    q, k, v = normal(B, T, N, H), normal(B, T, K, H, seed=1), normal(B, T, K, 5, seed=2)
    sinks = normal(N, seed=3) if with_sinks else None
    out = dot_product_attention(q, k, v, scale=scale, sliding_window=window, sinks=sinks)
    positions = np.tile(np.arange(T), (B, 1))
    expected = by_hand(q, k, v, positions, scale, window, sinks)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def filled(format: KVCacheFormat, k, v, *, scales=None, shuffled=False, batch=B):
    """A cache with these keys and values written in two steps, and its positions."""
    cache = create(batch, T, [LayerShape(K, H, H)], format, scales=scales, page_size=8)
    table = cache.page_table
    if shuffled:
        order = np.random.default_rng(0).permutation(table.size)
        table = jnp.asarray(order, jnp.int32).reshape(table.shape)
    layer, positions = cache.layers[0], jnp.tile(jnp.arange(T)[None], (batch, 1))
    valid = jnp.ones((batch, T), bool)
    pools = []
    for pool, values in ((layer.key, k), (layer.value, v)):
        for cut in (slice(0, 5), slice(5, T)):
            pool = write(pool, table, positions[:, cut], valid[:, cut], values[:, cut])
        pools.append(pool)
    return pools, table, positions


def test_pages_in_any_order_equal_contiguous_keys():
    q, k, v = normal(B, T, N, H), normal(B, T, K, H, seed=1), normal(B, T, K, H, seed=2)
    (kp, vp), table, positions = filled(kv_cache_format("float32"), k, v, shuffled=True)
    out = paged_attention(q, kp, vp, table, positions=positions, sliding_window=5)
    np.testing.assert_allclose(
        out, dot_product_attention(q, k, v, sliding_window=5), rtol=1e-5, atol=1e-6
    )


def kept(x, format: KVCacheFormat, scale):
    """The values that pages of this format keep of x [B, T, K, H], token by token."""
    f = page_format(format)
    rows = x[..., None, :]
    scale = jnp.broadcast_to(scale.reshape(1, 1, -1, 1, 1), (*x.shape[:3], 1, 1))
    if f.global_scale:
        grid = compute_grid(rows, f, global_scale=scale)
    else:
        grid = compute_grid(rows, f) if format.scale == "token_head" else Grid(scale)
    return quantize(rows, f, grid=grid).dequantize()[..., 0, :]


@pytest.mark.parametrize(
    "name", ["fp8_e4m3", "fp8_e4m3_head", "fp8_e4m3_token_head", "fp8_e5m2", "nvfp4"]
)
def test_quantized_pages_hold_what_quantization_keeps(name):
    q, k, v = normal(B, T, N, H), normal(B, T, K, 16, seed=1), normal(B, T, K, 16, seed=2)
    q = normal(B, T, N, 16)
    format = kv_cache_format(name)
    loaded = jnp.asarray([0.25, 0.5])
    cache = create(B, T, [LayerShape(K, 16, 16)], format, scales=[(loaded, loaded)], page_size=8)
    positions, valid = jnp.tile(jnp.arange(T)[None], (B, 1)), jnp.ones((B, T), bool)
    kp = write(cache.layers[0].key, cache.page_table, positions, valid, k)
    vp = write(cache.layers[0].value, cache.page_table, positions, valid, v)
    # E5M2 takes no scales; NVFP4's global scale is a sixth of E4M3's.
    used = {"fp8_e5m2": jnp.ones(2), "nvfp4": loaded / 6}.get(name, loaded)
    k, v = kept(k, format, used), kept(v, format, used)
    out = paged_attention(q, kp, vp, cache.page_table, positions=positions)
    np.testing.assert_allclose(out, dot_product_attention(q, k, v), rtol=1e-5, atol=1e-5)


def test_latent_values_are_the_keys_first_channels():
    q, k = normal(B, T, N, H), normal(B, T, 1, H, seed=1)
    cache = create(B, T, [LayerShape(1, H, 0)], kv_cache_format("float32"), page_size=8)
    positions, valid = jnp.tile(jnp.arange(T)[None], (B, 1)), jnp.ones((B, T), bool)
    kp = write(cache.layers[0].key, cache.page_table, positions, valid, k)
    assert cache.layers[0].value is None
    out = paged_attention(q, kp, None, cache.page_table, positions=positions, value_dim=5)
    np.testing.assert_allclose(out, dot_product_attention(q, k, k[..., :5]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["float32", "fp8_e4m3", "nvfp4"])
def test_padding_is_not_written(name):
    cache = create(B, T, [LayerShape(K, 16, 16)], kv_cache_format(name), page_size=8)
    pool = cache.layers[0].key
    positions = jnp.asarray([[0, 1, 2], [14, 15, 16]])  # 16 lies past the last page
    valid = jnp.asarray([[True, True, False], [True, True, True]])
    written = write(pool, cache.page_table, positions, valid, normal(B, 3, K, 16) + 5)
    values = written.dequantize(jnp.float32) if isinstance(written, QArray) else written
    tokens = np.moveaxis(np.asarray(values), 2, 1).reshape(B, -1, K, 16)
    used = np.abs(tokens).max((2, 3)) > 0
    np.testing.assert_array_equal(used[0].nonzero()[0], [0, 1])
    np.testing.assert_array_equal(used[1].nonzero()[0], [14, 15])


def test_sizes_and_refusals():
    layers = [LayerShape(2, 64, 64)] * 3
    plain = create(4, 100, layers, kv_cache_format("bfloat16"))
    assert plain.page_size == 16 and plain.max_len == 112
    assert plain.nbytes == 3 * 2 * 4 * 112 * 2 * 64 * 2
    half = create(4, 100, layers, kv_cache_format("fp8_e4m3"))
    assert half.nbytes == plain.nbytes // 2 + 3 * 2 * 28 * 2 * 4
    with pytest.raises(ValueError, match="page_size a multiple of 8"):
        create(1, 10, layers, kv_cache_format("bfloat16"), page_size=12)
    with pytest.raises(ValueError, match="unknown KV-cache format 'int3'"):
        kv_cache_format("int3")
    with pytest.raises(ValueError, match="take no per-token scales"):
        KVCacheFormat("nvfp4", "token_head")
    assert all(kv_cache_format(name) is f for name, f in KV_CACHE_FORMATS.items())


def test_pages_are_cut_over_batch_and_heads():
    sharding = Sharding(make_mesh("tensor=2,data=2"))
    layers = [LayerShape(2, 64, 64, "tensor")]
    cache = create(4, 32, layers, kv_cache_format("fp8_e4m3"), sharding=sharding)
    pages = cache.layers[0].key.qvalue
    assert pages.addressable_shards[0].data.shape == (4, 1, 16, 64)
    np.testing.assert_array_equal(cache.page_table, [[0, 1], [2, 3], [0, 1], [2, 3]])


def kernels():
    """Every op chooses its kernel and runs it on the CPU."""
    stack = contextlib.ExitStack()
    stack.enter_context(testing.interpret())
    stack.enter_context(simulate_gpu())
    stack.enter_context(qjax.require_kernels())
    return stack


def written_cache(name, *, tokens, page_size=32):
    """Pools that hold random keys and values of two sequences, their table, and their scales."""
    scales = (jnp.asarray([0.02, 0.03]), jnp.asarray([0.01, 0.04]))
    layers = [LayerShape(2, 64, 64)]
    format = kv_cache_format(name)
    cache = create(2, 64, layers, format, scales=[scales], page_size=page_size)
    where = (jnp.tile(jnp.arange(64)[None], (2, 1)), jnp.arange(64)[None] < tokens[:, None])
    pools = cache.layers[0].key, cache.layers[0].value
    return [
        write(pool, cache.page_table, *where, normal(2, 64, 2, 64, seed=i).astype(jnp.bfloat16))
        for i, pool in enumerate(pools)
    ], cache.page_table


@pytest.mark.parametrize(
    "name", ["bfloat16", "fp8_e4m3", "fp8_e4m3_head", "fp8_e4m3_token_head", "fp8_e5m2", "nvfp4"]
)
def test_decode_kernel_equals_the_reference(name):
    tokens = jnp.asarray([63, 3])
    pools, table = written_cache(name, tokens=tokens)
    q = normal(2, 1, 6, 64, seed=5).astype(jnp.bfloat16)
    options = dict(positions=tokens[:, None] - 1, sliding_window=50, sinks=normal(6))
    expected = paged_attention(q, *pools, table, implementation="xla", **options)
    with kernels():
        out = jax.jit(lambda *args: paged_attention(*args, **options))(q, *pools, table)
    out, expected = (np.asarray(x, np.float32) for x in (out, expected))
    assert np.linalg.norm(out - expected) <= 4e-3 * np.linalg.norm(expected)


def test_several_queries_and_positions_past_the_cache():
    pools, table = written_cache("fp8_e4m3", tokens=jnp.asarray([64, 40]))
    q = normal(2, 3, 4, 64, seed=5).astype(jnp.bfloat16)
    positions = jnp.asarray([[62, 63, 64], [37, 38, 39]])
    expected = paged_attention(q, *pools, table, positions=positions, implementation="xla")
    with kernels():
        out = paged_attention(q, *pools, table, positions=positions)
    out, expected = (np.asarray(x, np.float32) for x in (out, expected))
    assert np.linalg.norm(out - expected) <= 4e-3 * np.linalg.norm(expected)


def test_what_the_decode_kernel_refuses():
    pools, table = written_cache("fp8_e4m3", tokens=jnp.asarray([9, 9]))
    q = normal(2, 1, 4, 64).astype(jnp.bfloat16)
    assert "not an NVIDIA GPU" in unsupported_reason(q, *pools)
    positions = jnp.full((2, 1), 8)
    with pytest.raises(ValueError, match="paged_attention: the pallas_mosaic_gpu kernel can't run"):
        paged_attention(q, *pools, table, positions=positions, implementation="pallas_mosaic_gpu")
    with simulate_gpu():
        assert unsupported_reason(q, *pools) is None
        assert "latent attention" in unsupported_reason(q, pools[0], None)
        assert "at most 8 queries" in unsupported_reason(jnp.zeros((2, 9, 4, 64), q.dtype), *pools)
        assert "found float8_e4m3fn and float32" in unsupported_reason(q.astype("float32"), *pools)
        plain = jnp.zeros(pools[0].shape, q.dtype)
        nvfp4, _ = written_cache("nvfp4", tokens=jnp.asarray([9, 9]), page_size=16)
        assert "pages of 2048 numbers or a multiple; found 64" in unsupported_reason(q, *nvfp4)
        assert "must be stored alike" in unsupported_reason(q, plain, pools[1])
        assert "the same shape" in unsupported_reason(q, plain[..., :32], plain)
        with qjax.require_kernels(), pytest.raises(ValueError, match="kernels are required"):
            paged_attention(q, pools[0], None, table, positions=positions, value_dim=32)
