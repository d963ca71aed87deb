"""How a column writes its numbers and times, and the same numbers in the form that llmrec reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import polars as pl

from llmrec.data.read.dates import DateOrder, Dates, read_dates

NumberForm = Literal["plain numbers", "decimal commas", "thousands separators", "no numbers"]
TimeForm = Literal[
    "times",
    "numbers",
    "ISO dates",
    "day-first dates",
    "month-first dates",
    "dates",
    "dates whose day and month cannot be told apart",
    "no times",
]

READABLE: frozenset[str] = frozenset(
    {"plain numbers", "times", "numbers", "ISO dates", "day-first dates", "month-first dates", "dates"}
)
"""Forms that a recipe can use as they stand."""
# A column is of a form if so large a share of its values is; the rest is named row by row.
_MOST = 0.8
_TRIED = 200

_ISO = r"^\d{4}-?\d{2}-?\d{2}"
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
        values: The cells, null where one holds no time.
        low: Smallest, where the times are numbers.
        high: Largest, where they are numbers.
        seconds: Since 1970, where they are dates.
    """

    form: TimeForm
    values: pl.Series
    low: float | None = None
    high: float | None = None
    seconds: pl.Series | None = None

    @property
    def sortable(self) -> pl.Series:
        """What sorts as the times do, null where a cell holds none: numbers, or texts of times that have a type."""
        if self.seconds is not None:
            return self.seconds
        return self.values.cast(pl.Float64, strict=False) if self.form == "numbers" else self.values


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
    if not _mostly_dates(read_dates(some.gather_every(max(1, filled // _TRIED)), order)):
        return Times("no times", pl.Series([None] * len(cells), dtype=pl.String))
    found = read_dates(cells, order)
    if not found.unsure.any():
        iso = cells.str.contains(_ISO).sum() >= _MOST * filled
        form: TimeForm = "ISO dates" if iso else "dates"
    else:
        form = f"{found.order} dates" if found.order else "dates whose day and month cannot be told apart"  # type: ignore[assignment]
    return Times(form, cells.set(found.seconds.is_null(), None), seconds=found.seconds)


def _mostly_dates(found: Dates) -> bool:
    return int((found.seconds.is_not_null() | found.unsure).sum()) >= _MOST * len(found.unsure)
