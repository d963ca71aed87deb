"""Reads tables strictly: a file is understood in full, or the error names the file and the row.

Text files (CSV, TSV, JSON Lines, each optionally gzipped) give strings only, with an empty text where a value is
missing; `llmrec.data.columns` gives them their types. Rows are counted from 1, without the header; where the
line number differs it is named too.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from llmrec.errors import DataError, did_you_mean

MAX_BYTES = 8 * 2**30
"""Largest unpacked file; a gzip bomb ends here and not when the memory does."""

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".inter": "\t", ".item": "\t", ".user": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Table:
    """A table as read.

    Attributes:
        name: The file, as errors call it.
        frame: The values: strings from text files, any type from Parquet.
        sha256: Of the file as it is stored; empty if it is not a file.
        lines: The line of each row, or None if row n is in line n + ``header``.
        header: Lines before the first row.
    """

    name: str
    frame: pl.DataFrame
    sha256: str = ""
    lines: Sequence[int] | None = None
    header: int = 0

    def where(self, index: int) -> str:
        """Name a row by its 0-based index: ``ratings.csv, row 3 (line 4)``."""
        line = self.lines[index] if self.lines is not None else index + 1 + self.header
        return f"{self.name}, {_row(index + 1, line)}"


def _row(row: int, line: int) -> str:
    return f"row {row}" if row == line else f"row {row} (line {line})"


def reason(error: BaseException) -> str:
    """Return another library's message in one short line, to be quoted in ours."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"


def read_table(path: Path) -> Table:
    """Read a CSV, TSV, JSON Lines or Parquet file, the text ones optionally gzipped.

    Raises:
        DataError: If it is missing, empty or malformed.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[-2:-1] if packed else suffixes[-1:]) or [""]
    raw, sha256 = read_bytes(path)
    name = str(path)
    if suffix[0] in _PARQUET:
        return parquet(name, raw, sha256)
    if suffix[0] in _JSON_LINES:
        return json_lines(name, raw, sha256)
    if suffix[0] in _SEPARATORS:
        return delimited(name, raw, separator=_SEPARATORS[suffix[0]], sha256=sha256)
    known = sorted([*_SEPARATORS, *_JSON_LINES, *_PARQUET])
    ending = repr(suffix[0]) if suffix[0] else "nothing"
    raise DataError(f"{name}: a file that ends in {ending} is no table; known: {', '.join(known)}")


def read_bytes(path: Path) -> tuple[bytes, str]:
    """Return a file's bytes, unpacked if it is gzipped, and the SHA-256 of the file as it is stored.

    Raises:
        DataError: If it is missing, unreadable, empty, damaged or too large.
    """
    try:
        stored = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file{_near(path)}; check data.path and data.items") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({reason(error)}); check data.path and data.items") from error
    raw = unpack(str(path), stored) if path.suffix.lower() == ".gz" else stored
    if not raw:
        raise DataError(f"{path} is empty; write the table again")
    return raw, hashlib.sha256(stored).hexdigest()


def user_path(text: str) -> Path:
    """Return a path from a recipe, with ``~`` for the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user: the file of that name will be reported as missing
        return Path(text)


def _near(path: Path) -> str:
    try:
        return did_you_mean(path.name, [other.name for other in path.parent.iterdir()])
    except OSError:
        return f" (nor a folder {str(path.parent)!r} that can be read)"


