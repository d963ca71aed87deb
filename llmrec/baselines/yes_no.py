"""Yes/no controls: will the user like the item, judged by shares of likes that anybody could count.

A rating of ``liked`` or more is a like. What is known of a user at request time is the history that the request
carries, as for every other baseline; what is known of an item are its training ratings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field
from scipy.optimize import minimize

from llmrec.baselines.base import AboveZero, Baseline
from llmrec.baselines.rated import Ratings, ratings
from llmrec.data.split import threshold
from llmrec.recipe.schema import Section
from llmrec.types import Answer, Probability, Request, Unparsed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset

# A share of likes is drawn towards the share of all ratings as if by this many ratings more.
_PRIOR = 1.0
# Spread of a feature, by its size or 1, below which it counts as the same in every row.
_ROUNDING = 1e-9


class LikeRatioConfig(Section):
    """Parameters of `LikeRatio`."""

    liked: float | None = Field(None, description="lowest rating that is a like; None: three quarters up the scale")


class LikeRatio(Baseline[LikeRatioConfig, "_Shares"]):
    """Answers with the share of liked items in the request's history, and does not look at the item.

    On the released prompts of TALLRec (Bao et al., RecSys 2023) this rule reaches the AUC that is reported for the
    tuned model, so a yes/no figure says little without it. Inside one user it says the same of every item: its
    within-user AUC is 0.5 where histories do not change.
    """

    name = "like-ratio"
    Config = LikeRatioConfig

    def fit(self, data: SplitDataset) -> None:
        """Count the likes of training.

        Raises:
            DataError: If the training interactions carry no ratings.
        """
        self._model = _Shares.of(ratings(data, self.name), self._config.liked)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer with the share of likes in each history; the share of training where it holds no rating."""
        model = self._fitted
        return _say(requests, np.array([model.of_history(request)[0] for request in requests]))


@dataclass(frozen=True)
class _Shares:
    """Likes and ratings of each item in training, and the share of likes in all of it."""

    liked: float
    share: float
    item_index: Mapping[str, int]
    likes: NDArray[np.float64]
    counts: NDArray[np.float64]

    @staticmethod
    def of(known: Ratings, liked: float | None) -> _Shares:
        level = threshold(known.scale, liked)
        yes = (known.values >= level).astype(np.float64)
        size = len(known.item_index)
        return _Shares(
            liked=level,
            share=float(yes.mean()),
            item_index=known.item_index,
            likes=np.bincount(known.items, weights=yes, minlength=size).astype(np.float64),
            counts=np.bincount(known.items, minlength=size).astype(np.float64),
        )

    def of_history(self, request: Request) -> tuple[float, int]:
        """Return the share of likes in a history, drawn towards that of training, and how many ratings it holds."""
        known = [event.rating >= self.liked for event in request.history if event.rating is not None]
        return (sum(known) + _PRIOR * self.share) / (len(known) + _PRIOR), len(known)

    def of_item(self, item: str) -> tuple[float, float]:
        """Return the share of likes of an item, drawn the same way, and its number of training ratings."""
        place = self.item_index.get(item)
        if place is None:
            return self.share, 0.0
        count = float(self.counts[place])
        return (float(self.likes[place]) + _PRIOR * self.share) / (count + _PRIOR), count


@dataclass(frozen=True)
class _Linear:
    """Standardised features times weights, plus a bias."""

    shares: _Shares
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    weights: NDArray[np.float64]


class LogisticConfig(LikeRatioConfig):
    """Parameters of `Logistic`."""

    penalty: AboveZero = Field(1.0, description="weight of the squared weights")


class Logistic(Baseline[LogisticConfig, _Linear]):
    """Logistic regression on four counts: the user's and the item's share of likes and number of ratings.

    Shares enter as log-odds, numbers as ``log(1 + n)``. In training each rating is taken out of the shares that
    describe it, so that no row tells its own answer. Weights minimise the mean log-loss plus
    ``penalty / (2 n) * |w|**2`` over standardised features, with a free bias; the minimum is the only one.
    """

    name = "logistic"
    Config = LogisticConfig
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {"penalty": (0.1, 1.0, 10.0, 100.0)}

    def fit(self, data: SplitDataset) -> None:
        """Fit the weights on the training ratings.

        Raises:
            DataError: If the training interactions carry no ratings.
        """
        known = ratings(data, self.name)
        shares = _Shares.of(known, self._config.liked)
        truth = (known.values >= shares.liked).astype(np.float64)
        features = _others(known, truth, shares)
        mean, scale = features.mean(axis=0), features.std(axis=0)
        # A feature that is the same in every row has a spread of rounding errors, which may not be blown up to 1.
        scale[scale <= _ROUNDING * np.maximum(np.abs(mean), 1.0)] = 1.0
        weights = _weights((features - mean) / scale, truth, self._config.penalty)
        self._model = _Linear(shares=shares, mean=mean, scale=scale, weights=weights)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer with the probability that each request's item is liked."""
        model = self._fitted
        rows = [
            _row(*model.shares.of_history(request), *model.shares.of_item(request.item or "")) for request in requests
        ]
        features = (np.array(rows).reshape(-1, 4) - model.mean) / model.scale
        # One row at a time, so that the last bits do not depend on how many requests come together.
        scores = (features * model.weights[:-1]).sum(axis=1) + model.weights[-1]
        return _say(requests, 1 / (1 + np.exp(-scores)))


def _row(user_share: float, user_count: float, item_share: float, item_count: float) -> list[float]:
    return [_odds(user_share), np.log1p(user_count), _odds(item_share), np.log1p(item_count)]


def _odds(share: float) -> float:
    inside = min(max(share, 1e-6), 1 - 1e-6)
    return float(np.log(inside / (1 - inside)))


def _others(known: Ratings, truth: NDArray[np.float64], shares: _Shares) -> NDArray[np.float64]:
    """Return the features of every training rating, shape (n, 4), counted over all ratings but itself."""
    columns = []
    for places in (known.users, known.items):
        count = np.bincount(places)[places] - 1.0
        likes = np.bincount(places, weights=truth)[places] - truth
        share = np.clip((likes + _PRIOR * shares.share) / (count + _PRIOR), 1e-6, 1 - 1e-6)
        columns += [np.log(share / (1 - share)), np.log1p(count)]
    return np.stack(columns, axis=1)


def _weights(features: NDArray[np.float64], truth: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
    """Return the weights and, last, the bias."""
    signs, size = 2 * truth - 1, len(truth)

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margins = signs * (features @ weights[:-1] + weights[-1])
        pull = -signs / (1 + np.exp(np.clip(margins, -700, 700))) / size
        gradient = np.append(features.T @ pull + penalty / size * weights[:-1], pull.sum())
        value = np.logaddexp(0, -margins).mean() + penalty / (2 * size) * float(weights[:-1] @ weights[:-1])
        return float(value), gradient

    found = minimize(loss, np.zeros(features.shape[1] + 1), jac=True, method="L-BFGS-B", options={"gtol": 1e-9})
    best: NDArray[np.float64] = found.x
    return best


def _say(requests: Sequence[Request], values: NDArray[np.float64]) -> list[Answer]:
    return [
        Unparsed(request_id=request.id, reason="the request names no item to judge")
        if request.item is None
        else Probability(request_id=request.id, value=float(value))
        for request, value in zip(requests, values, strict=True)
    ]
