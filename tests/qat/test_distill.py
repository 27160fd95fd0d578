"""The distillation loss against NumPy in float64, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.qat import distillation_loss


def logits(seed, shape=(2, 5, 11)):
    return np.random.default_rng(seed).normal(size=shape, scale=3).astype(np.float32)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def expected(student, teacher, temperature, mask, direction):
    logq, logp = log_softmax(student / temperature), log_softmax(teacher / temperature)
    if direction == "forward":
        kl = (np.exp(logp) * (logp - logq)).sum(-1)
    else:
        kl = (np.exp(logq) * (logq - logp)).sum(-1)
    mask = np.ones(kl.shape) if mask is None else np.asarray(mask, np.float64)
    return temperature**2 * (kl * mask).sum() / mask.sum()


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("masked", [None, bool, np.float32])
def test_values(direction, temperature, masked):
    student, teacher = logits(0), logits(1)
    mask = None if masked is None else jnp.asarray((np.arange(10).reshape(2, 5) % 3).astype(masked))
    options = {"temperature": temperature, "mask": mask, "direction": direction}
    found = distillation_loss(jnp.asarray(student), jnp.asarray(teacher), **options)
    assert found.dtype == jnp.float32
    want = expected(student, teacher, temperature, mask, direction)
    np.testing.assert_allclose(found, want, rtol=1e-5)  # float32 sums of 11 terms


def test_forward_gradient_is_the_difference_of_probabilities():
    """d/ds of t^2 KL(p || q) is t (q - p), averaged over the positions; the teacher gets none."""
    student, teacher, t = logits(0), logits(1), 2.0
    by_student, by_teacher = jax.grad(
        lambda s, p: distillation_loss(s, p, temperature=t), argnums=(0, 1)
    )(jnp.asarray(student), jnp.asarray(teacher))
    p, q = np.exp(log_softmax(teacher / t)), np.exp(log_softmax(student / t))
    np.testing.assert_allclose(by_student, t * (q - p) / 10, rtol=1e-4, atol=1e-7)
    assert not np.any(by_teacher)


def test_equal_logits_have_no_loss_and_no_gradient():
    x = jnp.asarray(logits(0))
    for direction in ("forward", "backward"):
        loss, gradient = jax.value_and_grad(
            lambda s, d=direction: distillation_loss(s, x, temperature=3.0, direction=d)
        )(x)
        assert abs(loss) < 1e-6 and float(jnp.max(jnp.abs(gradient))) < 1e-6


def test_masked_positions_and_impossible_tokens_add_nothing():
    student, teacher = logits(0), logits(1)
    mask = np.zeros((2, 5), bool)
    mask[0, 1] = True
    only = distillation_loss(
        jnp.asarray(student[:1, 1]), jnp.asarray(teacher[:1, 1]), temperature=1.0
    )
    found = distillation_loss(jnp.asarray(student), jnp.asarray(teacher), mask=jnp.asarray(mask))
    np.testing.assert_allclose(found, only, rtol=1e-6)
    none = distillation_loss(jnp.asarray(student), jnp.asarray(teacher), mask=jnp.zeros((2, 5)))
    assert none == 0
    # Both give the last token no probability.
    student[..., -1] = teacher[..., -1] = -np.inf
    loss, gradient = jax.value_and_grad(lambda s: distillation_loss(s, jnp.asarray(teacher)))(
        jnp.asarray(student)
    )
    np.testing.assert_allclose(
        loss, expected(student[..., :-1], teacher[..., :-1], 1.0, None, "forward"), rtol=1e-5
    )
    assert np.all(np.isfinite(gradient)) and not np.any(np.asarray(gradient)[..., -1])


def test_mistakes_are_named():
    x = jnp.zeros((2, 5, 11))
    with pytest.raises(ValueError, match="must have one shape"):
        distillation_loss(x, x[:, :4])
    with pytest.raises(ValueError, match=r"mask \[2\] must be \[2, 5\]"):
        distillation_loss(x, x, mask=jnp.ones(2))
    with pytest.raises(ValueError, match="temperature must be positive"):
        distillation_loss(x, x, temperature=0.0)
    with pytest.raises(ValueError, match="'sideways'"):
        distillation_loss(x, x, direction="sideways")
