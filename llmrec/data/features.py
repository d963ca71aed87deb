"""Features: precomputed vectors and texts of users or items, with the interactions that they were made from.

A store is a folder that a service can memory-map and read without llmrec, in ten lines of numpy:
docs/text-features-and-cold-start.md.

    current           the name of the version that counts
    VERSION/meta.json           format, numbers of rows and columns, provenance
    VERSION/KIND-ids.npy        ids as UTF-8 bytes, sorted; KIND is user, item or synthetic
    VERSION/KIND-vectors.npy    float32 or float16, shape (n, d), a row per id
    VERSION/KIND-fallback.npy   the vector of unknown ids, shape (d,)
    VERSION/features.sqlite     tables texts (kind, id, text) and seen (kind, id, user, item)
    VERSION/manifest.json       size and sha256 of each of these files

A new version is written next to the current one and published by replacing ``current``: readers that have the old
version open keep it.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmrec.durable import MANIFEST, Json, loads, refuse_link, seal, unchanged, write_json, write_text, writing_to
from llmrec.errors import DataError, LlmrecError
from llmrec.machine import lock

if TYPE_CHECKING:
    from numpy.typing import NDArray

FeatureKind = Literal["user", "item", "synthetic"]
"""What features describe: users, items, or synthetic items that a language model made up, under the ids of users.

A synthetic item is only a feature: it is not in the data set, and so not in any split, candidate set or count."""
Pair = tuple[str, str]
"""A user id and an item id."""
ANSWERS = "answers.sqlite"
"""The prompts and answers of `llmrec augment` in the store that it writes, kept until a user is erased."""

_FORMAT = 1
_CURRENT, _META, _TEXTS, _LOCK = "current", "meta.json", "features.sqlite", ".lock"
# Names of versions and their drafts: nothing else in a folder is ever removed.
_VERSION, _DRAFT = re.compile(r"[0-9a-f]{16}"), re.compile(r"\.[0-9a-f]{16}\.draft")
# Ids are stored in fields of one width, so one long id makes all others as large.
_WIDEST = 512
# Versions kept for processes that have them open, including the current one.
_KEPT = 2
KINDS: tuple[FeatureKind, ...] = ("user", "synthetic", "item")
"""The kinds in the order in which texts are written: a synthetic item may be written from its user's text."""
PLURALS: Mapping[FeatureKind, str] = {"user": "users", "synthetic": "synthetic items", "item": "items"}
OF_PERSONS: tuple[FeatureKind, ...] = ("user", "synthetic")
"""Kinds whose ids are users."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of features; equal provenance and equal ids give equal features.

    Attributes:
        system: The method that made them, such as ``kar``, or how they were imported.
        split: `SplitDataset.readable` of the split that was read; empty if no interactions were read.
        template: Hash of the prompts.
        generator: Model, sampling and seed of the generated texts; empty without any.
        encoder: Model, pooling and maximum text length of the vectors.
        version: Version of llmrec.
    """

    system: str
    split: str = ""
    template: str = ""
    generator: Mapping[str, Json] = field(default_factory=dict)
    encoder: Mapping[str, Json] = field(default_factory=dict)
    version: str = ""


@dataclass(frozen=True)
class Features:
    """Vectors of users or items, with optional texts and the interactions that each text was written from.

    Attributes:
        kind: The kind of the ids.
        ids: Unique ids.
        vectors: Shape (n, d).
        provenance: Their origin.
        texts: One per id, or empty.
        seen: The (user, item) pairs that the text of an id was written from, by id. A model trained on such a pair with
            the text would rely on the text too much.
        fallback: The vector of an unknown id, shape (d,); None: the mean of all.
    """

    kind: FeatureKind
    ids: Sequence[str]
    vectors: NDArray[np.floating[Any]]
    provenance: Provenance
    texts: Sequence[str] = ()
    seen: Mapping[str, frozenset[Pair]] = field(default_factory=dict)
    fallback: NDArray[np.floating[Any]] | None = None

    def __post_init__(self) -> None:
        """Check that the fields are consistent.

        Raises:
            DataError: If an id is repeated or too long, numbers are not finite, or lengths differ; or if ``seen`` has
                an unknown id, whose interactions could then not be kept from a model.
        """
        of, shape = PLURALS[self.kind], self.vectors.shape
        if self.vectors.ndim != 2 or len(self.ids) != len(self.vectors):
            raise DataError(f"{len(self.ids)} {of} have vectors of shape {shape}; give one each", kind="mismatch")
        if self.texts and len(self.texts) != len(self.ids):
            message = f"{len(self.texts)} texts stand beside {len(self.ids)} ids; give one an id"
            raise DataError(message, kind="mismatch")
        if twice := [name for name, times in Counter(self.ids).items() if times > 1]:
            message = f"the {self.kind} {twice[0]!r} stands twice among the features; keep one"
            raise DataError(message, kind="duplicate")
        if stray := self.seen.keys() - set(self.ids):
            message = (
                f"seen: {min(stray)!r} is none of the {of} of these features; give what each of their ids has seen"
            )
            raise DataError(message, kind="mismatch", column="seen")
        instead = self.fallback
        if instead is not None and (instead.shape != shape[1:] or not np.isfinite(instead).all()):
            message = (
                f"fallback: shape {instead.shape} beside vectors of shape {shape}; give one finite number a column"
            )
            raise DataError(message, kind="mismatch", column="fallback")
        if not np.isfinite(self.vectors).all():
            row = int(np.flatnonzero(~np.isfinite(self.vectors).all(axis=1))[0])
            message = f"the vector of the {self.kind} {self.ids[row]!r} holds NaN or infinity; make it again"
            raise DataError(message, kind="bad-value")
        for name in self.ids:
            if not name or "\0" in name or len(name.encode()) > _WIDEST:
                message = f"it is empty, holds NUL or is longer than {_WIDEST} bytes"
                raise DataError(f"the id {name[:40]!r} cannot name features: {message}", kind="bad-value")


