"""Text while it is generated, a piece at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmrec.backends.encode import Encoder


class Listening:
    """What transformers hands tokens of one prompt to as they are chosen (its ``BaseStreamer``).

    Args:
        encoder: Reads tokens.
        stop: The text that ends the answer; None: the end of turn does.
        listener: Gets what was added to the text. A character whose bytes are not all there yet waits.
    """

    def __init__(self, encoder: Encoder, stop: str | None, listener: Callable[[str], None]) -> None:
        self._encoder, self._stop, self._listener = encoder, stop, listener
        self._ids: list[int] = []
        self._said = 0
        self._prompt = True

    def put(self, value: Any) -> None:
        """Take the prompt first, and then a token at a time."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.flatten().tolist()
        text = self._encoder.completion(self._ids, self._stop, 0).text
        if len(text) > self._said and not text.endswith("\ufffd"):
            self._listener(text[self._said :])
            self._said = len(text)

    def end(self) -> None:
        """Take note that all is said."""
