"""Converts text columns to ids, numbers and times, and reports the first invalid row."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Literal, TypeVar

import polars as pl

from llmrec.data.read.codes import convert_whole_floats, values_and_codes
from llmrec.data.read.limits import MAX_EXACT_INTEGER, format_value
from llmrec.data.read.markup import remove_markup
from llmrec.data.read.tables import Table
from llmrec.errors import DataError

# --------------------------------------------------------------------------- dates in common formats

# Whether 03/04/2024 is in March or April is decided by the whole column: 31/05/2024 in another row shows that the day
# comes first. With dots it does so by convention.


DateOrder = Literal["day-first", "month-first"]
DATE_ORDERS: tuple[DateOrder, ...] = ("day-first", "month-first")

Parsed = TypeVar("Parsed")

# Formats that polars and Python parse in the same way, from the year 1 on; Python parses all others, which are rare.
_ISO = r"^(?:[1-9]\d{3}|0[1-9]\d{2}|00[1-9]\d|000[1-9])-\d{2}-\d{2}([T ]\d{2}:\d{2}:[0-5]\d(\.\d{1,6})?Z?)?$"
# Start of the clock time. A column has few different days and times of day, so each is parsed once.
_CLOCK_SUFFIX = r"[ T,]+(\d{1,2}[:.h]\d{2}(?:[^\d].*)?)$"
_CLOCK = re.compile(
    r"(\d{1,2})[:.h](\d{2})(?:[:.](\d{2}))?(?:[.,](\d+))?\s*([ap]\.?m\.?)?\s*(Z|UTC|GMT|[+-]\d{2}:?\d{2})?",
    re.IGNORECASE,
)
_NUMERIC_DATE = re.compile(r"(\d{1,4})([./-])(\d{1,2})\2\s?(\d{2,4})")
_MONTH = r"([^\W\d_]{3,12})\.?"
_NAMED_MONTH_DATE = re.compile(
    rf"(?:[a-z]{{2,9}}\.?,? )??(?:(\d{{1,2}})\.?[ -]{_MONTH}|{_MONTH} (\d{{1,2}})),?[ -](\d{{4}})", re.IGNORECASE
)
_SPACED_DATE = re.compile(r"(\d{1,2})( )(\d{1,2}), (\d{4})")
_GERMAN_MONTHS = {"mär": 3, "mrz": 3, "mai": 5, "okt": 10, "dez": 12}
_ENGLISH_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec"
_MONTHS = {name: number for number, name in enumerate(_ENGLISH_MONTHS.split(), start=1)} | _GERMAN_MONTHS
# Two-digit years: 69 is 2069, and 70 is 1970.
_THIS_CENTURY = 70
_MICROSECONDS_PER_SECOND = 1_000_000
_MICROSECONDS_PER_DAY = 86_400 * _MICROSECONDS_PER_SECOND


@dataclass(frozen=True)
class ParsedDates:
    """A column of parsed dates.

    Attributes:
        seconds: Seconds since 1970, in UTC unless the text has an offset; null if a text is not a date, or is
            ambiguous.
        unsure: Rows in which day and month could be swapped.
        order: Which of the two comes first in these rows; None without such rows, or if unknown.
    """

    seconds: pl.Series
    unsure: pl.Series
    order: DateOrder | None


@dataclass(frozen=True)
class _ParsedDay:
    """A day as its year and two numbers; ``sure`` means that the first number is the month."""

    year: int
    one: int
    two: int
    sure: bool
    dotted: bool = False

    def number(self, order: DateOrder | None) -> int | None:
        """Return the days since 1970; None if the date is invalid or the order of day and month is unknown."""
        if not self.sure and order is None:
            return None
        month, day = (self.two, self.one) if not self.sure and order == "day-first" else (self.one, self.two)
        try:
            return (date(self.year, month, day) - date(1970, 1, 1)).days
        except ValueError:
            return None


def parse_dates(texts: pl.Series, order: DateOrder | None = None) -> ParsedDates:
    """Parse a column of dates, ignoring surrounding spaces.

    Args:
        texts: The column.
        order: What comes first in dates such as 03/04/2024; None: inferred from the column.
    """
    seconds = _parse_iso_dates(texts)
    others = seconds.is_null().arg_true()
    unsure = pl.Series([False], dtype=pl.Boolean).new_from_index(0, len(texts))
    if not len(others):
        return ParsedDates(seconds, unsure, None)
    rest = texts.gather(others).fill_null("")
    parts = pl.DataFrame({"day": rest.str.replace(_CLOCK_SUFFIX, ""), "clock": rest.str.extract(_CLOCK_SUFFIX, 1)})
    days = _parse_distinct(parts["day"], _parse_day)
    open_days = [text for text, day in days.items() if not day.sure]
    order = order or _infer_date_order([days[text] for text in open_days])
    numbers = {text: number for text, day in days.items() if (number := day.number(order)) is not None}
    clock = _map_to_integers(parts["clock"], _parse_distinct(parts["clock"], _parse_clock)).set(
        parts["clock"].is_null(), 0
    )
    read = microseconds_to_seconds(_map_to_integers(parts["day"], numbers) * _MICROSECONDS_PER_DAY + clock)
    open_rows = parts["day"].is_in(open_days)
    # Python parses additional forms of ISO 8601.
    further = _parse_distinct(rest.filter(read.is_null() & ~open_rows), _parse_with_python)
    read = read.fill_null(microseconds_to_seconds(_map_to_integers(rest, further))) if further else read
    return ParsedDates(seconds.scatter(others, read), unsure.scatter(others, open_rows), order if open_days else None)


def microseconds_to_seconds(micro: pl.Series) -> pl.Series:
    """Convert microseconds to seconds, rounded as in Python."""
    seconds = pl.Series(micro.name, micro.fill_null(0).to_numpy() / _MICROSECONDS_PER_SECOND)
    return seconds.set(micro.is_null(), None)


def _parse_distinct(texts: pl.Series, read: Callable[[str], Parsed | None]) -> dict[str, Parsed]:
    """Parse the distinct texts of a column, and return the valid ones with their values."""
    return {text: result for text in texts.drop_nulls().unique() if (result := read(text)) is not None}


def _map_to_integers(texts: pl.Series, known: Mapping[str, int]) -> pl.Series:
    return texts.replace_strict(known, default=None, return_dtype=pl.Int64)


def _parse_iso_dates(texts: pl.Series) -> pl.Series:
    """Convert ISO dates to seconds; null for other texts."""
    plain = texts.set(~texts.str.contains(_ISO), None).str.strip_suffix("Z").str.replace("T", " ", literal=True)
    return _parse_in_formats(plain, ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d"))


def _parse_in_formats(texts: pl.Series, formats: Sequence[str]) -> pl.Series:
    """Convert dates in any of the formats to seconds; null for other texts."""
    result = pl.Series(texts.name, [None], dtype=pl.Float64).new_from_index(0, len(texts))
    for form in formats:
        result = result.fill_null(
            microseconds_to_seconds(texts.str.to_datetime(form, strict=False, time_unit="us").dt.epoch("us"))
        )
    return result


def _parse_with_python(text: str) -> int | None:
    """Parse a text as ISO 8601 and return its microseconds; None if it is invalid."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * _MICROSECONDS_PER_SECOND + since.microseconds


