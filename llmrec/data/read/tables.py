"""Tables in memory: location of rows in files, concatenation, expansion of lists, and column lookup."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow.compute as pc

from llmrec.data.read import limits
from llmrec.data.read.codes import concatenate_coded, convert_whole_floats
from llmrec.data.read.limits import format_error, format_names, format_value
from llmrec.data.read.nested import ELEMENT_SUFFIX, arrow_to_polars, enclosing_lists, flatten_columns, readable_paths
from llmrec.errors import DataError, Location, did_you_mean
from llmrec.terminal import warn_once_logger

log = warn_once_logger(__name__)

MAX_COLUMNS = 2000
"""Maximum number of columns; more result from rows joined by a wrong line end or separator."""
_LONGEST_NAME = 1000
NO_COLUMN = "none"
"""Value of a key of ``data.columns`` that disables a column, although one has llmrec's default name."""
_REQUIRED_KEYS = ("data.columns.user", "data.columns.item")


@dataclass(frozen=True)
class Table:
    """A table as read from a file.

    Attributes:
        name: The file, for errors.
        frame: The values: texts from text files, any type from Parquet.
        sha256: Hash of the file as stored; empty if it is not a file.
        lines: The line of each row, or None if row n is on line n + ``header``.
        header: Number of lines before the first row.
        unusable: Excluded columns, with descriptions of their values.
        parts: The concatenated tables; empty for a single file.
        rows: The 0-based index of each row in the file, if rows were excluded; None: all rows are included.
        unread: Columns that are only listed by name, because they were not requested.
        lists: Arrow columns with a list in each row, by path; see `llmrec.data.read.nested`.
    """

    name: str
    frame: pl.DataFrame
    sha256: str = ""
    lines: Sequence[int] | None = None
    header: int = 0
    unusable: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[Table, ...] = ()
    rows: Sequence[int] | None = None
    unread: frozenset[str] = frozenset()
    lists: Mapping[str, Any] = field(default_factory=dict)

    def column(self, name: str) -> pl.Series:
        """Return a column.

        Raises:
            LookupError: If it was not read: columns must be requested when the table is read.
        """
        if name in self.unread:
            raise LookupError(f"column {name!r} of {self.name} was not read")
        return self.frame[name]

    def where(self, index: int) -> Location:
        """Return the location of a row in its file, by 0-based index."""
        for part in self.parts:
            if index < part.frame.height:
                return part.where(index)
            index -= part.frame.height
        row = self.rows[index] if self.rows is not None else index
        return Location(self.name, row + 1, self.line(index))

    def line(self, index: int) -> int:
        """Return the line of a row in a single file, by 0-based index."""
        return self.lines[index] if self.lines is not None else index + 1 + self.header

    def select_rows(self, indices: pl.Series) -> Table:
        """Return the rows of a single file with these 0-based indices, without its lists; rows keep their locations."""
        rows = indices if self.rows is None else map(self.rows.__getitem__, indices)
        lines = array("q", map(self.line, indices))
        return replace(self, frame=self.frame[indices], lines=lines, rows=array("q", rows), lists={})


def validate_column_names(name: str, columns: Iterable[str], fix: str = "rename one") -> list[str]:
    """Return column names without surrounding spaces.

    Raises:
        DataError: If one is repeated, or there are too many.
    """
    names = [column.strip() for column in columns]
    if len(names) > MAX_COLUMNS:
        raise DataError.at(
            Location(name, 0, 1),
            "too-large",
            f": {len(names)} columns are more than {MAX_COLUMNS}; check the separator and the line ends, "
            "or keep only the required columns",
        )
    long = next((column for column in names if len(column) > _LONGEST_NAME), None)
    if long is not None:
        raise DataError.at(
            Location(name, 0, 1),
            "too-large",
            f": a column name has {len(long)} characters; check the line ends of the file",
        )
    repeated = next((column for column, count in Counter(names).items() if count > 1), None)
    if repeated is not None:
        raise DataError.at(
            Location(name, 0, 1), "duplicate", f": the column {format_value(repeated)} is repeated; {fix}", repeated
        )
    return names


