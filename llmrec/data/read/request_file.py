"""Files of ranking requests, read row by row: no more of a file is in memory than one row, or one batch of Parquet.

A row that cannot be read is a `Raw` with an error and never ends the file; only a file that cannot be read at all does.
"""

from __future__ import annotations

import csv
import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from llmrec.data.read.limits import BROKEN, Capped, check_head, enumerated, reason, require_file
from llmrec.data.read.objects import json_object
from llmrec.data.read.packed import STREAMS
from llmrec.data.read.parquet import FAULTS, check_size
from llmrec.data.read.text import LONGEST, column_names, csv_problem
from llmrec.data.requests import KEYS
from llmrec.durable import sha256_of
from llmrec.errors import DataError, Place, did_you_mean

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
SEPARATORS: Mapping[str, str] = {".csv": ",", ".tsv": "\t"}
_BATCH = 256
_CHUNK = 2**16
_LISTS = ("history", "candidates")
_NO_UTF8 = re.compile("[\ud800-\udfff]")
# A bracket alone may open a title, such as "[REC]".
_JSON_LIST = re.compile(r'\[\s*["{]')
_MAYBE_JSON_LIST = re.compile(r"\[\s*[-\d\]].*\]$|\[\s*\]$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Raw:
    """One row as it stands in the file.

    Attributes:
        line: Counted from 1: the line where the row begins; in Parquet the row.
        record: Its values by key, as far as it could be read.
        error: Why it could not be read; empty if it could.
    """

    line: int
    record: Mapping[str, object] | None
    error: str = ""


@dataclass(frozen=True)
class RequestFile:
    """A file of requests that was looked through once.

    Attributes:
        path: The file.
        suffix: Its kind, without ``.gz``.
        sha256: Of the file as it is stored.
        rows: Number of requests.
        blank: Number of blank lines between them; they are no requests.
        bare: Whether its requests may all lack candidates.
    """

    path: Path
    suffix: str
    sha256: str
    rows: int
    blank: int
    bare: bool = False

    def __iter__(self) -> Iterator[Raw]:
        """Yield every row in order.

        Raises:
            DataError: If the file changed or is damaged.
        """
        with _readable(self.path, self.suffix):
            if self.suffix in PARQUET:
                yield from _parquet(self.path)
            elif self.suffix in JSON_LINES:
                yield from (_json(line, raw) for line, raw in _lines(self.path) if raw is None or raw.strip())
            else:
                rows = _delimited(self.path, self.suffix, self.bare)
                yield from (found for found in rows if found is not None)


def open_requests(path: Path, *, bare: bool = False) -> RequestFile:
    """Look through a JSON Lines, CSV, TSV or Parquet file, the text ones optionally gzipped.

    Args:
        path: The file.
        bare: Its requests may lack candidates, which are found for them; a history or a user then suffices.

    Raises:
        DataError: If it is missing, empty, damaged or of no known kind, or has no column of candidates.
    """
    suffix = kind_of(path)
    require_file(path, "check --in", "the file of requests")
    with _readable(path, suffix):
        if suffix in PARQUET:
            file = pq.ParquetFile(path)
            check_size(str(path), file, path.stat().st_size)
            _has_columns(path, file.schema_arrow.names, bare)
            rows, blank = file.metadata.num_rows, 0
        elif suffix in JSON_LINES:
            filled = [0, 0]
            for _, raw in _lines(path):
                filled[raw is None or bool(raw.strip())] += 1
            blank, rows = filled
        else:
            filled = [0, 0]
            for found in _delimited(path, suffix, bare):
                filled[found is not None] += 1
            blank, rows = filled
        sha256 = sha256_of(path)
    if rows == 0:
        raise DataError.at(path, "empty", " holds no request; write at least one")
    return RequestFile(path, suffix, sha256, rows, blank, bare)


def kind_of(path: Path) -> str:
    """Return the suffix that says what a file holds.

    Raises:
        DataError: If it is none of those that are known.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[-2:-1] if packed else suffixes[-1:]) or [""]
    known = (*JSON_LINES, *SEPARATORS) if packed else (*JSON_LINES, *SEPARATORS, *PARQUET)
    if suffix[0] not in known:
        inside = " inside .gz" if packed else ""
        raise DataError.at(
            path, "wrong-format", f": requests and rankings are kept in files that end in {', '.join(known)}{inside}"
        )
    return suffix[0]


@contextmanager
def _readable(path: Path, suffix: str) -> Iterator[None]:
    faults = FAULTS if suffix in PARQUET else BROKEN
    try:
        yield
    except faults as error:
        if suffix in PARQUET:
            raise DataError.at(
                path, "damaged", f" is not a Parquet file or is damaged ({reason(error)}); write it again"
            ) from error
        if path.suffix.lower() == ".gz":
            raise DataError.at(path, "damaged", f" is damaged gzip ({reason(error)}); pack it again") from error
        raise DataError.at(path, "unreadable", f" cannot be read ({reason(error)}); check --in") from error


# --------------------------------------------------------------------------- lines


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    with path.open("rb") as stored:
        if path.suffix.lower() == ".gz":
            yield Capped(str(path), STREAMS[".gz"](stored), path.stat().st_size)
        else:
            yield stored


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield numbered lines without their ends and a byte order mark; None stands for one that is too long."""
    with _open(path) as stream:
        for number, raw in enumerate(_cut(stream), start=1):
            if number == 1 and raw is not None:
                check_head(Place(str(path), line=1), raw)
                raw = raw.removeprefix(BOM_UTF8)
            yield number, raw


def _cut(stream: Any) -> Iterator[bytes | None]:
    """Yield lines; reading by blocks, since a file may have millions of empty ones."""
    # Of the line at hand: what was read of it, until it is too long. Bytes that are added to one by one are copied
    # with every block.
    rest: list[bytes] = []
    size = 0
    while chunk := stream.read(_CHUNK):
        first, *others = chunk.split(b"\n")
        size += len(first)
        if size > LONGEST:
            rest.clear()
        else:
            rest.append(first)
        if others:
            yield None if size > LONGEST else b"".join(rest)
            yield from (None if len(line) > LONGEST else line for line in others[:-1])
            rest, size = [others[-1]], len(others[-1])
    if size:
        yield None if size > LONGEST else b"".join(rest)


def _json(line: int, raw: bytes | None) -> Raw:
    if raw is None:
        return Raw(line, None, f"the line is longer than {LONGEST} bytes")
    if b"\0" in raw:
        return Raw(line, None, "there are NUL bytes, so this is no text or UTF-16; save the file as UTF-8")
    try:
        return Raw(line, json_object("this line", raw.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Raw(line, None, f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8")
    except DataError as error:
        return Raw(line, None, str(error))


# --------------------------------------------------------------------------- delimited text


class _Feed:
    """Hands lines to a csv reader, and takes back those that a stray quote swallowed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = _lines(path)
        self._back: list[tuple[int, str]] = []
        self.taken: list[tuple[int, str]] = []
        self._size = 0

    def __iter__(self) -> _Feed:
        """Return itself."""
        return self

    def __next__(self) -> str:
        """Return the next line of the row at hand."""
        if self._size > LONGEST:
            raise StopIteration
        if self._back:
            line, text = self._back.pop()
        else:
            line, raw = next(self._lines)
            if raw is None:
                raise DataError.at(
                    Place(str(self._path), line=line), "too-large", f" is longer than {LONGEST} bytes; is this a table?"
                )
            # What is not UTF-8 becomes halves of surrogate pairs, which the cells are searched for.
            text = raw.decode("utf-8", "surrogateescape") + "\n"
        self.taken.append((line, text))
        self._size += len(text)
        return text

    def begin_row(self) -> None:
        self.taken, self._size = [], 0

    def give_back(self) -> None:
        """Let the lines after the first one be read again, each for itself."""
        self._back.extend(reversed(self.taken[1:]))


def _delimited(path: Path, suffix: str, bare: bool) -> Iterator[Raw | None]:
    """Yield rows after the header; None stands for a blank line."""
    columns, separator = _header(path, SEPARATORS[suffix], bare)
    feed = _Feed(path)
    next(feed)
    rows = csv.reader(feed, delimiter=separator, strict=True)
    while True:
        feed.begin_row()
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            line = feed.taken[0][0]
            feed.give_back()
            yield Raw(line, None, f"not a row of this table: {csv_problem(error)}")
            continue
        yield _row(feed.taken[0][0], columns, cells, separator) if cells else None


def _header(path: Path, separator: str, bare: bool) -> tuple[list[str], str]:
    feed = _Feed(path)
    first = next(feed, "").rstrip("\r\n")
    separator = next((mark for mark in (separator, ";", "\t", ",") if mark in first), separator)
    try:
        columns = column_names(str(path), next(csv.reader([first], delimiter=separator, strict=True), []))
    except csv.Error as error:
        raise DataError.at(Place(str(path), 0, 1), "syntax", f": {csv_problem(error)}") from error
    _has_columns(path, columns, bare)
    return columns, separator


def _has_columns(path: Path, columns: list[str], bare: bool) -> None:
    if bare and not {"history", "user_id"}.isdisjoint(columns):
        return
    if "candidates" not in columns and "item" not in columns:
        raise DataError.at(
            path,
            "missing-column",
            f" has no column 'candidates'{did_you_mean('candidates', columns)}; its columns are: "
            f"{enumerated(columns) or 'none'}. A request needs candidates, and may have: {', '.join(KEYS)}",
            "candidates",
        )


def _row(line: int, columns: list[str], cells: list[str], separator: str) -> Raw:
    if len(cells) != len(columns):
        return Raw(
            line,
            None,
            f"{len(cells)} fields where the header has {len(columns)}; a field that holds {separator!r} or a double "
            "quote needs double quotes around it",
        )
    if cells == columns:
        return Raw(line, None, "the header stands here again; remove the line")
    if any(_NO_UTF8.search(cell) for cell in cells):
        return Raw(line, None, "not UTF-8; save the file as UTF-8")
    return _unpacked(line, {name: cell for name, cell in zip(columns, cells, strict=True) if cell.strip()})


def _unpacked(line: int, record: dict[str, object]) -> Raw:
    """Read the lists that stand in cells: a JSON list, or ids between bars."""
    try:
        lists = {key: _list(key, cell) for key in _LISTS if isinstance(cell := record.get(key), str)}
    except DataError as error:
        return Raw(line, {key: value for key, value in record.items() if key not in _LISTS}, str(error))
    return Raw(line, record | lists)


def _list(key: str, cell: str) -> list[Any]:
    text = cell.strip()
    if not text:
        return []
    if _JSON_LIST.match(text) or _MAYBE_JSON_LIST.match(text):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{key!r} begins like a JSON list and is none ({reason(error)})", kind="syntax", column=key
            ) from error
        return list(found)
    return [part.strip() for part in text.split("|")]


# --------------------------------------------------------------------------- Parquet


def _parquet(path: Path) -> Iterator[Raw]:
    file = pq.ParquetFile(path)
    columns = file.schema_arrow.names
    wanted = [name for name in columns if name in KEYS]
    # Columns that are not read still count as keys, so that a misspelt one is noticed.
    others: dict[str, object] = {name: None for name in columns if name not in KEYS}
    row = 0
    for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
        for record in _values(batch):
            row += 1
            if isinstance(record, str):
                yield Raw(row, None, record)
            else:
                yield _unpacked(row, {**record, **others})


def _values(batch: Any) -> Iterator[dict[str, object] | str]:
    """Yield a batch's rows as objects, or as the reason why one is none."""
    try:
        yield from batch.to_pylist()
        return
    except FAULTS:
        pass  # some row is no text, or holds a time that Python cannot: find out which
    for place in range(batch.num_rows):
        try:
            found = batch.slice(place, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield "not UTF-8; write it again"
        except FAULTS as error:
            yield f"a value that cannot be used ({reason(error)}); write texts, numbers and lists of them"
        else:
            yield found
