"""Cuts large files into pieces of whole lines, and keeps count of rows and lines for errors."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Literal

import polars as pl

from llmrec.data.read.files import Member
from llmrec.data.read.limits import check_head, enumerated
from llmrec.data.read.text import Table, without_marks
from llmrec.errors import DataError, Place, did_you_mean

BLOCK = 16 * 2**20
"""Bytes that are read at a time."""
LONGEST = 64 * 2**20
"""Bytes of the longest line; a file of one endless line stops here and not when the memory is full."""

Kind = Literal["text", "number", "maybe"]
"""``maybe`` is a text that an object may lack."""

_LINE = re.compile(r"[^\n]+")


@dataclass(frozen=True)
class Block:
    """Some rows of a file.

    Attributes:
        name: The file, as errors call it.
        frame: The columns that were asked for. Missing values are nulls or empty texts.
        first: Rows of the file before these.
        lines: The line of each row.
    """

    name: str
    frame: pl.DataFrame
    first: int
    lines: Sequence[int]

    def column(self, name: str) -> pl.Series:
        """Return a column."""
        return self.frame[name]

    def where(self, index: int) -> Place:
        """Return the place of a row, by its 0-based index in the block."""
        return Place(self.name, self.first + index + 1, self.lines[index])


def numbered(name: str, lines: Sequence[Sequence[int]]) -> Table:
    """Return what names a row of the whole file in errors.

    Args:
        name: The file.
        lines: The line of each row, block by block.
    """
    rows = 0
    gaps = set()
    for part in lines:
        gaps.add(part.start - 1 - rows if isinstance(part, range) else None)
        rows += len(part)
    gap = next(iter(gaps), None)
    if len(gaps) == 1 and gap is not None:
        return Table(name, pl.DataFrame(), header=gap)
    return Table(name, pl.DataFrame(), lines=array("q", (line for part in lines for line in part)))


@dataclass(frozen=True)
class Piece:
    """Some whole lines of a file, and how many lines and rows stand before them."""

    name: str
    raw: bytes
    line: int
    row: int

    def where(self, row: int, line: int) -> Place:
        """Return the place of a row, by its 0-based index and line in the piece."""
        return Place(self.name, self.row + row + 1, self.line + line + 1)

    @property
    def height(self) -> int:
        """Number of lines."""
        return self.raw.count(b"\n") + (not self.raw.endswith(b"\n"))


# --------------------------------------------------------------------------- cutting a file at line ends


def pieces(member: Member, *, quoted: bool) -> Iterator[Piece]:
    """Cut a file into whole lines; ``row`` is left at the number of lines before."""
    line = 0
    with member.open() as stream:
        for raw in _cut(member.name, stream, quoted):
            raw = without_marks(raw)
            if not line:
                check_head(Place(member.name, line=1), raw)
            if raw:
                piece = Piece(member.name, raw, line, line)
                yield piece
                line += piece.height


def _cut(name: str, stream: BinaryIO, quoted: bool) -> Iterator[bytes]:
    rest = b""
    while chunk := stream.read(BLOCK):
        data = rest + chunk
        end = _end(data, quoted)
        if not end and len(data) > LONGEST:
            raise DataError.at(
                name,
                "too-large",
                f" has a line{' or a quoted field' if quoted else ''} of more than {LONGEST} bytes, so it is not "
                "this data set or it is damaged; fetch it again",
            )
        if end:
            yield data[:end]
        rest = data[end:]
    if rest:
        yield rest


def _end(data: bytes, quoted: bool) -> int:
    """Return where the last whole row ends; a line break inside double quotes ends none."""
    end = data.rfind(b"\n") + 1
    if not quoted:
        return end
    odd = data.count(b'"', 0, end) % 2
    while end and odd:
        before = data.rfind(b"\n", 0, end - 1) + 1
        odd ^= data.count(b'"', before, end) % 2
        end = before
    return end


def decoded(piece: Piece, encoding: str) -> str:
    """Decode a piece, or name the first line that is not of the encoding or holds a NUL byte."""

    def place(offset: int) -> Place:
        return Place(piece.name, line=piece.line + piece.raw.count(b"\n", 0, offset) + 1)

    nul = piece.raw.find(b"\0")
    if nul >= 0:
        raise DataError.at(place(nul), "encoding", ": there is a NUL byte, so the file is damaged; fetch it again")
    try:
        return piece.raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError.at(
            place(error.start),
            "encoding",
            f": byte 0x{piece.raw[error.start]:02x} is not {encoding.upper()}; fetch the file "
            f"again or save it as {encoding.upper()}",
        ) from error


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that hold something with their 0-based numbers; millions of empty ones cost little."""
    line = last = 0
    for found in _LINE.finditer(text):
        line += text.count("\n", last, found.start())
        last = found.start()
        yield line, found.group()


def check_columns(name: str, names: Sequence[str], wanted: Mapping[str, Kind]) -> None:
    """Check that a file has the columns that are asked for.

    Raises:
        DataError: If it lacks one.
    """
    for column in wanted:
        if column not in names:
            raise DataError.at(
                name,
                "missing-column",
                f" has no column {column!r}{did_you_mean(column, names)}, so it is not this data set; its "
                f"columns are: {enumerated(names)}. Correct it, or fetch the file again",
                column,
            )
