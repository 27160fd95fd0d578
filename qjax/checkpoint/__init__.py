"""Checkpoints: Hugging Face folders and GGUF files in, Hugging Face folders out, Orbax for training."""

from qjax.checkpoint._export import export
from qjax.checkpoint._export_formats import FORMATS as EXPORT_FORMATS
from qjax.checkpoint._gguf import default_model_path
from qjax.checkpoint._load import LoadedModel, Row, load, open_checkpoint, resolve
from qjax.checkpoint._orbax import Restored, restore, save

__all__ = [
    "EXPORT_FORMATS",
    "LoadedModel",
    "Restored",
    "Row",
    "default_model_path",
    "export",
    "load",
    "open_checkpoint",
    "resolve",
    "restore",
    "save",
]
