"""Attention over cached latents: the kernel against the reference, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import kv_cache, testing
from qjax.ops import kv_cache_write, latent_attention
from qjax.ops._dispatch import simulate_gpu
from qjax.ops._kv_cache_write import unsupported_reason as unwritable_reason
from qjax.ops._latent_attention import unsupported_reason
from qjax.recipe import KVCacheFormat

POSITIONS = jnp.array([[68, 69], [0, 1]], jnp.int32)


def operands(value_dim=512):
    keys = jax.random.split(jax.random.key(3), 2)
    query = jax.random.normal(keys[0], (2, 2, 16, value_dim + 64), jnp.bfloat16)
    pages = jax.random.normal(keys[1], (6, 1, 32, value_dim + 64), jnp.bfloat16)
    return query, pages, jnp.array([[4, 1, 3], [0, 5, 2]], jnp.int32)


def test_the_kernel_is_the_reference():
    """The second sequence's second query is padding."""
    args, lengths = operands(), jnp.array([70, 1], jnp.int32)
    options = dict(positions=POSITIONS, lengths=lengths, value_dim=512, scale=0.05)
    expected = np.array(latent_attention(*args, **options, implementation="xla"), np.float32)
    with simulate_gpu(), testing.interpret():
        out = latent_attention(*args, **options, implementation="pallas_mosaic_gpu")
    out = np.array(out, np.float32)
    assert np.isfinite(out).all()
    out[1, 1], expected[1, 1] = 0, 0
    assert np.linalg.norm(out - expected) <= 5e-3 * np.linalg.norm(expected)  # both are bfloat16


def test_the_fp8_kernel_is_the_reference():
    """Latents written by `kv_cache_write`; both pages hold what was never written."""
    query = operands()[0]
    latents = jax.random.normal(jax.random.key(5), (2, 70, 1, 576), jnp.bfloat16)
    shape = kv_cache.LayerShape(1, 576, 0, rotated_dim=64)
    cache = kv_cache.create(2, 128, [shape], KVCacheFormat("float8_e4m3fn"))
    lengths = jnp.array([70, 2], jnp.int32)
    parts = latents[..., :512], latents[..., :512], latents[..., 512:]
    pools = cache.layers[0].key, cache.layers[0].rotated
    with simulate_gpu():
        assert unwritable_reason(*parts, *pools) is None
    _, pages, rotated = kv_cache_write(
        *parts,
        *pools,
        cache.page_table,
        positions=jnp.tile(jnp.arange(70)[None], (2, 1)),
        valid=jnp.arange(70)[None] < lengths[:, None],
    )
    assert sum(x.nbytes for x in jax.tree.leaves((pages, rotated))) == 2 * 128 * 656
    kept = np.asarray(pages.dequantize(jnp.float32))[0, 0, :64]
    written = np.asarray(latents[0, :64, 0, :512], np.float32)
    assert np.linalg.norm(kept - written) < 0.03 * np.linalg.norm(written)
    options = dict(positions=POSITIONS, lengths=lengths, value_dim=512, scale=0.05)
    args = (query, pages, cache.page_table)
    expected = latent_attention(*args, rotated_pages=rotated, **options, implementation="xla")
    with simulate_gpu(), testing.interpret():
        out = latent_attention(
            *args, rotated_pages=rotated, **options, implementation="pallas_mosaic_gpu"
        )
    out, expected = (np.asarray(x, np.float32) for x in (out, expected))
    assert np.linalg.norm(out - expected) <= 5e-3 * np.linalg.norm(expected)


def test_what_the_kernel_refuses():
    query, pages, table = operands()
    options = dict(positions=POSITIONS, value_dim=512)
    assert "not an NVIDIA GPU" in unsupported_reason(query, pages, value_dim=512)
    with simulate_gpu():
        assert unsupported_reason(query, pages, value_dim=512) is None
        assert "found 576 and 256" in unsupported_reason(query, pages, value_dim=256)
        assert "must be [P, 1, page_size, H]" in unsupported_reason(query, pages[0], value_dim=512)
        shape = kv_cache.LayerShape(1, 576, 0)
        fp8 = kv_cache.create(2, 64, [shape], KVCacheFormat("float8_e4m3fn")).layers[0].key
        assert "found float8_e4m3fn (-1, -1)" in unsupported_reason(query, fp8, value_dim=512)
        shape = kv_cache.LayerShape(1, 576, 0, rotated_dim=64)
        fp8 = kv_cache.create(2, 64, [shape], KVCacheFormat("float8_e4m3fn")).layers[0]
        assert unsupported_reason(query, fp8.key, fp8.rotated, value_dim=512) is None
        assert "without rotated_pages" in unsupported_reason(query, fp8.key, value_dim=512)
        assert "found rotated_pages" in unsupported_reason(query, pages, pages, value_dim=512)
    with pytest.raises(ValueError, match="the pallas_mosaic_gpu kernel can't run"):
        latent_attention(query, pages, table, **options, implementation="pallas_mosaic_gpu")
