"""Reads tables strictly: a file is understood in full, or the error names the file and the row.

Text files (CSV, TSV, JSON Lines, each optionally gzipped) give strings only, with an empty text where a value is
missing; `llmrec.data.read.typed` gives them their types. Rows are counted from 1, without the header; where the
line number differs it is named too.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv

from llmrec.data.read import limits
from llmrec.data.read.limits import check_head, no_file, reason, require_file, shown, stranger
from llmrec.data.read.packed import STREAMS, unpack
from llmrec.errors import DataError, Place, did_you_mean
from llmrec.terminal import logger

log = logger(__name__)

MAX_COLUMNS = 2000
"""Most columns of a table; more of them are rows that a wrong line end or separator has put side by side."""
LONGEST = 64 * 2**20
"""Longest field and longest line."""
_LONGEST_HEADER = 2**20
_LONGEST_NAME = 1000
_HEAD = 2**16
# Lines above a header, lines that show that it is one, and characters that are looked at for them.
_MOST_ABOVE, _ALIKE, _LOOKED_AT = 20, 4, 2**16
_MEND = "check data.path, data.items and data.users"
_MARK, _RAW_MARK = re.compile("(?m)^\ufeff+"), re.compile(b"(?m)^(?:%b)+" % codecs.BOM_UTF8)
_FIELD = "\x1f"  # a separator of one character, which stands in for a longer one

# The library's own limit is 128 KiB a field, which a long text or a set of a thousand candidates can pass.
csv.field_size_limit(max(csv.field_size_limit(), LONGEST))


@dataclass(frozen=True)
class Table:
    """A table as read.

    Attributes:
        name: The file, as errors call it.
        frame: The values: strings from text files, any type from Parquet.
        sha256: Of the file as it is stored; empty if it is not a file.
        lines: The line of each row, or None if row n is in line n + ``header``.
        header: Lines before the first row.
        unusable: Columns that are left out, with what they hold.
        parts: The tables of which this one is made, one behind the other; empty for a single file.
        rows: The 0-based place of each row in the file, where rows were left out; None: all stand there.
        unread: Columns that are there by name alone, since nobody asked for them.
        lists: Columns of Arrow with a list in each row, by path; see `llmrec.data.read.nested`.
    """

    name: str
    frame: pl.DataFrame
    sha256: str = ""
    lines: Sequence[int] | None = None
    header: int = 0
    unusable: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[Table, ...] = ()
    rows: Sequence[int] | None = None
    unread: frozenset[str] = frozenset()
    lists: Mapping[str, Any] = field(default_factory=dict)

    def column(self, name: str) -> pl.Series:
        """Return a column.

        Raises:
            LookupError: If it was not read: whoever asks for it must say so when the table is read.
        """
        if name in self.unread:
            raise LookupError(f"column {name!r} of {self.name} was not read")
        return self.frame[name]

    def where(self, index: int) -> Place:
        """Return the place of a row, by its 0-based index."""
        for part in self.parts:
            if index < part.frame.height:
                return part.where(index)
            index -= part.frame.height
        row = self.rows[index] if self.rows is not None else index
        return Place(self.name, row + 1, self.line(index))

    def line(self, index: int) -> int:
        """Return the line of a row of a single file, by its 0-based index."""
        return self.lines[index] if self.lines is not None else index + 1 + self.header


def read_bytes(path: Path, *, text: bool = True) -> tuple[bytes, str]:
    """Return a file's bytes, unpacked if it is packed by itself, and the SHA-256 of the file as it is stored.

    Args:
        path: The file.
        text: Whether it must be text; one that is none is then refused before it is read.

    Raises:
        DataError: If it is missing, no file, unreadable, empty, damaged or too large.
    """
    check_path(path)
    packed = path.suffix.lower() in STREAMS
    try:
        size = path.stat().st_size
        if size > limits.MAX_BYTES:
            raise DataError.at(path, "too-large", f" has {size} bytes, more than {limits.MAX_BYTES}; split it")
        with path.open("rb") as stream:
            head = stream.read(_HEAD)
            if text and not packed:
                recognised(str(path), head)
            # Reading reserves what it is asked for.
            stored = head + stream.read(max(0, size - len(head)) + 1)
    except OSError as error:
        raise DataError.at(path, "unreadable", f" cannot be read ({reason(error)}); {_MEND}") from error
    if packed and not stored:
        raise DataError.at(path, "empty", " is empty; write the table again")
    raw = unpack(str(path), stored, path.suffix.lower()) if packed else stored
    if not raw:
        raise DataError.at(path, "empty", " is empty; write the table again")
    return raw, hashlib.sha256(stored).hexdigest()


def check_path(path: Path) -> None:
    """Check that a table is a file.

    Raises:
        DataError: If it is missing, or no file.
    """
    if no_file(path) == "does not exist":
        raise DataError.at(path, "missing-file", f": there is no such file{_near(path)}; {_MEND}")
    require_file(path, _MEND)


def recognised(name: str, head: bytes) -> None:
    """Refuse a text file that begins like something else.

    Raises:
        DataError: Naming what it is.
    """
    problem = stranger(head)
    if problem:
        raise DataError.at(Place(name, 1, 1), "wrong-format", f": {problem}")


def user_path(text: str) -> Path:
    """Return a path from a recipe, with ``~`` for the home folder.

    Raises:
        DataError: If it can be the path of no file.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # no such user: the file of that name will be reported as missing
        path = Path(text)
    try:
        path.exists()
    except OSError as error:
        raise DataError(
            f"{shown(text)} cannot be a path ({reason(error)}); check data.path, data.items and data.users",
            kind="bad-value",
            at=text,
        ) from error
    return path


