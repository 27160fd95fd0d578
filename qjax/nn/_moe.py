"""Mixture of experts: stacked expert weights, dispatch, combination; experts and ffn channels cut over a mesh."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from qjax.formats import WHOLE, ActivationFormat
from qjax.nn._linear import Linear
from qjax.nn._mlp import GatedMLP
from qjax.nn._params import (
    Context,
    FakeQuantizer,
    abstract_activation_scale,
    abstract_param,
    abstract_weight,
)
from qjax.nn._router import Router, Routing
from qjax.ops import (
    SILU,
    GatedActivation,
    expert_order,
    gated_activation,
    gated_ragged_dot,
    gated_ragged_mlp,
    ragged_dot,
    straight_through,
)
from qjax.qarray import QArray
from qjax.quantization import compute_grid, quantize_activation, refine_blocks
from qjax.sharding import Sharding, array_specs, part_specs, sharded_format


class ExpertLinear(nnx.Module):
    """One linear layer of every expert: weight [E, N, K], bias [E, N].

    Checkpoints hold it in one of three ways, which the attributes tell the loader:

    - `stacked_in_checkpoint` False: ``{parent}.{e}.{name}.weight`` [N, K] per expert.
    - `stacked_in_checkpoint` True: ``{path}`` without a suffix and ``{path}_bias`` [E, N]; a quantized
      weight's parts (``{path}_blocks``, ``{path}_scales``) are (out, in) like ours;
    - and `transposed_in_checkpoint` True: a plain ``{path}`` is [E, K, N], to be transposed when read.
    """

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
        transposed_in_checkpoint: bool = False,
        alternating: bool = False,
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
            transposed_in_checkpoint: Whether that tensor, where it is not quantized, is [E, K, N].
            alternating: Whether even rows are a gate's and odd ones what it gates, as `gated_product` takes them.

        Raises:
            ValueError: If the experts of one layer have different specs.
        """
        self.stacked_in_checkpoint = stacked_in_checkpoint
        self.transposed_in_checkpoint = transposed_in_checkpoint
        self.alternating = alternating
        self.num_experts = num_experts
        paths = self.checkpoint_paths(path)
        spec = context.spec(paths[0])
        for other in paths[1:]:
            if context.spec(other) != spec:
                raise ValueError(
                    f"experts of one layer need one quantization: {paths[0]} has {spec}, "
                    f"{other} has {context.spec(other)}"
                )
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
        self.sharding = context.sharding
        self.implementation = context.implementation
        self.fake_quant: FakeQuantizer | None = nnx.data(None)  # set by `qjax.qat.prepare`

    def weight_value(self) -> Array | QArray:
        """The weights [E, N, K], fake quantized while they are trained for that."""
        w = self.weight.get_value()
        return w if self.fake_quant is None else self.fake_quant.weight(w)

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

    def __call__(
        self, x: Float[Array, "M K"], group_sizes: Int[Array, " E"]
    ) -> Float[Array, "M N"]:
        """Each row times its expert's weight, on one device; see `qjax.ops.ragged_dot`."""
        return self.local_product(self.operands(), x, group_sizes)

    def operands(self) -> tuple:
        """(weight, bias, activation scale): what `local_product` takes, each device its part."""
        rest = (None if p is None else p.get_value() for p in (self.bias, self.activation_scale))
        return (self.weight_value(), *rest)

    def operand_specs(self) -> tuple:
        """The partition specs of `operands`."""
        weight = array_specs(
            self.weight.get_value(), P(self.expert_axis, self.out_axis, self.in_axis)
        )
        return weight, P(self.expert_axis, self.out_axis), P(self.expert_axis)

    def local_product(self, operands, x, group_sizes) -> Array:
        """This device's product, inside `jax.shard_map` where there is a mesh.

        Args:
            operands: Its experts and channels of `operands`.
            x: [M, K], its channels of K.
            group_sizes: Rows of each of its experts.

        Returns:
            [M, N], partial sums (which the caller adds up) where `in_axis` cuts K; rows past the groups
            are zeros.
        """
        x, options = self.local_arguments(operands, x)
        return ragged_dot(x, operands[0], group_sizes, **options)

    def local_arguments(self, operands, x) -> tuple[Array | QArray, dict[str, Any]]:
        """x and the options with which this device's product meets its weight; arguments as `local_product`'s."""
        weight, bias, scale = operands
        activation = self.activation_format
        out_dtype = x.dtype
        if activation is not None and self.sharding.mesh is not None:
            activation, scale = _shared_scale(x, activation, scale, self.sharding)
            if self.in_axis is not None and _needs_whole_rows(x.shape[-1], activation):
                # Scales must not depend on the mesh: quantize whole rows, then take this device's columns.
                if scale is not None and scale.size > 1:
                    raise ValueError(
                        f"experts: {activation.format.block_shape} activation blocks with a scale per "
                        f"expert can't be cut into {x.shape[-1]} columns per device; use fewer "
                        f"{self.in_axis} shards"
                    )
                whole = jax.lax.all_gather(x, self.in_axis, axis=1, tiled=True)
                quantized = quantize_activation(whole, activation, scale=scale)
                quantized = _columns(quantized, self.in_axis, self.sharding.size(self.in_axis))
                activation = scale = None
                if isinstance(weight, QArray):
                    x = quantized
                else:
                    x = straight_through(x, quantized.dequantize(x.dtype))
        if bias is not None and self.in_axis is not None:
            bias = jnp.where(jax.lax.axis_index(self.in_axis) == 0, bias, jnp.zeros_like(bias))
        return x, dict(
            bias=bias,
            activation_format=activation,
            activation_scale=scale,
            out_dtype=out_dtype,
            implementation=self.implementation,
        )


