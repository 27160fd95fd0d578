"""Text generation: batches of prompts through two compiled functions, prefill and decode."""

from qjax.generation._generator import Generator, Prompt
from qjax.generation._sequence import Completion, Increment

__all__ = ["Completion", "Generator", "Increment", "Prompt"]
