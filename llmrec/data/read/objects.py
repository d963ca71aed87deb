"""Reads tables stored as JSON objects: JSON Lines, or a JSON file with one array."""

from __future__ import annotations

import ast
import json
import math
import warnings
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json

from llmrec.data.read.columns import Column, ColumnKind, NeedsExactReader, NotNumeric, table_from_columns
from llmrec.data.read.files import Source
from llmrec.data.read.limits import MAX_EXACT_INTEGER, format_error, format_value, has_invalid_characters
from llmrec.data.read.nested import LISTS, MAX_DEPTH, MAX_KEYS, FlattenedColumns, arrow_to_polars, is_nested_path
from llmrec.data.read.tables import MAX_COLUMNS, Table, check_columns, validate_column_names
from llmrec.data.read.text import (
    LineBlock,
    LineBlocks,
    TextFormat,
    arrow_buffer,
    decode_block,
    decode_file,
    numbered_lines,
    read_all,
    read_in_any_encoding,
)
from llmrec.errors import DataError, LlmrecError, Location
from llmrec.terminal import warn_once_logger

log = warn_once_logger(__name__)

_NESTED_DESCRIPTION = "nested values"
# Type of values that cannot be a column.
_UNUSABLE_TYPE = pa.binary()
# Parsing a literal takes 500 times its memory, and seconds per megabyte; real ones have a few thousand characters.
_LONGEST_LITERAL = 2**20


def read_json_lines(source: Source, wanted: Mapping[str, ColumnKind] | None = None) -> Table:
    """Read one JSON object per line. Numbers become texts; lists of texts are joined by commas.

    Args:
        source: The file.
        wanted: The columns to keep, see `llmrec.data.read.delimited.read_delimited`. None: all of them.

    Raises:
        DataError: If a line is not a JSON object, a key is repeated in it, or a value is nested.
    """
    if wanted is not None:
        try:
            return _read_in_blocks(source, wanted)
        except (NeedsExactReader, NotNumeric, LlmrecError, pa.ArrowException):
            pass  # reading row by row parses the line or reports the error
    return read_in_any_encoding(source, _read_row_by_row)


def _read_row_by_row(source: Source) -> Table:
    return _table_from_objects(source.name, parse_json_records(source.name, read_all(source)))


def parse_json_records(name: str, raw: bytes) -> Iterator[tuple[Location, dict[str, object]]]:
    """Yield the objects of lines with their location in the file, skipping blank lines.

    Raises:
        DataError: If a line is not a JSON object, or a key is repeated in it.
    """
    row = 0
    for line, text in numbered_lines(decode_file(name, raw)):
        if text.strip():
            row += 1
            location = Location(name, row, line + 1)
            yield location, parse_json_object(location, text)


def read_json_file(source: Source) -> Table:
    """Read a JSON file with an array of objects, or with one object per line.

    Raises:
        DataError: As `read_json_lines`; for an array without the line.
    """

    def read(source: Source) -> Table:
        is_array = read_all(source).removeprefix(BOM_UTF8).lstrip()[:1] == b"["
        return (_read_json_array if is_array else _read_row_by_row)(source)

    return read_in_any_encoding(source, read)


def _read_json_array(source: Source) -> Table:
    name = source.name
    try:
        result = json.loads(
            decode_file(name, read_all(source)), object_pairs_hook=_build_unique_dict, parse_float=parse_json_number
        )
    except _RepeatedKey as repeated:
        raise _repeated_key_error(name, repeated) from None
    except (ValueError, RecursionError) as error:
        raise DataError.at(name, "syntax", f" is not JSON ({format_error(error)}); write the file again") from error

    def records() -> Iterator[tuple[Location, Mapping[str, object]]]:
        for number, record in enumerate(result, start=1):
            location = Location(name, number)
            if not isinstance(record, dict):
                raise DataError.at(location, "wrong-format", " is not a JSON object; write an array of objects")
            yield location, record

    return _table_from_objects(name, records())