def _parse_day(text: str) -> _ParsedDay | None:
    match = _NUMERIC_DATE.fullmatch(text) or _SPACED_DATE.fullmatch(text)
    if match is not None:
        first, mark, second, last = match.groups()
        if len(first) == 4:
            return _ParsedDay(int(first), int(second), int(last), sure=True) if len(last) == 2 else None
        if 3 in (len(first), len(last)):
            return None
        year = int(last) + (0 if len(last) == 4 else 2000 if int(last) < _THIS_CENTURY else 1900)
        return _ParsedDay(year, int(first), int(second), sure=False, dotted=mark == ".")
    match = _NAMED_MONTH_DATE.fullmatch(text)
    month = _MONTHS.get((match[2] or match[3])[:3].lower()) if match is not None else None
    if match is None or month is None:
        return None
    return _ParsedDay(int(match[5]), month, int(match[1] or match[4]), sure=True)


def _parse_clock(text: str) -> int | None:
    """Parse a time of day and return its microseconds since midnight, in UTC."""
    match = _CLOCK.fullmatch(text)
    if match is None:
        return None
    hour, minute, second, fraction, half, zone = match.groups()
    hours = int(hour) if not half else int(hour) % 12 + (12 if half[0].lower() == "p" else 0)
    if hours > 23 or int(minute) > 59 or int(second or 0) > 59:
        return None
    shift = 0
    if zone and zone[0] in "+-":
        shift = (int(zone[1:3]) * 60 + int(zone[-2:])) * (-1 if zone[0] == "-" else 1)
    micro = int((fraction or "0")[:6].ljust(6, "0"))
    return ((hours * 60 + int(minute) - shift) * 60 + int(second or 0)) * _MICROSECONDS_PER_SECOND + micro


