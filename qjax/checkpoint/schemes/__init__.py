"""Parsers of `quantization_config`: one per quant_method, all to the same canonical parts."""

from collections.abc import Callable, Mapping
from typing import Any

from qjax.checkpoint.schemes._auto_round import parse_auto_round
from qjax.checkpoint.schemes._base import Codec, Group, Quantization, TensorInfo
from qjax.checkpoint.schemes._compressed_tensors import parse_compressed_tensors
from qjax.checkpoint.schemes._floating import (
    parse_fbgemm,
    parse_fp8,
    parse_modelopt,
    parse_mxfp4,
)
from qjax.checkpoint.schemes._gptq import parse_awq, parse_gptq

_PARSERS: Mapping[str, Callable[[Mapping[str, Any], str], Quantization]] = {
    "auto-round": parse_auto_round,
    "awq": parse_awq,
    "compressed-tensors": parse_compressed_tensors,
    "fbgemm_fp8": parse_fbgemm,
    "fp8": parse_fp8,
    "gptq": parse_gptq,
    "modelopt": parse_modelopt,
    "mxfp4": parse_mxfp4,
}


def parse_quantization(config: Mapping[str, Any], where: str) -> Quantization:
    """What a `quantization_config` says.

    Args:
        config: The object.
        where: The file's name, for messages.

    Raises:
        ValueError: If its quant_method is unknown or a field is not understood.
    """
    method = str(config.get("quant_method"))
    method = {"intel/auto-round": "auto-round", "modelopt_fp4": "modelopt"}.get(method, method)
    if method not in _PARSERS:
        raise ValueError(
            f"{where}: quant_method {method!r} is not supported; supported: {sorted(_PARSERS)}"
        )
    return _PARSERS[method](config, f"{where}: quantization_config")


__all__ = ["Codec", "Group", "Quantization", "TensorInfo", "parse_quantization"]
