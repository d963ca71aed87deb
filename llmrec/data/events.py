"""Events of users in columns: numbers and codes of items lie in arrays, and `Event` objects are made when asked for."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.types import Event

# Events that are kept as objects, some 130 bytes each, since they are asked for again and again.
_KEPT = 1_000_000


class Events:
    """The events of a frame by user. A row takes four bytes for its item and eight for a rating and a time each.

    Args:
        frame: The columns of `llmrec.data.dataset.SCHEMA`; the rows of a user in their order in time.
    """

    def __init__(self, frame: pl.DataFrame) -> None:
        if not frame["user_id"].is_sorted():
            frame = frame.sort("user_id", maintain_order=True)
        runs = frame["user_id"].rle().struct.unnest()
        ends = np.cumsum(runs["len"].to_numpy(), dtype=np.int64)
        self._ends = np.concatenate([[0], ends])
        self._rows = dict(zip(runs["value"].to_list(), range(len(runs)), strict=True))
        self._names = frame["item_id"].unique(maintain_order=True).to_list()
        self._items = frame["item_id"].cast(pl.Enum(self._names)).to_physical().to_numpy().astype(np.int32)
        self._ratings, self._times = (_numbers(frame[name]) for name in ("rating", "timestamp"))
        self._texts = None if frame["text"].null_count() == frame.height else frame["text"]
        self._kept: OrderedDict[str, tuple[Event, ...]] = OrderedDict()
        self._held = 0

    def count(self, user: str) -> int:
        """Return how many events a user has."""
        row = self._rows.get(user)
        return 0 if row is None else int(self._ends[row + 1] - self._ends[row])

    def of(self, user: str) -> tuple[Event, ...]:
        """Return a user's events in order; none for a user without any."""
        found = self._kept.get(user)
        if found is not None:
            self._kept.move_to_end(user)
            return found
        found = self._made(user)
        if found:
            self._kept[user] = found
            self._held += len(found)
            while self._held > _KEPT:
                self._held -= len(self._kept.popitem(last=False)[1])
        return found

    def _made(self, user: str) -> tuple[Event, ...]:
        row = self._rows.get(user)
        if row is None:
            return ()
        part = slice(int(self._ends[row]), int(self._ends[row + 1]))
        count, names = part.stop - part.start, self._names
        nothing = [None] * count
        ratings, times = (
            nothing if each is None else [None if np.isnan(value) else value for value in each[part].tolist()]
            for each in (self._ratings, self._times)
        )
        texts = nothing if self._texts is None else self._texts[part].to_list()
        return tuple(
            Event(item_id=names[item], rating=rating, timestamp=time, text=text)
            for item, rating, time, text in zip(self._items[part].tolist(), ratings, times, texts, strict=True)
        )


def _numbers(series: pl.Series) -> NDArray[np.float64] | None:
    """Return a column with NaN where it is null, which no finite number is; None if all of it is."""
    return None if series.null_count() == len(series) else series.cast(pl.Float64).fill_null(np.nan).to_numpy()
