"""Shared code of rating baselines: ratings as indices, ridge biases, and clipping of predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from llmrec.baselines.base import Decay
from llmrec.data.split import scale_of
from llmrec.errors import DataError
from llmrec.recipe.schema import Section
from llmrec.types import Answer, Rating, Request, Unparsed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset

    #: Predicts the ratings of items for the user of one request, before clipping, shape (n,).
    OfItems = Callable[[Sequence[str]], NDArray[np.float64]]

RECENCIES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)
"""Weights of the latest ratings that tuning tries."""

# Prior strength of a decayed mean, in ratings.
_RECENCY_PRIOR = 2.0
# When ridge biases count as solved, and after how many rounds at most.
_TOLERANCE, _MAX_ROUNDS = 1e-10, 1000


class RecencyConfig(Section):
    """Parameters of a correction by the latest ratings in the history."""

    recency: float = Field(
        0.6, ge=0, description="Weight of the correction by recent errors on the history's ratings. 0: no correction."
    )
    decay: Decay = Field(0.7, description="Decay of older ratings: weight of a rating relative to the next newer one.")


@dataclass(frozen=True)
class Ratings:
    """Training ratings with user and item indices, their mean, and the rating scale.

    ``order`` ascends along the sequence of each user.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    values: NDArray[np.float64]
    order: NDArray[np.int64]
    user_index: Mapping[str, int]
    item_index: Mapping[str, int]
    mean: float
    scale: tuple[float, float]


def training_ratings(data: SplitDataset, name: str) -> Ratings:
    """Return the training ratings, with indices into sorted users and items.

    Raises:
        DataError: If the training interactions carry no ratings.
    """
    rated = data.train.drop_nulls("rating").select("user_id", "item_id", "rating").with_row_index("order")
    if rated.is_empty():
        raise DataError(
            f"the baseline {name!r} needs ratings, but the training interactions of {data.dataset.name!r} have no "
            "ratings; set data.columns.rating to the rating column, or remove the rating task",
            kind="missing-column",
            at=data.dataset.name,
            column="rating",
        )
    # Sum in a fixed order, so that the order of rows in the file does not change the result.
    rated = rated.sort("user_id", "item_id", "rating", "order")
    user_names, users = np.unique(np.array(rated["user_id"].to_list(), dtype=object), return_inverse=True)
    item_names, items = np.unique(np.array(rated["item_id"].to_list(), dtype=object), return_inverse=True)
    values = rated["rating"].to_numpy().astype(np.float64)
    return Ratings(
        users=users.astype(np.int64),
        items=items.astype(np.int64),
        values=values,
        order=rated["order"].to_numpy().astype(np.int64),
        user_index={user: index for index, user in enumerate(user_names.tolist())},
        item_index={item: index for index, item in enumerate(item_names.tolist())},
        mean=float(values.mean()),
        scale=scale_of(data),
    )


def ridge_biases(
    known: Ratings, user_penalty: float, item_penalty: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Solve for user and item biases in turn, until no user bias changes by more than `_TOLERANCE`."""
    residual = known.values - known.mean
    user_weight = np.bincount(known.users) + user_penalty
    item_weight = np.bincount(known.items) + item_penalty
    of_users, of_items = np.zeros(len(user_weight)), np.zeros(len(item_weight))
    for _ in range(_MAX_ROUNDS):
        of_items = np.bincount(known.items, weights=residual - of_users[known.users]) / item_weight
        updated = np.bincount(known.users, weights=residual - of_items[known.items]) / user_weight
        step = float(np.abs(updated - of_users).max())
        of_users = updated
        if step < _TOLERANCE:
            break
    return of_users, of_items


def rate_requests(
    requests: Sequence[Request], scale: tuple[float, float], predict: Callable[[str, str, Request], float]
) -> list[Answer]:
    """Answer every request with ``predict(user, item, request)``, clipped to the rating scale."""
    low, high = scale
    answers: list[Answer] = []
    for request in requests:
        if request.item is None:
            answers.append(Unparsed(request_id=request.id, reason="the request has no item to rate"))
            continue
        value = min(high, max(low, predict(request.user_id, request.item, request)))
        answers.append(Rating(request_id=request.id, value=value))
    return answers


def rate_with_recency(
    requests: Sequence[Request],
    scale: tuple[float, float],
    model: Callable[[Request], OfItems],
    config: RecencyConfig,
) -> list[Answer]:
    """Correct the predictions of a model by its errors on the latest ratings in the history of the request.

    A user's level drifts (Koren, CACM 2010, section 4, where ``b_user`` is a function of time). Here it changes by
    ``recency * sum_t decay**age(t) * e(t) / (sum_t decay**age(t) + 2)`` for the errors e of the model on the ratings t
    of the history, age 0 for the latest.

    Args:
        requests: Requests with histories, also of unknown users.
        scale: The scale to which answers are clipped.
        model: Predicts for the user of a request.
        config: Weight and decay.
    """

    def predict(user: str, item: str, request: Request) -> float:
        of_items = model(request)
        value = float(of_items([item])[0])
        rated = [(event.item_id, event.rating) for event in request.history if event.rating is not None]
        if not rated or not config.recency:
            return value
        errors = np.array([rating for _, rating in rated]) - of_items([name for name, _ in rated])
        weights = config.decay ** np.arange(len(rated) - 1, -1, -1, dtype=np.float64)
        return value + config.recency * float((weights * errors).sum() / (weights.sum() + _RECENCY_PRIOR))

    return rate_requests(requests, scale, predict)


def fold_in_user_bias(request: Request, mean: float, of_item: Callable[[str], float], user_penalty: float) -> float:
    """Estimate the bias of an unknown user from the ratings in the history; 0 without ratings."""
    residuals = [event.rating - mean - of_item(event.item_id) for event in request.history if event.rating is not None]
    return sum(residuals) / (len(residuals) + user_penalty)
