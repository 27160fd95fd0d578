"""Quantization-aware training of one's own Flax Linen model: the same apply, inside an interceptor."""

import jax
import jax.numpy as jnp
import optax
from flax import linen

from qjax import qat
from qjax.recipe import SCHEMES, Recipe, Rule


class MLP(linen.Module):
    """Two layers."""

    @linen.compact
    def __call__(self, x):
        """One number for each row."""
        x = linen.gelu(linen.Dense(128, name="up")(x))
        return linen.Dense(1, name="down")(x)


def main(steps: int = 200) -> list[float]:
    """Trains through INT4 rounding; returns the losses, those of the stored codes last."""
    x = jax.random.normal(jax.random.key(0), (256, 32))
    y = jnp.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    model, spec = MLP(), SCHEMES["W4A16_G32"]
    params, optimizer = model.init(jax.random.key(1), x), optax.adam(1e-2)
    state = optimizer.init(params)

    def loss(params):
        with qat.fake_quant_params(Recipe((Rule(("up",), spec),))):
            return jnp.mean((jnp.asarray(model.apply(params, x)) - y) ** 2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert spec.weights is not None
    codes = qat.quantize_params(params["params"], {"up.kernel": (spec.weights, qat.Axes((0,)))})
    params["params"]["up"]["kernel"] = codes["up.kernel"].dequantize().T
    return [*losses, float(jnp.mean((jnp.asarray(model.apply(params, x)) - y) ** 2))]


if __name__ == "__main__":
    found = main()
    print(f"loss {found[0]:.3f} -> {found[-2]:.4f}, quantized {found[-1]:.4f}")
