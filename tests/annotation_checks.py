"""The checker that jaxtyping's import hook puts on every function of the package."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def check_annotations(function: Callable) -> Callable:
    """Checks arguments and results, but not constructors: jax rebuilds pytrees with specs, shapes or None as leaves."""
    return function if function.__name__ == "__init__" else _beartype(function)
