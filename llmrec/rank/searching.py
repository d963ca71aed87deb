"""Generative ranking: the most likely texts of the whole catalogue, by constrained search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmrec.errors import LlmrecError
from llmrec.rank.asking import Asker, prompt_hash
from llmrec.types import Answer, Cost, Found, Ranking, Request


class CatalogueRanker:
    """Ranks the whole catalogue by log P(code | prompt), end of answer included, as far as ``beams`` items.

    Items of the request's history are left out inside the search, so that as many others are found. Every answer holds
    real items, each once. The sum is a full-softmax log-probability.
    """

    name = "search"

    def __init__(self, asker: Asker, *, beams: int = 20, exact: bool = False, seen: bool = False) -> None:
        """Set up.

        Args:
            asker: Its task knows the catalogue.
            beams: Prefixes that are kept, and items that are returned.
            exact: Widen the search of a request until no other item can be better than those returned.
            seen: Items of the history may be ranked too.
        """
        asker.needs("search")
        self.asker, self._beams, self._exact, self._seen = asker, beams, exact, seen
        self.engine = ""
        self.certified = 0

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the catalogue for every request; see `Predictor.answer`.

        Raises:
            LlmrecError: If a request brings candidates, or the texts of items depend on the request.
        """
        task: Any = self.asker.task
        items: tuple[str, ...] = task.catalogue
        places = {item: place for place, item in enumerate(items)}
        answers: list[Answer] = []
        texts: tuple[str, ...] | None = None
        for part, prompts in self.asker.batches(requests):
            for request in part:
                self._check(request)
            if texts is None:
                texts = task.continuations(part[0], template=self.asker.template)
            found = self.asker.backend.search(
                prompts,
                texts,
                k=self._beams,
                width=self._beams,
                excluded=[() if self._seen else _places(request, places) for request in part],
                exact=self._exact,
            )
            for request, prompt, each in zip(part, prompts, found, strict=True):
                answers.append(self._ranking(request, items, each, prompt_hash(prompt)))
        return answers

    def _check(self, request: Request) -> None:
        if request.candidates is not None:
            raise LlmrecError(
                f"request {request.id}: the strategy 'search' ranks the whole catalogue, and this request has "
                "candidates of its own; use the strategy 'likelihood'"
            )

    def _ranking(self, request: Request, items: Sequence[str], found: Found, prompt: str) -> Ranking:
        self.engine = found.engine
        self.certified += found.certified
        return Ranking(
            request_id=request.id,
            items=tuple(items[place] for place in found.items),
            scores=found.scores,
            prompt_hash=prompt,
            cost=Cost(prompt_tokens=found.prompt_tokens, completion_tokens=found.tokens),
        )


def _places(request: Request, places: dict[str, int]) -> list[int]:
    return sorted({places[event.item_id] for event in request.history if event.item_id in places})
