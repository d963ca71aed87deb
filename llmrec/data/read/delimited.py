"""Reads delimited text block by block: regular blocks with pyarrow, all others row by row.

The careful reader parses every row, or reports the first one that cannot be used. It uses `parse_rows`, as request
files do, which continue after a broken row.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv

from llmrec.data.read.columns import Column, ColumnKind, NotNumeric, table_from_columns
from llmrec.data.read.files import Source
from llmrec.data.read.limits import format_error, format_names, format_value
from llmrec.data.read.tables import Table, check_columns, validate_column_names
from llmrec.data.read.text import (
    MAX_LINE_BYTES,
    LineBlock,
    LineBlocks,
    TextFormat,
    arrow_buffer,
    decode_block,
    detect_encoding,
    numbered_lines,
)
from llmrec.data.read.typed import first_true
from llmrec.display import shorten_text
from llmrec.errors import DataError, Location
from llmrec.terminal import warn_once_logger

log = warn_once_logger(__name__)

_LONGEST_HEADER = 2**20
# Maximum number of lines above a header, lines needed to recognise it, and characters examined for both.
_MAX_PREAMBLE_LINES, _MIN_REGULAR_LINES, _HEAD_CHARACTERS = 20, 4, 2**16
_MIN_BLOCK_BYTES = 2 * 2**20
_LINE = re.compile(r"[\r\n]*([^\r\n]+)(?:\r\n|\r|\n|$)")
_REPLACEMENT_SEPARATOR = "\x1f"  # one character that replaces a longer separator

# The default limit of Python is 128 KiB per field, which a long text or a set of a thousand candidates can exceed.
csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))


# --------------------------------------------------------------------------- reading row by row


class BrokenRow(Exception):
    """Raised for a row that is not valid CSV.

    Attributes:
        line: Its 0-based line in the text.
        start: Offset of the row in the text.
        unfinished: Whether the text ended within double quotes.
        problem: The problem and its fix.
    """

    def __init__(self, error: csv.Error, line: int, start: int) -> None:
        super().__init__(str(error))
        self.line, self.start = line, start
        self.unfinished = str(error) == "unexpected end of data"
        self.problem = f"{format_error(error)}; check the double quotes in this row"
        if "new-line character" in str(error):
            self.problem = (
                "it contains a carriage return without a line feed; end every line with a line feed, or put double "
                "quotes around the field"
            )


def parse_rows(
    text: str, separator: str | None, *, quoted: bool = True, newline: str = "", start: int = 0, line: int = 0
) -> Iterator[tuple[int, list[str]]]:
    """Yield rows with their 0-based line numbers; a blank line is a row without fields.

    Args:
        text: Whole lines.
        separator: Separator between fields; None: white space.
        quoted: Whether a double quote opens a field in which separators and line breaks are text.
        newline: End of a row: a line feed, or, if empty, also a lone carriage return.
        start: Offset at which to begin, such as after a `BrokenRow`.
        line: The 0-based line number at that offset.

    Raises:
        BrokenRow: If a row is not valid CSV.
    """
    if not quoted:
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        for number, plain in numbered_lines(text):
            yield number, plain.split(separator)
        return
    stream = io.StringIO(text, newline=newline)
    stream.seek(start)
    reader = csv.reader(stream, delimiter=separator or ",", strict=True)
    above = line
    try:
        for cells in reader:
            yield line, cells
            line, start = above + reader.line_num, stream.tell()
    except csv.Error as error:
        raise BrokenRow(error, line, start) from error


# --------------------------------------------------------------------------- tables


def read_delimited(source: Source, form: TextFormat, wanted: Mapping[str, ColumnKind] | None = None) -> Table:
    """Read a table provided by the user.

    Args:
        source: The file.
        form: Its format; a table whose header lacks the separator may have another one, see `detect_separator`.
        wanted: The columns to keep, with the kinds of their values; others are only listed by name. None: all columns.

    Raises:
        DataError: If it is not text, a row and the header differ in the number of fields, or a quote is not closed.
    """
    file, kinds = DelimitedReader(source, form), dict(wanted or {})
    while True:
        try:
            return _read_in_blocks(file, source.name, kinds)
        except NotNumeric as odd:
            kinds[odd.name] = "text"  # such as dates, which remain texts until they are parsed


def _read_in_blocks(file: DelimitedReader, name: str, kinds: Mapping[str, ColumnKind]) -> Table:
    floats = [name for name, kind in kinds.items() if kind == "number"]
    columns: list[Column] = []
    lines: list[Sequence[int]] = []
    with ThreadPoolExecutor() as pool:
        for block in file.blocks(kinds, floats):
            columns = columns or [Column(column, kinds.get(column, "text")) for column in block.frame.columns]
            list(pool.map(Column.add, columns, [block.frame[column.name] for column in columns]))
            lines.append(block.lines or ())
    pa.default_memory_pool().release_unused()
    return table_from_columns(name, file.names, columns, lines=lines)


# --------------------------------------------------------------------------- blocks


class DelimitedReader:
    """Reads a delimited file in blocks.

    Attributes:
        names: Its columns, after the header was read.
    """

    def __init__(self, source: Source, form: TextFormat) -> None:
        """Prepare to read a file; a user's file may have titles or notes above its header, or another separator."""
        self.names: tuple[str, ...] = ()
        self._source, self._form, self._warned = source, form, False
        self._separator, self._quoted, self._encoding = form.separator, form.quoted, form.encodings[-1]

    def read_header(self) -> tuple[str, ...]:
        """Read the header and return the column names.

        Raises:
            DataError: If the file is missing, damaged or empty.
        """
        with self._open() as stream:
            pieces = LineBlocks(self._source, stream, quoted=self._form.quoted)
            for piece in pieces:
                if self._begin(piece, pieces) is not None:
                    return self.names
        raise self._empty()

    def blocks(self, wanted: Collection[str], floats: Collection[str] = ()) -> Iterator[Table]:
        """Yield the rows in blocks.

        Args:
            wanted: The columns to read. A published file must have all of them; of a user's table the available ones
                are read, or all columns if it has none of them.
            floats: Columns to read as numbers where possible; the others are texts.

        Raises:
            DataError: If the file is damaged or empty, lacks a column, or has a row that cannot be read.
        """
        row = 0
        with self._open() as stream:
            pieces = LineBlocks(self._source, stream, quoted=self._form.quoted)
            for piece in pieces:
                begun = bool(self.names)
                body = piece if begun else self._begin(piece, pieces)
                if body is None:
                    continue
                if not begun and self._source.published:
                    check_columns(self._source.name, self.names, wanted)
                if body.raw[:1] in b"\r\n" and not body.raw.strip(b"\r\n"):
                    continue
                chosen = [name for name in wanted if name in self.names] or list(self.names)
                block = self._fast(body, chosen, floats, row) or self._parse_row_by_row(body, pieces, chosen, row)
                again = None if self._form.columns else _repeated_header_index(block.frame)
                if again is not None:
                    fix = "download the file again" if self._source.published else "remove it"
                    raise DataError.at(block.where(again), "duplicate", f" repeats the header; {fix}")
                row += block.frame.height
                if block.frame.height:
                    yield block
        if not row:
            raise self._empty()

    def _open(self) -> AbstractContextManager[Any]:
        self.names = ()
        self._encoding = detect_encoding(self._source, self._form.encodings)
        return self._source.open()

    def _empty(self) -> DataError:
        what = "has no rows; download it again"
        if not self._source.published:
            what = f"{'has a header but no rows' if self.names else 'is empty'}; write the table again"
        return DataError.at(self._source.name, "empty", f" {what}")

    # ---------------------------------------------------------------------- the header

    def _begin(self, piece: LineBlock, pieces: LineBlocks) -> LineBlock | None:
        """Read the header from the first non-blank lines, and return the lines after it."""
        name, form = self._source.name, self._form
        self._separator, self._quoted = form.separator, form.quoted and len(form.separator) == 1
        if form.columns:
            self.names = tuple(validate_column_names(name, form.columns))
            return piece
        if piece.raw.isspace():
            return None
        head = piece.raw
        if len(head) > _HEAD_CHARACTERS:
            head = head[: head.rfind(b"\n", 0, _HEAD_CHARACTERS) + 1 or head.find(b"\n") + 1 or len(head)]
        row = None if self._source.published else 1
        text = decode_block(LineBlock(self._source, head, piece.line), self._encoding, header=row)
        above = "" if self._source.published else self._detect_preamble(text)
        line = piece.line + above.count("\n") + 1
        try:
            cells, end = self._parse_first_row(text[len(above) :])
        except BrokenRow as broken:
            if broken.unfinished and not pieces.ended and head is piece.raw:
                pieces.keep(head)
                return None
            raise DataError.at(Location(name, 0, line + broken.line), "syntax", f": {broken.problem}") from broken
        fix = "download the file again" if self._source.published else "rename one"
        self.names = tuple(validate_column_names(name, cells, fix))
        body = len(text[: len(above) + end].encode(self._encoding))
        return LineBlock(self._source, piece.raw[body:], piece.line + piece.raw.count(b"\n", 0, body))

    def _detect_preamble(self, text: str) -> str:
        """Return the lines above the header, and set the separator that the header uses."""
        name = self._source.name
        skipped = count_preamble_lines(text, self._form.separator)
        *above, below = text.split("\n", skipped)
        if skipped and not self._warned:
            self._warned = True
            title = next((line.strip() for line in above if line.strip()), "")
            log.warning("%s: skipped %d lines above the header, first %s", name, skipped, format_value(title))
        first = below.partition("\n")[0]
        if len(first) > _LONGEST_HEADER:
            raise DataError.at(
                Location(name, 0, 1),
                "wrong-format",
                f": the first line has {len(first)} characters, so the file is not a table or has no line breaks; "
                "write the file again",
            )
        self._separator = detect_separator(first, self._form.separator)
        self._quoted = self._form.quoted and len(self._separator) == 1
        return text[: len(text) - len(below)]

    def _parse_first_row(self, text: str) -> tuple[list[str], int]:
        """Return the fields of the first non-blank row, and the offset of its end."""
        if not self._quoted:
            first = _LINE.match(text)
            return (first[1].split(self._separator), first.end()) if first is not None else ([], len(text))
        stream = io.StringIO(text, newline="")
        reader = csv.reader(stream, delimiter=self._separator, strict=True)
        try:
            return next(filter(None, reader), []), stream.tell()
        except csv.Error as error:
            raise BrokenRow(error, 0, 0) from error

    # ---------------------------------------------------------------------- the rows

    def _fast(self, piece: LineBlock, chosen: Sequence[str], floats: Collection[str], row: int) -> Table | None:
        """Parse lines to a table; None if they must be read row by row."""
        raw, height = piece.raw, piece.height
        if (self._quoted and b'"' in raw) or b"\0" in raw:
            return None
        if b"\r" in raw and raw.count(b"\r") > raw.count(b"\r\n"):
            return None
        separator = self._separator
        if len(separator) > 1:
            if _REPLACEMENT_SEPARATOR.encode() in raw:
                return None
            raw, separator = raw.replace(separator.encode(), _REPLACEMENT_SEPARATOR.encode()), _REPLACEMENT_SEPARATOR
        if self._encoding != "utf-8":
            raw = raw.decode(self._encoding).encode()
        parse = partial(_parse_with_arrow, raw, separator, self.names, chosen)
        table = parse([name for name in chosen if name in floats])
        if table is None and floats:
            table = parse(())
        if table is None or table.num_rows != height:
            return None  # ragged rows or blank lines
        lines = range(piece.line + 1, piece.line + 1 + height)
        return Table(self._source.name, pl.DataFrame(pl.from_arrow(table)), lines=lines, rows=range(row, row + height))

    def _parse_row_by_row(self, piece: LineBlock, pieces: LineBlocks, chosen: Sequence[str], row: int) -> Table:
        """Read lines row by row; an incomplete row is kept for the next piece."""
        name, published = self._source.name, self._source.published
        header = None if published else 0 if self._form.columns else 1
        text = decode_block(piece, self._encoding, header=header)
        rows: list[list[str]] = []
        lines: list[int] = []
        try:
            for line, cells in parse_rows(text, self._separator, quoted=self._quoted):
                if not cells:
                    continue
                if len(cells) != len(self.names):
                    raise self._ragged_row_error(Location(name, row + len(rows) + 1, piece.line + line + 1), len(cells))
                rows.append(cells)
                lines.append(piece.line + line + 1)
        except BrokenRow as broken:
            rest = text[broken.start :].encode(self._encoding) if broken.unfinished and not pieces.ended else b""
            if not rest or (len(rest) > MAX_LINE_BYTES and not published):
                location = Location(name, row + len(rows) + 1, piece.line + broken.line + 1)
                raise DataError.at(location, "syntax", f": {broken.problem}") from broken
            if len(rest) > MAX_LINE_BYTES:
                raise pieces.too_long() from broken
            pieces.keep(rest)
        indices = [self.names.index(column) for column in chosen]
        columns = [
            pl.Series(column, [cells[index] for cells in rows], pl.String)
            for column, index in zip(chosen, indices, strict=True)
        ]
        return Table(name, pl.DataFrame(columns), lines=lines, rows=range(row, row + len(rows)))

    def _ragged_row_error(self, location: Location, count: int) -> DataError:
        width = len(self.names)
        if self._source.published:
            text = (
                f"it should have {width} ({shorten_text(format_names(self.names), 200)}); the file is damaged or does "
                "not belong to this data set; download it again"
            )
        else:
            text = f"{'it should have' if self._form.columns else 'the header has'} {width}; "
            text += (
                f"a field that contains {self._separator!r} needs double quotes around it"
                if len(self._separator) == 1
                else f"fields are separated by {self._separator!r}, so no field may contain it; correct the row"
            )
        return DataError.at(location, "ragged-row", f" has {count} fields where {text}")


