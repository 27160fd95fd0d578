"""Frozen dataclasses (formats, recipes, model configurations) as JSON and back, led by their annotations."""

import dataclasses
import types
import typing
from typing import Any


def to_json(value: Any) -> Any:
    """A dataclass, tuple, mapping or scalar as plain JSON data."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if isinstance(value, typing.Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a checkpoint's description cannot hold {type(value).__name__}: {value!r}")


def from_json(annotation: Any, value: Any, where: str) -> Any:
    """The inverse of `to_json` for a value of this annotation.

    Args:
        annotation: A dataclass, a union, a tuple type or a scalar type.
        value: JSON data.
        where: What is being read, for the error.

    Raises:
        ValueError: If fields are missing or unknown.
    """
    if dataclasses.is_dataclass(annotation) and isinstance(value, dict):
        assert isinstance(annotation, type)
        hints = typing.get_type_hints(annotation)
        names = {f.name for f in dataclasses.fields(annotation)}
        if names != set(value):
            raise ValueError(
                f"{where}: {annotation.__name__} has the fields {sorted(names)}; found {sorted(value)}"
            )
        return annotation(**{k: from_json(hints[k], v, f"{where}.{k}") for k, v in value.items()})
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        wants = (dict, dataclasses.is_dataclass), (list, lambda a: typing.get_origin(a) is tuple)
        for kind, fits in wants:
            for arg in args:
                if isinstance(value, kind) and fits(arg):
                    return from_json(arg, value, where)
        return value
    if origin is tuple and isinstance(value, list):
        if len(args) == 2 and args[1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) != len(value):
            raise ValueError(f"{where}: {len(args)} entries expected; found {value!r}")
        return tuple(from_json(a, v, where) for a, v in zip(args, value, strict=True))
    return value
