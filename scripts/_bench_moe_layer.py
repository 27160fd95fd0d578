"""Cases of GPT-OSS's whole mixture for `bench_kernels`: router, both grouped products, combination."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.formats import qformat
from qjax.models import gpt_oss
from qjax.nn import Context
from qjax.qarray import QArray, dequantize_stored, to_wgmma
from qjax.recipe import SCHEMES

HIDDEN = 2880
TOP_K = 4
EXPERTS = (32, 128)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
CHECKED = 3  # tokens whose outputs are compared


def config(experts: int) -> gpt_oss.Config:
    """GPT-OSS's with so many experts."""
    return gpt_oss.Config.from_hf(
        dict(
            model_type="gpt_oss",
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=1024,
            num_local_experts=experts,
            num_experts_per_tok=TOP_K,
            max_position_embeddings=4096,
            sliding_window=128,
        )
    )


def mixture(experts: int) -> gpt_oss.ClampedMoE:
    """A layer of random weights, experts in MXFP4 re-laid out for the kernels."""
    paths = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    context = Context(dict.fromkeys(paths, SCHEMES["MXFP4A16"]), dtype="bfloat16")
    layer = gpt_oss.ClampedMoE(config(experts), "mlp", context)
    keys = iter(jax.random.split(jax.random.key(experts), 8))

    def normal(shape, scale):
        return scale * jax.random.normal(next(keys), shape, jnp.bfloat16)

    layer.router.weight.set_value(normal((experts, HIDDEN), HIDDEN**-0.5))
    assert layer.router.bias is not None
    layer.router.bias.set_value(normal((experts,), 0.1))
    for linear, pairs in ((layer.experts.gate_up_proj, True), (layer.experts.down_proj, False)):
        n = HIDDEN * (1 + pairs)
        linear.weight.set_value(
            jax.jit(_weight, static_argnums=(0, 1, 2))(experts, n, pairs, next(keys))
        )
        assert linear.bias is not None
        linear.bias.set_value(normal((experts, n), 0.1))
    return layer


def _weight(experts: int, n: int, pairs: bool, key: jax.Array) -> QArray:
    """Random codes, and scales with which products have the size of their inputs."""
    format, k = qformat("mxfp4"), HIDDEN
    keys = jax.random.split(key, 2)
    shape = format.scale_shape((experts, n, k))
    scale = jnp.exp2(jax.random.randint(keys[0], shape, -9, -5).astype(jnp.float32))
    codes = jax.lax.map(
        lambda key: jax.random.bits(key, (n, k // 2), jnp.uint8), jax.random.split(keys[1], experts)
    )
    return to_wgmma(QArray.from_parts(format, codes, scale.astype(format.scale_dtype)), pairs=pairs)


def layer_case(experts: int, tokens: int) -> dict:
    """The fields of a benchmark case of random data; its error is that of a few tokens' outputs."""
    layer = mixture(experts)
    graphdef, state = nnx.split(layer)
    x = jax.random.normal(jax.random.key(tokens), (tokens, 1, HIDDEN), jnp.bfloat16)
    _, chosen = jax.jit(lambda s, x: nnx.merge(graphdef, s).router(x))(state, x)
    active = len(np.unique(np.asarray(chosen)))

    def error(out):
        wrong = right = 0.0
        for t in range(min(CHECKED, tokens)):
            expected = _expected(layer, x[t])
            wrong += float(jnp.sum((out[t].astype(jnp.float32) - expected) ** 2))
            right += float(jnp.sum(expected**2))
        return float(np.sqrt(wrong / right))

    weights = 3 * active * HIDDEN * HIDDEN * 4.25 / 8
    return dict(
        op="moe_layer",
        format="mxfp4",
        shape={"experts": experts, "top_k": TOP_K, "tokens": tokens, "n": HIDDEN, "k": HIDDEN},
        fn=jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)),
        args=(state, x),
        error=error,
        flops=6.0 * tokens * TOP_K * HIDDEN * HIDDEN,
        nbytes=weights + 2 * experts * HIDDEN + 4 * tokens * HIDDEN,
        unit="bf16",
    )


def _expected(layer: gpt_oss.ClampedMoE, x: jax.Array) -> jax.Array:
    """One token's output [1, D] by float32 products."""
    weights, chosen = layer.router(x[None])
    total, experts = jnp.zeros((1, HIDDEN), jnp.float32), layer.experts
    for weight, expert in zip(weights[0, 0], chosen[0, 0], strict=True):

        def product(x, linear, e=expert):
            w = jax.tree.map(lambda part: part[e], linear.weight.get_value())
            y = jnp.matmul(x.astype(jnp.float32), dequantize_stored(w).T, precision="highest")
            return y + linear.bias.get_value()[e].astype(jnp.float32)

        both = product(x, experts.gate_up_proj)
        gate, up = jnp.minimum(both[:, ::2], 7.0), jnp.clip(both[:, 1::2], -7.0, 7.0)
        hidden = gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
        total += weight * product(hidden, experts.down_proj)
    return total
