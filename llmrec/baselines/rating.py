"""Rating controls: means and biases of the training ratings.

Every prediction is clipped to the rating scale. An unknown user is judged by the ratings in the request's history,
if there are any: they are known at the time of the request, and nothing was learned from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmrec.baselines.fitted import fitted
from llmrec.errors import DataError
from llmrec.types import Answer, Rating, Request, Unparsed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset


@dataclass(frozen=True)
class _Ratings:
    """Training ratings as numbers, with their mean and the scale they are clipped to."""

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    values: NDArray[np.float64]
    user_index: Mapping[str, int]
    item_index: Mapping[str, int]
    mean: float
    scale: tuple[float, float]


@dataclass(frozen=True)
class _Levels:
    """The global mean, and a mean or a bias for each user and item."""

    mean: float
    by_user: Mapping[str, float]
    by_item: Mapping[str, float]
    scale: tuple[float, float]


class GlobalMean:
    """Predicts the mean of all training ratings."""

    name = "global-mean"

    def __init__(self, *, seed: int = 0) -> None:
        self._model: _Levels | None = None

    def fit(self, data: SplitDataset) -> None:
        """Take the mean.

        Raises:
            DataError: If the training interactions carry no ratings.
        """
        self._model = _means(_ratings(data, self.name))

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Predict the rating of each request's item."""
        model = fitted(self._model, self.name)
        return _rate(requests, model.scale, lambda user, item, request: model.mean)


class UserMean:
    """Predicts the mean of the user's ratings; for users without any the item's mean, then the global one."""

    name = "user-mean"

    def __init__(self, *, seed: int = 0) -> None:
        self._model: _Levels | None = None

    def fit(self, data: SplitDataset) -> None:
        """Take the means.

        Raises:
            DataError: If the training interactions carry no ratings.
        """
        self._model = _means(_ratings(data, self.name))

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Predict the rating of each request's item."""
        model = fitted(self._model, self.name)

        def predict(user: str, item: str, request: Request) -> float:
            if user in model.by_user:
                return model.by_user[user]
            known = [event.rating for event in request.history if event.rating is not None]
            return sum(known) / len(known) if known else model.by_item.get(item, model.mean)

        return _rate(requests, model.scale, predict)


class ItemMean:
    """Predicts the mean of the item's ratings; for items without any the global one."""

    name = "item-mean"

    def __init__(self, *, seed: int = 0) -> None:
        self._model: _Levels | None = None

    def fit(self, data: SplitDataset) -> None:
        """Take the means.

        Raises:
            DataError: If the training interactions carry no ratings.
        """
        self._model = _means(_ratings(data, self.name))

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Predict the rating of each request's item."""
        model = fitted(self._model, self.name)
        return _rate(requests, model.scale, lambda user, item, request: model.by_item.get(item, model.mean))


