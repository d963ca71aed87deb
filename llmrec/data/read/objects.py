"""Tables of objects: JSON Lines, and JSON files that are one array."""

from __future__ import annotations

import json
import math
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import polars as pl
import pyarrow as pa

from llmrec.data.read.limits import WHOLE, is_no_text, reason, shown
from llmrec.data.read.nested import DEEPEST, LISTS, MOST_KEYS, Opened, in_polars
from llmrec.data.read.text import MAX_COLUMNS, Table, column_names, decode
from llmrec.errors import DataError, Place
from llmrec.terminal import logger

log = logger(__name__)

_ODD = "nested values"
# The type of what can be no column.
_NOTHING = pa.binary()


def json_lines(name: str, raw: bytes, sha256: str = "") -> Table:
    """Read one JSON object a line. Numbers become text again; lists of texts are joined by commas.

    Raises:
        DataError: If a line is no JSON object, a key stands twice in it, or a value is nested.
    """
    lines: list[int] = []

    def records() -> Iterator[tuple[Place, Mapping[str, object]]]:
        for number, line in enumerate(decode(name, raw, header=0).split("\n"), start=1):
            if line.strip():
                place = Place(name, len(lines) + 1, number)
                lines.append(number)
                yield place, json_object(place, line)

    return replace(_of_objects(name, records(), lines), sha256=sha256)


def json_file(name: str, raw: bytes, sha256: str = "") -> Table:
    """Read a JSON file that is one array of objects, or has an object a line.

    Raises:
        DataError: As `json_array` and `json_lines`.
    """
    # In another encoding the reader refuses it, and it is looked at again as UTF-8.
    read = json_array if raw.removeprefix(BOM_UTF8).lstrip()[:1] == b"[" else json_lines
    return read(name, raw, sha256)


def json_array(name: str, raw: bytes, sha256: str = "") -> Table:
    """Read a JSON file that is one array of objects, as `json_lines` reads theirs.

    Raises:
        DataError: As there, without a line.
    """
    try:
        found = json.loads(decode(name, raw, header=0), object_pairs_hook=_once, parse_float=as_written)
    except _Twice as twice:
        raise _twice(name, twice) from None
    except (ValueError, RecursionError) as error:
        raise DataError.at(name, "syntax", f" is not JSON ({reason(error)}); write it again") from error

    def records() -> Iterator[tuple[Place, Mapping[str, object]]]:
        for number, record in enumerate(found, start=1):
            place = Place(name, number)
            if not isinstance(record, dict):
                raise DataError.at(place, "wrong-format", " is not a JSON object; write an array of objects")
            yield place, record

    return replace(_of_objects(name, records(), [0] * len(found)), sha256=sha256)


def _of_objects(name: str, records: Iterable[tuple[Place, Mapping[str, object]]], lines: list[int]) -> Table:
    """Return the table of objects; those within them are opened, and what can be no column is left out."""
    rows: list[dict[str, str]] = []
    names: dict[str, None] = {}
    places: dict[str, Place] = {}
    within: dict[str, dict[int, object]] = {}
    plain: set[str] = set()
    single: set[str] = set()
    # Rows whose number is whole and written as 1.0, and columns of other fractions.
    whole: dict[str, list[int]] = {}
    fractions: set[str] = set()
    for place, record in records:
        known = len(names)
        names.update(dict.fromkeys(record))
        if len(names) > known:
            for key in record:
                _text(place, f": the key {shown(key)}", key, key)
        if len(names) > MAX_COLUMNS:
            raise DataError.at(
                place, "too-large", f": more than {MAX_COLUMNS} different keys; keep those that are needed"
            )
        row = {}
        for key, value in record.items():
            nested = is_nested(value)
            if nested or (isinstance(value, list) and value):
                within.setdefault(key, {})[len(rows)] = value
            if nested:
                places.setdefault(key, place)
                continue
            row[key] = _text(place, f", column {shown(key)}", key, value)
            if isinstance(value, float):
                if value.is_integer():
                    whole.setdefault(key, []).append(len(rows))
                else:
                    fractions.add(key)
            if value is not None and value != []:
                plain.add(key)
                if not isinstance(value, list):
                    single.add(key)
        rows.append(row)
    if not names:
        what = "holds objects without keys" if rows else "is empty"
        raise DataError.at(name, "empty", f" {what}; write the table again")
    # Where some values are plain, a nested one is a fault of its row.
    bad = next((key for key in places if key in plain), None)
    if bad is not None:
        what = f", column {shown(bad)} is a nested value; flatten it or leave it out"
        raise DataError.at(places[bad], "bad-value", what, bad)
    # As in any other table: an id is the same however a library spelled it.
    for key in whole.keys() - fractions:
        for at in whole[key]:
            rows[at][key] = str(int(float(rows[at][key])))
    columns: list[pl.Series] = []
    found = Opened(name)
    for key in names:
        if key not in places:
            columns.append(pl.Series(key, [row.get(key, "") for row in rows], pl.String))
        if key in within and key not in single:
            before = set(found.columns)
            found.add(key, _in_arrow(key, [within[key].get(row) for row in range(len(rows))], name, lines))
            inner = {path: column for path, column in found.columns.items() if path not in before and path != key}
            columns.extend(_as_texts(in_polars(inner)) if inner else ())
            if key in places and found.columns.pop(key, None) is not None:
                found.unusable[key] = LISTS  # of numbers, which are not joined
    column_names(name, (column.name for column in columns))
    unusable = {path: _ODD if held == str(_NOTHING) else held for path, held in found.unusable.items()}
    odd = [path for path, held in unusable.items() if held == _ODD]
    if odd:
        log.warning(
            "%s: %d columns hold nested values and are left out: %s", name, len(odd), ", ".join(map(shown, odd))
        )
    if not columns:
        raise DataError.at(name, "empty", " has no column of texts or numbers; write the table again")
    return Table(name, pl.DataFrame(columns), "", lines, unusable=unusable, lists=found.lists)