@dataclass(frozen=True)
class _Table:
    """The features of one kind, memory-mapped."""

    ids: NDArray[np.bytes_]
    vectors: NDArray[np.floating[Any]]
    fallback: NDArray[np.floating[Any]]


class FeatureStore:
    """Reads features from a folder, by id; safe for concurrent reads."""

    def __init__(self, folder: Path, version: Path, meta: Mapping[str, Any]) -> None:
        """Set up from an opened version; use `open`."""
        self.folder, self._version, self._meta = folder, version, meta
        self._tables: dict[str, _Table] = {
            kind: _Table(
                np.load(version / f"{kind}-ids.npy", mmap_mode="r", allow_pickle=False),
                np.load(version / f"{kind}-vectors.npy", mmap_mode="r", allow_pickle=False),
                np.load(version / f"{kind}-fallback.npy", allow_pickle=False),
            )
            for kind in meta["kinds"]
        }

    @staticmethod
    def open(folder: str | Path, *, split: str | None = None) -> FeatureStore:
        """Open the current version.

        Args:
            folder: The store.
            split: `SplitDataset.readable` of the split in use; None: any.

        The first call in a process reads every file of the version and verifies its checksum; stores of older versions
        have no checksums.

        Raises:
            DataError: If there is no store, it is damaged, or its texts were written from another split.
        """
        place = Path(folder).expanduser()
        try:
            version = place / _named(place / _CURRENT)
            meta = loads((version / _META).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError.at(
                place, "missing-file", " holds no features; write them with llmrec augment, or correct the path"
            ) from error
        except (OSError, ValueError) as error:
            raise DataError.at(place, "damaged", f" is no store of features ({error}); make it again") from error
        if meta.get("format") != _FORMAT:
            raise DataError.at(
                place,
                "wrong-format",
                f" is a store of format {meta.get('format')}, and this version reads {_FORMAT}; make it again",
            )
        try:
            if (version / MANIFEST).is_file() and not unchanged(version):
                raise ValueError(f"a file in {version.name} does not fit its checksum")
            store = FeatureStore(place, version, meta)
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise DataError.at(place, "damaged", f" cannot be read ({error}); make it again") from error
        for kind in store.kinds:
            table, rows = store._tables[kind], meta["kinds"][kind]["rows"]
            if len(table.ids) != rows or len(table.vectors) != rows:
                raise DataError.at(place, "damaged", f" lacks some of its {rows} {PLURALS[kind]}; make it again")
            made_from = store.provenance(kind).split
            if split is not None and made_from and made_from != split:
                raise DataError.at(
                    place,
                    "mismatch",
                    f": the texts of its {PLURALS[kind]} come from other training interactions ({made_from[:12]}, here "
                    f"{split[:12]}), and may tell what is held out here; run llmrec augment on this recipe",
                )
        return store

    @property
    def kinds(self) -> tuple[FeatureKind, ...]:
        """The kinds of features in the store."""
        return tuple(kind for kind in KINDS if kind in self._tables)

    def provenance(self, kind: FeatureKind) -> Provenance:
        """Return the origin of the features of a kind."""
        return Provenance(**self._meta["kinds"][kind]["provenance"])

    @property
    def stamp(self) -> str:
        """A hash over the content and its provenance."""
        text = json.dumps({"dtype": self._meta["dtype"], "kinds": self._meta["kinds"]}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def width(self, kind: FeatureKind) -> int:
        """Return the dimension of the vectors of a kind."""
        return int(self._tables[kind].vectors.shape[1])

    def fallback(self, kind: FeatureKind) -> NDArray[np.floating[Any]] | None:
        """Return the vector of unknown ids if it was given; None if it is the mean of all."""
        return None if self._meta["kinds"][kind]["fallback"] == "mean" else self._tables[kind].fallback

    def ids(self, kind: FeatureKind) -> list[str]:
        """Return all ids of a kind, sorted by their bytes."""
        return [name.decode() for name in self._tables[kind].ids.tolist()]

    def get(self, kind: FeatureKind, ids: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the vectors of ids.

        Args:
            kind: The kind of the ids.
            ids: Ids, with repetitions allowed.

        Returns:
            Vectors, shape (n, d), with the fallback for unknown ids; and whether each id is known, shape (n,).

        Raises:
            DataError: If the store has nothing of this kind.
        """
        if kind not in self._tables:
            raise DataError.at(self.folder, "missing-value", f" has no features of {kind}s; it has {self.kinds}")
        table = self._tables[kind]
        if not ids or not len(table.ids):
            return np.tile(table.fallback.astype(np.float32), (len(ids), 1)), np.zeros(len(ids), dtype=bool)
        asked = np.array([name.encode() for name in ids], dtype=np.bytes_)
        # Fields of another width would copy all stored ids; an id longer than all of them is unknown.
        short = np.char.str_len(asked) <= table.ids.dtype.itemsize
        asked = asked.astype(table.ids.dtype)
        places = np.minimum(np.searchsorted(table.ids, asked), len(table.ids) - 1)
        # An id that ends in NUL would equal the one without it: such ids are never stored, so they are unknown.
        whole = np.array([not name.endswith("\0") for name in ids])
        known = short & whole & (table.ids[places] == asked)
        vectors = np.asarray(table.vectors[places], dtype=np.float32)
        vectors[~known] = table.fallback
        return vectors, known

    def texts(self, kind: FeatureKind, ids: Iterable[str]) -> dict[str, str]:
        """Return the texts of these ids, without ids that have none."""
        with closing(self._database()) as base:
            result = (
                base.execute("SELECT text FROM texts WHERE kind = ? AND id = ?", (kind, name)).fetchone()
                for name in ids
            )
            return {name: row[0] for name, row in zip(ids, result, strict=False) if row is not None}

    @property
    def dtype(self) -> Literal["float32", "float16"]:
        """Data type of the stored vectors."""
        return "float16" if self._meta["dtype"] == "float16" else "float32"

    def seen_by(self, kind: FeatureKind) -> dict[str, frozenset[Pair]]:
        """Return the (user, item) pairs that each text of a kind was written from, by id."""
        result: dict[str, set[Pair]] = {}
        with closing(self._database()) as base:
            for name, user, item in base.execute("SELECT id, user, item FROM seen WHERE kind = ?", (kind,)):
                result.setdefault(name, set()).add((user, item))
        return {name: frozenset(known) for name, known in result.items()}

    def seen(self, kind: FeatureKind | None = None) -> frozenset[Pair]:
        """Return every (user, item) pair that any text was written from."""
        where, given = ("", ()) if kind is None else (" WHERE kind = ?", (kind,))
        with closing(self._database()) as base:
            return frozenset(base.execute(f"SELECT DISTINCT user, item FROM seen{where}", given).fetchall())

    def _database(self) -> sqlite3.Connection:
        return sqlite3.connect(f"{(self._version / _TEXTS).resolve().as_uri()}?mode=ro&immutable=1", uri=True)


def _named(current: Path) -> str:
    """Return the name of the current version.

    Raises:
        ValueError: If the file does not name a version.
    """
    name = current.read_text(encoding="utf-8").strip()
    if not _VERSION.fullmatch(name):
        raise ValueError(f"{current.name} names no version")
    return name


@contextmanager
def writing(folder: str | Path) -> Iterator[Path]:
    """Hold the lock of a store, so that no other process writes to it; the folder is created if it is missing.

    Raises:
        LlmrecError: If the folder is a link, contains other files than a store's, or another process writes to it.
    """
    place = Path(folder).expanduser()
    refuse_link(place)
    if place.is_dir() and not (place / _CURRENT).is_file():
        others = [path.name for path in place.iterdir() if not _is_own(path)]
        if others:
            raise LlmrecError(
                f"{place} holds other things than features, such as {min(others)!r}; name a folder of its own",
                kind="exists",
                at=place,
            )
    place.mkdir(parents=True, exist_ok=True)
    refuse_link(place / _LOCK)
    with (place / _LOCK).open("a") as held:
        if not lock(held):
            raise LlmrecError(
                f"{place} is being written by another process; wait until it has ended", kind="busy", at=place
            )
        with writing_to(place):
            yield place


def _is_own(path: Path) -> bool:
    name = path.name
    known = name in (_CURRENT, _LOCK) or name.startswith((ANSWERS, f".{_CURRENT}"))
    return known or bool(_VERSION.fullmatch(name) or _DRAFT.fullmatch(name))


def publish(
    folder: str | Path, tables: Sequence[Features], *, dtype: Literal["float32", "float16"] = "float32"
) -> Path:
    """Write features as the new current version; if the call is killed, the previous version stays current.

    Args:
        folder: The store; created if it is missing.
        tables: At most one per kind.
        dtype: Data type of the stored vectors.

    Returns:
        The folder of the version.

    Raises:
        DataError: If a kind is given twice, or a number is too large for ``dtype``.
        LlmrecError: As `writing`.
    """
    with writing(folder) as place:
        return write_version(place, tables, dtype=dtype)


def write_version(
    place: Path, tables: Sequence[Features], *, dtype: Literal["float32", "float16"] = "float32", keep: int = _KEPT
) -> Path:
    """Write a version inside `writing`; see `publish`.

    Args:
        place: The store.
        tables: See `publish`.
        dtype: See `publish`.
        keep: Versions kept for processes that have them open, including this one.
    """
    if not tables or len({table.kind for table in tables}) != len(tables):
        raise DataError("a store has one table of each kind; give users once and items once", kind="duplicate")
    # Drafts of killed calls.
    for path in [path for path in place.iterdir() if _DRAFT.fullmatch(path.name)]:
        shutil.rmtree(path, ignore_errors=True)
    name = secrets.token_hex(8)
    draft = place / f".{name}.draft"
    draft.mkdir()
    try:
        kinds = {table.kind: _written(draft, table, dtype) for table in tables}
        _write_texts(draft / _TEXTS, tables)
        write_json(draft / _META, {"format": _FORMAT, "dtype": dtype, "kinds": kinds})
        seal(draft)
        draft.replace(place / name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    write_text(place / _CURRENT, name + "\n")
    drop_older(place, keep=keep)
    return place / name


def drop_older(place: Path, *, keep: int = 1) -> None:
    """Remove all versions, inside `writing`, except the current one and the ``keep`` - 1 newest of the others."""
    current = _named(place / _CURRENT)
    versions = [path for path in place.iterdir() if _VERSION.fullmatch(path.name) and path.name != current]
    versions.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for old in versions[keep - 1 :]:
        shutil.rmtree(old, ignore_errors=True)


def _written(folder: Path, table: Features, dtype: str) -> Mapping[str, Json]:
    ids = np.array([name.encode() for name in table.ids], dtype=np.bytes_)
    order = np.argsort(ids, kind="stable")
    fallback = table.fallback
    if fallback is None:
        fallback = table.vectors.mean(axis=0) if len(ids) else np.zeros(table.vectors.shape[1])
    with np.errstate(over="ignore"):
        stored, instead = table.vectors[order].astype(dtype), fallback.astype(dtype)
    if not (np.isfinite(stored).all() and np.isfinite(instead).all()):
        raise DataError(
            f"a vector of the {PLURALS[table.kind]} holds a number too large for {dtype}; use float32", kind="too-large"
        )
    np.save(folder / f"{table.kind}-ids.npy", ids[order], allow_pickle=False)
    np.save(folder / f"{table.kind}-vectors.npy", stored, allow_pickle=False)
    np.save(folder / f"{table.kind}-fallback.npy", instead, allow_pickle=False)
    digest = hashlib.sha256(b"\0".join(ids[order].tolist()) + stored.tobytes() + instead.tobytes())
    seen = sorted((name, *pair) for name, pairs in table.seen.items() for pair in pairs)
    digest.update(json.dumps([seen, list(table.texts)]).encode())
    return {
        "rows": len(ids),
        "width": int(table.vectors.shape[1]),
        "fallback": "mean" if table.fallback is None else "given",
        "sha256": digest.hexdigest(),
        "provenance": asdict(table.provenance),
    }


def _write_texts(path: Path, tables: Sequence[Features]) -> None:
    with closing(sqlite3.connect(path)) as base:
        base.execute("CREATE TABLE texts (kind TEXT, id TEXT, text TEXT, PRIMARY KEY (kind, id)) WITHOUT ROWID")
        base.execute("CREATE TABLE seen (kind TEXT, id TEXT, user TEXT, item TEXT)")
        for table in tables:
            named = zip(table.ids, table.texts, strict=False)
            base.executemany("INSERT INTO texts VALUES (?, ?, ?)", ((table.kind, name, text) for name, text in named))
            rows = ((table.kind, name, *pair) for name in table.ids for pair in sorted(table.seen.get(name, ())))
            base.executemany("INSERT INTO seen VALUES (?, ?, ?, ?)", rows)
        base.execute("CREATE INDEX pairs ON seen (user, item)")
        base.commit()
