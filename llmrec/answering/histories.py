"""What the users of a data set did, found by their ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.data.codes import codes
from llmrec.types import Event


@dataclass(frozen=True)
class Histories:
    """Past events of the users of a data set, oldest first.

    Attributes:
        users: Sorted.
        starts: Where each user's rows begin, shape (users + 1,).
        items: Item of each row.
        ratings: Rating of each row; NaN: none.
        times: Time of each row; NaN: none.
    """

    users: pl.Series
    starts: NDArray[np.int64]
    items: pl.Series
    ratings: NDArray[np.float64]
    times: NDArray[np.float64]

    @classmethod
    def of(cls, interactions: pl.DataFrame) -> Histories:
        """Sort a table of interactions by user and time; rows without a time stand first, in the table's order."""
        names, rows = codes(interactions["user_id"])
        times = interactions["timestamp"].cast(pl.Float64).fill_null(np.nan).to_numpy()
        order = np.lexsort((np.where(np.isnan(times), -np.inf, times), rows))
        return cls(
            users=names,
            starts=np.searchsorted(rows[order], np.arange(len(names) + 1)),
            items=interactions["item_id"].gather(order),
            ratings=interactions["rating"].cast(pl.Float64).fill_null(np.nan).to_numpy()[order],
            times=times[order],
        )

    @classmethod
    def none(cls) -> Histories:
        """Return those of nobody."""
        empty = pl.Series(dtype=pl.String)
        return cls(empty, np.zeros(1, dtype=np.int64), empty, np.empty(0), np.empty(0))

    def of_user(self, user_id: str) -> list[Event]:
        """Return a user's events; none of a user who is not known."""
        if not len(self.users):
            return []
        place = int(self.users.search_sorted(user_id))
        if place >= len(self.users) or self.users[place] != user_id:
            return []
        rows = range(int(self.starts[place]), int(self.starts[place + 1]))
        return [
            Event(
                item_id=str(self.items[row]),
                rating=None if np.isnan(self.ratings[row]) else float(self.ratings[row]),
                timestamp=None if np.isnan(self.times[row]) else float(self.times[row]),
            )
            for row in rows
        ]
