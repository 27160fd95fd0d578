"""A model's parameters by checkpoint names, gathered to the host one tensor at a time."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.checkpoint._blocks import reblock_parts
from qjax.checkpoint._declared import declared_spec
from qjax.formats import QFormat
from qjax.nn import (
    ActivationScale,
    Embedding,
    ExpertLinear,
    KVScale,
    Linear,
    QuantizedParam,
    modules,
)
from qjax.qarray import QArray, to_packed
from qjax.recipe import QuantSpec

PARTS = ("qvalue", "scale", "zero_point", "minimum", "global_scale", "column_perm")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight that a recipe can quantize, as one or more checkpoint modules.

    Attributes:
        path: The module's path in the model.
        kind: Class word.
        names: Its checkpoint paths: its own, or one per expert.
        stacked: Whether one checkpoint tensor holds all experts (GPT-OSS).
        spec: The quantization, its blocks not cut by a mesh.
        module: The module.
    """

    path: str
    kind: str
    names: tuple[str, ...]
    stacked: bool
    spec: QuantSpec
    module: nnx.Module

    @property
    def value(self) -> Any:
        """The weight: a `QArray` or an array."""
        return self.module.weight.get_value()  # type: ignore[attr-defined]

    @property
    def format(self) -> QFormat:
        """The format of a quantized layer."""
        assert self.spec.weights is not None
        return self.spec.weights

    @property
    def permuted(self) -> bool:
        """Whether its columns are stored in another order."""
        return isinstance(self.value, QArray) and self.value.column_perm is not None

    def expert(self, index: int) -> int | None:
        """Row of the stack that name `index` stands for, None where names and weights are one to one."""
        return index if isinstance(self.module, ExpertLinear) and not self.stacked else None

    def quantized(self, index: int) -> QArray:
        """The weight of name `index` on the host, in the declared blocks."""
        w, expert = self.value, self.expert(index)
        parts = {}
        for part in PARTS:
            array = getattr(w, part)
            if array is not None:
                parts[part] = to_host(array, None if part == "column_perm" else expert)
        if w.format.ordered:
            w = jax.tree.map(jnp.asarray, dataclasses.replace(w, **parts))
            w = jax.tree.map(np.asarray, to_packed(w))
            parts = {part: getattr(w, part) for part in parts if getattr(w, part) is not None}
        return reblock_parts(w, parts, self.format.block_shape, self.names[index])


def layers(model: nnx.Module) -> dict[str, Layer]:
    """{module path: layer} of all linear layers, experts and embeddings."""
    found = {}
    for path, module in modules(model):
        spec = declared_spec(module)
        if spec is None:
            continue
        if isinstance(module, ExpertLinear):
            names = tuple(module.checkpoint_paths(path))
            found[path] = Layer(
                path, module.kind, names, module.stacked_in_checkpoint, spec, module
            )
        else:
            kind = "Linear" if isinstance(module, Linear) else "Embedding"
            found[path] = Layer(path, kind, (path,), False, spec, module)
    return found


def class_words(model: nnx.Module) -> dict[str, str]:
    """{checkpoint path: class word} of what other loaders may quantize: our layers, and routers.

    Routers are linear layers elsewhere, so they have to be named where a class word is the target.
    """
    words = {name: layer.kind for layer in layers(model).values() for name in layer.names}
    for path, module in modules(model):
        weight = getattr(module, "weight", None)
        known = isinstance(module, Linear | ExpertLinear | Embedding)
        if not known and isinstance(weight, nnx.Variable) and weight.get_value().ndim == 2:
            words[path] = "Linear"
    return words


def variables(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    """(dotted name, variable) of a model's parameters and scales.

    Raises:
        ValueError: If one is not loaded.
    """
    state = nnx.state(model, nnx.Any(nnx.Param, ActivationScale, KVScale, QuantizedParam))
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(str(p) for p in path)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(variable.get_value())):
            raise ValueError(f"export: {name} is not loaded: fill the model before exporting it")
        yield name, variable


def to_host(x: jax.Array | np.ndarray, expert: int | None = None) -> np.ndarray:
    """An array, or one expert of a stack, on the host; shards are copied into place one by one.

    Raises:
        ValueError: If other processes hold shards.
    """
    if isinstance(x, np.ndarray):
        return x if expert is None else x[expert]
    if not x.is_fully_addressable:
        raise ValueError(
            "export: another process holds a part of the model; export from one process"
        )
    if expert is None:
        return np.asarray(x)
    out = np.empty(x.shape[1:], x.dtype)
    for shard in x.addressable_shards:
        start, stop, _ = shard.index[0].indices(x.shape[0])
        if shard.replica_id == 0 and start <= expert < stop:
            out[shard.index[1:]] = np.asarray(shard.data[expert - start])
    return out
