"""Scales on other blocks: merging what a mesh refined, or refining for another mesh, without loss."""

import dataclasses

import numpy as np

from qjax.qarray import QArray

BLOCK_PARTS = ("scale", "zero_point", "minimum")
"""The parts of a `QArray` that hold one value per block."""


def reblock(
    part: np.ndarray,
    shape: tuple[int, ...],
    old: tuple[int, int],
    new: tuple[int, int],
    path: str,
) -> np.ndarray:
    """The values of one part on other blocks.

    Args:
        part: [..., ceil(N/old_n), ceil(K/old_k)].
        shape: Logical shape [..., N, K].
        old: Sizes of the part's blocks, no `WHOLE`.
        new: Sizes of the blocks asked for.
        path: The weight's name, for the error.

    Raises:
        ValueError: If a new block would cover old ones of unequal values.
    """
    for axis in (-2, -1):
        size, before, after = shape[axis], old[axis], new[axis]
        first = np.arange(0, size, after) // before
        # Within a run between two block edges, of either kind, both blocks are constant.
        runs = np.union1d(np.arange(0, size, before), np.arange(0, size, after))
        merged = np.take(part, first, axis=axis)
        if not _same_bits(
            np.take(part, runs // before, axis=axis), np.take(merged, runs // after, axis=axis)
        ):
            raise ValueError(
                f"{path}: blocks of {before} along axis {axis} have unequal scales and cannot merge "
                f"into blocks of {after}; keep the smaller blocks or requantize"
            )
        part = merged
    return part


def reblock_parts(
    w: QArray, parts: dict[str, np.ndarray], block_shape: tuple[int, int], path: str
) -> QArray:
    """The QArray of host parts, its blocks brought to `block_shape` (entries may be `WHOLE`).

    Args:
        w: A QArray whose format and dtype hold for the parts (its own parts may be abstract).
        parts: {name: host array} of every part that is present.
        block_shape: The blocks asked for.
        path: The weight's name, for the error.

    Raises:
        ValueError: As `reblock` does.
    """
    host = dataclasses.replace(w, **parts)
    format = dataclasses.replace(w.format, block_shape=tuple(block_shape))
    old, new = w.format.block_size(host.shape), format.block_size(host.shape)
    if old == new:
        return dataclasses.replace(host, format=format)
    for name in BLOCK_PARTS:
        part = getattr(host, name)
        if part is not None:
            host = dataclasses.replace(host, **{name: reblock(part, host.shape, old, new, path)})
    return dataclasses.replace(host, format=format)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equality that holds for NaN scales too."""
    return a.tobytes() == b.tobytes()
