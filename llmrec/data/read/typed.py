"""Gives columns of tables, and of blocks of large files, their types, and names the first row that does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import date
from typing import Literal, Protocol

import polars as pl

from llmrec.data.codes import codes
from llmrec.data.read.dates import ORDERS, DateOrder, in_seconds, read_dates
from llmrec.data.read.limits import WHOLE, shown
from llmrec.data.read.markup import plain
from llmrec.errors import DataError, Place

Unit = Literal["seconds", "milliseconds"]

# No data set reaches beyond the year 5138 in seconds, or back before 1973 in milliseconds.
_MILLISECONDS_FROM = 1e11


class Rows(Protocol):
    """A table, or a block of one."""

    @property
    def name(self) -> str:
        """As errors call it."""
        ...

    def column(self, name: str, /) -> pl.Series:
        """Return a column."""
        ...

    def where(self, index: int, /) -> Place:
        """Return the place of a row, by its 0-based index."""
        ...


# --------------------------------------------------------------------------- texts and ids


def texts(rows: Rows, column: str) -> pl.Series:
    """Return a column as text; missing values become empty texts, lists are joined by commas."""
    series = _dated(rows, column)
    if isinstance(series.dtype, pl.List):
        series = series.list.join(", ")
    found = as_whole(series).cast(pl.String).fill_null("")
    _no_nul(rows, column, found)
    return found


def as_whole(series: pl.Series) -> pl.Series:
    """Return floats that are all whole as integers, and anything else as it is.

    Whole numbers turn into floats on their way through other libraries; ids must survive that.
    """
    if not series.dtype.is_float():
        return series
    series = series.fill_nan(None)
    whole = ((series == series.round(0)) & (series.abs() < WHOLE)).all()
    return series.cast(pl.Int64) if whole else series


def unescaped(rows: Rows, column: str) -> pl.Series:
    """Return texts without HTML, see `markup.plain`; blank ones are nulls."""
    found = texts(rows, column)
    places = found.str.contains("[<&]").arg_true()
    if len(places):
        found = found.scatter(places, [plain(text) for text in found.gather(places)])
    return found.set(found.str.strip_chars() == "", None)


def ids(rows: Rows, *columns: str) -> pl.Series:
    """Return ids as text, in codes where the table has codes: of several columns the first that is not blank.

    Raises:
        DataError: If one is missing, or a float that stands for several whole numbers; ids of nothing but blanks are
            missing.
    """
    for column in columns:
        _exact(rows, column)
    found = _spelled(rows, columns[0])
    for other in columns[1:]:
        found = found.zip_with(found.str.strip_chars() != "", _spelled(rows, other))
    row = _first_of(found, lambda values: values.str.strip_chars() == "")
    if row is not None:
        which = " and ".join(map(repr, columns))
        raise DataError.at(
            rows.where(row),
            "missing-value",
            f": column {which} is empty; every row needs a user and an item",
            columns[0],
        )
    return found


def _exact(rows: Rows, column: str) -> None:
    """Refuse floats so large that neighbouring whole numbers are the same float: two ids would be one."""
    series = rows.column(column)
    row = _first((series.fill_nan(None).abs() >= WHOLE).fill_null(False)) if series.dtype.is_float() else None
    if row is not None:
        raise DataError.at(
            rows.where(row),
            "bad-value",
            f": column {column!r} is {series[row]:.17g} as a floating-point number, and such numbers cannot tell ids "
            f"from {WHOLE} on apart; write the ids as texts or whole numbers",
            column,
        )


def one_per_item(rows: Rows, items: pl.Series, column: str) -> dict[str, str]:
    """Return one text per item: the most frequent non-blank one, of several the first in the alphabet."""
    counts = pl.DataFrame({"item": items, "text": _spelled(rows, column)}).group_by("item", "text").len()
    counts = counts.with_columns(pl.col("text").cast(pl.String)).filter(pl.col("text").str.strip_chars() != "")
    counts = counts.sort(["item", "len", "text"], descending=[False, True, False])
    return dict(counts.unique("item", keep="first", maintain_order=True).select("item", "text").iter_rows())


def _spelled(rows: Rows, column: str) -> pl.Series:
    """Return a column as text, in codes where the table has codes."""
    if not isinstance(rows.column(column).dtype, pl.Enum):
        return texts(rows, column)
    found = rows.column(column)
    _no_nul(rows, column, found)
    return found


def _no_nul(rows: Rows, column: str, found: pl.Series) -> None:
    row = _first_of(found, lambda values: values.str.contains("\0", literal=True))
    if row is not None:
        raise DataError.at(rows.where(row), "encoding", f": column {column!r} holds a NUL character; remove it", column)


# --------------------------------------------------------------------------- numbers and times


def numbers(rows: Rows, column: str, what: str, *, absent: float | None = None) -> pl.Series:
    """Return a column of finite numbers.

    Args:
        rows: Where it is.
        column: Its name.
        what: What it holds, for the error.
        absent: A number that stands for a missing one, and becomes a null.

    Raises:
        DataError: If a value is missing, not a number, NaN or infinite.
    """
    found = _floats(rows.column(column))
    row = _first(~found.is_finite().fill_null(False))
    if row is not None:
        raise DataError.at(
            rows.where(row),
            "bad-value",
            f": the {what} in column {column!r} is {shown(rows.column(column)[row])}, which is not a "
            "finite number; correct or drop the row",
            column,
        )
    return found if absent is None else found.set(found == absent, None)


def times(rows: Rows, column: str, order: DateOrder | None = None) -> pl.Series:
    """Return a column of times as numbers; dates become seconds since 1970 (UTC unless they say otherwise).

    A column holds numbers or dates, as its first row shows.

    Args:
        rows: Where it is.
        column: Its name.
        order: What stands first in dates such as 03/04/2024; None: as the column shows.

    Raises:
        DataError: If a value is missing or is neither, or if nothing shows which of two dates it is.
    """
    series = _dated(rows, column)
    if series.dtype.is_temporal():
        if not isinstance(series.dtype, pl.Datetime | pl.Date):
            raise DataError.at(
                rows.name,
                "bad-value",
                f": column {column!r} holds {series.dtype}, which is not a point in time",
                column,
            )
        seconds = in_seconds(series.cast(pl.Datetime("us")).dt.epoch("us"))
        row = _first(seconds.is_null())
        if row is not None:
            raise DataError.at(
                rows.where(row),
                "missing-value",
                f": the time in column {column!r} is missing; correct or drop the row",
                column,
            )
        return seconds
    if series.dtype != pl.String or _floats(series[:1])[0] is not None:
        return _one_unit(rows, column, numbers(rows, column, "time"))
    text = series.fill_null("").str.strip_chars()
    found = read_dates(text, order)
    row = _first(found.seconds.is_null())
    if row is None:
        return found.seconds
    said = f": the time in column {column!r} is {shown(text[row])}"
    if not found.unsure[row]:
        said += (
            ", which is neither a number nor a date such as 2024-05-31, 2024-05-31T08:15:00Z or 31.05.2024 08:15; all "
            "rows must be of one sort, so correct the row"
        )
    elif found.order is None:
        said += ", in which day and month cannot be told apart, here as in all other rows; set "
        said += " or ".join(f"data.columns.dates={each}" for each in ORDERS)
    else:
        shows = "data.columns.dates says" if order else "other rows show"
        said += f", which is no date with the {found.order.removesuffix('-first')} first, as {shows}; correct the row"
    undecided = bool(found.unsure[row]) and found.order is None
    raise DataError.at(rows.where(row), "ambiguous" if undecided else "bad-value", said, column)


_DAY = {"ms": 86_400_000, "us": 86_400_000_000, "ns": 86_400_000_000_000}
# Days since 1970 of the first and the last day that dates are written with.
_FIRST_DAY, _LAST_DAY = (each.toordinal() - date(1970, 1, 1).toordinal() for each in (date.min, date.max))


def off_calendar(series: pl.Series) -> int | None:
    """Return the first row whose date is outside of the years 1 to 9999, which no library can write; None if none is.

    Damaged files hold them, and so do files of other libraries where a sentinel stands for a missing date.
    """
    if not isinstance(series.dtype, pl.Date | pl.Datetime):
        return None
    unit = 1 if isinstance(series.dtype, pl.Date) else _DAY[series.dtype.time_unit]
    number = series.to_physical()
    return _first(((number < _FIRST_DAY * unit) | (number >= (_LAST_DAY + 1) * unit)).fill_null(False))


def _dated(rows: Rows, column: str) -> pl.Series:
    """Return a column whose dates, if it holds any, are dates of the calendar."""
    series = rows.column(column)
    row = off_calendar(series)
    if row is not None:
        raise DataError.at(
            rows.where(row),
            "bad-value",
            f": column {column!r} holds a date outside of the years 1 to 9999; correct or drop the row",
            column,
        )
    return series


# Since 1970, from 1973 on: what later times begin at in seconds, milliseconds, microseconds and nanoseconds.
_UNITS = {"seconds": 1e8, "milliseconds": _MILLISECONDS_FROM, "microseconds": 1e14, "nanoseconds": 1e17}


def per_second(latest: float) -> float:
    """Return units of time in a second, by the latest time of a table: 1, or more where it can be no seconds."""
    begins = [begin for name, begin in _UNITS.items() if name != "seconds"]
    return 1000.0 ** sum(latest >= begin for begin in begins)


def since_1970(latest: float) -> bool:
    """Whether the latest time of a table looks like one since 1970, in whatever unit, and not like an order."""
    return latest >= _UNITS["seconds"]


def _one_unit(rows: Rows, column: str, found: pl.Series) -> pl.Series:
    """Return numbers as they are, if those that look like times since 1970 have one unit.

    Raises:
        DataError: If not: a row of the other unit would come before or after all others, whenever it was.
    """
    begins = [*_UNITS.values(), float("inf")]
    place = {
        unit: at
        for unit, low, high in zip(_UNITS, begins, begins[1:], strict=False)
        if (at := _first((found >= low) & (found < high))) is not None
    }
    if len(place) < 2:
        return found
    (first, _), (other, at) = sorted(place.items(), key=lambda each: each[1])[:2]
    raise DataError.at(
        rows.where(at),
        "bad-value",
        f": the time in column {column!r} is {found[at]:.15g}, which looks like {other} since 1970, and those before "
        f"it like {first}; write all rows in one unit",
        column,
    )


def moments(rows: Rows, column: str, unit: Unit | None) -> tuple[pl.Series, Unit]:
    """Return times as seconds since 1970, from seconds or milliseconds, as the first row of the file shows.

    Args:
        rows: Where they are.
        column: Their name.
        unit: The unit of the blocks before; None for the first one.

    Raises:
        DataError: If a value is missing, not a number, or of another unit than the first one.
    """
    found = numbers(rows, column, "time")
    large = found.abs() >= _MILLISECONDS_FROM
    unit = unit or ("milliseconds" if large[0] else "seconds")
    row = _first(~large if unit == "milliseconds" else large)
    # Zero and less is before 1970 in either unit, which no data set here holds in milliseconds.
    if row is not None:
        raise DataError.at(
            rows.where(row),
            "bad-value",
            f": the time in column {column!r} is {found[row]:g}, while the file begins with "
            f"{unit} since 1970; one file has one unit, so correct the row",
            column,
        )
    return (found / 1000 if unit == "milliseconds" else found), unit


def dates(rows: Rows, column: str, formats: Sequence[str]) -> pl.Series:
    """Return dates as seconds since 1970, UTC unless they say otherwise.

    Raises:
        DataError: If a value has none of the formats.
    """
    series = rows.column(column).cast(pl.String).str.strip_chars()
    found = pl.Series(column, [None] * series.len(), pl.Float64)
    for form in formats:
        found = found.fill_null(in_seconds(series.str.to_datetime(form, strict=False, time_unit="us").dt.epoch("us")))
        if not found.null_count():
            break
    row = _first(found.is_null())
    if row is not None:
        raise DataError.at(
            rows.where(row),
            "bad-value",
            f": the time in column {column!r} is {shown(series[row])}, which is not of the form "
            f"{' or '.join(formats)}; correct or drop the row",
            column,
        )
    return found


def _floats(series: pl.Series) -> pl.Series:
    if series.dtype == pl.String:
        series = series.str.strip_chars()
    if series.dtype.is_temporal():
        return pl.Series(series.name, [None] * series.len(), pl.Float64)
    try:
        return series.cast(pl.Float64, strict=False)
    except pl.exceptions.PolarsError:
        return pl.Series(series.name, [math.nan] * series.len(), pl.Float64)


# --------------------------------------------------------------------------- the first row that is bad


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
