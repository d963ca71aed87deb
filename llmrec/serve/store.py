"""The data that a running service stores: received interactions, deleted users, added and removed items.

A store is an SQLite file, or tables of a PostgreSQL database, which several processes may share; see `databases`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any

from llmrec.data.read.limits import format_value
from llmrec.errors import DataError, LlmrecError
from llmrec.serve.databases import (
    DAMAGE_ADVICE,
    ERASED_KEY,
    LOCK_TIMEOUT,
    POSTGRES_PREFIXES,
    TABLES_VERSION,
    Database,
    Insert,
    Postgres,
    SQLite,
)
from llmrec.types import Item

_MAX_CONNECTIONS = 8
"""Maximum number of connections of a store; a PostgreSQL server has 100 by default for all processes together."""
_IDLE_SECONDS = 1.0
"""Idle seconds after which a connection is tested before use: its server may have been restarted."""
_BATCH_ROWS = 10_000
_NO_LIMIT = 2**62
IN_LOG_NOTE = (
    "another process is reading the store, so its log still contains erased interactions; removal is retried until "
    "it succeeds"
)
_READER_WAIT_SECONDS = 1.0
"""Seconds that an erasure waits for concurrent readers."""

_ADD_EVENTS = Insert("llmrec_events", ("user_key", "event"))
_ITEM_COLUMNS = ("item_key", "item_id", "title", "fields")
_UPDATE_CLAUSE = "ON CONFLICT (item_key) DO UPDATE SET title = excluded.title, fields = excluded.fields"
_PUT_ITEMS = Insert("llmrec_items", _ITEM_COLUMNS, _UPDATE_CLAUSE)
# items that are already removed are not counted
_REMOVE_ITEMS = Insert("llmrec_items", _ITEM_COLUMNS, f"{_UPDATE_CLAUSE} WHERE llmrec_items.title IS NOT NULL")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvent:
    """An interaction of a user; ``timestamp`` is in the unit of the data."""

    user_id: str
    item_id: str
    rating: float | None
    timestamp: float


class ServiceStore:
    """A database of interactions, deleted users and changed items, created by `open`; thread-safe.

    Its texts have no NUL and no unpaired surrogate, and its numbers are finite: the bodies of requests are checked.

    Every call is one transaction, and raises an `LlmrecError` if the database fails. Data stored by a call that has
    returned survive a kill of the process.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._idle: list[tuple[float, Any]] = []
        self._lock, self._room = Lock(), BoundedSemaphore(_MAX_CONNECTIONS)
        self._closed = self._unfinished = False
        try:
            with self._connection() as raw:
                database.prepare(raw)
                facts = dict(database.read(raw, "SELECT name, value FROM llmrec_service"))
            self._salt = _parse_salt(facts, database)
            # The log may still contain data deleted before this process started. A read-only one remains unchanged.
            with suppress(LlmrecError):
                self.finish_erasures()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, where: str, wait: float = LOCK_TIMEOUT) -> ServiceStore:
        """Open the database; create its file or tables if missing.

        Args:
            where: The path of an SQLite file, or ``postgresql://USER@HOST:PORT/NAME``. The password should come from
                PGPASSWORD or ~/.pgpass; one in the URL is never shown.
            wait: Seconds that a call waits for the lock of another process.

        Raises:
            LlmrecError: If it is not a store, cannot be reached or written, is damaged, or needs a newer llmrec.
            MissingExtra: If the PostgreSQL package is not installed.
        """
        if where.startswith(POSTGRES_PREFIXES):
            return cls(Postgres(where, wait))
        if "://" in where:
            # Not shown, because it may contain a password.
            raise DataError(
                "a store is an SQLite file or a PostgreSQL database; give a path, or postgresql://USER@HOST/NAME",
                kind="unsupported",
            )
        return cls(SQLite(Path(where).expanduser(), wait))

    def add_events(self, events: Sequence[StoredEvent]) -> int:
        """Store all interactions or none; they are on disk when this returns.

        Returns:
            The number of interactions.
        """
        rows = [(self._key(event.user_id), json.dumps(asdict(event), ensure_ascii=False)) for event in events]
        return self._insert_rows(_ADD_EVENTS, rows)

    def events_of(self, user_id: str, most: int | None = None) -> list[StoredEvent]:
        """Return the interactions of a user, oldest first; ties are in order of arrival.

        Args:
            user_id: The user.
            most: The maximum number of interactions, the last to arrive.
        """
        query = "SELECT event FROM llmrec_events WHERE user_key = ?1 ORDER BY seq DESC LIMIT ?2"
        rows = self._read(query, self._key(user_id), _NO_LIMIT if most is None else most)
        return sorted((self._parse_event(row[0]) for row in reversed(rows)), key=lambda event: event.timestamp)

    def erase(self, user_id: str) -> int:
        """Delete all interactions of a user, and record the deletion by a salted hash of the id.

        In an SQLite file the bytes are overwritten, and their space is not freed; `remains` reports whether its log
        still contains them. PostgreSQL frees them at its next vacuum; its log and backups keep them for as long as
        configured. The salt is stored with the hash: this hides the id from readers of the table, not from an attacker
        who tries all ids.

        Returns:
            The number of erased interactions.
        """
        with self._connection() as raw:
            erased = self._database.erase(raw, self._key(user_id))
        self.finish_erasures(_READER_WAIT_SECONDS)
        return erased

    def finish_erasures(self, wait: float = 0.0) -> bool:
        """Remove deleted data from the database log; repeat until it succeeds.

        Args:
            wait: Seconds to wait for readers.

        Returns:
            Whether it succeeded.
        """
        self._unfinished = True
        with self._connection() as raw:
            self._unfinished = not self._database.finish(raw, wait)
        return not self._unfinished

    @property
    def unfinished(self) -> bool:
        """Whether `finish_erasures` must be repeated."""
        return self._unfinished

    @property
    def remains(self) -> list[str]:
        """Describe where interactions of a deleted user may remain."""
        remains = [] if self._database.keeps is None else [self._database.keeps]
        return [*remains, IN_LOG_NOTE] if self._unfinished else remains

    def erased(self, user_id: str) -> bool:
        """Whether a user was ever deleted, even if there are newer interactions."""
        return bool(self._read("SELECT 1 FROM llmrec_erased WHERE user_key = ?1", self._key(user_id)))

    def erased_among(self, users: Iterable[str]) -> list[str]:
        """Return the users that were ever deleted, with one query; see `erased`."""
        keys = {key for (key,) in self._read("SELECT user_key FROM llmrec_erased")}
        return [user for user in users if self._key(user) in keys]

    def put_items(self, items: Sequence[Item]) -> int:
        """Add or replace items, including removed ones.

        Returns:
            The number of ids.
        """
        rows = {
            item.item_id: (
                self._key(item.item_id),
                item.item_id,
                item.title,
                json.dumps(dict(item.fields), ensure_ascii=False),
            )
            for item in items
        }
        # Sorted, so that two processes that write the same items cannot deadlock.
        return self._insert_rows(_PUT_ITEMS, sorted(rows.values()))

    def remove_items(self, ids: Sequence[str]) -> int:
        """Record the removal of items.

        Returns:
            The number of ids not yet removed.
        """
        rows = {name: (self._key(name), name, None, None) for name in ids}
        return self._insert_rows(_REMOVE_ITEMS, sorted(rows.values()))

    def item_changes(self) -> tuple[dict[str, Item], frozenset[str]]:
        """Return the added items by id, and the removed ids."""
        rows = self._read("SELECT item_id, title, fields FROM llmrec_items ORDER BY item_id")
        put = {row[0]: self._item(*row) for row in rows if row[1] is not None}
        return put, frozenset(row[0] for row in rows if row[1] is None)

    def all_events(self) -> Iterator[StoredEvent]:
        """Yield all interactions in order of arrival."""
        last = -1
        query = "SELECT seq, event FROM llmrec_events WHERE seq > ?1 AND user_key <> ?2 ORDER BY seq LIMIT ?3"
        while rows := self._read(query, last, ERASED_KEY, _BATCH_ROWS):
            yield from (self._parse_event(row[1]) for row in rows)
            last = rows[-1][0]

    def close(self) -> None:
        """Close the database after running calls; later calls raise an error."""
        with self._lock:
            self._closed = True
        self._close_idle_connections()

    def _key(self, name: str) -> str:
        return hmac.new(self._salt, name.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]

    def _parse_event(self, text: str) -> StoredEvent:
        try:
            return StoredEvent(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise self._database.error(
                "damaged", f": an event is damaged ({format_value(text)}); {DAMAGE_ADVICE}"
            ) from error

    def _item(self, name: str, title: str, fields: str) -> Item:
        try:
            return Item(item_id=name, title=title, fields=dict(json.loads(fields)))
        except (TypeError, ValueError) as error:
            raise self._database.error(
                "damaged", f": the fields of item {format_value(name)} are damaged; {DAMAGE_ADVICE}"
            ) from error

    def _read(self, sql: str, *values: str | int) -> list[tuple[Any, ...]]:
        with self._connection() as raw:
            return self._database.read(raw, sql, *values)

    def _insert_rows(self, into: Insert, rows: Sequence[tuple[str | None, ...]]) -> int:
        with self._connection() as raw:
            return self._database.insert(raw, into, rows) if rows else 0

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        """Yield a connection; a failed one is not used again."""
        raw = None
        with self._room:
            self._database.check()
            try:
                raw = self._take_idle_connection() or self._database.connect()
                yield raw
            except BaseException as error:
                if raw is not None:
                    _close_quietly(raw)
                if isinstance(error, self._database.errors):
                    # The server may have disconnected, together with all other connections.
                    self._close_idle_connections()
                    # Not chained, since the message of the library may contain values.
                    raise self._database.failure(error) from None
                raise
            with self._lock:
                kept = not self._closed
                if kept:
                    self._idle.append((time.monotonic(), raw))
            if not kept:
                _close_quietly(raw)

    def _take_idle_connection(self) -> Any:
        """Return an idle connection that works; None if there is none."""
        while True:
            with self._lock:
                if self._closed:
                    raise self._database.error("closed", " was closed; open the store again")
                if not self._idle:
                    return None
                since, raw = self._idle.pop()
            if time.monotonic() - since < _IDLE_SECONDS:
                return raw
            try:
                self._database.read(raw, "SELECT 1")
            except self._database.errors:
                _close_quietly(raw)
            else:
                return raw

    def _close_idle_connections(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for _, raw in idle:
            _close_quietly(raw)


def _parse_salt(facts: Mapping[str, str], database: Database) -> bytes:
    """Return the salt for hashes of user ids."""
    version, salt = facts.get("version", ""), facts.get("salt", "")
    if not version.isdecimal() or not salt or int(version) < TABLES_VERSION:
        raise database.error("damaged", f" has no table version; {DAMAGE_ADVICE}")
    if int(version) > TABLES_VERSION:
        raise database.error(
            "unsupported",
            f" was created by a newer llmrec (table version {version}, this version supports {TABLES_VERSION}); "
            "upgrade: pip install -U llmrec",
        )
    return salt.encode()


def _close_quietly(raw: Any) -> None:
    with suppress(Exception):
        raw.close()
