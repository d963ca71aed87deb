"""Interactions by user, stored as columns of numbers and item codes; `Event` objects are created on request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.data.read.codes import UserRowRanges, values_and_codes
from llmrec.types import Event

# Number of `Event` objects to cache (about 130 bytes each), because they are requested repeatedly.
_CACHE_SIZE = 1_000_000


class Events:
    """The interactions by user, without copies of the columns.

    Args:
        frame: Columns of `llmrec.data.dataset.SCHEMA`, with each user's rows in time order.
    """

    def __init__(self, frame: pl.DataFrame) -> None:
        users, rows = values_and_codes(frame["user_id"])
        if (rows[1:] < rows[:-1]).any():
            order = np.argsort(rows, kind="stable")
            frame, rows = frame[order], rows[order]
        self._runs = UserRowRanges(users, rows)
        names, self._items = values_and_codes(frame["item_id"])
        self._names = names.to_list()
        self._ratings, self._times = (_float_column(frame[name]) for name in ("rating", "timestamp"))
        self._texts = None if frame["text"].null_count() == frame.height else frame["text"]
        self._cache: OrderedDict[str, tuple[Event, ...]] = OrderedDict()
        self._cached = 0

    def counts(self, *, rated: bool) -> Mapping[str, int]:
        """Return the number of interactions (or rated interactions) by user."""
        all_rows = np.ones(len(self._items), dtype=bool)
        has_rating = ~np.isnan(self._ratings) if self._ratings is not None else np.zeros_like(all_rows)
        sums = np.concatenate([[0], np.cumsum(has_rating if rated else all_rows)])
        result = np.diff(sums[self._runs.ends])
        present = result > 0
        return dict(zip(self._runs.users.filter(present).to_list(), result[present].tolist(), strict=True))

    def of(self, user: str) -> tuple[Event, ...]:
        """Return the interactions of a user in time order; empty for an unknown user."""
        result = self._cache.get(user)
        if result is not None:
            self._cache.move_to_end(user)
            return result
        result = self._create(user)
        if result:
            self._cache[user] = result
            self._cached += len(result)
            while self._cached > _CACHE_SIZE:
                self._cached -= len(self._cache.popitem(last=False)[1])
        return result

    def _create(self, user: str) -> tuple[Event, ...]:
        part = self._runs.of(user)
        count = part.stop - part.start
        if not count:
            return ()
        nothing = [None] * count
        ratings, times = (
            nothing if values is None else [None if np.isnan(value) else value for value in values[part].tolist()]
            for values in (self._ratings, self._times)
        )
        texts = nothing if self._texts is None else self._texts[part].to_list()
        names = self._names
        return tuple(
            Event(item_id=names[item], rating=rating, timestamp=time, text=text)
            for item, rating, time, text in zip(self._items[part].tolist(), ratings, times, texts, strict=True)
        )


def _float_column(series: pl.Series) -> NDArray[np.float64] | None:
    """Return a column as floats with NaN for null; None if all values are null."""
    return None if series.null_count() == len(series) else series.cast(pl.Float64).fill_null(np.nan).to_numpy()