@dataclasses.dataclass(frozen=True)
class LocalExperts:
    """A layer with this device's part of its operands."""

    layer: ExpertLinear
    operands: tuple

    def __call__(self, x: Float[Array, "M K"], group_sizes: Int[Array, " E"]) -> Array:
        """[M, N]; see `ExpertLinear.local_product`."""
        return self.layer.local_product(self.operands, x, group_sizes)


def gated_product(
    gate: LocalExperts,
    up: LocalExperts | None,
    x: Float[Array, "T K"],
    group_sizes: Int[Array, " E"],
    rows: Int[Array, " M"],
    activation: GatedActivation = SILU,
) -> Float[Array, "M N"]:
    """The gated activation of gate(x) and up(x), in one kernel where there is one.

    Args:
        gate: An `alternating` layer has both.
        up: None beside such a layer.
        x: The tokens.
        group_sizes: Rows of each expert.
        rows: The token of each row, rows sorted by expert.
        activation: Which one.
    """
    gather = functools.partial(jnp.take, x, rows, axis=0, mode="clip")
    weight = None
    if up is not None:
        plain = all(part is None for part in (*gate.operands[1:], *up.operands[1:]))
        if not plain or gate.layer.activation_format != up.layer.activation_format:
            sorted_x = gather()
            products = gate(sorted_x, group_sizes), up(sorted_x, group_sizes)
            return gated_activation(*products, activation)
        weight = up.operands[0]
    quantized = gate.layer.activation_format is not None
    lhs, options = gate.layer.local_arguments(gate.operands, gather() if quantized else x)
    return gated_ragged_dot(
        lhs,
        gate.operands[0],
        weight,
        group_sizes,
        rows=None if quantized else rows,
        activation=activation,
        **options,
    )


def gated_mlp(
    gate_up: LocalExperts,
    down: LocalExperts,
    x: Float[Array, "T K"],
    group_sizes: Int[Array, " E"],
    rows: Int[Array, " M"],
    places: Int[Array, " M"],
    activation: GatedActivation = SILU,
) -> Float[Array, "M K"]:
    """down's product of the gated activation of an `alternating` layer; arguments as `gated_product`'s.

    `places` is where the rows of each token in turn come.
    """
    if gate_up.layer.activation_format is not None or down.layer.activation_format is not None:
        hidden = gated_product(gate_up, None, x, group_sizes, rows, activation)
        return down(hidden, group_sizes)
    _, options = gate_up.layer.local_arguments(gate_up.operands, x)
    _, down_options = down.layer.local_arguments(down.operands, x)
    return gated_ragged_mlp(
        x,
        gate_up.operands[0],
        None,
        down.operands[0],
        group_sizes,
        rows=rows,
        places=places,
        activation=activation,
        bias=options["bias"],
        down_bias=down_options["bias"],
        implementation=options["implementation"],
    )


