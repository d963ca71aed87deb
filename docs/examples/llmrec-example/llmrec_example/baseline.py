"""A baseline: items whose titles share words with the latest items of the history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from llmrec.baselines.base import Catalogue, InteractionLog, ScoredBaseline, break_ties_by_popularity, item_counts
from llmrec.data.split import SplitDataset
from llmrec.recipe.schema import Section
from llmrec.types import Request


class TitleWordsConfig(Section):
    """What a recipe may set: ``{name: title-words, latest: 2}``."""

    latest: int = Field(3, gt=0, description="events of the history whose titles count")


@dataclass(frozen=True)
class Words:
    """What `fit` stores.

    Attributes:
        catalogue: The items.
        shared: Words that two titles share, shape (items, items).
        popular: Training interactions of each item, shape (items,).
    """

    catalogue: Catalogue
    shared: NDArray[np.float64]
    popular: NDArray[np.float64]


class TitleWords(ScoredBaseline[TitleWordsConfig, Words]):
    """Scores an item by the words that its title shares with the latest titles of the history."""

    name = "title-words"
    Config = TitleWordsConfig
    GRID: ClassVar[Mapping[str, tuple[int, ...]]] = {"latest": (1, 2, 3, 5)}
    READS = "texts"
    families = ("sequential", "direct")

    def learn(self, data: SplitDataset) -> None:
        """Compare the titles of the catalogue, and count training interactions."""
        catalogue = Catalogue.of(data)
        titles = [set(data.dataset.items[item].title.casefold().split()) for item in catalogue.ids]
        shared = np.array([[float(len(one & other)) for other in titles] for one in titles])
        self._model = Words(catalogue, shared, item_counts(InteractionLog.of(data, catalogue), catalogue))

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return a score for every request and item, shape (n, items)."""
        model = self._fitted
        result = np.zeros((len(requests), len(model.catalogue.ids)))
        for row, request in enumerate(requests):
            indices = model.catalogue.indices(event.item_id for event in request.history[-self.config.latest :])
            result[row] = model.shared[indices[indices >= 0]].sum(axis=0)
        return break_ties_by_popularity(result, model.popular)
