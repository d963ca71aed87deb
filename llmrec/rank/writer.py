"""Text generation: explanations."""

from __future__ import annotations

from collections.abc import Sequence

from llmrec.rank.asking import Asker, generated
from llmrec.types import Answer, Request, Text


class Writer:
    """Generates one text a request, greedily, of at most ``max_tokens`` tokens."""

    name = "text"

    def __init__(self, asker: Asker, *, max_tokens: int = 48) -> None:
        asker.needs("generate")
        self.asker = asker
        self._max_tokens = max_tokens
        self.engine = f"{asker.backend.name}:generate"

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Write a text for every request; see `Predictor.answer`."""
        return generated(self.asker, requests, max_tokens=self._max_tokens, wanted=Text, reason="empty answer")
