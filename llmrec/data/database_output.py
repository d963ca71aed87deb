"""Writes tables into SQLite, DuckDB and PostgreSQL databases, each in one transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from llmrec.data.read.databases import database_path, mask_passwords
from llmrec.data.read.limits import format_error
from llmrec.errors import DataError, LlmrecError, require

SQLITE_ENDINGS = (".db", ".sqlite", ".sqlite3")
"""Endings of files that are SQLite databases."""
DATABASE_ADDRESS_FORMS = "sqlite:///FILE, duckdb:///FILE or postgresql://..."
_TYPES = {pa.string(): "TEXT", pa.int64(): "BIGINT", pa.float64(): "DOUBLE PRECISION"}


@dataclass(frozen=True)
class Database:
    """A database that is written to.

    Attributes:
        kind: ``sqlite``, ``duckdb`` or ``postgresql``.
        at: The path of the file, or the address of the server.
        option: The option that named it, for messages.
    """

    kind: str
    at: str
    option: str

    @classmethod
    def of(cls, text: str, option: str) -> Database | None:
        """Return the database of an address or a path; None if it names none.

        Raises:
            MissingExtra: If the package for this kind of database is not installed.
        """
        scheme = text.partition("://")[0].lower()
        if "://" not in text:
            return cls("sqlite", text, option) if Path(text).suffix.lower() in SQLITE_ENDINGS else None
        if scheme in ("postgresql", "postgres"):
            require("adbc_driver_postgresql", "tables")
            return cls("postgresql", text, option)
        if scheme == "duckdb":
            require("duckdb", "tables")
        known = scheme in _CONNECTORS and text.startswith(f"{scheme}:///") and database_path(text).name
        return cls(scheme, str(database_path(text)), option) if known else None

    @property
    def file(self) -> Path | None:
        """The database file; None for a server."""
        return None if self.kind == "postgresql" else Path(self.at)

    @property
    def shown(self) -> str:
        """The name for messages, without the password of an address."""
        return self.at if self.file is not None else without_password(self.at)

    def check(self, name: str, schema: pa.Schema, *, replace: bool) -> None:
        """Raise an error if a table cannot be written, so that no work is lost.

        Args:
            name: The name of the table.
            schema: Its columns: texts, integers and floats.
            replace: Whether to overwrite a table with these columns.

        Raises:
            DataError: If the table exists and must not be overwritten, or the file belongs to another program.
            LlmrecError: If the database cannot be opened.
        """
        if self.file is not None and not self.file.parent.is_dir():
            raise self._error("failed", f" cannot be written: there is no folder {self.file.parent}; create it")
        if self.file is None or self.file.exists():
            with self._open() as connection:
                self._check(connection, name, schema, replace)

    def write(self, name: str, table: pa.Table, *, index: tuple[str, ...], replace: bool) -> None:
        """Write a table in one transaction; other tables of the database are unchanged.

        Args:
            name: The name of the table.
            table: The rows, with columns of texts, integers and floats.
            index: The columns of its index.
            replace: Whether to overwrite a table with the same columns.

        Raises:
            DataError: As `check`.
            LlmrecError: If the database cannot be written; then nothing has changed.
        """
        with self._open() as connection:
            cursor = self._cursor(connection)
            if self.kind != "postgresql":
                cursor.execute("BEGIN IMMEDIATE" if self.kind == "sqlite" else "BEGIN")
            exists = self._check(connection, name, table.schema, replace)
            columns = ", ".join(f"{field.name} {_TYPES[field.type]}" for field in table.schema)
            # A table that was not checked, such as one of another schema in the search path, is never dropped.
            if exists:
                cursor.execute(f"DROP TABLE {name}")
            cursor.execute(f"CREATE TABLE {name} ({columns})")
            if self.kind == "postgresql":
                cursor.adbc_ingest(name, table, mode="append")
            elif self.kind == "duckdb":
                cursor.register("llmrec_rows", table)
                cursor.execute(f"INSERT INTO {name} SELECT * FROM llmrec_rows")
            else:
                marks = ", ".join("?" * table.num_columns)
                rows = (tuple(row.values()) for batch in table.to_batches() for row in batch.to_pylist())
                cursor.executemany(f"INSERT INTO {name} VALUES ({marks})", rows)
            cursor.execute(f"CREATE INDEX {name}_by_{index[0]} ON {name} ({', '.join(index)})")
            connection.commit()

    def _check(self, connection: Any, name: str, schema: pa.Schema, replace: bool) -> bool:
        if self.kind == "sqlite" and connection.execute("PRAGMA application_id").fetchone()[0]:
            raise self._error("exists", " belongs to another program; choose another file")
        cursor = self._cursor(connection)
        cursor.execute(_COLUMN_QUERIES[self.kind].format(name=name))
        columns = [row[0] for row in cursor.fetchall()]
        if columns and columns != schema.names:
            raise self._error("exists", f" has another table {name!r}; choose another database or schema")
        if columns and not replace:
            raise self._error(
                "exists", f" has a table {name!r}; overwrite it with --restart, or choose another database"
            )
        return bool(columns)

    def _cursor(self, connection: Any) -> Any:
        # A cursor of DuckDB is a second connection, outside the transaction of the first.
        return connection if self.kind == "duckdb" else connection.cursor()

    @contextmanager
    def _open(self) -> Iterator[Any]:
        """Yield a connection; errors of its library are converted, and uncommitted changes are undone."""
        try:
            with closing(_CONNECTORS[self.kind](self.at)) as connection:
                yield connection
        except LlmrecError:
            raise
        except Exception as error:  # each library has its own errors
            # The message may contain the address, which may contain a password.
            message = format_error(RuntimeError(mask_passwords(str(error), self.at).replace(self.at, self.shown)))
            raise self._error("failed", f" cannot be written ({message}); nothing in it was changed") from None

    def _error(self, kind: Any, rest: str) -> DataError:
        return DataError(f"{self.option} {self.shown}{rest}", kind=kind, at=self.file, column=self.option)


def without_password(address: str) -> str:
    """Return an address without user, password and parameters."""
    try:
        parts = urlsplit(address)
    except ValueError:  # such as a [ in a password that is not written as %5B
        return f"{address.partition('://')[0]}://..."
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"


_INFORMATION_SCHEMA_QUERY = (
    "SELECT column_name FROM information_schema.columns WHERE table_schema = current_schema() "
    "AND table_name = '{name}' ORDER BY ordinal_position"
)
_COLUMN_QUERIES: Mapping[str, str] = {
    "sqlite": "SELECT name FROM pragma_table_info('{name}')",
    # Names of tables are case-insensitive.
    "duckdb": _INFORMATION_SCHEMA_QUERY.replace("table_name =", "lower(table_name) ="),
    "postgresql": _INFORMATION_SCHEMA_QUERY,
}
_CONNECTORS: Mapping[str, Callable[[str], Any]] = {
    "sqlite": lambda at: sqlite3.connect(at, isolation_level=None),
    "duckdb": lambda at: require("duckdb", "tables").connect(at),
    "postgresql": lambda at: require("adbc_driver_postgresql.dbapi", "tables").connect(at),
}
