"""Reads plain tables a block at a time, and keeps of them the columns that are asked for, in few bytes a row.

Ids are held as codes, numbers as numbers, and what nobody asks for not at all. Whatever is unusual in a file is left to
the readers that understand it or say what is wrong: this one then gives nothing.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llmrec.data.codes import from_dictionary
from llmrec.data.read.limits import BROKEN, Capped, stranger
from llmrec.data.read.nested import DEEPEST, MOST_KEYS, head, held, is_path, is_plain, is_text
from llmrec.data.read.objects import is_nested
from llmrec.data.read.packed import STREAMS
from llmrec.data.read.parquet import FAULTS, check_size, room, spelled_out
from llmrec.data.read.text import LONGEST, MAX_COLUMNS, Table, in_arrow, preamble, separator_of, without_marks
from llmrec.errors import DataError, LlmrecError

Kind = Literal["id", "number", "text"]
"""What a column holds: values that stand in many rows, numbers, or texts that are all different."""

_BLOCK = 8 * 2**20
_PARSED = 2 * 2**20
_ROWS = 2**20
_TEXTS = (pl.String, pl.Categorical, pl.Enum)
# Bytes that are looked at to tell how many rows there are, and what a row takes at the peak.
_HEAD, _ROW = 2**16, 100
_FIELD = b"\x1f"  # a separator of one byte, which stands in for a longer one


class _Unusual(Exception):
    """Something that is read with care."""


class _Column:
    """The values of a column, block by block."""

    def __init__(self, name: str, kind: Kind) -> None:
        self.name, self.kind = name, kind
        self._known = pl.Categorical(pl.Categories.random())
        # The library forgets what numbers stand for as soon as no series has them.
        self._alive = pl.Series([""], dtype=self._known)
        self._parts: list[NDArray[Any] | pl.Series] = []

    def add(self, values: pl.Series) -> None:
        """Take some more rows."""
        if self.kind == "id" and (values.dtype in _TEXTS or values.dtype.is_integer()):
            found = values.cast(pl.String).fill_null("").cast(self._known)
            self._parts.append(found.to_physical().to_numpy())
        elif self.kind == "number" and values.dtype.is_float():
            if values.null_count() or not values.is_finite().all():
                raise _Unusual
            self._parts.append(values.to_numpy())
        else:
            self._parts.append(values)

    def add_coded(self, values: pa.Array, numbers: pa.Array) -> None:
        """Take some more rows of an id, as places in a list of values; nothing counts as an empty text."""
        known = pl.concat([pl.Series(values).cast(pl.String), pl.Series([""])]).cast(self._known)
        places = numbers.fill_null(len(values)).to_numpy(zero_copy_only=False)
        self._parts.append(known.to_physical().to_numpy()[places])

    def whole(self) -> pl.Series:
        """Return all rows; of ids their codes."""
        parts, self._parts = self._parts, []
        if not parts:
            raise _Unusual
        arrays = [part for part in parts if isinstance(part, np.ndarray)]
        if len(arrays) < len(parts):
            series = [part for part in parts if isinstance(part, pl.Series)]
            if arrays or len({each.dtype for each in series}) > 1:
                raise _Unusual
            return pl.concat(series, rechunk=True).alias(self.name)
        if self.kind == "number":
            return pl.Series(self.name, np.concatenate(arrays))
        present = np.zeros(max((int(part.max(initial=0)) for part in arrays), default=0) + 1, dtype=bool)
        for part in arrays:
            present[part] = True
        values = pl.Series(np.flatnonzero(present).astype(np.uint32)).cat.to(self._alive.dtype).cast(pl.String)
        place = (np.cumsum(present) - 1).astype(np.uint32)
        return from_dictionary(self.name, values, (place[part] for part in arrays))


def delimited(path: Path, separator: str, packing: str, wanted: Mapping[str, Kind]) -> Table | None:
    """Read delimited text with a header, in which every line is a row.

    Args:
        path: The file.
        separator: The usual one; see `text.separator_of`.
        packing: How it is packed, as an ending; empty: not at all.
        wanted: The columns to keep, of those that the file has.

    Returns:
        The table; None if there is anything that must be read with care, or said.

    Raises:
        DataError: If its rows will not fit the memory.
    """
    return _streamed(path, packing, lambda stream: _delimited(stream, separator, wanted), header=1)


def json_lines(path: Path, packing: str, wanted: Mapping[str, Kind]) -> Table | None:
    """Read a file with a JSON object in every line; see `delimited`.

    The first line says which columns there are, and whether ids are texts or whole numbers.
    """
    return _streamed(path, packing, lambda stream: _objects(stream, wanted), header=0)


def _streamed(
    path: Path, packing: str, read: Callable[[Any], tuple[list[str], list[pl.Series]]], *, header: int
) -> Table | None:
    """Read a file as a stream that is unpacked, capped and hashed on its way."""
    try:
        with path.open("rb") as file:
            head = b"" if packing else file.read(_HEAD)
    except OSError:
        return None
    if head:
        _fits(path, path.stat().st_size * max(1, head.count(b"\n")) / len(head))
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            stored = _Hashed(file)
            stream: Any = STREAMS[packing](stored) if packing else stored
            if packing:
                stream = Capped(str(path), stream, size)
            names, rows = read(stream)
            stored.read()
    except (_Unusual, LlmrecError, pa.ArrowException, *BROKEN):
        return None
    return _table(str(path), names, rows, stored.digest.hexdigest(), header=header)


def parquet(path: Path, wanted: Mapping[str, Kind]) -> Table | None:
    """Read a Parquet file; see `delimited`."""
    try:
        with path.open("rb") as stored:
            digest = hashlib.file_digest(stored, "sha256").hexdigest()
        file = pq.ParquetFile(path)
        check_size(str(path), file, path.stat().st_size)
        schema = file.schema_arrow
        # What is asked for may be within a column that is not plain.
        if any(is_path(name) and head(name) in schema.names and name not in schema.names for name in wanted):
            return None
        # Texts that stand in many rows are stored once; spelled out, a long one would fill the memory.
        coded = [field.name for field in schema if wanted.get(field.name) == "id" and is_text(field.type)]
        if any(is_text(field.type) for field in schema if wanted.get(field.name, "id") != "id"):
            return None
        file = pq.ParquetFile(path, read_dictionary=coded)
        columns = [_Column(field.name, wanted[field.name]) for field in schema if field.name in wanted]
        if not columns or not all(is_plain(schema.field(column.name).type) for column in columns):
            return None
        size, most = 0, room(path.stat().st_size)
        for batch in file.iter_batches(batch_size=_ROWS, columns=[column.name for column in columns]):
            size += batch.nbytes
            for column in columns:
                found = batch.column(batch.schema.names.index(column.name))
                found.validate(full=True)
                size += spelled_out(found)
                if pa.types.is_dictionary(found.type) and column.kind == "id":
                    column.add_coded(found.dictionary, found.indices)
                else:
                    column.add(pl.Series(found))
            if size > most:
                return None
        plain = [field.name for field in schema if is_plain(field.type)]
        found = _table(str(path), plain, [column.whole() for column in columns], digest, header=0)
        left = {field.name: held(field.type) for field in schema if not is_plain(field.type)}
        return None if found is None else replace(found, unusable=left)
    except (_Unusual, LlmrecError, *FAULTS):
        return None


def _table(name: str, names: Sequence[str], rows: Sequence[pl.Series], sha256: str, *, header: int) -> Table | None:
    """Return a table in which the columns that were not asked for are there by name alone."""
    if not rows or not len(rows[0]):
        return None
    read = {each.name: each for each in rows}
    nothing = pl.repeat(None, len(rows[0]), dtype=pl.Null, eager=True)
    frame = pl.DataFrame([read.get(each, nothing.alias(each)) for each in names])
    return Table(name, frame, sha256, header=header, unread=frozenset(names) - read.keys())


def _fits(path: Path, rows: float) -> None:
    """Refuse a table whose rows, as their number seems to be, will not fit the memory.

    Raises:
        DataError: With both figures.
    """
    needed, free = rows * _ROW, psutil.virtual_memory().available
    if needed > free:
        raise DataError.at(
            path,
            "too-large",
            f" seems to have {rows / 1e6:,.0f} million rows, which take about {needed / 2**30:.1f} GiB of memory while "
            f"they are read and split; {free / 2**30:.1f} GiB are free. Keep fewer rows, or use a larger machine",
            "data.path",
        )


class _Hashed:
    """A file that is hashed while it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        """Read bytes."""
        found = self._file.read(size)
        self.digest.update(found)
        return found

    def readable(self) -> bool:
        """Whether it can be read."""
        return True


