"""Re-laying a loaded model's weights out for the GPU kernels."""

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qjax.nn._linear import Linear
from qjax.nn._params import QuantizedParam, modules
from qjax.ops import prepack as prepack_array
from qjax.ops import prepackable
from qjax.qarray import QArray
from qjax.sharding import array_specs
from qjax.wgmma_layout import BLOCK


def prepack(model: nnx.Module) -> int:
    """Gives every `Linear` whose weight a kernel takes re-laid out that layout, in place.

    One weight at a time, so memory never holds more than one twice. Weights whose shards would cut a block of
    64 rows or columns, and such that no kernel re-lays out, stay as they are (`qjax.prepack`).

    Args:
        model: A loaded model; export and checkpoints undo the layout where they need to.

    Returns:
        The number of weights re-laid out.
    """
    count = 0
    for _, module in modules(model):
        if isinstance(module, Linear) and isinstance(module.weight, QuantizedParam):
            w = module.weight.get_value()
            if _takes(module, w):
                module.weight.set_value(_convert(module, w))
                count += 1
    return count


def _takes(module: Linear, w: QArray) -> bool:
    if not prepackable(w) or any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(w)):
        return False
    if module.activation_format is not None:
        return False
    return all(
        size // BLOCK % module.sharding.size(axis) == 0
        for size, axis in zip(w.shape, (module.out_axis, module.in_axis), strict=True)
    )


def _convert(module: Linear, w: QArray) -> QArray:
    mesh = module.sharding.mesh
    if mesh is None:
        return jax.jit(prepack_array)(w)
    spec = PartitionSpec(module.out_axis, module.in_axis)
    specs = array_specs(jax.eval_shape(prepack_array, w), spec)
    shardings = jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )
    return jax.jit(prepack_array, out_shardings=shardings)(w)
