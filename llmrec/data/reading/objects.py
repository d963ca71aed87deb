"""Tables of objects: JSON Lines, and JSON files that are one array."""

from __future__ import annotations

import json
import math
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal

import polars as pl

from llmrec.data.reading.limits import WHOLE, is_no_text, reason, shown
from llmrec.data.reading.text import MAX_COLUMNS, Table, decode
from llmrec.errors import DataError, Place
from llmrec.terminal import logger

log = logger(__name__)


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

    frame, unusable = _of_objects(name, records())
    return Table(name, frame, sha256, lines, unusable=unusable)


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

    frame, unusable = _of_objects(name, records())
    return Table(name, frame, sha256, [0] * len(found), unusable=unusable)


def _of_objects(
    name: str, records: Iterable[tuple[Place, Mapping[str, object]]]
) -> tuple[pl.DataFrame, Mapping[str, str]]:
    """Return the columns of objects, and what those hold that are left out since all their values are nested."""
    rows: list[dict[str, str]] = []
    names: dict[str, None] = {}
    nested: dict[str, Place] = {}
    plain: set[str] = set()
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
            if is_nested(value):
                nested.setdefault(key, place)
                continue
            row[key] = _text(place, f", column {shown(key)}", key, value)
            if isinstance(value, float):
                if value.is_integer():
                    whole.setdefault(key, []).append(len(rows))
                else:
                    fractions.add(key)
            if value is not None and value != []:
                plain.add(key)
        rows.append(row)
    if not names:
        what = "holds objects without keys" if rows else "is empty"
        raise DataError.at(name, "empty", f" {what}; write the table again")
    # Where some values are plain, a nested one is a fault of its row.
    bad = next((key for key in nested if key in plain or len(nested) == len(names)), None)
    if bad is not None:
        what = f", column {shown(bad)} is a nested value; flatten it or leave it out"
        raise DataError.at(nested[bad], "bad-value", what, bad)
    if nested:
        told = ", ".join(map(shown, nested))
        log.warning("%s: %d columns hold nested values and are left out: %s", name, len(nested), told)
    # As in any other table: an id is the same however a library spelled it.
    for key in whole.keys() - fractions:
        for at in whole[key]:
            rows[at][key] = str(int(float(rows[at][key])))
    kept = [key for key in names if key not in nested]
    frame = pl.DataFrame([pl.Series(key, [row.get(key, "") for row in rows], pl.String) for key in kept])
    return frame, dict.fromkeys(nested, "nested values")


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


def _text(place: Place, what: str, column: str, value: object) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = ", ".join(value)
    if value is None or isinstance(value, str | int | float):
        text = "" if value is None else str(value)
        if is_no_text(text):
            raise DataError.at(
                place,
                "encoding",
                f"{what} holds a character that is no text (NUL or half of a surrogate pair); remove it",
                column,
            )
        return text
    raise DataError.at(place, "bad-value", f"{what} is a nested value; flatten it or leave it out", column)