def _as_texts(frame: pl.DataFrame) -> list[pl.Series]:
    """Return columns as those of objects are: lists of texts joined by commas, and empty texts for what is missing."""
    joined = frame.with_columns(pl.col(pl.List(pl.String)).list.join(", "))
    return joined.with_columns(pl.all().cast(pl.String).fill_null("")).get_columns()


class _Shape:
    """What the values at one path are, and which values they hold."""

    def __init__(self) -> None:
        self.objects = self.lists = self.single = self.floats = self.fractions = self.odd = False
        self.keys: dict[str, _Shape] = {}
        self.elements: _Shape | None = None

    def see(self, value: object, depth: int = 0) -> None:
        """Take one more value.

        Raises:
            ValueError: If a key is no text.
        """
        if isinstance(value, dict):
            self.objects = True
            self.odd = self.odd or depth > DEEPEST or len(self.keys.keys() | value.keys()) > MOST_KEYS
            for key, inner in value.items() if not self.odd else ():
                if key not in self.keys:
                    self.keys[_checked(key)] = _Shape()
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
        """Return their type, in which single values are texts; `_NOTHING` of what can be no column."""
        if self.odd or self.objects + self.lists + self.single > 1:
            return _NOTHING
        if self.objects:
            return pa.struct([(key, inner.kind()) for key, inner in self.keys.items()])
        if self.elements is not None:
            inner = self.elements.kind()
            # Of lists of lists, and of fractions as in vectors, no element is an id.
            return _NOTHING if inner == _NOTHING or self.elements.lists or self.elements.floats else pa.list_(inner)
        return pa.string() if self.single else pa.null()

    def value(self, value: Any, kind: pa.DataType) -> object:
        """Return a value of the type.

        Raises:
            ValueError: If a text is none.
        """
        if value is None or kind == _NOTHING:
            return None
        if self.objects:
            return {field.name: self.keys[field.name].value(value.get(field.name), field.type) for field in kind}
        if self.elements is not None:
            return [self.elements.value(inner, kind.value_type) for inner in value]
        # As in any other table: an id is the same however a library spelled it.
        return _checked(str(int(value) if isinstance(value, float) and not self.fractions else value))


def _checked(text: str) -> str:
    if is_no_text(text):
        raise ValueError("a character that is no text")
    return text


def _in_arrow(key: str, values: Sequence[object], name: str, lines: Sequence[int]) -> pa.ChunkedArray:
    """Return a column of objects or lists.

    Raises:
        DataError: If a text in it is none.
    """
    shape = _Shape()

    def each(read: Callable[[object], object]) -> list[object]:
        found = []
        for row, value in enumerate(values):
            try:
                found.append(read(value))
            except ValueError:
                raise _no_text(Place(name, row + 1, lines[row] or None), f", column {shown(key)}", key) from None
        return found

    each(shape.see)
    kind = shape.kind()
    return pa.chunked_array([pa.array(each(lambda value: shape.value(value, kind)), kind)])


def is_nested(value: object) -> bool:
    """Whether a value of an object can be no cell of a table; a list of texts can."""
    return isinstance(value, dict) or (isinstance(value, list) and not all(isinstance(part, str) for part in value))


def json_object(place: Place | str, line: str) -> dict[str, object]:
    """Read one object.

    Raises:
        DataError: If the line holds none, or a key stands twice in it.
    """
    try:
        record = json.loads(line, object_pairs_hook=_once, parse_float=as_written)
    except _Twice as twice:
        raise _twice(place, twice) from None
    except (ValueError, RecursionError) as error:
        raise DataError.at(place, "syntax", f" is not JSON ({reason(error)}); write one object a line") from error
    if not isinstance(record, dict):
        raise DataError.at(place, "wrong-format", " is not a JSON object; write one object a line")
    return record


def as_written(number: str) -> float | int:
    """Read a number of JSON; a whole one too large for a float to tell from its neighbours becomes an exact integer.

    Otherwise two ids such as 9007199254740992.0 and 9007199254740993.0 would be one.
    """
    found = float(number)
    return int(Decimal(number)) if abs(found) >= WHOLE and math.isfinite(found) else found


class _Twice(Exception):
    """A key that stands twice in one object."""


def _twice(place: Place | str, twice: _Twice) -> DataError:
    key = twice.args[0]
    return DataError.at(place, "duplicate", f": the key {shown(key)} stands there twice; keep one", key)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return found


def _no_text(place: Place, what: str, column: str) -> DataError:
    what = f"{what} holds a character that is no text (NUL or half of a surrogate pair); remove it"
    return DataError.at(place, "encoding", what, column)


def _text(place: Place, what: str, column: str, value: object) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = ", ".join(value)
    if value is None or isinstance(value, str | int | float):
        text = "" if value is None else str(value)
        if is_no_text(text):
            raise _no_text(place, what, column)
        return text
    raise DataError.at(place, "bad-value", f"{what} is a nested value; flatten it or leave it out", column)
