"""Files of ranking requests, read row by row: no more of a file is in memory than one row, or one batch of Parquet.

A row that cannot be read is a `Raw` with an error and never ends the file; only a file that cannot be read at all does.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmrec.data.files import reason
from llmrec.data.requests import KEYS
from llmrec.durable import sha256_of
from llmrec.errors import DataError, did_you_mean

LONGEST = 64 * 2**20
"""Longest line in bytes, and longest row of a CSV file in characters."""

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
SEPARATORS: Mapping[str, str] = {".csv": ",", ".tsv": "\t"}
_BATCH = 256
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
    """

    path: Path
    suffix: str
    sha256: str
    rows: int
    blank: int

    def __iter__(self) -> Iterator[Raw]:
        """Yield every row in order.

        Raises:
            DataError: If the file changed or is damaged.
        """
        with _readable(self.path):
            if self.suffix in PARQUET:
                yield from _parquet(self.path)
            elif self.suffix in JSON_LINES:
                yield from (_json(line, raw) for line, raw in _lines(self.path) if raw is None or raw.strip())
            else:
                yield from (found for found in _delimited(self.path, self.suffix) if found is not None)


def open_requests(path: Path) -> RequestFile:
    """Look through a JSON Lines, CSV, TSV or Parquet file, the text ones optionally gzipped.

    Raises:
        DataError: If it is missing, empty, damaged or of no known kind, or has no column of candidates.
    """
    suffix = kind_of(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"the file of requests {path} {what}; check --in")
    with _readable(path):
        if suffix in PARQUET:
            columns = pq.ParquetFile(path).schema_arrow.names
            _has_candidates(path, columns)
            rows, blank = pq.ParquetFile(path).metadata.num_rows, 0
        elif suffix in JSON_LINES:
            filled = [0, 0]
            for _, raw in _lines(path):
                filled[raw is None or bool(raw.strip())] += 1
            blank, rows = filled
        else:
            filled = [0, 0]
            for found in _delimited(path, suffix):
                filled[found is not None] += 1
            blank, rows = filled
        sha256 = sha256_of(path)
    if rows == 0:
        raise DataError(f"{path} holds no request; write at least one")
    return RequestFile(path, suffix, sha256, rows, blank)


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
        raise DataError(f"{path}: requests and rankings are kept in files that end in {', '.join(known)}{inside}")
    return suffix[0]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged gzip ({reason(error)}); pack it again") from error
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file or is damaged ({reason(error)}); write it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({reason(error)}); check --in") from error


# --------------------------------------------------------------------------- lines


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield numbered lines without a byte order mark; None stands for one that is too long."""
    with _open(path) as stream:
        number = 0
        while raw := stream.readline(LONGEST + 1):
            number += 1
            if number == 1:
                if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise DataError(f"{path}: this looks like UTF-16; save the file as UTF-8")
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if len(raw) > LONGEST:
                while raw and not raw.endswith(b"\n"):
                    raw = stream.readline(LONGEST)
                yield number, None
            else:
                yield number, raw


def _json(line: int, raw: bytes | None) -> Raw:
    if raw is None:
        return Raw(line, None, f"the line is longer than {LONGEST} bytes")
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Raw(line, None, f"byte 0x{raw[error.start]:02x} is not UTF-8")
    except (ValueError, RecursionError) as error:
        return Raw(line, None, f"not JSON ({reason(error)})")
    if not isinstance(record, dict):
        return Raw(line, None, "not a JSON object")
    return Raw(line, record)


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
                raise DataError(f"{self._path}, line {line} is longer than {LONGEST} bytes; is this a table?")
            # What is not UTF-8 becomes halves of surrogate pairs, which the cells are searched for.
            text = raw.decode("utf-8", "surrogateescape")
        self.taken.append((line, text))
        self._size += len(text)
        return text

    def begin_row(self) -> None:
        self.taken, self._size = [], 0

    def give_back(self) -> None:
        """Let the lines after the first one be read again, each for itself."""
        self._back.extend(reversed(self.taken[1:]))


def _delimited(path: Path, suffix: str) -> Iterator[Raw | None]:
    """Yield rows after the header; None stands for a blank line."""
    # The library's own limit is 128 KiB a cell, which a set of a thousand candidates can pass.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    columns, separator = _header(path, SEPARATORS[suffix])
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
            yield Raw(line, None, f"not a row of this table ({error}); check its double quotes")
            continue
        yield _row(feed.taken[0][0], columns, cells, separator) if cells else None


def _header(path: Path, separator: str) -> tuple[list[str], str]:
    feed = _Feed(path)
    first = next(feed, "").rstrip("\r\n")
    separator = next((mark for mark in (separator, ";", "\t", ",") if mark in first), separator)
    try:
        columns = [name.strip() for name in next(csv.reader([first], delimiter=separator, strict=True), [])]
    except csv.Error as error:
        raise DataError(f"{path}, header: {error}; check its double quotes") from error
    twice = [name for name in columns if columns.count(name) > 1]
    if twice:
        raise DataError(f"{path}, header: the column {twice[0]!r} stands there twice; rename one")
    _has_candidates(path, columns)
    return columns, separator


def _has_candidates(path: Path, columns: list[str]) -> None:
    if "candidates" not in columns:
        raise DataError(
            f"{path} has no column 'candidates'{did_you_mean('candidates', columns)}; its columns are: "
            f"{', '.join(columns) or 'none'}. A request needs candidates, and may have: {', '.join(KEYS)}"
        )


def _row(line: int, columns: list[str], cells: list[str], separator: str) -> Raw:
    if len(cells) != len(columns):
        return Raw(
            line,
            None,
            f"{len(cells)} fields where the header has {len(columns)}; a field that holds {separator!r} or a double "
            "quote needs double quotes around it",
        )
    if any(_NO_UTF8.search(cell) for cell in cells):
        return Raw(line, None, "not UTF-8")
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
            raise DataError(f"{key!r} begins like a JSON list and is none ({reason(error)})") from error
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
    except UnicodeDecodeError:
        pass  # some row is no text: find out which
    for place in range(batch.num_rows):
        try:
            yield batch.slice(place, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield "not UTF-8"
