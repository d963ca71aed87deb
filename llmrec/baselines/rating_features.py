"""Features of users and items for CTR baselines, computed from counts of ratings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from llmrec.baselines.rated import Ratings, training_ratings
from llmrec.data.split import liked_threshold
from llmrec.types import Request

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset

    #: Features of the training ratings, shape (n, k).
    Rows = NDArray[np.float64]

# Prior strength, in ratings: shares of likes are shrunk towards the overall share.
_LIKES_PRIOR = 1.0
# Prior strengths for residuals of ratings, which are shrunk towards 0: items, users, and recent ratings of users.
_ITEM_PRIOR, _USER_PRIOR, _RECENT_PRIOR = 3.0, 10.0, 2.0
# A feature whose standard deviation relative to max(mean, 1) is smaller than this counts as constant.
_CONSTANT_TOLERANCE = 1e-9


@dataclass(frozen=True)
class RatingCounts:
    """Likes, number and sum of ratings per item in training, and the overall share of likes and mean rating."""

    liked: float
    share: float
    mean: float
    item_index: Mapping[str, int]
    likes: NDArray[np.float64]
    counts: NDArray[np.float64]
    sums: NDArray[np.float64]

    @staticmethod
    def of(known: Ratings, liked: float | None) -> RatingCounts:
        """Count training ratings; ``liked`` is the lowest rating of a like, by default three quarters of the scale."""
        level = liked_threshold(known.scale, liked)
        yes = (known.values >= level).astype(np.float64)
        size = len(known.item_index)
        return RatingCounts(
            liked=level,
            share=float(yes.mean()),
            mean=known.mean,
            item_index=known.item_index,
            likes=np.bincount(known.items, weights=yes, minlength=size).astype(np.float64),
            counts=np.bincount(known.items, minlength=size).astype(np.float64),
            sums=np.bincount(known.items, weights=known.values, minlength=size).astype(np.float64),
        )

    def of_history(self, request: Request) -> tuple[float, int]:
        """Return the share of likes in a history, shrunk towards the overall share, and the number of ratings."""
        known = [event.rating >= self.liked for event in request.history if event.rating is not None]
        return (sum(known) + _LIKES_PRIOR * self.share) / (len(known) + _LIKES_PRIOR), len(known)

    def of_item(self, item: str) -> tuple[float, float]:
        """Return the share of likes of an item, shrunk towards the overall share, and its number of ratings."""
        index = self.item_index.get(item)
        if index is None:
            return self.share, 0.0
        count = float(self.counts[index])
        return (float(self.likes[index]) + _LIKES_PRIOR * self.share) / (count + _LIKES_PRIOR), count

    def level(self, item: str) -> float:
        """Return an item's mean rating minus the overall mean, shrunk towards 0; 0 for an unknown item."""
        index = self.item_index.get(item)
        return 0.0 if index is None else float(self.levels[index])

    @cached_property
    def levels(self) -> NDArray[np.float64]:
        """Mean rating minus the overall mean of every item, shrunk towards 0, shape (items,)."""
        return (self.sums - self.counts * self.mean) / (self.counts + _ITEM_PRIOR)

    def residuals(self, request: Request) -> NDArray[np.float64]:
        """Return each rating of a history minus the mean of its item, oldest first."""
        return np.array(
            [
                event.rating - self.mean - self.level(event.item_id)
                for event in request.history
                if event.rating is not None
            ]
        )


@dataclass(frozen=True)
class RequestFeatures:
    """Standardised features of the user and item of a request.

    There are six: the user's and the item's share of likes and number of ratings, the item's mean rating, and the mean
    of the user's ratings minus the levels of their items. Shares are log-odds, numbers ``log(1 + n)``, and means are
    shrunk towards 0. With a ``decay`` there is a seventh: the same user mean with decaying weights (users drift: Koren,
    CACM 2010).

    Attributes:
        counts: The training counts.
        mean: Mean of each feature before standardisation, shape (k,).
        scale: Scale of each feature, shape (k,).
        decay: Factor from one rating of the user to the previous one; None: no seventh feature.
    """

    counts: RatingCounts
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    decay: float | None

    @staticmethod
    def of(
        data: SplitDataset, name: str, liked: float | None, decay: float | None, *, before: bool = False
    ) -> tuple[RequestFeatures, Ratings, Rows]:
        """Return the features, the training ratings, and the leave-one-out features of each rating.

        User features include ratings that occur only in histories, as in a request's history; item features use
        training ratings only.

        Args:
            data: The split.
            name: The name of the baseline, for the error message.
            liked: The lowest rating that is a like; None: three quarters of the scale.
            decay: The decay of the seventh feature; None: six features.
            before: Use only the user's previous ratings, as for a request, instead of all others.

        Raises:
            DataError: If the training interactions carry no ratings.
        """
        known = training_ratings(data, name)
        counts = RatingCounts.of(known, liked)
        past = _RatingHistory.of(data, known, counts)
        rows = _leave_one_out_features(known, counts, past, before=before)
        if decay is not None:
            rows = np.column_stack([rows, _earlier_residual_means(past, decay)])
        mean, scale = rows.mean(axis=0), rows.std(axis=0)
        # The standard deviation of a constant feature is a rounding error, which must not be scaled to 1.
        scale[scale <= _CONSTANT_TOLERANCE * np.maximum(np.abs(mean), 1.0)] = 1.0
        return RequestFeatures(counts, mean, scale, decay), known, (rows - mean) / scale

    def row(self, request: Request) -> NDArray[np.float64]:
        """Return the features of a request, shape (k,)."""
        return np.asarray((np.array(self.plain(request)) - self.mean) / self.scale)

    def plain(self, request: Request) -> list[float]:
        """Return the features of a request before standardisation."""
        counts, item = self.counts, request.item or ""
        (user_share, user_count), (item_share, item_count) = counts.of_history(request), counts.of_item(item)
        residuals = counts.residuals(request)
        row = [_log_odds(user_share), float(np.log1p(user_count)), _log_odds(item_share), float(np.log1p(item_count))]
        row += [counts.level(item), float(residuals.sum() / (len(residuals) + _USER_PRIOR))]
        if self.decay is not None:
            weights = self.decay ** np.arange(len(residuals) - 1, -1, -1, dtype=np.float64)
            row.append(float((weights * residuals).sum() / (weights.sum() + _RECENT_PRIOR)))
        return row


