"""AWQ: channels with large inputs are scaled up before rounding, their producer down (arXiv:2306.00978)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from qjax.formats import WHOLE, QFormat
from qjax.nn import Linear, RMSNorm
from qjax.qarray import QArray
from qjax.quantization import Grid, compute_grid, quantize

# {module whose output is scaled down: modules that read it}, inside a decoder layer.
_PAIRS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)


@dataclasses.dataclass(frozen=True)
class AWQ:
    """Options of AWQ.

    Attributes:
        steps: Exponents tried between 0 (no scaling) and 1.
        clip_steps: Shrunken ranges tried per block, 0 for none.
        smallest_clip: The smallest fraction of a block's range that is tried.
    """

    steps: int = 20
    clip_steps: int = 10
    smallest_clip: float = 0.5

    def __post_init__(self):
        if self.steps < 1 or self.clip_steps < 0 or not 0 < self.smallest_clip <= 1:
            raise ValueError(f"AWQ: steps and clips must be positive; found {self}")


def scale_channels(
    layer: nnx.Module,
    linears: Mapping[str, Linear],
    hessians: Mapping[str, Array],
    formats: Mapping[str, QFormat],
    options: AWQ,
) -> dict[str, Array]:
    """Scales the layer's channels in place; the layer computes the same function as before.

    Args:
        layer: A decoder layer with plain weights.
        linears: {path in the layer: linear module}.
        hessians: {path: sum of x x^T over the module's inputs}.
        formats: {path: format}, for the modules that will be quantized.
        options: Search grid.

    Returns:
        {path: Hessian of the scaled inputs}.
    """
    scaled = dict(hessians)
    for producer_path, consumer_paths in _PAIRS:
        producer = _get(layer, producer_path)
        readers = [p for p in consumer_paths if p in linears]
        if producer is None or not any(p in formats for p in readers):
            continue
        width = producer.weight.get_value().shape[0]
        if any(linears[p].weight.get_value().shape[1] != width for p in readers):
            continue  # o_proj reads each key head's values several times under grouped queries
        hessian = scaled[readers[0]]
        weights = tuple(linears[p].weight.get_value() for p in readers)
        chosen = tuple(formats.get(p) for p in readers)
        s = _search(weights, hessian, chosen, options.steps)
        _divide(producer, s)
        for path, w in zip(readers, weights, strict=True):
            linears[path].weight.set_value((w.astype(jnp.float32) * s[None]).astype(w.dtype))
            scaled[path] = hessian / (s[:, None] * s[None, :])
    return scaled


def _get(layer: nnx.Module, path: str) -> Linear | RMSNorm | None:
    node: Any = layer
    for name in path.split("."):
        node = getattr(node, name, None)
    return node if isinstance(node, Linear | RMSNorm) else None


def _divide(producer: Linear | RMSNorm, s: Array) -> None:
    """Scales the producer's output channels down."""
    for variable in (producer.weight, getattr(producer, "bias", None)):
        if variable is None:
            continue
        value = variable.get_value()
        divisor = s.reshape(-1, *(1,) * (value.ndim - 1))
        variable.set_value((value.astype(jnp.float32) / divisor).astype(value.dtype))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _search(
    weights: tuple[Array, ...], hessian: Array, formats: tuple[QFormat | None, ...], steps: int
) -> Float[Array, " K"]:
    """The channel scales, root-mean-square input ** exponent, whose rounded weights lose least."""
    rms = jnp.sqrt(jnp.maximum(jnp.diagonal(hessian), 1e-20))

    def scales(exponent):
        s = jnp.maximum(rms / jnp.max(rms), 1e-4) ** exponent
        return s / jnp.sqrt(jnp.max(s) * jnp.min(s))

    def loss(exponent):
        s = scales(exponent)
        total = jnp.zeros(())
        for w, format in zip(weights, formats, strict=True):
            if format is None:
                continue
            wf = w.astype(jnp.float32)
            kept = quantize(wf * s[None], format).dequantize(jnp.float32) / s[None]
            total += jnp.sum(((kept - wf) @ hessian) * (kept - wf))
        return total

    exponents = jnp.arange(steps, dtype=jnp.float32) / steps
    return scales(exponents[jnp.argmin(jax.lax.map(loss, exponents))])


def clipped(
    w: Float[Array, "N K"],
    hessian: Float[Array, "K K"],
    format: QFormat,
    options: AWQ,
    *,
    dtype: str,
) -> QArray:
    """Quantizes a weight with each block's range shrunk where that lowers the output error.

    Blocks of other shapes than (1, group) and ranges of floating or offset grids keep their extremes.
    """
    symmetric = not format.spec.is_float and format.offset is None
    if options.clip_steps == 0 or format.block_shape[0] != 1 or not symmetric:
        return quantize(w, format, dtype=dtype)
    return _clipped(w, hessian, format, options.clip_steps, options.smallest_clip, dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _clipped(w, hessian, format, steps, smallest, dtype) -> QArray:
    n, k = w.shape
    group = k if format.block_shape[1] == WHOLE else format.block_shape[1]
    blocks = k // group
    wf = w.astype(jnp.float32)
    base = compute_grid(wf, format)
    # Within a block of columns the Hessian is exact; between blocks errors are taken as independent.
    local = hessian.reshape(blocks, group, blocks, group)
    local = jnp.stack([local[b, :, b] for b in range(blocks)])

    def attempt(ratio):
        scale = (base.scale.astype(jnp.float32) * ratio).astype(base.scale.dtype)
        kept = quantize(wf, format, grid=Grid(scale)).dequantize(jnp.float32)
        d = (kept - wf).reshape(n, blocks, group)
        return jnp.einsum("nbi,bij,nbj->nb", d, local, d)

    ratios = jnp.linspace(1.0, smallest, steps + 1)
    best = ratios[jnp.argmin(jax.lax.map(attempt, ratios), axis=0)]
    scale = (base.scale.astype(jnp.float32) * best).astype(base.scale.dtype)
    return quantize(wf, format, grid=Grid(scale), dtype=dtype)
