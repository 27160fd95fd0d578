"""Routers of mixtures of experts: which experts a token goes to, and with what weights."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from qjax.nn._params import Context, abstract_param

SCORINGS = ("softmax", "softmax_of_chosen", "sigmoid")


@dataclasses.dataclass(frozen=True)
class Routing:
    """How router logits become experts and weights.

    Attributes:
        num_experts: E.
        top_k: Experts per token.
        scoring: "softmax" over all experts, then the choice (Qwen3); "softmax_of_chosen", the choice by
            logits, then a softmax over those (GPT-OSS); "sigmoid" of each logit (DeepSeek-V3,
            arXiv:2412.19437).
        normalize: Whether a token's weights are divided by their sum.
        groups: Experts stand in this many groups of equal size, in order,
        open_groups: of which each token may use this many: those with the best sum of two scores.
        scale: Factor on the weights.

    Raises:
        ValueError: If the counts contradict each other.
    """

    num_experts: int
    top_k: int
    scoring: str = "softmax"
    normalize: bool = False
    groups: int = 1
    open_groups: int = 1
    scale: float = 1.0

    def __post_init__(self):
        if self.scoring not in SCORINGS:
            raise ValueError(f"Routing: scoring must be one of {SCORINGS}; found {self.scoring!r}")
        if self.num_experts % self.groups or not 1 <= self.open_groups <= self.groups:
            raise ValueError(
                f"Routing: {self.num_experts} experts must divide into {self.groups} groups, of which "
                f"1 to {self.groups} are open; found {self.open_groups}"
            )
        reachable = self.num_experts // self.groups * self.open_groups
        if not 1 <= self.top_k <= reachable:
            raise ValueError(
                f"Routing: experts per token must be 1 to {reachable}, the experts of the open groups; "
                f"found {self.top_k}"
            )


def route(
    logits: Float[Array, "*tokens E"],
    routing: Routing,
    correction: Float[Array, " E"] | None = None,
) -> tuple[Float[Array, "*tokens k"], Int[Array, "*tokens k"]]:
    """(weights, experts) of each token; equal scores go to the expert with the lower number.

    Args:
        logits: float32.
        routing: The rule.
        correction: Added to scores for the choice only (load balancing without a loss, arXiv:2408.15664).
    """
    if routing.scoring == "softmax_of_chosen":
        scores = logits
    elif routing.scoring == "softmax":
        scores = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits)
    choice = scores
    if correction is not None:
        choice = choice + correction.reshape((1,) * (choice.ndim - 1) + (-1,))
    if routing.groups > 1:
        choice = jnp.where(_open_experts(choice, routing), choice, -jnp.inf)
    weights, experts = jax.lax.top_k(choice, routing.top_k)
    if choice is not scores:
        weights = jnp.take_along_axis(scores, experts, axis=-1)
    if routing.scoring == "softmax_of_chosen":
        weights = jax.nn.softmax(weights, axis=-1)
    if routing.normalize:
        # All sigmoids may underflow; the constant is transformers'.
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * routing.scale, experts


def _open_experts(choice: Array, routing: Routing) -> Array:
    """Which experts belong to a token's open groups: bool [..., E]."""
    size = routing.num_experts // routing.groups
    grouped = choice.reshape(*choice.shape[:-1], routing.groups, size)
    group_scores = jnp.sum(jax.lax.top_k(grouped, min(2, size))[0], axis=-1)
    best = jax.lax.top_k(group_scores, routing.open_groups)[1]
    is_open = jnp.any(jax.nn.one_hot(best, routing.groups, dtype=bool), axis=-2)
    return jnp.repeat(is_open, size, axis=-1)


class Router(nnx.Module):
    """Scores each token against every expert, in float32; never quantized."""

    def __init__(
        self,
        hidden_size: int,
        routing: Routing,
        context: Context,
        *,
        use_bias: bool = False,
        correction: bool = False,
    ):
        """Builds the router with abstract parameters: weight [E, D] and, where asked for, biases [E].

        Args:
            hidden_size: D.
            routing: The rule.
            context: Dtype, sharding.
            use_bias: Whether logits have a bias.
            correction: Whether the choice has one (`e_score_correction_bias`, float32).
        """
        experts = (routing.num_experts,)
        sharding = context.sharding
        self.routing = routing
        self.weight = abstract_param((*experts, hidden_size), context.dtype, sharding, (None, None))
        self.bias = abstract_param(experts, context.dtype, sharding, (None,)) if use_bias else None
        self.e_score_correction_bias = (
            abstract_param(experts, "float32", sharding, (None,)) if correction else None
        )

    def __call__(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T k"], Int[Array, "B T k"]]:
        """(weights, experts) of each token."""
        w = self.weight.get_value()
        if not x.dtype == w.dtype == jnp.bfloat16:  # whose products are exact in float32
            x, w = x.astype(jnp.float32), w.astype(jnp.float32)
        highest = jax.lax.Precision.HIGHEST
        logits = jnp.einsum(
            "btd,ed->bte", x, w, precision=highest, preferred_element_type=jnp.float32
        )
        if self.bias is not None:
            logits = logits + self.bias.get_value().astype(jnp.float32)[None, None]
        correction = self.e_score_correction_bias
        return route(logits, self.routing, None if correction is None else correction.get_value())
