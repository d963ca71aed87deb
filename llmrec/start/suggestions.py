"""Suggests a database query for `llmrec init`: a table with user and item, or a join of two tables."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

from llmrec.data.read.databases import read_query, tables_of
from llmrec.data.read.limits import enumerated
from llmrec.data.read.nested import leaf
from llmrec.data.read.sheets import SHEETS, sheets_of, split_sheet
from llmrec.data.read.tables import Table
from llmrec.errors import DataError, LlmrecError
from llmrec.start.columns import RequestedRoles, Roles, guess
from llmrec.start.profile import Profile, no_id, peek, profile

_MOST_TABLES, _ROWS = 40, 2000
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LEAST = 0.9
"""Minimum weight of a column name for the column to be a user or item column."""


def no_query(url: str) -> DataError:
    """Return the error for a database without a query, with a suggested query."""
    tables = tables_of(url)
    return DataError.at(
        url,
        "missing-key",
        f": select the interactions, for example with --query {shlex.quote(suggested(url, tables))}; its tables are: "
        f"{enumerated(tables)}",
        "data.query",
    )


def suggested(url: str, tables: list[str] | None = None) -> str:
    """Return a SELECT of interactions, from one table or a join of two tables.

    Titles are joined from a table with one row per item. Only the first rows of each table are read.
    """
    tables = tables_of(url) if tables is None else tables
    known = dict(_read(url, tables[:_MOST_TABLES]))
    judged = {name: roles for name, table in known.items() if (roles := _roles(table)) is not None}
    if judged:
        name = max(judged, key=lambda entry: (judged[entry].time is not None, known[entry].frame.height))
        return _with_items(name, judged[name], known)
    columns = {name: _profiles(table) for name, table in known.items()}
    for lines, orders in permutations(columns, 2):
        shared = [entry for entry in columns[lines] if entry in columns[orders]]
        if shared and _has(columns[lines], "item") and _has(columns[orders], "user"):
            return f"SELECT * FROM {_sql(lines)} JOIN {_sql(orders)} USING ({_sql(shared[0])})"
    return f"SELECT * FROM {_sql(tables[0]) if tables else 'TABLE'}"


def _read(url: str, tables: list[str]) -> Iterator[tuple[str, Table]]:
    for name in tables:
        try:
            yield name, read_query(url, f"SELECT * FROM {_sql(name)} LIMIT {_ROWS}")
        except LlmrecError:
            continue  # an empty table, or a broken view


def _roles(table: Table) -> Roles | None:
    try:
        roles = guess(table, RequestedRoles())
    except LlmrecError:
        return None
    # Order numbers repeat as users do; the user is then in another table.
    return None if roles.profiles[roles.user].named.weight("row") else roles


def _profiles(table: Table) -> Mapping[str, Profile]:
    try:
        return profile(table)
    except LlmrecError:
        return {}


def _has(columns: Mapping[str, Profile], role: str) -> bool:
    return any(col.named.weight(role) >= _LEAST and not no_id(col) for col in columns.values())


def _with_items(name: str, roles: Roles, known: Mapping[str, Table]) -> str:
    """Return the SELECT of a table, joined with titles and fields from a table of items."""
    for other, table in known.items():
        listed = _profiles(table)
        if roles.title is not None or other == name or roles.item not in listed or not listed[roles.item].unique:
            continue
        more = [c for c, col in listed.items() if col.named.weight("title") or col.named.weight("field")]
        more = [column for column in more if column not in roles.profiles]
        if more:
            columns = ", ".join([f"{_sql(name)}.*", *(f"{_sql(other)}.{_sql(column)}" for column in more)])
            return f"SELECT {columns} FROM {_sql(name)} LEFT JOIN {_sql(other)} USING ({_sql(roles.item)})"
    return f"SELECT * FROM {_sql(name)}"


def _sql(name: str) -> str:
    doubled = name.replace('"', '""')
    return name if _PLAIN.fullmatch(name) else f'"{doubled}"'


# --------------------------------------------------------------------------- item tables


_COMPANIONS = 20
_TEXT_ENDINGS = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".gz")


@contextmanager
def _unsaid() -> Iterator[None]:
    """Suppress warnings while reading a file that the user did not name."""
    reading = logging.getLogger("llmrec.data.read")
    level = reading.level
    reading.setLevel(logging.ERROR)
    try:
        yield
    finally:
        reading.setLevel(level)


def companion_of(path: Path, item: str) -> Path | None:
    """Return another file (or sheet) that has the item column; None if not unique."""
    result: list[Path] = []
    for other in _others(path):
        try:
            with _unsaid():
                table = peek(other, limit=2**18, part=2**18).table
            column = item if item in table.frame.columns else leaf(item)
            if column in table.frame.columns and profile(table)[column].unique:
                result.append(other)
        except LlmrecError:
            continue
        if len(result) > 1:
            break
    if len(result) != 1:
        return None
    return result[0] if path.is_absolute() else path.parent / result[0].name


def _others(path: Path) -> Iterator[Path]:
    """Yield the other sheets of a spreadsheet, or the other text files in the folder of a table."""
    book, _ = split_sheet(path)
    if book.suffix.lower() in SHEETS:
        yield from (Path(name) for name in sheets_of(book) if Path(name) != path)
        return
    for other in sorted(path.absolute().parent.iterdir())[: 10 * _COMPANIONS]:
        if other.suffix.lower() in _TEXT_ENDINGS and other.is_file() and other.name != path.name:
            yield other
