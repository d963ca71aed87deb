"""The databases in which a service stores data: an SQLite file, or tables in PostgreSQL.

Both have the same tables; this module contains all differences. `store` defines the contents; a connection is used by
one thread at a time. Statements have the placeholders ``?1``, ``?2``.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias
from urllib.parse import quote, urlsplit

from llmrec.data.read.databases import mask_passwords
from llmrec.data.read.limits import describe_file_problem, format_error, format_value
from llmrec.errors import DataError, ErrorKind, LlmrecError, require
from llmrec.machine import flush_folder

TABLES_VERSION = 1
"""Version of the tables."""
DAMAGE_ADVICE = "restore a backup, or move the file and its log away. The file was not changed"
"""Advice for a damaged database."""

_APPLICATION_ID = 0x6C6C6D72
"""Application id in the header of an SQLite file, which identifies it as llmrec's."""
POSTGRES_PREFIXES = ("postgresql://", "postgres://")
"""Prefixes of the address of a PostgreSQL database."""
LOCK_TIMEOUT = 30.0
"""Default number of seconds that a call waits for a lock of another process."""
_MAX_CHECKED_BYTES = 256 * 2**20
"""Maximum size in bytes of an SQLite file that is checked completely when it is opened."""
_TABLE_STATEMENTS = (
    "CREATE TABLE llmrec_service (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    # Each interaction is one JSON text, which can be overwritten in place.
    "CREATE TABLE llmrec_events (seq {serial}, user_key TEXT NOT NULL, event TEXT NOT NULL)",
    # The key is a hash, because PostgreSQL cannot index ids of thousands of bytes.
    "CREATE INDEX llmrec_events_of ON llmrec_events (user_key, seq)",
    "CREATE TABLE llmrec_erased (user_key TEXT PRIMARY KEY)",
    # a removed item has no title
    "CREATE TABLE llmrec_items (item_key TEXT PRIMARY KEY, item_id TEXT NOT NULL, title TEXT, fields TEXT)",
)
ERASED_KEY = "0" * 32
"""Replaces the user key of an erased interaction."""
_KindAndFix: TypeAlias = tuple[ErrorKind, str]


class StoreError(LlmrecError):
    """Raised if the database cannot be used at all."""


@dataclass(frozen=True, slots=True)
class Insert:
    """An INSERT statement of a table.

    Attributes:
        table: The name of the table.
        columns: Column names, in the order of the rows' values; all are texts.
        conflict: The clause for existing keys: ``ON CONFLICT …``.
    """

    table: str
    columns: tuple[str, ...]
    conflict: str = ""


# --------------------------------------------------------------------------- SQLite

_PERMISSION_ADVICE = "give the service permission to write there, or choose another path"
_DISK_SPACE_ADVICE = "free disk space and send the request again; nothing was stored"
_OTHER_FILE_ADVICE = "choose another file; this file was not changed"
_SQLITE_FIXES: dict[int, _KindAndFix] = {
    **dict.fromkeys((sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB), ("damaged", DAMAGE_ADVICE)),
    **dict.fromkeys(
        (sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN), ("unreadable", _PERMISSION_ADVICE)
    ),
    **dict.fromkeys((sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED), ("busy", "stop the other program that uses it")),
    sqlite3.SQLITE_FULL: ("exhausted", _DISK_SPACE_ADVICE),
    sqlite3.SQLITE_IOERR: ("failed", "check the disk, its free space and its file system"),
}


