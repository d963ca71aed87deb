"""Some hundred ways to spoil a data file, and what an error must say about each."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from malformed_readers import Grid, Reader, Records, columns_of, object_lines, parquet_bytes, readers

Pack = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """One malformed file.

    Attributes:
        reader: Who is given it.
        fault: What is wrong with it.
        files: The faulty file, by name, and the others.
        make: Makes what bytes cannot say, such as a link; called with the faulty file's path.
        places: Numbers of which the error must name one as a row or line; empty: there is none.
        column: Which column or key the error must name.
        line: Of a file of requests, the line that is refused while the others are read.
    """

    reader: Reader
    fault: str
    files: Mapping[str, bytes]
    make: Pack | None = None
    places: tuple[int, ...] = ()
    column: str = ""
    line: int = 0

    @property
    def name(self) -> str:
        return f"{self.reader.name}: {self.fault}"


def _case(reader: Reader, fault: str, raw: bytes, **more: Any) -> Case:
    return Case(reader, fault, {**reader.others, reader.file: raw}, **more)


# --------------------------------------------------------------------------- whole files, whatever stands in them

CANARY = "canary"


class _Runs:
    """A pickle that makes a file where it is loaded."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {CANARY}",)


def _pickles() -> dict[str, bytes]:
    return {f"a pickle of protocol {number}": pickle.dumps(_Runs(), protocol=number) for number in (0, 1, 2, 3, 4, 5)}


def _zip(*entries: tuple[str, bytes], **options: Any) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, raw in entries:
            archive.writestr(name, raw)
    return stream.getvalue()


def _noise(size: int) -> bytes:
    return bytes((n * n * 31 + n * 7 + 11) % 256 for n in range(size))


@cache
def strangers() -> Mapping[str, bytes]:
    """Return files that are something else."""
    return {
        "nothing": b"",
        "one line end": b"\n",
        "blank lines": b"\n \n\t\n\r\n" * 40,
        "a byte order mark alone": b"\xef\xbb\xbf",
        "half a byte order mark": b"\xef\xbb",
        "noise": _noise(5000),
        "zero bytes": bytes(4000),
        "a gzip file without its ending": gzip.compress(b"user_id,item_id\nu,i\n"),
        "a zip archive": _zip(("events.csv", b"user_id,item_id\nu,i\n")),
        "a web page": b"<!DOCTYPE html>\n<html><head><title>404</title></head>\n<body>Not found</body></html>\n",
        "a spreadsheet": _zip(("xl/workbook.xml", b"<workbook/>")),
        "an old spreadsheet": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + _noise(3000),
        "a PDF file": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n",
        "a picture": b"\x89PNG\r\n\x1a\n" + _noise(2000),
        "a database": b"SQLite format 3\x00" + bytes(100),
        "a program": b"\x7fELF\x02\x01\x01" + bytes(60),
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12345\n",
        "a saved model": b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ",
        "an array": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n",
        **_pickles(),
    }


def whole_files(reader: Reader) -> Iterator[Case]:
    for name, raw in strangers().items():
        yield _case(reader, f"it is {name}", raw)


def encodings(reader: Reader) -> Iterator[Case]:
    """Return good files in encodings that are not read."""
    if reader.kind == "parquet":
        return
    text = reader.good().decode()
    for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "cp037"):
        yield _case(reader, f"it is in {name}", text.encode(name))


def places(reader: Reader) -> Iterator[Case]:
    """Return what is no file."""

    def link(path: Path) -> None:
        path.symlink_to(path.with_name("other"))
        path.with_name("other").symlink_to(path)

    ways: dict[str, Pack] = {
        "a folder": lambda path: path.mkdir(),
        "a pipe": lambda path: os.mkfifo(path),
        "a link to itself": lambda path: path.symlink_to(path),
        "two links to each other": link,
        "a link to nothing": lambda path: path.symlink_to(path.with_name("gone")),
        "a link to endless zeros": lambda path: path.symlink_to("/dev/zero"),
        "a link to a folder": lambda path: path.symlink_to(path.parent),
    }
    for name, make in ways.items():
        yield Case(reader, f"it is {name}", {n: raw for n, raw in reader.others.items() if n != reader.file}, make)


# --------------------------------------------------------------------------- gzip

STORED_BOMB = 400
"""Members of one MiB that a bomb unpacks to."""


