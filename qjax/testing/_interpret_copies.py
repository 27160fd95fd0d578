"""``cp.async`` in interpret mode: what is copied arrives when the copying thread waits for it, and no earlier.

A function for ``inline_mgpu`` says by its ``interpret_async`` what it does: "copy" (its ``interpret_writes`` are the
copied tiles), "commit", or, as a number, a wait for all groups but the latest so many. Until that wait a tile holds
ones in all bits, which are a NaN, so a kernel that reads too early, or copies over what it still has to read, computes
something wrong.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks


@dataclasses.dataclass
class _Groups:
    """Copies of a thread that it has not waited for, by groups; the last is still open."""

    groups: list[list[functools.partial]] = dataclasses.field(default_factory=lambda: [[]])


_pending: dict[tuple[int, ...], _Groups] = {}


def forget_copies() -> int:
    """Drops what nothing waited for; the number of copies."""
    count = sum(len(group) for thread in _pending.values() for group in thread.groups)
    _pending.clear()
    return count


def copy(token, value: jax.Array, place: dict[str, Any]) -> jax.Array:
    """Starts a copy of the value to a place as `gpu_callbacks.call_swap` takes it."""
    return callback.io_callback(
        functools.partial(_copy, source_info=place["source_info"]),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=place["mesh_location"],
        thread=place["thread"],
        allocation_key_as_array=place["allocation_key_as_array"],
        transforms=place["transforms"],
        value=value,
    )


def commit_or_wait(token, kind: str | int, mesh_location, thread) -> jax.Array:
    """Closes the open group, or waits for all closed ones but the latest `kind`."""
    return callback.io_callback(
        _commit if kind == "commit" else functools.partial(_wait, latest=int(kind)),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=mesh_location,
        thread=thread,
    )


def _of(mesh_location, thread) -> _Groups:
    key = tuple(int(x) for x in jax.tree.leaves((mesh_location, thread)))
    return _pending.setdefault(key, _Groups())


@gpu_callbacks.fail_on_exception
def _copy(*, token, mesh_location, thread, allocation_key_as_array, transforms, value, source_info):
    value = np.asarray(value)
    write = functools.partial(
        gpu_callbacks._swap,
        mesh_location=mesh_location,
        thread=thread,
        allocation_key_as_array=allocation_key_as_array,
        transforms=transforms,
        mask=None,
        source_info=source_info,
    )
    write(token, val=np.full(value.nbytes, 0xFF, np.uint8).view(value.dtype).reshape(value.shape))
    _of(mesh_location, thread).groups[-1].append(functools.partial(write, val=value))
    return token


@gpu_callbacks.fail_on_exception
def _commit(*, token, mesh_location, thread):
    _of(mesh_location, thread).groups.append([])
    return token


@gpu_callbacks.fail_on_exception
def _wait(*, token, mesh_location, thread, latest: int):
    pending = _of(mesh_location, thread)
    finished = max(len(pending.groups) - 1 - latest, 0)
    for write in [write for group in pending.groups[:finished] for write in group]:
        write(token)
    pending.groups = pending.groups[finished:]
    return token
