"""Fake quantization inside Flax NNX's own layers, through the operations that they let one replace.

`nnx.Linear` and `nnx.LinearGeneral` call ``dot_general``, `nnx.Einsum` calls ``einsum_op``: these become modules
that quantize both operands along the axes that the product sums over. `nnx.Embed`'s table and parameters of one's
own (expert weights) are quantized where they are read: a module that reads like the parameter takes its place. (A
variable's own hook would also act where an optimizer reads parameters and gradients.)
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from qjax.nn import QuantizedParam
from qjax.ops import dot
from qjax.qarray import QArray
from qjax.qat._fake_quantizer import GridQuantizer, Step, Training
from qjax.recipe import QuantSpec


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of a weight mean what.

    Attributes:
        contract: Axes that the product sums over, in the order in which they form K.
        batch: Axes of which each index is a matrix of its own, such as experts.

    The others form N.
    """

    contract: tuple[int, ...]
    batch: tuple[int, ...] = ()

    def order(self, ndim: int) -> tuple[int, ...]:
        """Axes of the weight as batch, N, K.

        Raises:
            ValueError: If an axis does not exist or is named twice.
        """
        contract, batch = (tuple(a % ndim for a in axes) for axes in (self.contract, self.batch))
        rest = tuple(a for a in range(ndim) if a not in contract + batch)
        order = (*batch, *rest, *contract)
        if sorted(order) != list(range(ndim)) or not contract:
            raise ValueError(f"prepare: {self} does not fit a weight of {ndim} axes")
        return order

    def to_rows(self, w: Array) -> Array:
        """The weight as [*batch, N, K]."""
        order = self.order(w.ndim)
        w = jnp.transpose(w, order)
        b, c = len(self.batch), len(self.contract)
        lead, k = w.shape[:b], w.shape[w.ndim - c :]
        return w.reshape(*lead, -1, math.prod(k))

    def from_rows(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """The inverse, for a weight of this shape."""
        order = self.order(len(shape))
        w = rows.reshape([shape[a] for a in order])
        return jnp.transpose(w, [order.index(a) for a in range(len(shape))])


class StandIn(nnx.Module):
    """Stands where a layer had its parameter, and reads like one."""

    def get_value(self) -> Array:
        """The weight in the layer's own shape."""
        raise NotImplementedError

    def __getitem__(self, index) -> Array:
        return self.get_value()[index]

    def __jax_array__(self) -> Array:
        return self.get_value()

    @property
    def value(self) -> Array:
        """`get_value()`, as `nnx.Variable` has it."""
        return self.get_value()


class FakeQuantWeight(StandIn):
    """A parameter that reads as what quantization keeps of it."""

    def __init__(self, weight: nnx.Variable, axes: Axes, quantizer: GridQuantizer):
        """Takes the parameter."""
        self.weight, self.axes, self.quantizer = weight, axes, quantizer

    def get_value(self) -> Array:
        """The weight as the forward pass uses it at this step."""
        w = self.weight.get_value()
        return self.axes.from_rows(self.quantizer.weight(self.axes.to_rows(w)), w.shape)


class QuantizedWeight(StandIn):
    """A quantized array that reads as its dequantized values."""

    def __init__(self, w: QArray, axes: Axes, shape: tuple[int, ...]):
        """Takes the array [*batch, N, K] of a weight of this shape."""
        self.array = QuantizedParam(w)
        self.axes, self.shape = axes, shape

    def get_value(self) -> Array:
        """The dequantized weight."""
        return self.axes.from_rows(self.array.get_value().dequantize(), self.shape)


class FakeQuantDotGeneral(nnx.Module):
    """`jax.lax.dot_general` on what quantization keeps of both operands."""

    def __init__(self, quantizer: GridQuantizer):
        """Takes the grids."""
        self.quantizer = quantizer

    def __call__(self, lhs, rhs, dimension_numbers, precision=None, **kwargs) -> Array:
        """The product; the right operand is the weight."""
        (lhs_contract, contract), (lhs_batch, batch) = dimension_numbers
        axes = Axes(tuple(contract), tuple(batch))
        rhs = axes.from_rows(self.quantizer.weight(axes.to_rows(rhs)), rhs.shape)
        lhs = _quantized_input(self.quantizer, lhs, tuple(lhs_contract), tuple(lhs_batch))
        return lax.dot_general(lhs, rhs, dimension_numbers, precision=precision, **kwargs)


class FakeQuantEinsum(nnx.Module):
    """`jnp.einsum` on what quantization keeps of both operands."""

    def __init__(self, quantizer: GridQuantizer):
        """Takes the grids."""
        self.quantizer = quantizer

    def __call__(self, equation: str, lhs, rhs, **kwargs) -> Array:
        """The product; the second operand is the weight."""
        axes, lhs_contract, lhs_batch = einsum_axes(equation, lhs.ndim, rhs.ndim)
        rhs = axes.from_rows(self.quantizer.weight(axes.to_rows(rhs)), rhs.shape)
        lhs = _quantized_input(self.quantizer, lhs, lhs_contract, lhs_batch)
        return jnp.einsum(equation, lhs, rhs, **kwargs)


class QuantizedDotGeneral(nnx.Module):
    """A layer's product after training: `qjax.dot` where it is one, else on dequantized values."""

    def __init__(self, weight: QuantizedWeight | None, quantizer: GridQuantizer):
        """Takes the weight, None for one that is not quantized, and the input's format."""
        self.weight = nnx.data(weight)
        self.activations = quantizer.activations
        self.inputs = GridQuantizer(None, quantizer.activations, Training(), None)

    def __call__(self, lhs, rhs, dimension_numbers, precision=None, **kwargs) -> Array:
        """The product; the right operand is the dequantized weight, unread where `qjax.dot` does it."""
        (lhs_contract, contract), (lhs_batch, batch) = dimension_numbers
        plain = tuple(lhs_contract) == (lhs.ndim - 1,) and tuple(contract) == (0,) and not batch
        if self.weight is not None and plain:
            w = self.weight.array.get_value()
            y = dot(lhs, w, activation_format=self.activations)
            return y.reshape(*lhs.shape[:-1], *self.weight.shape[1:])
        lhs = _quantized_input(self.inputs, lhs, tuple(lhs_contract), tuple(lhs_batch))
        return lax.dot_general(lhs, rhs, dimension_numbers, precision=precision, **kwargs)


class QuantizedEinsum(nnx.Module):
    """An `nnx.Einsum`'s product after training, on dequantized values."""

    def __init__(self, quantizer: GridQuantizer):
        """Takes the input's format."""
        self.inputs = GridQuantizer(None, quantizer.activations, Training(), None)

    def __call__(self, equation: str, lhs, rhs, **kwargs) -> Array:
        """The product."""
        _, lhs_contract, lhs_batch = einsum_axes(equation, lhs.ndim, rhs.ndim)
        lhs = _quantized_input(self.inputs, lhs, lhs_contract, lhs_batch)
        return jnp.einsum(equation, lhs, rhs, **kwargs)


def _quantized_input(quantizer: GridQuantizer, x, contract, batch) -> Array:
    """The values that quantization keeps of an input, one row of K for each of its other indices."""
    if quantizer.activations is None:
        return x
    axes = Axes(contract, batch)
    return axes.from_rows(quantizer.input(axes.to_rows(x)), x.shape)


def einsum_axes(
    equation: str, lhs_ndim: int, rhs_ndim: int
) -> tuple[Axes, tuple[int, ...], tuple[int, ...]]:
    """(axes of the second operand, summed axes of the first, shared axes of the first) of an equation.

    Raises:
        ValueError: If the equation is none of two operands and an output.
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        raise ValueError(
            f"prepare: an einsum of two operands and an output is needed; found {equation!r}"
        )
    lhs, rhs = (_letters(t, n) for t, n in zip(terms, (lhs_ndim, rhs_ndim), strict=True))
    shared = [letter for letter in rhs if letter in lhs]
    contract = [letter for letter in shared if letter not in out]
    batch = [letter for letter in shared if letter in out]
    axes = Axes(tuple(map(rhs.index, contract)), tuple(map(rhs.index, batch)))
    return axes, tuple(map(lhs.index, contract)), tuple(map(lhs.index, batch))


def _letters(term: str, ndim: int) -> list[str]:
    """One letter an axis; those of an ellipsis get names that match nothing."""
    before, dots, after = term.partition("...")
    if not dots:
        return list(term)
    hidden = ndim - len(before) - len(after)
    return [*before, *(f".{i}" for i in range(hidden)), *after]


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter of a Flax layer that can be quantized.

    Attributes:
        path: The layer's path, or the parameter's own where its axes were given.
        kind: Class word for rules: "Linear", "Embedding", or "Experts" for given axes with a batch.
        module: Who holds it.
        name: The attribute.
        axes: What its axes mean.
    """

    path: str
    kind: str
    module: nnx.Module
    name: str
    axes: Axes

    @property
    def variable(self) -> nnx.Variable:
        """The parameter."""
        held = getattr(self.module, self.name)
        return held.weight if isinstance(held, FakeQuantWeight) else held

    @property
    def columns(self) -> int:
        """K."""
        shape = self.variable.get_value().shape
        return math.prod(shape[a] for a in self.axes.contract)

    @property
    def read(self) -> bool:
        """Whether it is quantized where it is read, and not where it is multiplied."""
        return not isinstance(self.module, nnx.Linear | nnx.LinearGeneral | nnx.Einsum)

    @property
    def quantizer(self) -> GridQuantizer | None:
        """The grids that `prepare` gave it, None if it gave none."""
        held = getattr(self.module, self.name)
        if isinstance(held, FakeQuantWeight):
            return held.quantizer
        for name in ("dot_general", "einsum_op"):
            op = getattr(self.module, name, None)
            if isinstance(op, FakeQuantDotGeneral | FakeQuantEinsum):
                return op.quantizer
        return None

    @property
    def prepared(self) -> bool:
        """Whether `prepare` has been here."""
        return self.quantizer is not None


def quantizable(model: nnx.Module, axes: Mapping[str, Axes]) -> dict[str, Weight]:
    """{path: weight} of Flax's layers in a model, and of the parameters whose axes are given.

    Raises:
        ValueError: If a path of `axes` is no parameter.
    """
    found: dict[str, Weight] = {}
    for parts, module in nnx.iter_modules(model):
        path = ".".join(str(p) for p in parts)
        if isinstance(module, nnx.LinearGeneral):
            batch = tuple(range(len(module.batch_axis)))
            contract = tuple(len(batch) + i for i in range(_count(module.axis)))
            found[path] = Weight(path, "Linear", module, "kernel", Axes(contract, batch))
        elif isinstance(module, nnx.Linear):
            found[path] = Weight(path, "Linear", module, "kernel", Axes((0,)))
        elif isinstance(module, nnx.Einsum) and module.einsum_str is not None:
            ndim = len(module.kernel_shape)
            own, _, _ = einsum_axes(module.einsum_str, _ndim(module.einsum_str, ndim), ndim)
            found[path] = Weight(path, "Linear", module, "kernel", own)
        elif isinstance(module, nnx.Embed):
            found[path] = Weight(path, "Embedding", module, "embedding", Axes((1,)))
        for name, own in axes.items():
            parent, _, attribute = name.rpartition(".")
            held = getattr(module, attribute, None)
            if parent == path and isinstance(held, nnx.Variable | FakeQuantWeight):
                kind = "Experts" if own.batch else "Linear"
                found[name] = Weight(name, kind, module, attribute, own)
    missing = sorted(set(axes) - set(found))
    if missing:
        raise ValueError(
            f"prepare: axes are given for {missing}, which are no parameters of the model"
        )
    return found


def _count(axis: Any) -> int:
    return len(axis) if isinstance(axis, tuple | list) else 1


def _ndim(equation: str, rhs_ndim: int) -> int:
    """Axes of the first operand; an ellipsis stands for none, which changes no letter's meaning."""
    del rhs_ndim
    return len(equation.replace(" ", "").split(",")[0].replace("...", ""))


def prepare(weight: Weight, spec: QuantSpec, training: Training, step: Step | None) -> None:
    """Injects fake quantization into a layer.

    Raises:
        ValueError: If the layer cannot be trained in this way.
    """
    if spec.activations is not None and spec.activations.static:
        raise ValueError(f"prepare: {weight.path}: static activation scales need calibrated inputs")
    if weight.read and spec.activations is not None and weight.kind != "Embedding":
        raise ValueError(
            f"prepare: {weight.path} is quantized where it is read: its inputs can't be; use a recipe "
            "for weights only"
        )
    rows = weight.axes.to_rows(weight.variable.get_value())
    quantizer = GridQuantizer(spec.weights, spec.activations, training, step, rows)
    if weight.read:
        held = FakeQuantWeight(weight.variable, weight.axes, quantizer)
        setattr(weight.module, weight.name, nnx.data(held))
    elif isinstance(weight.module, nnx.Einsum):
        weight.module.einsum_op = nnx.data(FakeQuantEinsum(quantizer))
    else:
        setattr(weight.module, "dot_general", nnx.data(FakeQuantDotGeneral(quantizer)))  # noqa: B010


def convert(model: nnx.Module) -> int:
    """Replaces the weights of prepared layers by quantized ones; returns how many."""
    own = {
        ".".join(str(p) for p in path): module.axes
        for path, module in nnx.iter_modules(model)
        if isinstance(module, FakeQuantWeight)
    }
    layers = quantizable(model, {})
    tables = {f"{w.path}.{w.name}".lstrip(".") for w in layers.values()}
    given = {path: axes for path, axes in own.items() if path not in tables}
    count = 0
    for weight in quantizable(model, given).values():
        quantizer, module = weight.quantizer, weight.module
        if quantizer is None or quantizer.weights is None:
            if quantizer is not None:
                _use_inputs(module, None, quantizer)
                count += 1
            continue
        value = weight.variable.get_value()
        dtype = None if weight.read else getattr(module, "dtype", None)
        value = (
            value if dtype is None else value.astype(dtype)
        )  # the product's operand had the grid
        held = QuantizedWeight(
            quantizer.quantized(weight.axes.to_rows(value)), weight.axes, value.shape
        )
        setattr(module, weight.name, nnx.data(held))
        if not weight.read:
            _use_inputs(module, held, quantizer)
        count += 1
    return count


def _use_inputs(module: nnx.Module, held: QuantizedWeight | None, quantizer: GridQuantizer) -> None:
    """Gives a layer the product that it has after training."""
    if isinstance(module, nnx.Einsum):
        module.einsum_op = nnx.data(QuantizedEinsum(quantizer))
    else:
        setattr(module, "dot_general", nnx.data(QuantizedDotGeneral(held, quantizer)))  # noqa: B010
