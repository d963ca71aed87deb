"""Non-personalised baselines: random order, popularity, and recent popularity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from llmrec.baselines.base import (
    MAX_RANKED_ITEMS,
    AutoSetting,
    C,
    Catalogue,
    InteractionLog,
    NoParameters,
    PositiveFloat,
    ScoredBaseline,
    break_ties_by_popularity,
    invalid_candidates_answer,
    item_counts,
    rank_by_score,
    top_ranking,
    unseen_items,
)
from llmrec.data.hashing import hash_one
from llmrec.recipe.schema import Section

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Answer, Request


@dataclass(frozen=True)
class _ItemWeights:
    """One weight per item, equal for all users."""

    catalogue: Catalogue
    weights: NDArray[np.float64]


class _ConstantScores(ScoredBaseline[C, _ItemWeights]):
    """Scores items by weights that are equal for all users."""

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return the item weights for every request, shape (n, items)."""
        return np.repeat(self._fitted.weights[None, :], len(requests), axis=0)


class Random(_ConstantScores[NoParameters]):
    """Ranks at random: all items have the same score, so metrics are averages over all orders.

    A truncated list is a sample by a hash of the request's id.
    """

    name = "random"
    Config = NoParameters

    def learn(self, data: SplitDataset) -> None:
        """Store the catalogue; nothing is learned."""
        catalogue = Catalogue.of(data)
        self._model = _ItemWeights(catalogue, np.zeros(len(catalogue.ids)))

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Give all candidates the same score.

        Without candidates, all items outside the history get it, truncated to `MAX_RANKED_ITEMS`.
        """
        catalogue = self._fitted.catalogue
        return [self._one(request, catalogue) for request in requests]

    def _one(self, request: Request, catalogue: Catalogue) -> Answer:
        if (refused := invalid_candidates_answer(request)) is not None:
            return refused
        if request.candidates is not None:
            return rank_by_score(request, request.candidates, np.zeros(len(request.candidates)))
        indices = unseen_items(request, catalogue)
        drawn = np.random.default_rng(hash_one("random baseline", 0, request.id)).permutation(indices)[
            :MAX_RANKED_ITEMS
        ]
        result = top_ranking(request, catalogue, drawn, np.zeros(len(drawn)))
        return replace(result, unlisted=len(indices) - len(drawn))


class Popularity(_ConstantScores[NoParameters]):
    """Ranks by the number of training interactions, which is also the score."""

    name = "popularity"
    Config = NoParameters
    AUTO = (AutoSetting(1),)

    def learn(self, data: SplitDataset) -> None:
        """Count the training interactions of every item."""
        catalogue = Catalogue.of(data)
        self._model = _ItemWeights(catalogue, item_counts(InteractionLog.of(data, catalogue), catalogue))


class RecentPopularityConfig(Section):
    """Parameters of `RecentPopularity`."""

    half_life: PositiveFloat = Field(
        0.1, description="Half-life of interaction weights, as a share of all training interactions."
    )


class RecentPopularity(_ConstantScores[RecentPopularityConfig]):
    """Ranks by training interactions with weights that decay with age (Ji et al., SIGIR 2020).

    The age of an interaction is the share of later training interactions; an interaction of age a has the weight
    ``2**(-a / half_life)``. Without timestamps the order between users is unknown, and the age is the position from the
    end of the user's sequence.
    """

    name = "recent-popularity"
    Config = RecentPopularityConfig
    AUTO = (AutoSetting(2),)
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "half_life": (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    }

    def learn(self, data: SplitDataset) -> None:
        """Sum the weighted training interactions of every item."""
        catalogue = Catalogue.of(data)
        log = InteractionLog.of(data, catalogue)
        weights = 0.5 ** (_interaction_ages(log) / self._config.half_life)
        # In a fixed order, so that the order of rows with equal timestamps does not change the sum.
        order = np.lexsort((weights, log.items))
        summed = np.bincount(log.items[order], weights=weights[order], minlength=len(catalogue.ids))
        # The weights of very old interactions may underflow; the count keeps such items above items without any.
        (weighed,) = break_ties_by_popularity(summed[None, :].astype(np.float64), item_counts(log, catalogue))
        self._model = _ItemWeights(catalogue, weighed)


def _interaction_ages(log: InteractionLog) -> NDArray[np.float64]:
    """Return, for each interaction, the share of later interactions; equal timestamps have equal ages."""
    if np.isnan(log.times).all():
        ends = np.cumsum(np.bincount(log.users, minlength=log.user_count))
        lateness = (np.arange(len(log.users)) - ends[log.users] + 1).astype(np.float64)
    else:
        # If only some interactions have a timestamp, the others count as the oldest.
        lateness = np.where(np.isnan(log.times), np.nanmin(log.times), log.times)
    ordered = np.sort(lateness)
    return (len(ordered) - np.searchsorted(ordered, lateness, side="right")) / len(ordered)