def check_columns(name: str, names: Sequence[str], wanted: Iterable[str]) -> None:
    """Check that a file has the requested columns.

    Raises:
        DataError: If one is missing.
    """
    for column in wanted:
        if column not in names:
            raise DataError.at(
                name,
                "missing-column",
                f" has no column {column!r}{did_you_mean(column, names)}, unlike this data set; its columns are: "
                f"{format_names(names)}. Correct data.path, or download the file again",
                column,
            )


# --------------------------------------------------------------------------- columns named in a recipe


def nested_column_paths(table: Table) -> list[str]:
    """Return the names of columns nested in lists."""
    first = table.parts[0] if table.parts else table
    return [path for name, column in first.lists.items() for path in readable_paths(name, column.type.value_type)]


def find_column(table: Table, name: str | None, default: str, key: str) -> str | None:
    """Return the column that a recipe key names, or the default column if the table has it.

    Args:
        table: The table.
        name: The recipe's value; None means ``default`` if that column exists, and `NO_COLUMN` no column.
        default: llmrec's default name.
        key: The recipe's key, for the error.

    Raises:
        DataError: If the recipe names a missing column.
    """
    columns = table.frame.columns
    if name == NO_COLUMN and name not in columns and key not in _REQUIRED_KEYS:
        return None
    check_usable(table, name or default, key)
    if name is None:
        return default if default in columns else None
    if name not in columns:
        known = [*columns, *nested_column_paths(table)]
        raise DataError.at(
            table.name,
            "missing-column",
            f" has no column {name!r}{did_you_mean(name, known)}; its columns are: {format_names(known)}. Set "
            f"{key}=COLUMN in the recipe",
            name,
        )
    return name


def check_usable(table: Table, column: str, key: str) -> None:
    """Reject a column whose values cannot be used.

    Raises:
        DataError: With a description of its values.
    """
    if column not in table.unusable:
        return
    within = [
        path
        for path in (*table.frame.columns, *nested_column_paths(table))
        if path.startswith((f"{column}.", column + ELEMENT_SUFFIX))
    ]
    what = f"has {table.unusable[column]}, which cannot be used; write it as texts, numbers or dates"
    if within:
        what = f"has {table.unusable[column]}; name a column inside these values, such as {format_names(within[:4])}"
    raise DataError.at(
        table.name, "bad-value", f": column {column!r} {what}, or name another column as {key}=...", column
    )


def check_users_match(name: str, users: pl.Series, known: pl.Series) -> None:
    """Reject a user table that has no user in common with the interactions.

    Args:
        name: Name of the table.
        users: Its users.
        known: Users of the interactions.

    Raises:
        DataError: If no user matches.
    """
    users, known = (ids.cast(pl.String).unique() for ids in (users, known))
    result = int(known.is_in(users.implode()).sum())
    if not result:
        raise DataError.at(
            name,
            "mismatch",
            f" (data.users): none of its {len(users)} users, such as {format_value(str(users.sort()[0]))}, has an "
            f"interaction. The interactions have user ids such as {format_value(str(known.sort()[0]))}; use the same "
            "ids in both tables",
        )
    if 2 * result < len(known):
        log.warning("%s (data.users): %d of %d users are missing in this table", name, len(known) - result, len(known))


# --------------------------------------------------------------------------- several tables


def concatenate_tables(tables: Sequence[Table]) -> Table:
    """Concatenate tables with the same columns; errors name the file of a row.

    Raises:
        DataError: If a column is missing in one of them, or has incompatible values.
    """
    first = tables[0]
    for table in tables[1:]:
        for one, other in ((first, table), (table, first)):
            absent = [name for name in one.frame.columns if name not in other.frame.columns]
            if absent:
                raise DataError.at(
                    other.name,
                    "missing-column",
                    f" has no column {absent[0]!r}, which {one.name} has; use the same columns in all files, or a "
                    "single file",
                    absent[0],
                )
    columns = first.frame.columns
    unread = frozenset().union(*(table.unread for table in tables))
    try:
        frame = pl.DataFrame(
            [_concatenate_column(name, [table.frame[name] for table in tables], unread) for name in columns]
        )
    except pl.exceptions.PolarsError as error:
        raise DataError.at(
            "; ".join(table.name for table in tables),
            "bad-value",
            f": a column has different types in these files ({format_error(error)}); use the same type in all files",
        ) from error
    return Table(
        "; ".join(table.name for table in tables),
        frame,
        "; ".join(table.sha256 for table in tables),
        unusable={name: values for table in tables for name, values in table.unusable.items()},
        parts=tuple(tables),
        unread=unread,
    )


