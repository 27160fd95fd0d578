"""Filling an abstract model from a checkpoint, tensor by tensor, each device with its slice."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from qjax.checkpoint._blocks import reblock_parts
from qjax.checkpoint._gguf import GGUFFile
from qjax.checkpoint._read_folder import Folder
from qjax.checkpoint.schemes import Group
from qjax.formats import QFormat
from qjax.nn import CausalLM, Embedding, ExpertLinear, KVScale, Linear, modules
from qjax.qarray import QArray
from qjax.quantization import quantize
from qjax.recipe import QuantSpec, Recipe

Checkpoint = Folder | GGUFFile


@dataclasses.dataclass(frozen=True)
class Plan:
    """What goes where: the abstract model, the groups that are stored quantized, the specs to end up with."""

    model: CausalLM
    groups: Mapping[str, Group]
    specs: Mapping[str, QuantSpec]
    requantized: bool
    recipe: Recipe
    unused: frozenset[str]


_KV_NAMES = {
    "k_scale": ("k_scale", "k_proj.k_scale", "k_proj.output_scale", "attn.k_scale",
                "qkv_proj.k_scale", "kv_scale"),
    "v_scale": ("v_scale", "v_proj.v_scale", "v_proj.output_scale", "attn.v_scale",
                "qkv_proj.v_scale", "kv_scale"),
}  # fmt: skip
_KV_IGNORED = ("q_scale", "prob_scale", "prob_output_scale", "attn.q_scale", "q_proj.output_scale",
               "k_zero_point", "v_zero_point", "q_zero_point")  # fmt: skip


class Loader:
    """Fills the plan's model; every fault is noted before anything is raised."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan):
        """Decides which tensor goes where; nothing is read."""
        self._checkpoint, self._plan = checkpoint, plan
        self._used: set[str] = set()
        self._faults: list[str] = []
        self._tasks: list[tuple[tuple[str, ...], Callable[[], None]]] = []
        for path, module in modules(plan.model):
            self._add(path, module)

    @property
    def total_bytes(self) -> int:
        """Stored bytes of the tensors that are read."""
        return sum(self._nbytes(names) for names, _ in self._tasks)

    def _nbytes(self, names: tuple[str, ...]) -> int:
        infos = self._checkpoint.infos
        return sum(int(np.prod(infos[n].shape)) for n in names if n in infos)

    def check(self) -> None:
        """Raises one ValueError that lists every missing, extra and mis-shaped tensor."""
        extra = set(self._checkpoint.infos) - self._used - self._plan.unused
        extra = {n for n in extra if not n.endswith(".rotary_emb.inv_freq")}
        if self._plan.model.lm_head is None:
            extra.discard("lm_head.weight")
        self._faults += [f"{name}: the model has no such parameter" for name in sorted(extra)]
        self._raise()

    def _raise(self) -> None:
        if self._faults:
            lines = [f"{self._checkpoint.path}: {len(self._faults)} tensors are wrong:"]
            raise ValueError("\n".join(lines + self._faults))

    def fill(self, advance: Callable[[int], None]) -> None:
        """Loads tensor by tensor."""
        for names, task in self._tasks:
            try:
                task()
            except ValueError as error:
                self._faults.append(f"{names[0]}: {error}")
            advance(self._nbytes(names))
        self._raise()

    def _add(self, path: str, module: nnx.Module) -> None:
        weighted = isinstance(module, Linear | Embedding | ExpertLinear)
        if weighted:
            self._add_weight(path, module)
        for attribute, variable in vars(module).items():
            name = f"{path}.{attribute}" if path else attribute
            if isinstance(variable, KVScale):
                self._add_kv_scale(path, attribute, variable)
            elif isinstance(variable, nnx.Param) and not (weighted and attribute == "weight"):
                if isinstance(module, ExpertLinear):
                    self._add_expert_plain(module, path, attribute, variable)
                else:
                    self._add_plain(name, variable)

    # -- plain parameters

    def _available(self, name: str, shape: tuple[int, ...]) -> bool:
        """Notes the tensor as used; whether it is there and has this shape."""
        self._used.add(name)
        info = self._checkpoint.infos.get(name)
        if info is None:
            self._faults.append(f"{name}: missing")
        elif info.shape != shape:
            self._faults.append(f"{name}: must have shape {list(shape)}; found {list(info.shape)}")
        return info is not None and info.shape == shape

    def _add_plain(self, name: str, variable: nnx.Variable) -> None:
        like = variable.get_value()
        if self._available(name, tuple(like.shape)):
            self._tasks.append(
                ((name,), lambda: variable.set_value(_place(self._checkpoint.read(name), like)))
            )

    def _add_expert_plain(
        self, module: ExpertLinear, path: str, attribute: str, variable: nnx.Variable
    ) -> None:
        """Biases of experts, stacked or one by one."""
        like = variable.get_value()
        if module.stacked_in_checkpoint:
            self._add_plain(f"{path}_{attribute}", variable)
            return
        names = tuple(f"{p}.{attribute}" for p in module.checkpoint_paths(path))
        if all([self._available(n, tuple(like.shape[1:])) for n in names]):
            parts = (lambda i=n: {"": self._checkpoint.read(i)} for n in names)
            self._tasks.append((names, lambda: variable.set_value(_stack(parts, {"": like})[""])))

    def _add_kv_scale(self, path: str, attribute: str, variable: nnx.Variable) -> None:
        infos = self._checkpoint.infos
        candidates = [f"{path}.{suffix}" for suffix in _KV_NAMES[attribute]]
        found = [name for name in candidates if name in infos]
        self._used.update(found)
        self._used.update(f"{path}.{suffix}" for suffix in _KV_IGNORED)
        if found:
            heads = variable.get_value().shape[0]
            self._tasks.append(
                ((found[0],), lambda: variable.set_value(self._kv_scale(found[0], heads)))
            )

    def _kv_scale(self, name: str, heads: int) -> Array:
        value = self._checkpoint.read(name).astype(np.float32).reshape(-1)
        if value.size not in (1, heads) or not (np.isfinite(value) & (value > 0)).all():
            raise ValueError(f"must hold 1 or {heads} positive scales; found {value[:8]}")
        return jnp.asarray(np.broadcast_to(value, (heads,)).copy())

    # -- weights that may be quantized

    def _add_weight(self, path: str, module: Any) -> None:
        stacked = isinstance(module, ExpertLinear)
        paths = module.checkpoint_paths(path) if stacked else [path]
        whole = not stacked or module.stacked_in_checkpoint
        shape = tuple(module.weight.get_value().shape)
        shape = shape if whole else shape[1:]
        readers = [self._weight_reader(p, shape, module) for p in paths]
        names = tuple(name for names, _ in readers for name in names)
        if not all(read is not None for _, read in readers):
            return
        reads = [read for _, read in readers if read is not None]
        if whole:
            self._tasks.append((names, lambda: self._set(module, reads[0]())))
        else:
            self._tasks.append((names, lambda: self._set_experts(module, reads)))

    def _weight_reader(
        self, path: str, shape: tuple[int, ...], module: Any
    ) -> tuple[tuple[str, ...], Callable[[], "_Weight"] | None]:
        """The stored names of one weight, and the function that reads it, None if it can't be read."""
        group = self._plan.groups.get(path)
        spec = self._plan.specs.get(path, QuantSpec())
        dtype = self._plan.model.dtype
        if group is None or group.codec is None:
            transposed = isinstance(module, ExpertLinear) and module.transposed_in_checkpoint
            # Stacked plain experts are parameters themselves: their names have no ".weight".
            bare = isinstance(module, ExpertLinear) and module.stacked_in_checkpoint
            name = path if bare else f"{path}.weight"
            stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
            if not self._available(name, stored):
                return (name,), None

            def read_plain() -> _Weight:
                w = self._checkpoint.read(name)
                w = w.swapaxes(-1, -2) if transposed else w
                return _Weight(w, None) if spec.weights is None else _quantized(w, spec, dtype)

            return (name,), read_plain
        try:
            names = group.codec.tensor_names(path, self._checkpoint.infos)
            format = self._checkpoint.format(path, group)
        except ValueError as error:
            self._faults.append(str(error))
            return (path,), None
        self._used.update(names.values())
        self._used.update(f"{path}{group.codec.joiner}{s}" for s in group.codec.accepted)
        codec = group.codec

        def read() -> _Weight:
            tensors = {suffix: self._checkpoint.read(name) for suffix, name in names.items()}
            format.storage_shape(shape)
            _check_groups(format, shape)
            parts = codec.decode(tensors, format, shape)
            activation = parts.pop("activation_scale", None)
            w = QArray(**_all_parts(parts), format=format, dtype=dtype)
            w.validate()
            if not self._plan.requantized:
                return _Weight(w, activation)
            dequantized = _dequantize(jax.tree.map(jnp.asarray, w))
            if spec.weights is None:
                return _Weight(np.asarray(dequantized), None)
            return _quantized(dequantized, spec, dtype)

        return tuple(names.values()), read

    def _set(self, module: Any, w: "_Weight") -> None:
        like = module.weight.get_value()
        module.weight.set_value(_place_weight(w.value, like))
        self._set_activation_scale(module, w.activation_scale)

    def _set_experts(self, module: ExpertLinear, reads: list[Callable[[], "_Weight"]]) -> None:
        """Experts go to the devices one by one, into a stack that is updated in place."""
        like = module.weight.get_value()
        scales: list[np.ndarray | None] = []

        def parts() -> Iterator[Callable[[], dict[str, np.ndarray]]]:
            for read in reads:
                w = read()
                scales.append(w.activation_scale)
                value = _reblocked(w.value, like)
                yield lambda value=value: _named_parts(value)

        if isinstance(like, QArray):
            built = _stack(parts(), _named_parts(like))
            module.weight.set_value(dataclasses.replace(like, **built))
        else:
            module.weight.set_value(_stack(parts(), {"": like})[""])
        known = [s for s in scales if s is not None]
        stacked = np.stack(known) if len(known) == len(scales) else None
        self._set_activation_scale(module, stacked)

    def _set_activation_scale(self, module: Any, scale: np.ndarray | None) -> None:
        variable = getattr(module, "activation_scale", None)
        if variable is None:
            return
        if scale is None:
            raise ValueError("a static activation format needs a stored input scale; found none")
        like = variable.get_value()
        variable.set_value(_place(np.broadcast_to(scale, like.shape), like))


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight on the host: an array, or a QArray of arrays; and its input's static scale."""

    value: Any
    activation_scale: np.ndarray | None


