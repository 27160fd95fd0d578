"""Quantized large language models in JAX on NVIDIA GPUs."""

from qjax.formats import FORMATS, ActivationFormat, QFormat, qformat
from qjax.ops import (
    dot,
    dot_product_attention,
    paged_attention,
    prepack,
    ragged_dot,
    require_kernels,
    take_rows,
)
from qjax.qarray import QArray
from qjax.quantization import quantize, quantize_dequantize, requantize
from qjax.recipe import QuantSpec, Recipe, Rule, recipe
from qjax.sharding import Sharding, make_mesh

__all__ = [
    "FORMATS",
    "ActivationFormat",
    "QArray",
    "QFormat",
    "QuantSpec",
    "Recipe",
    "Rule",
    "Sharding",
    "dot",
    "dot_product_attention",
    "make_mesh",
    "paged_attention",
    "prepack",
    "qformat",
    "quantize",
    "quantize_dequantize",
    "ragged_dot",
    "recipe",
    "requantize",
    "require_kernels",
    "take_rows",
]
