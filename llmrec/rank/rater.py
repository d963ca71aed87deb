"""Rating prediction: the expectation over the label distribution, or the number in a generated answer."""

from __future__ import annotations

from collections.abc import Sequence

from llmrec.rank.asking import Asker, generated, scored
from llmrec.tasks.rating import expected
from llmrec.types import Answer, Cost, Rating, Request

_NUMBER_TOKENS = 8


class ExpectedRater:
    """Predicts sum_r r P(r | prompt), with P normalised over the scale's labels."""

    name = "expected"

    def __init__(self, asker: Asker) -> None:
        asker.needs("score")
        self.asker = asker
        self.engine = ""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rate every request's item; see `Predictor.answer`."""
        answers: list[Answer] = []
        for found in scored(self.asker, requests, closed=None):
            self.engine = found.scores.engine
            answers.append(
                Rating(
                    request_id=found.request.id,
                    value=expected([float(text) for text in found.texts], found.scores.logprobs),
                    prompt_hash=found.prompt_hash,
                    cost=Cost(prompt_tokens=found.scores.prompt_tokens, completion_tokens=1, forwards=1),
                )
            )
        return answers


class ParsedRater:
    """Generates an answer and reads its number."""

    name = "parsed"

    def __init__(self, asker: Asker) -> None:
        asker.needs("generate")
        self.asker = asker
        self.engine = f"{asker.backend.name}:generate"

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rate every request's item; see `Predictor.answer`."""
        reason = "no number on the rating scale in the answer"
        return generated(self.asker, requests, max_tokens=_NUMBER_TOKENS, wanted=Rating, reason=reason)
