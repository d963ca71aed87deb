"""Statistics of table columns and pairs of columns, from which `llmrec.start.columns` guesses their roles.

A small table is read whole, a large one in blocks spread over the file.
"""

from __future__ import annotations

import codecs
import gzip
import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from llmrec.data.dataset import PARTS
from llmrec.data.read.delimited import detect_separator, read_delimited
from llmrec.data.read.files import (
    COMPRESSED_ENDINGS,
    JSON_LINES_ENDINGS,
    PARQUET_ENDINGS,
    InMemoryFile,
    split_gz_ending,
)
from llmrec.data.read.limits import READ_ERRORS, LimitedStream, describe_file_problem, format_error
from llmrec.data.read.objects import read_json_lines
from llmrec.data.read.parquet import PARQUET_ERRORS, check_declared_size, table_from_arrow
from llmrec.data.read.table import ATOMIC_ENDINGS, is_pattern, read_table, strip_column_types
from llmrec.data.read.tables import Table, expand_lists
from llmrec.data.read.text import TextFormat
from llmrec.data.read.typed import DateOrder, ParsedDates, parse_dates, text_column
from llmrec.data.read.words import ColumnMeaning, event_rank, interpret_column_name
from llmrec.data.sets.table import PART_SPELLINGS, parse_split_part
from llmrec.display import shorten_text
from llmrec.errors import DataError, Location
from llmrec.guard import clean

# --------------------------------------------------------------------------- numbers


NumberForm = Literal["plain numbers", "decimal commas", "thousands separators", "no numbers"]
TimeForm = Literal[
    "times",
    "numbers",
    "ISO dates",
    "day-first dates",
    "month-first dates",
    "dates",
    "dates with ambiguous day and month",
    "no times",
]

READABLE_FORMS: frozenset[str] = frozenset(
    {"plain numbers", "times", "numbers", "ISO dates", "day-first dates", "month-first dates", "dates"}
)
"""Number forms that a recipe can read unchanged."""
# A column has a format if at least this share of its values has it; other values are reported as errors.
_MIN_FORMAT_SHARE = 0.8
_SAMPLED_DATES = 200

_ISO_DATE = r"^\d{4}-?\d{2}-?\d{2}"
_DECIMAL_COMMA = r"^[+-]?(?:\d{1,3}(?:[. ]\d{3})+|\d+)(?:,\d+)?$"
_THOUSANDS_SEPARATOR = r"^[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?$"


@dataclass(frozen=True)
class Numbers:
    """A column parsed as numbers, which are null where a cell has none."""

    form: NumberForm
    values: pl.Series


@dataclass(frozen=True)
class Times:
    """A column parsed as times.

    Attributes:
        values: The cells; null if a cell has no time.
        low: Smallest value, if the times are numbers.
        high: Largest value, if the times are numbers.
        seconds: Seconds since 1970, if the times are dates.
    """

    form: TimeForm
    values: pl.Series
    low: float | None = None
    high: float | None = None
    seconds: pl.Series | None = None

    @property
    def sortable(self) -> pl.Series:
        """Sort keys of the times, null if missing: numbers, or strings for columns with a date or time type."""
        if self.seconds is not None:
            return self.seconds
        return self.values.cast(pl.Float64, strict=False) if self.form == "numbers" else self.values