def _log_odds(share: float) -> float:
    inside = min(max(share, 1e-6), 1 - 1e-6)
    return float(np.log(inside / (1 - inside)))


@dataclass(frozen=True)
class _RatingHistory:
    """All ratings of training users in time order, including ratings that are only history.

    Attributes:
        users: User indices as in `Ratings`, shape (n,), ascending.
        likes: 1 for a like, shape (n,).
        residuals: Rating minus its item's level, shape (n,).
        train_rows: Index of each training rating among these, in the order of `Ratings`, shape (training,).
    """

    users: NDArray[np.int64]
    likes: NDArray[np.float64]
    residuals: NDArray[np.float64]
    train_rows: NDArray[np.int64]

    def summed(self, values: NDArray[np.float64], *, before: bool) -> NDArray[np.float64]:
        """Return, for each training rating, the sum over the user's other (or earlier) ratings."""
        if not before:
            return np.bincount(self.users, weights=values)[self.users][self.train_rows] - values[self.train_rows]
        running = np.cumsum(values) - values
        starts = np.concatenate([[True], self.users[1:] != self.users[:-1]])
        first = np.maximum.accumulate(np.where(starts, np.arange(len(values)), 0))
        return np.asarray((running - running[first])[self.train_rows])

    @staticmethod
    def of(data: SplitDataset, known: Ratings, counts: RatingCounts) -> _RatingHistory:
        train = data.train.drop_nulls("rating").select("user_id", "item_id", "rating", "timestamp")
        early = data.known.drop_nulls("rating").select("user_id", "item_id", "rating", "timestamp")
        frames = [entry.with_columns(pl.col("user_id", "item_id").cast(pl.String)) for entry in (early, train)]
        combined = pl.concat(frames).with_row_index("_row")
        user_index = combined["user_id"].replace_strict(dict(known.user_index), default=None, return_dtype=pl.Int64)
        combined = combined.with_columns(user_index.alias("_user")).drop_nulls("_user")
        # A given split may hold out ratings that are older than training ratings.
        keys = ["_user", "timestamp", "_row"] if data.kind == "given" else ["_user", "_row"]
        combined = combined.sort(keys)
        levels = np.append(counts.levels, 0.0)
        items = np.array([known.item_index.get(item, len(levels) - 1) for item in combined["item_id"]], dtype=np.int64)
        values = combined["rating"].to_numpy().astype(np.float64)
        rows = combined["_row"].to_numpy().astype(np.int64) - early.height
        train_rows = np.empty(train.height, dtype=np.int64)
        train_rows[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
        return _RatingHistory(
            users=combined["_user"].to_numpy().astype(np.int64),
            likes=(values >= counts.liked).astype(np.float64),
            residuals=values - counts.mean - levels[items],
            train_rows=train_rows[known.order],
        )


def _leave_one_out_features(
    known: Ratings, counts: RatingCounts, past: _RatingHistory, *, before: bool = False
) -> Rows:
    """Return the leave-one-out features of all training ratings, shape (n, 6).

    With ``before``, user features use only previous ratings.
    """
    truth = (known.values >= counts.liked).astype(np.float64)
    summands = (np.ones(len(past.likes)), past.likes, past.residuals)
    count, likes, residuals = (past.summed(item, before=before) for item in summands)
    columns = []
    of_item = np.bincount(known.items)[known.items] - 1.0
    liked = np.bincount(known.items, weights=truth)[known.items] - truth
    for number, yes in ((count, likes), (of_item, liked)):
        share = np.clip((yes + _LIKES_PRIOR * counts.share) / (number + _LIKES_PRIOR), 1e-6, 1 - 1e-6)
        columns += [np.log(share / (1 - share)), np.log1p(number)]
    columns.append((counts.sums[known.items] - known.values - of_item * counts.mean) / (of_item + _ITEM_PRIOR))
    columns.append(residuals / (count + _USER_PRIOR))
    return np.stack(columns, axis=1)


def _earlier_residual_means(past: _RatingHistory, decay: float) -> NDArray[np.float64]:
    """Return the decayed mean of the user's residuals before each training rating, shape (n,)."""
    sizes = np.bincount(past.users)
    starts, means = np.cumsum(sizes) - sizes, np.zeros(len(past.residuals))
    total, weight = np.zeros(len(sizes)), np.zeros(len(sizes))
    # First the first ratings of all users, then the second ones, and so on.
    for step in range(int(sizes.max())):
        users = np.flatnonzero(sizes > step)
        rows = starts[users] + step
        means[rows] = total[users] / (weight[users] + _RECENT_PRIOR)
        total[users] = decay * total[users] + past.residuals[rows]
        weight[users] = decay * weight[users] + 1
    return means[past.train_rows]
