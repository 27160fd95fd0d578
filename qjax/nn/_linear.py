"""Linear layers and embeddings over plain or quantized weights, column or row parallel on a mesh."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from qjax.formats import ActivationFormat
from qjax.nn._params import (
    Adapter,
    Context,
    FakeQuantizer,
    abstract_activation_scale,
    abstract_param,
    abstract_weight,
)
from qjax.ops import (
    QuantizedInput,
    dot,
    fp8_dot,
    quantized_rms_norm,
    rms_norm,
    straight_through,
    take_rows,
    takes_quantized_input,
)
from qjax.qarray import QArray
from qjax.quantization import quantize_activation, refine_blocks
from qjax.sharding import array_specs, sharded_format


class Linear(nnx.Module):
    """``y = x @ weight.T + bias`` with weight [out, in].

    On a mesh the weight is cut along `out_axis` (column parallel: so is y) or `in_axis` (row parallel:
    x is cut and partial sums are added up). Gradients with respect to x flow through a quantized weight;
    on a mesh they do not where activations are quantized as well.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        path: str,
        context: Context,
        *,
        use_bias: bool = False,
        in_axis: str | None = None,
        out_axis: str | None = None,
    ):
        """Builds the layer with abstract parameters.

        Args:
            in_features: K.
            out_features: N.
            path: The module's path, under which `context` has its spec.
            context: Specs, dtype, sharding.
            use_bias: Whether there is a bias [N].
            in_axis: Mesh axis that cuts K.
            out_axis: Mesh axis that cuts N.
        """
        spec = context.spec(path)
        axes = (out_axis, in_axis)
        shape = (out_features, in_features)
        self.weight = abstract_weight(shape, spec.weights, context, axes, path)
        bias = abstract_param((out_features,), context.dtype, context.sharding, (out_axis,))
        self.bias = bias if use_bias else None
        self.spec = spec  # as declared: on a mesh the weight's own blocks may be smaller
        self.activation_format = spec.activations
        self.activation_scale = abstract_activation_scale(spec, (), context.sharding, ())
        self.in_axis, self.out_axis = in_axis, out_axis
        self.sharding = context.sharding
        self.implementation = context.implementation
        self.lora: Adapter | None = nnx.data(None)  # a trained update: `qjax.qat.add_lora`
        self.fake_quant: FakeQuantizer | None = nnx.data(None)  # set by `qjax.qat.prepare`
        self.fp8_gradients: str | None = None  # set by `qjax.qat.fp8_training`

    def weight_value(self) -> Array | QArray:
        """The weight [N, K] that the product uses: fake quantized while the layer is trained for that."""
        w = self.weight.get_value()
        if self.fake_quant is None:
            return w
        if self.lora is not None:
            w = w + self.lora.delta().astype(w.dtype)
        return self.fake_quant.weight(w)

    def input_format(self) -> ActivationFormat | None:
        """The format in which the layer takes a `QuantizedInput`, None if it must see the values themselves."""
        as_loaded = self.fake_quant is None and self.lora is None and self.fp8_gradients is None
        w = self.weight.get_value()
        if as_loaded and self.sharding.mesh is None:
            return (
                self.activation_format if takes_quantized_input(w, self.activation_format) else None
            )
        return None

    def input_scale(self) -> Array | None:
        """The scale of a static activation format."""
        return None if self.activation_scale is None else self.activation_scale.get_value()

    def __call__(self, x: Float[Array, "... K"] | QuantizedInput) -> Float[Array, "... N"]:
        """The product in x's dtype.

        Raises:
            ValueError: If x is quantized and not in `input_format`.
        """
        bias = None if self.bias is None else self.bias.get_value()
        if isinstance(x, QuantizedInput):
            if x.activation != self.input_format():
                raise ValueError(
                    f"Linear: takes a quantized input in {self.input_format()} only; found {x.activation}"
                )
            return dot(x, self.weight.get_value(), bias=bias, implementation=self.implementation)
        if self.fake_quant is not None:
            x = self.fake_quant.input(x)
        y = sharded_dot(
            x,
            self.weight_value(),
            bias=bias,
            activation_format=self.activation_format,
            activation_scale=self.input_scale(),
            sharding=self.sharding,
            in_axis=self.in_axis,
            out_axis=self.out_axis,
            implementation=self.implementation,
            fp8_gradients=self.fp8_gradients,
        )
        # A fake quantized weight has the update in it.
        return y if self.lora is None or self.fake_quant is not None else y + self.lora(x)