def _near(path: Path) -> str:
    try:
        return did_you_mean(path.name, [other.name for other in path.parent.iterdir()])
    except OSError:
        return f" (nor a folder {str(path.parent)!r} that can be read)"


def decode(name: str, raw: bytes, *, encoding: str = "utf-8", header: int = 1) -> str:
    """Decode text without byte order marks, which lines begin with where files were put together.

    Raises:
        DataError: If some byte does not belong to the encoding, or is NUL.
    """

    def place(offset: int) -> Place:
        line = raw.count(b"\n", 0, offset) + 1
        return Place(name, max(0, line - header), line)

    check_head(Place(name, 1, 1), raw[:_HEAD])
    nul = raw.find(b"\0")
    if nul >= 0:
        raise DataError.at(
            place(nul),
            "encoding",
            ": there is a NUL byte, so this is not a text table or it is damaged; write it again, as UTF-8",
        )
    if raw.startswith(codecs.BOM_UTF8):
        encoding = "utf-8"  # whatever its set was published in, somebody saved it anew
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError.at(
            place(error.start),
            "encoding",
            f": byte 0x{raw[error.start]:02x} is not {encoding.upper()}; save the file as {encoding.upper()}",
        ) from error
    return _MARK.sub("", text) if "\ufeff" in text else text