def _table_from_objects(name: str, records: Iterable[tuple[Location, Mapping[str, object]]]) -> Table:
    """Return objects as a table; nested objects are flattened, and values that cannot be a column are left out."""
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    names: dict[str, None] = {}
    locations: dict[str, Location] = {}
    within: dict[str, dict[int, object]] = {}
    plain: set[str] = set()
    single: set[str] = set()
    # Rows in which integers are written as 1.0, and columns with other fractions.
    integral: dict[str, list[int]] = {}
    fractions: set[str] = set()
    for location, record in records:
        known = len(names)
        names.update(dict.fromkeys(record))
        if len(names) > known:
            for key in record:
                _cell_text(location, f": the key {format_value(key)}", key, key)
        if len(names) > MAX_COLUMNS:
            raise DataError.at(
                location, "too-large", f": more than {MAX_COLUMNS} different keys; keep only the required keys"
            )
        row = {}
        for key, value in record.items():
            nested = is_nested(value)
            if nested or (isinstance(value, list) and value):
                within.setdefault(key, {})[len(rows)] = value
            if nested:
                locations.setdefault(key, location)
                continue
            row[key] = _cell_text(location, f", column {format_value(key)}", key, value)
            if isinstance(value, float):
                if value.is_integer():
                    integral.setdefault(key, []).append(len(rows))
                else:
                    fractions.add(key)
            if value is not None and value != []:
                plain.add(key)
                if not isinstance(value, list):
                    single.add(key)
        rows.append(row)
        lines.append(location.line or 0)
    if not names:
        what = "contains objects without keys" if rows else "is empty"
        raise DataError.at(name, "empty", f" {what}; write the table again")
    # If some values of a column are plain, a nested value is an error in its row.
    bad = next((key for key in locations if key in plain), None)
    if bad is not None:
        what = f", column {format_value(bad)} is a nested value; flatten or drop the column"
        raise DataError.at(locations[bad], "bad-value", what, bad)
    # An id must not depend on how a library wrote the number.
    for key in integral.keys() - fractions:
        for at in integral[key]:
            rows[at][key] = str(int(float(rows[at][key])))
    columns: list[pl.Series] = []
    result = FlattenedColumns(name)
    for key in names:
        if key not in locations:
            columns.append(pl.Series(key, [row.get(key, "") for row in rows], pl.String))
        if key in within and key not in single:
            before = set(result.columns)
            result.add(key, _build_arrow_column(key, [within[key].get(row) for row in range(len(rows))], name, lines))
            inner = {path: column for path, column in result.columns.items() if path not in before and path != key}
            columns.extend(_as_texts(arrow_to_polars(inner)) if inner else ())
            if key in locations and result.columns.pop(key, None) is not None:
                result.unusable[key] = LISTS  # lists of numbers, which are not joined
    validate_column_names(name, (column.name for column in columns))
    unusable = {
        path: _NESTED_DESCRIPTION if values == str(_UNUSABLE_TYPE) else values
        for path, values in result.unusable.items()
    }
    odd = [path for path, values in unusable.items() if values == _NESTED_DESCRIPTION]
    if odd:
        log.warning(
            "%s: %d columns have nested values and are excluded: %s", name, len(odd), ", ".join(map(format_value, odd))
        )
    if not columns:
        raise DataError.at(name, "empty", " has no column of texts or numbers; write the table again")
    return Table(name, pl.DataFrame(columns), "", lines, unusable=unusable, lists=result.lists)


def _as_texts(frame: pl.DataFrame) -> list[pl.Series]:
    """Convert columns to texts: join lists by commas, and replace missing values by empty texts."""
    joined = frame.with_columns(pl.col(pl.List(pl.String)).list.join(", "))
    return joined.with_columns(pl.all().cast(pl.String).fill_null("")).get_columns()