def _infer_date_order(days: Sequence[_ParsedDay]) -> DateOrder | None:
    """Return whether days or months come first, derived from numbers above 12 and from dots."""
    first, second = sum(day.one > 12 for day in days), sum(day.two > 12 for day in days)
    if first or second:
        return "day-first" if first >= second else "month-first"
    return "day-first" if days and all(day.dotted or day.one == day.two for day in days) else None


TimeUnit = Literal["seconds", "milliseconds"]

# No data set has times in seconds after the year 5138, or in milliseconds before 1973.
_MILLISECONDS_FROM = 1e11


# --------------------------------------------------------------------------- texts and ids


def text_column(rows: Table, column: str) -> pl.Series:
    """Return a column as texts; missing values become empty texts, and lists are joined by commas."""
    series = _validate_dates(rows, column)
    if isinstance(series.dtype, pl.List):
        series = series.list.join(", ")
    result = convert_whole_floats(series).cast(pl.String).fill_null("")
    _check_no_nul(rows, column, result)
    return result


def plain_text_column(rows: Table, column: str) -> pl.Series:
    """Return texts without HTML, see `remove_markup`; null for blank texts."""
    result = text_column(rows, column)
    indices = result.str.contains("[<&]").arg_true()
    if len(indices):
        result = result.scatter(indices, [remove_markup(text) for text in result.gather(indices)])
    return result.set(result.str.strip_chars() == "", None)


def id_column(rows: Table, *columns: str) -> pl.Series:
    """Return ids as text; with several id columns, the first non-blank value counts.

    Raises:
        DataError: If an id is missing or blank, or is a float too large to be exact.
    """
    for column in columns:
        _check_exact_ids(rows, column)
    result = _texts_or_codes(rows, columns[0])
    for other in columns[1:]:
        result = result.zip_with(result.str.strip_chars() != "", _texts_or_codes(rows, other))
    row = _first_invalid_row(result, lambda values: values.str.strip_chars() == "")
    if row is not None:
        which = " and ".join(map(repr, columns))
        raise DataError.at(
            rows.where(row),
            "missing-value",
            f": column {which} is empty; every row needs a user and an item",
            columns[0],
        )
    return result


def check_unique_ids(table: Table, column: str, ids: pl.Series, kind: str, fix: str) -> None:
    """Reject a table of items or users that lists one of them twice.

    Raises:
        DataError: With the first row that repeats an id.
    """
    again = (~ids.is_first_distinct()).arg_true()
    if again.len():
        raise DataError.at(
            table.where(again[0]),
            "duplicate",
            f" repeats {kind} {format_value(ids[again[0]])} ({again.len()} such rows); {fix}",
            column,
        )


def _check_exact_ids(rows: Table, column: str) -> None:
    """Reject floats that are too large to distinguish integer ids."""
    series = rows.column(column)
    if not series.dtype.is_float():
        return
    row = first_true((series.fill_nan(None).abs() >= MAX_EXACT_INTEGER).fill_null(False))
    if row is not None:
        raise DataError.at(
            rows.where(row),
            "bad-value",
            f": column {column!r} is the floating-point number {series[row]:.17g}; floating-point numbers cannot "
            f"distinguish ids above {MAX_EXACT_INTEGER}, so write ids as texts or whole numbers",
            column,
        )


def most_frequent_texts(rows: Table, items: pl.Series, column: str) -> dict[str, str]:
    """Return the most frequent non-blank text of each item."""
    counts = pl.DataFrame({"item": items, "text": _texts_or_codes(rows, column)}).group_by("item", "text").len()
    counts = counts.with_columns(pl.col("text").cast(pl.String)).filter(pl.col("text").str.strip_chars() != "")
    counts = counts.sort(["item", "len", "text"], descending=[False, True, False])
    return dict(counts.unique("item", keep="first", maintain_order=True).select("item", "text").iter_rows())


def _texts_or_codes(rows: Table, column: str) -> pl.Series:
    """Return a column as texts, coded if the table has codes."""
    if not isinstance(rows.column(column).dtype, pl.Enum):
        return text_column(rows, column)
    result = rows.column(column)
    _check_no_nul(rows, column, result)
    return result


