"""Lowering of kernels for an NVIDIA GPU on any machine."""

from collections.abc import Callable

import jax


def lower_for_gpu(fn: Callable, *args: jax.Array | jax.ShapeDtypeStruct) -> str:
    """The StableHLO text of fn compiled for CUDA, its Mosaic GPU kernels lowered.

    On a machine without a GPU the target is sm_90. This catches layouts that cannot be inferred, unsupported
    types, tile shapes and transforms, and too much shared memory; `ptxas_reports` catches the rest.

    Args:
        fn: A function of arrays; static arguments are bound beforehand.
        args: Arrays or shape structs.
    """
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
