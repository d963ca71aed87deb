"""What each column of a table holds, and which of them goes with which; `llmrec.data.guess` draws the conclusions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import polars as pl

from llmrec.data.columns import texts
from llmrec.data.files import Table
from llmrec.data.forms import READABLE, DateOrder, Numbers, Times, numbers, times
from llmrec.data.words import Named, named
from llmrec.errors import DataError
from llmrec.guard import clean

_TIE_ROWS, _TIE_LEAST, _ALWAYS = 300_000, 12, 0.95
UNIX = ((1e8, 4e9), (1e11, 4e12), (1e14, 4e15), (1e17, 4e18))
"""Seconds, milliseconds, microseconds and nanoseconds since 1970, of the years 1973 to 2096."""


def shown(name: str, limit: int = 40) -> str:
    """Return a name from a file as one printable line."""
    line = clean(name, limit + 1)
    return line if len(line) <= limit else line[: limit - 1] + "…"


@dataclass(frozen=True)
class Profile:
    """What one column holds.

    Attributes:
        name: As the file writes it.
        named: What the name says.
        cells: Every value as text; blank ones are empty.
        filled: Rows that hold something.
        distinct: Different values among them.
        length: Mean characters of a filled cell.
        words: Mean words of a filled cell.
        letters: Share of filled cells with a letter.
        numbers: The column read as numbers.
        times: The column read as times.
    """

    name: str
    named: Named
    cells: pl.Series
    filled: int
    distinct: int
    length: float
    words: float
    letters: float
    numbers: Numbers
    times: Times

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return len(self.cells)

    @property
    def per_value(self) -> float:
        """Rows of each value, on average."""
        return self.filled / max(self.distinct, 1)

    @property
    def unique(self) -> bool:
        """Whether (nearly) every row has a value of its own."""
        return self.distinct >= 0.99 * self.filled and self.distinct > 1

    @cached_property
    def whole(self) -> bool:
        """Whether its numbers are whole."""
        values = self.numbers.values.drop_nulls()
        return bool((values == values.round(0)).all())

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The different numbers, lowest first."""
        return tuple(self.numbers.values.drop_nulls().unique().sort().to_list())

    @property
    def numeric(self) -> bool:
        """Whether nearly all that stands there is a number."""
        return self.numbers.form != "no numbers" and self.filled > 0

    @cached_property
    def counts(self) -> bool:
        """Whether its numbers look like counts or amounts: from 0 to 1 up to more than 10, most of them low."""
        values = self.numbers.values.drop_nulls()
        if not self.numeric or values.is_empty() or not 0 <= self.levels[0] <= 1 < self.levels[-1] / 10:
            return False
        low, high = self.levels[0], self.levels[-1]
        return (
            float((values <= low).sum()) >= 0.3 * len(values)
            or _mean((values < low + (high - low) / 4).cast(pl.Float64)) > 0.5
        )


def profile(table: Table, dates: DateOrder | None = None) -> dict[str, Profile]:
    """Return what every column holds.

    Raises:
        DataError: If the table has a single column, or its header is a row of values.
    """
    columns = table.frame.columns
    if len(columns) < 2:
        raise DataError(
            f"{table.name} has one column, {shown(columns[0], 80)!r}; a table needs a user and an item, and commas, "
            "semicolons or tabs between its columns"
        )
    found = {name: _profile(table, name, dates) for name in columns}
    values = [not name.strip() or _is_value(name) for name in columns]
    # A name that stands among the values of its own column is one of them.
    alike = [value or bool((found[name].cells == name).any()) for value, name in zip(values, columns, strict=True)]
    if all(values) or (sum(alike) > 1 and 2 * sum(alike) >= len(alike)):
        raise DataError(
            f"{table.name} seems to have no header: its first line is {shown(', '.join(columns), 80)!r}; write the "
            "names of the columns above it"
        )
    return found


def _is_value(name: str) -> bool:
    cell = pl.Series([name])
    return bool(numbers(cell).values.null_count() == 0 or times(cell, cell).values.null_count() == 0)


