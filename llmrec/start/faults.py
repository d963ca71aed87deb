"""Finds errors in a table that prevent a recipe from reading it, and writes a repaired copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from llmrec.data.read.nested import leaf_name
from llmrec.data.read.tables import Table
from llmrec.data.read.typed import text_column
from llmrec.durable import replace_atomically
from llmrec.errors import DataError, ErrorKind, Location
from llmrec.start.columns import Roles
from llmrec.start.profile import READABLE_FORMS, ColumnProfile, TableSample, printable_name, shell_quoted

COPY_ENDINGS = (".csv", ".parquet")


@dataclass(frozen=True)
class TableError:
    """An error in a table, which `llmrec check` would reject.

    Attributes:
        at: Its file and row, as far as known.
        text: A clause with the row, the value and the error.
        mend: How the copy fixes it; empty if only the user can.
        instead: Another way to fix it.
    """

    column: str
    at: Location
    text: str
    mend: str
    instead: str = ""
    kind: ErrorKind = "bad-value"


def find_table_errors(peek: TableSample, roles: Roles, items: Table | None, item_column: str) -> list[TableError]:
    """Return the errors in a table: first in ratings, then in times, then in ids.

    Args:
        peek: The interactions, or a part of them.
        roles: The roles of the columns.
        items: The table of items, if there is one.
        item_column: The item's column in the table of items.
    """
    listed = [
        _rating_error(peek, roles),
        _time_error(peek, roles),
        *_id_errors(peek, roles),
        *_item_errors(peek, roles, items, item_column),
    ]
    return [fault for fault in listed if fault is not None]


def _cell_error(
    peek: TableSample, col: ColumnProfile, row: int, role: str, wrong: str, mend: str, instead: str
) -> TableError:
    """Return the error of a cell; ``wrong`` says what is wrong with its value."""
    cell = f"{peek.where(row)}: the {role} in column {printable_name(col.name)!r} is {printable_name(col.cells[row])!r}"
    return TableError(col.name, peek.location(row), f"{cell}, {wrong}", mend, instead)


def _count_missing(values: pl.Series) -> tuple[int, int]:
    """Return the number of rows without a value, and the index of the first one."""
    missing = values.is_null()
    return int(missing.sum()), int(missing.arg_max() or 0)


def _default_name_error(
    peek: TableSample, col: ColumnProfile | None, role: Literal["rating", "time"]
) -> TableError | None:
    """Return the error of a column that would be read by default although the user excluded it."""
    if col is None:
        return None
    parsed = col.numbers if role == "rating" else col.times
    rows, row = _count_missing(parsed.values) if parsed.form in READABLE_FORMS else (col.rows, 0)
    if not rows:
        return None
    wrong = f"which is not a {role}, although the column has the default name of {role}s"
    mend, instead = f"the copy does not contain {col.name}", f"rename the column {col.name}"
    return _cell_error(peek, col, row, role, wrong, mend, instead)


def _rating_error(peek: TableSample, roles: Roles) -> TableError | None:
    if roles.rating is None:
        return _default_name_error(peek, roles.profiles.get("rating"), "rating")
    col = roles.profiles[roles.rating]
    form, instead = col.numbers.form, "set --rating none to ignore ratings"
    rows, row = _count_missing(col.numbers.values)
    if form == "no numbers":
        return _cell_error(peek, col, row, "rating", "which is not a number", "", instead)
    if form not in READABLE_FORMS:
        commas = col.cells.str.contains(",", literal=True)
        kind = "a decimal comma" if form == "decimal commas" else "a thousands separator"
        wrong = f"with {kind} ({int(commas.sum())} such rows), but llmrec needs numbers like 4.5"
        left_out = f", and {rows} rows without a number are removed" if rows else ""
        mend = f"{printable_name(col.name)} is written with decimal points{left_out}"
        return _cell_error(peek, col, int(commas.arg_max() or 0), "rating", wrong, mend, instead)
    if not rows:
        return None
    wrong = f"which is not a number ({rows} of {col.rows} rows); either every row or no row must have a rating"
    mend = f"rows without a number in {printable_name(col.name)} are removed"
    return _cell_error(peek, col, row, "rating", wrong, mend, instead)


def _time_error(peek: TableSample, roles: Roles) -> TableError | None:
    if roles.time is None:
        return _default_name_error(peek, roles.profiles.get("timestamp"), "time")
    col = roles.profiles[roles.time]
    form, instead = col.times.form, "set --time none to use the row order"
    rows, row = _count_missing(col.times.values)
    first = int((col.cells != "").arg_max() or 0)
    if form == "no times":
        return _cell_error(peek, col, first, "time", "which is neither a number nor a date", "", instead)
    if form == "dates with ambiguous day and month":
        instead = f"set --dates day-first or --dates month-first, or {instead}"
        wrong = "in which day and month are ambiguous, as in all other rows"
        return _cell_error(peek, col, first, "time", wrong, "", instead)
    if not rows:
        return None
    wrong = f"which does not have the format of the other times ({rows} of {col.rows} rows)"
    return _cell_error(
        peek, col, row, "time", wrong, f"rows without a time in {printable_name(col.name)} are removed", instead
    )


def _id_errors(peek: TableSample, roles: Roles) -> list[TableError]:
    listed = []
    for role in ("user", "item"):
        col = roles.profiles[getattr(roles, role)]
        if col.filled < col.rows:
            row = int((col.cells == "").arg_max() or 0)
            listed.append(
                TableError(
                    col.name,
                    peek.location(row),
                    f"{peek.where(row)}: the {role} in column {printable_name(col.name)!r} is missing "
                    f"({col.rows - col.filled} of {col.rows} rows)",
                    f"rows without {_with_article(role)} are removed",
                    kind="missing-value",
                )
            )
    return listed


def _item_errors(peek: TableSample, roles: Roles, items: Table | None, column: str) -> list[TableError]:
    if items is None:
        return []
    listed = []
    if column not in (roles.item, leaf_name(roles.item)):
        listed.append(
            TableError(
                roles.item,
                Location(peek.table.name),
                f"the item column is {printable_name(column)!r} in {items.name}, but {printable_name(roles.item)!r} in "
                f"{peek.table.name}; both must have the same name",
                f"the item column is renamed to {printable_name(column)}",
                kind="missing-column",
            )
        )
    used = roles.profiles[roles.item]
    absent = (used.cells != "") & ~used.cells.is_in(text_column(items, column).implode())
    if absent.any():
        first, count = int(absent.arg_max() or 0), used.cells.filter(absent).n_unique()
        listed.append(
            TableError(
                roles.item,
                peek.location(first),
                f"{peek.where(first)}: item {printable_name(used.cells[first])!r} is not in {items.name} ({count} of "
                f"{used.distinct} items are missing)",
                f"rows whose item is not in {items.name} are removed",
                kind="unknown-name",
            )
        )
    return listed


def describe_table_errors(name: str, listed: Sequence[TableError], copy: Path | None) -> str:
    """Return a message with all errors and how to fix them.

    Args:
        name: Name of the table.
        listed: The faults.
        copy: Where a fixed copy could be written; None for a frame in memory, which is not copied.
    """
    parts = [fault.text for fault in listed]
    message = "; ".join(f"({n}) {part}" for n, part in enumerate(parts, start=1)) if len(parts) > 1 else parts[0]
    instead = list(dict.fromkeys(fault.instead for fault in listed if fault.instead))
    mends = list(dict.fromkeys(fault.mend for fault in listed if fault.mend))
    ways = []
    if copy is None:
        instead = instead or ["Fix the frame"]
    elif all(fault.mend for fault in listed):
        ways.append(
            f"To write a repaired copy and a recipe for it, set `--mend {shell_quoted(str(copy))}`: {', '.join(mends)}"
        )
    return f"{message}. {'. '.join([*ways, *map(_capitalise, instead)])}"


def _with_article(word: str) -> str:
    return f"an {word}" if word[0] in "aeio" else f"a {word}"


def _capitalise(text: str) -> str:
    return text if text.startswith("--") else text[:1].upper() + text[1:]


# --------------------------------------------------------------------------- the repaired copy


def repair_table(table: Table, roles: Roles, items: Table | None, item_column: str) -> tuple[pl.DataFrame, list[str]]:
    """Return the columns of the recipe after repair, with descriptions of the changes.

    Args:
        table: The whole table.
        roles: The roles of the columns, from the whole table.
        items: The table of items, if there is one.
        item_column: The item's column in the table of items, and its name in the copy.
    """
    profiles = roles.profiles
    others = (roles.user, roles.rating, roles.time, roles.title, roles.text, roles.split, *roles.fields)
    if item_column != roles.item and item_column in others:
        raise DataError.at(
            table.name,
            "contradiction",
            f" has another column {printable_name(item_column)!r}, the name of the item column in the table of items; "
            "rename one of the two",
            item_column,
        )
    columns = {roles.user: profiles[roles.user].cells, item_column: profiles[roles.item].cells}
    changes: list[str] = []
    if roles.rating is not None:
        col = profiles[roles.rating]
        columns[roles.rating] = col.numbers.values.cast(pl.Int64) if col.whole else col.numbers.values
    if roles.time is not None:
        columns[roles.time] = profiles[roles.time].times.values
    for name in (roles.title, roles.text, roles.split, *roles.fields):
        if name is not None and name in profiles and name not in columns and name != roles.item:
            columns[name] = profiles[name].cells
    frame = pl.DataFrame([values.alias(name) for name, values in columns.items()])
    for column, what in ((roles.user, "user"), (item_column, "item")):
        frame = _filter_rows(frame, pl.col(column) != "", _with_article(what), changes)
    for chosen, what in ((roles.rating, "rating"), (roles.time, "time")):
        if chosen is not None:
            frame = _filter_rows(frame, pl.col(chosen).is_not_null(), f"a {what}", changes)
    if items is not None:
        known = text_column(items, item_column).unique()
        frame = _filter_rows(frame, pl.col(item_column).is_in(known.implode()), f"an entry in {items.name}", changes)
    return frame, changes


def _filter_rows(frame: pl.DataFrame, keep: pl.Expr, what: str, changes: list[str]) -> pl.DataFrame:
    result = frame.filter(keep)
    if result.height < frame.height:
        changes.append(f"{frame.height - result.height} rows without {what} were removed")
    return result


def write_repaired_table(frame: pl.DataFrame, path: Path, *, force: bool) -> None:
    """Write a repaired table as CSV or Parquet, depending on the file extension.

    Raises:
        DataError: If the suffix is another one, the file exists, or no rows are left.
    """
    if path.suffix.lower() not in COPY_ENDINGS:
        raise DataError(
            f"--mend {path}: the copy must end in {' or '.join(COPY_ENDINGS)}",
            kind="wrong-format",
            at=path,
        )
    if path.exists() and not force:
        raise DataError.at(path, "exists", " exists; choose another file for --mend, or overwrite it with --force")
    if frame.is_empty():
        raise DataError(
            f"--mend {path}: no row of the table can be used, so the copy would be empty", kind="empty", at=path
        )
    with replace_atomically(path) as draft:
        if path.suffix.lower() == ".parquet":
            frame.write_parquet(draft)
        else:
            frame.write_csv(draft)
