"""Low-rank adapters on frozen linear layers, plain or quantized, and their merging (LoRA, QLoRA)."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from qjax.formats import QFormat
from qjax.nn import Adapter, Linear, modules, sharded_dot
from qjax.qarray import QArray, dequantize_stored
from qjax.quantization import quantize, refine_blocks
from qjax.recipe import matches
from qjax.sharding import Sharding


class LoRA(Adapter):
    """``scale * (x @ a.T) @ b.T``: a trained update of rank r to a linear layer (arXiv:2106.09685).

    Attributes:
        a: float32 [r, K], cut over a mesh as the layer's K is.
        b: float32 [N, r], cut as its N is.
        scale: alpha / r.
    """

    def __init__(
        self,
        a: Array,
        b: Array,
        scale: float,
        *,
        sharding: Sharding,
        in_axis: str | None,
        out_axis: str | None,
    ):
        """Takes the factors and the layer's mesh axes."""
        self.a, self.b = nnx.LoRAParam(a), nnx.LoRAParam(b)
        self.scale = scale
        self.sharding, self.in_axis, self.out_axis = sharding, in_axis, out_axis

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        """What the adapter adds to the layer's output, in x's dtype."""
        a, b = self.a.get_value(), self.b.get_value()
        mesh = self.sharding
        hidden = sharded_dot(x, a, sharding=mesh, in_axis=self.in_axis, out_axis=None)
        # The factor goes onto the r columns: x's dtype rounds it once, where the rows are shortest.
        hidden = hidden * jnp.asarray(self.scale, hidden.dtype)
        return sharded_dot(hidden, b, sharding=mesh, in_axis=None, out_axis=self.out_axis)

    def delta(self) -> Float[Array, "N K"]:
        """The update of the weight, float32."""
        b, a = self.b.get_value(), self.a.get_value()
        product = jnp.matmul(b, a, precision="highest", preferred_element_type=jnp.float32)
        return self.scale * product


def add_lora(
    model: nnx.Module,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = ("Linear",),
    *,
    key: Array,
    ignore: Sequence[str] = ("lm_head",),
) -> list[str]:
    """Puts trainable adapters beside linear layers, in place; outputs stay as they were at first.

    The layers' own weights are frozen by training nothing but `flax.nnx.LoRAParam` (``nnx.Optimizer(model,
    tx, wrt=nnx.LoRAParam)``); quantized ones stay packed (QLoRA, arXiv:2305.14314). Where a layer fake
    quantizes its weight, the sum of weight and update is fake quantized, so that `merge_lora` and
    `convert` give the weights that were trained.

    Args:
        model: A loaded model.
        rank: r, at most the smaller side of each layer.
        alpha: The update's factor is alpha / rank; default 2 * rank.
        targets: Which `qjax.nn.Linear` layers, as in recipes: paths, "Linear" or ``re:`` patterns.
        key: PRNG key of a, uniform in +-1/sqrt(K) as in the paper's code; b is zero.
        ignore: Targets left without an adapter; they may match nothing.

    Returns:
        Paths of the adapted layers.

    Raises:
        ValueError: If a target matches no linear layer, a layer has an adapter, or the rank does not fit.
    """
    if rank < 1:
        raise ValueError(f"add_lora: rank must be at least 1; found {rank}")
    layers = {path: module for path, module in modules(model) if isinstance(module, Linear)}
    unmatched = [t for t in targets if not any(matches(t, path, "Linear") for path in layers)]
    if unmatched or not targets:
        examples = ", ".join(list(layers)[:3])
        raise ValueError(
            f"add_lora: targets {unmatched} match no linear layer ({len(layers)} layers, e.g. {examples}); "
            "experts take no adapters"
        )
    chosen = {
        path: layer
        for path, layer in layers.items()
        if any(matches(t, path, "Linear") for t in targets)
        and not any(matches(t, path, "Linear") for t in ignore)
    }
    if not chosen:
        raise ValueError(f"add_lora: ignore = {list(ignore)} leaves no layer")
    for path, layer in chosen.items():
        n, k = layer.weight.get_value().shape
        if layer.lora is not None:
            raise ValueError(f"add_lora: {path} has an adapter already; merge_lora it first")
        if rank > min(n, k):
            raise ValueError(
                f"add_lora: {path} is [{n}, {k}]: rank {rank} must be at most {min(n, k)}"
            )
    scale = (2.0 * rank if alpha is None else alpha) / rank
    for layer in chosen.values():
        key, draw = jax.random.split(key)
        n, k = layer.weight.get_value().shape
        layer.lora = LoRA(
            _place(
                jax.random.uniform(draw, (rank, k), jnp.float32, -1.0, 1.0) * k**-0.5,
                layer.sharding.named(None, layer.in_axis),
            ),
            _place(jnp.zeros((n, rank), jnp.float32), layer.sharding.named(layer.out_axis, None)),
            scale,
            sharding=layer.sharding,
            in_axis=layer.in_axis,
            out_axis=layer.out_axis,
        )
    return list(chosen)


def _place(x: Array, sharding: jax.sharding.NamedSharding | None) -> Array:
    return x if sharding is None else jax.device_put(x, sharding)


def merge_lora(model: nnx.Module) -> list[str]:
    """Adds every adapter to its layer's weight, in place, and removes it.

    A plain weight becomes the float32 sum, rounded once to its dtype. A quantized one is quantized anew
    from that sum: same format, same column order, new scales.

    Returns:
        Paths of the merged layers.

    Raises:
        ValueError: If the model has no adapters.
    """
    merged = []
    for path, layer in modules(model):
        if not isinstance(layer, Linear) or layer.lora is None:
            continue
        w = layer.weight.get_value()
        assert isinstance(layer.lora, LoRA)
        if isinstance(w, QArray):
            new = _merge_quantized(w, layer.lora.delta(), layer.spec.weights or w.format)
        else:
            new = _merge_plain(w, layer.lora.delta())
        layer.weight.set_value(jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), new, w))
        layer.lora = None
        merged.append(path)
    if not merged:
        raise ValueError("merge_lora: the model has no adapters; add_lora puts them there")
    return merged


@jax.jit
def _merge_plain(w: Array, delta: Array) -> Array:
    return (w.astype(jnp.float32) + delta).astype(w.dtype)


@functools.partial(jax.jit, static_argnums=2)
def _merge_quantized(w: QArray, delta: Array, declared: QFormat) -> QArray:
    """The sum in w's format; scales span the declared blocks, which a mesh may have made smaller."""
    if w.column_perm is not None:
        delta = jnp.take(delta, w.column_perm, axis=-1)
    new = quantize(dequantize_stored(w) + delta, declared, dtype=w.dtype)
    if declared != w.format:
        new = refine_blocks(new, w.format.block_shape)
    return dataclasses.replace(new, column_perm=w.column_perm)
