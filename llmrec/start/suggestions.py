"""Suggests a database query for `llmrec init`: a table with user and item, or a join of two tables."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

from llmrec.data.read.databases import read_query, read_table_names
from llmrec.data.read.limits import format_names
from llmrec.data.read.nested import leaf_name
from llmrec.data.read.sheets import SPREADSHEET_ENDINGS, list_sheets, split_sheet_name
from llmrec.data.read.tables import Table
from llmrec.errors import DataError, LlmrecError
from llmrec.start.columns import RequestedRoles, Roles, guess_roles
from llmrec.start.profile import ColumnProfile, id_problem, profile_columns, read_sample

_MAX_TABLES, _SAMPLE_ROWS = 40, 2000
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MIN_NAME_WEIGHT = 0.9
"""Minimum weight of a column name for the column to be a user or item column."""


def missing_query_error(url: str) -> DataError:
    """Return the error for a database without a query, with a suggested query."""
    tables = read_table_names(url)
    return DataError.at(
        url,
        "missing-key",
        f": select the interactions, for example with --query {shlex.quote(suggest_query(url, tables))}; its tables "
        f"are: {format_names(tables)}",
        "data.query",
    )


def suggest_query(url: str, tables: list[str] | None = None) -> str:
    """Return a SELECT of interactions, from one table or a join of two tables.

    Titles are joined from a table with one row per item. Only the first rows of each table are read.
    """
    tables = read_table_names(url) if tables is None else tables
    known = dict(_read_tables(url, tables[:_MAX_TABLES]))
    judged = {name: roles for name, table in known.items() if (roles := _guess_table_roles(table)) is not None}
    if judged:
        name = max(judged, key=lambda entry: (judged[entry].time is not None, known[entry].frame.height))
        return _query_with_items(name, judged[name], known)
    columns = {name: _profile_table(table) for name, table in known.items()}
    for lines, orders in permutations(columns, 2):
        shared = [entry for entry in columns[lines] if entry in columns[orders]]
        if shared and _has_role_column(columns[lines], "item") and _has_role_column(columns[orders], "user"):
            left, right, key = map(_quote_identifier, (lines, orders, shared[0]))
            return f"SELECT * FROM {left} JOIN {right} USING ({key})"
    return f"SELECT * FROM {_quote_identifier(tables[0]) if tables else 'TABLE'}"


def _read_tables(url: str, tables: list[str]) -> Iterator[tuple[str, Table]]:
    for name in tables:
        try:
            yield name, read_query(url, f"SELECT * FROM {_quote_identifier(name)} LIMIT {_SAMPLE_ROWS}")
        except LlmrecError:
            continue  # an empty table, or a broken view


def _guess_table_roles(table: Table) -> Roles | None:
    try:
        roles = guess_roles(table, RequestedRoles())
    except LlmrecError:
        return None
    # Order numbers repeat as users do; the user is then in another table.
    return None if roles.profiles[roles.user].named.weight("row") else roles


def _profile_table(table: Table) -> Mapping[str, ColumnProfile]:
    try:
        return profile_columns(table)
    except LlmrecError:
        return {}


def _has_role_column(columns: Mapping[str, ColumnProfile], role: str) -> bool:
    return any(col.named.weight(role) >= _MIN_NAME_WEIGHT and not id_problem(col) for col in columns.values())


def _query_with_items(name: str, roles: Roles, known: Mapping[str, Table]) -> str:
    """Return the SELECT of a table, joined with titles and fields from a table of items."""
    for other, table in known.items():
        listed = _profile_table(table)
        if roles.title is not None or other == name or roles.item not in listed or not listed[roles.item].unique:
            continue
        more = [c for c, col in listed.items() if col.named.weight("title") or col.named.weight("field")]
        more = [column for column in more if column not in roles.profiles]
        if more:
            left, right, key = map(_quote_identifier, (name, other, roles.item))
            columns = ", ".join([f"{left}.*", *(f"{right}.{_quote_identifier(column)}" for column in more)])
            return f"SELECT {columns} FROM {left} LEFT JOIN {right} USING ({key})"
    return f"SELECT * FROM {_quote_identifier(name)}"


def _quote_identifier(name: str) -> str:
    doubled = name.replace('"', '""')
    return name if _PLAIN_NAME.fullmatch(name) else f'"{doubled}"'


# --------------------------------------------------------------------------- item tables


_MAX_COMPANIONS = 20
_TEXT_ENDINGS = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".gz")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress warnings while reading a file that the user did not name."""
    reading = logging.getLogger("llmrec.data.read")
    level = reading.level
    reading.setLevel(logging.ERROR)
    try:
        yield
    finally:
        reading.setLevel(level)


def find_items_table(path: Path, item: str) -> Path | None:
    """Return another file (or sheet) that has the item column; None if not unique."""
    result: list[Path] = []
    for other in _other_tables(path):
        try:
            with _without_warnings():
                table = read_sample(other, limit=2**18, part=2**18).table
            column = item if item in table.frame.columns else leaf_name(item)
            if column in table.frame.columns and profile_columns(table)[column].unique:
                result.append(other)
        except LlmrecError:
            continue
        if len(result) > 1:
            break
    if len(result) != 1:
        return None
    return result[0] if path.is_absolute() else path.parent / result[0].name


def _other_tables(path: Path) -> Iterator[Path]:
    """Yield the other sheets of a spreadsheet, or the other text files in the folder of a table."""
    book, _ = split_sheet_name(path)
    if book.suffix.lower() in SPREADSHEET_ENDINGS:
        yield from (Path(name) for name in list_sheets(book) if Path(name) != path)
        return
    for other in sorted(path.absolute().parent.iterdir())[: 10 * _MAX_COMPANIONS]:
        if other.suffix.lower() in _TEXT_ENDINGS and other.is_file() and other.name != path.name:
            yield other
