"""Data files with one malformed row, value or header, and the row and column that the error must name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from malformed_readers import Case, Grid, Reader, case_of, object_lines


def _at(grid: Grid, number: int, row: Sequence[str] | str) -> bytes:
    """Return the file with one row or line replaced."""
    lines = grid.lines()
    lines[number + grid.header] = row if isinstance(row, str) else grid.separator.join(row)
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")


def _cell(grid: Grid, number: int, column: str, value: str) -> bytes:
    row = list(grid.rows[number])
    row[grid.names.index(column)] = value
    return _at(grid, number, row)


def _spoilt(grid: Grid, number: int, column: str, mark: str) -> bytes:
    return _cell(grid, number, column, grid.rows[number][grid.names.index(column)] + mark)


def _header(grid: Grid, names: Sequence[str]) -> bytes:
    return replace(grid, names=tuple(names)).bytes()


VALUES: Mapping[str, Mapping[str, str]] = {
    "user": {"blank": " ", "empty": "", "of 5000 letters": "u" * 5000},
    "item": {"blank": " ", "empty": "", "of 5000 letters": "i" * 5000},
    "rating": {
        "NaN": "NaN", "infinite": "inf", "minus infinite": "-Infinity", "too large to hold": "1e999", "a word": "four",
        "empty": "", "two numbers": "4 5", "of 200000 letters": "4" * 200_000, "hexadecimal": "0x10", "true": "true",
    },
    "time": {
        "no date": "yesterday", "empty": "", "an impossible date": "2023-02-30", "NaN": "nan",
        "too large to hold": "9" * 400, "of year 0": "0000-01-01",
    },
}  # fmt: skip


def rows(reader: Reader) -> Iterator[Case]:
    """Yield delimited files with one malformed row."""
    grid = reader.form
    assert isinstance(grid, Grid)
    # Readers of published data sets skip other columns.
    first = next(iter(reader.roles.values()))
    for spot in (0, len(grid.rows) - 1):
        row = grid.rows[spot]
        line = spot + 1 + grid.header
        numbers = (spot + 1, line)
        faults: dict[str, bytes] = {
            "a field too few": _at(grid, spot, row[:-1]),
            "a field too many": _at(grid, spot, [*row, "more"]),
            "another separator": _at(grid, spot, ("#" if grid.separator != "#" else "%").join(row)),
            "a NUL byte": _spoilt(grid, spot, first, "\0"),
            "only its first half": _at(grid, spot, row[: len(row) // 2]),
        }
        if not reader.old:
            faults["a byte that is no UTF-8"] = _spoilt(grid, spot, first, "\udc81")
            faults["half a letter"] = _spoilt(grid, spot, first, "\udce2\udc82")
            faults["half of a surrogate pair"] = _spoilt(grid, spot, first, "\udced\udca0\udc80")
        if grid.quoted:
            faults["an open quote"] = _at(grid, spot, ['"' + row[0], *row[1:]])
            faults["a quote inside a quoted field"] = _at(grid, spot, [f'"{row[0]}"x', *row[1:]])
            faults["a lone carriage return"] = _at(grid, spot, [row[0] + "\r", *row[1:]])
        for name, raw in faults.items():
            yield case_of(reader, f"row {spot + 1} has {name}", raw, rows=numbers)
        for role, column in reader.roles.items():
            for name, value in VALUES.get(role, {}).items():
                raw = _cell(grid, spot, column, value)
                key = f"{role}_id" if name == "of 5000 letters" else column
                yield case_of(reader, f"the {role} of row {spot + 1} is {name}", raw, rows=numbers, column=key)


def headers(reader: Reader) -> Iterator[Case]:
    """Yield delimited files with a malformed header or malformed lines."""
    grid = reader.form
    assert isinstance(grid, Grid)
    first = next(iter(reader.roles.values()))
    wrong = "#" if grid.separator != "#" else "%"
    yield case_of(reader, "every line has another separator", replace(grid, separator=wrong).bytes())
    yield case_of(reader, "it is one line", grid.bytes().replace(b"\n", b" "))
    if not grid.header:
        return
    yield case_of(reader, "there is a header and nothing else", f"{grid.lines()[0]}\n".encode())
    yield case_of(reader, "there is no header", replace(grid, header=False).bytes())
    yield case_of(reader, "a column is repeated", _header(grid, [first, *grid.names[1:-1], first]))
    yield case_of(reader, "all columns have one name", _header(grid, ["x"] * len(grid.names)))
    yield case_of(reader, "names are blank", _header(grid, [" "] * len(grid.names)))
    yield case_of(reader, "there are 5000 columns", _wide(grid, 5000))
    yield case_of(reader, "a name has two million letters", _header(grid, ["x" * 2_000_000, *grid.names[1:]]))
    again = "".join(f"{line}\n" for line in [grid.lines()[0], *grid.lines()]).encode()
    yield case_of(reader, "the header is repeated", again, rows=(1, 2))
    marked = ["\ufeff\ufeff" + name for name in grid.names]
    yield case_of(reader, "the names begin with byte order marks", _header(grid, marked))
    for column in (name for role, name in reader.roles.items() if role in ("user", "item")):
        missing = [("other" if name == column else name) for name in grid.names]
        yield case_of(reader, f"column {column} is missing", _header(grid, missing), column=column)
        upper = [name.upper() if name == column else name for name in grid.names]
        yield case_of(reader, f"column {column} is written in capitals", _header(grid, upper), column=column)


def _wide(grid: Grid, width: int) -> bytes:
    more = [f"c{n}" for n in range(width)]
    rows = tuple((*row, *("1" for _ in more)) for row in grid.rows[:3])
    return replace(grid, names=(*grid.names, *more), rows=rows).bytes()


def objects(reader: Reader) -> Iterator[Case]:
    """Yield JSON Lines with one malformed line."""
    records = reader.form
    assert isinstance(records, tuple)
    good = object_lines(records).decode().splitlines()
    for spot in (0, len(good) - 1):
        record = dict(records[spot])
        first = next(iter(reader.roles.values()))
        for name, line in _json_faults(good[spot], record, first, python=reader.python).items():
            lines = [*good[:spot], line, *good[spot + 1 :]]
            raw = "".join(f"{each}\n" for each in lines).encode("utf-8", "surrogateescape")
            yield case_of(reader, f"line {spot + 1} is {name}", raw, rows=(spot + 1,))
        for role, column in reader.roles.items():
            for name, value in _object_values(role).items():
                changed: dict[str, Any] = {**record, column: value}
                if name == "missing":
                    del changed[column]
                # The first line defines the columns, so its error names only the file.
                numbers = () if name == "missing" and not spot else (spot + 1,)
                raw = object_lines([*records[:spot], changed, *records[spot + 1 :]])
                key = f"{role}_id" if name == "of 5000 letters" else column
                yield case_of(reader, f"the {role} of line {spot + 1} is {name}", raw, column=key, rows=numbers)


def _json_faults(line: str, record: Mapping[str, Any], key: str, *, python: bool) -> dict[str, str]:
    deep = 100_000
    faults = {
        "cut off": line[: len(line) // 2],
        "a list": json.dumps([record]),
        "a number": "12",
        "null": "null",
        "two objects": line + line,
        "a name without quotes": line.replace(f'"{key}"', key),
        "not finished": line[:-1] + ",",
        "a deep list": "[" * deep + "]" * deep,
        "a deep object": '{"a":' * deep + "1" + "}" * deep,
        "a byte that is no UTF-8": line.replace(key, key + "\udc81", 1),
        "with a NUL byte": line[:3] + "\0" + line[3:],
        "a call": "__import__('os').system('touch canary')",
        "a comment": "# " + line,
    }
    if not python:
        faults["a Python dictionary"] = repr(dict(record))
    return faults


def _object_values(role: str) -> dict[str, Any]:
    if role in ("user", "item"):
        return {
            "missing": None, "null": None, "empty": "", "blank": " ", "a list": ["a", {"b": 1}], "an object": {"a": 1},
            "half of a surrogate pair": "x\ud800", "a NUL": "a\0b", "of 5000 letters": "x" * 5000,
        }  # fmt: skip
    if role == "rating":
        return {
            "a word": "four", "NaN": float("nan"), "infinite": float("inf"), "an object": {"a": 1}, "empty": "",
            "true": True, "of 400 digits": int("9" * 400), "null": None, "a list": [{"a": 1}],
        }  # fmt: skip
    if role == "time":
        return {"a word": "noon", "NaN": float("nan"), "an object": {"a": 1}, "null": None, "no date": "2023-13-45"}
    return {}


_SEQUENCES = {
    "a user alone": "u9",
    "a user with a blank": "u9 \t ",
    "a user again": "u0 i5 i4",
    "an item again": "u9 i1 i2 i1",
    "an unknown item": "u9 i1 nowhere",
    "commas": "u9,i1,i2",
    "a NUL byte": "u9 i1 \0",
    "a byte that is no UTF-8": "u9 i1 i\udc81",
    "an item of 5000 letters": "u9 i1 " + "i" * 5000,
}


def sequences(reader: Reader) -> Iterator[Case]:
    good = reader.good().decode().splitlines()
    for spot in (1, len(good)):
        for name, line in _SEQUENCES.items():
            lines = [*good[:spot], line, *good[spot:]]
            raw = "".join(f"{each}\n" for each in lines).encode("utf-8", "surrogateescape")
            yield case_of(reader, f"line {spot + 1} has {name}", raw, rows=(spot + 1,))
