"""Item-based nearest neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field
from scipy import sparse

from llmrec.baselines.base import Catalogue, Decay, Log, ScoredBaseline, counts, filled, recent
from llmrec.recipe.schema import Positive, Section

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Request

# What is left of an item's cosine to itself after rounding is below this share of it.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class _Columns:
    """Training matrix with columns of length 1, shape (users, items), which items it holds, and their popularity."""

    catalogue: Catalogue
    units: Any
    trained: NDArray[np.float64]
    popular: NDArray[np.float64]


class ItemKNNConfig(Section):
    """Parameters of `ItemKNN`."""

    history: Positive = Field(20, description="how many of the latest events count")
    decay: Decay = Field(0.8, description="factor from one event to the one before; 1 weighs all alike")


class ItemKNN(ScoredBaseline[ItemKNNConfig, _Columns]):
    """Scores an item by its cosine to the latest items of the history (Sarwar et al., WWW 2001, section 3.1).

    ``score(i) = sum_j decay**age(j) * cos(i, j)`` over the last ``history`` events j, on the binary matrix of
    training users and items, over all neighbours. An item is no neighbour of itself. Items without any neighbour in
    the history, and so every item for an empty history, are ordered by popularity.
    """

    name = "item-knn"
    Config = ItemKNNConfig
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {"history": (10, 20, 50), "decay": (0.8, 1.0)}

    def fit(self, data: SplitDataset) -> None:
        """Normalise the columns of the binary training matrix."""
        catalogue = Catalogue.of(data)
        log = Log.of(data, catalogue)
        binary = log.binary(len(catalogue.ids))
        readers = np.asarray(binary.sum(axis=0)).ravel()
        units = binary @ sparse.diags_array(1 / np.sqrt(np.maximum(readers, 1)))
        self._model = _Columns(
            catalogue=catalogue,
            units=units.tocsr(),
            trained=(readers > 0).astype(np.float64),
            popular=counts(log, catalogue),
        )

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return the sums of cosines for every request, shape (n, items)."""
        model = self._fitted
        weights = recent(requests, model.catalogue, self._config.history, self._config.decay)
        # Through the users instead of an item-by-item matrix, which a large catalogue could not hold.
        with_self = ((weights @ model.units.T) @ model.units).toarray()
        # Each item's cosine to itself is 1.
        own = (weights @ sparse.diags_array(model.trained)).toarray()
        scores = with_self - own
        scores[scores <= _ROUNDING * own] = 0.0
        return filled(scores, model.popular)
