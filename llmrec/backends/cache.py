"""The answer cache: an SQLite table of answers, whose keys include everything that can change an answer.

Calls arrive in the fixed chunks of evaluation. The new answers of a call are committed in one transaction, so a kill
loses only the current chunk, which is then computed again as a whole. A backend that returns answers one by one has
each committed as it arrives. The engine starts at the first question without a stored answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict, TypeVar, runtime_checkable

from llmrec.durable import replace_atomically, sha256_of
from llmrec.errors import BackendError, EngineFailure
from llmrec.progress import count_answers
from llmrec.types import Backend, Capability, Completion, Cost, HeadBackend, HeadRating, Prompt, Scores, SearchResult

log = logging.getLogger(__name__)

_VERSION = 2
"""Version of the tables; 1 had no checksums."""
_LOCK_TIMEOUT = 30.0
_KEYS_PER_QUERY = 500  # keys per query, since SQLite limits the number of variables
_CREATE_TABLES = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL, sum TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS spent (name TEXT PRIMARY KEY, prompt_tokens INTEGER NOT NULL, "
    "completion_tokens INTEGER NOT NULL, sum TEXT NOT NULL) WITHOUT ROWID",
)
_INSERT_ANSWER = "INSERT OR REPLACE INTO answers VALUES (?, ?, ?)"
_INSERT_MISSING = "INSERT OR IGNORE INTO answers VALUES (?, ?, ?)"
_INSERT_USAGE = "INSERT OR REPLACE INTO spent VALUES (?, ?, ?, ?)"
# Errors that may be temporary: permission, lock, memory, I/O, full disk.
_TEMPORARY_ERRORS = frozenset(
    {
        *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_IOERR),
        *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN),
    }
)
_T = TypeVar("_T")


class StoredAnswer(TypedDict):
    """A stored answer, and the seconds that it took."""

    seconds: float
    answer: Any


class AnswerStore:
    """A table of answers in JSON form, by key.

    Args:
        path: The database file. One that is damaged, or has no checksums, is set aside under the ending ``.damaged``,
            never deleted; what can be read of it and agrees with its checksum is kept.
        further: A database whose answers are copied into this one when they are needed.
    """

    def __init__(self, path: Path, further: Path | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._further = AnswerStore(further) if further is not None and further.is_file() else None
        self._path = path
        self._warned = False
        self._connection: sqlite3.Connection | None = None
        self._tried(lambda _: None)

    def get(self, keys: Sequence[str]) -> dict[str, StoredAnswer]:
        """Return the stored answers by key; an answer with a wrong checksum counts as missing."""
        result = self._get(keys)
        missing = [key for key in keys if key not in result] if self._further is not None else []
        if missing and self._further is not None and (further := self._further.get(missing)):
            self.put(further.items())
            result |= further
        return result

    def _get(self, keys: Sequence[str]) -> dict[str, StoredAnswer]:
        result: dict[str, StoredAnswer] = {}
        damaged = 0
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            part = keys[start : start + _KEYS_PER_QUERY]
            query = f"SELECT key, value, sum FROM answers WHERE key IN ({','.join('?' * len(part))})"
            rows = self._tried(lambda run, query=query, part=part: run(query, part).fetchall())  # type: ignore[misc]
            sound = {key: json.loads(value) for key, value, message in rows if message == _row_checksum(key, value)}
            damaged += len(rows) - len(sound)
            result |= sound
        if damaged:
            log.warning("%d answers in %s do not match their checksums and are requested again", damaged, self._path)
        return result

    def put(self, answers: Iterable[tuple[str, StoredAnswer]]) -> None:
        """Store answers in one transaction: all of them, or none if interrupted."""
        texts = ((key, json.dumps(value)) for key, value in answers)
        rows = [(key, text, _row_checksum(key, text)) for key, text in texts]
        self._tried(lambda _: self._together((_INSERT_ANSWER, rows)))

    def spent(self, name: str) -> Cost:
        """Return the token usage recorded under a name."""
        query = "SELECT name, prompt_tokens, completion_tokens, sum FROM spent WHERE name = ?"
        result = self._tried(lambda run: run(query, (name,)).fetchone())
        if result is None:
            return Cost()
        if result[3] != _row_checksum(*result[:3]):
            if not self._warned:
                log.warning("the spent budget of %s in %s is damaged; it is counted again from 0", name, self._path)
            self._warned = True
            return Cost()
        return Cost(prompt_tokens=result[1], completion_tokens=result[2])

    def spend(self, name: str, cost: Cost) -> None:
        """Add tokens to the usage recorded under a name."""

        def book(_: _Run) -> None:
            before = self.spent(name)
            total = (name, before.prompt_tokens + cost.prompt_tokens, before.completion_tokens + cost.completion_tokens)
            self._together((_INSERT_USAGE, [(*total, _row_checksum(*total))]))

        self._tried(book)

    def join(self, other: Path) -> None:
        """Copy missing answers and recorded usage from another store, which no process writes to; it is not changed."""
        name = f"joined {sha256_of(other)}"
        mark = (name, 0, 0)

        def take(run: _Run) -> None:
            if run("SELECT 1 FROM spent WHERE name = ?", (name,)).fetchone() is not None:
                return
            with closing(sqlite3.connect(f"{other.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as result:
                booked = result.execute("SELECT * FROM spent WHERE name NOT LIKE 'joined %'").fetchall()
                rows = result.execute("SELECT key, value, sum FROM answers")
                sums = {
                    item: self.spent(item) + Cost(prompt_tokens=prompt, completion_tokens=completion)
                    for item, prompt, completion, message in booked
                    if message == _row_checksum(item, prompt, completion)
                }
                spent = [(item, cost.prompt_tokens, cost.completion_tokens) for item, cost in sums.items()]
                self._together(
                    (_INSERT_MISSING, (row for row in rows if row[2] == _row_checksum(*row[:2]))),
                    (_INSERT_USAGE, [(*row, _row_checksum(*row)) for row in (*spent, mark)]),
                )

        self._tried(take)

    def __len__(self) -> int:
        """Number of stored answers."""
        return int(self._tried(lambda run: run("SELECT count(*) FROM answers").fetchone()[0]))

    def close(self) -> None:
        """Close the database."""
        if self._further is not None:
            self._further.close()
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        """Open the database; a new one gets its tables."""
        _break_hard_link(self._path)
        connection = _connect(self._path)
        self._connection = connection
        run = connection.execute
        version = run("PRAGMA user_version").fetchone()[0]
        tables = run("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version != _VERSION and (version, tables) != (0, 0):
            raise sqlite3.DatabaseError("it has answers without checksums" if version == 1 else f"of version {version}")
        run("PRAGMA journal_mode=WAL")
        run("PRAGMA synchronous=NORMAL")
        run("BEGIN IMMEDIATE")
        for table in _CREATE_TABLES:
            run(table)
        run(f"PRAGMA user_version={_VERSION}")
        run("COMMIT")
        return connection

    def _tried(self, work: Callable[[_Run], _T]) -> _T:
        """Run a database operation; if the database is damaged, set it aside and repeat on the intact rows."""
        try:
            return work((self._connection or self._open()).execute)
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.DatabaseError as error:
            damage = error
        try:
            if self._is_temporary(damage):
                raise damage
            return work(self._set_aside(damage).execute)
        except sqlite3.DatabaseError as error:
            self.close()
            raise BackendError(
                f"the answer cache {self._path} cannot be used: {error}; fix this and run the same command again, or "
                "move the file away",
                kind="unreadable",
                at=self._path,
            ) from error

    def _is_temporary(self, error: sqlite3.DatabaseError) -> bool:
        if self._path.exists() and not self._path.is_file():
            return True
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        # A file whose header names a later SQLite version is read-only.
        writable = code == sqlite3.SQLITE_READONLY and os.access(self._path, os.W_OK)
        return code in _TEMPORARY_ERRORS and not (writable and os.access(self._path.parent, os.W_OK))

    def _together(self, *writes: tuple[str, Iterable[Sequence[object]]]) -> None:
        """Execute statements with rows in one transaction."""
        connection = self._connection or self._open()
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement, rows in writes:
                connection.executemany(statement, rows)
            connection.execute("COMMIT")
        except BaseException:
            # The error may already have ended the transaction.
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    def _set_aside(self, error: sqlite3.DatabaseError) -> sqlite3.Connection:
        """Rename the damaged database, and copy its intact rows to a new one."""
        self.close()
        names = (f"{self._path.name}.damaged{f'-{n}' if n > 1 else ''}" for n in count(1))
        aside = next(path for name in names if not (path := self._path.with_name(name)).exists())
        for suffix in ("", "-wal", "-shm"):
            part = self._path.with_name(self._path.name + suffix)
            if part.exists():
                part.replace(aside.with_name(aside.name + suffix))
        connection = self._open()
        answers = {row[0]: row for row in _readable_rows(aside, "SELECT key, value, sum FROM answers ORDER BY key")}
        self._together((_INSERT_ANSWER, [row for row in answers.values() if row[2] == _row_checksum(*row[:2])]))
        booked = {row[0]: row for row in _readable_rows(aside, "SELECT * FROM spent ORDER BY name")}
        # Recorded usage counts even without a checksum, because a budget must not start again.
        sums = {name: _row_checksum(*row[:3]) for name, row in booked.items()}
        kept = [(*row[:3], sums[name]) for name, row in booked.items() if row[3:] in ((), (sums[name],))]
        self._together((_INSERT_USAGE, kept))
        log.warning(
            "%s is damaged (%s) and was renamed to %s; %d of its answers are reused, and the others are requested "
            "again",
            *(self._path, error, aside.name, connection.execute("SELECT count(*) FROM answers").fetchone()[0]),
        )
        return connection


_Run = Callable[..., sqlite3.Cursor]


def _break_hard_link(path: Path) -> None:
    """Copy a hard-linked database before writing, since SQLite writes in place and would also change a backup."""
    for part in (path, *(path.with_name(path.name + ending) for ending in ("-wal", "-shm"))):
        if part.is_file() and not part.is_symlink() and part.stat().st_nlink > 1:
            with replace_atomically(part) as draft:
                shutil.copy2(part, draft)


def _connect(path: Path) -> sqlite3.Connection:
    # callers synchronise their threads
    connection = sqlite3.connect(path, timeout=_LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
    # invalid characters fail the checksum
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    return connection


def _readable_rows(path: Path, query: str) -> Iterator[tuple[Any, ...]]:
    """Yield the readable rows of a damaged database, from both ends up to the damage."""
    most = path.stat().st_size // 16
    for order in ("", " DESC"):
        with suppress(sqlite3.Error):
            connection = _connect(path)
            try:
                yield from islice(connection.execute(query + order), most)
            finally:
                connection.close()


def _row_checksum(*row: object) -> str:
    """Return the checksum of a row."""
    return hashlib.sha256("\0".join(map(str, row)).encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class StoredLedger:
    """The token usage recorded under one name in a store."""

    store: AnswerStore
    name: str

    def spent(self) -> Cost:
        """Return the usage recorded so far."""
        return self.store.spent(self.name)

    def spend(self, cost: Cost) -> None:
        """Record additional usage."""
        self.store.spend(self.name, cost)


@runtime_checkable
class AnswerStream(Protocol):
    """A backend that yields answers as they arrive, with the index of the prompt."""

    def generate_each(self, prompts: Sequence[Prompt], *, max_tokens: int) -> Iterator[tuple[int, Completion]]:
        """Yield indices and generated texts."""
        ...

    def score_each(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], *, closed: bool = True
    ) -> Iterator[tuple[int, Scores]]:
        """Yield indices and scores."""
        ...


@runtime_checkable
class StreamingEngine(Protocol):
    """An engine that streams text while it is generated."""

    listener: Callable[[str], None] | None


class LazyEngine(NamedTuple):
    """An engine that can be started when it is needed.

    Attributes:
        identity: Everything except the question that can change an answer: weights, tokenizer and chat template,
            revision, dtype, engine with its versions, device, decoding, seed, longest prompt.
        kind: The backend's class, for its name and its capabilities.
        start: Starts the engine.
    """

    identity: Mapping[str, Any]
    kind: type[Backend]
    start: Callable[[], Backend]


class CachedBackend:
    """A backend that caches the answers of an engine.

    Args:
        store: The stored answers; None disables the cache.
        identity: See `LazyEngine`.
        kind: See `LazyEngine`.
        start: Starts the engine; called at most once, and never if every answer is cached.
        instead: Returns a replacement for an engine that failed, or None if there is none.
    """

    def __init__(
        self,
        store: AnswerStore | None,
        identity: Mapping[str, Any],
        kind: type[Backend],
        start: Callable[[], Backend],
        instead: Callable[[EngineFailure], LazyEngine | None] | None = None,
    ) -> None:
        self.store, self._instead = store, instead
        self.replaced = 0
        """Number of times that a failed engine was replaced; later answers are from the replacement."""
        self._use_engine(LazyEngine(identity, kind, start))
        self.part: int | None = None
        """The part of a job that questions belong to; None: answers may be shared by all parts.

        Generated texts and search results may differ in the last bits with the other prompts of a batch, so they are
        cached per part. Scores are cached for all parts.
        """
        self._started: Backend | None = None
        self.recalled = 0
        """Number of answers from the cache."""
        self.recalled_seconds = 0.0
        """The cost of those answers when they were computed."""
        self.start_seconds = 0.0
        """The cost of starting the engine, which is part of the first call that needs it."""

    def _use_engine(self, offer: LazyEngine) -> None:
        self.identity, kind, self._begin = offer
        self.name = kind.name
        self.capabilities: frozenset[Capability] = kind.capabilities
        self._together = not issubclass(kind, AnswerStream)

    def generate(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        """Continue each prompt, using cached answers; see `Backend.generate`."""
        questions = _Questions(
            self, lambda: [self._key("generate", prompt, max_tokens=max_tokens) for prompt in prompts]
        )
        while indices := questions.missing():
            engine, part = self.start(), [prompts[i] for i in indices]
            with questions.replaced_on_failure():
                if isinstance(engine, AnswerStream):
                    for n, completion in engine.generate_each(part, max_tokens=max_tokens):
                        questions.keep([indices[n]], [completion])
                else:
                    questions.keep(indices, engine.generate(part, max_tokens=max_tokens))
        return [Completion(**answer) for answer in questions.answers]

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], *, closed: bool = True
    ) -> list[Scores]:
        """Score candidate continuations, using cached answers; see `Backend.score`."""
        questions = _Questions(
            self,
            lambda: [
                self._key("score", prompt, candidates=list(texts), closed=closed)
                for prompt, texts in zip(prompts, candidates, strict=True)
            ],
        )
        while indices := questions.missing():
            engine, part, texts = self.start(), [prompts[i] for i in indices], [candidates[i] for i in indices]
            with questions.replaced_on_failure():
                if isinstance(engine, AnswerStream):
                    for n, scores in engine.score_each(part, texts, closed=closed):
                        questions.keep([indices[n]], [scores])
                else:
                    questions.keep(indices, engine.score(part, texts, closed=closed))
        return [
            Scores(**answer | {"logprobs": tuple(answer["logprobs"]), "tokens": tuple(answer["tokens"])})
            for answer in questions.answers
        ]

    def search(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        *,
        k: int,
        width: int,
        excluded: Sequence[Sequence[int]] = (),
        exact: bool = False,
    ) -> list[SearchResult]:
        """Search a catalogue, using cached answers; see `Backend.search`."""
        catalogue = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
        question = {"texts": catalogue, "k": k, "width": width, "exact": exact}
        out = [sorted(set(excluded[n])) if excluded else [] for n in range(len(prompts))]
        questions = _Questions(
            self,
            lambda: [
                self._key("search", prompt, **question, excluded=barred)
                for prompt, barred in zip(prompts, out, strict=True)
            ],
        )
        while indices := questions.missing():
            engine, part, barred = self.start(), [prompts[i] for i in indices], [out[i] for i in indices]
            with questions.replaced_on_failure():
                questions.keep(indices, engine.search(part, texts, k=k, width=width, excluded=barred, exact=exact))
        return [
            SearchResult(**answer | {"items": tuple(answer["items"]), "scores": tuple(answer["scores"])})
            for answer in questions.answers
        ]

    def rate(self, prompts: Sequence[Prompt]) -> list[HeadRating]:
        """Predict ratings with the rating head, using cached answers; see `HeadBackend.rate`.

        Raises:
            BackendError: If the engine has no rating head.
        """
        questions = _Questions(self, lambda: [self._key("rate", prompt) for prompt in prompts])
        while indices := questions.missing():
            engine = self.start()
            if not isinstance(engine, HeadBackend):
                raise BackendError(
                    f"backend {self.name!r} has no rating head; set eval.backend=hf",
                    kind="unsupported",
                    column="eval.backend",
                )
            with questions.replaced_on_failure():
                questions.keep(indices, engine.rate([prompts[i] for i in indices]))
        return [HeadRating(**answer) for answer in questions.answers]

    def close(self) -> None:
        """Close the engine, if it was started."""
        if self._started is not None:
            self._started.close()
            self._started = None

    @contextmanager
    def streaming(self, listener: Callable[[str], None]) -> Iterator[None]:
        """Stream the text for a single prompt as it is generated, if the engine supports it."""
        engine = self.start()
        if not isinstance(engine, StreamingEngine):
            yield
            return
        engine.listener = listener
        try:
            yield
        finally:
            engine.listener = None

    def start(self) -> Backend:
        """Return the engine, which is started for the first prompt that is not cached."""
        if self._started is None:
            begin = time.monotonic()
            try:
                self._started = self._begin()
            except EngineFailure as failure:
                if not self.replace(failure):
                    raise
                return self.start()
            self.start_seconds += time.monotonic() - begin
            # The capabilities of a server are known only after the start.
            self.capabilities = self._started.capabilities
        return self._started

    def replace(self, failure: EngineFailure) -> bool:
        """Switch to the next engine; return False if there is none."""
        offer = self._instead(failure) if self._instead is not None else None
        if offer is None:
            return False
        self.close()
        self._use_engine(offer)
        self.replaced += 1
        return True

    def _key(self, verb: str, prompt: Prompt, **question: Any) -> str:
        fields = {
            "verb": verb,
            "turns": [[message.role, [s.text for s in message.segments]] for message in prompt.messages],
            # Parts of a text are tokenised separately, so their boundaries can change the tokens.
            "answer": [[segment.kind == "target", segment.text] for segment in prompt.answer_prefix],
            "stop": prompt.stop,
            **question,
        }
        if self.part is not None and self._together and verb != "score":
            fields["part"] = self.part
        text = json.dumps([dict(self.identity), fields], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class _Questions:
    """The prompts of one call: some answers are cached, and the engine (or its replacement) computes the others."""

    def __init__(self, backend: CachedBackend, keys_of: Callable[[], list[str]]) -> None:
        self._backend, self._keys_of = backend, keys_of
        self._keys: list[str] = []
        self._known: dict[str, Any] = {}
        self._begin = 0.0

    @property
    def answers(self) -> list[dict[str, Any]]:
        """The answers in the order of the prompts."""
        return [self._known[key]["answer"] for key in self._keys]

    def missing(self) -> list[int]:
        """Start the engine, and return the indices of prompts that it must answer; empty if all are cached."""
        backend = self._backend
        if self._keys and all(key in self._known for key in self._keys):
            return []
        while True:
            self._keys, replaced = self._keys_of(), backend.replaced
            self._known = {} if backend.store is None else backend.store.get(self._keys)
            missing = {key: i for i, key in reversed(list(enumerate(self._keys))) if key not in self._known}
            if missing:
                backend.start()  # not part of the cost of an answer
            if backend.replaced == replaced:
                break
        self._recalled = sum(key in self._known for key in self._keys)
        self._recalled_seconds = sum(entry["seconds"] for entry in self._known.values())
        count_answers(self._recalled)
        if not missing:
            self._count()
        self._begin = time.monotonic()
        return sorted(missing.values())

    @contextmanager
    def replaced_on_failure(self) -> Iterator[None]:
        """Run the engine; if it fails and is replaced, repeat with the new engine."""
        try:
            yield
        except EngineFailure as failure:
            if not self._backend.replace(failure):
                raise
            self._keys = []
        else:
            self._count()

    def keep(self, indices: Sequence[int], answers: Sequence[Any]) -> None:
        """Store answers computed in one batch, each with its share of the time."""
        now = time.monotonic()
        share = (now - self._begin) / len(indices)
        self._begin = now
        pairs = zip(indices, answers, strict=True)
        fresh = {self._keys[i]: StoredAnswer(seconds=share, answer=asdict(answer)) for i, answer in pairs}
        if self._backend.store is not None:
            self._backend.store.put(fresh.items())
        self._known |= fresh

    def _count(self) -> None:
        self._backend.recalled += self._recalled
        self._backend.recalled_seconds += self._recalled_seconds
