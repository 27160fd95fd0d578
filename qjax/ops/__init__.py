"""Ops on plain and quantized arrays: plain functions, one device, differentiable."""

from qjax.ops._activation import SILU, GatedActivation, gated_activation, silu_mul
from qjax.ops._attention import dot_product_attention, gather_pages, paged_attention
from qjax.ops._dispatch import choice_context, device_reason, require_kernels
from qjax.ops._dot import dot, straight_through
from qjax.ops._dot_kernels import AMPERE, prepack, prepackable
from qjax.ops._expert_order import expert_order
from qjax.ops._fp8_training import GRADIENT_ELEMENTS, fp8_dot
from qjax.ops._gated_mlp import gated_ragged_mlp
from qjax.ops._gated_ragged_dot import gated_ragged_dot
from qjax.ops._kv_cache_write import Rotation, kv_cache_write, rotate, write_pages
from qjax.ops._latent_attention import latent_attention
from qjax.ops._mqa_logits import mqa_logits, paged_mqa_logits
from qjax.ops._quantized_input import (
    QuantizedInput,
    quantized_rms_norm,
    quantized_silu_mul,
    rms_norm,
    takes_quantized_input,
)
from qjax.ops._ragged_dot import ragged_dot
from qjax.ops._take import take_rows

__all__ = [
    "AMPERE",
    "GRADIENT_ELEMENTS",
    "SILU",
    "GatedActivation",
    "QuantizedInput",
    "Rotation",
    "choice_context",
    "device_reason",
    "dot",
    "dot_product_attention",
    "expert_order",
    "fp8_dot",
    "gated_activation",
    "gated_ragged_dot",
    "gated_ragged_mlp",
    "gather_pages",
    "kv_cache_write",
    "latent_attention",
    "mqa_logits",
    "paged_attention",
    "paged_mqa_logits",
    "prepack",
    "prepackable",
    "quantized_rms_norm",
    "quantized_silu_mul",
    "ragged_dot",
    "require_kernels",
    "rms_norm",
    "rotate",
    "silu_mul",
    "straight_through",
    "take_rows",
    "takes_quantized_input",
    "write_pages",
]