# --------------------------------------------------------------------------- delimited text


def _delimited(stream: Any, usual: str, wanted: Mapping[str, Kind]) -> tuple[list[str], list[pl.Series]]:
    pieces = _pieces(stream)
    first = next(pieces, b"")
    names, mark, body = _header(first, usual)
    columns = [_Column(name, wanted[name]) for name in names if name in wanted]
    if not columns:
        raise _Unusual
    floats = {column.name for column in columns if column.kind == "number"}
    with ThreadPoolExecutor() as pool:
        for number, piece in enumerate(chain(filter(None, (body,)), pieces)):
            raw = _plain(piece, mark)
            try:
                found = _parsed(raw, mark, names, columns, floats)
            except pa.ArrowInvalid:
                if number or not floats:
                    raise
                # A column that should hold numbers holds dates, which are texts until somebody knows them.
                floats = {name for name in floats if _holds_numbers(raw, mark, names, columns, name)}
                found = _parsed(raw, mark, names, columns, floats)
            list(pool.map(_Column.add, columns, [pl.Series(found.column(column.name)) for column in columns]))
            del found
    pa.default_memory_pool().release_unused()
    return names, [column.whole() for column in columns]


def _pieces(stream: Any) -> Iterator[bytes]:
    """Cut a stream into whole lines."""
    rest = b""
    while chunk := stream.read(_BLOCK):
        data = rest + chunk
        end = data.rfind(b"\n") + 1
        if not end and len(data) > LONGEST:
            raise _Unusual
        if end:
            yield without_marks(data[:end])
        rest = data[end:]
    if rest:
        yield without_marks(rest)