class SQLite:
    """An SQLite database file; `Postgres` has the same methods.

    Args:
        path: The path; a missing file is created.
        wait: Seconds that a call waits for the lock of another process.

    Attributes:
        errors: Exceptions that the database library raises.
        keeps: What remains in the database after an erasure, at least temporarily; None if nothing.

    Raises:
        LlmrecError: If the file is not a store, or cannot be read or created; nothing is overwritten.
    """

    errors: tuple[type[Exception], ...] = (sqlite3.Error, OSError)
    keeps: str | None = None

    def __init__(self, path: Path, wait: float = LOCK_TIMEOUT) -> None:
        self._path, self._wait = path, wait
        self._writing = Lock()
        try:
            # In this order, since another process creates the log after the file.
            log_file = Path(f"{path}-wal")
            orphan = log_file.exists()
            if not (path.exists() or path.is_symlink()):
                if orphan:
                    raise self.error(
                        "damaged",
                        f" is missing, but its log {log_file.name} exists; restore the file, or move the log",
                    )
                self._make()
            self._check()
            self._file = self._inode()
        except (sqlite3.Error, OSError, ValueError) as error:
            raise self.failure(error) from error

    def error(self, kind: ErrorKind, rest: str) -> LlmrecError:
        """Return an error about this database, without its password."""
        return StoreError(f"the store {self._path}{rest}", kind=kind, at=self._path)

    def failure(self, error: BaseException) -> LlmrecError:
        """Convert an exception of the database library to an error with the fix."""
        # an error without code: the file has invalid text
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if isinstance(error, OSError | ValueError):
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            code = sqlite3.SQLITE_FULL if full else sqlite3.SQLITE_CANTOPEN
        elif code == sqlite3.SQLITE_ERROR and "no such" in str(error):
            code = sqlite3.SQLITE_CORRUPT  # a table or column is missing
        kind, fix = _SQLITE_FIXES.get(code, ("failed", DAMAGE_ADVICE))
        return self.error(kind, f" cannot be used ({format_error(error)}); {fix}")

    def connect(self) -> sqlite3.Connection:
        """Open a connection."""
        return _connect_sqlite(self._path, self._wait)

    def prepare(self, raw: sqlite3.Connection) -> None:
        """Create missing tables, and check the database as far as possible."""
        # The tables were created with the file.
        if self._path.stat().st_size <= _MAX_CHECKED_BYTES:
            result = raw.execute("PRAGMA quick_check(1)").fetchone()[0]
            if result != "ok":
                raise self.error("damaged", f" is damaged ({format_value(result)}); {DAMAGE_ADVICE}")

    def check(self) -> None:
        """Raise an error if this is no longer the database that was opened."""
        # A moved file is still writable, but would not be found after a restart.
        try:
            moved = self._inode() != self._file
        except OSError:
            moved = True
        if moved:
            raise self.error(
                "unreadable", (" was moved or replaced while in use; restore the file, or restart the service")
            )

    def _inode(self) -> tuple[int, int]:
        status = self._path.stat()
        return status.st_dev, status.st_ino

    def read(self, raw: sqlite3.Connection, sql: str, *values: str | int) -> list[tuple[Any, ...]]:
        """Return all rows of a query."""
        return raw.execute(sql, values).fetchall()

    def insert(self, raw: sqlite3.Connection, into: Insert, rows: Sequence[tuple[str | None, ...]]) -> int:
        """Insert rows in one transaction, and return how many were inserted or changed."""
        names, placeholders = ", ".join(into.columns), ", ".join("?" * len(into.columns))
        query = f"INSERT INTO {into.table} ({names}) VALUES ({placeholders}) {into.conflict}"
        # Serialise the threads of this process, because SQLite would poll.
        with self._writing, _transaction(raw):
            return raw.executemany(query, rows).rowcount

    def erase(self, raw: sqlite3.Connection, user_key: str) -> int:
        """Delete the interactions of a user and record the key in one transaction; return their number.

        The log contains the interactions until `finish`.
        """
        # Rows are never deleted: SQLite would move other rows between pages and leave copies in free space, which
        # secure_delete does not find when their users are deleted later. The text is overwritten in place by one of the
        # same length.
        query = "UPDATE llmrec_events SET user_key = ?, event = CAST(zeroblob(length(CAST(event AS BLOB))) AS TEXT)"
        with self._writing, _transaction(raw):
            erased = raw.execute(f"{query} WHERE user_key = ?", (ERASED_KEY, user_key)).rowcount
            raw.execute("INSERT INTO llmrec_erased VALUES (?) ON CONFLICT DO NOTHING", (user_key,))
        return erased

    def finish(self, raw: sqlite3.Connection, wait: float) -> bool:
        """Remove deleted data from the database log; return False if another process still reads the data."""
        with self._writing:
            # A checkpoint writes the log to the file and empties it; it blocks writers while it waits for readers.
            raw.execute(f"PRAGMA busy_timeout={int(1000 * wait)}")
            try:
                return not raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            finally:
                raw.execute(f"PRAGMA busy_timeout={int(1000 * self._wait)}")

    def _check(self) -> None:
        """Reject a file of another type, because opening it could change it."""
        problem = describe_file_problem(self._path)
        if problem:
            raise self.error("unreadable", f" {problem}; choose a file that the service may write to")
        with self._path.open("rb") as file:
            head = file.read(100)
        if not head:
            raise self.error("empty", " is an empty file; remove it, or choose another file")
        if not head.startswith(b"SQLite format 3\0") or len(head) < 100:
            raise self.error(
                "wrong-format", f" is not an SQLite database, or its beginning is damaged; {_OTHER_FILE_ADVICE}"
            )
        if int.from_bytes(head[68:72], "big") != _APPLICATION_ID:
            raise self.error("wrong-format", f" is a database of another program; {_OTHER_FILE_ADVICE}")

    def _make(self) -> None:
        """Create the file under a temporary name and link it, so that other processes see only a complete file."""
        folder = self._path.parent
        folder.mkdir(parents=True, exist_ok=True)
        # only the owner may read it
        handle, name = tempfile.mkstemp(prefix=f".{self._path.name}.", suffix=".draft", dir=folder)
        os.close(handle)
        draft = Path(name)
        try:
            _create_tables(draft)
            try:
                self._path.hardlink_to(draft)
            except FileExistsError:
                pass  # another process was faster
            except OSError:
                draft.replace(self._path)  # the file system does not support links
        finally:
            for suffix in ("", "-wal", "-shm"):
                Path(f"{draft}{suffix}").unlink(missing_ok=True)
        flush_folder(folder)


