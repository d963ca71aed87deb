"""Yes/no controls: will the user like the item, judged by shares of likes that anybody could count.

A rating of ``liked`` or more is a like. What is known of a user at request time is the history that the request
carries, as for every other baseline; what is known of an item are its training ratings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from scipy import sparse
from scipy.optimize import minimize

from llmrec.baselines.base import AboveZero, Baseline, Decay
from llmrec.baselines.rated import Ratings, ratings
from llmrec.data.split import threshold
from llmrec.recipe.schema import Section
from llmrec.types import Answer, Probability, Request, Unparsed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset

# A share of likes is drawn towards the share of all ratings as if by this many ratings more.
_PRIOR = 1.0
# And what a rating is above or below, towards 0: of an item, and of a user as a whole and lately.
_OF_ITEM, _OF_USER, _LATELY = 3.0, 10.0, 2.0
# Spread of a feature, by its size or 1, below which it counts as the same in every row.
_ROUNDING = 1e-9


class LikeRatioConfig(Section):
    """Parameters of `LikeRatio`."""

    liked: float | None = Field(None, description="lowest rating that is a like; None: three quarters up the scale")


class LikeRatio(Baseline[LikeRatioConfig, "_Counts"]):
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
        self._model = _Counts.of(ratings(data, self.name), self._config.liked)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer with the share of likes in each history; the share of training where it holds no rating."""
        model = self._fitted
        return _say(requests, np.array([model.of_history(request)[0] for request in requests]))


