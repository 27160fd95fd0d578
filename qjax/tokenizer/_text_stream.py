"""Text of a token sequence that grows, piece by piece and never in the middle of a character."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"


class TextStream:
    """Decodes tokens as they come.

    The pieces joined are the text of all tokens at once. A token alone can't be decoded: a character may
    span several, and some decoders treat the first token apart. So each step decodes a short window twice,
    without and with the new tokens, and the difference is the new text, unless it ends inside a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        """Starts with no tokens; `decode` gives the text of a token sequence."""
        self._decode = decode
        self._ids: list[int] = []
        self._window = 0  # the window's first token
        self._done = 0  # tokens whose text is out

    def push(self, token_id: int) -> str:
        """The text that this token completes, often its own; "" while a character is incomplete."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._window : self._done])
        text = self._decode(self._ids[self._window :])
        if len(text) <= len(before) or text.endswith(REPLACEMENT):
            return ""
        self._window, self._done = self._done, len(self._ids)
        return text[len(before) :]

    def flush(self) -> str:
        """The text still held back at the end: bytes of an incomplete character, as U+FFFD."""
        before = self._decode(self._ids[self._window : self._done])
        text = self._decode(self._ids[self._window :])
        self._window, self._done = self._done, len(self._ids)
        return text[len(before) :]
