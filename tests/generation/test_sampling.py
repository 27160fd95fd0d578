"""Sampling against NumPy references, its distribution, and its independence of the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qjax.sampling import SamplingArrays, SamplingParams, filtered, penalize, sample

VOCAB = 97
LOGITS = np.random.default_rng(0).normal(0, 3, (6, VOCAB)).astype(np.float32)
UNSEEN = np.zeros(LOGITS.shape, bool)

jitted = jax.jit(sample)


def rows(*params: SamplingParams) -> SamplingArrays:
    return jax.tree.map(jnp.asarray, SamplingArrays.of(params))


def reference_kept(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Which tokens one row may draw, in float64, step by step."""
    x = logits.astype(np.float64) / p.temperature
    if p.top_k:
        x = np.where(x >= np.sort(x)[-min(p.top_k, len(x))], x, -np.inf)
    if p.top_p < 1:
        order = np.argsort(-x, kind="stable")
        probability = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        before = np.cumsum(probability[order]) - probability[order]
        x[order[1:][before[1:] >= p.top_p]] = -np.inf
    return (x > -np.inf) & (np.exp(x - x.max()) >= p.min_p)


CASES = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=1),
    SamplingParams(temperature=1.3, top_k=12),
    SamplingParams(temperature=1.0, top_k=10**6),
    SamplingParams(temperature=0.5, top_p=0.9),
    SamplingParams(temperature=2.0, top_p=1e-6),
    SamplingParams(temperature=2.0, top_k=30, top_p=0.7),
    SamplingParams(temperature=3.0, min_p=0.05),
    SamplingParams(temperature=1.5, top_k=40, top_p=0.95, min_p=0.02),
    SamplingParams(temperature=1e-6, top_p=0.999),
]


@pytest.mark.parametrize("params", CASES, ids=str)
def test_filters_keep_what_the_reference_keeps(params):
    got = jax.jit(filtered)(jnp.asarray(LOGITS), rows(*[params] * len(LOGITS)))
    expected = np.stack([reference_kept(row, params) for row in LOGITS])
    np.testing.assert_array_equal(np.isfinite(got), expected)
    scaled = (LOGITS - LOGITS.max(-1, keepdims=True)) / np.float32(params.temperature)
    np.testing.assert_allclose(np.asarray(got)[expected], scaled[expected], rtol=1e-6)


def test_rows_of_a_batch_have_their_own_parameters():
    params = CASES[: len(LOGITS)]
    got = filtered(jnp.asarray(LOGITS), rows(*params))
    expected = np.stack([reference_kept(*pair) for pair in zip(LOGITS, params, strict=True)])
    np.testing.assert_array_equal(np.isfinite(got), expected)


def test_ties_with_the_kth_token_stay():
    logits = jnp.asarray([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    got = filtered(logits, rows(SamplingParams(temperature=1.0, top_k=2)))
    np.testing.assert_array_equal(np.isfinite(got)[0], [True, False, True, True, True, False])


def test_min_p_boundary_and_extremes():
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.2, 0.05]]))
    for min_p, kept in ((0.0, 4), (0.1001, 3), (0.41, 2), (0.6, 1), (1.0, 1)):
        got = filtered(logits, rows(SamplingParams(temperature=1.0, min_p=min_p)))
        assert np.isfinite(got).sum() == kept


def test_repetition_penalty():
    logits = np.array([[2.0, -2.0, 1.0, 0.0], [2.0, -2.0, 1.0, 0.0]], np.float32)
    seen = np.array([[1, 1, 0, 1], [1, 0, 0, 0]], bool)
    got = penalize(jnp.asarray(logits), jnp.asarray([4.0, 1.0]), jnp.asarray(seen))
    np.testing.assert_array_equal(got, [[0.5, -8.0, 1.0, 0.0], [2.0, -2.0, 1.0, 0.0]])
    params = rows(*[SamplingParams(repetition_penalty=4.0), SamplingParams()])
    token = jitted(jnp.asarray(logits), params, jnp.zeros(2, jnp.int32), jnp.asarray(seen))
    np.testing.assert_array_equal(token, [2, 0])