class _Shape:
    """The types of the values at one path, including nested values."""

    def __init__(self) -> None:
        self.objects = self.lists = self.single = self.floats = self.fractions = self.odd = False
        self.keys: dict[str, _Shape] = {}
        self.elements: _Shape | None = None

    def see(self, value: object, depth: int = 0) -> None:
        """Record whether a value is an object, a list or a scalar, for the column type.

        Raises:
            ValueError: If a key is not text.
        """
        if isinstance(value, dict):
            self.objects = True
            self.odd = self.odd or depth > MAX_DEPTH or len(self.keys.keys() | value.keys()) > MAX_KEYS
            for key, inner in value.items() if not self.odd else ():
                if key not in self.keys:
                    self.keys[_validate_text(key)] = _Shape()
                self.keys[key].see(inner, depth + 1)
        elif isinstance(value, list):
            self.lists = True
            self.elements = self.elements or _Shape()
            for inner in value:
                self.elements.see(inner, depth + 1)
        elif value is not None:
            self.single = True
            self.floats = self.floats or isinstance(value, float)
            self.fractions = self.fractions or (isinstance(value, float) and not value.is_integer())

    def kind(self) -> pa.DataType:
        """Return the type of the column; `_UNUSABLE_TYPE` if the values cannot be a column."""
        if self.odd or self.objects + self.lists + self.single > 1:
            return _UNUSABLE_TYPE
        if self.objects:
            return pa.struct([(key, inner.kind()) for key, inner in self.keys.items()])
        if self.elements is not None:
            inner = self.elements.kind()
            # Elements of nested lists, and of lists of fractions such as vectors, cannot be ids.
            return (
                _UNUSABLE_TYPE
                if inner == _UNUSABLE_TYPE or self.elements.lists or self.elements.floats
                else pa.list_(inner)
            )
        return pa.string() if self.single else pa.null()

    def value(self, value: Any, kind: pa.DataType) -> object:
        """Return a value converted to a column type.

        Raises:
            ValueError: If a text cannot be stored.
        """
        if value is None or kind == _UNUSABLE_TYPE:
            return None
        if self.objects:
            return {field.name: self.keys[field.name].value(value.get(field.name), field.type) for field in kind}
        if self.elements is not None:
            return [self.elements.value(inner, kind.value_type) for inner in value]
        # An id must not depend on how a library wrote the number.
        return _validate_text(str(int(value) if isinstance(value, float) and not self.fractions else value))


def _validate_text(text: str) -> str:
    if has_invalid_characters(text):
        raise ValueError("an invalid character")
    return text


def _build_arrow_column(key: str, values: Sequence[object], name: str, lines: Sequence[int]) -> pa.ChunkedArray:
    """Return a column of objects or lists as Arrow."""
    shape = _Shape()

    def all_values(read: Callable[[object], object]) -> list[object]:
        results = []
        for row, value in enumerate(values):
            try:
                results.append(read(value))
            except ValueError:
                raise _invalid_text_error(
                    Location(name, row + 1, lines[row] or None), f", column {format_value(key)}", key
                ) from None
        return results

    all_values(shape.see)
    kind = shape.kind()
    return pa.chunked_array([pa.array(all_values(lambda value: shape.value(value, kind)), kind)])


def is_nested(value: object) -> bool:
    """Whether a value cannot be a table cell; a list of texts can."""
    return isinstance(value, dict) or (isinstance(value, list) and not all(isinstance(part, str) for part in value))


def parse_json_object(location: Location | str, line: str) -> dict[str, object]:
    """Parse one JSON object.

    Raises:
        DataError: If the line is not an object, or a key is repeated in it.
    """
    try:
        record = json.loads(line, object_pairs_hook=_build_unique_dict, parse_float=parse_json_number)
    except _RepeatedKey as repeated:
        raise _repeated_key_error(location, repeated) from None
    except (ValueError, RecursionError) as error:
        raise DataError.at(
            location, "syntax", f" is not JSON ({format_error(error)}); write one object per line"
        ) from error
    if not isinstance(record, dict):
        raise DataError.at(location, "wrong-format", " is not a JSON object; write one object per line")
    return record


def parse_json_number(number: str) -> float | int:
    """Parse a JSON number; integers too large for a float are kept exact.

    Otherwise two ids such as 9007199254740992.0 and 9007199254740993.0 would be equal.
    """
    result = float(number)
    return int(Decimal(number)) if abs(result) >= MAX_EXACT_INTEGER and math.isfinite(result) else result


class _RepeatedKey(Exception):
    """Raised for a key that is repeated in one object."""


def _repeated_key_error(location: Location | str, error: _RepeatedKey) -> DataError:
    key = error.args[0]
    return DataError.at(location, "duplicate", f": the key {format_value(key)} is repeated; keep one", key)


