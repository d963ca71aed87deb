"""The SQLite table of answers: every row has a checksum, and what is damaged is set aside and asked again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import count, islice
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from llmrec.durable import replacing, sha256_of
from llmrec.errors import BackendError
from llmrec.types import Cost

log = logging.getLogger(__name__)

_VERSION = 2
"""Of the tables; 1 had no checksums."""
_WAIT = 30.0
_MANY = 500  # keys of one query: SQLite bounds the number of variables
_TABLES = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL, sum TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS spent (name TEXT PRIMARY KEY, prompt_tokens INTEGER NOT NULL, "
    "completion_tokens INTEGER NOT NULL, sum TEXT NOT NULL) WITHOUT ROWID",
)
_ANSWER = "INSERT OR REPLACE INTO answers VALUES (?, ?, ?)"
_MISSING = "INSERT OR IGNORE INTO answers VALUES (?, ?, ?)"
_SPENT = "INSERT OR REPLACE INTO spent VALUES (?, ?, ?, ?)"
# What the machine refuses and another start may find otherwise: no permission, a lock, memory, reading, a full disk.
_CIRCUMSTANCES = frozenset(
    {
        *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_IOERR),
        *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN),
    }
)
_T = TypeVar("_T")


class Stored(TypedDict):
    """An answer by its fields, and the seconds that it took."""

    seconds: float
    answer: Any


class AnswerStore:
    """A table of JSON answers by key.

    Args:
        path: The database file. One that is damaged, or has no checksums, is set aside under the ending ``.damaged``,
            never deleted; what can be read of it and agrees with its checksum is kept.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._told = False
        self._connection: sqlite3.Connection | None = None
        self._tried(lambda _: None)

    def get(self, keys: Sequence[str]) -> dict[str, Stored]:
        """Return the answers that are stored, by key; one that its checksum does not fit counts as not stored."""
        found: dict[str, Stored] = {}
        damaged = 0
        for start in range(0, len(keys), _MANY):
            part = keys[start : start + _MANY]
            query = f"SELECT key, value, sum FROM answers WHERE key IN ({','.join('?' * len(part))})"
            rows = self._tried(lambda run, query=query, part=part: run(query, part).fetchall())  # type: ignore[misc]
            sound = {key: json.loads(value) for key, value, told in rows if told == _sum(key, value)}
            damaged += len(rows) - len(sound)
            found |= sound
        if damaged:
            log.warning("%d answers in %s do not fit their checksums and are asked again", damaged, self._path)
        return found

    def put(self, answers: Iterable[tuple[str, Stored]]) -> None:
        """Store answers in one transaction: all of them or, after a kill, none."""
        texts = ((key, json.dumps(value)) for key, value in answers)
        rows = [(key, text, _sum(key, text)) for key, text in texts]
        self._tried(lambda _: self._together((_ANSWER, rows)))

    def spent(self, name: str) -> Cost:
        """Return the tokens that were booked under a name."""
        query = "SELECT name, prompt_tokens, completion_tokens, sum FROM spent WHERE name = ?"
        found = self._tried(lambda run: run(query, (name,)).fetchone())
        if found is None:
            return Cost()
        if found[3] != _sum(*found[:3]):
            if not self._told:
                log.warning("what was spent under %s is damaged in %s; it is counted anew, from 0", name, self._path)
            self._told = True
            return Cost()
        return Cost(prompt_tokens=found[1], completion_tokens=found[2])

    def spend(self, name: str, cost: Cost) -> None:
        """Book tokens under a name."""

        def book(_: _Run) -> None:
            before = self.spent(name)
            total = (name, before.prompt_tokens + cost.prompt_tokens, before.completion_tokens + cost.completion_tokens)
            self._together((_SPENT, [(*total, _sum(*total))]))

        self._tried(book)

    def join(self, other: Path) -> None:
        """Take over the answers of another store that this one lacks, and what was spent there, once each.

        Args:
            other: A database that nobody writes to; it is not changed.
        """
        name = f"joined {sha256_of(other)}"
        mark = (name, 0, 0)

        def take(run: _Run) -> None:
            if run("SELECT 1 FROM spent WHERE name = ?", (name,)).fetchone() is not None:
                return
            with closing(sqlite3.connect(f"{other.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as found:
                booked = found.execute("SELECT * FROM spent WHERE name NOT LIKE 'joined %'").fetchall()
                rows = found.execute("SELECT key, value, sum FROM answers")
                spent = [
                    (each, *(one + two for one, two in zip(costs, _counts(self.spent(each)), strict=True)))
                    for each, *costs, told in booked
                    if told == _sum(each, *costs)
                ]
                self._together(
                    (_MISSING, (row for row in rows if row[2] == _sum(*row[:2]))),
                    (_SPENT, [(*row, _sum(*row)) for row in (*spent, mark)]),
                )

        self._tried(take)

    def __len__(self) -> int:
        """Number of stored answers."""
        return int(self._tried(lambda run: run("SELECT count(*) FROM answers").fetchone()[0]))

    def close(self) -> None:
        """Close the database."""
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        """Open the database; make its tables in a new one.

        Raises:
            sqlite3.DatabaseError: If it is damaged, or has tables of another version.
        """
        _own(self._path)
        connection = _connect(self._path)
        self._connection = connection
        run = connection.execute
        version = run("PRAGMA user_version").fetchone()[0]
        tables = run("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version != _VERSION and (version, tables) != (0, 0):
            raise sqlite3.DatabaseError("its answers have no checksums" if version == 1 else f"of version {version}")
        run("PRAGMA journal_mode=WAL")
        run("PRAGMA synchronous=NORMAL")
        run("BEGIN IMMEDIATE")
        for table in _TABLES:
            run(table)
        run(f"PRAGMA user_version={_VERSION}")
        run("COMMIT")
        return connection

    def _tried(self, work: Callable[[_Run], _T]) -> _T:
        """Do some work on the database; where that is damaged, set it aside first, and do it on what is left.

        Raises:
            BackendError: If the machine refuses.
        """
        try:
            return work((self._connection or self._open()).execute)
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.DatabaseError as error:
            damage = error
        try:
            if self._circumstance(damage):
                raise damage
            return work(self._set_aside(damage).execute)
        except sqlite3.DatabaseError as error:
            self.close()
            raise BackendError(
                f"the answer cache {self._path} cannot be used: {error}; fix this and run the same command again, or "
                "move it away",
                kind="unreadable",
                at=self._path,
            ) from error

    def _circumstance(self, error: sqlite3.DatabaseError) -> bool:
        if self._path.exists() and not self._path.is_file():
            return True
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        # A header that says that a later SQLite wrote the file makes it read-only.
        writable = code == sqlite3.SQLITE_READONLY and os.access(self._path, os.W_OK)
        return code in _CIRCUMSTANCES and not (writable and os.access(self._path.parent, os.W_OK))

    def _together(self, *writes: tuple[str, Iterable[Sequence[object]]]) -> None:
        """Write rows, by statement, in one transaction."""
        connection = self._connection or self._open()
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement, rows in writes:
                connection.executemany(statement, rows)
            connection.execute("COMMIT")
        except BaseException:
            # Damage can have ended the transaction already.
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    def _set_aside(self, error: sqlite3.DatabaseError) -> sqlite3.Connection:
        """Move the database out of the way, and keep what is sound of it in a new one."""
        self.close()
        names = (f"{self._path.name}.damaged{f'-{n}' if n > 1 else ''}" for n in count(1))
        aside = next(place for name in names if not (place := self._path.with_name(name)).exists())
        for suffix in ("", "-wal", "-shm"):
            part = self._path.with_name(self._path.name + suffix)
            if part.exists():
                part.replace(aside.with_name(aside.name + suffix))
        connection = self._open()
        answers = {row[0]: row for row in _rows(aside, "SELECT key, value, sum FROM answers ORDER BY key")}
        self._together((_ANSWER, [row for row in answers.values() if row[2] == _sum(*row[:2])]))
        booked = {row[0]: row for row in _rows(aside, "SELECT * FROM spent ORDER BY name")}
        # Where there were no checksums, what was spent counts all the same: a budget must not begin again.
        sums = {name: _sum(*row[:3]) for name, row in booked.items()}
        kept = [(*row[:3], sums[name]) for name, row in booked.items() if row[3:] in ((), (sums[name],))]
        self._together((_SPENT, kept))
        log.warning(
            "%s cannot be trusted (%s); it is kept as %s, %d answers of it are used and the others are asked again",
            *(self._path, error, aside.name, connection.execute("SELECT count(*) FROM answers").fetchone()[0]),
        )
        return connection


_Run = Callable[..., sqlite3.Cursor]


def _own(path: Path) -> None:
    """Give a database that has other names too a content of its own: SQLite writes in place, also into a backup."""
    for part in (path, *(path.with_name(path.name + ending) for ending in ("-wal", "-shm"))):
        if part.is_file() and not part.is_symlink() and part.stat().st_nlink > 1:
            with replacing(part) as draft:
                shutil.copy2(part, draft)


def _connect(path: Path) -> sqlite3.Connection:
    # Whoever asks from several threads makes them wait for each other.
    connection = sqlite3.connect(path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
    # Letters that are none do not fit the checksum.
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    return connection


def _rows(path: Path, query: str) -> Iterator[tuple[Any, ...]]:
    """Yield rows of a damaged database, in order and from the end, each up to where it cannot be read."""
    most = path.stat().st_size // 16
    for order in ("", " DESC"):
        with suppress(sqlite3.Error):
            connection = _connect(path)
            try:
                yield from islice(connection.execute(query + order), most)
            finally:
                connection.close()


def _counts(cost: Cost) -> tuple[int, int]:
    return cost.prompt_tokens, cost.completion_tokens


def _sum(*row: object) -> str:
    """Return the checksum of a row."""
    return hashlib.sha256("\0".join(map(str, row)).encode("utf-8", "surrogatepass")).hexdigest()[:32]
