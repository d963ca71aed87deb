"""Generative ranking: finds the most likely items of the whole catalogue by constrained beam search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmrec.errors import LlmrecError, RecipeError
from llmrec.strategies.asking import Prompting, prompt_hash, ranking_of
from llmrec.types import Answer, Cost, Ranking, Request, SearchResult

if TYPE_CHECKING:
    from numpy.typing import NDArray


class CatalogueRanker:
    """Ranks the ``beams`` most likely items of the whole catalogue by log P(code | prompt), including the end token.

    Items of the request's history are excluded during the search, so that the number of results is unaffected. Every
    answer contains existing items, each once; items with the same text share a score, a full-softmax log-probability.
    """

    name = "search"

    def __init__(
        self,
        asker: Prompting,
        *,
        beams: int,
        exact: bool = False,
        seen: bool = False,
        apart: Callable[[Request], frozenset[str]] | None = None,
    ) -> None:
        """Create the ranker.

        Args:
            asker: The setup; its task has an attribute ``catalogue``, and yields its texts as continuations.
            beams: Number of prefixes that are kept, and of texts that are returned.
            exact: Widen the search of a request until no other text can be better than those returned.
            seen: Whether items of the history may be ranked.
            apart: Returns the items to exclude from a request's answer; None: those of its history, unless ``seen``.
        """
        asker.needs("search")
        self.asker, self._beams, self._exact = asker, beams, exact
        self._apart = apart or ((lambda request: frozenset()) if seen else _history_items)
        self.engine = ""
        self._texts: tuple[str, ...] = ()
        self._groups: list[list[str]] = []
        self._group_of: dict[str, int] = {}

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the catalogue for every request; see `Predictor.answer`.

        Raises:
            LlmrecError: If a request has candidates.
        """
        answers: list[Answer] = []
        for part, prompts in self.asker.batches(requests):
            if (other := next((request for request in part if request.candidates is not None), None)) is not None:
                raise LlmrecError(
                    f"request {other.id}: the strategy 'search' ranks the whole catalogue, but this request has "
                    "candidates; use the strategy 'likelihood'",
                    kind="contradiction",
                    column="candidates",
                )
            if not self._texts:
                self._write(part[0])
            result = self.asker.backend.search(
                prompts,
                self._texts,
                k=self._beams,
                width=self._beams,
                excluded=[self._excluded_groups(request) for request in part],
                exact=self._exact,
            )
            for request, prompt, found in zip(part, prompts, result, strict=True):
                self.engine = found.engine
                cost = Cost(prompt_tokens=found.prompt_tokens, completion_tokens=found.tokens, forwards=1)
                answers.append(ranking_of(request, self._order(request, found), prompt_hash(prompt), cost))
        return answers

    def _write(self, request: Request) -> None:
        """Store the texts of all items once; items with the same text are merged."""
        task = self.asker.task
        if not task.writes_alike(self.asker.template):
            raise RecipeError(
                f"template {self.asker.template}: a search needs the same answers for all requests, but the answers "
                "of this template depend on the request; use only the item in the answer",
                kind="unsupported",
                at=self.asker.template,
            )
        groups: dict[str, list[str]] = {}
        for item, text in zip(task.catalogue, task.continuations(request, template=self.asker.template), strict=True):
            groups.setdefault(text, []).append(item)
        self._texts, self._groups = tuple(groups), list(groups.values())
        self._group_of = {item: index for index, items in enumerate(self._groups) for item in items}

    def _excluded_groups(self, request: Request) -> list[int]:
        """Return the texts whose items are all excluded."""
        excluded = self._apart(request)
        groups = {self._group_of[item] for item in excluded if item in self._group_of}
        return sorted(group for group in groups if excluded.issuperset(self._groups[group]))

    def _order(self, request: Request, result: SearchResult) -> list[tuple[str, float]]:
        excluded = self._apart(request)
        return [
            (item, score)
            for group, score in zip(result.items, result.scores, strict=True)
            for item in self._groups[group]
            if item not in excluded
        ]


def _history_items(request: Request) -> frozenset[str]:
    return frozenset(event.item_id for event in request.history)


class SearchedCatalogue:
    """Scores items by P(code | prompt) if the beam search finds them, and by 0 otherwise.

    Items that are not found tie at the bottom, so a target among them has the expected rank of a random order. The
    search does not exclude seen items: both conventions about the history use the same scores.
    """

    def __init__(self, name: str, ranker: CatalogueRanker, items: Sequence[str]) -> None:
        """Create the scorer.

        Args:
            name: The name of the model in tables.
            ranker: The ranker, with seen items allowed.
            items: The catalogue, in column order.
        """
        self.name, self.items = name, tuple(items)
        self._ranker = ranker
        self._column = {item: index for index, item in enumerate(self.items)}
        self._known: dict[tuple[str, int], tuple[NDArray[np.int32], NDArray[np.float32]]] = {}

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return probabilities of all items, shape (n, items); see `CatalogueScorer.scores`."""
        missing = [request for request in requests if _request_key(request) not in self._known]
        for request, answer in zip(missing, self._ranker.answer(missing), strict=True):
            assert isinstance(answer, Ranking)  # a search always has a result
            columns = np.array([self._column[item] for item in answer.items], dtype=np.int32)
            self._known[_request_key(request)] = columns, np.array(answer.scores, dtype=np.float32)
        result = np.zeros((len(requests), len(self.items)))
        for row, request in enumerate(requests):
            columns, logprobs = self._known[_request_key(request)]
            result[row, columns] = np.exp(logprobs, dtype=np.float64)
        return result


def _request_key(request: Request) -> tuple[str, int]:
    """Return an id for a request that is unique even if a user has several requests."""
    return request.id, len(request.history)
