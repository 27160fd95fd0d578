"""Orbax checkpoints of quantized models and training state, restored onto any mesh.

A `QArray` is stored part by part; its static format goes into a description beside the arrays. Orbax
writes to a temporary folder and renames it, so that a checkpoint is whole or absent.
"""

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from qjax.checkpoint._blocks import BLOCK_PARTS, reblock_parts
from qjax.checkpoint._declared import declared_spec
from qjax.checkpoint._orbax_tree import check, flatten, formats, restore_args, unflatten
from qjax.checkpoint._static import from_json, to_json
from qjax.formats import QFormat
from qjax.nn import ExpertLinear, modules
from qjax.qarray import QArray, to_packed
from qjax.recipe import QuantSpec
from qjax.registry import MODEL_MODULES
from qjax.sharding import Sharding

_VERSION = 1
_PARTS = ("qvalue", "scale", "zero_point", "minimum", "global_scale", "column_perm")


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
        model: The model, on the mesh that was asked for.
        extra: The rest in its template's structure; without a template {key path: array}.
    """

    model: nnx.Module
    extra: Any


def save(
    directory: str | os.PathLike,
    model: nnx.Module,
    extra: Any = None,
    *,
    overwrite: bool = False,
) -> None:
    """Saves a model and any pytree beside it (optimizer state, step, PRNG keys).

    Args:
        directory: The checkpoint's folder.
        model: A loaded model; sharded arrays are written shard by shard.
        extra: A pytree of arrays and numbers; `QArray`s in it are stored part by part.
        overwrite: Whether to replace an existing checkpoint.

    Raises:
        ValueError: If the folder exists, a parameter is not loaded yet, or a leaf is no array.
    """
    directory = Path(directory).absolute()
    if directory.exists() and not overwrite:
        raise ValueError(f"save: {directory} exists; choose another folder or pass overwrite=True")
    arrays, described = {}, {}
    for name, variable in _variables(model):
        arrays[name], described[name] = _describe(name, _packed(variable.get_value()))
    extra_arrays = flatten(extra)
    description = {
        "version": _VERSION,
        "model": _describe_model(model),
        "parameters": described,
        "extra": {key: _array_json(value) for key, value in extra_arrays.items()},
        "extra_formats": formats(extra),
    }
    items = {"description": ocp.args.JsonSave(description), "model": ocp.args.PyTreeSave(arrays)}
    if extra_arrays:
        items["extra"] = ocp.args.PyTreeSave(extra_arrays)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory, args=ocp.args.Composite(**items), force=overwrite)


def restore(
    directory: str | os.PathLike,
    *,
    model: nnx.Module | None = None,
    sharding: Sharding | None = None,
    extra: Any = None,
) -> Restored:
    """Restores what `save` wrote, each device reading only its part.

    Blocks that one mesh refined are merged, and refined for the other mesh where it needs that; values
    and codes stay as they were.

    Args:
        directory: The checkpoint's folder.
        model: Fill this model (abstract or not) instead of building the saved one.
        sharding: Mesh and rules of the model that is built; default one device.
        extra: Template of the saved extra tree: arrays, `jax.ShapeDtypeStruct`s or numbers; leaves with
            a sharding are restored to it.

    Raises:
        ValueError: If the folder is no checkpoint of `save`, or holds another model or tree.
    """
    directory = Path(directory).absolute()
    if not (directory / "description").is_dir():
        raise ValueError(f"restore: {directory} is no checkpoint that qjax.checkpoint.save wrote")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        description = checkpointer.restore(
            directory, args=ocp.args.Composite(description=ocp.args.JsonRestore())
        ).description
        if description.get("version") != _VERSION:
            raise ValueError(
                f"restore: {directory} has layout version {description.get('version')!r}; "
                f"this release reads version {_VERSION}"
            )
        if model is None:
            model = _build_model(directory, description["model"], sharding)
        elif sharding is not None:
            raise ValueError("restore: a given model has its own sharding; pass one of the two")
        _restore_model(checkpointer, directory, model, description["parameters"])
        if not description["extra"] and extra is None:
            return Restored(model, None)
        if extra is not None:
            check(directory, description["extra"], description["extra_formats"], extra)
        args = restore_args(list(description["extra"]), extra)
        arrays = checkpointer.restore(
            directory, args=ocp.args.Composite(extra=ocp.args.PyTreeRestore(restore_args=args))
        ).extra
        return Restored(model, arrays if extra is None else unflatten(arrays, extra))


def _variables(model: nnx.Module) -> list[tuple[str, nnx.Variable]]:
    """(dotted name, variable) of a model's whole state."""
    flat = nnx.to_flat_state(nnx.state(model))
    return [(".".join(str(p) for p in path), variable) for path, variable in flat]


