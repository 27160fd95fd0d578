"""What a layer's weight is declared to be, apart from what a mesh made of its blocks."""

import dataclasses

import numpy as np
from flax import nnx

from qjax.checkpoint._blocks import BLOCK_PARTS, reblock_parts
from qjax.formats import WHOLE, QFormat
from qjax.nn import Embedding, ExpertLinear, Linear
from qjax.qarray import QArray, to_packed
from qjax.recipe import QuantSpec


def declared_spec(layer: nnx.Module) -> QuantSpec | None:
    """The quantization that a checkpoint should state for a layer, None for other modules.

    The format is the weight's own; where its blocks are those that the layer was built with, cut by a
    mesh, and their scales are still equal, the uncut blocks count. (Weights quantized on the mesh have
    a scale for each small block.)
    """
    if not isinstance(layer, Linear | ExpertLinear | Embedding):
        return None
    value = layer.weight.get_value()
    activations = None if isinstance(layer, Embedding) else layer.activation_format
    if not isinstance(value, QArray):
        return QuantSpec(None, activations)
    declared = layer.spec.weights
    if value.format.ordered:
        if value.format.in_checkpoints == declared:
            return QuantSpec(declared, activations)
        value = to_packed(value)
    if declared is not None and _refines(value.format, declared) and _mergeable(value, declared):
        return QuantSpec(declared, activations)
    return QuantSpec(value.format, activations)


def _refines(format: QFormat, declared: QFormat) -> bool:
    """Whether a format is the declared one but for blocks that divide the declared blocks."""
    if dataclasses.replace(format, block_shape=declared.block_shape) != declared:
        return False
    return all(
        f == d or (WHOLE not in (f, d) and d % f == 0)
        for f, d in zip(format.block_shape, declared.block_shape, strict=True)
    )


def _mergeable(w: QArray, declared: QFormat) -> bool:
    """Whether the scales within each declared block are equal."""
    if w.format == declared:
        return True
    parts = {
        name: np.asarray(getattr(w, name)) for name in BLOCK_PARTS if getattr(w, name) is not None
    }
    try:
        reblock_parts(w, parts, declared.block_shape, "weight")
    except ValueError:
        return False
    return True
