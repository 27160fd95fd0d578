"""Kernel times on a GPU, from CUPTI, with inputs that are not in the L2 cache."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

L2_BYTES = 60 * 2**20
"""L2 cache of an H100 or H200, in bytes."""


def rotate_inputs(args: Sequence[Any], *, cache_bytes: int = L2_BYTES) -> list[tuple[Any, ...]]:
    """Copies of the inputs in separate memory, together three times larger than the cache.

    A call that takes the copies in turn finds its inputs in device memory, as a layer of a model does.

    Args:
        args: A call's arrays, or trees of them.
        cache_bytes: The cache's size.
    """
    size = max(sum(a.nbytes for a in jax.tree.leaves(args)), 1)
    copies = min(max(2, -(-3 * cache_bytes // size)), 512)
    return [tuple(args), *(jax.tree.map(jnp.copy, tuple(args)) for _ in range(copies - 1))]


def measure_kernel_us(
    fn: Callable, input_sets: Sequence[Sequence[Any]], *, calls: int = 30
) -> float:
    """Median over calls of the sum of a call's kernel times, in microseconds.

    Launch gaps between kernels do not count; input sets are taken in turn.

    Args:
        fn: A function of arrays, jitted here if it is not yet.
        input_sets: Arguments of each call, as from `rotate_inputs`.
        calls: Number of measured calls.

    Raises:
        RuntimeError: Without a GPU, or if CUPTI does not see the same kernels in each call.
    """
    if jax.default_backend() != "gpu":
        raise RuntimeError(
            f"measure_kernel_us: kernel times need an NVIDIA GPU; found {jax.default_backend()}"
        )
    from jax._src.lib import mosaic_gpu as mosaic_gpu_lib  # only in the CUDA plugin

    fn = fn if hasattr(fn, "lower") else jax.jit(fn)
    for inputs in input_sets[:2]:
        jax.block_until_ready(fn(*inputs))
    cupti = mosaic_gpu_lib._mosaic_gpu_ext
    cupti._cupti_init()
    try:
        outputs = [fn(*input_sets[i % len(input_sets)]) for i in range(calls)]
        jax.block_until_ready(outputs)
    finally:
        timings = cupti._cupti_get_timings(True)
    return 1e3 * statistics.median(sum_calls([ms for _, ms in timings], calls))


def sum_calls(times: Sequence[float], calls: int) -> list[float]:
    """Sums of the kernel times of each call, which launch the same number of kernels.

    Raises:
        RuntimeError: If the number of kernels is no multiple of the number of calls.
    """
    if not times or len(times) % calls:
        raise RuntimeError(
            f"measure_kernel_us: {calls} calls should launch equally many kernels each; CUPTI saw {len(times)}"
        )
    per_call = len(times) // calls
    return [sum(times[i * per_call : (i + 1) * per_call]) for i in range(calls)]
