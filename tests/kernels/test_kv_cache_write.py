"""Rotation, quantization and scatter in one kernel, bit for bit against the cache's own `write`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import testing
from qjax.kv_cache import LayerShape, create, write
from qjax.pallas_kernels import kv_cache_write_sm90 as kernel
from qjax.pallas_kernels.kv_cache_write_sm90 import Pool, kv_cache_write, unsupported_reason
from qjax.qarray import QArray
from qjax.recipe import KV_CACHE_FORMATS, kv_cache_format

FORMATS = sorted(set(KV_CACHE_FORMATS) - {"float32"})
PAGES, PAGE_SIZE = 8, 8
SLOTS = [9, -1, 61, 23]


def pool(pages) -> Pool:
    """A cache's pages as the kernel takes them."""
    if isinstance(pages, QArray):
        return Pool(pages.qvalue, pages.scale, pages.global_scale)
    return Pool(pages)


def bits(array):
    return np.asarray(array).view(np.uint8)


def one_nan(array):
    """Bits, with one code for the NaNs of float8_e5m2, which has three."""
    raw = bits(array)
    return np.where((raw & 0x7F) > 0x7C, 0x7F, raw) if array.dtype == jnp.float8_e5m2 else raw


def halves(seed, *shape, dtype=jnp.bfloat16):
    """Numbers of few bits, whose products with `angles` and their sums are exact in any order."""
    x = jnp.round(jax.random.normal(jax.random.key(seed), shape) * 32).clip(-128, 128)
    return (x / 16).astype(dtype)


