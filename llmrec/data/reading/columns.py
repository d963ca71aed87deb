"""Gives the columns of a table their types, and names the first row that does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime

import polars as pl

from llmrec.data.codes import codes
from llmrec.data.reading.limits import enumerated, shown
from llmrec.data.reading.text import Table
from llmrec.errors import DataError, did_you_mean


def find(table: Table, name: str | None, default: str, key: str) -> str | None:
    """Return the column that a recipe means.

    Args:
        table: Where to look.
        name: The recipe's value; None means ``default``, if there is such a column.
        default: llmrec's own name.
        key: The recipe's key, for the error.

    Raises:
        DataError: If the recipe names a column that is not there.
    """
    columns = table.frame.columns
    check_usable(table, name or default, key)
    if name is None:
        return default if default in columns else None
    if name not in columns:
        raise DataError.at(
            table.name,
            "missing-column",
            f" has no column {name!r}{did_you_mean(name, columns)}; its columns are: "
            f"{enumerated(columns)}. Name the right one in the recipe as {key}=...",
            name,
        )
    return name


def check_usable(table: Table, column: str, key: str) -> None:
    """Refuse a column that is there and was left out, since nobody would notice.

    Raises:
        DataError: Naming what it holds.
    """
    if column in table.unusable:
        raise DataError.at(
            table.name,
            "bad-value",
            f": column {column!r} holds {table.unusable[column]}, which cannot be used; write it as texts, "
            f"numbers or dates, or name another column as {key}=...",
            column,
        )


def texts(table: Table, column: str) -> pl.Series:
    """Return a column as text; missing values become empty texts, lists are joined by commas."""
    series = table.column(column)
    if isinstance(series.dtype, pl.List):
        series = series.list.join(", ")
    elif series.dtype.is_float():
        # Whole numbers turn into floats on their way through other libraries; ids must survive that.
        series = series.fill_nan(None)
        whole = ((series == series.round(0)) & (series.abs() < 2**53)).all()
        series = series.cast(pl.Int64) if whole else series
    found = series.cast(pl.String).fill_null("")
    _no_nul(table, column, found)
    return found


def _spelled(table: Table, column: str) -> pl.Series:
    """Return a column as text, in codes where the table has codes."""
    if not isinstance(table.column(column).dtype, pl.Enum):
        return texts(table, column)
    found = table.column(column)
    _no_nul(table, column, found)
    return found


def _no_nul(table: Table, column: str, found: pl.Series) -> None:
    row = _first_of(found, lambda values: values.str.contains("\0", literal=True))
    if row is not None:
        raise DataError.at(
            table.where(row), "encoding", f": column {column!r} holds a NUL character; remove it", column
        )


def ids(table: Table, column: str) -> pl.Series:
    """Return a column of user or item ids as text, in codes where the table has codes.

    Raises:
        DataError: If one is missing; ids of nothing but blanks are missing.
    """
    found = _spelled(table, column)
    row = _first_of(found, lambda values: values.str.strip_chars() == "")
    if row is not None:
        raise DataError.at(
            table.where(row),
            "missing-value",
            f": column {column!r} is empty; every row needs a user and an item",
            column,
        )
    return found


def numbers(table: Table, column: str, what: str) -> pl.Series:
    """Return a column of finite numbers.

    Args:
        table: Where it is.
        column: Its name.
        what: What it holds, for the error.

    Raises:
        DataError: If a value is missing, not a number, NaN or infinite.
    """
    found = _floats(table.column(column))
    row = _first(~found.is_finite().fill_null(False))
    if row is not None:
        raise DataError.at(
            table.where(row),
            "bad-value",
            f": the {what} in column {column!r} is {shown(table.frame[column][row])}, which is not a "
            "finite number; correct or drop the row",
            column,
        )
    return found


def times(table: Table, column: str) -> pl.Series:
    """Return a column of times as numbers; dates become seconds since 1970 (UTC unless they say otherwise).

    A column holds numbers or ISO 8601 dates, as its first row shows.

    Raises:
        DataError: If a value is missing or is neither.
    """
    series = table.column(column)
    if series.dtype.is_temporal():
        if not isinstance(series.dtype, pl.Datetime | pl.Date):
            raise DataError.at(
                table.name,
                "bad-value",
                f": column {column!r} holds {series.dtype}, which is not a point in time",
                column,
            )
        seconds = series.cast(pl.Datetime("us")).dt.epoch("us").cast(pl.Float64) / 1e6
        row = _first(seconds.is_null())
        if row is not None:
            raise DataError.at(
                table.where(row),
                "missing-value",
                f": the time in column {column!r} is missing; correct or drop the row",
                column,
            )
        return seconds
    if series.dtype != pl.String or _floats(series[:1])[0] is not None:
        return numbers(table, column, "time")
    return pl.Series(column, [_seconds(table, column, row, text or "") for row, text in enumerate(series)], pl.Float64)


def _seconds(table: Table, column: str, row: int, text: str) -> float:
    try:
        moment = datetime.fromisoformat(text.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as error:
        raise DataError.at(
            table.where(row),
            "bad-value",
            f": the time in column {column!r} is {shown(text)}, which is neither a number nor an ISO "
            "date such as 2024-05-31 or 2024-05-31T08:15:00Z; all rows must be of one sort, so correct the row",
            column,
        ) from error


def _floats(series: pl.Series) -> pl.Series:
    if series.dtype == pl.String:
        series = series.str.strip_chars()
    if series.dtype.is_temporal():
        return pl.Series(series.name, [None] * series.len(), pl.Float64)
    try:
        return series.cast(pl.Float64, strict=False)
    except pl.exceptions.PolarsError:
        return pl.Series(series.name, [math.nan] * series.len(), pl.Float64)


def _first(bad: pl.Series) -> int | None:
    """Return the first True row."""
    return int(bad.arg_max() or 0) if bad.any() else None


def _first_of(found: pl.Series, bad: Callable[[pl.Series], pl.Series]) -> int | None:
    """Return the first row whose text is bad; of codes every text is looked at once."""
    if not isinstance(found.dtype, pl.Enum):
        return _first(bad(found))
    values, rows = codes(found)
    wrong = bad(values).to_numpy()
    return _first(pl.Series(wrong[rows])) if wrong.any() else None


def one_per_item(table: Table, items: pl.Series, column: str) -> dict[str, str]:
    """Return one text per item: the most frequent non-blank one, of several the first in the alphabet."""
    counts = pl.DataFrame({"item": items, "text": _spelled(table, column)}).group_by("item", "text").len()
    counts = counts.with_columns(pl.col("text").cast(pl.String)).filter(pl.col("text").str.strip_chars() != "")
    counts = counts.sort(["item", "len", "text"], descending=[False, True, False])
    return dict(counts.unique("item", keep="first", maintain_order=True).select("item", "text").iter_rows())
