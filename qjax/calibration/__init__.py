"""Better than rounding to nearest: GPTQ, AWQ, AutoRound, and calibrated KV scales."""

from qjax.calibration._autoround import AutoRound
from qjax.calibration._awq import AWQ
from qjax.calibration._gptq import GPTQ
from qjax.calibration._layerwise import Method, ModuleError, calibrate, calibrate_kv_scales

__all__ = [
    "AWQ",
    "GPTQ",
    "AutoRound",
    "Method",
    "ModuleError",
    "calibrate",
    "calibrate_kv_scales",
]
