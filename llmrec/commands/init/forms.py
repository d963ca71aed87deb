"""How a column writes its numbers and times, and the same values in the form that llmrec reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import polars as pl

NumberForm = Literal["plain numbers", "decimal commas", "thousands separators", "no numbers"]
TimeForm = Literal[
    "times",
    "numbers",
    "ISO dates",
    "day-first dates",
    "month-first dates",
    "dates whose day and month cannot be told apart",
    "dates that are not ISO",
    "no times",
]
DateOrder = Literal["day-first", "month-first"]
ORDERS: tuple[DateOrder, ...] = ("day-first", "month-first")

READABLE: frozenset[str] = frozenset({"plain numbers", "times", "numbers", "ISO dates"})
"""Forms that a recipe can use as they stand."""
# A column is of a form if so large a share of its values is; the rest is named row by row.
_MOST = 0.8
_TRIED = 200

_COMMA = r"^[+-]?(?:\d{1,3}(?:[. ]\d{3})+|\d+)(?:,\d+)?$"
_THOUSANDS = r"^[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?$"


@dataclass(frozen=True)
class Numbers:
    """A column read as numbers.

    Attributes:
        form: How they are written.
        values: Null where a cell holds none.
    """

    form: NumberForm
    values: pl.Series

    @property
    def share(self) -> float:
        """Share of all rows that hold a number."""
        return 1 - self.values.null_count() / max(len(self.values), 1)


@dataclass(frozen=True)
class Times:
    """A column read as times.

    Attributes:
        form: How they are written.
        values: ISO dates or numbers as text, null where a cell holds no time.
        low: Smallest, where the times are numbers.
        high: Largest, where they are numbers.
    """

    form: TimeForm
    values: pl.Series
    low: float | None = None
    high: float | None = None


def numbers(texts: pl.Series) -> Numbers:
    """Read a column of texts as numbers, in the form that most of its values are written in."""
    cells = texts.str.strip_chars()
    filled = max(int((cells != "").sum()), 1)
    plain = _finite(cells)
    if filled - (len(plain) - plain.null_count()) == 0:
        return Numbers("plain numbers", plain)
    best = Numbers("plain numbers", plain)
    commas = cells.str.contains(",", literal=True)
    if commas.any():
        decimal = _masked(cells, _COMMA, lambda c: c.str.replace_all(r"[. ]", "").str.replace(",", ".", literal=True))
        grouped = _masked(cells, _THOUSANDS, lambda c: c.str.replace_all(",", "", literal=True))
        # What reads both ways, such as 4,500, is a decimal comma only if nothing shows groups of three.
        only_groups = bool(cells.filter(commas).str.contains(r"^[+-]?\d{1,3}(,\d{3})+(\.\d+)?$").all())
        order = (("thousands separators", grouped), ("decimal commas", decimal))
        for form, values in order if only_groups else order[::-1]:
            if values.null_count() < best.values.null_count():
                best = Numbers(form, values)  # type: ignore[arg-type]
    share = (len(plain) - best.values.null_count()) / filled
    return best if share >= _MOST else Numbers("no numbers", best.values)


def _masked(cells: pl.Series, pattern: str, change: Callable[[pl.Series], pl.Series]) -> pl.Series:
    return _finite(change(cells).set(~cells.str.contains(pattern), None))


def _finite(cells: pl.Series) -> pl.Series:
    found = cells.cast(pl.Float64, strict=False)
    return found.set(~found.is_finite().fill_null(True), None)


# --------------------------------------------------------------------------- times


def times(series: pl.Series, texts: pl.Series, order: DateOrder | None = None) -> Times:
    """Read a column as times.

    Args:
        series: The column as it was read.
        texts: The same column as text.
        order: Whether the day or the month stands first in dates such as 03/04/2024; None: as the column shows.
    """
    if isinstance(series.dtype, pl.Datetime | pl.Date):
        return Times("times", texts.set(texts == "", None))
    cells = texts.str.strip_chars()
    plain = _finite(cells)
    filled = int((cells != "").sum())
    if filled == 0:
        return Times("no times", plain.cast(pl.String))
    if len(plain) - plain.null_count() >= _MOST * filled:
        low, high = (float(v) if isinstance(v, int | float) else None for v in (plain.min(), plain.max()))
        return Times("numbers", cells.set(plain.is_null(), None), low, high)
    some = cells.filter(cells != "")
    some = some.gather_every(max(1, filled // _TRIED))
    if sum(_iso(text) or _fields(text) is not None for text in some) < _MOST * len(some):
        return Times("no times", pl.Series([None] * len(cells), dtype=pl.String))
    distinct = cells.unique().drop_nulls().to_list()
    if sum(_iso(text) for text in distinct) >= _MOST * len(distinct):
        return Times("ISO dates", _mapped(cells, {text: text for text in distinct if _iso(text)}))
    return _other(cells, distinct, order)


def _other(cells: pl.Series, distinct: Sequence[str], order: DateOrder | None) -> Times:
    read = {text: fields for text in distinct if (fields := _fields(text)) is not None}
    open_ = [fields for fields in read.values() if fields.year_first is None]
    found = order or _order(open_)
    iso = {text: moment for text, fields in read.items() if (moment := fields.iso(found or "day-first"))}
    iso |= {text: text for text in distinct if _iso(text)}
    form: TimeForm = "dates that are not ISO"
    if open_:
        form = "dates whose day and month cannot be told apart" if found is None else f"{found} dates"  # type: ignore[assignment]
    return Times(form, _mapped(cells, iso))


def _mapped(cells: pl.Series, known: dict[str, str]) -> pl.Series:
    return cells.replace_strict(known, default=None, return_dtype=pl.String)


def _iso(text: str) -> bool:
    try:
        moment = datetime.fromisoformat(text)
        (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        return True
    except (ValueError, OverflowError):
        return False


_CLOCK = (
    r"(?:(?:[ T,]|, )+(\d{1,2})[:.h](\d{2})(?:[:.](\d{2}))?(?:[.,](\d+))?\s*([ap]\.?m\.?)?"
    r"\s*(Z|UTC|GMT|[+-]\d{2}:?\d{2})?)?$"
)
_DIGITS = re.compile(r"^(\d{1,4})([./-])(\d{1,2})\2\s?(\d{2,4})" + _CLOCK, re.IGNORECASE)
_WEEKDAY = r"^(?:[a-z]{2,9}\.?,? )??"
_MONTH = r"([^\W\d_]{3,12})\.?"
_NAMED = re.compile(
    rf"{_WEEKDAY}(?:(\d{{1,2}})\.?[ -]{_MONTH}|{_MONTH} (\d{{1,2}})),?[ -](\d{{4}})" + _CLOCK, re.IGNORECASE
)
_SPACED = re.compile(r"^(\d{1,2})( )(\d{1,2}), (\d{4})" + _CLOCK, re.IGNORECASE)
_ENGLISH = "jan feb mar apr may jun jul aug sep oct nov dec"
_GERMAN = {"mär": 3, "mrz": 3, "mai": 5, "okt": 10, "dez": 12}
_MONTHS = {name: number for number, name in enumerate(_ENGLISH.split(), start=1)} | _GERMAN


@dataclass(frozen=True)
class _Fields:
    """A date in parts; ``year_first`` is None where one and two may be day and month or month and day."""

    year: int
    one: int
    two: int
    year_first: bool | None
    dotted: bool
    clock: tuple[int, int, int, int]
    zone: str

    def iso(self, order: str) -> str | None:
        """Return the date in ISO form; None if there is no such day."""
        day, month = (self.one, self.two) if order == "day-first" else (self.two, self.one)
        if self.year_first is not None:
            month, day = self.one, self.two
        try:
            moment = datetime(self.year, month, day, *self.clock)
        except ValueError:
            return None
        return moment.isoformat() + self.zone


def _fields(text: str) -> _Fields | None:
    found = _DIGITS.match(text) or _SPACED.match(text)
    if found is not None:
        a, mark, b, c = found.groups()[:4]
        clock, zone = _clock(found.groups()[4:])
        if len(a) == 4:
            return _Fields(int(a), int(b), int(c), True, False, clock, zone) if len(c) == 2 else None
        if len(a) == 3 or len(c) == 3:
            return None
        year = int(c) if len(c) == 4 else 2000 + int(c) if int(c) < 70 else 1900 + int(c)
        return _Fields(year, int(a), int(b), None, mark == ".", clock, zone)
    found = _NAMED.match(text)
    if found is None:
        return None
    month = _MONTHS.get((found[2] or found[3])[:3].lower())
    clock, zone = _clock(found.groups()[5:])
    return (
        None if month is None else _Fields(int(found[5]), month, int(found[1] or found[4]), False, False, clock, zone)
    )


def _clock(groups: Sequence[str | None]) -> tuple[tuple[int, int, int, int], str]:
    hour, minute, second, fraction, half, zone = groups
    hours = int(hour or 0)
    if half:
        hours = hours % 12 + (12 if half[0].lower() == "p" else 0)
    shift = "" if not zone else "+00:00" if zone[0] in "ZzUuGg" else zone if ":" in zone else f"{zone[:3]}:{zone[3:]}"
    return (hours, int(minute or 0), int(second or 0), int((fraction or "0")[:6].ljust(6, "0"))), shift


def _order(dates: Sequence[_Fields]) -> DateOrder | None:
    """Return what the column shows: a first number above 12 is a day, and so is a second one."""
    days, months = sum(d.one > 12 for d in dates), sum(d.two > 12 for d in dates)
    if days or months:
        return "day-first" if days >= months else "month-first"
    return "day-first" if dates and all(d.dotted for d in dates) else None
