"""Two controls without a model of the user: chance and popularity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmrec.baselines.fitted import fitted
from llmrec.baselines.ranked import Catalogue, Log, counts, rank_all, ranking, refusal, top_of, unseen
from llmrec.data.hashing import hash_one

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Answer, Request


class Random:
    """Ranks by chance. Scores depend on the seed, the request's id and the set of items, on no order of anything."""

    name = "random"

    def __init__(self, *, seed: int = 0) -> None:
        self._seed = seed
        self._catalogue: Catalogue | None = None

    def fit(self, data: SplitDataset) -> None:
        """Take down the catalogue; nothing is learned."""
        self._catalogue = Catalogue.of(data)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates, or the catalogue less the history, in a random order without ties."""
        catalogue = fitted(self._catalogue, self.name)
        return [self._one(request, catalogue) for request in requests]

    def _one(self, request: Request, catalogue: Catalogue) -> Answer:
        if (refused := refusal(request)) is not None:
            return refused
        rng = np.random.default_rng(hash_one("random baseline", self._seed, request.id))
        if request.candidates is None:
            places = unseen(request, catalogue)
            return top_of(request, catalogue, places, rng.random(len(places)))
        items = sorted(request.candidates)
        return ranking(request, items, rng.random(len(items)))


@dataclass(frozen=True)
class _Popular:
    catalogue: Catalogue
    counts: NDArray[np.float64]


class Popularity:
    """Ranks by the number of training interactions; the score is that number."""

    name = "popularity"

    def __init__(self, *, seed: int = 0) -> None:
        self._model: _Popular | None = None

    def fit(self, data: SplitDataset) -> None:
        """Count the training interactions of every item."""
        catalogue = Catalogue.of(data)
        self._model = _Popular(catalogue=catalogue, counts=counts(Log.of(data, catalogue), catalogue))

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates, or the catalogue less the history; unknown items count 0."""
        model = fitted(self._model, self.name)
        everything = model.counts[None, :]
        return rank_all(requests, model.catalogue, lambda part: np.repeat(everything, len(part), axis=0))