def _header(piece: bytes, usual: str) -> tuple[list[str], str, bytes]:
    """Return the columns, what stands between fields, and what stands below the header."""
    if piece.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or stranger(piece[:100]):
        raise _Unusual
    end = piece.find(b"\n") + 1
    try:
        head = piece[: 4 * LONGEST if len(piece) < 2**16 else piece.rfind(b"\n", 0, 2**16)].decode()
    except UnicodeDecodeError:
        raise _Unusual from None
    if not end or not head.strip() or preamble(head, usual):
        raise _Unusual
    line = piece[: end - 1].decode().rstrip("\r")
    mark = separator_of(line, usual)
    names = [name.strip() for name in line.split(mark)]
    if '"' in line or "\0" in line or not 2 <= len(names) == len(set(names)) <= MAX_COLUMNS:
        raise _Unusual
    if len(line) > _HEAD:
        raise _Unusual
    return names, mark, piece[end:]


def _plain(piece: bytes, mark: str) -> bytes:
    """Return whole lines that can be parsed without care, with a separator of one byte."""
    if b'"' in piece or b"\0" in piece or piece.startswith((b"\n", b"\r\n")):
        raise _Unusual
    if b"\n\n" in piece or (b"\r" in piece and (b"\n\r\n" in piece or piece.count(b"\r") > piece.count(b"\r\n"))):
        raise _Unusual
    if len(mark) == 1:
        return piece
    if _FIELD in piece:
        raise _Unusual
    return piece.replace(mark.encode(), _FIELD)


