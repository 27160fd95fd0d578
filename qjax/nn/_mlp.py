"""The gated feed-forward layer."""

import jax
from flax import nnx
from jax import Array
from jaxtyping import Float

from qjax.nn._linear import Linear
from qjax.nn._params import Context


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

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The layer's output in x's dtype."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
