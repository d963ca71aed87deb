"""Reads files of ranking requests row by row, so that only one row or Parquet batch is in memory.

A row that cannot be read becomes a `RequestRow` with an error; only a file that cannot be read at all raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec.data.read import text
from llmrec.data.read.delimited import BrokenRow, parse_rows
from llmrec.data.read.files import JSON_LINES_ENDINGS, PARQUET_ENDINGS, HashedFile, split_gz_ending
from llmrec.data.read.limits import check_regular_file, format_error, format_names
from llmrec.data.read.objects import parse_json_object
from llmrec.data.read.parquet import PARQUET_ERRORS, open_parquet_file
from llmrec.data.read.tables import validate_column_names
from llmrec.data.read.text import LineBlocks, LineTooLong
from llmrec.data.requests import REQUEST_KEYS
from llmrec.durable import sha256_of
from llmrec.errors import DataError, Location, did_you_mean

SEPARATORS: Mapping[str, str] = {".csv": ",", ".tsv": "\t"}
_BATCH = 256
_BLOCK = 2**16
_LIST_KEYS = ("history", "candidates")
_NO_UTF8 = re.compile("[\ud800-\udfff]")
# Titles such as "[REC]" may begin with a single bracket.
_JSON_LIST = re.compile(r'\[\s*["{]')
_MAYBE_JSON_LIST = re.compile(r"\[\s*[-\d\]].*\]$|\[\s*\]$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One row of a request file.

    Attributes:
        line: The line on which the row begins, counted from 1; for Parquet the row.
        record: Its values by key, as far as they could be read.
        error: Why it could not be read; empty if it could.
    """

    line: int
    record: Mapping[str, object] | None
    error: str = ""


@dataclass(frozen=True)
class RequestFile:
    """A file of requests, checked once before it is read.

    Attributes:
        path: The file.
        suffix: Its type, without ``.gz``.
        sha256: Hash of the file as stored.
        rows: Number of requests.
        blank: Number of blank lines between requests.
        bare: Whether requests may lack candidates.
    """

    path: Path
    suffix: str
    sha256: str
    rows: int
    blank: int
    bare: bool = False

    def __iter__(self) -> Iterator[RequestRow]:
        """Yield all rows in order.

        Raises:
            DataError: If the file was modified or is damaged.
        """
        if self.suffix in PARQUET_ENDINGS:
            yield from _iterate_parquet_rows(self.path)
        elif self.suffix in JSON_LINES_ENDINGS:
            yield from (
                _parse_json_line(line, raw)
                for line, raw in _iterate_lines(_hashed_file(self.path))
                if raw is None or raw.strip()
            )
        else:
            yield from (
                row
                for row in _iterate_delimited_rows(_hashed_file(self.path), SEPARATORS[self.suffix], self.bare)
                if row is not None
            )


def open_requests(path: Path, *, bare: bool = False) -> RequestFile:
    """Open a JSON Lines, CSV, TSV or Parquet file of requests, with optional gzip for text formats.

    Args:
        path: The file.
        bare: Requests may lack candidates, which are retrieved; a history or a user is then enough.

    Raises:
        DataError: If it is missing, empty, damaged or of an unknown type, or has no column of candidates.
    """
    suffix = file_ending(path)
    check_regular_file(path, "check --in", "the file of requests")
    if suffix in PARQUET_ENDINGS:
        with open_parquet_file(str(path), path) as file:
            _check_columns(str(path), file.schema_arrow.names, bare)
            rows, blank = file.metadata.num_rows, 0
        sha256 = sha256_of(path)
    else:
        source, filled = _hashed_file(path), [0, 0]
        if suffix in JSON_LINES_ENDINGS:
            for _, raw in _iterate_lines(source):
                filled[raw is None or bool(raw.strip())] += 1
        else:
            for row in _iterate_delimited_rows(source, SEPARATORS[suffix], bare):
                filled[row is not None] += 1
        blank, rows = filled
        sha256 = source.sha256
    if rows == 0:
        raise DataError.at(path, "empty", " contains no requests; write at least one request")
    return RequestFile(path, suffix, sha256, rows, blank, bare)


