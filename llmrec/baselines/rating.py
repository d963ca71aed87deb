"""Rating baselines: means and biases of training ratings.

Every prediction is clipped to the rating scale. The level of an unknown user is computed from the ratings in the
request's history, if there are any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from llmrec.baselines.base import DECAYS, Baseline, NoParameters, PositiveFloat
from llmrec.baselines.rated import (
    RECENCIES,
    Ratings,
    RecencyConfig,
    fold_in_user_bias,
    rate_requests,
    rate_with_recency,
    ridge_biases,
    training_ratings,
)
from llmrec.types import Answer, Request

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.baselines.rated import OfItems
    from llmrec.data.split import SplitDataset


@dataclass(frozen=True)
class _RatingLevels:
    """The global mean, and a mean or bias for each user and item."""

    mean: float
    by_user: Mapping[str, float]
    by_item: Mapping[str, float]
    scale: tuple[float, float]


class _MeanBaseline(Baseline[NoParameters, _RatingLevels]):
    Config = NoParameters

    def learn(self, data: SplitDataset) -> None:
        """Compute the mean ratings.

        Raises:
            DataError: If the training interactions carry no ratings.
        """
        self._model = _mean_ratings(training_ratings(data, self.name))


class GlobalMean(_MeanBaseline):
    """Predicts the mean of all training ratings."""

    name = "global-mean"

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Predict the rating of the item in each request."""
        model = self._fitted
        return rate_requests(requests, model.scale, lambda user, item, request: model.mean)


class UserMean(_MeanBaseline):
    """Predicts the user's mean rating, or else the item's mean rating, or else the global mean."""

    name = "user-mean"

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Predict the rating of the item in each request."""
        model = self._fitted

        def predict(user: str, item: str, request: Request) -> float:
            if user in model.by_user:
                return model.by_user[user]
            known = [event.rating for event in request.history if event.rating is not None]
            return sum(known) / len(known) if known else model.by_item.get(item, model.mean)

        return rate_requests(requests, model.scale, predict)


class ItemMean(_MeanBaseline):
    """Predicts the mean rating of the item; for items without ratings, the global mean."""

    name = "item-mean"

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Predict the rating of the item in each request."""
        model = self._fitted
        return rate_requests(requests, model.scale, lambda user, item, request: model.by_item.get(item, model.mean))


class UserItemBiasConfig(RecencyConfig):
    """Parameters of `UserItemBias`."""

    user_penalty: PositiveFloat = Field(5.0, description="L2 penalty of user biases.")
    item_penalty: PositiveFloat = Field(3.0, description="L2 penalty of item biases.")


class UserItemBias(Baseline[UserItemBiasConfig, _RatingLevels]):
    """Predicts ``mean + b_user + b_item`` (Koren et al., IEEE Computer 2009, equation 3), corrected by recent errors.

    The biases minimise the squared error on the training ratings plus ``user_penalty * sum(b_user**2)`` and
    ``item_penalty * sum(b_item**2)``. Alternating the closed-form solutions for users and items converges to the unique
    minimum. `rated.rate_with_recency` computes the correction from the latest ratings of the history.
    """

    name = "user-item-bias"
    Config = UserItemBiasConfig
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "user_penalty": (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0),
        "item_penalty": (0.03, 0.1, 0.3, 1.0, 3.0, 5.0, 10.0, 20.0),
        "recency": RECENCIES,
        "decay": DECAYS,
    }
    AT_ANSWER: ClassVar[frozenset[str]] = frozenset({"recency", "decay"})

    def learn(self, data: SplitDataset) -> None:
        """Compute the user and item biases.

        Raises:
            DataError: If the training interactions carry no ratings.
        """
        known = training_ratings(data, self.name)
        of_users, of_items = ridge_biases(known, self._config.user_penalty, self._config.item_penalty)
        self._model = _RatingLevels(
            mean=known.mean,
            by_user={user: float(of_users[index]) for user, index in known.user_index.items()},
            by_item={item: float(of_items[index]) for item, index in known.item_index.items()},
            scale=known.scale,
        )

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Predict the rating of the item in each request; the bias of an unknown item is 0."""
        model = self._fitted

        def of_item(item: str) -> float:
            return model.by_item.get(item, 0.0)

        def of_user(request: Request) -> OfItems:
            bias = model.by_user.get(request.user_id)
            if bias is None:
                bias = fold_in_user_bias(request, model.mean, of_item, self._config.user_penalty)
            level = model.mean + bias
            return lambda items: np.array([level + of_item(item) for item in items])

        return rate_with_recency(requests, model.scale, of_user, self._config)


def _mean_ratings(known: Ratings) -> _RatingLevels:
    def group(indices: NDArray[np.int64], index_of: Mapping[str, int]) -> dict[str, float]:
        means = np.bincount(indices, weights=known.values) / np.bincount(indices)
        return {name: float(means[index]) for name, index in index_of.items()}

    return _RatingLevels(
        mean=known.mean,
        by_user=group(known.users, known.user_index),
        by_item=group(known.items, known.item_index),
        scale=known.scale,
    )