def sharded_dot(
    x,
    w,
    *,
    bias=None,
    activation_format=None,
    activation_scale=None,
    sharding,
    in_axis,
    out_axis,
    out_dtype=None,
    implementation=None,
    fp8_gradients: str | None = None,
) -> Array:
    """`qjax.ops.dot` on each device's part of the weight; arguments as there, axes as in `Linear`.

    With `fp8_gradients` the product is `qjax.ops.fp8_dot`'s, that its gradients' element.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    product = dot
    if fp8_gradients is not None:
        product = functools.partial(_trained_dot, gradient_element=fp8_gradients)
    if sharding.mesh is None:
        return product(
            x,
            w,
            bias=bias,
            activation_format=activation_format,
            activation_scale=activation_scale,
            out_dtype=out_dtype,
            implementation=implementation,
        )
    lead, k = x.shape[:-1], x.shape[-1]
    x = x.reshape(-1, k)
    if isinstance(w, QArray) and w.column_perm is not None:
        # The stored order crosses shards, so the permutation happens before x is cut.
        x = jnp.take(x, w.column_perm, axis=-1)
        w = dataclasses.replace(w, column_perm=None)
    if activation_format is not None:
        # Quantized as one array: scales over whole rows must not depend on the mesh.
        quantized = quantize_activation(x, activation_format, scale=activation_scale)
        if isinstance(w, QArray):
            shards = (1, sharding.size(in_axis))
            refined = sharded_format(quantized.format, x.shape, shards, "activations")
            x = refine_blocks(quantized, refined.block_shape)
        else:  # quantization-aware training: values on the grid, differentiated straight through
            x = straight_through(x, quantized.dequantize())
    rows = sharding.axis("batch", x.shape[0])

    def local(x, w, bias):
        y = product(x, w, out_dtype=out_dtype, implementation=implementation)
        if in_axis is not None:
            y = jax.lax.psum(y, in_axis)
        return y if bias is None else (y + bias[None].astype(y.dtype))

    y = jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(
            array_specs(x, P(rows, in_axis)),
            array_specs(w, P(out_axis, in_axis)),
            None if bias is None else P(out_axis),
        ),
        out_specs=P(rows, out_axis),
        check_vma=False,
    )(x, w, bias)
    return y.reshape(*lead, w.shape[0])


def _trained_dot(x, w, *, bias=None, gradient_element, out_dtype, implementation, **_) -> Array:
    y = fp8_dot(
        x, w, gradient_element=gradient_element, out_dtype=out_dtype, implementation=implementation
    )
    return y if bias is None else y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class Embedding(nnx.Module):
    """Token embedding [V, D], plain or quantized, its rows cut over the mesh's vocabulary axis."""

    def __init__(self, vocab_size: int, features: int, path: str, context: Context):
        """Builds the table with an abstract weight; see `Linear` for the arguments."""
        self.vocab_axis = context.sharding.axis("vocab", vocab_size)
        self.spec = context.spec(path)
        self.weight = abstract_weight(
            (vocab_size, features),
            self.spec.weights,
            context,
            (self.vocab_axis, None),
            path,
        )
        self.dtype = context.dtype
        self.sharding = context.sharding
        self.implementation = context.implementation
        self.fake_quant: FakeQuantizer | None = nnx.data(None)  # set by `qjax.qat.prepare`

    def weight_value(self) -> Array | QArray:
        """The table [V, D], fake quantized while it is trained for that."""
        w = self.weight.get_value()
        return w if self.fake_quant is None else self.fake_quant.weight(w)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The rows of these tokens."""
        w = self.weight_value()
        if self.vocab_axis is None:
            return take_rows(w, ids, dtype=self.dtype)
        axis = self.vocab_axis
        batch = self.sharding.axis("batch", ids.shape[0])

        def local(w, ids):
            rows = ids - jax.lax.axis_index(axis) * w.shape[0]
            mine = (rows >= 0) & (rows < w.shape[0])
            taken = take_rows(w, rows, dtype=self.dtype)
            return jax.lax.psum(jnp.where(mine[..., None], taken, 0), axis)

        return jax.shard_map(
            local,
            mesh=self.sharding.mesh,
            in_specs=(array_specs(w, P(axis, None)), P(batch, None)),
            out_specs=P(batch, None, None),
            check_vma=False,
        )(w, ids)

    def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits of a tied head, float32."""
        return sharded_dot(
            x,
            self.weight_value(),
            sharding=self.sharding,
            in_axis=None,
            out_axis=self.vocab_axis,
            out_dtype=jnp.float32,
            implementation=self.implementation,
        )


def shared_input_format(layers: Sequence[Linear]) -> ActivationFormat | None:
    """The format in which all these layers take one quantized input, None if they do not agree on one."""
    formats = {layer.input_format() for layer in layers}
    shared = formats.pop() if len(formats) == 1 else None
    # Layers may have loaded different scales of one static format.
    return None if shared is not None and shared.static and len(layers) > 1 else shared


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv:1910.07467) computed in float32."""

    def __init__(self, features: int, context: Context, *, eps: float):
        """Builds the norm with an abstract weight [features]."""
        self.weight = abstract_param((features,), context.dtype, context.sharding, (None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """x / rms(x) * weight in x's dtype."""
        return rms_norm(x, self.weight.get_value(), eps=self.eps)

    def into(
        self,
        layers: Sequence[Linear],
        x: Float[Array, "... D"],
        residual: Float[Array, "... D"] | None = None,
    ) -> tuple[Any, Float[Array, "... D"]]:
        """The norm of x + residual as these layers take it, and the sum.

        The norm is a `QuantizedInput` if they agree on a format, else an array.
        """
        activation = shared_input_format(layers)
        if activation is None:
            total = x if residual is None else x + residual
            return self(total), total
        return quantized_rms_norm(
            x,
            self.weight.get_value(),
            activation,
            eps=self.eps,
            scale=layers[0].input_scale(),
            residual=residual,
            implementation=layers[0].implementation,
        )