def _check_groups(format: QFormat, shape: tuple[int, ...]) -> None:
    bn, bk = format.block_shape
    if bn == 1 and bk > 1 and shape[-1] % bk:
        raise ValueError(f"groups of {bk} must divide K = {shape[-1]} (weight {list(shape)})")


def _all_parts(parts: Mapping[str, Any]) -> dict[str, Any]:
    names = ("qvalue", "scale", "zero_point", "minimum", "global_scale", "column_perm")
    return {name: parts.get(name) for name in names}


def _named_parts(value: Any) -> dict[str, Any]:
    """The parts of a QArray by name, or a plain array under the empty name."""
    if not isinstance(value, QArray):
        return {"": value}
    return {k: v for k, v in _all_parts(vars(value)).items() if v is not None}


@jax.jit
def _dequantize(w: QArray) -> Array:
    return w.dequantize(jnp.float32)


_quantize = jax.jit(quantize, static_argnums=1, static_argnames="dtype")


def _quantized(w: Any, spec: QuantSpec, dtype: str) -> _Weight:
    """The weight rounded to nearest, on one device, back on the host."""
    if spec.activations is not None and spec.activations.static:
        raise ValueError(
            "a recipe with static activation scales needs calibrated ones: use a dynamic recipe "
            "(FP8_DYNAMIC, FP8_BLOCK, ...) to quantize while loading"
        )
    assert spec.weights is not None
    q = _quantize(jnp.asarray(w), spec.weights, dtype=dtype)
    return _Weight(jax.tree.map(np.asarray, q), None)


