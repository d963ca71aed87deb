"""Pointwise ranking: each candidate by the likelihood of its own text."""

from __future__ import annotations

from collections.abc import Sequence

from llmrec.errors import LlmrecError
from llmrec.rank.asking import Asker, Scored, scored
from llmrec.types import Answer, Cost, Ranking, Request


class LikelihoodRanker:
    """Ranks candidates by log P(title | prompt), summed over tokens, end of answer included.

    The sum is a full-softmax log-probability. Renormalising at branching points only would be cheaper, but ranks
    at chance.
    """

    name = "likelihood"

    def __init__(self, asker: Asker) -> None:
        asker.needs("score")
        self.asker = asker
        self.engine = ""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank every request's candidates; see `Predictor.answer`."""
        answers: list[Answer] = []
        for found in scored(self.asker, requests, closed=True):
            self.engine = found.scores.engine
            answers.append(ranked(found))
        return answers


def ranked(found: Scored) -> Ranking:
    """Sort a request's candidates by their scores; equal scores keep the stored order and are ties.

    Raises:
        LlmrecError: If the request has no candidate set: scoring a whole catalogue title by title is out of reach.
    """
    items, scores = found.request.candidates, found.scores
    if items is None:
        raise LlmrecError(f"request {found.request.id} has no candidates to rank; give it a candidate set")
    order = sorted(range(len(items)), key=lambda i: -scores.logprobs[i])
    return Ranking(
        request_id=found.request.id,
        items=tuple(items[i] for i in order),
        scores=tuple(scores.logprobs[i] for i in order),
        prompt_hash=found.prompt_hash,
        cost=Cost(prompt_tokens=scores.prompt_tokens, completion_tokens=sum(scores.tokens)),
    )