class UserItemBias:
    """Predicts ``mean + b_user + b_item`` (Koren et al., IEEE Computer 2009, equation 3).

    The biases minimise the squared error on the training ratings plus ``user_penalty * sum(b_user**2)`` and
    ``item_penalty * sum(b_item**2)``. Solving for one side with the other one fixed is closed, and alternating goes
    to the only minimum.
    """

    name = "user-item-bias"

    def __init__(self, *, user_penalty: float = 5.0, item_penalty: float = 3.0, seed: int = 0) -> None:
        """Set up.

        Args:
            user_penalty: Ridge penalty of user biases; above 0.
            item_penalty: Ridge penalty of item biases; above 0.
            seed: Not used; nothing here is random.
        """
        if user_penalty <= 0 or item_penalty <= 0:
            raise ValueError(f"penalties must be above 0, not {user_penalty} and {item_penalty}")
        self._user_penalty = user_penalty
        self._item_penalty = item_penalty
        self._model: _Levels | None = None

    def fit(self, data: SplitDataset) -> None:
        """Solve for the biases.

        Raises:
            DataError: If the training interactions carry no ratings.
        """
        known = _ratings(data, self.name)
        of_users, of_items = _solve(known, self._user_penalty, self._item_penalty)
        self._model = _Levels(
            mean=known.mean,
            by_user={user: float(of_users[place]) for user, place in known.user_index.items()},
            by_item={item: float(of_items[place]) for item, place in known.item_index.items()},
            scale=known.scale,
        )

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Predict the rating of each request's item; an unknown item's bias is 0."""
        model = fitted(self._model, self.name)

        def predict(user: str, item: str, request: Request) -> float:
            own = model.by_user[user] if user in model.by_user else self._from_history(request, model)
            return model.mean + own + model.by_item.get(item, 0.0)

        return _rate(requests, model.scale, predict)

    def _from_history(self, request: Request, model: _Levels) -> float:
        left = [
            event.rating - model.mean - model.by_item.get(event.item_id, 0.0)
            for event in request.history
            if event.rating is not None
        ]
        return sum(left) / (len(left) + self._user_penalty)


# --------------------------------------------------------------------------- parts


def _ratings(data: SplitDataset, name: str) -> _Ratings:
    rated = data.train.drop_nulls("rating").select("user_id", "item_id", "rating")
    if rated.is_empty():
        raise DataError(
            f"the baseline {name!r} needs ratings, and the training interactions of {data.dataset.name!r} have none; "
            "name the rating column under data.columns.rating, or leave the rating task out"
        )
    # A canonical order of sums, so that the order of rows in the file cannot move the last bits.
    rated = rated.sort("user_id", "item_id", "rating")
    user_names, users = np.unique(np.array(rated["user_id"].to_list(), dtype=object), return_inverse=True)
    item_names, items = np.unique(np.array(rated["item_id"].to_list(), dtype=object), return_inverse=True)
    values = rated["rating"].to_numpy().astype(np.float64)
    low, high = data.dataset.rating_scale or (float(values.min()), float(values.max()))
    return _Ratings(
        users=users.astype(np.int64),
        items=items.astype(np.int64),
        values=values,
        user_index={user: place for place, user in enumerate(user_names.tolist())},
        item_index={item: place for place, item in enumerate(item_names.tolist())},
        mean=float(values.mean()),
        scale=(low, high),
    )


def _means(known: _Ratings) -> _Levels:
    def group(places: NDArray[np.int64], index: Mapping[str, int]) -> dict[str, float]:
        means = np.bincount(places, weights=known.values) / np.bincount(places)
        return {name: float(means[place]) for name, place in index.items()}

    return _Levels(
        mean=known.mean,
        by_user=group(known.users, known.user_index),
        by_item=group(known.items, known.item_index),
        scale=known.scale,
    )


def _solve(
    known: _Ratings, user_penalty: float, item_penalty: float, *, tolerance: float = 1e-10, rounds: int = 1000
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Alternate between user and item biases until no user's moves by more than ``tolerance``."""
    residual = known.values - known.mean
    user_weight = np.bincount(known.users) + user_penalty
    item_weight = np.bincount(known.items) + item_penalty
    of_users, of_items = np.zeros(len(user_weight)), np.zeros(len(item_weight))
    for _ in range(rounds):
        of_items = np.bincount(known.items, weights=residual - of_users[known.users]) / item_weight
        moved = np.bincount(known.users, weights=residual - of_items[known.items]) / user_weight
        step = float(np.abs(moved - of_users).max())
        of_users = moved
        if step < tolerance:
            break
    return of_users, of_items


def _rate(
    requests: Sequence[Request], scale: tuple[float, float], predict: Callable[[str, str, Request], float]
) -> list[Answer]:
    low, high = scale
    answers: list[Answer] = []
    for request in requests:
        if request.item is None:
            answers.append(Unparsed(request_id=request.id, reason="the request names no item to rate"))
            continue
        value = min(high, max(low, predict(request.user_id, request.item, request)))
        answers.append(Rating(request_id=request.id, value=value))
    return answers
