"""Attention against a loop in NumPy; paged, quantized and latent caches; the cache itself."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import QArray, Sharding, dot_product_attention, make_mesh, paged_attention, testing
from qjax.kv_cache import LayerShape, create, page_format, write
from qjax.ops._attention_kernels import paged_kernel
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


def test_what_lies_past_a_sequence_never_matters():
    """Pages hold what other sequences wrote; padded queries see it, real ones and their finiteness do not."""
    q, k, v = (normal(2, 8, 2, 16, seed=i) for i in (0, 1, 2))
    lengths = jnp.asarray([5, 8])
    expected = dot_product_attention(q, k, v)
    past = (jnp.arange(8)[None] >= lengths[:, None])[..., None, None]
    k, v = (jnp.where(past, jnp.nan, x) for x in (k, v))
    out = np.asarray(dot_product_attention(q, k, v, lengths=lengths))
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[0, :5], expected[0, :5], rtol=1e-6)
    np.testing.assert_allclose(out[1], expected[1], rtol=1e-6)
    pages = [jnp.moveaxis(x.reshape(4, 4, 2, 16), 2, 1) for x in (k, v)]
    where = dict(positions=jnp.tile(jnp.arange(8)[None], (2, 1)), lengths=lengths)
    paged = paged_attention(q, *pages, jnp.asarray([[0, 1], [2, 3]]), **where)
    np.testing.assert_allclose(paged, out, rtol=1e-6, atol=1e-7)


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
    assert plain.page_size == 64 and plain.max_len == 128
    assert plain.nbytes == 3 * 2 * 4 * 128 * 2 * 64 * 2
    half = create(4, 100, layers, kv_cache_format("fp8_e4m3"))
    assert half.nbytes == plain.nbytes // 2 + 3 * 2 * 8 * 2 * 4
    with pytest.raises(ValueError, match="page_size a multiple of 8"):
        create(1, 10, layers, kv_cache_format("bfloat16"), page_size=12)
    with pytest.raises(ValueError, match="unknown KV-cache format 'int3'"):
        kv_cache_format("int3")
    with pytest.raises(ValueError, match="take no per-token scales"):
        KVCacheFormat("nvfp4", "token_head")
    assert all(kv_cache_format(name) is f for name, f in KV_CACHE_FORMATS.items())


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", [n for n in KV_CACHE_FORMATS if n != "float32"])
def test_the_default_page_size_suits_the_kernels(name, dim):
    cache = create(1, 100, [LayerShape(2, dim, dim)], kv_cache_format(name)).layers[0]
    dtype = "float16" if name == "float16" else "bfloat16"
    with simulate_gpu():
        for steps, kernel in ((1, "decode"), (100, "prefill")):
            q = jnp.zeros((1, steps, 4, dim), dtype)
            assert paged_kernel(q, cache.key, cache.value) == (kernel, None)


def test_pages_are_cut_over_batch_and_heads():
    sharding = Sharding(make_mesh("tensor=2,data=2"))
    layers = [LayerShape(2, 64, 64, "tensor")]
    format = kv_cache_format("fp8_e4m3")
    cache = create(4, 32, layers, format, sharding=sharding, page_size=16)
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


def relative_error(out, expected):
    out, expected = (np.asarray(x, np.float32) for x in (out, expected))
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["bfloat16", "fp8_e4m3", "fp8_e4m3_token_head", "nvfp4"])
def test_prefill_kernel_equals_the_reference(name):
    """A chunk after a prefix, one that ends in padding, and more positions than the cache has."""
    tokens = jnp.asarray([64, 20])
    pools, table = written_cache(name, tokens=tokens)
    q = normal(2, 12, 6, 64, seed=5).astype(jnp.bfloat16)
    start = jnp.asarray([53, 17])
    options = dict(positions=start[:, None] + jnp.arange(12)[None], lengths=jnp.asarray([65, 20]))
    options |= dict(sliding_window=50, sinks=normal(6), logit_soft_cap=5.0, scale=0.2)
    expected = paged_attention(q, *pools, table, implementation="xla", **options)
    with kernels():
        out = jax.jit(lambda *args: paged_attention(*args, **options))(q, *pools, table)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    for row, count in enumerate((12, 3)):
        assert relative_error(out[row, :count], expected[row, :count]) <= 4e-3


def test_dense_kernel_equals_the_reference_and_has_its_gradient(caplog):
    q, k, v = (normal(2, 20, n, 64, seed=n).astype(jnp.bfloat16) for n in (4, 2, 1))
    v = jnp.repeat(v, 2, axis=2)
    sinks = normal(4).astype(jnp.bfloat16)

    def loss(implementation, q, k, v, sinks):
        lengths = jnp.asarray([20, 7])
        out = dot_product_attention(
            q, k, v, lengths=lengths, sinks=sinks, logit_soft_cap=3.0, implementation=implementation
        )
        real = jnp.arange(20)[None] < lengths[:, None]
        return jnp.sum(jnp.where(real[..., None, None], out.astype(jnp.float32), 0) ** 2), out

    def both(implementation):
        step = jax.value_and_grad(
            lambda *a: loss(implementation, *a), argnums=(0, 1, 2, 3), has_aux=True
        )
        return jax.jit(step)(q, k, v, sinks)

    (_, expected), wanted = both("xla")
    with kernels(), caplog.at_level("INFO", "qjax"):
        (_, out), gradients = both(None)
    for row, count in enumerate((20, 7)):
        assert relative_error(out[row, :count], expected[row, :count]) <= 4e-3
    for gradient, other in zip(gradients, wanted, strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert relative_error(gradient, other) <= 1e-2
    assert "the gradient of dot_product_attention runs through XLA: no kernel yet" in caplog.text


def test_soft_cap_bounds_the_logits():
    q, k, v = normal(B, T, N, H), normal(B, T, K, H, seed=1), normal(B, T, K, 5, seed=2)
    capped = dot_product_attention(100 * q, k, v, logit_soft_cap=2.0)
    logits = np.einsum("btnh,bsnh->bnts", 100 * q, np.repeat(k, N // K, 2)) * H**-0.5
    logits = np.where(np.tri(T, dtype=bool), 2 * np.tanh(logits / 2), -np.inf)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bnts,bsnh->btnh", weights, np.repeat(v, N // K, 2))
    np.testing.assert_allclose(capped, expected, rtol=1e-5, atol=1e-5)


def test_what_the_kernels_refuse():
    pools, table = written_cache("fp8_e4m3", tokens=jnp.asarray([9, 9]))
    q = normal(2, 1, 4, 64).astype(jnp.bfloat16)
    assert "not an NVIDIA GPU" in paged_kernel(q, *pools)[1]
    positions = jnp.full((2, 1), 8)
    with pytest.raises(ValueError, match="paged_attention: the pallas_mosaic_gpu kernel can't run"):
        paged_attention(q, *pools, table, positions=positions, implementation="pallas_mosaic_gpu")

    def reason(*args):
        kernel, found = paged_kernel(*args)
        assert kernel is None
        return found

    with simulate_gpu():
        assert paged_kernel(q, *pools) == ("decode", None)
        assert paged_kernel(jnp.zeros((2, 9, 4, 64), q.dtype), *pools) == ("prefill", None)
        # 8 queries of 16 heads each are too many rows for the decode kernel.
        assert paged_kernel(jnp.zeros((2, 8, 32, 64), q.dtype), *pools) == ("prefill", None)
        assert "latent attention" in reason(q, pools[0], None)
        assert "found float8_e4m3fn and float32" in reason(q.astype("float32"), *pools)
        many = jnp.zeros((2, 9, 4, 64), jnp.float32)
        assert "queries, keys and values must be one of" in reason(many, *pools)
        plain = jnp.zeros(pools[0].shape, q.dtype)
        nvfp4, _ = written_cache("nvfp4", tokens=jnp.asarray([9, 9]), page_size=16)
        assert "pages of 2048 numbers or a multiple; found 64" in reason(q, *nvfp4)
        assert "must be stored alike" in reason(q, plain, pools[1])
        assert "as many pages, heads and tokens" in reason(q, plain[:, :, :16], plain)
        assert "head_dim must be one of (64, 80" in reason(q[..., :32], *[plain[..., :32]] * 2)
        with qjax.require_kernels(), pytest.raises(ValueError, match="kernels are required"):
            paged_attention(q, pools[0], None, table, positions=positions, value_dim=32)
