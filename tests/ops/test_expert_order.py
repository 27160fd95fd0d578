"""Tokens by expert against a stable sort."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.ops import _expert_order, expert_order


@pytest.mark.parametrize("compared", [0, 1024])
@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 4, 32), (137, 3, 5), (16, 8, 8)])
def test_is_a_stable_sort(monkeypatch, compared, tokens, k, experts):
    monkeypatch.setattr(_expert_order, "COMPARED", compared)
    # Some rows are no expert's here.
    chosen = np.random.default_rng(tokens).integers(0, experts + 2, (tokens, k))
    found = expert_order(jnp.asarray(chosen), experts)
    order = np.argsort(np.minimum(chosen, experts).reshape(-1), kind="stable")
    np.testing.assert_array_equal(found[0], order // k)
    np.testing.assert_array_equal(found[1], np.argsort(order))
    np.testing.assert_array_equal(
        found[2], np.bincount(chosen.reshape(-1), minlength=experts)[:experts]
    )


def test_all_rows_of_one_expert():
    tokens, places, sizes = expert_order(jnp.full((5, 2), 3), 4)
    np.testing.assert_array_equal(tokens, np.arange(10) // 2)
    np.testing.assert_array_equal(places, np.arange(10))
    np.testing.assert_array_equal(sizes, [0, 0, 0, 10])
