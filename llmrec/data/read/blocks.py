"""Reads large text files block by block: what is kept is what is asked for, not the file.

A block that holds nothing unusual goes through pyarrow. Any other is read line by line, which either understands it
or names the first line that cannot be used.
"""

from __future__ import annotations

import ast
import codecs
import csv
import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence

import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json

from llmrec.data.read.files import Member
from llmrec.data.read.limits import enumerated, reason, shortened
from llmrec.data.read.objects import as_written
from llmrec.data.read.pieces import BLOCK, Block, Kind, Piece, check_columns, decoded, numbered_lines, pieces
from llmrec.data.read.text import column_names, csv_problem, in_arrow, second_header
from llmrec.data.sets.spec import Form
from llmrec.errors import DataError, Place

# Reading a literal takes some 500 times its memory and seconds a megabyte; real ones have a few thousand characters.
_LONGEST_LITERAL = 2**20
_FIELD = "\x1f"  # a separator of one byte, which stands in for a longer one


def blocks(member: Member, form: Form, wanted: Mapping[str, Kind]) -> Iterator[Block]:
    """Read columns of a file.

    Args:
        member: The file.
        form: How it is written.
        wanted: The columns, with what they hold. Delimited text gives texts for numbers too.

    Raises:
        DataError: If the file is damaged or empty, lacks a column, or has a line that cannot be read.
    """
    rows = 0
    pieces = _delimited if form.kind == "delimited" else _objects
    for block in pieces(member, form, wanted):
        rows += block.frame.height
        if block.frame.height:
            yield block
    if not rows:
        raise DataError.at(member.name, "empty", " holds no rows; fetch it again")


def records(member: Member, form: Form, columns: Sequence[str]) -> Iterator[tuple[Place, Mapping[str, object]]]:
    """Read a file row by row, as its place and its values by column; what a row lacks is left out.

    Raises:
        DataError: As `blocks`.
    """
    if form.kind == "delimited":
        for block in blocks(member, form, dict.fromkeys(columns, "text")):
            for index, row in enumerate(block.frame.iter_rows(named=True)):
                yield block.where(index), row
        return
    found = False
    for piece in pieces(member, quoted=False):
        for _, line, values in _lines(piece, form):
            found = True
            yield piece.where(line, line), values
    if not found:
        raise DataError.at(member.name, "empty", " holds no rows; fetch it again")


def header(member: Member, form: Form) -> tuple[str, ...]:
    """Return the columns of delimited text.

    Raises:
        DataError: If the file is missing, damaged or empty.
    """
    if form.columns:
        return form.columns
    encoding = _encoding(member, form.encodings)
    for piece in pieces(member, quoted=form.quoted):
        return _header(piece, form, encoding)[0]
    raise DataError.at(member.name, "empty", " holds no rows; fetch it again")


# --------------------------------------------------------------------------- delimited text


def _delimited(member: Member, form: Form, wanted: Mapping[str, Kind]) -> Iterator[Block]:
    encoding = _encoding(member, form.encodings)
    names = form.columns
    row = 0
    for piece in pieces(member, quoted=form.quoted):
        start = 0
        if not names:
            names, start = _header(piece, form, encoding)
        check_columns(member.name, names, wanted)
        body = Piece(member.name, piece.raw[start:], piece.line + (1 if start else 0), row)
        if not body.raw.strip():
            continue
        frame = _fast_fields(body, form, encoding, names, wanted)
        if frame is not None:
            block = Block(member.name, frame, row, range(body.line + 1, body.line + 1 + frame.height))
        else:
            block = _careful_fields(body, form, encoding, names, wanted)
        again = None if form.columns else second_header(block.frame)
        if again is not None:
            raise DataError.at(block.where(again), "duplicate", " repeats the header; fetch the file again")
        row += block.frame.height
        yield block


def _encoding(member: Member, encodings: Sequence[str]) -> str:
    """Return the first encoding in which the whole file can be read; the last one is taken unseen."""
    for encoding in encodings[:-1]:
        decoder = codecs.getincrementaldecoder(encoding)()
        try:
            with member.open() as stream:
                while chunk := stream.read(BLOCK):
                    decoder.decode(chunk)
                decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            continue
        return encoding
    return encodings[-1]


