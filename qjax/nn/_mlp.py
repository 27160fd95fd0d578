"""The gated feed-forward layer."""

from flax import nnx
from jax import Array
from jaxtyping import Float

from qjax.nn._linear import Linear
from qjax.nn._params import Context
from qjax.ops import QuantizedInput, quantized_silu_mul, silu_mul


class GatedMLP(nnx.Module):
    """SwiGLU (arXiv:2002.05202): ``down(silu(gate(x)) * up(x))``."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        path: str,
        context: Context,
        *,
        use_bias: bool = False,
    ):
        """Builds gate_proj, up_proj [F, D] and down_proj [D, F], column and row parallel over "mlp"."""
        axis = context.sharding.axis("mlp", intermediate_size)

        def linear(name, n_in, n_out, **axes):
            return Linear(n_in, n_out, f"{path}.{name}", context, use_bias=use_bias, **axes)

        self.gate_proj = linear("gate_proj", hidden_size, intermediate_size, out_axis=axis)
        self.up_proj = linear("up_proj", hidden_size, intermediate_size, out_axis=axis)
        self.down_proj = linear("down_proj", intermediate_size, hidden_size, in_axis=axis)

    @property
    def input_layers(self) -> tuple[Linear, ...]:
        """The layers that see the input."""
        return self.gate_proj, self.up_proj

    def __call__(self, x: Float[Array, "B T D"] | QuantizedInput) -> Float[Array, "B T D"]:
        """The layer's output in x's dtype."""
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        activation = down.input_format()
        if activation is None:
            return down(silu_mul(gate, up))
        scale, implementation = down.input_scale(), down.implementation
        return down(
            quantized_silu_mul(gate, up, activation, scale=scale, implementation=implementation)
        )