def file_ending(path: Path) -> str:
    """Return the extension that determines the format of a file.

    Raises:
        DataError: If the suffix is unknown.
    """
    suffix, packed = split_gz_ending(path)
    known = (*JSON_LINES_ENDINGS, *SEPARATORS) if packed else (*JSON_LINES_ENDINGS, *SEPARATORS, *PARQUET_ENDINGS)
    if suffix not in known:
        inside = " inside .gz" if packed else ""
        raise DataError.at(
            path, "wrong-format", f": requests and rankings are files that end in {', '.join(known)}{inside}"
        )
    return suffix


# --------------------------------------------------------------------------- lines


def _hashed_file(path: Path) -> HashedFile:
    return HashedFile(path, ".gz" if split_gz_ending(path)[1] else "", fix="check --in")


def _line_blocks(source: HashedFile, stream: Any) -> LineBlocks:
    return LineBlocks(source, stream, head=Location(source.name, line=1), block=_BLOCK)


def _iterate_lines(source: HashedFile) -> Iterator[tuple[int, bytes | None]]:
    """Yield lines with their numbers and without line ends; None for a line that is too long."""
    with source.open() as stream:
        pieces = _line_blocks(source, stream)
        while True:
            try:
                piece = next(pieces)
            except StopIteration:
                return
            except LineTooLong:
                yield pieces.line, None
                continue
            for number, raw in enumerate(piece.raw.removesuffix(b"\n").split(b"\n"), start=piece.line + 1):
                yield number, None if len(raw) > text.MAX_LINE_BYTES else raw


