"""Listwise ranking: all candidates in one prompt, ordered by label distribution or by a generated list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llmrec.rank.asking import Asker, generated, scored
from llmrec.rank.pointwise import ranked
from llmrec.types import Answer, Prompt, Ranking, Request

# A label, its separator and a stray space: what a list spends per candidate when it answers by label.
_TOKENS_PER_LABEL = 4


class LabelRanker:
    """Ranks candidates by the probability of their label as the next token: one forward a request."""

    name = "label"

    def __init__(self, asker: Asker) -> None:
        asker.needs("score")
        self.asker = asker
        self.engine = ""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank every request's candidates; see `Predictor.answer`."""
        answers: list[Answer] = []
        for found in scored(self.asker, requests, closed=None):
            self.engine = found.scores.engine
            answers.append(ranked(found))
        return answers


class ListRanker:
    """Asks for the whole list as text and reads it; candidates left out are misses."""

    name = "list"

    def __init__(self, asker: Asker) -> None:
        asker.needs("generate")
        self.asker = replace(asker, task=_RankingTask(asker.task))
        self.engine = f"{asker.backend.name}:generate"

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank every request's candidates; see `Predictor.answer`."""
        room = _TOKENS_PER_LABEL * max((len(r.candidates or ()) for r in requests), default=1)
        reason = "no candidate label or title in the answer"
        return generated(self.asker, requests, max_tokens=room, wanted=Ranking, reason=reason)


class _RankingTask:
    """A task whose prompts ask for the full ranking rather than for one pick."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def prompt(self, request: Request, *, template: str, shots: int = 0) -> Prompt:
        prompt: Prompt = self._task.prompt(request, template=template, shots=shots, want="ranking")
        return prompt
