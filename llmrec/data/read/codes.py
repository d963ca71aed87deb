"""Ids as integer codes: a column is stored as indices into its sorted values, with at most four bytes per row."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.data.read.limits import MAX_EXACT_INTEGER

PAIR_COLUMNS = ["user_id", "item_id"]


def encode_ids(ids: pl.Series) -> pl.Series:
    """Convert a column of ids to codes, which are indices into its sorted values."""
    if isinstance(ids.dtype, pl.Enum):
        return ids
    result = ids.cast(pl.String).to_arrow().dictionary_encode()
    # Arrow's own conversion to numpy imports pandas, if it is installed.
    rows = pl.Series(result.indices).to_numpy()
    return coded_column(ids.name, pl.Series(result.dictionary, dtype=pl.String), [rows])


def coded_column(name: str, values: pl.Series, numbers: Iterable[NDArray[np.integer]]) -> pl.Series:
    """Build a coded column from a list of values and indices into the list."""
    order = values.arg_sort()
    rank = np.empty(len(values), dtype=np.uint32)
    rank[order.to_numpy()] = np.arange(len(values), dtype=np.uint32)
    result = np.concatenate([np.empty(0, dtype=np.uint32), *(rank[part] for part in numbers)])
    return pl.Series(name, result).cat.to(pl.Enum(values.gather(order)))


def concatenate_coded(name: str, parts: Sequence[pl.Series]) -> pl.Series:
    """Return the concatenation of coded columns."""
    known = [values_and_codes(series) for series in parts]
    values = pl.concat([part for part, _ in known]).unique().sort()
    return coded_column(name, values, (values.search_sorted(part).to_numpy()[rows] for part, rows in known))


def convert_whole_floats(series: pl.Series) -> pl.Series:
    """Return floats as integers if all are whole; other columns unchanged.

    Other libraries convert integers to floats, which must not change ids.
    """
    if not series.dtype.is_float():
        return series
    series = series.fill_nan(None)
    integral = ((series == series.round(0)) & (series.abs() < MAX_EXACT_INTEGER)).all()
    return series.cast(pl.Int64) if integral else series


def values_and_codes(ids: pl.Series) -> tuple[pl.Series, NDArray[np.integer]]:
    """Return the sorted values of a coded column, and the code of every row, shape (n,).

    A value need not occur: a subset of a table has the codes of the whole table.
    """
    ids = encode_ids(ids)
    assert isinstance(ids.dtype, pl.Enum)
    return ids.dtype.categories, ids.to_physical().to_numpy()


def map_ids_to_indices(ids: pl.Series, number: Callable[[Sequence[str]], NDArray[np.int64]]) -> NDArray[np.int32]:
    """Return the index of the id in each row, shape (n,); every distinct id is looked up only once.

    Args:
        ids: Names by row.
        number: Returns the numbers of names.
    """
    names, row_codes = values_and_codes(ids)
    return number(names.to_list()).astype(np.int32)[row_codes] if len(names) else np.empty(0, dtype=np.int32)


class SortedNames:
    """The sorted values of a coded column; a value is looked up by bisection, without a dictionary."""

    def __init__(self, values: pl.Series) -> None:
        self._values = values.to_arrow()

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> str:
        return str(self._values[index])

    def code(self, name: str) -> int | None:
        """Return the code of a value; None for an unknown one."""
        index = bisect_left(self, name)
        return index if index < len(self) and self[index] == name else None


class UserRowRanges:
    """The row range of every user, in a table grouped by user.

    Attributes:
        users: The users by code, sorted.
        ends: The first row of each user, followed by the number of rows, shape (users + 1,).
    """

    def __init__(self, users: pl.Series, rows: NDArray[np.integer]) -> None:
        """Find the row range of every user, given the users by code and the code of each row's user, in any order."""
        self.users, self._names = users, SortedNames(users)
        self.ends = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(users)))])

    def of(self, user: str) -> slice:
        """Return the row range of a user; empty for an unknown one."""
        code = self._names.code(user)
        return slice(0, 0) if code is None else slice(int(self.ends[code]), int(self.ends[code + 1]))


def pair_codes(users: pl.Series, items: pl.Series) -> NDArray[np.uint64]:
    """Return a number for the (user, item) pair of every row, shape (n,); equal pairs have equal numbers."""
    result = values_and_codes(users)[1].astype(np.uint64)
    result <<= np.uint64(32)
    result |= values_and_codes(items)[1].astype(np.uint64)
    return result


def duplicate_indices(numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the indices of values that occur more than once, ascending."""
    ordered = pl.Series(numbers).sort().to_numpy()
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not len(twice):
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero(pl.Series(numbers).is_in(twice).to_numpy())


def coded_pairs(pairs: Iterable[tuple[str, str | None]], other: pl.DataFrame) -> pl.DataFrame:
    """Return (user, item) pairs in the columns and codes of another data frame, without pairs with unknown ids."""
    frame = pl.DataFrame(list(pairs), schema=dict.fromkeys(PAIR_COLUMNS, pl.String), orient="row")
    return frame.select(pl.col(name).cast(other[name].dtype, strict=False) for name in PAIR_COLUMNS).drop_nulls()
