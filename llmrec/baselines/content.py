"""What resembles the items of the history in text, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from llmrec.baselines.base import DECAYS, LSA, Auto, Catalogue, Decay, Log, ScoredBaseline, counts, filled, recent
from llmrec.baselines.item_texts import WHITENINGS, TextsConfig, Turned, WhitenedConfig, opened, text_vectors, unit
from llmrec.data.features import FeatureStore
from llmrec.errors import DataError
from llmrec.models.text_encoder import text_embedder
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
    synthetic: FeatureStore | None = None

    def made_up(self, requests: Sequence[Request], config: ContentConfig) -> NDArray[np.float64]:
        """Return the turned vectors of the users' synthetic items, weighed as the oldest event, shape (n, k).

        They are 0 for users without one and for users with more than ``cold`` events, and of length 1 without a store.
        """
        if self.synthetic is None:
            return np.zeros((len(requests), 1))
        vectors, known = self.synthetic.get("synthetic", [request.user_id for request in requests])
        ages = np.array([len(request.history) for request in requests])
        weights = np.where(known & (ages <= config.cold), config.decay ** ages.astype(np.float64), 0.0)
        return np.asarray(weights[:, None] * self.vectors.turn(unit(vectors), config.whitening))


class ContentConfig(WhitenedConfig):
    """Parameters of `Content`."""

    history: Positive = Field(20, description="how many of the latest events count")
    decay: Decay = Field(0.7, description="factor from one event to the one before")
    synthetic: str = Field(
        "", description="store with synthetic items, each of which stands before the events of a user who has few"
    )
    cold: Positive = Field(5, description="such users have so many events at most")

    @property
    def folders(self) -> tuple[str, ...]:
        """Stores of features that are read."""
        return (*super().folders, *((self.synthetic,) if self.synthetic else ()))


class Content(ScoredBaseline[ContentConfig, _Texts]):
    """Scores an item by how much its text resembles that of the latest items of the history.

    Vectors of a fixed text encoder are centred and turned onto their principal directions; direction k with standard
    deviation s_k is divided by ``s_k**whitening`` (after Su et al., arXiv 2103.15316, who whiten wholly). Then
    ``score(j) = v_j . sum_i decay**age(i) v_i`` for vectors of length 1, over the last ``history`` events i. Nothing is
    learned from interactions, so that it ranks items that nobody has chosen.

    With ``synthetic``, an item that a language model made up for a user stands before the events of users who have at
    most ``cold`` (GENRE, Liu et al., WSDM 2024, section 3.3). It is no item of the data: nothing ranks or counts it.
    """

    name = "content"
    Config = ContentConfig
    AUTO = (Auto(11),)
    READS = "texts"
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "whitening": WHITENINGS,
        "decay": DECAYS,
        "history": (1, 2, 3, 5, 10, 20, 50, 100),
    }
    AT_ANSWER: ClassVar[frozenset[str]] = (
        frozenset(ContentConfig.model_fields) - set(TextsConfig.model_fields) - {"synthetic", "cold"}
    )

    def fit(self, data: SplitDataset) -> None:
        """Read the texts of all items.

        Raises:
            DataError: If no item has a text, or synthetic items are of another encoder or split.
            ModelError: If there is no such encoder.
        """
        catalogue = Catalogue.of(data)
        vectors = text_vectors(data, catalogue.ids, self._config)
        popular = counts(Log.of(data, catalogue), catalogue)
        synthetic = _synthetic(data, self._config) if self._config.synthetic else None
        self._model = _Texts(catalogue, Turned.of(vectors), popular, synthetic)

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return the likenesses for every request and item, shape (n, items)."""
        model, config = self._fitted, self._config
        vectors = model.vectors.whitened(config.whitening)
        weights = recent(requests, model.catalogue, config.history, config.decay)
        likeness = (weights @ vectors + model.made_up(requests, config)) @ vectors.T
        # From 1 on, so that popularity, which orders equal ones and decides for an empty history, adds the same to all.
        return filled(1 + likeness - likeness.min(axis=1, keepdims=True, initial=0.0), model.popular)


def _synthetic(data: SplitDataset, config: ContentConfig) -> FeatureStore:
    """Return the store of synthetic items.

    Raises:
        DataError: If it has none, was written from other training interactions, has seen a held-out one, or its vectors
            are not those of the items' encoder.
    """
    store = opened(data, config.synthetic, "synthetic")
    if "synthetic" not in store.kinds:
        raise DataError.at(config.synthetic, "missing-value", " has no synthetic items; set augment.synthetic")
    if config.folders[:-1]:
        ours = FeatureStore.open(config.folders[0]).provenance("item").encoder.get("stamp")
    else:
        ours = None if config.encoder == LSA else text_embedder(config.encoder).stamp
    if ours is None or store.provenance("synthetic").encoder.get("stamp") != ours:
        raise DataError.at(
            config.synthetic,
            "mismatch",
            f" has vectors of another encoder than {config.encoder}; name the one that augment.encoder names",
        )
    return store
