"""What is known of texts while they are generated: their pieces, or how far they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmrec.backends.encode import Encoder
from llmrec.progress import count_answers


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


class Counting:
    """Notes how far the texts of several prompts are; transformers hands it one token of each at a time.

    Args:
        prompts: How many.
        max_tokens: Of the longest text.
    """

    def __init__(self, prompts: int, max_tokens: int) -> None:
        self._prompts, self._share = prompts, prompts / max_tokens
        self._noted = -self._share

    def put(self, value: Any) -> None:
        """Take the prompts first, and then a token of each."""
        self._noted += self._share
        if self._noted:
            count_answers(self._share)

    def end(self) -> None:
        """Note the tokens that were not needed."""
        count_answers(self._prompts - self._noted)