def _shared_scale(
    x: Array, activation: ActivationFormat, scale: Array | None, sharding: Sharding
) -> tuple[ActivationFormat, Array | None]:
    """A dynamic format's one scale for all rows, from the amax over all devices."""
    f = activation.format
    if activation.static or not (f.global_scale or f.block_shape == (WHOLE, WHOLE)):
        return activation, scale
    assert sharding.mesh is not None
    amax = jax.lax.pmax(jnp.max(jnp.abs(x.astype(jnp.float32))), sharding.mesh.axis_names)
    row = jnp.full((1, max(f.block_shape[1], 1)), amax)
    grid = compute_grid(row, f, amax_min=activation.amax_min, amax_max=activation.amax_max)
    one = grid.global_scale if f.global_scale else grid.scale
    assert one is not None
    return dataclasses.replace(activation, static=True), one.reshape(()).astype(jnp.float32)


def _needs_whole_rows(local_k: int, activation: ActivationFormat) -> bool:
    """Whether a scale covers columns of several devices."""
    block = activation.format.block_shape
    if block == (WHOLE, WHOLE):
        return False  # one scale for all, settled before
    return block[1] == WHOLE or local_k % block[1] != 0


def _columns(q: QArray, axis: str, shards: int) -> QArray:
    """This device's columns of a QArray [M, K] that every device holds whole."""
    format = sharded_format(q.format, q.shape, (1, shards), "activations")
    q = refine_blocks(q, format.block_shape)
    index = jax.lax.axis_index(axis)
    parts = {}
    for name, spec in part_specs(format, P(None, axis)).items():
        part = getattr(q, name)
        if part is not None and spec[-1] == axis:
            width = part.shape[-1] // shards
            part = jax.lax.dynamic_slice_in_dim(part, index * width, width, axis=1)
        parts[name] = part
    return dataclasses.replace(q, **parts)