def parse_numbers(texts: pl.Series) -> Numbers:
    """Parse a column of strings as numbers, in the format that most values have."""
    cells = texts.str.strip_chars()
    filled = max(int((cells != "").sum()), 1)
    plain = _finite_numbers(cells)
    if filled - (len(plain) - plain.null_count()) == 0:
        return Numbers("plain numbers", plain)
    best = Numbers("plain numbers", plain)
    commas = cells.str.contains(",", literal=True)
    if commas.any():
        decimal = _convert_matching(
            cells, _DECIMAL_COMMA, lambda c: c.str.replace_all(r"[. ]", "").str.replace(",", ".", literal=True)
        )
        grouped = _convert_matching(cells, _THOUSANDS_SEPARATOR, lambda c: c.str.replace_all(",", "", literal=True))
        # An ambiguous value such as 4,500 has a thousands separator if all values with commas have groups of three
        # digits.
        only_groups = bool(cells.filter(commas).str.contains(r"^[+-]?\d{1,3}(,\d{3})+(\.\d+)?$").all())
        order = (("thousands separators", grouped), ("decimal commas", decimal))
        for form, values in order if only_groups else order[::-1]:
            if values.null_count() < best.values.null_count():
                best = Numbers(form, values)  # type: ignore[arg-type]
    share = (len(plain) - best.values.null_count()) / filled
    return best if share >= _MIN_FORMAT_SHARE else Numbers("no numbers", best.values)


def _convert_matching(cells: pl.Series, pattern: str, change: Callable[[pl.Series], pl.Series]) -> pl.Series:
    return _finite_numbers(change(cells).set(~cells.str.contains(pattern), None))


def _finite_numbers(cells: pl.Series) -> pl.Series:
    result = cells.cast(pl.Float64, strict=False)
    return result.set(~result.is_finite().fill_null(True), None)


# --------------------------------------------------------------------------- times