def _connect_sqlite(path: Path, wait: float = LOCK_TIMEOUT) -> sqlite3.Connection:
    # This mode does not create a file. Connections may change threads, but are used by one thread at a time.
    uri = f"file:{quote(str(path.resolve()))}?mode=rw"
    raw = sqlite3.connect(uri, uri=True, timeout=wait, isolation_level=None, check_same_thread=False)
    try:
        # Deleted data are overwritten, and committed data are written to disk.
        for pragma in ("secure_delete=ON", "journal_mode=WAL", "synchronous=FULL"):
            raw.execute(f"PRAGMA {pragma}")
    except BaseException:
        raw.close()
        raise
    return raw


@contextmanager
def _transaction(raw: sqlite3.Connection) -> Iterator[None]:
    raw.execute("BEGIN IMMEDIATE")
    try:
        yield
        raw.execute("COMMIT")
    except BaseException:
        # A full disk may already have ended the transaction.
        with suppress(sqlite3.Error):
            raw.execute("ROLLBACK")
        raise


def _create_tables(draft: Path) -> None:
    raw = _connect_sqlite(draft)
    try:
        with _transaction(raw):
            for table in _TABLE_STATEMENTS:
                raw.execute(table.format(serial="INTEGER PRIMARY KEY"))
            rows = [("version", str(TABLES_VERSION)), ("salt", secrets.token_hex(16))]
            raw.executemany("INSERT INTO llmrec_service VALUES (?, ?)", rows)
            raw.execute(f"PRAGMA application_id={_APPLICATION_ID}")
        # Closing does this too, but reports no error if the disk is full.
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        raw.close()


# --------------------------------------------------------------------------- PostgreSQL

_CONNECTION_ADVICE = "check the address, the user, PGPASSWORD or ~/.pgpass, and that the server runs"
# By SQLSTATE prefix; without a SQLSTATE, the server was not reached or disconnected.
_POSTGRES_FIXES: dict[str, _KindAndFix] = {
    **dict.fromkeys(("08", "28", "3D", "57P"), ("unreachable", _CONNECTION_ADVICE)),
    **dict.fromkeys(
        ("42501", "25006", "3F"), ("unreadable", "grant the user permission to create and write tables there")
    ),
    **dict.fromkeys(
        ("42P01", "42P07", "42703", "42804"),
        ("wrong-format", "its tables llmrec_… belong to another program, or were changed; use another database"),
    ),
    **dict.fromkeys(("40", "55P03", "57014"), ("busy", "send it again")),
    "53": ("exhausted", "free resources on the server"),
    "XX": ("damaged", "restore a copy of the database"),
}
_UNKNOWN_FIX: _KindAndFix = ("failed", "see the server's log")
_HOST_PATTERN = r"(\[[^\]]*\]|[^:\[\]]*)(:\d*)?"


