"""Re-laying a loaded model's weights out for the GPU kernels."""

import functools
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qjax.formats import WHOLE, ActivationFormat
from qjax.nn._linear import Linear
from qjax.nn._moe import ExpertLinear
from qjax.nn._params import QuantizedParam, modules
from qjax.ops import AMPERE, device_reason, prepackable
from qjax.ops import prepack as prepack_array
from qjax.qarray import QArray
from qjax.sharding import array_specs
from qjax.wgmma_layout import BLOCK


def prepack(model: nnx.Module) -> int:
    """Gives every `Linear` and `ExpertLinear` whose weight a kernel takes re-laid out that layout, in place.

    One weight at a time, so memory never holds more than one twice. Weights whose shards would cut a block of
    64 rows or columns, and such that no kernel re-lays out, stay as they are (`qjax.prepack`).
    On GPUs before Hopper only dense weights that meet 16-bit inputs have such a kernel.

    Args:
        model: A loaded model; export and checkpoints undo the layout where they need to.

    Returns:
        The number of weights re-laid out.
    """
    count = 0
    for _, module in modules(model):
        if isinstance(module, Linear | ExpertLinear) and isinstance(module.weight, QuantizedParam):
            w = module.weight.get_value()
            if _takes(module, w):
                module.weight.set_value(_convert(module, w))
                count += 1
    return count


def _takes(module: Linear | ExpertLinear, w: QArray) -> bool:
    if not prepackable(w) or any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(w)):
        return False
    inputs = module.activation_format
    if device_reason(*AMPERE) is None and (w.ndim == 3 or inputs is not None):
        return False
    if inputs is not None and not (
        (_fp4_experts(w) and inputs.format.block_shape == (1, WHOLE))
        or prepackable(w, inputs.format)
    ):
        return False
    return all(
        size // BLOCK % module.sharding.size(axis) == 0
        for size, axis in zip(w.shape[-2:], (module.out_axis, module.in_axis), strict=True)
    )


def _fp4_experts(w: QArray) -> bool:
    return w.ndim == 3 and w.format.element == "float4_e2m1fn"


def _convert(module: Linear | ExpertLinear, w: QArray) -> QArray:
    mesh = module.sharding.mesh
    pairs = isinstance(module, ExpertLinear) and module.alternating
    if w.shape[-2] % (2 * BLOCK * module.sharding.size(module.out_axis)):
        pairs = False  # a pair of blocks would be cut
    static = module.activation_format, pairs
    if mesh is None:
        return _converter(*static)(w)
    lead = (module.expert_axis,) if isinstance(module, ExpertLinear) else ()
    spec = PartitionSpec(*lead, module.out_axis, module.in_axis)
    specs = array_specs(jax.eval_shape(_converter(*static), w), spec)
    shardings = jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )
    leaves, tree = jax.tree.flatten(shardings)
    return _converter(*static, tuple(leaves), tree)(w)


# jit compiles anew for each function object: layers of one kind must share theirs.
@functools.cache
def _converter(
    activation: ActivationFormat | None,
    pairs: bool,
    shardings: tuple[NamedSharding, ...] = (),
    tree: Any = None,
):
    convert = functools.partial(prepack_array, activation=activation, pairs=pairs)
    if tree is None:
        return jax.jit(convert)
    return jax.jit(convert, out_shardings=jax.tree.unflatten(tree, shardings))