def _build_unique_dict(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise _RepeatedKey(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return result


def _invalid_text_error(location: Location, what: str, column: str) -> DataError:
    what = f"{what} contains an invalid character (NUL or half of a surrogate pair); remove it"
    return DataError.at(location, "encoding", what, column)


def _cell_text(location: Location, what: str, column: str, value: object) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = ", ".join(value)
    if value is None or isinstance(value, str | int | float):
        text = "" if value is None else str(value)
        if has_invalid_characters(text):
            raise _invalid_text_error(location, what, column)
        return text
    raise DataError.at(location, "bad-value", f"{what} is a nested value; flatten it or drop it", column)


# --------------------------------------------------------------------------- plain objects, by block


def _parse_with_arrow(piece: LineBlock, schema: pa.Schema) -> pa.Table | None:
    """Parse lines to columns; None if a line is not JSON, or a value has an unexpected type."""
    try:
        table = pa_json.read_json(
            arrow_buffer(piece.raw),
            read_options=pa_json.ReadOptions(block_size=len(piece.raw) + 1),
            parse_options=pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
        table.validate(full=True)  # Arrow's parser does not check that texts are UTF-8
    except pa.ArrowException:
        return None
    return table if table.num_rows == piece.height else None  # blank lines, or two objects in one line


def _read_in_blocks(source: Source, wanted: Mapping[str, ColumnKind]) -> Table:
    """Read a table whose first line defines the columns and whether ids are texts or integers.

    Raises:
        NeedsExactReader: If a line differs in structure from the first one.
    """
    names: list[str] = []
    columns: dict[tuple[str, ...], Column] = {}
    schema, absent = pa.schema([]), [b""]
    with source.open() as stream:
        for piece in LineBlocks(source, stream):
            if not names:
                names, columns, schema = _infer_columns(piece.raw, wanted)
                # A key that first occurs in a later line means that rows have different keys.
                lacking = wanted.keys() - {column.name for column in columns.values()}
                absent = [json.dumps(name, ensure_ascii=plain).encode() for name in lacking for plain in (True, False)]
            table = None if any(key in piece.raw for key in absent) else _parse_with_arrow(piece, schema)
            if table is None:
                raise NeedsExactReader
            for (first, *inner), column in columns.items():
                values = table.column(first)
                for key in inner:
                    values = pc.struct_field(values, key)
                column.add(pl.Series(values))
    pa.default_memory_pool().release_unused()
    return table_from_columns(source.name, names, columns.values())


def _infer_columns(
    piece: bytes, wanted: Mapping[str, ColumnKind]
) -> tuple[list[str], dict[tuple[str, ...], Column], pa.Schema]:
    """Return the columns of an object, their nested keys, and their types."""
    try:
        record = json.loads(piece[: piece.find(b"\n") + 1 or len(piece)])
    except (ValueError, RecursionError):
        raise NeedsExactReader from None
    if not isinstance(record, dict):
        raise NeedsExactReader
    plain = dict(_plain_values(record))
    names = {".".join(keys): keys for keys in plain}
    if not 0 < len(names) == len(plain) <= MAX_COLUMNS:
        raise NeedsExactReader
    # Lists, and objects that are empty in the first line, must be read row by row.
    if any(name not in names and (name in record or is_nested_path(name)) for name in wanted):
        raise NeedsExactReader
    columns: dict[tuple[str, ...], Column] = {}
    types: dict[str, Any] = {}
    for name, keys in names.items():
        if name in wanted:
            kind = _arrow_type(plain[keys], wanted[name])
            columns[keys] = Column(name, "text" if wanted[name] == "number" and kind == pa.string() else wanted[name])
            *outer, last = keys
            within = types
            for key in outer:
                within = within.setdefault(key, {})
            within[last] = kind
    if not columns:
        raise NeedsExactReader
    return list(names), columns, pa.schema(_schema_fields(types))


def _plain_values(
    record: Mapping[str, object], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield the values of an object with their key paths, including nested objects."""
    for key, value in record.items():
        if isinstance(value, dict) and len(above) < MAX_DEPTH and len(value) <= MAX_KEYS:
            yield from _plain_values(value, (*above, key))
        elif not is_nested(value):
            yield (*above, key), value


def _arrow_type(value: object, kind: ColumnKind) -> pa.DataType:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "number" and number:
        return pa.float64()
    if isinstance(value, str):
        return pa.string()
    if number and isinstance(value, int) and kind == "id":
        return pa.int64()
    raise NeedsExactReader


def _schema_fields(types: Mapping[str, Any]) -> list[tuple[str, pa.DataType]]:
    """Return the names and types of columns, including the columns of objects."""
    return [(key, pa.struct(_schema_fields(kind)) if isinstance(kind, dict) else kind) for key, kind in types.items()]


# --------------------------------------------------------------------------- objects of published data sets


def object_blocks(source: Source, form: TextFormat, wanted: Mapping[str, ColumnKind]) -> Iterator[Table]:
    """Read columns of a published file of JSON objects in blocks, with null for missing values.

    Raises:
        DataError: If the file is damaged or empty, lacks a column, or has a line that cannot be read.
    """
    schema = pa.schema([(name, pa.float64() if kind == "number" else pa.string()) for name, kind in wanted.items()])
    row = 0
    with source.open() as stream:
        for piece in LineBlocks(source, stream):
            if not piece.line:
                head = piece.raw[: piece.raw.find(b"\n") + 1 or len(piece.raw)]
                first = next((record for _, record in _parse_objects(LineBlock(source, head, 0), form, 0)), {})
                must = [name for name, kind in wanted.items() if kind != "maybe"]
                check_columns(source.name, list(first), must if first else ())
            table = _parse_with_arrow(piece, schema)
            lines: Sequence[int] = range(piece.line + 1, piece.line + 1 + piece.height)
            if table is not None:
                frame = pl.DataFrame(pl.from_arrow(table))
            else:
                records = list(_parse_objects(piece, form, row))
                lines = [location.line or 0 for location, _ in records]
                frame = pl.DataFrame(
                    [
                        pl.Series(
                            name,
                            [_published_cell_text(at, name, record.get(name)) for at, record in records],
                            pl.String,
                        )
                        for name in wanted
                    ]
                )
            if frame.height:
                yield Table(source.name, frame, lines=lines, rows=range(row, row + frame.height))
            row += frame.height
    if not row:
        raise _no_rows_error(source)


def object_records(source: Source, form: TextFormat) -> Iterator[tuple[Location, Mapping[str, object]]]:
    """Read a published file of JSON objects one by one.

    Raises:
        DataError: If the file is damaged or empty, or a line cannot be read.
    """
    row = 0
    with source.open() as stream:
        for piece in LineBlocks(source, stream):
            for location, record in _parse_objects(piece, form, row):
                row += 1
                yield location, record
    if not row:
        raise _no_rows_error(source)


def _no_rows_error(source: Source) -> DataError:
    return DataError.at(source.name, "empty", " has no rows; download it again")


def _parse_objects(piece: LineBlock, form: TextFormat, row: int) -> Iterator[tuple[Location, Mapping[str, object]]]:
    """Yield the objects of lines with their location in the file, skipping blank lines."""
    for line, text in numbered_lines(decode_block(piece)):
        if text.strip():
            row += 1
            location = Location(piece.source.name, row, piece.line + line + 1)
            yield location, _parse_object(location, text, form)


def _published_cell_text(location: Location, name: str, value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError.at(
            location, "bad-value", f": column {name!r} is neither text nor number; use the file of this data set", name
        )
    return value_text(location, name, value)


def value_text(location: Location, column: str, value: object) -> str:
    """Return a single value as text; values that are neither text nor number count as missing.

    Raises:
        DataError: If a text in it has a lone surrogate or NUL.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value)
    if has_invalid_characters(text):
        raise _invalid_text_error(location, f": column {column!r}", column)
    return text


def _parse_object(location: Location, text: str, form: TextFormat) -> Mapping[str, object]:
    try:
        value = json.loads(text, parse_float=parse_json_number)
    except (ValueError, RecursionError) as error:
        if form.kind == "json":
            raise DataError.at(
                location, "syntax", f" is not JSON ({format_error(error)}); download the file again"
            ) from error
        value = _parse_literal(location, text)
    if not isinstance(value, dict):
        raise DataError.at(location, "wrong-format", " is not a JSON object; use the file of this data set")
    return value


def _parse_literal(location: Location, text: str) -> object:
    """Parse a Python literal; `ast.literal_eval` builds values and runs no code."""
    if len(text) > _LONGEST_LITERAL:
        raise DataError.at(
            location,
            "too-large",
            f" is not JSON, and with {len(text)} characters too long for a Python literal (at most "
            f"{_LONGEST_LITERAL}); write it as JSON, or download the file again",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated escapes in old files
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise DataError.at(
            location,
            "syntax",
            f" is neither JSON nor a Python literal ({format_error(error)}); download the file again",
        ) from error