class Postgres:
    """A PostgreSQL database, version 13 or later.

    Args:
        url: ``postgresql://USER@HOST:PORT/NAME``, with any other parameters of libpq.
        wait: The timeout of a statement in seconds, including waits for locks.

    Raises:
        DataError: If the URL is invalid.
        MissingExtra: If the PostgreSQL package is not installed.
    """

    keeps: str | None = "PostgreSQL keeps erased interactions until its next vacuum, and in its log and backups"

    def __init__(self, url: str, wait: float = LOCK_TIMEOUT) -> None:
        self._wait = wait
        self._dbapi = require("adbc_driver_postgresql.dbapi", "tables")
        self.errors: tuple[type[Exception], ...] = (self._dbapi.Error,)
        try:
            parts = urlsplit(url)
        except ValueError:
            raise _invalid_url_error() from None
        host = parts.netloc.rpartition("@")[2]
        # Such a URL is not passed to libpq, whose messages quote parts that it cannot parse, perhaps of a password.
        strays = url.count("@") - ("@" in parts.netloc) + url.count("#")
        if (
            strays
            or re.search("%(?![0-9A-Fa-f]{2})", url)
            or not re.fullmatch(f"{_HOST_PATTERN}(,{_HOST_PATTERN})*", host)
        ):
            raise _invalid_url_error()
        self._shown = f"{parts.scheme}://{host}{parts.path}"
        # Without a timeout, a server that drops all packets would block forever.
        mark = "&" if parts.query else "?"
        self._url = url if "connect_timeout=" in parts.query else f"{url}{mark}connect_timeout=10"

    def error(self, kind: ErrorKind, rest: str) -> LlmrecError:
        """See `SQLite.error`."""
        return StoreError(f"the store {self._shown}{rest}", kind=kind, at=self._shown)

    def failure(self, error: BaseException) -> LlmrecError:
        """See `SQLite.failure`."""
        state = getattr(error, "sqlstate", None) or "08"
        kind, fix = next((_POSTGRES_FIXES[n] for n in _POSTGRES_FIXES if state.startswith(n)), _UNKNOWN_FIX)
        # Only one line, since the others repeat the query or values.
        message = re.sub(r"^[A-Z_]+: (\[libpq\] )?", "", str(error))
        message = re.split(r"(?:ERROR|FATAL): +", message, maxsplit=1)[-1].partition("\n")[0]
        message = mask_passwords(message, self._url)
        return self.error(kind, f" cannot be used ({format_error(ValueError(message))}); {fix}")

    def connect(self) -> Any:
        """See `SQLite.connect`; each statement is a transaction."""
        raw = self._dbapi.connect(self._url, autocommit=True)
        try:
            with raw.cursor() as cursor:
                cursor.execute(f"SET statement_timeout = {max(1, int(1000 * self._wait))}")
        except BaseException:
            raw.close()
            raise
        return raw

    def check(self) -> None:
        """See `SQLite.check`."""

    def prepare(self, raw: Any) -> None:
        """See `SQLite.prepare`."""
        query = "SELECT to_regclass('llmrec_service') IS NOT NULL, current_setting('server_encoding')"
        there, letters = self.read(raw, query)[0]
        if letters != "UTF8":
            raise self.error("unsupported", f" stores text as {letters}; create a database with ENCODING 'UTF8'")
        if not there:
            serial = "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY"
            make = "; ".join(table.format(serial=serial) for table in _TABLE_STATEMENTS)
            # One of several processes creates the tables. The lock is a separate statement: only a later statement is
            # certain to see tables created during the wait. It is released with the connection.
            self.read(raw, "SELECT pg_advisory_lock(?1) IS NULL", _APPLICATION_ID)
            with raw.cursor() as cursor:
                # one statement, so one transaction
                cursor.execute(
                    f"DO $$ BEGIN IF to_regclass('llmrec_service') IS NULL THEN {make}; INSERT INTO llmrec_service "
                    f"VALUES ('version', '{TABLES_VERSION}'), ('salt', gen_random_uuid()::text); END IF; END $$"
                )
            self.read(raw, "SELECT pg_advisory_unlock(?1)", _APPLICATION_ID)

    def read(self, raw: Any, sql: str, *values: str | int) -> list[tuple[Any, ...]]:
        """See `SQLite.read`."""
        with raw.cursor() as cursor:
            cursor.execute(sql.replace("?", "$"), values or None)
            return list(cursor.fetchall())

    def insert(self, raw: Any, into: Insert, rows: Sequence[tuple[str | None, ...]]) -> int:
        """See `SQLite.insert`."""
        names = ", ".join(into.columns)
        types = ", ".join(f"{name} TEXT" for name in into.columns)
        # All rows in one parameter, to avoid a round trip per row.
        values = json.dumps([dict(zip(into.columns, row, strict=True)) for row in rows], ensure_ascii=False)
        query = (
            f"WITH done AS (INSERT INTO {into.table} ({names}) SELECT {names} FROM ROWS FROM (json_to_recordset("
            f"?1::json) AS ({types})) WITH ORDINALITY AS given ({names}, place) ORDER BY place {into.conflict} "
            "RETURNING 1) SELECT count(*) FROM done"
        )
        return int(self.read(raw, query, values)[0][0])

    def erase(self, raw: Any, user_key: str) -> int:
        """See `SQLite.erase`."""
        query = (
            "WITH gone AS (DELETE FROM llmrec_events WHERE user_key = ?1 RETURNING 1), noted AS (INSERT INTO "
            "llmrec_erased VALUES (?1) ON CONFLICT DO NOTHING) SELECT count(*) FROM gone"
        )
        return int(self.read(raw, query, user_key)[0][0])

    def finish(self, raw: Any, wait: float) -> bool:
        """See `SQLite.finish`; the log is managed by the server."""
        return True


Database: TypeAlias = SQLite | Postgres
"""A database; ``raw`` in its methods is a connection object of the database library."""


def _invalid_url_error() -> DataError:
    # The URL is not shown, because it may contain a password anywhere.
    return DataError(
        "the address of the store is not a valid URL; use postgresql://USER:PASSWORD@HOST:PORT/NAME, and write @ : / "
        "? # % in a password as %40 %3A %2F %3F %23 %25",
        kind="bad-value",
    )
