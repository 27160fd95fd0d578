"""Distillation: the divergence of a student's predictions from its unquantized teacher's."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float


def distillation_loss(
    student_logits: Float[Array, "... V"],
    teacher_logits: Float[Array, "... V"],
    *,
    temperature: float = 1.0,
    mask: Bool[Array, "..."] | Float[Array, "..."] | None = None,
    direction: str = "forward",
) -> Float[Array, ""]:
    """Mean KL divergence between teacher and student at a temperature, in nats.

    With p = softmax(teacher_logits / t), q = softmax(student_logits / t) and weights m (ones without a
    mask), in float32::

        forward:   t^2 * sum_i m_i * sum_v p_iv * (log p_iv - log q_iv) / sum_i m_i
        backward:  t^2 * sum_i m_i * sum_v q_iv * (log q_iv - log p_iv) / sum_i m_i

    The factor t^2 keeps the gradient's size independent of t (arXiv:1503.02531, section 2.1). Forward
    covers everything that the teacher does, backward keeps the student where the teacher is
    (arXiv:2306.08543). The teacher gets no gradient. A teacher's logit of -inf gives its token no
    probability and, forward, no term.

    Args:
        student_logits: Logits [..., V], floating.
        teacher_logits: Logits of the same shape.
        temperature: t > 0.
        mask: Weights [...] of the positions: booleans, or any non-negative numbers; all 0 gives 0.
        direction: "forward" is KL(teacher || student), "backward" KL(student || teacher).

    Raises:
        ValueError: If shapes, temperature or direction are not as above.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"distillation_loss: student {list(student_logits.shape)} and teacher "
            f"{list(teacher_logits.shape)} must have one shape"
        )
    if mask is not None and mask.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"distillation_loss: mask {list(mask.shape)} must be {list(student_logits.shape[:-1])}"
        )
    if not temperature > 0 or direction not in ("forward", "backward"):
        raise ValueError(
            "distillation_loss: temperature must be positive and direction 'forward' or 'backward'; "
            f"found {temperature}, {direction!r}"
        )
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    logp = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature, axis=-1)
    logq = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature, axis=-1)
    if direction == "forward":
        # Where p is 0 the difference may be infinite: 0 * inf must stay 0, in the gradient as well.
        p = jnp.exp(logp)
        kl = jnp.sum(p * jnp.where(p > 0, logp - logq, 0.0), axis=-1)
    else:
        kl = jnp.sum(jnp.exp(logq) * (logq - logp), axis=-1)
    kl = kl * temperature**2
    if mask is None:
        return jnp.mean(kl)
    weights = mask.astype(jnp.float32)
    total = jnp.sum(weights)
    return jnp.sum(kl * weights) / jnp.where(total > 0, total, 1.0)
