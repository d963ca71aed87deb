"""Reads text files as blocks of whole lines, decoded from UTF-8 or from a detected encoding."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import pyarrow as pa
from pydantic import Field, field_validator

from llmrec.data.read.files import InMemoryFile, Source, read_to_end
from llmrec.data.read.limits import check_text_start, format_value
from llmrec.errors import DataError, Location
from llmrec.recipe.schema import Section
from llmrec.terminal import warn_once_logger

log = warn_once_logger(__name__)

ReadResult = TypeVar("ReadResult")

BLOCK = 8 * 2**20
"""Bytes read at a time."""
MAX_LINE_BYTES = 64 * 2**20
"""Maximum bytes of a line or field, so that a file with one endless line fails before memory is full."""
_LINE = re.compile(r"[^\n]+")
_BYTE_ORDER_MARKS = re.compile(b"(?m)^(?:%b)+" % codecs.BOM_UTF8)


class TextFormat(Section):
    """The text format of a file.

    Attributes:
        kind: ``json``: one JSON object per line; ``dicts``: one JSON object or Python dictionary per line.
        separator: Separator between the fields of delimited text; may have more than one character.
        columns: Column names of a file without a header.
        quoted: Whether a double quote opens a field in which separators and line breaks are text.
        encodings: Encodings to try; the first that fits the whole file is used.
    """

    kind: Literal["delimited", "json", "dicts"]
    separator: Annotated[str, Field(min_length=1)] = ","
    columns: tuple[str, ...] = ()
    quoted: bool = False
    encodings: Annotated[tuple[str, ...], Field(min_length=1)] = ("utf-8",)

    @field_validator("encodings")
    @classmethod
    def _check_encodings(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            try:
                codecs.lookup(name)
            except LookupError:
                raise ValueError(f"encodings: unknown encoding {name!r}; use one such as utf-8") from None
        return value


# --------------------------------------------------------------------------- lines


@dataclass(frozen=True)
class LineBlock:
    """Consecutive whole lines of a file.

    Attributes:
        source: The file.
        raw: The lines.
        line: Number of lines of the file before these.
    """

    source: Source
    raw: bytes
    line: int

    @property
    def height(self) -> int:
        """Number of lines."""
        return self.raw.count(b"\n") + (not self.raw.endswith(b"\n"))


class LineTooLong(DataError):
    """Raised if a line, or a row with an unclosed quote, is longer than `MAX_LINE_BYTES` bytes."""


class LineBlocks:
    """Iterates over an open file in blocks of whole lines, each several megabytes.

    Attributes:
        line: Number of lines before the next block.
        ended: Whether the latest block was the last.
    """

    def __init__(
        self,
        source: Source,
        stream: Any,
        *,
        quoted: bool = False,
        head: Location | None = None,
        block: int | None = None,
    ) -> None:
        """Prepare to read a file.

        Args:
            source: The file.
            stream: Its bytes.
            quoted: Whether fields may be quoted, for errors.
            head: The location of its beginning, for errors.
            block: Bytes read at a time; `BLOCK` by default.
        """
        self.line, self.ended = 0, False
        self._source, self._stream, self._quoted = source, stream, quoted
        row = None if source.published else 1
        self._head = head or Location(source.name, row, 1)
        self._block = block or BLOCK
        self._rest = b""
        self._in_long = False

    def __iter__(self) -> Iterator[LineBlock]:
        return self

    def __next__(self) -> LineBlock:
        """Return the next block of lines, without byte order marks.

        Raises:
            DataError: If the file does not begin like text, or a line is too long; the next call continues
                after that line.
        """
        raw = self._next()
        if not raw:
            raise StopIteration
        if codecs.BOM_UTF8 in raw:
            raw = _BYTE_ORDER_MARKS.sub(b"", raw)
        if not self.line:
            check_text_start(self._head, raw)
        piece = LineBlock(self._source, raw, self.line)
        self.line += piece.height
        return piece if raw else next(self)

    def _next(self) -> bytes:
        """Return the bytes up to the last complete line; all remaining bytes at the end of the file."""
        # Joined only once, because a long line arrives in thousands of chunks.
        chunks: list[bytes] = [self._rest]
        size = len(self._rest)
        while not self.ended:
            chunk: bytes = self._stream.read(self._block)
            self.ended = not chunk
            if self._in_long and chunk:
                end = chunk.find(b"\n") + 1
                self._in_long, chunk = not end, chunk[end:] if end else b""
            end = chunk.rfind(b"\n") + 1
            if end:
                self._rest = chunk[end:]
                return b"".join((*chunks, chunk[:end]))
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_LINE_BYTES:
                self._rest, self._in_long = b"", True
                self.line += 1
                raise self.too_long()
        self._rest = b""
        return b"".join(chunks)

    def keep(self, raw: bytes) -> None:
        """Put back lines of the last block, so that the next block begins with them."""
        self._rest = raw + self._rest
        self.line -= raw.count(b"\n")

    def too_long(self) -> LineTooLong:
        """Return the error for a line or row that is too long."""
        published = self._source.published
        return LineTooLong.at(
            self._source.name,
            "too-large",
            f" has a line{' or a quoted field' if self._quoted else ''} of more than {MAX_LINE_BYTES} bytes, so the "
            f"file is not {'this data set' if published else 'a table'} or is damaged; "
            f"{'download' if published else 'write'} it again",
        )


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield non-blank lines with their 0-based numbers; skips many blank lines quickly."""
    line = last = 0
    for match in _LINE.finditer(text):
        line += text.count("\n", last, match.start())
        last = match.start()
        yield line, match.group()