def without_marks(raw: bytes) -> bytes:
    """Return lines of UTF-8 without byte order marks: files that begin with one may have been put together."""
    return _RAW_MARK.sub(b"", raw) if codecs.BOM_UTF8 in raw else raw


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
        separator: Between fields. With a header that lacks it, those of `separator_of` are tried.
        columns: Names of the columns of a file without a header.
        quoted: Whether a double quote opens a field in which separators are text.
        encoding: Of the bytes.
        sha256: Passed through.

    Raises:
        DataError: If it is no text, a row has another number of fields than the header, or a quote stays open.
    """
    text = decode(name, raw, encoding=encoding, header=0 if columns else 1)
    if not text.strip():
        raise DataError.at(name, "empty", " is empty; write the table again")
    skipped = preamble(text, separator) if columns is None else 0
    above, text = _cut(text, skipped)
    if above:
        log.warning("%s: %d lines above its header are left out, the first being %s", name, skipped, shown(above))
    if columns is None:
        first = text[: text.find("\n")] if "\n" in text else text
        if len(first) > _LONGEST_HEADER:
            raise DataError.at(
                Place(name, 0, 1),
                "wrong-format",
                f": the first line has {len(first)} characters, so this is no table or its lines have "
                "no ends; write it again",
            )
        separator = separator_of(first, separator)
    if len(separator) > 1 and _FIELD not in text:
        text, separator, quoted = text.replace(separator, _FIELD), _FIELD, False
    frame = _fast(text, separator, columns, quoted)
    lines = None
    if frame is None:
        # Blank lines are no rows, and keep count of those above.
        frame, lines = _careful(name, "\n" * skipped + text, separator, columns, quoted)
    if frame.is_empty():
        raise DataError.at(name, "empty", " has a header and no rows; write the table again")
    table = Table(name, frame, sha256, lines, 0 if columns else 1 + skipped)
    again = second_header(frame) if columns is None else None
    if again is not None:
        raise DataError.at(table.where(again), "duplicate", " repeats the header; remove it")
    return table


def preamble(text: str, usual: str) -> int:
    """Return how many lines stand above the header: titles, notes and comments, as spreadsheets export them.

    They hold no separator, and what follows them are three lines at least that hold one, each as often as the others;
    or they begin with ``#``.
    """
    lines = text[:_LOOKED_AT].split("\n")[: _MOST_ABOVE + _ALIKE]
    for place, line in enumerate(lines[:_MOST_ABOVE]):
        mark = separator_of(line, usual)
        if mark not in line or line.startswith("#"):
            continue
        alike = [each for each in lines[place : place + _ALIKE] if each.strip()]
        even = len(alike) == _ALIKE and len({each.count(mark) for each in alike}) == 1
        above = [each for each in lines[:place] if each.strip()]
        bare = all(each.startswith("#") or mark not in each for each in above)
        return place if above and even and bare and not any('"' in each for each in above) else 0
    return 0


def _cut(text: str, lines: int) -> tuple[str, str]:
    """Return the first of so many lines, and what stands behind all of them."""
    if not lines:
        return "", text
    *above, rest = text.split("\n", lines)
    return next((line.strip() for line in above if line.strip()), ""), rest


def separator_of(header: str, usual: str) -> str:
    """Return what stands between the fields of a header: the usual separator, ``::``, or one that is often used."""
    return next((mark for mark in (usual, "::", ";", "\t", "|", ",") if mark in header), usual)


def second_header(frame: pl.DataFrame) -> int | None:
    """Return the first row in which every column holds its own name, as where two files were put together."""
    if not frame.width:
        return None
    rows = frame.with_row_index("\0").filter(pl.all_horizontal(pl.col(name) == name for name in frame.columns))
    return None if rows.is_empty() else int(rows["\0"][0])


def column_names(name: str, found: Iterable[str], fix: str = "rename one") -> list[str]:
    """Return the names of columns, without blanks around them.

    Raises:
        DataError: If one stands there twice, or there are too many.
    """
    names = [column.strip() for column in found]
    if len(names) > MAX_COLUMNS:
        raise DataError.at(
            Place(name, 0, 1),
            "too-large",
            f": {len(names)} columns are more than {MAX_COLUMNS}; check the separator and the line ends, "
            "or keep the columns that are needed",
        )
    long = next((column for column in names if len(column) > _LONGEST_NAME), None)
    if long is not None:
        raise DataError.at(
            Place(name, 0, 1),
            "too-large",
            f": a column's name has {len(long)} characters; check the line ends of the file",
        )
    twice = next((column for column, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DataError.at(
            Place(name, 0, 1), "duplicate", f": the column {shown(twice)} stands there twice; {fix}", twice
        )
    return names


def in_arrow(raw: bytes) -> pa.BufferReader:
    """Return bytes as a file in Arrow's own memory.

    Arrow's threads may let go of a file after the call that read it has returned. One that is a Python object needs the
    interpreter for that, and a program that ends in this moment is aborted ("terminate called without an active
    exception").
    """
    memory = pa.allocate_buffer(len(raw))
    pa.FixedSizeBufferWriter(memory).write(raw)
    return pa.BufferReader(memory)


def _fast(text: str, separator: str, columns: Sequence[str] | None, quoted: bool) -> pl.DataFrame | None:
    """Read plain text, in which every line is a row; None if it must be read with care."""
    if (quoted and '"' in text) or "\r" in text.replace("\r\n", "\n") or "\n\n" in text.replace("\r\n", "\n"):
        return None
    first = text[: text.find("\n")].rstrip("\r") if "\n" in text else text
    names = list(columns) if columns else [column.strip() for column in first.split(separator)]
    if len(names) < 2 or len(set(names)) < len(names) or len(names) > MAX_COLUMNS:
        return None
    try:
        table = pa_csv.read_csv(
            in_arrow(text.encode()),
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
    names = column_names(name, columns) if columns else None
    rows: list[list[str]] = []
    lines: list[int] = []
    start = 1
    try:
        for row in reader:
            if row and names is None:
                names = column_names(name, row)
            elif row:
                if len(row) != len(names or ()):
                    place = Place(name, len(rows) + 1, start)
                    raise DataError.at(
                        place,
                        "ragged-row",
                        f" has {len(row)} fields where "
                        f"{'the header has' if columns is None else 'it should have'} {len(names or ())}; "
                        + (
                            "fields lie between '::', so no field may hold it; correct the row"
                            if separator == _FIELD
                            else f"a field that holds {separator!r} needs double quotes around it"
                        ),
                    )
                rows.append(row)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        place = Place(name, 0 if names is None else len(rows) + 1, start)
        raise DataError.at(place, "syntax", f": {csv_problem(error)}") from error
    if not rows:
        return pl.DataFrame(schema=dict.fromkeys(names or (), pl.String)), lines
    values = zip(*rows, strict=True)
    return pl.DataFrame([pl.Series(n, v, pl.String) for n, v in zip(names or (), values, strict=True)]), lines


def csv_problem(error: csv.Error) -> str:
    """Say what is wrong with a row of CSV, and the fix."""
    if "new-line character" in str(error):
        return "there is a lone carriage return; end every line with a line feed, or put double quotes around the field"
    return f"{reason(error)}; check the double quotes in this row"