def _describe(name: str, value: Any) -> tuple[Any, dict]:
    """The arrays to save of one variable, and what else it takes to rebuild it."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value)):
        raise ValueError(f"save: {name} is not loaded: fill the model before saving it")
    if not isinstance(value, QArray):
        return value, _array_json(value)
    parts = {part: getattr(value, part) for part in _PARTS if getattr(value, part) is not None}
    return parts, {
        "format": to_json(value.format),
        "dtype": value.dtype,
        "parts": {part: _array_json(array) for part, array in parts.items()},
    }


def _array_json(x: Any) -> dict:
    return {"shape": list(x.shape), "dtype": x.dtype.name}


def _describe_model(model: nnx.Module) -> dict | None:
    """How to build the model again, None for classes outside the registry."""
    module = type(model).__module__
    config = getattr(model, "config", None)
    if module not in MODEL_MODULES.values() or not dataclasses.is_dataclass(config):
        return None
    specs: dict[QuantSpec, list[str]] = {}
    for path, layer in modules(model):
        spec = declared_spec(layer)
        if spec is not None and spec != QuantSpec():
            names = layer.checkpoint_paths(path) if isinstance(layer, ExpertLinear) else [path]
            specs.setdefault(spec, []).extend(names)
    return {
        "module": module,
        "config": to_json(config),
        "dtype": model.dtype,  # type: ignore[attr-defined]
        "specs": [{"spec": to_json(spec), "paths": paths} for spec, paths in specs.items()],
    }


def _build_model(directory: Path, saved: dict | None, sharding: Sharding | None) -> nnx.Module:
    if saved is None:
        raise ValueError(
            f"restore: {directory} holds a model of a class that qjax does not know; pass model="
        )
    if saved["module"] not in MODEL_MODULES.values():
        raise ValueError(
            f"restore: {directory}: {saved['module']!r} is not a model of this release"
        )
    family = importlib.import_module(saved["module"])
    specs = {
        path: spec
        for group in saved["specs"]
        for spec in [from_json(QuantSpec, group["spec"], f"{directory}: specs")]
        for path in group["paths"]
    }
    config = from_json(family.Config, saved["config"], f"{directory}: config")
    return family.Model(config, specs=specs, dtype=saved["dtype"], sharding=sharding or Sharding())


def _restore_model(
    checkpointer: ocp.Checkpointer, directory: Path, model: nnx.Module, saved: dict
) -> None:
    """Fills a model's variables in place."""
    state = nnx.state(model)
    targets = {
        ".".join(str(p) for p in path): variable for path, variable in nnx.to_flat_state(state)
    }
    for variable in targets.values():
        variable.set_value(_packed(variable.get_value()))
    missing, unused = sorted(set(targets) - set(saved)), sorted(set(saved) - set(targets))
    if missing or unused:
        raise ValueError(
            f"restore: {directory} lacks {missing[:5]} and has {unused[:5]} beyond this model "
            f"({len(missing)} and {len(unused)} parameters): it holds another model"
        )
    default = _default_sharding(model)
    args = {
        name: _restore_args(directory, name, v, saved[name], default) for name, v in targets.items()
    }
    arrays = checkpointer.restore(
        directory, args=ocp.args.Composite(model=ocp.args.PyTreeRestore(restore_args=args))
    ).model
    for name, variable in targets.items():
        value = arrays.pop(name)
        if "format" in saved[name]:
            value = _rebuild(name, value, saved[name], variable.get_value(), default)
        variable.set_value(value)
    nnx.update(model, state)


