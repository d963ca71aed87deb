"""What resembles the items of the history in text, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from llmrec.baselines.base import DECAYS, Catalogue, Decay, Log, ScoredBaseline, counts, filled, recent
from llmrec.baselines.item_texts import WHITENINGS, TextsConfig, Turned, WhitenedConfig, text_vectors
from llmrec.recipe.schema import Positive

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Request


@dataclass(frozen=True)
class _Texts:
    """The vectors of all items and their popularity, shape (items,)."""

    catalogue: Catalogue
    vectors: Turned
    popular: NDArray[np.float64]


class ContentConfig(WhitenedConfig):
    """Parameters of `Content`."""

    history: Positive = Field(20, description="how many of the latest events count")
    decay: Decay = Field(0.7, description="factor from one event to the one before")


class Content(ScoredBaseline[ContentConfig, _Texts]):
    """Scores an item by how much its text resembles that of the latest items of the history.

    Vectors of a fixed text encoder are centred and turned onto their principal directions; direction k with standard
    deviation s_k is divided by ``s_k**whitening`` (after Su et al., arXiv 2103.15316, who whiten wholly). Then
    ``score(j) = v_j . sum_i decay**age(i) v_i`` for vectors of length 1, over the last ``history`` events i. Nothing is
    learned from interactions, so that it ranks items that nobody has chosen.
    """

    name = "content"
    Config = ContentConfig
    READS = "texts"
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "whitening": WHITENINGS,
        "decay": DECAYS,
        "history": (1, 2, 3, 5, 10, 20, 50, 100),
    }
    AT_ANSWER: ClassVar[frozenset[str]] = frozenset(ContentConfig.model_fields) - set(TextsConfig.model_fields)

    def fit(self, data: SplitDataset) -> None:
        """Read the texts of all items.

        Raises:
            DataError: If no item has a text.
            ModelError: If there is no such encoder.
        """
        catalogue = Catalogue.of(data)
        vectors = text_vectors(data, catalogue.ids, self._config)
        self._model = _Texts(catalogue, Turned.of(vectors), counts(Log.of(data, catalogue), catalogue))

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return the likenesses for every request and item, shape (n, items)."""
        model, config = self._fitted, self._config
        vectors = model.vectors.whitened(config.whitening)
        weights = recent(requests, model.catalogue, config.history, config.decay)
        likeness = (weights @ vectors) @ vectors.T
        # From 1 on, so that popularity, which orders equal ones and decides for an empty history, adds the same to all.
        return filled(1 + likeness - likeness.min(axis=1, keepdims=True, initial=0.0), model.popular)