def unpack(name: str, stored: bytes) -> bytes:
    """Unpack gzip, with a cap on the size.

    Raises:
        DataError: If it is damaged or larger than `MAX_BYTES`.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(stored)) as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} is damaged gzip ({reason(error)}); pack it again") from error
    if len(raw) > MAX_BYTES:
        raise DataError(f"{name} unpacks to more than {MAX_BYTES} bytes; split it")
    return raw


def decode(name: str, raw: bytes, *, encoding: str = "utf-8", header: int = 1) -> str:
    """Decode text without a byte order mark.

    Raises:
        DataError: If some byte does not belong to the encoding, or is NUL.
    """

    def place(offset: int) -> str:
        line = raw.count(b"\n", 0, offset) + 1
        return "header" if line <= header else _row(line - header, line)

    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{name}, row 1: this looks like UTF-16; save the file as UTF-8")
    nul = raw.find(b"\0")
    if nul >= 0:
        raise DataError(f"{name}, {place(nul)}: there is a NUL byte, so this is not a text table or it is damaged")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}, {place(error.start)}: byte 0x{raw[error.start]:02x} is not {encoding.upper()}; "
            f"save the file as {encoding.upper()}"
        ) from error
    return text.removeprefix("\ufeff")


# --------------------------------------------------------------------------- delimited text


def delimited(
    name: str,
    raw: bytes,
    *,
    separator: str,
    columns: Sequence[str] | None = None,
    quoted: bool = True,
    encoding: str = "utf-8",
    sha256: str = "",
) -> Table:
    """Read delimited text.

    Args:
        name: What errors call it.
        raw: The bytes.
        separator: Between fields. With a header that lacks it, ``;``, tab and ``,`` are tried.
        columns: Names of the columns of a file without a header.
        quoted: Whether a double quote opens a field in which separators are text.
        encoding: Of the bytes.
        sha256: Passed through.

    Raises:
        DataError: If it is no text, a row has another number of fields than the header, or a quote stays open.
    """
    text = decode(name, raw, encoding=encoding, header=0 if columns else 1)
    if not text.strip():
        raise DataError(f"{name} is empty; write the table again")
    if columns is None:
        first = text[: text.find("\n")] if "\n" in text else text
        separator = next((mark for mark in (separator, ";", "\t", ",") if mark in first), separator)
    frame = _fast(text, separator, columns, quoted)
    lines = None
    if frame is None:
        frame, lines = _careful(name, text, separator, columns, quoted)
    if frame.is_empty():
        raise DataError(f"{name} has a header and no rows; write the table again")
    return Table(name, frame, sha256, lines, 0 if columns else 1)


def _names(name: str, found: Sequence[str]) -> list[str]:
    names = [column.strip() for column in found]
    twice = [column for column in names if names.count(column) > 1]
    if twice:
        raise DataError(f"{name}, header: the column {twice[0]!r} stands there twice; rename one")
    return names


def _fast(text: str, separator: str, columns: Sequence[str] | None, quoted: bool) -> pl.DataFrame | None:
    """Read plain text, in which every line is a row; None if it must be read with care."""
    if (quoted and '"' in text) or "\r" in text.replace("\r\n", "\n") or "\n\n" in text.replace("\r\n", "\n"):
        return None
    first = text[: text.find("\n")].rstrip("\r") if "\n" in text else text
    names = list(columns) if columns else [column.strip() for column in first.split(separator)]
    if len(names) < 2 or len(set(names)) < len(names):
        return None
    try:
        table = pa_csv.read_csv(
            io.BytesIO(text.encode()),
            read_options=pa_csv.ReadOptions(column_names=names, skip_rows=0 if columns else 1),
            parse_options=pa_csv.ParseOptions(delimiter=separator, quote_char=False),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid:
        return None  # some row is ragged: the careful reader says which
    frame = pl.from_arrow(table)
    return frame if isinstance(frame, pl.DataFrame) else None


def _careful(
    name: str, text: str, separator: str, columns: Sequence[str] | None, quoted: bool
) -> tuple[pl.DataFrame, list[int]]:
    lines_of = io.StringIO(text, newline="")
    reader = (
        csv.reader(lines_of, delimiter=separator, strict=True)
        if quoted
        else csv.reader(lines_of, delimiter=separator, strict=True, quoting=csv.QUOTE_NONE)
    )
    names = _names(name, columns) if columns else None
    rows: list[list[str]] = []
    lines: list[int] = []
    start = 1
    try:
        for row in reader:
            if row and names is None:
                names = _names(name, row)
            elif row:
                if len(row) != len(names or ()):
                    raise DataError(
                        f"{name}, {_row(len(rows) + 1, start)} has {len(row)} fields where "
                        f"{'the header has' if columns is None else 'it should have'} {len(names or ())}; "
                        f"a field that holds {separator!r} needs double quotes around it"
                    )
                rows.append(row)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        place = "header" if names is None else _row(len(rows) + 1, start)
        raise DataError(f"{name}, {place}: {error}; check the double quotes in this row") from error
    if not rows:
        return pl.DataFrame(schema=dict.fromkeys(names or (), pl.String)), lines
    values = zip(*rows, strict=True)
    return pl.DataFrame([pl.Series(n, v, pl.String) for n, v in zip(names or (), values, strict=True)]), lines


# --------------------------------------------------------------------------- JSON Lines and Parquet


def json_lines(name: str, raw: bytes, sha256: str = "") -> Table:
    """Read one JSON object a line. Numbers become text again; lists of texts are joined by commas.

    Raises:
        DataError: If a line is no JSON object, or a value is nested.
    """
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    for number, line in enumerate(decode(name, raw, header=0).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{name}, {_row(len(rows) + 1, number)}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place} is not JSON ({reason(error)}); write one object a line") from error
        if not isinstance(record, dict):
            raise DataError(f"{place} is not a JSON object; write one object a line")
        rows.append({key: _text(f"{place}, column {key!r}", value) for key, value in record.items()})
        lines.append(number)
    if not rows:
        raise DataError(f"{name} is empty; write the table again")
    names = list(dict.fromkeys(key for row in rows for key in row))
    frame = pl.DataFrame([pl.Series(key, [row.get(key, "") for row in rows], pl.String) for key in names])
    return Table(name, frame, sha256, lines)


def _text(place: str, value: object) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = ", ".join(value)
    if value is None or isinstance(value, str | int | float):
        text = "" if value is None else str(value)
        if "\0" in text or any("\ud800" <= mark <= "\udfff" for mark in text):
            raise DataError(f"{place} holds a character that is no text (NUL or half of a surrogate pair); remove it")
        return text
    raise DataError(f"{place} is a nested value; flatten it or leave it out")


def parquet(name: str, raw: bytes, sha256: str = "") -> Table:
    """Read a Parquet file.

    Raises:
        DataError: If it is not Parquet, is damaged, or holds no rows.
    """
    try:
        table = pq.read_table(io.BytesIO(raw))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{name} is not a Parquet file or is damaged ({reason(error)}); write it again") from error
    return from_arrow(name, table, sha256)


def from_arrow(name: str, table: Any, sha256: str = "") -> Table:
    """Take the flat columns of an Arrow table.

    Raises:
        DataError: If there are no rows, or two columns have one name.
    """
    try:
        flat = [column.name for column in table.schema if _plain(column.type)]
        _names(name, table.column_names)
        if not table.num_rows or not flat:
            raise DataError(f"{name} has no rows or no plain columns; write the table again")
        chosen = table.select(flat)
        chosen.validate(full=True)  # Arrow itself does not look whether texts are UTF-8
        frame = pl.from_arrow(chosen)
    except (pl.exceptions.PolarsError, pa.ArrowException, ValueError, TypeError) as error:
        raise DataError(f"{name} has a column that cannot be used ({reason(error)}); write plain columns") from error
    if not isinstance(frame, pl.DataFrame):
        raise DataError(f"{name} is not a table; write it again")
    return Table(name, frame, sha256)


def _plain(kind: Any) -> bool:
    """Whether a column can hold ids, numbers, times or texts."""
    types = pa.types
    if types.is_dictionary(kind):
        return bool(types.is_string(kind.value_type) or types.is_large_string(kind.value_type))
    if types.is_list(kind) or types.is_large_list(kind):
        return bool(types.is_string(kind.value_type) or types.is_large_string(kind.value_type))
    tests = (types.is_integer, types.is_floating, types.is_boolean, types.is_string, types.is_large_string)
    more = (types.is_string_view, types.is_timestamp, types.is_date, types.is_decimal128, types.is_null)
    return any(test(kind) for test in (*tests, *more))