def _check_no_nul(rows: Table, column: str, series: pl.Series) -> None:
    row = _first_invalid_row(series, lambda values: values.str.contains("\0", literal=True))
    if row is not None:
        raise DataError.at(rows.where(row), "encoding", f": column {column!r} has a NUL character; remove it", column)


# --------------------------------------------------------------------------- numbers and times


def number_column(rows: Table, column: str, what: str, *, absent: float | None = None) -> pl.Series:
    """Return a column of finite numbers.

    Args:
        rows: The table or block.
        column: Its name.
        what: Description of the values, for errors.
        absent: A number that means a missing value and becomes null.

    Raises:
        DataError: If a value is missing, not a number, NaN or infinite.
    """
    result = convert_to_floats(rows.column(column))
    row = first_true(~result.is_finite().fill_null(False))
    if row is not None:
        raise DataError.at(
            rows.where(row),
            "bad-value",
            f": the {what} in column {column!r} is {format_value(rows.column(column)[row])}, which is not a "
            "finite number; correct or drop the row",
            column,
        )
    return result if absent is None else result.set(result == absent, None)


def time_column(rows: Table, column: str, order: DateOrder | None = None) -> pl.Series:
    """Return a column of times as numbers; dates become seconds since 1970 (UTC unless they have an offset).

    The first row decides whether a column has numbers or dates.

    Args:
        rows: The table or block.
        column: Its name.
        order: What comes first in dates such as 03/04/2024; None: inferred from the column.

    Raises:
        DataError: If a value is missing, or neither number nor date, or if the order of day and month is ambiguous.
    """
    series = _validate_dates(rows, column)
    if series.dtype.is_temporal():
        if not isinstance(series.dtype, pl.Datetime | pl.Date):
            raise DataError.at(
                rows.name,
                "bad-value",
                f": column {column!r} has the type {series.dtype}, which is not a time",
                column,
            )
        seconds = microseconds_to_seconds(series.cast(pl.Datetime("us")).dt.epoch("us"))
        row = first_true(seconds.is_null())
        if row is not None:
            raise DataError.at(
                rows.where(row),
                "missing-value",
                f": the time in column {column!r} is missing; correct or drop the row",
                column,
            )
        return seconds
    if series.dtype != pl.String or convert_to_floats(series[:1])[0] is not None:
        return _validate_time_units(rows, column, number_column(rows, column, "time"))
    text = series.fill_null("").str.strip_chars()
    result = parse_dates(text, order)
    row = first_true(result.seconds.is_null())
    if row is None:
        return result.seconds
    message = f": the time in column {column!r} is {format_value(text[row])}"
    if not result.unsure[row]:
        message += (
            ", which is neither a number nor a date such as 2024-05-31, 2024-05-31T08:15:00Z or 31.05.2024 08:15; "
            "correct the row, since all rows must have the same type"
        )
    elif result.order is None:
        message += ", in which day and month are ambiguous, as in all other rows; set "
        message += " or ".join(f"data.columns.dates={option}" for option in DATE_ORDERS)
    else:
        shows = "data.columns.dates requires" if order else "other rows show"
        message += (
            f", which is not a date with the {result.order.removesuffix('-first')} first, as {shows}; correct the row"
        )
    undecided = bool(result.unsure[row]) and result.order is None
    raise DataError.at(rows.where(row), "ambiguous" if undecided else "bad-value", message, column)


_UNITS_PER_DAY = {"ms": 86_400_000, "us": 86_400_000_000, "ns": 86_400_000_000_000}
# The first and last day that Python's dates support, in days since 1970.
_FIRST_DAY, _LAST_DAY = (day.toordinal() - date(1970, 1, 1).toordinal() for day in (date.min, date.max))


def first_unsupported_date(series: pl.Series) -> int | None:
    """Return the index of the first date outside the years 1 to 9999; None if there is none.

    Damaged files have such dates, and other libraries write sentinels for missing dates.
    """
    if not isinstance(series.dtype, pl.Date | pl.Datetime):
        return None
    unit = 1 if isinstance(series.dtype, pl.Date) else _UNITS_PER_DAY[series.dtype.time_unit]
    number = series.to_physical()
    return first_true(((number < _FIRST_DAY * unit) | (number >= (_LAST_DAY + 1) * unit)).fill_null(False))


def _validate_dates(rows: Table, column: str) -> pl.Series:
    """Return a column after checking that its dates are between the years 1 and 9999."""
    series = rows.column(column)
    row = first_unsupported_date(series)
    if row is not None:
        raise DataError.at(
            rows.where(row),
            "bad-value",
            f": column {column!r} has a date outside the years 1 to 9999; correct or drop the row",
            column,
        )
    return series


