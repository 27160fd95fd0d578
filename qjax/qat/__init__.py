"""Quantization-aware training: fake quantization with the quantizer's own grid."""

from qjax.qat._fake_quant import fake_quant, stored_scale

__all__ = ["fake_quant", "stored_scale"]