def _parsed(raw: bytes, mark: str, names: Sequence[str], columns: Sequence[_Column], floats: set[str]) -> pa.Table:
    kinds = {name: pa.float64() if name in floats else pa.string() for name in names}
    found = pa_csv.read_csv(
        in_arrow(raw),
        read_options=pa_csv.ReadOptions(column_names=list(names), block_size=max(_PARSED, len(raw) // 8)),
        parse_options=pa_csv.ParseOptions(delimiter=mark if len(mark) == 1 else _FIELD.decode(), quote_char=False),
        convert_options=pa_csv.ConvertOptions(
            column_types=kinds,
            strings_can_be_null=False,
            include_columns=[column.name for column in columns],
            null_values=[],
        ),
    )
    # A header that stands in the middle of a file is told with its row.
    if any((pl.Series(found.column(c.name)) == c.name).any() for c in columns[:1] if c.name not in floats):
        raise _Unusual
    return found


def _holds_numbers(raw: bytes, mark: str, names: Sequence[str], columns: Sequence[_Column], name: str) -> bool:
    try:
        _parsed(raw, mark, names, columns, {name})
    except pa.ArrowInvalid:
        return False
    return True


# --------------------------------------------------------------------------- an object a line


def _objects(stream: Any, wanted: Mapping[str, Kind]) -> tuple[list[str], list[pl.Series]]:
    names: list[str] = []
    columns: dict[tuple[str, ...], _Column] = {}
    schema, absent = pa.schema([]), [b""]
    for piece in _pieces(stream):
        if not names:
            names, columns, schema = _first_object(piece, wanted)
            # A key that begins further down belongs to a table whose rows are not alike.
            lacking = wanted.keys() - {column.name for column in columns.values()}
            absent = [json.dumps(name, ensure_ascii=plain).encode() for name in lacking for plain in (True, False)]
        if any(key in piece for key in absent):
            raise _Unusual
        found = pa_json.read_json(
            in_arrow(piece),
            read_options=pa_json.ReadOptions(block_size=len(piece) + 1),
            parse_options=pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
        found.validate(full=True)  # its parser does not look whether texts are UTF-8
        if found.num_rows != piece.count(b"\n") + (not piece.endswith(b"\n")):
            raise _Unusual  # blank lines, or two objects in one line
        for (first, *inner), column in columns.items():
            values = found.column(first)
            for key in inner:
                values = pc.struct_field(values, key)
            column.add(pl.Series(values))
    pa.default_memory_pool().release_unused()
    return names, [column.whole() for column in columns.values()]


def _first_object(
    piece: bytes, wanted: Mapping[str, Kind]
) -> tuple[list[str], dict[tuple[str, ...], _Column], pa.Schema]:
    """Return the columns, those of them that are kept by their keys within each other, and the types of these."""
    try:
        record = json.loads(piece[: piece.find(b"\n") + 1 or len(piece)])
    except (ValueError, RecursionError):
        raise _Unusual from None
    if not isinstance(record, dict):
        raise _Unusual
    plain = dict(_plain_values(record))
    names = {".".join(keys): keys for keys in plain}
    if not 0 < len(names) == len(plain) <= MAX_COLUMNS:
        raise _Unusual
    # Lists, and objects that are empty here, are read with care.
    if any(name not in names and (name in record or is_path(name)) for name in wanted):
        raise _Unusual
    columns: dict[tuple[str, ...], _Column] = {}
    types: dict[str, Any] = {}
    for name, keys in names.items():
        if name in wanted:
            columns[keys] = _Column(name, wanted[name])
            *outer, last = keys
            within = types
            for key in outer:
                within = within.setdefault(key, {})
            within[last] = _type_of(plain[keys], wanted[name])
    if not columns:
        raise _Unusual
    return list(names), columns, pa.schema(_typed(types))


def _plain_values(
    record: Mapping[str, object], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield the values of an object and of those within it, with the keys that lead to them."""
    for key, value in record.items():
        if isinstance(value, dict) and len(above) < DEEPEST and len(value) <= MOST_KEYS:
            yield from _plain_values(value, (*above, key))
        elif not is_nested(value):
            yield (*above, key), value


def _type_of(value: object, kind: Kind) -> pa.DataType:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "number" and number:
        return pa.float64()
    if isinstance(value, str):
        return pa.string()
    if number and isinstance(value, int) and kind == "id":
        return pa.int64()
    raise _Unusual


def _typed(types: Mapping[str, Any]) -> list[tuple[str, pa.DataType]]:
    """Return the types of columns, of objects those of what is in them."""
    return [(key, pa.struct(_typed(held)) if isinstance(held, dict) else held) for key, held in types.items()]
