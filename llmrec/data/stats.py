"""Statistics of a data set and its split, and statistics that prompts may show.

Statistics of a user and an item exclude the interaction of the two: the popularity and mean rating of an item would
reveal the rating of a training row included in them. A held-out interaction is in no training split, so training rows
and evaluated requests exclude the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from llmrec.data.read.codes import pair_codes, values_and_codes
from llmrec.data.split import SplitDataset, scale_of
from llmrec.types import Event

_QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}


def statistics(data: SplitDataset) -> dict[str, object]:
    """Return named statistics of a split data set, which can be written as JSON.

    Shares are in [0, 1]. ``tied_last_share`` is the share of users whose last two interactions have the same timestamp,
    so that the tie rule decides which is held out; it is None without timestamps, and so is ``tied_with_history``, the
    share of `tied_history_share`. A held-out interaction is *cold* if its user or its item has no training interaction.
    """
    dataset = data.dataset
    rows = dataset.interactions
    users, items = rows["user_id"].n_unique(), rows["item_id"].n_unique()
    titles = Counter(item.title for item in dataset.items.values())
    return {
        "name": dataset.name,
        "made": dataset.made,
        "users": users,
        "items": items,
        "interactions": rows.height,
        "density": pl.Series(pair_codes(rows["user_id"], rows["item_id"])).n_unique() / (users * items),
        "rating_scale": list(scale_of(data)) if data.train["rating"].null_count() < data.train.height else None,
        "ratings": _rating_histogram(rows),
        "interactions_per_user": _interaction_count_summary(rows, "user_id"),
        "interactions_per_item": _interaction_count_summary(rows, "item_id"),
        "tied_last_share": tied_last_share(rows),
        "tied_with_history": tied_history_share(data),
        "with_text": rows.height - rows["text"].null_count(),
        "shared_titles": sum(count for count in titles.values() if count > 1),
        "split": data.kind,
        "train": data.train.height,
        "valid": data.valid.height,
        "test": data.test.height,
        "history_only": data.known.height,
        "cold_items_valid": _count_cold_holdouts(data.valid, data.train, "item_id"),
        "cold_items_test": _count_cold_holdouts(data.test, data.train, "item_id"),
        "cold_users_valid": _count_cold_holdouts(data.valid, data.train, "user_id"),
        "cold_users_test": _count_cold_holdouts(data.test, data.train, "user_id"),
        "fingerprint": dataset.fingerprint,
        "split_fingerprint": data.fingerprint,
        "provenance": dict(dataset.provenance),
    }


def tied_last_share(rows: pl.DataFrame) -> float | None:
    """Return the share of users with two or more interactions at their last timestamp."""
    if rows["timestamp"].null_count() == rows.height:
        return None
    names, users = values_and_codes(rows["user_id"])
    latest = np.full(len(names), -np.inf)
    times = rows["timestamp"].to_numpy()
    np.fmax.at(latest, users, times)
    tied = np.bincount(users[times == latest[users]], minlength=len(names)) > 1
    return int(tied.sum()) / int((np.bincount(users) > 0).sum())


BASKET_WARNING_SHARE = 0.2
"""Share of `tied_history_share` from which a warning reports that the split divides baskets."""


def tied_history_share(data: SplitDataset) -> float | None:
    """Return the share of held-out interactions at the same time as an interaction of their history.

    When several items are bought or rated at once, the history then contains the rest of the target's basket.
    """
    if not data.dataset.has_time:
        return None
    tied = held = 0
    for part, before in ((data.test, [data.train, data.valid, data.known]), (data.valid, [data.train, data.known])):
        key = ["user_id", "timestamp"]
        # In long histories, only interactions at the time of a target matter.
        near = [rows.select(key).join(part.select(key), on=key, how="semi").unique() for rows in before]
        tied += part.join(pl.concat(near), on=key, how="semi").height
        held += part.height
    return tied / held if held else None


def basket_warning(data: SplitDataset) -> str:
    """Return a warning if the split divides baskets, with the fix; otherwise empty."""
    share = tied_history_share(data)
    if share is None or share <= BASKET_WARNING_SHARE:
        return ""
    return (
        f"{share:.0%} of the held-out interactions of {data.dataset.name} have the same timestamp as an interaction "
        "of their history, for example items of one order, so the history can reveal them. "
        "data.split.kind=last_basket holds out whole orders, global_time everything after a date"
    )


def wide_cutoff_warning(cutoffs: Sequence[int], count: int) -> str:
    """Return a warning if cut-offs are not smaller than the number of ranked items; otherwise empty.

    Args:
        cutoffs: Ranks at which metrics are cut.
        count: Number of items ranked per request.
    """
    wide = sorted(k for k in cutoffs if k >= count)
    if not wide:
        return ""
    return f"{count} items are ranked per request, so HR@{wide[0]} is always 1; use smaller cut-offs"


def _rating_histogram(rows: pl.DataFrame) -> dict[str, int]:
    counts = rows.drop_nulls("rating").group_by("rating").len().sort("rating")
    return {f"{rating:g}": count for rating, count in counts.iter_rows()}


def _interaction_count_summary(rows: pl.DataFrame, column: str) -> dict[str, float]:
    number = np.bincount(values_and_codes(rows[column])[1])
    counts = pl.Series(number[number > 0]).cast(pl.Float64)
    result = {name: counts.quantile(share, interpolation="linear") for name, share in _QUANTILES.items()}
    result["mean"] = rows.height / counts.len()
    return {name: float(value) for name, value in result.items() if value is not None}


def _count_cold_holdouts(held: pl.DataFrame, train: pl.DataFrame, column: str) -> int:
    """Return the number of held-out interactions whose user or item has no training interaction."""
    names, known = values_and_codes(train[column])
    warm = np.bincount(known, minlength=len(names)) > 0
    return int((~warm[values_and_codes(held[column])[1]]).sum())


# Sums of ratings are rounded, because the order of addition must not decide how a mean is rounded.
_DIGITS = 6
# Means are shown in steps of 0.5: from exact means with and without a rating, the rating could be derived.
_MEAN_STEP = 0.5


@dataclass(frozen=True, slots=True)
class RatingSummary:
    """Number and mean rating of a set of interactions.

    Attributes:
        count: Number of interactions.
        rated: Number of rated ones.
        total: Sum of the ratings.
    """

    count: int = 0
    rated: int = 0
    total: float = 0.0

    def __add__(self, other: RatingSummary) -> RatingSummary:
        """Return the counts of both sets."""
        return RatingSummary(self.count + other.count, self.rated + other.rated, self.total + other.total)

    def __sub__(self, other: RatingSummary) -> RatingSummary:
        """Return the counts without a subset of the interactions."""
        return RatingSummary(self.count - other.count, self.rated - other.rated, self.total - other.total)

    @property
    def shown(self) -> dict[str, object] | None:
        """Return the number of interactions and the mean rating, rounded to 0.5; None without interactions."""
        if not self.count:
            return None
        if not self.rated:
            return {"count": self.count, "mean": None}
        halves = round(round(self.total / self.rated, _DIGITS) / _MEAN_STEP)
        return {"count": self.count, "mean": f"{halves * _MEAN_STEP:.1f}"}


class RatingSummaries:
    """Number and mean rating of the training interactions of every user and item."""

    def __init__(self, data: SplitDataset) -> None:
        self._data = data
        self._latest: tuple[str, Mapping[str, RatingSummary]] | None = None

    def user(self, user_id: str, without: Collection[str]) -> RatingSummary:
        """Return the number and mean rating of a user's training interactions, except with given items."""
        by_item = self._user_summaries(user_id)
        return sum((summary for item, summary in by_item.items() if item not in without), RatingSummary())

    def item(self, item_id: str, without: str) -> RatingSummary:
        """Return the number and mean rating of an item's training interactions, except by one user."""
        return self._items.get(item_id, RatingSummary()) - self._user_summaries(without).get(item_id, RatingSummary())

    @cached_property
    def _items(self) -> Mapping[str, RatingSummary]:
        rating = pl.col("rating")
        counted = self._data.train.group_by("item_id").agg(pl.len(), rating.count().alias("rated"), rating.sum())
        return {item: RatingSummary(count, rated, total) for item, count, rated, total in counted.iter_rows()}

    def _user_summaries(self, user_id: str) -> Mapping[str, RatingSummary]:
        """Return the counts of a user by item; cached."""
        if self._latest is None or self._latest[0] != user_id:
            self._latest = user_id, _summaries_by_item(self._data.train_events(user_id))
        return self._latest[1]


def _summaries_by_item(events: Iterable[Event]) -> dict[str, RatingSummary]:
    result: dict[str, RatingSummary] = {}
    for event in events:
        tally = RatingSummary(1, 0, 0.0) if event.rating is None else RatingSummary(1, 1, event.rating)
        result[event.item_id] = result.get(event.item_id, RatingSummary()) + tally
    return result
