"""Generative ranking: the most likely texts of the whole catalogue, by constrained search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmrec.errors import LlmrecError, RecipeError
from llmrec.strategies.asking import Prompting, prompt_hash
from llmrec.types import Answer, Cost, Found, Ranking, Request

if TYPE_CHECKING:
    from numpy.typing import NDArray


class CatalogueRanker:
    """Ranks the whole catalogue by log P(code | prompt), end of answer included, as far as ``beams`` texts.

    Items of the request's history are left out inside the search, so that as many others are found. Every answer holds
    real items, each once; items that are written alike share a score. It is a full-softmax log-probability.
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
        """Set up.

        Args:
            asker: Its task has the catalogue, ``catalogue``, and writes it as the continuations of any request.
            beams: Prefixes that are kept, and texts that are returned.
            exact: Widen the search of a request until no other text can be better than those returned.
            seen: Items of the history may be ranked too.
            apart: The items that are left out of a request's answer; None: those of its history, unless ``seen``.
        """
        asker.needs("search")
        self.asker, self._beams, self._exact = asker, beams, exact
        self._apart = apart or ((lambda request: frozenset()) if seen else _history)
        self.engine = ""
        self._texts: tuple[str, ...] = ()
        self._groups: list[list[str]] = []
        self._places: dict[str, int] = {}

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the catalogue for every request; see `Predictor.answer`.

        Raises:
            LlmrecError: If a request brings candidates.
        """
        answers: list[Answer] = []
        for part, prompts in self.asker.batches(requests):
            for request in part:
                _refuse_candidates(request)
            if not self._texts:
                self._write(part[0])
            result = self.asker.backend.search(
                prompts,
                self._texts,
                k=self._beams,
                width=self._beams,
                excluded=[self._gone(request) for request in part],
                exact=self._exact,
            )
            for request, prompt, item in zip(part, prompts, result, strict=True):
                answers.append(self._ranking(request, item, prompt_hash(prompt)))
        return answers

    def _write(self, request: Request) -> None:
        """Note how the catalogue is written, once: items that are written alike are one text.

        Raises:
            RecipeError: If the template writes it differently for other requests.
        """
        task = self.asker.task
        if not task.writes_alike(self.asker.template):
            raise RecipeError(
                f"template {self.asker.template}: its answer depends on the request, and a search writes the catalogue "
                "once for all; let the answer show the item alone",
                kind="unsupported",
                at=self.asker.template,
            )
        groups: dict[str, list[str]] = {}
        for item, text in zip(task.catalogue, task.continuations(request, template=self.asker.template), strict=True):
            groups.setdefault(text, []).append(item)
        self._texts, self._groups = tuple(groups), list(groups.values())
        self._places = {item: index for index, items in enumerate(self._groups) for item in items}

    def _gone(self, request: Request) -> list[int]:
        """Return the texts whose items are all left out."""
        apart = self._apart(request)
        places = {self._places[item] for item in apart if item in self._places}
        return sorted(place for place in places if apart.issuperset(self._groups[place]))

    def _ranking(self, request: Request, found: Found, prompt: str) -> Ranking:
        self.engine = found.engine
        apart = self._apart(request)
        ranked = [
            (item, score)
            for place, score in zip(found.items, found.scores, strict=True)
            for item in self._groups[place]
            if item not in apart
        ]
        return Ranking(
            request_id=request.id,
            items=tuple(item for item, _ in ranked),
            scores=tuple(score for _, score in ranked),
            prompt_hash=prompt,
            cost=Cost(prompt_tokens=found.prompt_tokens, completion_tokens=found.tokens, forwards=1),
        )


def _history(request: Request) -> frozenset[str]:
    return frozenset(event.item_id for event in request.history)


def _refuse_candidates(request: Request) -> None:
    if request.candidates is not None:
        raise LlmrecError(
            f"request {request.id}: the strategy 'search' ranks the whole catalogue, and this request has candidates "
            "of its own; use the strategy 'likelihood'",
            kind="contradiction",
            column="candidates",
        )


class SearchedCatalogue:
    """Gives every item P(code | prompt) where a constrained search finds it, and 0 where it does not.

    What is not found ties at the bottom, so a target there stands at the expected place of a random order. The search
    is told of no seen items: both conventions about the history are read off one table of scores.
    """

    def __init__(self, name: str, ranker: CatalogueRanker, items: Sequence[str]) -> None:
        """Set up.

        Args:
            name: Of the row.
            ranker: Searches with seen items allowed.
            items: The catalogue, in column order.
        """
        self.name, self.items = name, tuple(items)
        self._ranker = ranker
        self._column = {item: index for index, item in enumerate(self.items)}
        # A mixture asks once for each of its declared weights.
        self._known: dict[tuple[str, int], tuple[NDArray[np.int32], NDArray[np.float32]]] = {}

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return probabilities, shape (n, items); see `CatalogueScorer.scores`."""
        missing = [request for request in requests if _key(request) not in self._known]
        for request, answer in zip(missing, self._ranker.answer(missing), strict=True):
            assert isinstance(answer, Ranking)  # a search always finds something
            columns = np.array([self._column[item] for item in answer.items], dtype=np.int32)
            self._known[_key(request)] = columns, np.array(answer.scores, dtype=np.float32)
        result = np.zeros((len(requests), len(self.items)))
        for row, request in enumerate(requests):
            columns, logprobs = self._known[_key(request)]
            result[row, columns] = np.exp(logprobs, dtype=np.float64)
        return result


def _key(request: Request) -> tuple[str, int]:
    """Tell requests apart: the same user may be asked about before and after the validation event."""
    return request.id, len(request.history)


class Mixture:
    """Mixes what several scorers give, as probabilities of the next item: sum over m of w_m p_m(item | history).

    Linear interpolation, as it is used between language models (Jelinek and Mercer, 1980): one that gives an item
    nothing cannot veto it.
    """

    def __init__(
        self,
        name: str,
        items: Sequence[str],
        parts: Sequence[Callable[[Sequence[Request]], NDArray[np.float64]]],
        weights: Sequence[float],
    ) -> None:
        """Set up.

        Args:
            name: Of the row.
            items: The catalogue, in the column order of all parts.
            parts: Requests -> probabilities, shape (n, items).
            weights: One for each part, at least 0.
        """
        self.name, self.items = name, tuple(items)
        self._parts, self._weights = tuple(parts), tuple(weights)

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return mixed probabilities, shape (n, items); see `CatalogueScorer.scores`."""
        mixed = np.zeros((len(requests), len(self.items)))
        for part, weight in zip(self._parts, self._weights, strict=True):
            if weight:
                mixed += weight * part(requests)
        return mixed


def from_counts(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Read scores of at least 0 as shares, shape (n, items); a row of zeros stays."""
    values = scores.astype(np.float64)
    totals = values.sum(axis=1, keepdims=True)
    np.divide(values, totals, out=values, where=totals > 0)
    return values


def from_logits(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Read scores as logits, shape (n, items)."""
    values = scores.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    np.exp(values, out=values)
    values /= values.sum(axis=1, keepdims=True)
    return values
