"""Markov models: transitions from the last item or several latest items, optionally with co-occurrence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field
from scipy import sparse

from llmrec.baselines.base import (
    DECAYS,
    AutoSetting,
    Catalogue,
    Decay,
    InteractionLog,
    NoParameters,
    ScoredBaseline,
    break_ties_by_popularity,
    item_counts,
    windowed_recency_weights,
)
from llmrec.recipe.schema import Positive, Section

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Request


@dataclass(frozen=True)
class _Transitions:
    """Weighted counts of item j after item i, shape (items, items), and popularity."""

    catalogue: Catalogue
    after: Any
    popular: NDArray[np.float64]


class MarkovConfig(Section):
    """Parameters of `Markov`; defaults were chosen on the validation split of MovieLens-100K."""

    order: Positive = Field(10, description="Number of latest items to use; also the maximum distance of a transition.")
    decay: Decay = Field(0.85, description="Decay of older interactions: weight relative to the next newer one.")


class Markov(ScoredBaseline[MarkovConfig, _Transitions]):
    """Scores items by how often they follow the latest history items in training sequences.

    A transition from i to j at distance d counts ``decay**(d - 1)``, for d up to ``order``; at request time the last
    ``order`` items vote with ``decay**age``. Popularity orders items without votes, below all items with votes, and
    breaks ties.
    """

    name = "markov"
    Config = MarkovConfig
    AUTO = (AutoSetting(4),)
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "order": (1, 2, 3, 5, 7, 10, 15, 20, 30),
        "decay": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95),
    }

    def learn(self, data: SplitDataset) -> None:
        """Count transitions in the training sequences of all users."""
        self._model = _fit_transitions(data, self._config.order, self._config.decay)

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return the weighted transition counts for every request and item, shape (n, items)."""
        return _transition_scores(self._fitted, requests, self._config.order, self._config.decay)


class FirstOrder(ScoredBaseline[NoParameters, _Transitions]):
    """First-order Markov chain (Rendle et al., WWW 2010, section 4.1, without factorisation).

    Scores are the direct transitions from the last item; popularity orders the other items.
    """

    name = "markov-1"
    Config = NoParameters
    AUTO = (AutoSetting(3),)

    def learn(self, data: SplitDataset) -> None:
        """Count transitions between consecutive items in the training sequences of all users."""
        self._model = _fit_transitions(data, 1, 1.0)

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return the transition counts from the last history item, shape (n, items)."""
        return _transition_scores(self._fitted, requests, 1, 1.0)


@dataclass(frozen=True)
class _TransitionsWithCooccurrence:
    """Transitions and normalised co-occurrences, shape (items, items) each, and popularity."""

    catalogue: Catalogue
    after: Any
    together: Any
    popular: NDArray[np.float64]


class MarkovCooccurrenceConfig(Section):
    """Parameters of `MarkovCooccurrence`."""

    history: Positive = Field(20, description="Number of latest interactions to use for co-occurrence.")
    decay: Decay = Field(0.8, description="Decay of older interactions: weight relative to the next newer one.")
    transition: float = Field(
        1.0, ge=0, description="Weight of a transition from the last item, relative to co-occurrence."
    )


class MarkovCooccurrence(ScoredBaseline[MarkovCooccurrenceConfig, _TransitionsWithCooccurrence]):
    """Adds co-occurrence with all history items to transitions from the last item.

    ``score(i) = transition * steps(last, i) + sum_j decay**age(j) * both(j, i) / sqrt(pop(j) * pop(i) + 1)`` over the
    last ``history`` interactions j, where ``steps`` counts direct transitions, ``both`` pairs of interactions of one
    user and ``pop`` interactions, all in training. Popularity orders items with neither, and breaks ties. On Amazon's
    sparse shop data this model outperforms many published neural results.
    """

    name = "markov-cooccurrence"
    Config = MarkovCooccurrenceConfig
    AUTO = (AutoSetting(7),)
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "transition": (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        "decay": DECAYS,
        "history": (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100),
    }
    AT_ANSWER: ClassVar[frozenset[str]] = frozenset(MarkovCooccurrenceConfig.model_fields)

    def learn(self, data: SplitDataset) -> None:
        """Count transitions and co-occurrences in the training sequences of all users."""
        catalogue = Catalogue.of(data)
        log = InteractionLog.of(data, catalogue)
        size, popular = len(catalogue.ids), item_counts(log, catalogue)
        users = log.matrix(size)
        # Only pairs of different interactions: an item that a user chose once does not co-occur with itself.
        both = (users.T @ users - sparse.diags_array(popular)).tocoo()
        scale = np.sqrt(popular[both.row] * popular[both.col] + 1)
        together = sparse.csr_array((both.data / scale, (both.row, both.col)), shape=(size, size))
        together.eliminate_zeros()
        self._model = _TransitionsWithCooccurrence(
            catalogue=catalogue,
            after=_decayed_transitions(log, size, 1, 1.0),
            together=together,
            popular=popular,
        )

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return the sum of transitions and co-occurrences for every request, shape (n, items)."""
        model = self._fitted
        last = self._config.transition * (windowed_recency_weights(requests, model.catalogue, 1, 1.0) @ model.after)
        total = (
            windowed_recency_weights(requests, model.catalogue, self._config.history, self._config.decay)
            @ model.together
            + last
        )
        return break_ties_by_popularity(total.toarray(), model.popular)


def _fit_transitions(data: SplitDataset, order: int, decay: float) -> _Transitions:
    catalogue = Catalogue.of(data)
    log = InteractionLog.of(data, catalogue)
    return _Transitions(
        catalogue, _decayed_transitions(log, len(catalogue.ids), order, decay), item_counts(log, catalogue)
    )


def _transition_scores(
    model: _Transitions, requests: Sequence[Request], order: int, decay: float
) -> NDArray[np.float64]:
    votes = windowed_recency_weights(requests, model.catalogue, order, decay) @ model.after
    return break_ties_by_popularity(votes.toarray(), model.popular)


def _decayed_transitions(log: InteractionLog, size: int, order: int, decay: float) -> Any:
    """Return decayed transition counts over up to ``order`` positions, sparse, shape (items, items)."""
    after = log.steps(1, size)
    for gap in range(2, order + 1):
        after = after + log.steps(gap, size, decay ** (gap - 1))
    return after
