"""Fake quantization inside Flax NNX's own layers, through the operations that they let one replace.

`nnx.Linear` and `nnx.LinearGeneral` call ``dot_general``, `nnx.Einsum` calls ``einsum_op``: these become modules
that quantize both operands along the axes that the product sums over. `nnx.Embed` and parameters of one's own
(expert weights) are quantized where they are read, by a hook on the variable.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
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
        return w.reshape(*lead, -1, _size(k))

    def from_rows(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """The inverse, for a weight of this shape."""
        order = self.order(len(shape))
        w = rows.reshape([shape[a] for a in order])
        return jnp.transpose(w, [order.index(a) for a in range(len(shape))])


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


class QuantizedWeight(nnx.Module):
    """Stands where a Flax layer had its parameter: read like one, it gives the dequantized values."""

    def __init__(self, w: QArray, axes: Axes, shape: tuple[int, ...]):
        """Takes the array [*batch, N, K] of a weight of this shape."""
        self.array = QuantizedParam(w)
        self.axes, self.shape = axes, shape

    def get_value(self) -> Array:
        """The weight in the layer's own shape."""
        return self.axes.from_rows(self.array.get_value().dequantize(), self.shape)

    def __getitem__(self, index) -> Array:
        return self.get_value()[index]

    @property
    def value(self) -> Array:
        """`get_value()`, as `nnx.Variable` has it."""
        return self.get_value()


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

    def __init__(self, weight: QuantizedWeight, quantizer: GridQuantizer):
        """Takes the weight and the input's format."""
        self.weight, self.activations = weight, quantizer.activations
        self.inputs = GridQuantizer(None, quantizer.activations, Training(), None)

    def __call__(self, lhs, rhs, dimension_numbers, precision=None, **kwargs) -> Array:
        """The product; the right operand is the dequantized weight, unread where `qjax.dot` does it."""
        (lhs_contract, contract), (lhs_batch, batch) = dimension_numbers
        if tuple(lhs_contract) == (lhs.ndim - 1,) and tuple(contract) == (0,) and not batch:
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
    rows = axes.to_rows(x) if x.ndim > len(contract) else x.reshape(1, -1)
    return (
        axes.from_rows(quantizer.input(rows), x.shape)
        if x.ndim > len(contract)
        else (quantizer.input(rows).reshape(x.shape))
    )


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
        return getattr(self.module, self.name)

    @property
    def hooked(self) -> bool:
        """Whether it is quantized where it is read."""
        return not isinstance(self.module, nnx.Linear | nnx.LinearGeneral | nnx.Einsum)

    @property
    def prepared(self) -> bool:
        """Whether `prepare` has been here."""
        return _quantizer(self) is not None


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
            if parent == path and isinstance(getattr(module, attribute, None), nnx.Variable):
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
    if weight.hooked and spec.activations is not None and weight.kind != "Embedding":
        raise ValueError(
            f"prepare: {weight.path} is quantized where it is read: its inputs can't be; use a recipe "
            "for weights only"
        )
    rows = weight.axes.to_rows(weight.variable.get_value())
    quantizer = GridQuantizer(spec.weights, spec.activations, training, step, rows)
    if weight.hooked:
        if step is not None or quantizer.scale is not None or quantizer.rounding is not None:
            raise ValueError(
                f"prepare: {weight.path} is quantized where it is read: neither schedules nor learned "
                "parameters reach it"
            )
        hook = _Hook(spec, training, weight.axes)
        weight.variable.set_metadata(on_get_value=(hook,))
    elif isinstance(weight.module, nnx.Einsum):
        weight.module.einsum_op = nnx.data(FakeQuantEinsum(quantizer))
    else:
        weight.module.dot_general = nnx.data(FakeQuantDotGeneral(quantizer))


@dataclasses.dataclass(frozen=True)
class _Hook:
    """Fake quantization where a variable is read."""

    spec: QuantSpec
    training: Training
    axes: Axes

    def quantizer(self) -> GridQuantizer:
        """The grids, of which none is learned."""
        return GridQuantizer(self.spec.weights, None, self.training, None)

    def __call__(self, variable: nnx.Variable, value: Any) -> Any:
        """The values that quantization keeps."""
        del variable
        if not isinstance(value, jax.Array):
            return value
        return self.axes.from_rows(self.quantizer().weight(self.axes.to_rows(value)), value.shape)


def _hook(variable: Any) -> _Hook | None:
    hooks = (
        variable.get_metadata().get("on_get_value", ())
        if isinstance(variable, nnx.Variable)
        else ()
    )
    return next((h for h in hooks if isinstance(h, _Hook)), None)


def _quantizer(weight: Weight) -> GridQuantizer | None:
    """The grids that `prepare` gave a weight, None if it gave none."""
    hook = _hook(weight.variable)
    if hook is not None:
        return hook.quantizer()
    for name in ("dot_general", "einsum_op"):
        op = getattr(weight.module, name, None)
        if isinstance(op, FakeQuantDotGeneral | FakeQuantEinsum):
            return op.quantizer
    return None


def convert(model: nnx.Module) -> int:
    """Replaces the weights of prepared layers by quantized ones; returns how many."""
    hooked = {
        ".".join(str(p) for p in path): hook.axes
        for path, variable in nnx.to_flat_state(nnx.state(model))
        if (hook := _hook(variable)) is not None
    }
    known = quantizable(model, {})
    known |= {p: w for p, w in quantizable(model, _given(model, hooked, known)).items()}
    count = 0
    for weight in known.values():
        quantizer = _quantizer(weight)
        if quantizer is None:
            continue
        variable, module = weight.variable, weight.module
        if weight.hooked:
            variable.set_metadata(on_get_value=())
        dtype = getattr(module, "dtype", None)
        value = variable.get_value()
        value = (
            value if dtype is None else value.astype(dtype)
        )  # the grid is that of the product's operand
        q = quantizer.quantized(weight.axes.to_rows(value))
        held = QuantizedWeight(q, weight.axes, value.shape)
        setattr(module, weight.name, nnx.data(held))
        if isinstance(module, nnx.Einsum):
            module.einsum_op = nnx.data(QuantizedEinsum(quantizer))
        elif not weight.hooked:
            module.dot_general = nnx.data(QuantizedDotGeneral(held, quantizer))
        count += 1
    return count


def _given(model: nnx.Module, hooked: Mapping[str, Axes], known: Mapping[str, Weight]):
    """Axes of the hooked parameters that no layer of Flax's explains."""
    of_layers = {f"{w.path}.{w.name}".lstrip(".") for w in known.values()}
    del model
    return {path: axes for path, axes in hooked.items() if path not in of_layers}