def parse_times(series: pl.Series, texts: pl.Series, order: DateOrder | None = None) -> Times:
    """Parse a column as times.

    Args:
        series: The column with its type.
        texts: The same column as text.
        order: Whether the day or the month is first in dates such as 03/04/2024; None: inferred from the column.
    """
    if isinstance(series.dtype, pl.Datetime | pl.Date):
        return Times("times", texts.set(texts == "", None))
    cells = texts.str.strip_chars()
    plain = _finite_numbers(cells)
    filled = int((cells != "").sum())
    if filled == 0:
        return Times("no times", plain.cast(pl.String))
    if len(plain) - plain.null_count() >= _MIN_FORMAT_SHARE * filled:
        low, high = (float(v) if isinstance(v, int | float) else None for v in (plain.min(), plain.max()))
        return Times("numbers", cells.set(plain.is_null(), None), low, high)
    some = cells.filter(cells != "")
    if not _are_mostly_dates(parse_dates(some.gather_every(max(1, filled // _SAMPLED_DATES)), order)):
        return Times("no times", pl.Series([None] * len(cells), dtype=pl.String))
    result = parse_dates(cells, order)
    if not result.unsure.any():
        iso = cells.str.contains(_ISO_DATE).sum() >= _MIN_FORMAT_SHARE * filled
        form: TimeForm = "ISO dates" if iso else "dates"
    else:
        form = f"{result.order} dates" if result.order else "dates with ambiguous day and month"  # type: ignore[assignment]
    return Times(form, cells.set(result.seconds.is_null(), None), seconds=result.seconds)


def _are_mostly_dates(dates: ParsedDates) -> bool:
    return int((dates.seconds.is_not_null() | dates.unsure).sum()) >= _MIN_FORMAT_SHARE * len(dates.unsure)


_MAX_DEPENDENCE_ROWS, _MIN_DEPENDENCE_ROWS, _NEARLY_CONSTANT = 300_000, 12, 0.95
UNIX_RANGES = ((1e8, 4e9), (1e11, 4e12), (1e14, 4e15), (1e17, 4e18))
"""Ranges of seconds, milliseconds, microseconds and nanoseconds since 1970, for the years 1973 to 2096."""


def printable_name(name: str, limit: int = 40) -> str:
    """Return a name from a file on one line, printable and truncated."""
    return shorten_text(clean(name, limit + 1), limit)


@dataclass(frozen=True)
class ColumnProfile:
    """Statistics of a column.

    Attributes:
        named: The roles that the name suggests.
        cells: The values as strings; empty if blank.
        filled: Number of filled cells.
        distinct: Number of distinct values in them.
        length: Mean number of characters of a filled cell.
        words: Mean number of words of a filled cell.
        letters: Share of filled cells with a letter.
    """

    name: str
    named: ColumnMeaning
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
        """Number of rows."""
        return len(self.cells)

    @property
    def unique(self) -> bool:
        """Whether nearly all values are different."""
        return self.distinct >= 0.99 * self.filled and self.distinct > 1

    @cached_property
    def whole(self) -> bool:
        """Whether all numbers are integers."""
        values = self.numbers.values.drop_nulls()
        return bool((values == values.round(0)).all())

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The different numbers, lowest first."""
        return tuple(self.numbers.values.drop_nulls().unique().sort().to_list())

    @property
    def numeric(self) -> bool:
        """Whether nearly all non-empty cells are numbers."""
        return self.numbers.form != "no numbers" and self.filled > 0

    @cached_property
    def counts(self) -> bool:
        """Whether the numbers look like counts: minimum 0 or 1, maximum above 10, and mostly small."""
        values = self.numbers.values.drop_nulls()
        if not self.numeric or values.is_empty() or not 0 <= self.levels[0] <= 1 < self.levels[-1] / 10:
            return False
        low, high = self.levels[0], self.levels[-1]
        return (
            float((values <= low).sum()) >= 0.3 * len(values)
            or _mean((values < low + (high - low) / 4).cast(pl.Float64)) > 0.5
        )


def profile_columns(table: Table, dates: DateOrder | None = None) -> dict[str, ColumnProfile]:
    """Return the statistics of every column, by name.

    Raises:
        DataError: If the table has only one column, or no header.
    """
    columns = table.frame.columns
    if len(columns) < 2:
        raise DataError.at(
            table.name,
            "missing-column",
            f" has only one column, {printable_name(columns[0], 80)!r}; a table needs user and item columns, separated "
            "by commas, semicolons or tabs",
        )
    result = {name: _profile_column(table, name, dates) for name in columns}
    values = [not name.strip() or _is_cell_value(name) for name in columns]
    # If a name is also a value of its column, it probably is a value and the file has no header.
    alike = [value or bool((result[name].cells == name).any()) for value, name in zip(values, columns, strict=True)]
    if all(values) or (sum(alike) > 1 and 2 * sum(alike) >= len(alike)):
        raise DataError.at(
            table.name,
            "wrong-format",
            f" seems to have no header: its first line is {printable_name(', '.join(columns), 80)!r}; add a first line "
            "with the column names",
        )
    return result


def _is_cell_value(name: str) -> bool:
    cell = pl.Series([name])
    return bool(parse_numbers(cell).values.null_count() == 0 or parse_times(cell, cell).values.null_count() == 0)


def _profile_column(table: Table, name: str, dates: DateOrder | None) -> ColumnProfile:
    # Ids are compared unchanged, including surrounding spaces; a cell with only spaces counts as empty.
    cells = text_column(table, name)
    cells = cells.set(cells.str.strip_chars() == "", "")
    full = cells.filter(cells != "")
    some = full.gather_every(max(1, len(full) // 5000))
    series = table.frame[name]
    read = parse_numbers(cells if series.dtype != pl.Boolean else series.cast(pl.Int8).cast(pl.String).fill_null(""))
    return ColumnProfile(
        name=name,
        named=interpret_column_name(name),
        cells=cells,
        filled=len(full),
        distinct=full.n_unique(),
        length=_mean(some.str.len_chars()),
        words=_mean(some.str.count_matches(r"\S+")),
        letters=_mean(some.str.contains(r"\p{L}").cast(pl.Float64)),
        numbers=read,
        times=parse_times(series, cells, dates),
    )


def _mean(series: pl.Series) -> float:
    return as_float(series.mean())


def as_float(value: object) -> float:
    """Return a number of polars as a float; 0 for none."""
    return float(value) if isinstance(value, int | float) else 0.0


def dependence_share(column: pl.Series, other: pl.Series) -> float | None:
    """Return how well one column determines another, between 0 and 1.

    1 means that ``column`` determines ``other``, as an item determines its title. Only repeated values of ``column``
    are used, and blank cells are ignored. None: too few values repeat, or ``other`` is nearly constant, so that any
    column would determine it.
    """
    frame = pl.DataFrame({"a": column[:_MAX_DEPENDENCE_ROWS], "b": other[:_MAX_DEPENDENCE_ROWS]})
    frame = frame.filter((pl.col("b") != "") & (pl.col("a") != "")).filter(pl.len().over("a") > 1)
    if (
        frame.height < _MIN_DEPENDENCE_ROWS
        or as_float(frame["b"].unique_counts().max()) > _NEARLY_CONSTANT * frame.height
    ):
        return None
    counts = frame.group_by("a", "b").len().group_by("a").agg(pl.col("len").max())
    return as_float(counts["len"].sum()) / frame.height


# --------------------------------------------------------------------------- classification of values


def id_problem(col: ColumnProfile, *, named: bool = False) -> str:
    """Return why a column cannot be the user or the item; empty if it can.

    Args:
        col: The column.
        named: Whether the user gave it; then it is rejected only if no user would have a history.
    """
    if not col.filled:
        return "it is empty"
    if col.distinct < 2:
        return "it has the same value in every row"
    if col.unique:
        return f"it has a different value in every row ({col.distinct} in {col.filled})"
    if named:
        return ""
    if col.filled < 0.5 * col.rows:
        return f"it is empty in {col.rows - col.filled} of {col.rows} rows"
    if col.times.form not in ("no times", "numbers"):
        return "it holds dates"
    if col.numeric and not col.whole:
        return "it contains fractional numbers"
    if col.words > 12:
        return "it contains long texts"
    return ""


def looks_like_ids(col: ColumnProfile) -> bool:
    """Whether values repeat like ids and have no other meaning."""
    text = col.named
    if any(text.weight(role) for role in ("rating", "time", "text", "field", "count", "headline")):
        return False
    unix = col.times.low is not None and any(low <= col.times.low for low, _ in UNIX_RANGES[1:])
    few = col.numeric and col.distinct <= 21
    return col.distinct >= 3 and col.words <= 1.5 and not unix and not few


def looks_like_ratings(col: ColumnProfile) -> bool:
    """Whether numbers fit a usual rating scale: 3 to 21 whole or half points, with a maximum from 3 to 10."""
    levels = col.levels
    halves = all(float(2 * level).is_integer() for level in levels)
    return 3 <= len(levels) <= 21 and halves and levels[0] >= 0 and 3 <= levels[-1] <= 10


def count_split_parts(col: ColumnProfile) -> dict[str, int]:
    """Return the number of rows for each part of a split, in any spelling."""
    sizes = dict.fromkeys(PARTS, 0)
    # A column of many different values cannot be a split, so its values are not checked.
    for cell, count in col.cells.value_counts().iter_rows() if col.distinct <= 3 * len(PART_SPELLINGS) else ():
        if (part := parse_split_part(cell)) is not None:
            sizes[part] += count
    return sizes


_MAX_EVENT_TYPES = 20


def count_event_types(col: ColumnProfile) -> dict[str, int]:
    """Return the number of rows per event type, strongest interest first; empty if the column has no event types."""
    if not 2 <= col.distinct <= _MAX_EVENT_TYPES:
        return {}
    sizes = dict(col.cells.filter(col.cells != "").value_counts().iter_rows())
    ranks = {kind: rank for kind in sizes if (rank := event_rank(kind)) is not None}
    if len(ranks) < 2 or 2 * sum(sizes[kind] for kind in ranks) < col.filled:
        return {}
    return {
        kind: sizes[kind] for kind in sorted(sizes, key=lambda kind: (ranks.get(kind, _MAX_EVENT_TYPES), -sizes[kind]))
    }


def describe_repetition(col: ColumnProfile) -> str:
    """Describe how often values repeat."""
    return f"{col.distinct} values, {col.filled / max(col.distinct, 1):.1f} rows each"


def describe_levels(col: ColumnProfile) -> str:
    """Describe the range of the numbers."""
    return f"{len(col.levels)} values from {col.levels[0]:g} to {col.levels[-1]:g}" + (
        "" if col.numbers.form in READABLE_FORMS else f", written with {col.numbers.form}"
    )


def describe_times(col: ColumnProfile) -> str:
    """Describe the format of the times."""
    times = col.times
    if times.form != "numbers" or times.low is None or times.high is None:
        return times.form
    units = ("seconds", "milliseconds", "microseconds", "nanoseconds")
    for unit, (low, high) in zip(units, UNIX_RANGES, strict=True):
        if low <= times.low and times.high < high:
            return f"{unit} since 1970"
    return f"numbers from {times.low:g} to {times.high:g}"


def shell_quoted(name: str) -> str:
    """Return a name quoted for the shell."""
    line = printable_name(name)
    return line if line and all(c.isalnum() or c in "_-.:" for c in line) else f"'{line}'"


WHOLE_BYTES = 32 * 2**20
"""Files up to this size, unpacked, are read whole."""
PART_BYTES = 16 * 2**20
"""Approximate number of bytes read of larger ones."""
WHOLE_ROWS = 1_000_000
"""Parquet tables with up to this number of rows are read whole."""
PART_ROWS = 400_000
"""Approximate number of rows read of larger ones."""

_BLOCK_COUNT = 12


@dataclass(frozen=True)
class TableSample:
    """A table, or the part of it that was read.

    Attributes:
        whole: Whether these are all rows.
        first: Number of rows from the beginning of the file; the others are from further down.
    """

    table: Table
    whole: bool
    first: int

    def location(self, index: int) -> Location:
        """Return the file and line of a row, by 0-based index, if known."""
        return self.table.where(index) if index < self.first else Location(self.table.name)

    def along(self, names: Sequence[str]) -> TableSample:
        """Expand the list that contains the given columns to one row per element; see `expand_lists`."""
        table = expand_lists(self.table, names)
        if table is self.table:
            return self
        first = table.frame.height if table.rows is None else bisect_left(table.rows, self.first)
        return TableSample(table, self.whole, first)

    def where(self, index: int) -> str:
        """Describe the location of a row, by 0-based index."""
        return str(self.location(index)) if index < self.first else f"{self.table.name}, a row further down"


def read_sample(path: Path, *, whole: bool = False, limit: int = WHOLE_BYTES, part: int = PART_BYTES) -> TableSample:
    """Read a table, or parts of it if it is larger than ``limit`` bytes.

    Args:
        path: The file.
        whole: Whether to read all of it, whatever its size.
        limit: Largest uncompressed size, in bytes, that is read whole.
        part: Approximate number of bytes to read of a larger file.

    Raises:
        DataError: If it is missing, empty or malformed.
    """
    kind, packed = split_gz_ending(path)
    # Several files, and formats without independent rows, are read completely.
    whole = whole or path.is_dir() or is_pattern(path) or kind in (".json", *COMPRESSED_ENDINGS)
    size = 0 if describe_file_problem(path) else path.stat().st_size  # `read_table` raises the error
    if not whole and size:
        try:
            if packed and kind not in PARQUET_ENDINGS:
                return _read_packed(path, kind, limit, part) or _read_whole(path)
            if kind in PARQUET_ENDINGS and not packed:
                return _read_row_groups(path) or _read_whole(path)
            if size > limit:
                return _read_blocks(path, kind, size, part)
        except (*READ_ERRORS, *PARQUET_ERRORS) as error:
            raise DataError.at(
                path, "damaged", f" cannot be read ({format_error(error)}); write the table again"
            ) from error
    return _read_whole(path)


def _read_whole(path: Path) -> TableSample:
    table = read_table(path)
    return TableSample(table, True, table.frame.height)


def _read_packed(path: Path, kind: str, limit: int, part: int) -> TableSample | None:
    """Read the beginning of a gzipped file; None if the file is small enough to be read completely."""
    with gzip.open(path) as stream:
        raw = LimitedStream(str(path), stream, path.stat().st_size).read(limit + 1)  # type: ignore[arg-type]
    return None if len(raw) <= limit else _parse_sample(path, kind, _complete_rows(raw[:part]), b"")


def _read_blocks(path: Path, kind: str, size: int, part: int) -> TableSample:
    with path.open("rb") as stream:
        head = stream.read(part // _BLOCK_COUNT)
        if not _is_utf8(head):
            return _read_whole(path)
        if kind not in JSON_LINES_ENDINGS and b'"' in head:
            # A quoted field may contain line breaks, so the start of a row in a later block is unknown.
            return _parse_sample(path, kind, _complete_rows(head + stream.read(part // 2)), b"")
        rest = []
        for number in range(1, _BLOCK_COUNT):
            stream.seek(size * number // _BLOCK_COUNT)
            block = stream.read(part // _BLOCK_COUNT)
            rest.append(block[block.find(b"\n") + 1 : block.rfind(b"\n") + 1])
    return _parse_sample(path, kind, head[: head.rfind(b"\n") + 1], b"".join(rest))


def _is_utf8(head: bytes) -> bool:
    """Whether the beginning of a file is UTF-8; the last character may be incomplete."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _complete_rows(raw: bytes) -> bytes:
    """Truncate the beginning of a file after its last complete row."""
    end = raw.rfind(b"\n")
    while end > 0 and raw.count(b'"', 0, end) % 2:
        end = raw.rfind(b"\n", 0, end)
    return raw[: end + 1]


def _parse_sample(path: Path, kind: str, head: bytes, rest: bytes) -> TableSample:
    name = str(path)
    if not head.strip():
        raise DataError.at(name, "empty", ": the beginning of the file has no complete row; write the table again")
    # Later rows are used only for statistics: `llmrec check` reads the whole file and reports errors there.
    lines = rest.decode("utf-8", errors="replace").replace("\0", " ").encode().split(b"\n")
    if kind in JSON_LINES_ENDINGS:
        known = sum(bool(line.strip()) for line in head.split(b"\n"))
        return TableSample(
            read_json_lines(InMemoryFile(name, b"\n".join([head.rstrip(b"\n"), *filter(_is_json_object, lines)]))),
            False,
            known,
        )
    separator = "," if kind == ".csv" else "\t"
    form = TextFormat(kind="delimited", separator=separator, quoted=True)
    first = read_delimited(InMemoryFile(name, head), form)
    first = strip_column_types(first) if kind in ATOMIC_ENDINGS else first
    known = first.frame.height
    header = head[: head.find(b"\n")]
    mark = detect_separator(header.decode("utf-8", errors="replace"), separator)
    names = first.frame.columns
    kept = [line for line in lines if line.count(mark.encode()) == len(names) - 1 and b'"' not in line]
    below = form.model_copy(update={"separator": mark, "columns": tuple(names)})
    more = read_delimited(InMemoryFile(name, b"\n".join(kept)), below).frame if kept else first.frame.clear()
    frame = pl.concat([first.frame, more], how="diagonal").with_columns(pl.all().fill_null(""))
    return TableSample(Table(name, frame, "", first.lines if more.is_empty() else None, first.header), False, known)


def _is_json_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_row_groups(path: Path) -> TableSample | None:
    """Read some row groups of a Parquet file; None if the whole file is small enough."""
    file = pq.ParquetFile(path)
    check_declared_size(str(path), file, path.stat().st_size)
    rows, groups = file.metadata.num_rows, file.metadata.num_row_groups
    if rows <= WHOLE_ROWS:
        return None
    chosen = sorted({groups * number // _BLOCK_COUNT for number in range(_BLOCK_COUNT)})
    need = PART_ROWS // len(chosen)
    batches: list[pa.RecordBatch] = []
    for group in chosen:
        taken = 0
        for batch in file.iter_batches(batch_size=need, row_groups=[group]):
            batches.append(batch)
            taken += batch.num_rows
            if taken >= need:
                break
    table = table_from_arrow(str(path), pa.Table.from_batches(batches))
    return TableSample(table, False, min(need, table.frame.height))
