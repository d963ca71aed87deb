"""Ways to spoil one row, one value or the header of a data file, and what an error must say about each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from data_cases import REFUSED
from malformed_readers import Case, Grid, Reader, case_of, object_lines

# --------------------------------------------------------------------------- delimited text


def _at(grid: Grid, number: int, row: Sequence[str] | str) -> bytes:
    """Return the file with another row, or another line, in place of one."""
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


def _spots(grid: Grid) -> list[int]:
    return sorted({0, len(grid.rows) // 2, len(grid.rows) - 1})


_BESIDE = ("an object with a deep list", "an endless number")
"""Faults of values that readers leave out unread that read a block at a time."""
_BLOCKS = ("table-jsonl",)
"""Readers that do so beside those of published sets."""

VALUES: Mapping[str, Mapping[str, str]] = {
    "user": {"blank": " ", "empty": "", "of 5000 letters": "u" * 5000},
    "item": {"blank": " ", "empty": "", "of 5000 letters": "i" * 5000},
    "rating": {
        "NaN": "NaN", "infinite": "inf", "minus infinite": "-Infinity", "too large to hold": "1e999", "a word": "four",
        "empty": "", "with a decimal comma": "4;5", "two numbers": "4 5", "of 200000 letters": "4" * 200_000,
        "hexadecimal": "0x10", "true": "true", "a share": "80%",
    },
    "time": {
        "no date": "yesterday", "empty": "", "an impossible date": "2023-02-30", "NaN": "nan", "infinite": "-inf",
        "too large to hold": "9" * 400, "of year 0": "0000-01-01", "half a date": "2023-01-",
    },
}  # fmt: skip


def rows(reader: Reader) -> Iterator[Case]:
    """Return delimited files of which one row is wrong."""
    grid = reader.form
    assert isinstance(grid, Grid)
    # Columns that no one needs are not looked at in the published sets.
    key = next(iter(reader.roles.values()), grid.names[-1])
    for spot in _spots(grid):
        row = grid.rows[spot]
        line = spot + 1 + grid.header
        named: dict[str, Any] = {"line": line} if reader.requests else {"places": (spot + 1, line)}
        faults: dict[str, bytes] = {
            "a field too few": _at(grid, spot, row[:-1]),
            "a field too many": _at(grid, spot, [*row, "more"]),
            "another separator": _at(grid, spot, ("#" if grid.separator != "#" else "%").join(row)),
            "a NUL byte": _spoilt(grid, spot, key, "\0"),
            "only its first half": _at(grid, spot, row[: len(row) // 2]),
        }
        if not reader.old:
            faults["a byte that is no UTF-8"] = _spoilt(grid, spot, key, "\udc81")
            faults["half a letter"] = _spoilt(grid, spot, key, "\udce2\udc82")
            faults["half of a surrogate pair"] = _spoilt(grid, spot, key, "\udced\udca0\udc80")
        if grid.quoted:
            faults["an open quote"] = _at(grid, spot, ['"' + row[0], *row[1:]])
            faults["a quote inside a quoted field"] = _at(grid, spot, [f'"{row[0]}"x', *row[1:]])
            faults["a lone carriage return"] = _at(grid, spot, [row[0] + "\r", *row[1:]])
        for name, raw in faults.items():
            yield case_of(reader, f"row {spot + 1} has {name}", raw, **named)
        for role, column in reader.roles.items():
            for name, value in VALUES.get(role, {}).items():
                if _is_fine(reader, role, name):
                    continue
                raw = _cell(grid, spot, column, value)
                said = f"{role}_id" if name == "of 5000 letters" and role in ("user", "item") else column
                yield case_of(reader, f"the {role} of row {spot + 1} is {name}", raw, column=said, **named)


def _is_fine(reader: Reader, role: str, name: str) -> bool:
    """Whether a reader has no quarrel with a value; what it makes of it is tested elsewhere."""
    # Entries of items and users that nobody interacts with are left out.
    return name == "of 5000 letters" and role in ("item", "user") and not {"item", "user"} <= set(reader.roles)


def headers(reader: Reader) -> Iterator[Case]:
    """Return delimited files whose header or lines are wrong as a whole."""
    grid = reader.form
    assert isinstance(grid, Grid)
    must = [*reader.roles.values()] or list(grid.names)
    text = grid.bytes()
    wrong = "#" if grid.separator != "#" else "%"
    yield case_of(reader, "every line has another separator", replace(grid, separator=wrong).bytes())
    if reader.requests:
        yield case_of(reader, "lines end as they did on old Macs", text.replace(b"\n", b"\r"))
    yield case_of(reader, "it is one line", text.replace(b"\n", b" "))
    if not grid.header:
        return
    yield case_of(reader, "there is a header and nothing else", f"{grid.lines()[0]}\n".encode())
    yield case_of(reader, "there is no header", replace(grid, header=False).bytes())
    yield case_of(reader, "a column stands twice", _header(grid, [must[0], *grid.names[1:-1], must[0]]))
    yield case_of(reader, "all columns have one name", _header(grid, ["x"] * len(grid.names)))
    yield case_of(reader, "names are blank", _header(grid, [" "] * len(grid.names)))
    yield case_of(reader, "there are 5000 columns", _wide(grid, 5000))
    yield case_of(reader, "a name has two million letters", _header(grid, ["x" * 2_000_000, *grid.names[1:]]))
    again = "".join(f"{line}\n" for line in [grid.lines()[0], *grid.lines()]).encode()
    place: dict[str, Any] = {"line": 2} if reader.requests else {"places": (1, 2)}
    yield case_of(reader, "the header stands there twice", again, **place)
    if reader.name.startswith("init"):
        return
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


# --------------------------------------------------------------------------- one object a line


def objects(reader: Reader) -> Iterator[Case]:
    """Return JSON Lines of which one is wrong."""
    records = reader.form
    assert isinstance(records, tuple)
    good = object_lines(records).decode().splitlines()
    for spot in sorted({0, len(good) // 2, len(good) - 1}):
        record = dict(records[spot])
        key = next(iter(reader.roles.values()), "candidates")
        named: dict[str, Any] = {"line": spot + 1} if reader.requests else {"places": (spot + 1,)}
        for name, line in _json_faults(good[spot], record, key, python=reader.python).items():
            if name in _BESIDE and (reader.streamed or reader.name in _BLOCKS):
                continue
            lines = [*good[:spot], line, *good[spot + 1 :]]
            raw = "".join(f"{each}\n" for each in lines).encode("utf-8", "surrogateescape")
            yield case_of(reader, f"line {spot + 1} is {name}", raw, **named)
        for role, column in reader.roles.items():
            for name, value in _object_values(role).items():
                if "user" not in reader.roles and role == "item" and name not in ("missing", "empty", "blank", "null"):
                    continue
                changed: dict[str, Any] = {**record, column: value}
                place = named
                if name == "missing":
                    del changed[column]
                    # The first line shows which names there are, so its error is about the file.
                    place = named if spot or reader.requests else {}
                raw = object_lines([*records[:spot], changed, *records[spot + 1 :]])
                said = f"{role}_id" if name == "of 5000 letters" and "user" in reader.roles else column
                yield case_of(reader, f"the {role} of line {spot + 1} is {name}", raw, column=said, **place)


def _json_faults(line: str, record: Mapping[str, Any], key: str, *, python: bool) -> dict[str, str]:
    deep = 100_000
    faults = {
        "cut off": line[: len(line) // 2],
        "cut off by one": line[:-1],
        "a list": json.dumps([record]),
        "a number": "12",
        "a text": '"text"',
        "null": "null",
        "two objects": line + line,
        "an object and a word": line + " end",
        "words": "user 1 liked item 2",
        "a name without quotes": line.replace(f'"{key}"', key),
        "not finished": line[:-1] + ",",
        "a deep list": "[" * deep + "]" * deep,
        "a deep object": '{"a":' * deep + "1" + "}" * deep,
        "an object with a deep list": line[:-1] + ', "more": ' + "[" * deep + "]" * deep + "}",
        "an endless text": line[:-2],
        "a byte that is no UTF-8": line.replace(key, key + "\udc81", 1),
        "with a NUL byte": line[:3] + "\0" + line[3:],
        "a call": "__import__('os').system('touch canary')",
        "a comment": "# " + line,
        "a row of a table": "u1,i1,5,1700000000",
        "an endless number": line[:-1] + ', "more": ' + "9" * 5000 + "}",
        "a bracket alone": "{",
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
        return {
            "a word": "noon",
            "NaN": float("nan"),
            "an object": {"a": 1},
            "null": None,
            "a date that is none": "2023-13-45",
        }
    return {}


# --------------------------------------------------------------------------- one line a user, and requests

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
    for spot in (1, len(good) // 2, len(good)):
        for name, line in _SEQUENCES.items():
            lines = [*good[:spot], line, *good[spot:]]
            raw = "".join(f"{each}\n" for each in lines).encode("utf-8", "surrogateescape")
            yield case_of(reader, f"line {spot + 1} has {name}", raw, places=(spot + 1,))


def asked(reader: Reader) -> Iterator[Case]:
    records = reader.form
    assert isinstance(records, tuple)
    for spot in (0, len(records) - 1):
        for number, (record, facts) in enumerate(REFUSED):
            raw = object_lines([*records[:spot], record, *records[spot + 1 :]])
            fault = f"line {spot + 1} has a fault in {facts.column} like request {number}"
            yield case_of(reader, fault, raw, line=spot + 1)
