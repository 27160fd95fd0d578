"""Quantization-aware training: fake quantization with the quantizer's own grid, adapters, distillation."""

from qjax.qat._distill import distillation_loss
from qjax.qat._fake_quant import fake_quant, stored_scale
from qjax.qat._lora import LoRA, add_lora, merge_lora

__all__ = [
    "LoRA",
    "add_lora",
    "distillation_loss",
    "fake_quant",
    "merge_lora",
    "stored_scale",
]
