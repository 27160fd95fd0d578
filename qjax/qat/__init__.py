"""Quantization-aware training: fake quantization with the quantizer's own grid, adapters, distillation."""

from qjax.qat._distill import distillation_loss
from qjax.qat._fake_quant import fake_quant, stored_scale
from qjax.qat._fake_quantizer import (
    GridQuantizer,
    LearnedRounding,
    LearnedScale,
    Schedule,
    Step,
)
from qjax.qat._flax import Axes
from qjax.qat._fp8_training import fp8_training
from qjax.qat._linen import dot_general_cls, fake_quant_params, quantize_params
from qjax.qat._lora import LoRA, add_lora, merge_lora
from qjax.qat._prepare import convert, prepare, quantized_weights, set_step

__all__ = [
    "Axes",
    "GridQuantizer",
    "LearnedRounding",
    "LearnedScale",
    "LoRA",
    "Schedule",
    "Step",
    "add_lora",
    "convert",
    "distillation_loss",
    "dot_general_cls",
    "fake_quant",
    "fake_quant_params",
    "fp8_training",
    "merge_lora",
    "prepare",
    "quantize_params",
    "quantized_weights",
    "set_step",
    "stored_scale",
]
