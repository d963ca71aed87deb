"""The query that `llmrec init` suggests for a database: the table, or two joined ones, with a user and an item."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from itertools import permutations

from llmrec.data.read.databases import read_query, tables_of
from llmrec.data.read.limits import enumerated
from llmrec.data.read.text import Table
from llmrec.errors import DataError, LlmrecError
from llmrec.start.init.columns import guess
from llmrec.start.init.profile import Profile, no_id, profile
from llmrec.start.init.roles import Asked, Roles

_MOST_TABLES, _ROWS = 40, 2000
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LEAST = 0.9
"""Least weight of a name that says by itself that a column is a user or an item."""


def no_query(url: str) -> DataError:
    """Return the error of a database without a query, with the query that fits it best."""
    tables = tables_of(url)
    return DataError.at(
        url,
        "missing-key",
        f": say which rows are the interactions, such as --query {shlex.quote(suggested(url, tables))}; its tables "
        f"are: {enumerated(tables)}",
        "data.query",
    )


def suggested(url: str, tables: list[str] | None = None) -> str:
    """Return a SELECT of interactions: of a table with a user and an item, or of two tables that have one of them each.

    Titles are joined from a table with one row an item. Only the first rows of each table are read.
    """
    tables = tables_of(url) if tables is None else tables
    known = dict(_read(url, tables[:_MOST_TABLES]))
    judged = {name: roles for name, table in known.items() if (roles := _roles(table)) is not None}
    if judged:
        name = max(judged, key=lambda each: (judged[each].time is not None, known[each].frame.height))
        return _with_items(name, judged[name], known)
    columns = {name: _profiles(table) for name, table in known.items()}
    for lines, orders in permutations(columns, 2):
        shared = [each for each in columns[lines] if each in columns[orders]]
        if shared and _has(columns[lines], "item") and _has(columns[orders], "user"):
            return f"SELECT * FROM {_sql(lines)} JOIN {_sql(orders)} USING ({_sql(shared[0])})"
    return f"SELECT * FROM {_sql(tables[0]) if tables else 'TABLE'}"


def _read(url: str, tables: list[str]) -> Iterator[tuple[str, Table]]:
    for name in tables:
        try:
            yield name, read_query(url, f"SELECT * FROM {_sql(name)} LIMIT {_ROWS}")
        except LlmrecError:
            continue  # an empty table, or a view that no longer works


def _roles(table: Table) -> Roles | None:
    try:
        roles = guess(table, Asked())
    except LlmrecError:
        return None
    # The number of an order repeats as users do; the user is in another table then.
    return None if roles.profiles[roles.user].named.weight("row") else roles


def _profiles(table: Table) -> Mapping[str, Profile]:
    try:
        return profile(table)
    except LlmrecError:
        return {}


def _has(columns: Mapping[str, Profile], role: str) -> bool:
    return any(held.named.weight(role) >= _LEAST and not no_id(held) for held in columns.values())


def _with_items(name: str, roles: Roles, known: Mapping[str, Table]) -> str:
    """Return the SELECT of a table, with titles and fields from another one that lists its items."""
    for other, table in known.items():
        listed = _profiles(table)
        if roles.title is not None or other == name or roles.item not in listed or not listed[roles.item].unique:
            continue
        more = [c for c, held in listed.items() if held.named.weight("title") or held.named.weight("field")]
        more = [column for column in more if column not in roles.profiles]
        if more:
            columns = ", ".join([f"{_sql(name)}.*", *(f"{_sql(other)}.{_sql(column)}" for column in more)])
            return f"SELECT {columns} FROM {_sql(name)} LEFT JOIN {_sql(other)} USING ({_sql(roles.item)})"
    return f"SELECT * FROM {_sql(name)}"


def _sql(name: str) -> str:
    doubled = name.replace('"', '""')
    return name if _PLAIN.fullmatch(name) else f'"{doubled}"'
