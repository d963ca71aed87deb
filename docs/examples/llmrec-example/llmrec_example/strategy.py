"""A strategy: candidates by the likelihood of their titles, divided by a power of the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from llmrec.strategies.asking import Prompting, cost_of, scored_requests
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
        for result in scored_requests(self.asker, requests, closed=True):
            self.engine = result.scores.engine
            values = [score / size for score, size in zip(result.scores.logprobs, result.scores.tokens, strict=True)]
            order = sorted(range(len(values)), key=lambda index: -values[index])
            answers.append(
                Ranking(
                    request_id=result.request.id,
                    items=tuple((result.request.candidates or ())[index] for index in order),
                    scores=tuple(values[index] for index in order),
                    prompt_hash=result.prompt_hash,
                    cost=cost_of(result.scores),
                )
            )
        return answers