def _packed(value: Any) -> Any:
    """A value as checkpoints hold it: kernels' layouts are made anew after restoring (`qjax.nn.prepack`)."""
    return to_packed(value) if isinstance(value, QArray) else value


def _restore_args(
    directory: Path, name: str, variable: nnx.Variable, saved: dict, default: jax.sharding.Sharding
) -> Any:
    """How to read one variable: onto its devices, or to the host where blocks have to change."""
    target = variable.get_value()
    if isinstance(target, QArray) != ("format" in saved):
        kinds = ("plain", "quantized")
        raise ValueError(
            f"restore: {directory}: {name} is {kinds['format' in saved]} there and "
            f"{kinds[isinstance(target, QArray)]} in this model; build the model with the same recipe"
        )
    if not isinstance(target, QArray):
        _expect(directory, name, target, saved)
        return ocp.ArrayRestoreArgs(sharding=_sharding(target, default))
    format = from_json(QFormat, saved["format"], f"{directory}: {name}")
    if dataclasses.replace(format, block_shape=target.format.block_shape) != target.format:
        raise ValueError(
            f"restore: {directory}: {name} is stored as {format}; this model has {target.format}"
        )
    args = {}
    for part in saved["parts"]:
        like = getattr(target, part)
        host = part in BLOCK_PARTS and format != target.format
        sharding = default if like is None else _sharding(like, default)
        args[part] = (
            ocp.RestoreArgs(restore_type=np.ndarray)
            if host
            else ocp.ArrayRestoreArgs(sharding=sharding)
        )
        if like is not None and not host:
            _expect(directory, f"{name}.{part}", like, saved["parts"][part])
    return args


def _rebuild(
    name: str, parts: dict, saved: dict, target: QArray, default: jax.sharding.Sharding
) -> QArray:
    """The QArray of restored parts in the target's blocks, on its devices."""
    format = from_json(QFormat, saved["format"], name)
    none = dict.fromkeys(_PARTS)
    w = QArray(**{**none, **parts}, format=format, dtype=saved["dtype"])
    if format != target.format:
        host = {part: w for part, w in parts.items() if part in BLOCK_PARTS}
        w = reblock_parts(w, host, target.format.block_shape, name)
        for part in host:
            like = getattr(target, part)
            placed = jax.device_put(getattr(w, part), _sharding(like, default))
            w = dataclasses.replace(w, **{part: placed})
    w.validate()
    return w


def _expect(directory: Path, name: str, target: Any, saved: dict) -> None:
    if list(target.shape) != saved["shape"] or target.dtype != jnp.dtype(saved["dtype"]):
        raise ValueError(
            f"restore: {directory}: {name} is {saved['dtype']}{saved['shape']} there and "
            f"{target.dtype}{list(target.shape)} in this model"
        )


def _default_sharding(model: nnx.Module) -> jax.sharding.Sharding:
    """Where parameters without a sharding of their own go: every device of the model's mesh, or one."""
    sharding = getattr(model, "sharding", None)
    if sharding is not None and sharding.mesh is not None:
        return NamedSharding(sharding.mesh, PartitionSpec())
    return SingleDeviceSharding(jax.config.jax_default_device or jax.local_devices()[0])


def _sharding(leaf: Any, default: jax.sharding.Sharding) -> jax.sharding.Sharding:
    own = getattr(leaf, "sharding", None)
    return own if isinstance(own, NamedSharding) else default
