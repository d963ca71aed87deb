"""CTR baselines: predict from counts whether the user will like the item.

A rating of ``liked`` or more is a like. User features are computed from the history in the request, item features from
training ratings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from scipy import sparse

from llmrec.baselines.base import Baseline, Decay, PositiveFloat
from llmrec.baselines.rated import training_ratings
from llmrec.baselines.rating_features import RatingCounts, RequestFeatures
from llmrec.recipe.schema import Section
from llmrec.types import Answer, Probability, Request, Unparsed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset


class LikeRatioConfig(Section):
    """Parameters of `LikeRatio`."""

    liked: float | None = Field(
        None,
        description="Lowest rating that counts as a like. `null`: the value at three quarters of the rating scale.",
    )


class LikeRatio(Baseline[LikeRatioConfig, RatingCounts]):
    """Predicts the share of liked items in the user's history, regardless of the item.

    On the released prompts of TALLRec (Bao et al., RecSys 2023) this rule reaches the AUC that is reported for the
    fine-tuned model, so yes/no results should be compared with it. Its within-user AUC is 0.5 if histories do not
    change.
    """

    name = "like-ratio"
    Config = LikeRatioConfig

    def learn(self, data: SplitDataset) -> None:
        """Compute the share of likes in training.

        Raises:
            DataError: If the training interactions carry no ratings.
        """
        self._model = RatingCounts.of(training_ratings(data, self.name), self._config.liked)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Predict the share of likes in each history; without ratings, the share in training."""
        model = self._fitted
        return _probability_answers(requests, np.array([model.of_history(request)[0] for request in requests]))


@dataclass(frozen=True)
class _LogisticModel:
    """A linear model: weighted features, plus user weight, item weight and intercept."""

    counted: RequestFeatures
    weights: NDArray[np.float64]
    bias: float
    of_users: Mapping[str, float]
    of_items: Mapping[str, float]


class LogisticConfig(LikeRatioConfig):
    """Parameters of `Logistic`."""

    penalty: PositiveFloat = Field(1.0, description="L2 penalty.")
    features: Literal["counts", "recent", "ids"] = Field(
        "recent",
        description="Additional features. `recent`: the user's latest ratings; `ids`: also a weight per user and per "
        "item.",
    )
    decay: Decay = Field(
        0.8, description="`recent`: decay of older ratings, the weight relative to the next newer one."
    )
    id_penalty: PositiveFloat = Field(100.0, description="`ids`: L2 penalty of user and item weights.")


class Logistic(Baseline[LogisticConfig, _LogisticModel]):
    """Logistic regression on counts of user and item; see `llmrec.baselines.rating_features.RequestFeatures`.

    ``features=recent`` adds the user's recent ratings, weighted by ``decay``, and ``features=ids`` a one-hot encoding
    of training users and items. Weights minimise the mean log-loss plus
    ``penalty / (2 n) * |w|**2`` over standardised features, with an unpenalised bias and ``id_penalty`` for users and
    items; the minimum is unique.
    """

    name = "logistic"
    Config = LogisticConfig
    GRID: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "features": ("counts", "recent", "ids"),
        "penalty": (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0, 100000.0),
        "decay": (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0),
        "id_penalty": (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
    }

    def learn(self, data: SplitDataset) -> None:
        """Fit the weights on training ratings.

        Raises:
            DataError: If the training interactions carry no ratings.
        """
        config = self._config
        decay = config.decay if config.features == "recent" else None
        counted, known, rows = RequestFeatures.of(data, self.name, config.liked, decay)
        truth = (known.values >= counted.counts.liked).astype(np.float64)
        size = rows.shape[1]
        penalties = np.full(size, config.penalty)
        users: Mapping[str, int] = known.user_index if config.features == "ids" else {}
        items: Mapping[str, int] = known.item_index if config.features == "ids" else {}
        if users:
            row_numbers, ones = np.arange(len(truth)), np.ones(len(truth))
            of_users = sparse.csr_array((ones, (row_numbers, known.users)), shape=(len(truth), len(users)))
            of_items = sparse.csr_array((ones, (row_numbers, known.items)), shape=(len(truth), len(items)))
            rows = sparse.hstack([sparse.csr_array(rows), of_users, of_items]).tocsr()
            penalties = np.append(penalties, np.full(len(users) + len(items), config.id_penalty))
        weights = _fit_weights(rows, truth, penalties)
        self._model = _LogisticModel(
            counted=counted,
            weights=weights[:size],
            bias=float(weights[-1]),
            of_users={name: float(weights[size + index]) for name, index in users.items()},
            of_items={name: float(weights[size + len(users) + index]) for name, index in items.items()},
        )

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Predict the probability that the user likes the item, for each request."""
        model = self._fitted
        # One row at a time, so that the last bits do not depend on the batch size.
        scores = np.array([(model.counted.row(request) * model.weights).sum() for request in requests]) + model.bias
        ids = [model.of_users.get(r.user_id, 0.0) + model.of_items.get(r.item or "", 0.0) for r in requests]
        return _probability_answers(requests, 1 / (1 + np.exp(-(scores + np.array(ids)))))


def _fit_weights(features: Any, truth: NDArray[np.float64], penalties: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weights followed by the intercept.

    Args:
        features: Dense or sparse features, shape (n, k).
        truth: Labels, 0 or 1, shape (n,).
        penalties: Penalty of each squared weight, shape (k,).
    """
    signs, size = 2 * truth - 1, len(truth)

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margins = signs * (features @ weights[:-1] + weights[-1])
        pull = -signs / (1 + np.exp(np.clip(margins, -700, 700))) / size
        gradient = np.append(features.T @ pull + penalties / size * weights[:-1], pull.sum())
        value = np.logaddexp(0, -margins).mean() + float(penalties @ weights[:-1] ** 2) / (2 * size)
        return float(value), gradient

    # Importing scipy takes 0.1 s, which most commands do not need.
    from scipy.optimize import minimize

    result = minimize(loss, np.zeros(features.shape[1] + 1), jac=True, method="L-BFGS-B", options={"gtol": 1e-9})
    best: NDArray[np.float64] = result.x
    return best


def _probability_answers(requests: Sequence[Request], values: NDArray[np.float64]) -> list[Answer]:
    return [
        Unparsed(request_id=request.id, reason="the request has no item to judge")
        if request.item is None
        else Probability(request_id=request.id, value=float(value))
        for request, value in zip(requests, values, strict=True)
    ]
