"""Training state for Orbax: any pytree as {key path: array}, and back into its template."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from qjax.checkpoint._static import to_json
from qjax.qarray import QArray


def flatten(tree: Any) -> dict[str, Any]:
    """{key path: array} of a tree's leaves; PRNG keys become their words.

    Raises:
        ValueError: If a leaf is no array and no number.
    """
    arrays = {}
    for key, leaf in _leaves(tree):
        if _is_key(leaf):
            leaf = jax.random.key_data(leaf)
        elif isinstance(leaf, bool | int | float):
            leaf = np.asarray(leaf)
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise ValueError(
                f"save: extra{key} is a {type(leaf).__name__}; only arrays and numbers can be saved"
            )
        arrays[key] = np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
    return arrays


def formats(tree: Any) -> dict[str, Any]:
    """{key path: format} of the `QArray`s of a tree: what its arrays do not say themselves."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_qarray)[0]
    return {
        jax.tree_util.keystr(path): {"format": to_json(leaf.format), "dtype": leaf.dtype}
        for path, leaf in leaves
        if _is_qarray(leaf)
    }


def check(directory: Path, saved: dict, saved_formats: dict, template: Any) -> None:
    """Compares a template with what was saved.

    Raises:
        ValueError: Naming the leaves that are missing, left over, or of another shape, dtype or format.
    """
    wanted = dict(_leaves(template))
    missing, unused = sorted(set(wanted) - set(saved)), sorted(set(saved) - set(wanted))
    if missing or unused:
        raise ValueError(
            f"restore: {directory}: extra lacks {missing[:5]} and has {unused[:5]} beyond the template "
            f"({len(missing)} and {len(unused)} leaves); pass the structure that was saved"
        )
    for key, leaf in wanted.items():
        if _is_key(leaf) or isinstance(leaf, bool | int | float):
            continue
        found = saved[key]
        if list(leaf.shape) != found["shape"] or leaf.dtype != jnp.dtype(found["dtype"]):
            raise ValueError(
                f"restore: {directory}: extra{key} is {found['dtype']}{found['shape']}; the template has "
                f"{leaf.dtype}{list(leaf.shape)}"
            )
    for key, form in formats(template).items():
        if saved_formats.get(key) != form:
            raise ValueError(
                f"restore: {directory}: extra{key} was saved as {saved_formats.get(key)}; the template "
                f"has {form}"
            )


def restore_args(keys: list[str], template: Any) -> dict[str, ocp.RestoreArgs]:
    """How to read each leaf: onto the template's devices, to the host where it names none."""
    leaves = dict(_leaves(template))

    def arguments(key: str) -> ocp.RestoreArgs:
        sharding = getattr(leaves.get(key), "sharding", None)
        if isinstance(sharding, NamedSharding) and not _is_key(leaves[key]):
            return ocp.ArrayRestoreArgs(sharding=sharding)
        return ocp.RestoreArgs(restore_type=np.ndarray)

    return {key: arguments(key) for key in keys}


def unflatten(arrays: dict[str, Any], template: Any) -> Any:
    """The template's tree with restored leaves, each of the template leaf's kind."""

    def leaf(path: tuple, like: Any) -> Any:
        value = arrays[jax.tree_util.keystr(path)]
        if _is_key(like):
            return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(like))
        if isinstance(like, bool | int | float):
            return type(like)(value)
        if isinstance(like, np.ndarray | np.generic):
            return type(like)(value) if isinstance(like, np.generic) else value
        # Without a sharding of its own a leaf stays uncommitted, as freshly made arrays are.
        return value if isinstance(value, jax.Array) else jnp.asarray(value)

    return jax.tree_util.tree_map_with_path(leaf, template)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _is_qarray(x: Any) -> bool:
    return isinstance(x, QArray)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