def _profile(table: Table, name: str, dates: DateOrder | None) -> Profile:
    # Ids are compared as they stand, blanks around them included; a cell of nothing but blanks holds nothing.
    cells = texts(table, name)
    cells = cells.set(cells.str.strip_chars() == "", "")
    full = cells.filter(cells != "")
    some = full.gather_every(max(1, len(full) // 5000))
    series = table.frame[name]
    read = numbers(cells if series.dtype != pl.Boolean else series.cast(pl.Int8).cast(pl.String).fill_null(""))
    return Profile(
        name=name,
        named=named(name),
        cells=cells,
        filled=len(full),
        distinct=full.n_unique(),
        length=_mean(some.str.len_chars()),
        words=_mean(some.str.count_matches(r"\S+")),
        letters=_mean(some.str.contains(r"\p{L}").cast(pl.Float64)),
        numbers=read,
        times=times(series, cells, dates),
    )


def _mean(series: pl.Series) -> float:
    return _float(series.mean())


def _float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def goes_with(one: pl.Series, other: pl.Series) -> float | None:
    """Return the share of rows whose ``other`` value is the most frequent one of their ``one`` value.

    1 means that ``other`` follows from ``one``, as a title follows from its item. Only values of ``one`` that repeat
    can show that, and blank cells are left out. None: too few repeat, or ``other`` is nearly always the same, which
    would follow from anything.
    """
    frame = pl.DataFrame({"a": one[:_TIE_ROWS], "b": other[:_TIE_ROWS]})
    frame = frame.filter((pl.col("b") != "") & (pl.col("a") != "")).filter(pl.len().over("a") > 1)
    if frame.height < _TIE_LEAST or _float(frame["b"].unique_counts().max()) > _ALWAYS * frame.height:
        return None
    counts = frame.group_by("a", "b").len().group_by("a").agg(pl.col("len").max())
    return _float(counts["len"].sum()) / frame.height


# --------------------------------------------------------------------------- what values look like


def no_id(held: Profile, *, named: bool = False) -> str:
    """Return why a column cannot be the user or the item; an empty text if it can.

    Args:
        held: The column.
        named: Whether the user named it; then only what would leave nobody a history stands against it.
    """
    if not held.filled:
        return "it is empty"
    if held.distinct < 2:
        return "it has the same value in every row"
    if held.unique:
        return f"it has a different value in every row ({held.distinct} in {held.filled})"
    if named:
        return ""
    if held.filled < 0.5 * held.rows:
        return f"it is empty in {held.rows - held.filled} of {held.rows} rows"
    if held.times.form not in ("no times", "numbers"):
        return "it holds dates"
    if held.numeric and not held.whole:
        return "it holds numbers with fractions"
    if held.words > 12:
        return "it holds long texts"
    return ""


def looks_like_ids(held: Profile) -> bool:
    """Whether values repeat as ids do and mean nothing else."""
    said = held.named
    if any(said.weight(role) for role in ("rating", "time", "text", "field", "count", "headline")):
        return False
    unix = held.times.low is not None and any(low <= held.times.low for low, _ in UNIX[1:])
    few = held.numeric and held.distinct <= 21
    return held.distinct >= 3 and held.words <= 1.5 and not unix and not few


def looks_like_ratings(held: Profile) -> bool:
    """Whether the numbers lie on a usual scale: up to 21 levels in whole or half points, the best from 3 to 10."""
    levels = held.levels
    halves = all(float(2 * level).is_integer() for level in levels)
    return 3 <= len(levels) <= 21 and halves and levels[0] >= 0 and 3 <= levels[-1] <= 10


def repeats(held: Profile) -> str:
    """Say how often values repeat."""
    return f"{held.distinct} values, {held.per_value:.1f} rows each"


def levels(held: Profile) -> str:
    """Say which numbers there are."""
    return f"{len(held.levels)} values from {held.levels[0]:g} to {held.levels[-1]:g}" + (
        "" if held.numbers.form in READABLE else f", written with {held.numbers.form}"
    )


def when(held: Profile) -> str:
    """Say how times are written."""
    times = held.times
    if times.form != "numbers" or times.low is None or times.high is None:
        return times.form
    units = ("seconds", "milliseconds", "microseconds", "nanoseconds")
    for unit, (low, high) in zip(units, UNIX, strict=True):
        if low <= times.low and times.high < high:
            return f"{unit} since 1970"
    return f"numbers from {times.low:g} to {times.high:g}"


def shell(name: str) -> str:
    """Return a name as it is typed after an option."""
    line = shown(name)
    return line if line and all(c.isalnum() or c in "_-.:" for c in line) else f"'{line}'"