def _header(piece: Piece, form: Form, encoding: str) -> tuple[tuple[str, ...], int]:
    end = piece.raw.find(b"\n") + 1 or len(piece.raw)
    text = decoded(Piece(piece.name, piece.raw[:end], 0, -1), encoding).rstrip("\r\n")
    return tuple(column_names(piece.name, _split(text, form), "fetch the file again")), end


def _split(text: str, form: Form) -> list[str]:
    if form.quoted:
        try:
            return next(csv.reader([text], delimiter=form.separator, strict=True), [])
        except csv.Error:
            pass  # a header that is no CSV has none of the columns, and that is said
    return text.split(form.separator)


def _fast_fields(
    piece: Piece, form: Form, encoding: str, names: Sequence[str], wanted: Mapping[str, Kind]
) -> pl.DataFrame | None:
    """Read plain lines, each of which is a row; None if they must be read with care."""
    raw = piece.raw
    if (form.quoted and b'"' in raw) or b"\0" in raw or b"\r" in raw.replace(b"\r\n", b"\n"):
        return None
    if len(form.separator) > 1:
        if _FIELD.encode() in raw:
            return None
        raw = raw.replace(form.separator.encode(), _FIELD.encode())
    if encoding != "utf-8":
        raw = raw.decode(encoding).encode()
    try:
        table = pa_csv.read_csv(
            in_arrow(raw),
            read_options=pa_csv.ReadOptions(column_names=list(names), block_size=len(raw) + 1),
            parse_options=pa_csv.ParseOptions(
                delimiter=form.separator if len(form.separator) == 1 else _FIELD, quote_char=False
            ),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False, include_columns=list(wanted)
            ),
        )
    except pa.ArrowInvalid:
        return None
    if table.num_rows != piece.height:
        return None  # blank lines: the careful reader counts them
    frame = pl.from_arrow(table)
    return frame if isinstance(frame, pl.DataFrame) else None


def _careful_fields(piece: Piece, form: Form, encoding: str, names: Sequence[str], wanted: Mapping[str, Kind]) -> Block:
    text = decoded(piece, encoding)
    places = [list(names).index(column) for column in wanted]
    kept: list[list[str]] = [[] for _ in places]
    lines: list[int] = []
    for line, row in _fields(piece, text, form):
        if len(row) != len(names):
            raise DataError.at(
                piece.where(len(lines), line),
                "ragged-row",
                f" has {len(row)} fields where it should have {len(names)} "
                f"({shortened(enumerated(names), 200)}); the file is damaged or not of this data set, so fetch it "
                "again",
            )
        for values, place in zip(kept, places, strict=True):
            values.append(row[place])
        lines.append(piece.line + line + 1)
    columns = [pl.Series(name, values, pl.String) for name, values in zip(wanted, kept, strict=True)]
    return Block(piece.name, pl.DataFrame(columns), piece.row, lines)


def _fields(piece: Piece, text: str, form: Form) -> Iterator[tuple[int, list[str]]]:
    """Yield each row with its 0-based line; blank lines are no rows."""
    if not form.quoted:
        for line, plain in numbered_lines(text):
            if plain.rstrip("\r"):
                yield line, plain.removesuffix("\r").split(form.separator)
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=form.separator, strict=True)
    start = done = 0
    try:
        for row in reader:
            if row:
                yield start, row
                done += 1
            start = reader.line_num
    except csv.Error as error:
        raise DataError.at(piece.where(done, start), "syntax", f": {csv_problem(error)}") from error


# --------------------------------------------------------------------------- one object a line


