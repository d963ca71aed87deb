"""Reads dates in the forms that people and programs write them in.

Where 03/04/2024 may be in March or in April, the whole column decides: 31/05/2024 in another row shows that the day
stands first. With dots it does by convention.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Literal, TypeVar

import polars as pl

DateOrder = Literal["day-first", "month-first"]
ORDERS: tuple[DateOrder, ...] = ("day-first", "month-first")

Found = TypeVar("Found")

# What polars and Python read alike, from the year 1 on; whatever else Python takes for a date is rare, and read by it.
_ISO = r"^(?:[1-9]\d{3}|0[1-9]\d{2}|00[1-9]\d|000[1-9])-\d{2}-\d{2}([T ]\d{2}:\d{2}:[0-5]\d(\.\d{1,6})?Z?)?$"
# Where the clock begins. A column has few different days and few different times of a day, so each is read once.
_APART = r"[ T,]+(\d{1,2}[:.h]\d{2}(?:[^\d].*)?)$"
_CLOCK = re.compile(
    r"(\d{1,2})[:.h](\d{2})(?:[:.](\d{2}))?(?:[.,](\d+))?\s*([ap]\.?m\.?)?\s*(Z|UTC|GMT|[+-]\d{2}:?\d{2})?",
    re.IGNORECASE,
)
_DIGITS = re.compile(r"(\d{1,4})([./-])(\d{1,2})\2\s?(\d{2,4})")
_MONTH = r"([^\W\d_]{3,12})\.?"
_NAMED = re.compile(
    rf"(?:[a-z]{{2,9}}\.?,? )??(?:(\d{{1,2}})\.?[ -]{_MONTH}|{_MONTH} (\d{{1,2}})),?[ -](\d{{4}})", re.IGNORECASE
)
_SPACED = re.compile(r"(\d{1,2})( )(\d{1,2}), (\d{4})")
_GERMAN = {"mär": 3, "mrz": 3, "mai": 5, "okt": 10, "dez": 12}
_ENGLISH = "jan feb mar apr may jun jul aug sep oct nov dec"
_MONTHS = {name: number for number, name in enumerate(_ENGLISH.split(), start=1)} | _GERMAN
# The year 69 is 2069, and 70 is 1970.
_THIS_CENTURY = 70
_SECOND = 1_000_000
_DAY = 86_400 * _SECOND


@dataclass(frozen=True)
class Dates:
    """A column of dates.

    Attributes:
        seconds: Since 1970, UTC unless the text says otherwise; null where a text is no date, or nothing shows which.
        unsure: Rows in which day and month could change places.
        order: Which of the two stands first in these; None where there are none, or where nothing shows it.
    """

    seconds: pl.Series
    unsure: pl.Series
    order: DateOrder | None


@dataclass(frozen=True)
class _Day:
    """A day: its year and two numbers. If ``sure``, the first one is the month; otherwise it may be the day."""

    year: int
    one: int
    two: int
    sure: bool
    dotted: bool = False

    def number(self, order: DateOrder | None) -> int | None:
        """Return the days since 1970; None if there is no such day, or nothing says which number is the month."""
        if not self.sure and order is None:
            return None
        month, day = (self.two, self.one) if not self.sure and order == "day-first" else (self.one, self.two)
        try:
            return (date(self.year, month, day) - date(1970, 1, 1)).days
        except ValueError:
            return None


def read_dates(texts: pl.Series, order: DateOrder | None = None) -> Dates:
    """Read a column of dates, without blanks around them.

    Args:
        texts: The column.
        order: What stands first in dates such as 03/04/2024; None: as the column shows.
    """
    seconds = _iso(texts)
    others = seconds.is_null().arg_true()
    unsure = pl.Series([False], dtype=pl.Boolean).new_from_index(0, len(texts))
    if not len(others):
        return Dates(seconds, unsure, None)
    rest = texts.gather(others).fill_null("")
    parts = pl.DataFrame({"day": rest.str.replace(_APART, ""), "clock": rest.str.extract(_APART, 1)})
    days = _each(parts["day"], _day)
    open_days = [text for text, day in days.items() if not day.sure]
    found = order or _order([days[text] for text in open_days])
    numbers = {text: number for text, day in days.items() if (number := day.number(found)) is not None}
    clock = _read(parts["clock"], _each(parts["clock"], _clock)).set(parts["clock"].is_null(), 0)
    read = in_seconds(_read(parts["day"], numbers) * _DAY + clock)
    open_rows = parts["day"].is_in(open_days)
    # Python knows further forms of ISO 8601.
    further = _each(rest.filter(read.is_null() & ~open_rows), _by_python)
    read = read.fill_null(in_seconds(_read(rest, further))) if further else read
    return Dates(seconds.scatter(others, read), unsure.scatter(others, open_rows), found if open_days else None)


def in_seconds(micro: pl.Series) -> pl.Series:
    """Return microseconds as seconds; numpy rounds as Python does, polars multiplies by the inverse."""
    seconds = pl.Series(micro.name, micro.fill_null(0).to_numpy() / _SECOND)
    return seconds.set(micro.is_null(), None)


def _each(texts: pl.Series, read: Callable[[str], Found | None]) -> dict[str, Found]:
    """Return what the different texts of a column mean; those without a meaning are left out."""
    return {text: found for text in texts.drop_nulls().unique() if (found := read(text)) is not None}


def _read(texts: pl.Series, known: Mapping[str, int]) -> pl.Series:
    return texts.replace_strict(known, default=None, return_dtype=pl.Int64)


def _iso(texts: pl.Series) -> pl.Series:
    """Return the seconds of plain ISO dates, and nulls for all else."""
    plain = texts.set(~texts.str.contains(_ISO), None).str.strip_suffix("Z").str.replace("T", " ", literal=True)
    found = pl.Series(texts.name, [None], dtype=pl.Float64).new_from_index(0, len(texts))
    for form in ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d"):
        found = found.fill_null(in_seconds(plain.str.to_datetime(form, strict=False, time_unit="us").dt.epoch("us")))
    return found


def _by_python(text: str) -> int | None:
    """Return the microseconds of what Python takes for ISO 8601."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * _SECOND + since.microseconds