@cache
def bombs() -> Mapping[str, bytes]:
    size = 2**20
    kinds = {"zeros": bytes(size), "line ends": b"\n" * size, "letters": b"a" * size, "rows": b"a,b,1\n" * (size // 6)}
    return {f"a bomb of {name}": gzip.compress(raw) * STORED_BOMB for name, raw in kinds.items()}


def packed(reader: Reader) -> Iterator[Case]:
    """Return gzip files that are damaged, or larger than they look."""
    if reader.kind == "parquet" and reader.requests:
        return
    good = gzip.compress(reader.good(), mtime=0)
    middle = len(good) // 2
    faults = {
        "cut off in its header": good[:6],
        "cut off in the middle": good[:middle],
        "cut off before its checksum": good[:-8],
        "cut off in its checksum": good[:-3],
        "with a wrong checksum": good[:-8] + b"\0\0\0\0" + good[-4:],
        "with a wrong length": good[:-4] + b"\1\0\0\0",
        "with changed bytes": good[:middle] + bytes(byte ^ 0x55 for byte in good[middle : middle + 8]) + good[middle + 8 :],
        "with another method": good[:2] + b"\x07" + good[3:],
        "with rubbish after it": good + b"rubbish",
        "that was never packed": reader.good(),
        "of nothing": gzip.compress(b"", mtime=0),
        "empty": b"",
        "packed twice": gzip.compress(good, mtime=0),
        **bombs(),
    }
    others = {name: raw for name, raw in reader.others.items() if name != reader.file}
    called = replace(reader, file=f"{reader.file}.gz")
    for name, raw in faults.items():
        yield Case(called, f"gzip {name}", {**others, called.file: raw})


# --------------------------------------------------------------------------- zip archives


def _flag(raw: bytes, old: bytes, new: bytes) -> bytes:
    return raw.replace(old, new)


def archives(reader: Reader) -> Iterator[Case]:
    """Return zip archives of the files, damaged or full of tricks."""
    files = {**reader.others, reader.file: reader.good()}
    folder = "ml-100k/" if reader.name.startswith("ml-100k") else "ml-latest-small/" if "small" in reader.name else ""
    entries = [(folder + name, raw) for name, raw in files.items()]
    good = _zip(*entries)
    target = folder + reader.file
    first = [entry for entry in entries if entry[0] != target]
    link = zipfile.ZipInfo(target)
    link.create_system, link.external_attr = 3, 0o120777 << 16
    bomb = {name: raw for name, raw in zip(("zeros", "rows"), (bytes(2**20), b"a,b,1\n" * 2**17), strict=True)}
    start = good.rfind(b"PK\x01\x02")
    faults = {
        "empty": _zip(),
        "cut off": good[: len(good) // 2],
        "without its directory": good[: good.find(b"PK\x01\x02")],
        "of noise": b"PK\x03\x04" + _noise(500),
        "with changed bytes": good[:60] + bytes(byte ^ 0x55 for byte in good[60:90]) + good[90:],
        "with a file that leaves it": _zip(*first, (f"../../{reader.file}", reader.good())),
        "with an absolute name": _zip(*first, (f"/tmp/{reader.file}", reader.good())),
        "with a name of another system": _zip(*first, (f"..\\..\\{reader.file}", reader.good())),
        "with a link": _zip(*first, (link, b"/etc/passwd")),  # type: ignore[arg-type]
        "with a file twice": _zip(*entries, (target, b"other,things\n1,2\n")),
        "with a password": _flag(_flag(good, b"PK\x03\x04\x14\x00\x00\x00", b"PK\x03\x04\x14\x00\x01\x00"),
                                 b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"),
        "of another method": good[: start + 10] + b"\x63\x00" + good[start + 12 :],
        "with a name that is no text": _flag(_zip(*first, ("é" + target, b"x")), "é".encode(), b"\xff\xfe"),
        "with nothing that fits": _zip(("readme.txt", b"hello"), ("a/b.bin", b"x")),
        **{f"with a bomb of {name}": _zip(*first, (target, raw * STORED_BOMB)) for name, raw in bomb.items()},
        "with a packed bomb": _zip(*first, (target + ".gz", bombs()["a bomb of rows"])),
    }  # fmt: skip
    for name, raw in faults.items():
        yield Case(replace(reader, file="all.zip"), f"zip {name}", {"all.zip": raw})


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


def _header(grid: Grid, names: Sequence[str]) -> bytes:
    return replace(grid, names=tuple(names)).bytes()


def _spots(grid: Grid) -> list[int]:
    return sorted({0, len(grid.rows) // 2, len(grid.rows) - 1})


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
    for spot in _spots(grid):
        row = grid.rows[spot]
        line = spot + 1 + grid.header
        named: dict[str, Any] = {"line": line} if reader.requests else {"places": (spot + 1, line)}
        faults: dict[str, bytes] = {
            "a field too few": _at(grid, spot, row[:-1]),
            "a field too many": _at(grid, spot, [*row, "more"]),
            "another separator": _at(grid, spot, ("#" if grid.separator != "#" else "%").join(row)),
            "a NUL byte": _at(grid, spot, [row[0] + "\0", *row[1:]]),
            "only its first half": _at(grid, spot, row[: len(row) // 2]),
        }
        if not reader.old:
            faults["a byte that is no UTF-8"] = _at(grid, spot, [*row[:-1], row[-1] + "\udce9"])
            faults["half a letter"] = _at(grid, spot, [row[0] + "\udce2\udc82", *row[1:]])
            faults["half of a surrogate pair"] = _at(grid, spot, [row[0] + "\udced\udca0\udc80", *row[1:]])
        if grid.quoted:
            faults["an open quote"] = _at(grid, spot, ['"' + row[0], *row[1:]])
            faults["a quote inside a quoted field"] = _at(grid, spot, [f'"{row[0]}"x', *row[1:]])
            faults["a lone carriage return"] = _at(grid, spot, [row[0] + "\r", *row[1:]])
        for name, raw in faults.items():
            yield _case(reader, f"row {spot + 1} has {name}", raw, **named)
        for role, column in reader.roles.items():
            for name, value in VALUES.get(role, {}).items():
                if _is_fine(reader, role, name):
                    continue
                raw = _cell(grid, spot, column, value)
                yield _case(reader, f"the {role} of row {spot + 1} is {name}", raw, column=column, **named)


def _is_fine(reader: Reader, role: str, name: str) -> bool:
    """Whether a reader has no quarrel with a value; what it makes of it is tested elsewhere."""
    return (
        # What does not count as a film of the ratings is not looked at.
        (role in ("item", "user") and name == "of 5000 letters" and ("user" not in reader.roles))
        # Ids that only a table of items knows are looked for there.
        or (name == "with a decimal comma" and isinstance(reader.form, Grid) and reader.form.separator == ";")
    )


def headers(reader: Reader) -> Iterator[Case]:
    """Return delimited files whose header or lines are wrong as a whole."""
    grid = reader.form
    assert isinstance(grid, Grid)
    must = [*reader.roles.values()] or list(grid.names)
    text = grid.bytes()
    wrong = "|" if grid.separator != "|" else "#"
    yield _case(reader, "every line has another separator", replace(grid, separator=wrong).bytes())
    yield _case(reader, "lines end as they did on old Macs", text.replace(b"\n", b"\r"))
    yield _case(reader, "it is one line", text.replace(b"\n", b" "))
    if not grid.header:
        return
    yield _case(reader, "there is a header and nothing else", f"{grid.lines()[0]}\n".encode())
    yield _case(reader, "there is no header", replace(grid, header=False).bytes())
    yield _case(reader, "a column stands twice", _header(grid, [must[0], *grid.names[1:-1], must[0]]))
    yield _case(reader, "all columns have one name", _header(grid, ["x"] * len(grid.names)))
    yield _case(reader, "names are blank", _header(grid, [" "] * len(grid.names)))
    yield _case(reader, "a column has a byte order mark inside", _header(grid, ["\ufeff\ufeff" + n for n in grid.names]))
    yield _case(reader, "there are 5000 columns", _wide(grid, 5000))
    yield _case(reader, "a name has two million letters", _header(grid, ["x" * 2_000_000, *grid.names[1:]]))
    if reader.name.startswith("init"):
        return
    for column in (name for role, name in reader.roles.items() if role in ("user", "item")):
        missing = [("other" if name == column else name) for name in grid.names]
        yield _case(reader, f"column {column} is missing", _header(grid, missing), column=column)
        upper = [name.upper() if name == column else name for name in grid.names]
        yield _case(reader, f"column {column} is written in capitals", _header(grid, upper), column=column)


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
            lines = [*good[:spot], line, *good[spot + 1 :]]
            raw = "".join(f"{each}\n" for each in lines).encode("utf-8", "surrogateescape")
            yield _case(reader, f"line {spot + 1} is {name}", raw, **named)
        for role, column in reader.roles.items():
            for name, value in _object_values(role).items():
                if "user" not in reader.roles and role == "item" and name not in ("missing", "empty", "blank", "null"):
                    continue
                changed: dict[str, Any] = {**record, column: value}
                if name == "missing":
                    del changed[column]
                raw = object_lines([*records[:spot], changed, *records[spot + 1 :]])
                yield _case(reader, f"the {role} of line {spot + 1} is {name}", raw, column=column, **named)


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
        "a byte that is no UTF-8": line.replace(key, key + "\udce9", 1),
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
        return {"a word": "noon", "NaN": float("nan"), "an object": {"a": 1}, "null": None, "a date that is none": "2023-13-45"}
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
    "a byte that is no UTF-8": "u9 i1 i\udce9",
    "an item of 5000 letters": "u9 i1 " + "i" * 5000,
}


def sequences(reader: Reader) -> Iterator[Case]:
    good = reader.good().decode().splitlines()
    for spot in (1, len(good) // 2, len(good)):
        for name, line in _SEQUENCES.items():
            lines = [*good[:spot], line, *good[spot:]]
            raw = "".join(f"{each}\n" for each in lines).encode("utf-8", "surrogateescape")
            yield _case(reader, f"line {spot + 1} has {name}", raw, places=(spot + 1,))


_ASKED: Mapping[str, Mapping[str, Any]] = {
    "no candidates": {"id": "x", "history": []},
    "no list of candidates": {"id": "x", "candidates": "i1"},
    "an empty list": {"id": "x", "candidates": []},
    "candidates that are null": {"id": "x", "candidates": None},
    "a candidate that is null": {"id": "x", "candidates": ["i1", None]},
    "a candidate that is a list": {"id": "x", "candidates": [["i1"]]},
    "a candidate that is empty": {"id": "x", "candidates": [{}]},
    "a candidate that is NaN": {"id": "x", "candidates": [float("nan")]},
    "a candidate that is infinite": {"id": "x", "candidates": [float("inf")]},
    "an unknown candidate": {"id": "x", "candidates": ["nowhere"]},
    "a title that is a number": {"id": "x", "candidates": [{"title": 5}]},
    "a title that is no text": {"id": "x", "candidates": [{"title": "a\ud800"}]},
    "a history that is no list": {"id": "x", "history": "i1", "candidates": ["i1"]},
    "a rating that is no number": {"id": "x", "history": [{"item_id": "i1", "rating": "good"}], "candidates": ["i1"]},
    "an infinite rating": {"id": "x", "history": [{"item_id": "i1", "rating": float("inf")}], "candidates": ["i1"]},
    "a time that is none": {"id": "x", "history": [{"item_id": "i1", "timestamp": "soon"}], "candidates": ["i1"]},
    "a text that is an object": {"id": "x", "history": [{"item_id": "i1", "text": {}}], "candidates": ["i1"]},
    "an id of 5000 letters": {"id": "x" * 5000, "candidates": ["i1"]},
    "an id that is a list": {"id": ["x"], "candidates": ["i1"]},
    "an id with a line end": {"id": "x\ny", "candidates": ["i1"]},
    "a user that is an object": {"id": "x", "user_id": {}, "candidates": ["i1"]},
    "a profile that is a list": {"id": "x", "profile": ["old"], "candidates": ["i1"]},
    "a key that is no text": {"id": "x", "candidates": [{"item_id": "i1", "a\ud800": "b"}]},
}


def asked(reader: Reader) -> Iterator[Case]:
    records = reader.form
    assert isinstance(records, tuple)
    for spot in (0, len(records) - 1):
        for name, record in _ASKED.items():
            raw = object_lines([*records[:spot], record, *records[spot + 1 :]])
            yield _case(reader, f"line {spot + 1} has {name}", raw, line=spot + 1)


# --------------------------------------------------------------------------- all of them


def cases(reader: Reader) -> Iterator[Case]:
    """Return every malformed file of a reader."""
    yield from whole_files(reader)
    yield from encodings(reader)
    yield from places(reader)
    yield from packed(reader)
    if reader.kind == "delimited":
        yield from rows(reader)
        yield from headers(reader)
    elif reader.kind == "objects":
        yield from objects(reader)
    elif reader.kind == "lines":
        yield from sequences(reader)
    if reader.requests and reader.kind == "objects":
        yield from asked(reader)


def all_cases() -> Iterator[Case]:
    for reader in readers():
        yield from cases(reader)
