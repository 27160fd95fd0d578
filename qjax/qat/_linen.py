"""Fake quantization of Flax Linen models, whose modules hold no parameters: by injection and by interception."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from flax import linen, traverse_util

from qjax.formats import QFormat
from qjax.qarray import QArray
from qjax.qat._fake_quantizer import GridQuantizer, Training
from qjax.qat._flax import Axes, FakeQuantDotGeneral
from qjax.quantization import quantize
from qjax.recipe import SCHEMES, QuantSpec, Recipe
from qjax.recipe import recipe as named_recipe


def dot_general_cls(spec: str | QuantSpec, *, clip: bool = False) -> Callable[[], Callable]:
    """What a Linen module takes as ``dot_general_cls``: products of fake-quantized inputs and weights.

    ``linen.Dense(64, dot_general_cls=qat.dot_general_cls("W4A8"))``

    Args:
        spec: A scheme of `qjax.recipe.SCHEMES` or its word.
        clip: Whether values beyond the grid get no gradient.
    """
    spec = SCHEMES[spec.upper()] if isinstance(spec, str) else spec
    return functools.partial(_dot_general, spec, Training(clip=clip))


def _dot_general(spec: QuantSpec, training: Training) -> Callable:
    return FakeQuantDotGeneral(GridQuantizer(spec.weights, spec.activations, training, None))


@contextmanager
def fake_quant_params(
    recipe: str | Recipe,
    *,
    clip: bool = False,
    axes: Mapping[str, Axes] | None = None,
) -> Iterator[None]:
    """Within it, Linen modules read the values that quantization keeps of the weights that a recipe names.

    Works with ``apply`` (also traced, and under `jax.grad`: gradients pass straight through to the stored
    parameters) for Dense, DenseGeneral and Embed modules, and for parameters whose `axes` are given. Paths are
    Linen's, joined by dots (``layers_0.attention.query``). It covers weights; `dot_general_cls` inputs too.

    Args:
        recipe: What is quantized how; its activation formats must be None.
        clip: Whether values beyond the grid get no gradient.
        axes: {path of a parameter: axes}, such as of expert weights.

    Raises:
        ValueError: On leaving, if a rule of the recipe met no weight; at once, if the recipe quantizes inputs.
    """
    recipe = named_recipe(recipe) if isinstance(recipe, str) else recipe
    if any(rule.spec.activations is not None for rule in recipe.rules):
        raise ValueError(
            "fake_quant_params: it covers weights; give modules dot_general_cls to quantize their inputs"
        )
    seen: dict[str, str] = {}
    given = dict(axes or {})

    def interceptor(call, args, kwargs, context):
        module = context.module
        if "param" in vars(module):
            return call(*args, **kwargs)
        path = ".".join(module.path)

        def param(name, *rest, **options):
            value = type(module).param(module, name, *rest, **options)
            found = _weight(module, path, name, value, given)
            if found is None or module.is_initializing():
                return value
            target, kind, own = found
            seen[target] = kind
            format = _format(recipe, target, kind)
            if format is None:
                return value
            quantizer = GridQuantizer(format, None, Training(clip=clip), None)
            return own.from_rows(quantizer.weight(own.to_rows(value)), value.shape)

        # Linen modules are frozen dataclasses whose methods look themselves up: an instance attribute hides
        # the method while this call lasts.
        object.__setattr__(module, "param", param)
        try:
            return call(*args, **kwargs)
        finally:
            object.__delattr__(module, "param")

    with linen.intercept_methods(interceptor):
        yield
    if seen:
        recipe.resolve(seen)


def _weight(module, path: str, name: str, value: Any, given: Mapping[str, Axes]):
    """(target, class word, axes) of a parameter that can be quantized, else None."""
    full = f"{path}.{name}".lstrip(".")
    if full in given:
        return full, "Experts" if given[full].batch else "Linear", given[full]
    if not isinstance(value, jax.Array):
        return None
    if isinstance(module, linen.Embed) and name == "embedding":
        return path, "Embedding", Axes((1,))
    if isinstance(module, linen.Dense) and name == "kernel":
        return path, "Linear", Axes((0,))
    if isinstance(module, linen.DenseGeneral) and name == "kernel":
        batch = len(module.batch_dims)
        summed = module.axis if isinstance(module.axis, tuple | list) else (module.axis,)
        own = Axes(tuple(batch + i for i in range(len(summed))), tuple(range(batch)))
        return path, "Linear", own
    return None


def _format(recipe: Recipe, path: str, kind: str) -> QFormat | None:
    rules = dataclasses.replace(recipe, optional=frozenset(_targets(recipe)))
    spec = rules.resolve({path: kind}).get(path)
    return None if spec is None else spec.weights


def _targets(recipe: Recipe) -> Iterator[str]:
    for rule in recipe.rules:
        yield from rule.targets
    yield from recipe.ignore


def quantize_params(
    params: Mapping[str, Any], formats: Mapping[str, tuple[QFormat, Axes]]
) -> dict[str, QArray]:
    """{path: array [*batch, N, K]} of a Linen model's trained parameters, on the grid that training used.

    Args:
        params: The "params" collection.
        formats: {parameter's path, joined by dots: (format, axes)}.

    Raises:
        ValueError: If a path is no parameter.
    """
    flat: Any = traverse_util.flatten_dict(params, sep=".")
    missing = sorted(set(formats) - set(flat))
    if missing:
        raise ValueError(
            f"quantize_params: {missing} are no parameters; there are {list(flat)[:5]}"
        )
    return {
        path: quantize(axes.to_rows(flat[path]), format) for path, (format, axes) in formats.items()
    }
