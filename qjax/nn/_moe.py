"""Mixture of experts: stacked expert weights."""

from flax import nnx

from qjax.nn._params import Context, abstract_activation_scale, abstract_param, abstract_weight


class ExpertLinear(nnx.Module):
    """One linear layer of every expert: weight [E, N, K], bias [E, N]."""

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        path: str,
        context: Context,
        *,
        use_bias: bool = False,
        in_axis: str | None = None,
        out_axis: str | None = None,
        expert_axis: str | None = None,
        stacked_in_checkpoint: bool = False,
    ):
        """Builds the stacked layer with abstract parameters.

        Args:
            num_experts: E.
            in_features: K.
            out_features: N.
            path: The module's path, such as ``model.layers.1.mlp.experts.gate_proj``.
            context: Specs, dtype, sharding.
            use_bias: Whether there are biases.
            in_axis: Mesh axis that cuts K.
            out_axis: Mesh axis that cuts N.
            expert_axis: Mesh axis that cuts E.
            stacked_in_checkpoint: Whether checkpoints hold the stack as one tensor (GPT-OSS) instead of
                one tensor per expert.
        """
        self.stacked_in_checkpoint = stacked_in_checkpoint
        self.num_experts = num_experts
        spec = context.spec(self.checkpoint_paths(path)[0])
        axes = (expert_axis, out_axis, in_axis)
        shape = (num_experts, out_features, in_features)
        self.weight = abstract_weight(shape, spec.weights, context, axes, path)
        bias = abstract_param(shape[:2], context.dtype, context.sharding, axes[:2])
        self.bias = bias if use_bias else None
        self.spec = spec
        self.activation_format = spec.activations
        self.activation_scale = abstract_activation_scale(
            spec, (num_experts,), context.sharding, (expert_axis,)
        )
        self.in_axis, self.out_axis, self.expert_axis = in_axis, out_axis, expert_axis
        self.implementation = context.implementation

    @property
    def kind(self) -> str:
        """The class word that rules target."""
        return "Experts" if self.stacked_in_checkpoint else "Linear"

    def checkpoint_paths(self, path: str) -> list[str]:
        """Names under which checkpoints hold this layer: its own, or one per expert."""
        if self.stacked_in_checkpoint:
            return [path]
        parent, _, name = path.rpartition(".")
        return [f"{parent}.{e}.{name}" for e in range(self.num_experts)]
