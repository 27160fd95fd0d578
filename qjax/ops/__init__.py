"""Ops on plain and quantized arrays: plain functions, one device, differentiable."""

from qjax.ops._attention import dot_product_attention, paged_attention
from qjax.ops._dispatch import device_reason, require_kernels
from qjax.ops._dot import dot, straight_through
from qjax.ops._dot_kernels import prepack, prepackable
from qjax.ops._fp8_training import GRADIENT_ELEMENTS, fp8_dot
from qjax.ops._ragged_dot import ragged_dot
from qjax.ops._take import take_rows

__all__ = [
    "GRADIENT_ELEMENTS",
    "device_reason",
    "dot",
    "dot_product_attention",
    "fp8_dot",
    "paged_attention",
    "prepack",
    "prepackable",
    "ragged_dot",
    "require_kernels",
    "straight_through",
    "take_rows",
]