def _concatenate_column(name: str, parts: Sequence[pl.Series], unread: frozenset[str]) -> pl.Series:
    """Return a column of the concatenated tables."""
    if name in unread:
        return pl.repeat(None, sum(map(len, parts)), dtype=pl.Null, eager=True).alias(name)
    if all(isinstance(part.dtype, pl.Enum) for part in parts):
        return concatenate_coded(name, parts)
    plain = [part.cast(pl.String) if isinstance(part.dtype, pl.Enum) else part for part in parts]
    if any(part.dtype == pl.String for part in plain):
        plain = [convert_whole_floats(part) for part in plain]
    return pl.concat([part.to_frame(name) for part in plain], how="vertical_relaxed")[name]


# --------------------------------------------------------------------------- lists


def expand_lists(table: Table, names: Iterable[str | None]) -> Table:
    """Expand a list to one row per element, if the given columns are in a list.

    Errors name the original rows. A row with an empty list is excluded.

    Args:
        table: The table as read.
        names: The needed columns, such as ``lines[].sku``.

    Raises:
        DataError: If the columns are in two lists, or all lists are empty.
    """
    chosen = tuple(name for name in names if name is not None and ELEMENT_SUFFIX in name)
    if not chosen:
        return table
    if table.parts:
        parts = concatenate_tables([_expand_file_lists(part, chosen) for part in table.parts])
        result = replace(parts, name=table.name, sha256=table.sha256)
    else:
        result = _expand_file_lists(table, chosen)
    if result.frame.is_empty():
        raise DataError.at(table.name, "empty", f": the lists of {chosen[0]} are empty in all rows", chosen[0])
    return result


def _expand_file_lists(table: Table, names: Sequence[str]) -> Table:
    """Expand a list in one file to one row per element."""
    wanted = {name: enclosing_lists(name) for name in names if name not in table.frame.columns}
    wanted = {name: lists for name, lists in wanted.items() if lists and lists[0] in table.lists}
    if not wanted:
        return table
    longest = max(wanted, key=lambda name: len(wanted[name]))
    for name, lists in wanted.items():
        if lists != wanted[longest][: len(lists)]:
            raise DataError.at(
                table.name,
                "contradiction",
                f": the columns {longest!r} and {name!r} are in different lists; name columns of one list, whose "
                "elements become rows",
                name,
            )
    for name in wanted[longest]:
        if name in table.lists:
            table = _expand_list(table, name)
    return table


def _expand_list(table: Table, name: str) -> Table:
    """Return a table with one row per element of a list column."""
    column = table.lists[name]
    counts = pc.list_value_length(column).fill_null(0).to_numpy()
    rows = np.repeat(np.arange(len(counts)), counts)
    sizes = [_text_bytes(column) for column in table.frame if column.dtype in (pl.String, pl.List(pl.String))]
    if sum(int((size.to_numpy() * counts).sum()) for size in sizes) > limits.MAX_BYTES:
        raise DataError.at(
            table.name,
            "too-large",
            f": with one row per element of {name}, the texts take more than {limits.MAX_BYTES} bytes; write fewer "
            "columns, or split the file",
            name,
        )
    result = flatten_columns(table.name, {name: pc.list_flatten(column)})
    inner = arrow_to_polars(result.columns).with_columns(pl.col(pl.String).fill_null(""))
    selected = table.select_rows(pl.Series(rows))
    frame = pl.concat([selected.frame, inner], how="horizontal")
    return replace(selected, frame=frame, lists=result.lists, unusable={**table.unusable, **result.unusable})


def _text_bytes(texts: pl.Series) -> pl.Series:
    """Return the number of bytes of each text."""
    if texts.dtype == pl.String:
        return texts.str.len_bytes().cast(pl.Int64).fill_null(0)
    return texts.list.eval(pl.element().str.len_bytes().cast(pl.Int64)).list.sum().fill_null(0)