class Experts(nnx.Module):
    """The experts' gated feed-forward layers: ``down(silu(gate(x)) * up(x))`` of each chosen expert.

    Tokens are sorted by expert (stably, so the result does not depend on scheduling), every expert takes
    all its tokens, and the weighted outputs are summed in float32. On a mesh, experts are cut over
    "expert" and their channels over "mlp"; each device runs its part on all tokens of its data shard.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        path: str,
        context: Context,
    ):
        """Builds gate_proj, up_proj [E, F, D] and down_proj [E, D, F] with abstract parameters."""
        make = self.builder(num_experts, intermediate_size, path, context)
        self.gate_proj = make("gate_proj", hidden_size, intermediate_size)
        self.up_proj = make("up_proj", hidden_size, intermediate_size)
        self.down_proj = make("down_proj", intermediate_size, hidden_size)

    def builder(
        self, num_experts: int, intermediate_size: int, path: str, context: Context, **kwargs
    ):
        """What builds a layer by its name and sizes; also settles how experts and channels are cut."""
        self.num_experts = num_experts
        self.sharding = context.sharding
        self.expert_axis = context.sharding.axis("expert", num_experts)
        self.channel_axis = channels = context.sharding.axis("mlp", intermediate_size)

        def make(name: str, n_in: int, n_out: int, **options) -> ExpertLinear:
            cut = {"in_axis": channels} if name == "down_proj" else {"out_axis": channels}
            return ExpertLinear(
                num_experts,
                n_in,
                n_out,
                f"{path}.{name}",
                context,
                expert_axis=self.expert_axis,
                **cut,
                **kwargs,
                **options,
            )

        return make

    def layers(self) -> dict[str, ExpertLinear]:
        """{name: layer}, as `feed_forward` takes their products."""
        return {name: getattr(self, name) for name in ("gate_proj", "up_proj", "down_proj")}

    def feed_forward(
        self,
        product: Mapping[str, LocalExperts],
        x: Float[Array, "T D"],
        group_sizes: Int[Array, " E"],
        rows: Int[Array, " M"],
        places: Int[Array, " M"],
    ) -> Float[Array, "M D"]:
        """The experts' outputs in x's dtype for rows sorted by expert; `expert_order` has rows and places."""
        del places
        hidden = gated_product(product["gate_proj"], product["up_proj"], x, group_sizes, rows)
        return product["down_proj"](hidden, group_sizes)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        weights: Float[Array, "B T k"],
        experts: Int[Array, "B T k"],
    ) -> Float[Array, "B T D"]:
        """sum_j weights[..., j] * expert_{experts[..., j]}(x), in x's dtype."""
        layers = self.layers()
        if self.sharding.mesh is None:
            products = {n: LocalExperts(layer, layer.operands()) for n, layer in layers.items()}
            return self._dispatch(products, x, weights, experts).astype(x.dtype)
        rows = self.sharding.axis("batch", x.shape[0])
        summed = tuple(a for a in (self.expert_axis, self.channel_axis) if a is not None)

        def local(operands, x, weights, experts):
            products = {n: LocalExperts(layers[n], parts) for n, parts in operands.items()}
            out = self._dispatch(products, x, weights, experts)
            return (jax.lax.psum(out, summed) if summed else out).astype(x.dtype)

        return jax.shard_map(
            local,
            mesh=self.sharding.mesh,
            in_specs=({n: layer.operand_specs() for n, layer in layers.items()}, *[P(rows)] * 3),
            out_specs=P(rows),
            check_vma=False,
        )({n: layer.operands() for n, layer in layers.items()}, x, weights, experts)

    def _dispatch(self, product: Mapping[str, LocalExperts], x, weights, experts) -> Array:
        """This device's experts on these tokens, float32 [B, T, D]; zeros from experts elsewhere."""
        b, t, d = x.shape
        k = experts.shape[-1]
        count = self.num_experts // self.sharding.size(self.expert_axis)
        expert = experts.reshape(-1, k)
        if self.expert_axis is not None:
            expert = expert - jax.lax.axis_index(self.expert_axis) * count
            expert = jnp.where((expert >= 0) & (expert < count), expert, count)
        rows, places, group_sizes = expert_order(expert, count)
        y = self.feed_forward(product, x.reshape(-1, d), group_sizes, rows, places)
        places, weights = places.reshape(-1, k), weights.reshape(-1, k).astype(jnp.float32)

        def weighted(j: int) -> Array:
            rows = jnp.take(y, places[:, j], axis=0, mode="clip").astype(jnp.float32)
            return rows * weights[:, j, None]

        # XLA makes one kernel of these, but two of a gather of all and a sum.
        return functools.reduce(jnp.add, map(weighted, range(k))).reshape(b, t, d)


class MoE(nnx.Module):
    """A router, its experts, and experts that every token shares (one feed-forward layer)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        routing: Routing,
        path: str,
        context: Context,
        *,
        correction: bool = False,
        shared_size: int = 0,
    ):
        """Builds `gate`, `experts` and `shared_experts` with abstract parameters.

        Args:
            hidden_size: D.
            intermediate_size: F of each routed expert.
            routing: The router's rule.
            path: The module's path.
            context: Specs, dtype, sharding.
            correction: See `Router`.
            shared_size: F of the shared experts together, 0 for none.
        """
        self.gate = Router(hidden_size, routing, context, correction=correction)
        self.experts = Experts(
            routing.num_experts, hidden_size, intermediate_size, f"{path}.experts", context
        )
        shared = f"{path}.shared_experts"
        self.shared_experts = (
            GatedMLP(hidden_size, shared_size, shared, context) if shared_size else None
        )

    @property
    def input_layers(self) -> tuple[Linear, ...]:
        """None: the router sees the values of the input."""
        return ()

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The layer's output in x's dtype."""
        out = self.experts(x, *self.gate(x))
        return out if self.shared_experts is None else out + self.shared_experts(x)
