"""Quantization-aware training of one's own Flax NNX model: prepare, train as always, convert."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qjax import qat
from qjax.recipe import SCHEMES, Recipe, Rule


class MLP(nnx.Module):
    """Two layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(32, 128, rngs=rngs), nnx.Linear(128, 1, rngs=rngs)

    def __call__(self, x):
        """One number for each row."""
        return self.down(nnx.gelu(self.up(x)))


def main(steps: int = 200) -> list[float]:
    """Trains through INT4 rounding; returns the losses, the converted model's last."""
    x = jax.random.normal(jax.random.key(0), (256, 32))
    y = jnp.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    recipe = Recipe((Rule(("Linear",), SCHEMES["W4A16_G32"]),), ignore=("down",))
    model = qat.prepare(MLP(nnx.Rngs(0)), recipe)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    qat.convert(model)  # model.up now holds INT4 codes: qat.quantized_weights(model)
    return [*losses, float(jnp.mean((model(x) - y) ** 2))]


if __name__ == "__main__":
    found = main()
    print(f"loss {found[0]:.3f} -> {found[-2]:.4f}, quantized {found[-1]:.4f}")