# The earliest plausible times since 1970, from the year 1973, in each unit.
_EARLIEST_TIMES = {"seconds": 1e8, "milliseconds": _MILLISECONDS_FROM, "microseconds": 1e14, "nanoseconds": 1e17}


def time_units_per_second(latest: float) -> float:
    """Return the number of time units per second, derived from the latest time in a table."""
    begins = [begin for name, begin in _EARLIEST_TIMES.items() if name != "seconds"]
    return 1000.0 ** sum(latest >= begin for begin in begins)


def is_epoch_time(latest: float) -> bool:
    """Whether the latest time in a table is plausible as a time since 1970."""
    return latest >= _EARLIEST_TIMES["seconds"]


def _validate_time_units(rows: Table, column: str, values: pl.Series) -> pl.Series:
    """Return numbers unchanged, after checking that times since 1970 all have the same unit.

    A row in another unit would be before or after all others.
    """
    begins = [*_EARLIEST_TIMES.values(), float("inf")]
    first_rows = {
        unit: row
        for unit, low, high in zip(_EARLIEST_TIMES, begins, begins[1:], strict=False)
        if (row := first_true((values >= low) & (values < high))) is not None
    }
    if len(first_rows) < 2:
        return values
    (first, _), (other, row) = sorted(first_rows.items(), key=lambda item: item[1])[:2]
    raise DataError.at(
        rows.where(row),
        "bad-value",
        f": the time in column {column!r} is {values[row]:.15g}, which looks like {other} since 1970, but earlier rows "
        f"look like {first}; write all times in the same unit",
        column,
    )


def epoch_column(rows: Table, column: str, unit: TimeUnit | None) -> tuple[pl.Series, TimeUnit]:
    """Return times as seconds since 1970, from seconds or milliseconds.

    Args:
        rows: The table or block.
        column: Its name.
        unit: The unit of the earlier blocks; None for the first one.

    Raises:
        DataError: If a value is missing, not a number, or in another unit than the first one.
    """
    result = number_column(rows, column, "time")
    large = result.abs() >= _MILLISECONDS_FROM
    unit = unit or ("milliseconds" if large[0] else "seconds")
    row = first_true(~large if unit == "milliseconds" else large)
    # Zero and negative values are before 1970 in either unit; no supported data set has them in milliseconds.
    if row is not None:
        raise DataError.at(
            rows.where(row),
            "bad-value",
            f": the time in column {column!r} is {result[row]:g}, but the file begins with {unit} since 1970; correct "
            "the row (all times need the same unit)",
            column,
        )
    return (result / 1000 if unit == "milliseconds" else result), unit


def date_column(rows: Table, column: str, formats: Sequence[str]) -> pl.Series:
    """Return dates as seconds since 1970, in UTC unless they have an offset.

    Raises:
        DataError: If a value matches none of the formats.
    """
    series = rows.column(column).cast(pl.String).str.strip_chars()
    result = _parse_in_formats(series, formats)
    row = first_true(result.is_null())
    if row is not None:
        raise DataError.at(
            rows.where(row),
            "bad-value",
            f": the time in column {column!r} is {format_value(series[row])}, which is not of the form "
            f"{' or '.join(formats)}; correct or drop the row",
            column,
        )
    return result


def convert_to_floats(series: pl.Series) -> pl.Series:
    """Return values as floats; null or NaN if a value is not a number."""
    if series.dtype == pl.String:
        series = series.str.strip_chars()
    if series.dtype.is_temporal():
        return pl.Series(series.name, [None] * series.len(), pl.Float64)
    try:
        return series.cast(pl.Float64, strict=False)
    except pl.exceptions.PolarsError:
        return pl.Series(series.name, [math.nan] * series.len(), pl.Float64)


# --------------------------------------------------------------------------- the first invalid row


def first_true(bad: pl.Series) -> int | None:
    """Return the index of the first true value."""
    return int(bad.arg_max() or 0) if bad.any() else None


def _first_invalid_row(series: pl.Series, bad: Callable[[pl.Series], pl.Series]) -> int | None:
    """Return the index of the first row with an invalid text."""
    if not isinstance(series.dtype, pl.Enum):
        return first_true(bad(series))
    values, rows = values_and_codes(series)
    wrong = bad(values).to_numpy()
    return first_true(pl.Series(wrong[rows])) if wrong.any() else None