def _parse_json_line(line: int, raw: bytes | None) -> RequestRow:
    if raw is None:
        return RequestRow(line, None, f"the line is longer than {text.MAX_LINE_BYTES} bytes")
    if b"\0" in raw:
        return RequestRow(line, None, "the line contains NUL bytes, so it is binary or UTF-16; save the file as UTF-8")
    try:
        return RequestRow(line, parse_json_object("this line", raw.decode("utf-8")))
    except UnicodeDecodeError as error:
        return RequestRow(line, None, f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8")
    except DataError as error:
        return RequestRow(line, None, str(error))


# --------------------------------------------------------------------------- delimited text


def _iterate_delimited_rows(source: HashedFile, separator: str, bare: bool) -> Iterator[RequestRow | None]:
    """Yield the rows after the header; None for a blank line."""
    columns: list[str] = []
    with source.open() as stream:
        pieces = _line_blocks(source, stream)
        try:
            for piece in pieces:
                # Invalid UTF-8 becomes surrogates, which are searched for in the cells.
                rows = piece.raw.decode("utf-8", "surrogateescape")
                start = line = 0
                if not piece.line:
                    first, end, _ = rows.partition("\n")
                    columns, separator = _parse_header(source.name, first.removesuffix("\r"), separator, bare)
                    start, line = len(first) + len(end), 1
                while start < len(rows):
                    try:
                        for number, cells in parse_rows(rows, separator, newline="\n", start=start, line=line):
                            yield _parse_row(piece.line + number + 1, columns, cells, separator) if cells else None
                        break
                    except BrokenRow as broken:
                        rest = rows[broken.start :] if broken.unfinished and not pieces.ended else ""
                        if rest and len(rest) <= text.MAX_LINE_BYTES:
                            pieces.keep(rest.encode("utf-8", "surrogateescape"))
                            break
                        # A stray quote affects only its own line.
                        yield RequestRow(
                            piece.line + broken.line + 1, None, f"not a row of this table: {broken.problem}"
                        )
                        start, line = rows.find("\n", broken.start) + 1 or len(rows), broken.line + 1
        except LineTooLong as error:
            raise DataError.at(
                Location(source.name, line=pieces.line),
                "too-large",
                f" is longer than {text.MAX_LINE_BYTES} bytes; check that the file is a table",
            ) from error
    if not columns:
        _parse_header(source.name, "", separator, bare)


def _parse_header(name: str, first: str, separator: str, bare: bool) -> tuple[list[str], str]:
    separator = next((mark for mark in (separator, ";", "\t", ",") if mark in first), separator)
    try:
        columns = validate_column_names(name, next((row for _, row in parse_rows(first, separator, newline="\n")), []))
    except BrokenRow as broken:
        raise DataError.at(Location(name, 0, 1), "syntax", f": {broken.problem}") from broken
    _check_columns(name, columns, bare)
    return columns, separator


def _check_columns(name: str, columns: list[str], bare: bool) -> None:
    if bare and not {"history", "user_id"}.isdisjoint(columns):
        return
    if "candidates" not in columns and "item" not in columns:
        raise DataError.at(
            name,
            "missing-column",
            f" has no column 'candidates'{did_you_mean('candidates', columns)}; its columns are: "
            f"{format_names(columns) or 'none'}. A request needs candidates. It may also have: "
            f"{', '.join(REQUEST_KEYS)}",
            "candidates",
        )


def _parse_row(line: int, columns: list[str], cells: list[str], separator: str) -> RequestRow:
    if len(cells) != len(columns):
        return RequestRow(
            line,
            None,
            f"the line has {len(cells)} fields, but the header has {len(columns)}; put double quotes around fields "
            f"that contain {separator!r} or a double quote",
        )
    if cells == columns:
        return RequestRow(line, None, "the line repeats the header; remove it")
    if any(_NO_UTF8.search(cell) for cell in cells):
        return RequestRow(line, None, "the line is not UTF-8; save the file as UTF-8")
    return _parse_list_cells(line, {name: cell for name, cell in zip(columns, cells, strict=True) if cell.strip()})


def _parse_list_cells(line: int, record: dict[str, object]) -> RequestRow:
    """Parse cells that contain lists: a JSON list, or ids separated by ``|``."""
    try:
        lists = {key: _parse_list(key, cell) for key in _LIST_KEYS if isinstance(cell := record.get(key), str)}
    except DataError as error:
        return RequestRow(line, {key: value for key, value in record.items() if key not in _LIST_KEYS}, str(error))
    return RequestRow(line, record | lists)


def _parse_list(key: str, cell: str) -> list[Any]:
    content = cell.strip()
    if not content:
        return []
    if _JSON_LIST.match(content) or _MAYBE_JSON_LIST.match(content):
        try:
            result = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{key!r} begins like a JSON list, but is not valid JSON ({format_error(error)})",
                kind="syntax",
                column=key,
            ) from error
        return list(result)
    return [part.strip() for part in content.split("|")]


# --------------------------------------------------------------------------- Parquet


def _iterate_parquet_rows(path: Path) -> Iterator[RequestRow]:
    with open_parquet_file(str(path), path) as file:
        columns = file.schema_arrow.names
        wanted = [name for name in columns if name in REQUEST_KEYS]
        # Columns that are not read still count as keys, so that a misspelt one is reported.
        others: dict[str, object] = {name: None for name in columns if name not in REQUEST_KEYS}
        row = 0
        for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
            for record in _iterate_batch_rows(batch):
                row += 1
                yield (
                    RequestRow(row, None, record)
                    if isinstance(record, str)
                    else _parse_list_cells(row, {**record, **others})
                )


def _iterate_batch_rows(batch: Any) -> Iterator[dict[str, object] | str]:
    """Yield the rows of a batch as dictionaries, or why a row cannot be read."""
    try:
        yield from batch.to_pylist()
        return
    except PARQUET_ERRORS:
        pass  # A row has invalid UTF-8, or a time that Python cannot represent: convert the rows one by one.
    for row in range(batch.num_rows):
        try:
            result = batch.slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield "a value is not UTF-8; write the file again"
        except PARQUET_ERRORS as error:
            yield (
                f"a value has an unsupported type ({format_error(error)}); write texts, numbers, and lists of texts or "
                "numbers"
            )
        else:
            yield result
