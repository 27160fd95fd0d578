"""Text to tokens and back, from a Hugging Face folder's files or from a GGUF file's metadata."""

from qjax.tokenizer._text_stream import TextStream
from qjax.tokenizer._tokenizer import Tokenizer

__all__ = ["TextStream", "Tokenizer"]