@dataclass(frozen=True)
class _Counts:
    """Likes, number and sum of the ratings of each item in training, and share of likes and mean of all of them."""

    liked: float
    share: float
    mean: float
    item_index: Mapping[str, int]
    likes: NDArray[np.float64]
    counts: NDArray[np.float64]
    sums: NDArray[np.float64]

    @staticmethod
    def of(known: Ratings, liked: float | None) -> _Counts:
        level = threshold(known.scale, liked)
        yes = (known.values >= level).astype(np.float64)
        size = len(known.item_index)
        return _Counts(
            liked=level,
            share=float(yes.mean()),
            mean=known.mean,
            item_index=known.item_index,
            likes=np.bincount(known.items, weights=yes, minlength=size).astype(np.float64),
            counts=np.bincount(known.items, minlength=size).astype(np.float64),
            sums=np.bincount(known.items, weights=known.values, minlength=size).astype(np.float64),
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

    def level(self, item: str) -> float:
        """Return how far an item's mean is above that of all ratings, drawn towards 0; 0 for an unknown item."""
        place = self.item_index.get(item)
        return 0.0 if place is None else float(self.levels[place])

    @cached_property
    def levels(self) -> NDArray[np.float64]:
        """The levels of all items, shape (items,)."""
        return (self.sums - self.counts * self.mean) / (self.counts + _OF_ITEM)

    def residuals(self, request: Request) -> NDArray[np.float64]:
        """Return by how much each rating of a history is above its item's level, oldest first."""
        return np.array(
            [
                event.rating - self.mean - self.level(event.item_id)
                for event in request.history
                if event.rating is not None
            ]
        )


@dataclass(frozen=True)
class _Linear:
    """Standardised features times weights, plus a weight of the user, one of the item, and a bias."""

    counts: _Counts
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    weights: NDArray[np.float64]
    bias: float
    of_users: Mapping[str, float]
    of_items: Mapping[str, float]


class LogisticConfig(LikeRatioConfig):
    """Parameters of `Logistic`."""

    penalty: AboveZero = Field(1.0, description="weight of the squared weights")
    features: Literal["counts", "recent", "ids"] = Field(
        "recent",
        description="recent: also how the user has rated lately; ids: also a weight for each user and each item",
    )
    decay: Decay = Field(0.8, description="of features=recent: factor from one rating of the user to the one before")
    id_penalty: AboveZero = Field(
        100.0, description="of features=ids: weight of the squares of users' and items' weights"
    )


class Logistic(Baseline[LogisticConfig, _Linear]):
    """Logistic regression on what is counted of the user and of the item.

    Six features: the user's and the item's share of likes and number of ratings, the item's mean rating, and the mean
    by which the user's ratings are above those of their items. Shares enter as log-odds, numbers as ``log(1 + n)``,
    means drawn towards 0. In training each rating is taken out of what describes it, so that no row tells its own
    answer. ``features=recent`` adds that mean over the ratings before, fading by ``decay`` (users drift: Koren, CACM
    2010), and ``features=ids`` a weight for each user and item of training, as in a one-hot encoding. Weights minimise
    the mean log-loss plus ``penalty / (2 n) * |w|**2`` over standardised features, with a free bias and ``id_penalty``
    for users and items; the minimum is the only one.
    """

    name = "logistic"
    Config = LogisticConfig
    GRID: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "features": ("counts", "recent", "ids"),
        "penalty": (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0, 100000.0),
        "decay": (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0),
        "id_penalty": (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
    }

    def fit(self, data: SplitDataset) -> None:
        """Fit the weights on the training ratings.

        Raises:
            DataError: If the training interactions carry no ratings.
        """
        known, config = ratings(data, self.name), self._config
        found = _Counts.of(known, config.liked)
        truth = (known.values >= found.liked).astype(np.float64)
        features = _others(known, truth, found)
        if config.features == "recent":
            features = np.column_stack([features, _before(known, found, config.decay)])
        mean, scale = features.mean(axis=0), features.std(axis=0)
        # A feature that is the same in every row has a spread of rounding errors, which may not be blown up to 1.
        scale[scale <= _ROUNDING * np.maximum(np.abs(mean), 1.0)] = 1.0
        rows: Any = (features - mean) / scale
        size = rows.shape[1]
        penalties = np.full(size, config.penalty)
        users: Mapping[str, int] = known.user_index if config.features == "ids" else {}
        items: Mapping[str, int] = known.item_index if config.features == "ids" else {}
        if users:
            each, ones = np.arange(len(truth)), np.ones(len(truth))
            of_users = sparse.csr_array((ones, (each, known.users)), shape=(len(truth), len(users)))
            of_items = sparse.csr_array((ones, (each, known.items)), shape=(len(truth), len(items)))
            rows = sparse.hstack([sparse.csr_array(rows), of_users, of_items]).tocsr()
            penalties = np.append(penalties, np.full(len(users) + len(items), config.id_penalty))
        weights = _weights(rows, truth, penalties)
        self._model = _Linear(
            counts=found,
            mean=mean,
            scale=scale,
            weights=weights[:size],
            bias=float(weights[-1]),
            of_users={name: float(weights[size + place]) for name, place in users.items()},
            of_items={name: float(weights[size + len(users) + place]) for name, place in items.items()},
        )

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer with the probability that each request's item is liked."""
        model = self._fitted
        rows = np.array([self._row(request) for request in requests]).reshape(-1, len(model.weights))
        # One row at a time, so that the last bits do not depend on how many requests come together.
        scores = ((rows - model.mean) / model.scale * model.weights).sum(axis=1) + model.bias
        ids = [model.of_users.get(r.user_id, 0.0) + model.of_items.get(r.item or "", 0.0) for r in requests]
        return _say(requests, 1 / (1 + np.exp(-(scores + np.array(ids)))))

    def _row(self, request: Request) -> list[float]:
        """Return the features of a request."""
        found, item, decay = self._fitted.counts, request.item or "", self._config.decay
        (user_share, user_count), (item_share, item_count) = found.of_history(request), found.of_item(item)
        left = found.residuals(request)
        row = [_odds(user_share), float(np.log1p(user_count)), _odds(item_share), float(np.log1p(item_count))]
        row += [found.level(item), float(left.sum() / (len(left) + _OF_USER))]
        if self._config.features == "recent":
            weights = decay ** np.arange(len(left) - 1, -1, -1, dtype=np.float64)
            row.append(float((weights * left).sum() / (weights.sum() + _LATELY)))
        return row


def _odds(share: float) -> float:
    inside = min(max(share, 1e-6), 1 - 1e-6)
    return float(np.log(inside / (1 - inside)))


def _others(known: Ratings, truth: NDArray[np.float64], found: _Counts) -> NDArray[np.float64]:
    """Return the features of every training rating, shape (n, 6), counted over all ratings but itself."""
    columns = []
    for places in (known.users, known.items):
        count = np.bincount(places)[places] - 1.0
        likes = np.bincount(places, weights=truth)[places] - truth
        share = np.clip((likes + _PRIOR * found.share) / (count + _PRIOR), 1e-6, 1 - 1e-6)
        columns += [np.log(share / (1 - share)), np.log1p(count)]
    count = found.counts[known.items] - 1
    columns.append((found.sums[known.items] - known.values - count * found.mean) / (count + _OF_ITEM))
    left = known.values - found.mean - found.levels[known.items]
    whole, size = np.bincount(known.users, weights=left), np.bincount(known.users)
    columns.append((whole[known.users] - left) / (size[known.users] - 1 + _OF_USER))
    return np.stack(columns, axis=1)


def _before(known: Ratings, found: _Counts, decay: float) -> NDArray[np.float64]:
    """Return the fading mean of the user's residuals before every training rating, shape (n,)."""
    left = known.values - found.mean - found.levels[known.items]
    order = np.lexsort((known.order, known.users))
    sizes = np.bincount(known.users)
    starts, means = np.cumsum(sizes) - sizes, np.zeros(len(left))
    total, weight = np.zeros(len(sizes)), np.zeros(len(sizes))
    # The first ratings of all users, then the second ones, and so on.
    for step in range(int(sizes.max())):
        users = np.flatnonzero(sizes > step)
        rows = order[starts[users] + step]
        means[rows] = total[users] / (weight[users] + _LATELY)
        total[users] = decay * total[users] + left[rows]
        weight[users] = decay * weight[users] + 1
    return means


def _weights(features: Any, truth: NDArray[np.float64], penalties: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weights and, last, the bias.

    Args:
        features: Dense or sparse, shape (n, k).
        truth: 0 or 1, shape (n,).
        penalties: Of each squared weight, shape (k,).
    """
    signs, size = 2 * truth - 1, len(truth)

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margins = signs * (features @ weights[:-1] + weights[-1])
        pull = -signs / (1 + np.exp(np.clip(margins, -700, 700))) / size
        gradient = np.append(features.T @ pull + penalties / size * weights[:-1], pull.sum())
        value = np.logaddexp(0, -margins).mean() + float(penalties @ weights[:-1] ** 2) / (2 * size)
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