def _repeated_header_index(frame: pl.DataFrame) -> int | None:
    """Return the index of the first row that repeats the header, as happens in concatenated files."""
    if any(kind != pl.String for kind in frame.dtypes):
        return None
    same = frame.select(pl.all_horizontal(pl.col(name) == name for name in frame.columns)).to_series()
    return first_true(same)


def _parse_with_arrow(
    raw: bytes, separator: str, names: Sequence[str], chosen: Sequence[str], floats: Collection[str]
) -> pa.Table | None:
    """Parse lines to columns; None if a line is not a regular row of valid values."""
    try:
        return pa_csv.read_csv(
            arrow_buffer(raw),
            read_options=pa_csv.ReadOptions(column_names=list(names), block_size=max(_MIN_BLOCK_BYTES, len(raw) // 8)),
            parse_options=pa_csv.ParseOptions(delimiter=separator, quote_char=False),
            convert_options=pa_csv.ConvertOptions(
                column_types={name: pa.float64() if name in floats else pa.string() for name in names},
                strings_can_be_null=False,
                include_columns=list(chosen),
                null_values=[],
            ),
        )
    except pa.ArrowInvalid:
        return None


# --------------------------------------------------------------------------- recognising the format


def count_preamble_lines(text: str, usual: str) -> int:
    """Return the number of lines above the header, such as titles and notes of spreadsheets.

    They have no separator and are followed by at least three lines that all have the same number of one; or they begin
    with ``#``.
    """
    lines = text[:_HEAD_CHARACTERS].split("\n")[: _MAX_PREAMBLE_LINES + _MIN_REGULAR_LINES]
    for index, line in enumerate(lines[:_MAX_PREAMBLE_LINES]):
        mark = detect_separator(line, usual)
        if mark not in line or line.startswith("#"):
            continue
        alike = [line for line in lines[index : index + _MIN_REGULAR_LINES] if line.strip()]
        even = len(alike) == _MIN_REGULAR_LINES and len({line.count(mark) for line in alike}) == 1
        above = [line for line in lines[:index] if line.strip()]
        bare = all(line.startswith("#") or mark not in line for line in above)
        return index if above and even and bare and not any('"' in line for line in above) else 0
    return 0


def detect_separator(header: str, usual: str) -> str:
    """Return the separator of a header: the default one, ``::``, or another common one."""
    return next((mark for mark in (usual, "::", ";", "\t", "|", ",") if mark in header), usual)
