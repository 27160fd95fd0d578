"""Which module implements each Hugging Face `model_type`: strings only, imported when asked for."""

import importlib
from collections.abc import Mapping
from types import MappingProxyType, ModuleType

MODEL_MODULES: Mapping[str, str] = MappingProxyType(
    {
        "llama": "qjax.models.llama",
        "mistral": "qjax.models.llama",
        "qwen2": "qjax.models.llama",
        "qwen3": "qjax.models.llama",
        "qwen3_moe": "qjax.models.qwen3_moe",
        "deepseek_v3": "qjax.models.deepseek_v3",
        "kimi_k2": "qjax.models.deepseek_v3",
        "gpt_oss": "qjax.models.gpt_oss",
    }
)


def model_module(model_type: object) -> ModuleType:
    """The module that implements a model_type: it has `Config.from_hf` and `Model`.

    Raises:
        ValueError: If no family implements it.
    """
    if not isinstance(model_type, str) or model_type not in MODEL_MODULES:
        raise ValueError(
            f"config.json: model_type {model_type!r} is not supported; use one of {sorted(MODEL_MODULES)}"
        )
    return importlib.import_module(MODEL_MODULES[model_type])
