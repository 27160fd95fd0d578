"""Comparison of two models bit by bit."""

import jax
import numpy as np
from flax import nnx

from qjax.qarray import QArray


def variables(model: nnx.Module) -> dict:
    """{dotted name: value} of a model's whole state."""
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): v.get_value() for path, v in state}


def assert_same_bits(got: nnx.Module, want: nnx.Module) -> None:
    """The same variables, formats, dtypes and bits."""
    got, want = variables(got), variables(want)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert type(got[name]) is type(value) or not isinstance(value, QArray), name
        if isinstance(value, QArray):
            assert got[name].format == value.format, name
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(value), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape, name
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name