def _objects(member: Member, form: Form, wanted: Mapping[str, Kind]) -> Iterator[Block]:
    row = 0
    for piece in pieces(member, quoted=False):
        piece = Piece(piece.name, piece.raw, piece.line, row)
        if not piece.line:
            head = piece.raw[: piece.raw.find(b"\n") + 1 or len(piece.raw)]
            first = next((values for _, _, values in _lines(Piece(piece.name, head, 0, 0), form)), {})
            must = {name: kind for name, kind in wanted.items() if kind != "maybe"}
            check_columns(member.name, list(first), must if first else {})
        frame = _fast_objects(piece, wanted)
        if frame is not None:
            block = Block(member.name, frame, row, range(piece.line + 1, piece.line + 1 + frame.height))
        else:
            block = _careful_objects(piece, form, wanted)
        row += block.frame.height
        yield block


def _fast_objects(piece: Piece, wanted: Mapping[str, Kind]) -> pl.DataFrame | None:
    """Read lines of JSON; None if some value is unusual or some line is not JSON."""
    schema = pa.schema([(name, pa.float64() if kind == "number" else pa.string()) for name, kind in wanted.items()])
    try:
        table = pa_json.read_json(
            in_arrow(piece.raw),
            read_options=pa_json.ReadOptions(block_size=len(piece.raw) + 1),
            parse_options=pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
        table.validate(full=True)  # its parser does not look whether texts are UTF-8
    except pa.ArrowException:
        return None
    if table.num_rows != piece.height:
        return None  # blank lines, or two objects in one line
    frame = pl.from_arrow(table)
    return frame if isinstance(frame, pl.DataFrame) else None


def _careful_objects(piece: Piece, form: Form, wanted: Mapping[str, Kind]) -> Block:
    kept: dict[str, list[str | None]] = {name: [] for name in wanted}
    lines: list[int] = []
    for row, line, values in _lines(piece, form):
        for name, cells in kept.items():
            cells.append(_cell(piece.where(row, line), name, values.get(name)))
        lines.append(piece.line + line + 1)
    frame = pl.DataFrame([pl.Series(name, cells, pl.String) for name, cells in kept.items()])
    return Block(piece.name, frame, piece.row, lines)


def _cell(place: Place, name: str, value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError.at(
            place, "bad-value", f": column {name!r} holds no text or number; the file is not of this data set", name
        )
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return checked(place, name, str(value))


def checked(place: Place, name: str, text: str) -> str:
    """Return a text that can be stored as UTF-8.

    Raises:
        DataError: If it holds half of a surrogate pair, or NUL.
    """
    if not text.isascii() and any("\ud800" <= mark <= "\udfff" for mark in text):
        raise DataError.at(
            place,
            "encoding",
            f": column {name!r} holds half of a surrogate pair, which is no text; correct the line",
            name,
        )
    if "\0" in text:
        raise DataError.at(place, "encoding", f": column {name!r} holds a NUL character; remove it", name)
    return text


def _lines(piece: Piece, form: Form) -> Iterator[tuple[int, int, Mapping[str, object]]]:
    """Yield each object with its 0-based row and line; blank lines are no rows."""
    row = 0
    for line, text in numbered_lines(decoded(piece, "utf-8")):
        if text.strip():
            yield row, line, _object(piece.where(row, line), text, form)
            row += 1


def _object(place: Place, text: str, form: Form) -> Mapping[str, object]:
    try:
        value = json.loads(text, parse_float=as_written)
    except (ValueError, RecursionError) as error:
        if form.kind == "json":
            raise DataError.at(place, "syntax", f" is not JSON ({reason(error)}); fetch the file again") from error
        value = _literal(place, text)
    if not isinstance(value, dict):
        raise DataError.at(
            place, "wrong-format", " is not an object with named values; the file is not of this data set"
        )
    return value


def _literal(place: Place, text: str) -> object:
    """Read a Python literal; `ast.literal_eval` builds values and runs nothing."""
    if len(text) > _LONGEST_LITERAL:
        raise DataError.at(
            place,
            "too-large",
            f" is not JSON and has {len(text)} characters, more than {_LONGEST_LITERAL} of a Python literal; "
            "write it as JSON, or fetch the file again",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unknown escapes in old files
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise DataError.at(
            place, "syntax", f" is neither JSON nor a Python literal ({reason(error)}); fetch the file again"
        ) from error