def angles(tokens, rotary_dim):
    angle = (
        jnp.arange(tokens, dtype=jnp.float32)[:, None]
        * jnp.linspace(1, 0.01, rotary_dim // 2)[None]
    )
    return tuple(jnp.round(f(angle) * 128) / 128 for f in (jnp.cos, jnp.sin))


def rotate(x, cos, sin):
    half = cos.shape[-1]
    f, cos, sin = x.astype(jnp.float32), cos[:, None], sin[:, None]
    a, b, rest = f[..., :half], f[..., half : 2 * half], f[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(x.dtype)


def layer(name, heads, dim, value_dim):
    scales = [(jnp.linspace(0.01, 0.02, heads), jnp.linspace(0.03, 0.04, heads))]
    shape = LayerShape(heads, dim, value_dim)
    cache = create(
        1, PAGES * PAGE_SIZE, [shape], kv_cache_format(name), scales=scales, page_size=PAGE_SIZE
    )
    return cache.layers[0]


def expected(pages, x, slots=SLOTS):
    """The pool after the plain write: every page in order belongs to one sequence."""
    where = jnp.asarray(slots, jnp.int32)[None]
    table = jnp.arange(PAGES, dtype=jnp.int32)[None]
    return pool(jax.jit(write)(pages, table, jnp.maximum(where, 0), where >= 0, x[None]))


def check(found: Pool, wanted: Pool):
    for name, a, b in zip(Pool._fields, found, wanted, strict=True):
        if b is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, name
            np.testing.assert_array_equal(one_nan(a), one_nan(b), err_msg=name)


def run(query, key, value, pages, cos=None, sin=None, slots=SLOTS):
    value_pool = None if value is None else pool(pages.value)
    return jax.jit(kv_cache_write)(
        query,
        key,
        value,
        jnp.asarray(slots, jnp.int32),
        pool(pages.key),
        value_pool,
        cos=cos,
        sin=sin,
    )


@pytest.mark.parametrize("name", FORMATS)
def test_pools_have_the_bits_of_the_plain_write(name):
    # Odd numbers of heads are cut into powers of two; the second token is padding.
    t, n, k, h = len(SLOTS), 2, 3, 64
    query, key, value = halves(0, t, n, h), halves(1, t, k, h), halves(2, t, k, h)
    key = key.at[2].set(0).at[3, 0, 5].set(jnp.nan).at[3, 1:, 9].set(300)
    value = value.at[0, 1, 17].set(-jnp.inf).at[2, 2, 3].set(jnp.nan)
    value = value.at[3].multiply(jnp.bfloat16(1e-4)).at[3, 2].set(-0.0)
    cos, sin = angles(t, h)
    pages = layer(name, k, h, h)
    with testing.interpret():
        rotated, keys, values = run(query, key, value, pages, cos, sin)
    np.testing.assert_array_equal(bits(rotated), bits(rotate(query, cos, sin)))
    check(keys, expected(pages.key, rotate(key, cos, sin)))
    check(values, expected(pages.value, value))


def latents():
    """Latents with scales of 128 channels, and rotated keys beside them."""
    shape = LayerShape(1, 576, 0, rotated_dim=64)
    return create(
        1, PAGES * PAGE_SIZE, [shape], kv_cache_format("fp8_e4m3"), page_size=PAGE_SIZE
    ).layers[0]


def check_latents(tokens, slots):
    latent, rotated = halves(0, tokens, 1, 512), halves(1, tokens, 1, 64)
    latent = latent.at[0, 0, 128:256].set(0).at[-1, 0, 300].set(jnp.nan).at[-1, 0, 5].set(300)
    pages = latents()
    pools = pool(pages.key), pool(pages.rotated)
    found = jax.jit(kv_cache_write)(None, latent, rotated, jnp.asarray(slots), *pools)
    check(found[1], expected(pages.key, latent, slots))
    check(found[2], expected(pages.rotated, rotated, slots))


def test_latents_have_the_bits_of_the_plain_write():
    with testing.interpret():
        check_latents(len(SLOTS), SLOTS)


@pytest.mark.gpu
def test_gpu_latents():
    check_latents(48, np.random.default_rng(0).permutation(64)[:48].astype(np.int32))


@pytest.mark.parametrize("name", ["float16", "nvfp4"])
def test_partial_rotation_leaves_the_other_channels(name):
    t, k, h = len(SLOTS), 2, 96
    query, key, value = (halves(i, t, k, h, dtype=jnp.float16) for i in range(3))
    cos, sin = angles(t, 32)
    pages = layer(name, k, h, h)
    with testing.interpret():
        rotated, keys, values = run(query, key, value, pages, cos, sin)
    np.testing.assert_array_equal(bits(rotated), bits(rotate(query, cos, sin)))
    np.testing.assert_array_equal(bits(rotated[..., 32:]), bits(query[..., 32:]))
    check(keys, expected(pages.key, rotate(key, cos, sin)))
    check(values, expected(pages.value, value))


def test_keys_alone_and_unrotated():
    # As multi-head latent attention caches them: one head of 512 + 64 channels.
    key = halves(3, len(SLOTS), 1, 576)
    for name in ("bfloat16", "fp8_e4m3"):
        pages = layer(name, 1, 576, 0)
        with testing.interpret():
            query, keys, values = run(None, key, None, pages)
        assert query is None and values is None
        check(keys, expected(pages.key, key))


def test_tokens_of_many_heads_are_shared_by_ctas(monkeypatch):
    monkeypatch.setattr(kernel, "MOST", 512)
    query, key, value = halves(0, 2, 8, 128), halves(1, 2, 2, 128), halves(2, 2, 2, 128)
    cos, sin = angles(2, 128)
    pages = layer("fp8_e4m3_head", 2, 128, 128)
    with testing.interpret():
        rotated, keys, values = run(query, key, value, pages, cos, sin, slots=[40, 7])
    np.testing.assert_array_equal(bits(rotated), bits(rotate(query, cos, sin)))
    check(keys, expected(pages.key, rotate(key, cos, sin), [40, 7]))
    check(values, expected(pages.value, value, [40, 7]))


def test_pools_are_written_in_place():
    t, k, h = 4, 2, 64
    pages = layer("fp8_e4m3_token_head", k, h, h)
    x = jax.ShapeDtypeStruct((t, k, h), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((t,), jnp.int32)

    def write_keys(pages, key, value, slots):
        return kv_cache_write(None, key, value, slots, pool(pages.key), pool(pages.value))[1:]

    traced = jax.jit(write_keys, donate_argnums=0).trace(pages, x, x, slots)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    call = next(line for line in text.splitlines() if "custom_call @mosaic_gpu_v2" in line)
    # Codes and scales of keys and of values; nothing else is made.
    assert call.count("output_operand_alias<") == 4
    assert sum(" = stablehlo." in line for line in text.splitlines()) == 1


def test_formats_compile_without_spills():
    if not testing.ptxas_available():
        pytest.skip("needs the aot extra")
    kernels = []
    for name, n, k, h in [
        ("bfloat16", 32, 8, 128),
        ("fp8_e4m3_head", 32, 8, 128),
        ("fp8_e4m3_token_head", 9, 3, 64),
        ("nvfp4", 32, 8, 128),
    ]:
        shapes = jax.eval_shape(lambda name=name, k=k, h=h: layer(name, k, h, h))
        arguments = (
            *(jax.ShapeDtypeStruct((16, heads, h), jnp.bfloat16) for heads in (n, k, k)),
            jax.ShapeDtypeStruct((16,), jnp.int32),
            *(jax.ShapeDtypeStruct((16, h // 2), jnp.float32) for _ in range(2)),
            *jax.tree.leaves((pool(shapes.key), pool(shapes.value))),
        )
        tree = jax.tree.structure((pool(shapes.key), pool(shapes.value)))

        def write_all(query, key, value, slots, cos, sin, *pools, tree=tree):
            pools = jax.tree.unflatten(tree, pools)
            return jax.tree.leaves(
                kv_cache_write(query, key, value, slots, *pools, cos=cos, sin=sin)
            )

        kernels.append((write_all, arguments))
    parts = jax.eval_shape(latents)
    x = [jax.ShapeDtypeStruct((16, 1, h), jnp.bfloat16) for h in (512, 64)]
    slots = jax.ShapeDtypeStruct((16,), jnp.int32)
    pools = jax.tree.leaves((pool(parts.key), pool(parts.rotated)))

    def write_latents(key, rotated, slots, codes, scale, other):
        out = kv_cache_write(None, key, rotated, slots, Pool(codes, scale), Pool(other))
        return jax.tree.leaves(out)

    kernels.append((write_latents, (*x, slots, *pools)))
    for (report,) in testing.ptxas_reports(kernels):
        report.check()
        assert not report.stack_bytes
        # Seven CTAs to an SM, each with a token's 12 KiB in flight, are more than memory's latency asks for.
        assert report.registers <= 72


def test_arguments_that_do_not_fit_are_named():
    pages = layer("fp8_e4m3", 2, 64, 64)
    keys, values = pool(pages.key), pool(pages.value)
    x, slots = halves(0, 4, 2, 64), jnp.zeros((4,), jnp.int32)
    with pytest.raises(ValueError, match=r"slots must be int32\[4\]; found int32\[3\]"):
        kv_cache_write(None, x, x, slots[:3], keys, values)
    with pytest.raises(ValueError, match=r"values \[4, 2, 32\] don't fit pages"):
        kv_cache_write(None, x, x[..., :32], slots, keys, values)
    with pytest.raises(ValueError, match=r"keys must be one of .* found float32"):
        kv_cache_write(None, *(x.astype(jnp.float32),) * 2, slots, keys, values)
    with pytest.raises(ValueError, match="cos and sin must both be"):
        kv_cache_write(x, x, x, slots, keys, values, cos=jnp.ones((4, 32)))
    assert "multiple of 32" in (unsupported_reason(keys, values, rotary_dim=16) or "")
    other = pool(layer("nvfp4", 2, 64, 64).value)
    assert "pages of one kind" in (unsupported_reason(keys, other) or "")
    latent = pool(latents().key)
    assert "rotated before" in (unsupported_reason(latent, None, rotary_dim=64) or "")
    assert "found 2 heads" in (unsupported_reason(latent._replace(codes=keys.codes), None) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("n", "k", "h", "rotary_dim"), [(32, 8, 128, 128), (9, 3, 64, 64), (8, 2, 96, 32)]
)
def test_bits_on_a_gpu(name, n, k, h, rotary_dim):
    t = 61
    slots = np.random.default_rng(0).permutation(PAGES * PAGE_SIZE)[:t]
    slots[7] = -1
    query, key, value = halves(0, t, n, h), halves(1, t, k, h), halves(2, t, k, h)
    key = key.at[3].set(0).at[4, 0, 5].set(jnp.nan).at[5, 0, 9].set(jnp.inf)
    value = value * jnp.exp(jax.random.normal(jax.random.key(5), (t, k, 1))).astype(value.dtype)
    cos, sin = angles(t, rotary_dim)
    pages = layer(name, k, h, h)
    rotated, keys, values = run(query, key, value, pages, cos, sin, slots=slots)
    np.testing.assert_array_equal(bits(rotated), bits(rotate(query, cos, sin)))
    check(keys, expected(pages.key, rotate(key, cos, sin), slots))
    check(values, expected(pages.value, value, slots))
