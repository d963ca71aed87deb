"""A strategy: candidates by the likelihood of their titles, divided by a power of the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from llmrec.strategies.asking import Prompting, cost_of, scored
from llmrec.types import Answer, Ranking, Request


class LikelihoodAToken:
    """Ranks by log P(title | prompt) / tokens, so that long titles are not punished for their length."""

    name = "likelihood-a-token"
    families = ("sequential",)
    # Keys of the recipe's eval section that it is handed, by name; this one takes none.
    keys = ()

    def __init__(self, asker: Prompting) -> None:
        asker.needs("score")
        self.asker = asker
        self.engine = ""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer every request, in order."""
        answers: list[Answer] = []
        for found in scored(self.asker, requests, closed=True):
            self.engine = found.scores.engine
            each = [score / size for score, size in zip(found.scores.logprobs, found.scores.tokens, strict=True)]
            order = sorted(range(len(each)), key=lambda place: -each[place])
            answers.append(
                Ranking(
                    request_id=found.request.id,
                    items=tuple((found.request.candidates or ())[place] for place in order),
                    scores=tuple(each[place] for place in order),
                    prompt_hash=found.prompt_hash,
                    cost=cost_of(found.scores),
                )
            )
        return answers