def arrow_buffer(raw: bytes) -> pa.BufferReader:
    """Return bytes as an Arrow buffer reader.

    Arrow's threads may release a file after the call that read it has returned. For a Python object they need the
    interpreter, so a program that exits at that time is aborted ("terminate called without an active exception").
    """
    memory = pa.allocate_buffer(len(raw))
    pa.FixedSizeBufferWriter(memory).write(raw)
    return pa.BufferReader(memory)


# --------------------------------------------------------------------------- encodings


def decode_block(piece: LineBlock, encoding: str = "utf-8", *, header: int | None = None) -> str:
    """Decode lines to text.

    Args:
        piece: The lines.
        encoding: Encoding of the file.
        header: Number of lines before the first row, so that errors name the row; None: only the line.

    Raises:
        DataError: If a byte is invalid in the encoding, or NUL.
    """
    published = piece.source.published

    def location(offset: int) -> Location:
        line = piece.line + piece.raw.count(b"\n", 0, offset) + 1
        return Location(piece.source.name, None if header is None else max(0, line - header), line)

    nul = piece.raw.find(b"\0")
    if nul >= 0:
        damage = "the file is damaged; download it again"
        if not published:
            damage = "the file is not a text table or is damaged; write it again, as UTF-8"
        raise DataError.at(location(nul), "encoding", f": it contains a NUL byte, so {damage}")
    try:
        return piece.raw.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.upper()
        fix = f"download the file again or save it as {name}" if published else f"save the file as {name}"
        raise DataError.at(
            location(error.start), "encoding", f": byte 0x{piece.raw[error.start]:02x} is not {name}; {fix}"
        ) from error


def decode_file(name: str, raw: bytes) -> str:
    """Decode a whole UTF-8 file to text, without byte order marks.

    Raises:
        DataError: If it is not text, or a byte is not UTF-8 or NUL.
    """
    check_text_start(Location(name, 1, 1), raw)
    if codecs.BOM_UTF8 in raw:
        raw = _BYTE_ORDER_MARKS.sub(b"", raw)
    return decode_block(LineBlock(InMemoryFile(name, raw), raw, 0), header=0)


def detect_encoding(source: Source, encodings: tuple[str, ...]) -> str:
    """Return the first of several encodings that can decode the whole file."""
    for encoding in encodings[:-1]:
        decoder = codecs.getincrementaldecoder(encoding)()
        try:
            with source.open() as stream:
                while chunk := stream.read(BLOCK):
                    decoder.decode(chunk)
                decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            continue
        return encoding
    return encodings[-1]


def read_all(source: Source) -> bytes:
    """Return all bytes of a file."""
    if isinstance(source, InMemoryFile):
        return source.raw
    with source.open() as stream:
        return read_to_end(stream)


def read_in_any_encoding(source: Source, read: Callable[[Source], ReadResult]) -> ReadResult:
    """Read a table as UTF-8, or else in a detected encoding, with a warning.

    Args:
        source: The file.
        read: Reads a UTF-8 source.

    Raises:
        DataError: As ``read``, if no other encoding is likely.
    """
    try:
        return read(source)
    except DataError as error:
        if error.kind != "encoding":
            raise
        again = _detect_other_encoding(read_all(source))
        if again is None:
            raise
    encoding, text = again
    odd = Counter(mark for mark in text if mark > "\x7f")
    examples = ", ".join(format_value(mark) for mark, _ in odd.most_common(5)) or "none"
    log.warning(
        "%s is not UTF-8 and was read as %s: %d characters are not ASCII, such as %s; if these look wrong, save the "
        "file as UTF-8",
        *(source.name, encoding, odd.total(), examples),
    )
    return read(InMemoryFile(source.name, text.encode()))


_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# UTF-32 begins like UTF-16 followed by a NUL character.
_UTF32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_NON_ASCII_RUN = re.compile(rb"[\x80-\xff]+")
# Maximum mean length of runs of non-ASCII bytes: single letters in Western languages, whole words in others.
_MAX_MEAN_RUN = 1.5
_MAX_RUNS_EXAMINED = 200_000
# Non-ASCII characters of Western languages; nearly all non-ASCII characters of a file must be among them.
_LETTERS = "äáàâãåæçéèêëíìîïñóòôöõøœúùûüßýžšðþ"
_WESTERN_CHARACTERS = frozenset(_LETTERS + _LETTERS.upper() + "‘’‚“”„–—…•·«»‹›°ºª¡¿€£¥§©®™\xa0´²³½¼")
_MIN_WESTERN_SHARE = 0.9


def _detect_other_encoding(raw: bytes) -> tuple[str, str] | None:
    """Return the detected encoding and the decoded text; None if no encoding is likely."""
    if raw.startswith(_UTF16_MARKS) and not raw.startswith(_UTF32_MARKS):
        try:
            return "UTF-16", raw.decode("utf-16")
        except UnicodeDecodeError:
            return None
    runs = [len(run) for run in _NON_ASCII_RUN.findall(raw[: 100 * _MAX_RUNS_EXAMINED])[:_MAX_RUNS_EXAMINED]]
    if b"\0" in raw or not runs or sum(runs) / len(runs) > _MAX_MEAN_RUN:
        return None
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        pass
    else:
        return None  # the encoding is not the problem
    try:
        text = raw.decode("cp1252")
    except UnicodeDecodeError:
        return None
    odd = Counter(mark for mark in text if mark > "\x7f")
    usual = sum(count for mark, count in odd.items() if mark in _WESTERN_CHARACTERS)
    return ("Windows-1252", text) if usual >= _MIN_WESTERN_SHARE * odd.total() else None
