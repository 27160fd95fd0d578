"""The cache's pages as sequences come and go: each sees its own tokens, whatever a page held before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import testing
from qjax.kv_cache import LayerShape, create
from qjax.ops import _kv_cache_write as op
from qjax.ops import dot_product_attention, kv_cache_write, paged_attention, rotate
from qjax.ops._dispatch import simulate_gpu
from qjax.qarray import QArray
from qjax.recipe import kv_cache_format

B, PAGES_EACH, PAGE_SIZE, HEADS, DIM = 3, 3, 8, 2, 64
POOL = B * PAGES_EACH + 1
NAMES = ["bfloat16", "fp8_e4m3_head", "fp8_e4m3_token_head", "nvfp4"]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)


def layer(name):
    scales = [(jnp.float32([0.02, 0.03]), jnp.float32([0.04, 0.05]))]
    shape = LayerShape(HEADS, DIM, DIM)
    pool = create(
        POOL, PAGE_SIZE, [shape], kv_cache_format(name), scales=scales, page_size=PAGE_SIZE
    )
    return pool.layers[0]


def poisoned(pages):
    """The pool after earlier sequences of large values."""

    def spoil(array):
        if array.dtype == jnp.uint8:
            return jnp.full_like(array, 0x77)
        return jnp.full_like(array, 400)

    if not isinstance(pages, QArray):
        return spoil(pages)
    written = pages.scale.shape[2] > 1
    scale = spoil(pages.scale) if written else pages.scale
    return dataclasses.replace(pages, qvalue=spoil(pages.qvalue), scale=scale)


def rotation(positions):
    angle = positions[..., None].astype(jnp.float32) * jnp.linspace(1, 0.01, DIM // 2)[None, None]
    return jnp.cos(angle), jnp.sin(angle)


def turns(rng):
    """(new sequences, their pages) in turn: pages of those that end go to others, in any order."""
    free = list(range(POOL))
    table = np.zeros((B, PAGES_EACH), np.int32)
    for turn in range(3):
        rows = [turn % B, (turn + 1) % B] if turn else list(range(B))
        for row in rows if turn else []:
            free.extend(table[row])
        rng.shuffle(free)
        for row in rows:
            table[row] = [free.pop() for _ in range(PAGES_EACH)]
        yield rows, jnp.asarray(table)


@pytest.mark.parametrize("name", NAMES)
def test_reused_pages_hold_what_a_fresh_pool_would(name):
    rng = np.random.default_rng(0)
    fresh, pool = layer(name), jax.tree.map(lambda x: x, layer(name))
    pool = dataclasses.replace(pool, key=poisoned(pool.key), value=poisoned(pool.value))
    lengths = np.zeros(B, np.int32)

    @jax.jit
    def step(key_pages, value_pages, x, table, positions, valid, count):
        query, *pages = kv_cache_write(
            x, x, x[..., ::-1], key_pages, value_pages, table,
            positions=positions, valid=valid, rotation=rotation(positions),
        )  # fmt: skip
        out = paged_attention(query, *pages, table, positions=positions, lengths=count)
        return out, *pages

    for seed, (rows, table) in enumerate(turns(rng)):
        lengths[rows] = 0
        # Alone in pools of zeros, on pages in order: what no other sequence can touch.
        alone = jnp.arange(B * PAGES_EACH, dtype=jnp.int32).reshape(B, PAGES_EACH)
        clean = (fresh.key, fresh.value)
        history = normal(seed, B, PAGES_EACH * PAGE_SIZE, HEADS, DIM)
        start = np.zeros(B, np.int32)
        for width in (13, 1, 1):
            positions = jnp.asarray(start[:, None] + np.arange(width)[None], jnp.int32)
            count = np.minimum(width, rng.integers(1, width + 1, B)).astype(np.int32)
            valid = jnp.arange(width)[None] < count[:, None]
            x = jnp.take_along_axis(history, positions[..., None, None], axis=1)
            where = (positions, valid, jnp.asarray(start + count))
            found, *pages = step(pool.key, pool.value, x, table, *where)
            wanted, *clean = step(*clean, x, alone, *where)
            pool = dataclasses.replace(pool, key=pages[0], value=pages[1])
            real = np.asarray(valid)
            np.testing.assert_array_equal(np.asarray(found)[real], np.asarray(wanted)[real])
            assert np.isfinite(np.asarray(found, np.float32)[real]).all()
            start = start + count


def test_other_sequences_pages_stay_as_they_are():
    pages = layer("fp8_e4m3")
    table = jnp.int32([[4, 1, 7], [0, 9, 2], [3, 8, 5]])
    positions = jnp.broadcast_to(jnp.arange(6, 12, dtype=jnp.int32)[None], (B, 6))
    valid = jnp.array([[True] * 6, [False] * 6, [True] * 3 + [False] * 3])
    x = normal(0, B, 6, HEADS, DIM)
    key = kv_cache_write(x, x, x, pages.key, pages.value, table, positions=positions, valid=valid)[
        1
    ]
    touched = np.argwhere(np.asarray(key.qvalue != pages.key.qvalue).any((1, 3))).tolist()
    assert touched == [[1, s] for s in range(4)] + [[3, 6], [3, 7], [4, 6], [4, 7], [8, 0]]


@pytest.mark.parametrize("name", NAMES)
def test_kernel_and_reference_agree_on_shuffled_pages(name):
    pages = layer(name)
    # A page that the pool lacks, one counted from its end, tokens past the table: all dropped.
    table = jnp.int32([[4, 1, POOL], [0, -1, 2], [3, 8, 5]])
    positions = jnp.int32([[6, 7, 8, 9, 16], [15, 16, 17, 8, 0], [21, 22, 23, 24, 25]])
    valid = jnp.ones((B, 5), bool).at[2, 1].set(False)
    # Products of bfloat16 numbers of 6 bits have sums that are exact in any order.
    cos, sin = (jnp.round(f * 64) / 64 for f in rotation(positions))
    query, key, value = (
        jnp.round(normal(i, B, 5, n, DIM) * 8) / 8 for i, n in enumerate((4, 2, 2))
    )

    def run(implementation):
        return kv_cache_write(
            query, key, value, pages.key, pages.value, table,
            positions=positions, valid=valid, rotation=(cos, sin), implementation=implementation,
        )  # fmt: skip

    with simulate_gpu(), testing.interpret():
        found = jax.jit(run, static_argnums=0)("pallas_mosaic_gpu")
    wanted = jax.jit(run, static_argnums=0)("xla")
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_latent_keys_are_written_alone():
    pages = create(1, 16, [LayerShape(1, 576, 0)], kv_cache_format("bfloat16"), page_size=8)
    x = normal(0, 1, 3, 1, 576)
    where = {"positions": jnp.int32([[5, 6, 9]]), "valid": jnp.ones((1, 3), bool)}

    def run(implementation):
        layer = pages.layers[0]
        return kv_cache_write(
            x, x, None, layer.key, None, pages.page_table, **where, implementation=implementation
        )

    with simulate_gpu(), testing.interpret():
        query, key, value = run("pallas_mosaic_gpu")
    assert value is None and query is x
    np.testing.assert_array_equal(key, run("xla")[1])
    np.testing.assert_array_equal(key[1, 0, 1], x[0, 2, 0])


def test_rotation_of_written_keys_is_that_of_attention():
    # Cached and attended to, rotated keys give what keys at hand give.
    x, v = normal(0, 1, 12, HEADS, DIM), normal(1, 1, 12, HEADS, DIM)
    positions = jnp.arange(12, dtype=jnp.int32)[None]
    pages, table = layer("bfloat16"), jnp.int32([[5, 2]])
    query, *pools = kv_cache_write(
        x, x, v, pages.key, pages.value, table,
        positions=positions, valid=jnp.ones((1, 12), bool), rotation=rotation(positions),
    )  # fmt: skip
    found = paged_attention(query, *pools, table, positions=positions)
    turned = rotate(x, *rotation(positions))
    np.testing.assert_array_equal(query, turned)
    wanted = dot_product_attention(turned, turned, v)
    np.testing.assert_allclose(
        found.astype(jnp.float32), wanted.astype(jnp.float32), rtol=1e-2, atol=1e-2
    )


def test_what_does_not_fit_raises():
    pages, table = layer("bfloat16"), jnp.int32([[5, 2]])
    x = normal(0, 1, 17, HEADS, DIM)
    where = {"positions": jnp.arange(17)[None], "valid": jnp.ones((1, 17), bool)}
    with pytest.raises(ValueError, match="17 new tokens of a sequence don't fit its 2 pages of 8"):
        kv_cache_write(x, x, x, pages.key, pages.value, table, **where)
    x, where = x[:, :4], {name: a[:, :4] for name, a in where.items()}
    with pytest.raises(ValueError, match=r"kernel can't run: .* must have one dtype; found"):
        with simulate_gpu():
            kv_cache_write(
                x.astype(jnp.float16), x, x, pages.key, pages.value, table, **where,
                implementation="pallas_mosaic_gpu",
            )  # fmt: skip
    assert "not an NVIDIA GPU" in (op.unsupported_reason(x, x, x, pages.key, pages.value) or "")
