"""Checkpoints: Hugging Face folders and GGUF files in, Hugging Face folders out, Orbax for training."""

from qjax.checkpoint._export import export
from qjax.checkpoint._export_formats import FORMATS as EXPORT_FORMATS
from qjax.checkpoint._orbax import Restored, restore, save

__all__ = ["EXPORT_FORMATS", "Restored", "export", "restore", "save"]