def _day(text: str) -> _Day | None:
    found = _DIGITS.fullmatch(text) or _SPACED.fullmatch(text)
    if found is not None:
        first, mark, second, last = found.groups()
        if len(first) == 4:
            return _Day(int(first), int(second), int(last), sure=True) if len(last) == 2 else None
        if 3 in (len(first), len(last)):
            return None
        year = int(last) + (0 if len(last) == 4 else 2000 if int(last) < _THIS_CENTURY else 1900)
        return _Day(year, int(first), int(second), sure=False, dotted=mark == ".")
    found = _NAMED.fullmatch(text)
    month = _MONTHS.get((found[2] or found[3])[:3].lower()) if found is not None else None
    return None if found is None or month is None else _Day(int(found[5]), month, int(found[1] or found[4]), sure=True)


def _clock(text: str) -> int | None:
    """Return the microseconds since midnight, in UTC."""
    found = _CLOCK.fullmatch(text)
    if found is None:
        return None
    hour, minute, second, fraction, half, zone = found.groups()
    hours = int(hour) if not half else int(hour) % 12 + (12 if half[0].lower() == "p" else 0)
    if hours > 23 or int(minute) > 59 or int(second or 0) > 59:
        return None
    shift = 0
    if zone and zone[0] in "+-":
        shift = (int(zone[1:3]) * 60 + int(zone[-2:])) * (-1 if zone[0] == "-" else 1)
    micro = int((fraction or "0")[:6].ljust(6, "0"))
    return ((hours * 60 + int(minute) - shift) * 60 + int(second or 0)) * _SECOND + micro


def _order(days: Sequence[_Day]) -> DateOrder | None:
    """Return what stands first: a number above 12 is a day, and so is the first one before a dot."""
    first, second = sum(day.one > 12 for day in days), sum(day.two > 12 for day in days)
    if first or second:
        return "day-first" if first >= second else "month-first"
    return "day-first" if days and all(day.dotted or day.one == day.two for day in days) else None
