"""A language model as a scorer of the whole catalogue, for full ranking beside the baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmrec.rank.searching import CatalogueRanker
from llmrec.types import Ranking, Request

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
        self._column = {item: place for place, item in enumerate(self.items)}
        # A mixture asks once for each of its declared weights.
        self._known: dict[tuple[str, int], tuple[NDArray[np.int32], NDArray[np.float32]]] = {}

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return probabilities, shape (n, items); see `CatalogueScorer.scores`."""
        missing = [request for request in requests if _key(request) not in self._known]
        for request, answer in zip(missing, self._ranker.answer(missing), strict=True):
            assert isinstance(answer, Ranking)  # a search always finds something
            columns = np.array([self._column[item] for item in answer.items], dtype=np.int32)
            self._known[_key(request)] = columns, np.array(answer.scores, dtype=np.float32)
        found = np.zeros((len(requests), len(self.items)))
        for row, request in enumerate(requests):
            columns, logprobs = self._known[_key(request)]
            found[row, columns] = np.exp(logprobs, dtype=np.float64)
        return found


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