def _reblocked(w: Any, like: Any) -> Any:
    """A host weight in the blocks of the parameter that it is for."""
    if not isinstance(w, QArray) or w.format.block_shape == like.format.block_shape:
        return w
    parts = {k: np.asarray(v) for k, v in _named_parts(w).items()}
    return reblock_parts(w, parts, like.format.block_shape, "weight")


def _place_weight(value: Any, like: Any) -> Any:
    """A host weight on the devices, in the parameter's blocks."""
    if not isinstance(like, QArray):
        return _place(value, like)
    w = _reblocked(value, like)
    placed = {}
    for name, part in _named_parts(w).items():
        target = getattr(like, name)
        if target is None:  # the columns' order, which only the checkpoint knows
            sharding: Any = like.qvalue.sharding
            if sharding is not None:
                sharding = NamedSharding(sharding.mesh, PartitionSpec())
            target = jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=sharding)
        placed[name] = _place(part, target)
    return dataclasses.replace(w, **placed, dtype=like.dtype)


def _place(value: np.ndarray, like: jax.ShapeDtypeStruct) -> Array:
    """A host array on the devices in the dtype and sharding of `like`; each device's slice is copied alone."""

    def cut(index: tuple[slice, ...] | Any) -> np.ndarray:
        # A copy: the source may be a mapped file, which a CPU device would keep pointing into.
        return np.array(value[index], dtype=like.dtype, order="C")

    if like.sharding is None:
        return jax.device_put(cut(...))
    return jax.make_array_from_callback(like.shape, like.sharding, cut)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Array, part: Array, index: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stack, part, index, 0)


def _stack(
    parts: Iterator[Callable[[], dict[str, np.ndarray]]], like: Mapping[str, Any]
) -> dict[str, Array]:
    """Stacks built on the devices from one expert at a time."""
    stacks = {name: jnp.zeros(s.shape, s.dtype, device=s.sharding) for name, s in like.items()}
    for i, read in enumerate(parts):
        for name, part in read().items():
            one = jax.ShapeDtypeStruct(
                part.shape, like[name].dtype, sharding=_unstacked(like[name])
            )
            stacks[name] = _put(stacks[name], _place(part, one), jnp.int32(i))
    return stacks


def _unstacked(like: Any) -> NamedSharding | None:
    """Where one expert of a stack lies."""
    if like.sharding is None:
        return None
    spec = tuple(like.sharding.spec)
    return NamedSharding(like.sharding.mesh, PartitionSpec(*spec[1:]))
