"""What the rating baselines share: numbered ratings, ridge biases, and the way predictions become answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmrec.data.split import scale_of
from llmrec.errors import DataError
from llmrec.types import Answer, Rating, Request, Unparsed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset


@dataclass(frozen=True)
class Ratings:
    """Training ratings as numbers, with their mean and the scale they are clipped to."""

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    values: NDArray[np.float64]
    user_index: Mapping[str, int]
    item_index: Mapping[str, int]
    mean: float
    scale: tuple[float, float]


def ratings(data: SplitDataset, name: str) -> Ratings:
    """Number the training ratings, users and items in sorted order.

    Raises:
        DataError: If the training interactions carry no ratings.
    """
    rated = data.train.drop_nulls("rating").select("user_id", "item_id", "rating")
    if rated.is_empty():
        raise DataError(
            f"the baseline {name!r} needs ratings, and the training interactions of {data.dataset.name!r} have none; "
            "name the rating column under data.columns.rating, or leave the rating task out",
            kind="missing-column",
            at=data.dataset.name,
            column="rating",
        )
    # A canonical order of sums, so that the order of rows in the file cannot move the last bits.
    rated = rated.sort("user_id", "item_id", "rating")
    user_names, users = np.unique(np.array(rated["user_id"].to_list(), dtype=object), return_inverse=True)
    item_names, items = np.unique(np.array(rated["item_id"].to_list(), dtype=object), return_inverse=True)
    values = rated["rating"].to_numpy().astype(np.float64)
    return Ratings(
        users=users.astype(np.int64),
        items=items.astype(np.int64),
        values=values,
        user_index={user: place for place, user in enumerate(user_names.tolist())},
        item_index={item: place for place, item in enumerate(item_names.tolist())},
        mean=float(values.mean()),
        scale=scale_of(data),
    )


def ridge_biases(
    known: Ratings, user_penalty: float, item_penalty: float, *, tolerance: float = 1e-10, rounds: int = 1000
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


def rate(
    requests: Sequence[Request], scale: tuple[float, float], predict: Callable[[str, str, Request], float]
) -> list[Answer]:
    """Answer every request with ``predict(user, item, request)``, clipped to the scale."""
    low, high = scale
    answers: list[Answer] = []
    for request in requests:
        if request.item is None:
            answers.append(Unparsed(request_id=request.id, reason="the request names no item to rate"))
            continue
        value = min(high, max(low, predict(request.user_id, request.item, request)))
        answers.append(Rating(request_id=request.id, value=value))
    return answers


def bias_of_history(request: Request, mean: float, of_item: Callable[[str], float], user_penalty: float) -> float:
    """Return the ridge bias of an unknown user from the ratings in the request's history, 0 without any."""
    left = [event.rating - mean - of_item(event.item_id) for event in request.history if event.rating is not None]
    return sum(left) / (len(left) + user_penalty)
