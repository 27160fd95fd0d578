"""Sharding rules: logical axes to mesh axes, and how a QArray's parts follow its weight.

Weights are cut as Megatron-LM cuts them (arXiv:1909.08053): column parallel where a layer's outputs
are heads, ffn channels or vocabulary, row parallel where its inputs are.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qjax.formats import WHOLE, QFormat
from qjax.qarray import QArray

_log = logging.getLogger(__name__)

LOGICAL_AXES = ("batch", "heads", "kv_heads", "mlp", "vocab", "expert", "embed")
MESH_AXES = ("data", "expert", "tensor")

DEFAULT_RULES = (
    ("batch", "data"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("expert", "expert"),
    ("embed", None),
)
"""Tensor parallel heads, ffn channels and vocabulary; experts and batch on their own mesh axes."""


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh and the rules that map logical axes to its axes.

    Attributes:
        mesh: The devices, None for one device.
        rules: (logical axis, mesh axis or None) pairs; a mesh axis that the mesh lacks counts as None.

    Raises:
        ValueError: If a rule names an unknown logical axis.
    """

    mesh: Mesh | None = None
    rules: tuple[tuple[str, str | None], ...] = DEFAULT_RULES

    def __post_init__(self):
        unknown = sorted({name for name, _ in self.rules} - set(LOGICAL_AXES))
        if unknown:
            raise ValueError(f"Sharding: unknown logical axes {unknown}; use {LOGICAL_AXES}")

    def axis(self, logical: str | None, units: int) -> str | None:
        """The mesh axis of a logical axis of `units` indivisible units, None where it stays whole.

        An axis whose units the mesh axis does not divide is replicated, which is logged once.

        Raises:
            ValueError: If the logical axis is unknown.
        """
        if logical is None or self.mesh is None:
            return None
        if logical not in LOGICAL_AXES:
            raise ValueError(f"Sharding: unknown logical axis {logical!r}; use {LOGICAL_AXES}")
        mesh_axis = dict(self.rules).get(logical)
        if mesh_axis is None or self.mesh.shape.get(mesh_axis, 1) == 1:
            return None
        size = self.mesh.shape[mesh_axis]
        if units % size:
            _log_replicated(logical, units, mesh_axis, size)
            return None
        return mesh_axis

    def size(self, mesh_axis: str | None) -> int:
        """Devices along a mesh axis; 1 for None."""
        return 1 if mesh_axis is None or self.mesh is None else self.mesh.shape.get(mesh_axis, 1)

    def named(self, *axes: str | None) -> NamedSharding | None:
        """The `NamedSharding` of these mesh axes, None without a mesh.

        Raises:
            ValueError: If one mesh axis occurs twice.
        """
        if self.mesh is None:
            return None
        used = [a for a in axes if a is not None]
        if len(used) != len(set(used)):
            raise ValueError(f"Sharding: a mesh axis occurs twice in {axes}")
        return NamedSharding(self.mesh, PartitionSpec(*axes))


@functools.cache
def _log_replicated(logical: str, units: int, mesh_axis: str, size: int) -> None:
    _log.info(
        "%s (%d) is not divisible by the mesh's %s=%d: replicated", logical, units, mesh_axis, size
    )


def make_mesh(text: str, *, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a text such as ``tensor=4,data=2``.

    Raises:
        ValueError: If the text is malformed, names an unknown axis or asks for more devices than there are.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    for item in text.split(","):
        name, _, size = item.strip().partition("=")
        if name not in sizes or not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"mesh {text!r}: {item!r} must be AXIS=SIZE with AXIS one of {MESH_AXES} and SIZE > 0"
            )
        sizes[name] = int(size)
    devices = jax.devices() if devices is None else devices
    count = math.prod(sizes.values())
    if count > len(devices):
        raise ValueError(f"mesh {text!r} needs {count} devices; there are {len(devices)}")
    grid = np.array(devices[:count]).reshape(tuple(sizes.values()))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def sharded_format(
    format: QFormat, shape: tuple[int, ...], shards: tuple[int, int], path: str = "weight"
) -> QFormat:
    """The format whose blocks no shard cuts: blocks shrink to a common divisor, which loses nothing.

    Args:
        format: The weight's format.
        shape: Its logical shape [..., N, K].
        shards: Number of shards along N and K.
        path: The module's name, for the error.

    Raises:
        ValueError: If a shard's columns do not fill whole bytes.
    """
    block = list(format.block_shape)
    for i, (size, count) in enumerate(zip(shape[-2:], shards, strict=True)):
        if count > 1 and block[i] != WHOLE:
            block[i] = math.gcd(block[i], size // count)
    if (shape[-1] // shards[1]) % format.k_multiple:
        raise ValueError(
            f"{path}: a shard of {shape[-1] // shards[1]} columns of {format.element} does not fill "
            f"whole bytes; cut K = {shape[-1]} into fewer than {shards[1]} shards"
        )
    return dataclasses.replace(format, block_shape=tuple(block))


def part_specs(format: QFormat, spec: PartitionSpec) -> Mapping[str, PartitionSpec]:
    """The specs of a QArray's parts when its weight [..., N, K] has this one.

    Args:
        format: The format, whose blocks no shard cuts (`sharded_format`).
        spec: One entry per logical axis.

    Returns:
        {part name of `QArray`: spec}.
    """
    *lead, n, k = spec
    bn, bk = format.block_shape
    # Ordered storage has blocks of rows and columns in their place, and axes within a block.
    ordered = format.ordered
    scale_within, within = ((None,), (None, None)) if ordered else ((), ())
    rows = n if ordered or bn != WHOLE else None  # ordered scales are those of all rows
    scale = PartitionSpec(*lead, rows, None if bk == WHOLE else k, *scale_within)
    return {
        "qvalue": PartitionSpec(*lead, n, k, *within),
        "scale": scale,
        "zero_point": scale,
        "minimum": scale,
        "global_scale": PartitionSpec(*lead, None, None),
        "column_perm": PartitionSpec(None),
    }


def array_specs(w: QArray | jax.Array, spec: PartitionSpec):
    """`spec` for a plain array; for a QArray, a QArray with a spec in place of each part."""
    if not isinstance(w, QArray):
        return spec
    specs = part_specs(w.format, spec)
    parts = {name: None if getattr(w, name) is None else specs[name] for name in specs}
    return dataclasses.replace(w, **parts)
