"""Reads query results from SQLite, DuckDB and PostgreSQL databases, which are always opened read-only."""

from __future__ import annotations

import hashlib
import io
import re
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit

import polars as pl
import pyarrow as pa

from llmrec.data.read.limits import check_regular_file, describe_file_problem, format_error
from llmrec.data.read.parquet import table_from_arrow
from llmrec.data.read.tables import Table
from llmrec.errors import DataError, MissingExtra, require

QUERY_KEY = "data.query"
_FILE_SIGNATURES = (("sqlite", 0, b"SQLite format 3\0"), ("duckdb", 8, b"DUCK"))


def is_database_url(path: str) -> bool:
    """Whether ``data.path`` names a database by its prefix: ``sqlite://``, ``duckdb://`` or ``postgresql://``."""
    return urlsplit(path).scheme in _QUERY_FUNCTIONS and "://" in path


def detect_database_url(path: Path) -> str | None:
    """Return the database URL of a file that begins like a SQLite or DuckDB database."""
    if describe_file_problem(path):
        return None  # reading a pipe would block
    try:
        with path.open("rb") as stream:
            head = stream.read(16)
    except OSError:
        return None
    kind = next((kind for kind, start, mark in _FILE_SIGNATURES if head[start:].startswith(mark)), None)
    return None if kind is None else f"{kind}:///{path}"


def read_query(url: str, query: str) -> Table:
    """Return the rows of a query as a table.

    The password of a server is never part of a recipe, which is copied into results: use PGPASSWORD or ~/.pgpass.

    Args:
        url: ``sqlite:///FILE``, ``duckdb:///FILE`` (a fourth slash for a path from the root), or
            ``postgresql://USER@HOST:PORT/NAME``.
        query: One SELECT. Without timestamps its row order is the time order, so it then needs ORDER BY.

    Raises:
        DataError: If the database cannot be opened, the query fails or returns no rows, or the URL contains a password.
        MissingExtra: If the package for this kind of database is not installed.
    """
    parts = urlsplit(url)
    if parts.password or "password" in parts.query.lower():
        raise DataError(
            "data.path: the URL contains a password, and recipes are copied into results; remove the password, and "
            "set PGPASSWORD or use ~/.pgpass",
            kind="unsafe",
            column="data.path",
        )
    try:
        # The hash is over the rows, so that it does not depend on the size of blocks.
        table = _QUERY_FUNCTIONS[parts.scheme](url, query).combine_chunks()
    except (DataError, MissingExtra):
        raise
    except Exception as error:  # each library raises other types
        raise DataError.at(
            url,
            "unreadable",
            f": the query failed ({format_error(error)}); correct {QUERY_KEY}, or data.path",
            QUERY_KEY,
        ) from error
    return table_from_arrow(url, table, _hash_table(table))


def read_table_names(url: str) -> list[str]:
    """Return the names of a database's tables and views.

    Raises:
        DataError: As `read_query`.
    """
    sqlite = urlsplit(url).scheme == "sqlite"
    query = (
        "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%' ORDER BY name"
        if sqlite
        else "SELECT table_name AS name FROM information_schema.tables WHERE table_schema NOT IN "
        "('information_schema', 'pg_catalog') ORDER BY table_name"
    )
    return [str(name) for name in read_query(url, query).frame["name"]]


def _hash_table(table: pa.Table) -> str:
    writer = _HashingWriter()
    with pa.ipc.new_stream(writer, table.schema) as stream:
        stream.write_table(table)
    return writer.digest.hexdigest()


class _HashingWriter(io.RawIOBase):
    """File object that hashes what is written to it and stores nothing."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, data: Any, /) -> int:
        self.digest.update(data)
        return len(data)

    def writable(self) -> bool:
        return True


_SECRET = re.compile(r"://[^/@]*?:([^/]*)@|[?&][^=&]*password[^=&]*=([^&#]*)", re.IGNORECASE)


def mask_passwords(message: str, url: str) -> str:
    """Return a message with ``***`` in place of the passwords of a URL, which libpq may repeat in its messages.

    The URL may be invalid, as libpq repeats a password above all if its characters are not percent-encoded.
    """
    secrets = {form for match in _SECRET.findall(url) for secret in match for form in (secret, unquote(secret)) if form}
    for secret in sorted(secrets, key=len, reverse=True):
        message = message.replace(secret, "***")
    return message


def database_path(url: str) -> Path:
    """Return the path of the file in a URL such as ``sqlite:///shop.db``."""
    return Path(url.partition(":///")[2]).expanduser()


def _existing_database_path(url: str) -> Path:
    path = database_path(url)
    check_regular_file(path, "check data.path", "the database")
    return path


def _query_sqlite(url: str, query: str) -> Any:
    with closing(
        sqlite3.connect(f"file:{quote(str(_existing_database_path(url).resolve()))}?mode=ro", uri=True)
    ) as connection:
        return pl.read_database(query, connection, infer_schema_length=None).to_arrow()


def _query_duckdb(url: str, query: str) -> Any:
    with closing(require("duckdb", "tables").connect(str(_existing_database_path(url)), read_only=True)) as connection:
        # The query can read only this file: no other files and no network.
        connection.execute("SET enable_external_access = false")
        result = connection.sql(query)
        if result is None:
            raise ValueError("it returns no rows")
        return result.to_arrow_table()


def _query_postgresql(url: str, query: str) -> Any:
    dbapi = require("adbc_driver_postgresql.dbapi", "tables")
    mark = "&" if urlsplit(url).query else "?"
    option = urlencode({"options": "-c default_transaction_read_only=on"}, quote_via=quote)
    with dbapi.connect(f"{url}{mark}{option}") as connection, connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetch_arrow_table()


_QUERY_FUNCTIONS: Mapping[str, Callable[[str, str], Any]] = {
    "sqlite": _query_sqlite,
    "duckdb": _query_duckdb,
    "postgresql": _query_postgresql,
}


# --------------------------------------------------------------------------- the Hugging Face hub

_HUB_PREFIX = "hf://"


def is_hub_path(path: str) -> bool:
    """Whether ``data.path`` names a data set on the Hugging Face hub: ``hf://NAME`` or ``hf://NAME:SPLIT``."""
    return path.startswith(_HUB_PREFIX)


def hub_name(path: str) -> str:
    """Return the data set name in ``hf://NAME[:SPLIT]``."""
    return path.removeprefix(_HUB_PREFIX).partition(":")[0]


def read_hub_dataset(path: str) -> Table:
    """Read ``hf://NAME[:SPLIT]`` with the datasets library; the default split is ``train``.

    Raises:
        DataError: If it cannot be loaded.
        MissingExtra: If the library is not installed.
    """
    part = path.removeprefix(_HUB_PREFIX).partition(":")[2]
    datasets = require("datasets", "train")
    try:
        result = datasets.load_dataset(hub_name(path), split=part or "train")
        values = result.with_format("arrow")[:]
    except Exception as error:  # the library raises dozens of types, from network errors to parser errors
        raise DataError.at(
            path,
            "unreachable",
            f" cannot be loaded ({type(error).__name__}: {format_error(error)}); check the name and the split in "
            "data.path, and the connection to the hub, or download the table and set data.path to its file",
            "data.path",
        ) from error
    return table_from_arrow(path, values)
