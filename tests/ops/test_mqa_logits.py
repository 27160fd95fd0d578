"""The indexer's logits as ops: the kernels against the references, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import testing
from qjax.ops import mqa_logits, paged_mqa_logits
from qjax.ops._dispatch import simulate_gpu
from qjax.ops._mqa_logits import unsupported_reason

KERNEL = "pallas_mosaic_gpu"


def operands(queries=3, heads=16, keys=90, dim=64):
    key = jax.random.split(jax.random.key(7), 4)
    query = jax.random.normal(key[0], (queries, heads, dim)).astype(jnp.float8_e4m3fn)
    weights = jax.random.normal(key[1], (queries, heads))
    pool = jax.random.normal(key[2], (keys, dim)).astype(jnp.float8_e4m3fn)
    return query, weights, pool, jax.random.uniform(key[3], (keys,))


def ranges():
    return jnp.array([0, 20, 5], jnp.int32), jnp.array([90, 40, 5], jnp.int32)


def paged():
    """The keys of `operands` as the sequences' pages."""
    query, weights, keys, scale = operands(keys=128)
    table = jnp.array([[2, 0, 999], [3, 1, 0]], jnp.int32)
    return (
        jnp.stack([query, -query]),
        jnp.stack([weights, weights]),
        keys.reshape(4, 32, 64),
        scale.reshape(4, 32),
        table,
        jnp.array([50, 96], jnp.int32),
    )


def same(out, expected):
    np.testing.assert_array_equal(np.isneginf(out), np.isneginf(expected))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)


def test_the_reference_is_the_equation():
    query, weights, keys, scale = operands()
    start, end = map(np.asarray, ranges())
    products = np.einsum("shd,td->sht", np.float32(query), np.float32(keys)) * np.asarray(scale)
    expected = np.einsum("sht,sh->st", np.maximum(products, 0), weights)
    t = np.arange(90)
    seen = (t >= start[:, None]) & (t < end[:, None])
    out = mqa_logits(query, weights, keys, scale, *ranges())
    same(out, np.where(seen, expected, -np.inf))


def test_pages_are_keys_in_order():
    query, weights, pages, scale, table, lengths = paged()
    out = paged_mqa_logits(query, weights, pages, scale, table, lengths)
    assert out.shape == (6, 96)
    for b in range(2):
        numbers = np.minimum(table[b], 3)
        flat = pages[numbers].reshape(96, 64), scale[numbers].reshape(96)
        end = lengths[b] + jnp.arange(-2, 1, dtype=jnp.int32)
        expected = mqa_logits(query[b], weights[b], *flat, jnp.zeros_like(end), end)
        same(out[3 * b : 3 * b + 3], expected)


def test_the_kernels_are_the_references():
    args = (*operands(), *ranges())
    expected = mqa_logits(*args, implementation="xla")
    expected_pages = paged_mqa_logits(*paged(), implementation="xla")
    with simulate_gpu(num_sms=2), testing.interpret():
        same(mqa_logits(*args, implementation=KERNEL), expected)
        same(paged_mqa_logits(*paged(), implementation=KERNEL), expected_pages)


def test_what_the_kernels_refuse():
    query, weights, keys, scale = operands()
    args = (query, weights, keys, scale, *ranges())
    assert "not an NVIDIA GPU" in unsupported_reason(query, keys)
    with pytest.raises(ValueError, match="the pallas_mosaic_gpu kernel can't run"):
        mqa_logits(*args, implementation=KERNEL)
    with simulate_gpu():
        assert unsupported_reason(query, keys) is None
        assert "found 16" in unsupported_reason(query, keys[:64].reshape(4, 16, 64))
        assert "must be float8_e4m3fn" in unsupported_reason(query.astype(jnp.bfloat16), keys)
    with pytest.raises(ValueError, match=r"key_scale must be float32 \[90\]; found bfloat16"):
        mqa_logits(query, weights, keys, scale.astype(jnp.bfloat16), *ranges())


def test_a_gradient_is_refused():
    query, weights, keys, scale = operands()

    def total(weights):
        return jnp.sum(mqa_logits(query, weights, keys, scale, *ranges())[0])

    with pytest.raises(ValueError, match="mqa_logits: not differentiable"):
        jax.grad(total)(weights)
    stopped = jax.grad(lambda w: total(jax.lax.stop_gradient(w)))(weights)
    assert not stopped.any()