def test_temperature_zero_is_the_exact_argmax():
    params = rows(*[SamplingParams(top_k=5, top_p=0.1, seed=i) for i in range(len(LOGITS))])
    positions = jnp.arange(len(LOGITS), dtype=jnp.int32)
    token = jitted(jnp.asarray(LOGITS), params, positions, jnp.asarray(UNSEEN))
    np.testing.assert_array_equal(token, LOGITS.argmax(-1))
    mixed = rows(*[SamplingParams(temperature=float(i % 2)) for i in range(len(LOGITS))])
    token = jitted(jnp.asarray(LOGITS), mixed, positions, jnp.asarray(UNSEEN))
    np.testing.assert_array_equal(token[::2], LOGITS[::2].argmax(-1))


@pytest.mark.parametrize("params", [CASES[0], CASES[2], CASES[6], CASES[8]], ids=str)
def test_draws_have_the_filtered_distribution(params):
    """A chi-squared test over 4000 positions; the seed is fixed, so it passes or fails always."""
    n, row = 4000, LOGITS[0]
    batch = jnp.broadcast_to(jnp.asarray(row), (n, VOCAB))
    params = dataclasses.replace(params, seed=11)
    tokens = jitted(
        batch, rows(*[params] * n), jnp.arange(n, dtype=jnp.int32), jnp.zeros((n, VOCAB), bool)
    )
    kept = reference_kept(row, params)
    weight = np.where(kept, np.exp(row.astype(np.float64) / params.temperature), 0)
    expected = n * weight / weight.sum()
    counts = np.bincount(np.asarray(tokens), minlength=VOCAB)
    assert counts[~kept].sum() == 0
    common = expected >= 5  # as the test asks for; the rare ones form one cell
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


def test_a_draw_depends_on_its_row_seed_and_position_alone():
    def draw(order, batch):
        params = rows(*[SamplingParams(temperature=1.0, top_p=0.95, seed=7 * i) for i in order])
        positions = jnp.asarray([100 + i for i in order], jnp.int32)
        return np.asarray(jitted(jnp.asarray(batch), params, positions, jnp.asarray(batch > 1e9)))

    order = list(range(len(LOGITS)))
    together = draw(order, LOGITS)
    np.testing.assert_array_equal(draw(order[::-1], LOGITS[::-1])[::-1], together)
    for i in order:
        np.testing.assert_array_equal(draw([i], LOGITS[i : i + 1]), together[i : i + 1])


def test_seeds_and_positions_change_the_draw():
    n = 64
    flat = jnp.zeros((n, VOCAB))
    same = rows(*[SamplingParams(temperature=1.0, seed=3)] * n)
    other = rows(*[SamplingParams(temperature=1.0, seed=i) for i in range(n)])
    still, moving = jnp.full((n,), 5, jnp.int32), jnp.arange(n, dtype=jnp.int32)
    unseen = jnp.zeros((n, VOCAB), bool)
    assert len(set(np.asarray(jitted(flat, same, still, unseen)).tolist())) == 1
    assert len(set(np.asarray(jitted(flat, same, moving, unseen)).tolist())) > n // 3
    assert len(set(np.asarray(jitted(flat, other, still, unseen)).tolist())) > n // 3


def test_half_precision_logits_are_sampled_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    params = rows(*[SamplingParams(temperature=0.8, seed=i) for i in range(len(LOGITS))])
    positions = jnp.arange(len(LOGITS), dtype=jnp.int32)
    unseen = jnp.asarray(UNSEEN)
    np.testing.assert_array_equal(
        jitted(logits, params, positions, unseen),
        jitted(logits.astype(jnp.float32), params, positions, unseen),
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
        ("seed", 2**32),
        ("max_new_tokens", 0),
        ("stop", [""]),
        ("stop", [3]),
        ("stop_token_ids", [-1]),
    ],
)
def test_parameters_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"SamplingParams: {field} must be .*; found"):
        SamplingParams(**{field: value})


def test_parameters_are_hashable_and_take_one_stop_text():
    p = SamplingParams(stop="END", stop_token_ids=[5])
    assert (p.stop, p.stop_token_ids) == (("END",), (5,))
    assert hash(p) == hash(SamplingParams(stop=("END",), stop_token_ids=(5,)))
