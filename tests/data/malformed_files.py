"""Malformed data files: other formats, encodings, links and folders, damaged archives, Parquet."""

from __future__ import annotations

import gzip
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from data_cases import zipped
from malformed_readers import Case, Reader, case_of, good_columns, parquet_bytes

Pack = Callable[[Path], None]


CANARY = "canary"


class _Runs:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {CANARY}",)


def _pickles() -> dict[str, bytes]:
    return {f"a pickle of protocol {number}": pickle.dumps(_Runs(), protocol=number) for number in (0, 1, 5)}


def _changed(raw: bytes, start: int, length: int) -> bytes:
    return raw[:start] + bytes(byte ^ 0x55 for byte in raw[start : start + length]) + raw[start + length :]


def _noise(size: int) -> bytes:
    return bytes((n * n * 31 + n * 7 + 11) % 256 for n in range(size))


@cache
def strangers() -> Mapping[str, bytes]:
    """Return files of other formats."""
    return {
        "nothing": b"",
        "one line end": b"\n",
        "a byte order mark alone": b"\xef\xbb\xbf",
        "noise": _noise(5000),
        "zero bytes": bytes(4000),
        "a gzip file without its ending": gzip.compress(b"user_id,item_id\nu,i\n"),
        "a zip archive": zipped(("events.csv", b"user_id,item_id\nu,i\n")),
        "a web page": b"<!DOCTYPE html>\n<html><head><title>404</title></head>\n<body>Not found</body></html>\n",
        "an old spreadsheet": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + _noise(3000),
        "a PDF file": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n",
        "a database": b"SQLite format 3\x00" + bytes(100),
        "a program": b"\x7fELF\x02\x01\x01" + bytes(60),
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12345\n",
        **_pickles(),
    }


def other_formats(reader: Reader) -> Iterator[Case]:
    """Yield files of other formats, and valid files in encodings that are not read."""
    for name, raw in strangers().items():
        yield case_of(reader, f"it is {name}", raw)
    if reader.kind == "parquet":
        return
    text = reader.good().decode()
    # Tables may be UTF-16 with a byte order mark: test_file_kinds.py.
    for name in (*(("utf-16",) if reader.streamed else ()), "utf-16-le", "utf-16-be", "utf-32"):
        yield case_of(reader, f"it is in {name}", text.encode(name))


def special_files(reader: Reader) -> Iterator[Case]:
    """Yield folders, pipes and links."""
    ways: dict[str, Pack] = {
        "a folder": lambda path: path.mkdir(),
        "a pipe": lambda path: os.mkfifo(path),
        "a link to itself": lambda path: path.symlink_to(path),
        "a broken link": lambda path: path.symlink_to(path.with_name("gone")),
        "a link to endless zeros": lambda path: path.symlink_to("/dev/zero"),
        "a link to a folder": lambda path: path.symlink_to(path.parent),
    }
    for name, make in ways.items():
        yield Case(reader, f"it is {name}", {n: raw for n, raw in reader.others.items() if n != reader.file}, make)


STORED_BOMB = 20
"""MiB of an unpacked bomb."""


@cache
def bombs() -> Mapping[str, bytes]:
    size = 2**20
    kinds = {"zeros": bytes(size), "line ends": b"\n" * size, "letters": b"a" * size, "rows": b"a,b,1\n" * (size // 6)}
    return {f"a bomb of {name}": gzip.compress(raw) * STORED_BOMB for name, raw in kinds.items()}


def packed(reader: Reader) -> Iterator[Case]:
    """Yield damaged gzip files and decompression bombs."""
    if reader.kind == "parquet":
        return
    good = gzip.compress(reader.good(), mtime=0)
    middle = len(good) // 2
    faults = {
        "cut off in the middle": good[:middle],
        "cut off before its checksum": good[:-8],
        "with a wrong checksum": good[:-8] + b"\0\0\0\0" + good[-4:],
        "with changed bytes": _changed(good, middle, 8),
        "with another method": good[:2] + b"\x07" + good[3:],
        "with rubbish after it": good + b"rubbish",
        "of nothing": gzip.compress(b"", mtime=0),
        "empty": b"",
        "packed twice": gzip.compress(good, mtime=0),
        **bombs(),
    }
    others = {name: raw for name, raw in reader.others.items() if name != reader.file}
    gzipped = replace(reader, file=f"{reader.file}.gz")
    for name, raw in faults.items():
        yield Case(gzipped, f"gzip {name}", {**others, gzipped.file: raw})


def archives(reader: Reader) -> Iterator[Case]:
    """Yield damaged and hostile zip archives."""
    files = {**reader.others, reader.file: reader.good()}
    entries = list(files.items())
    good = zipped(*entries)
    target = reader.file
    first = [entry for entry in entries if entry[0] != target]
    link = zipfile.ZipInfo(target)
    link.create_system, link.external_attr = 3, 0o120777 << 16
    start = good.rfind(b"PK\x01\x02")
    faults = {
        "empty": zipped(),
        "without its directory": good[: good.find(b"PK\x01\x02")],
        "of noise": b"PK\x03\x04" + _noise(500),
        "with changed bytes": _changed(good, good.find(target.encode()) + len(target) + 4, 20),
        "with a file that leaves it": zipped(*first, (f"../../{reader.file}", reader.good())),
        "with an absolute name": zipped(*first, (f"/tmp/{reader.file}", reader.good())),
        "with a link": zipped(*first, (link, b"/etc/passwd")),
        "with a file twice": zipped(*entries, (target, b"other,things\n1,2\n")),
        "with a password": good.replace(b"PK\x03\x04\x14\x00\x00\x00", b"PK\x03\x04\x14\x00\x01\x00").replace(
            b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"
        ),
        "of another method": good[: start + 10] + b"\x63\x00" + good[start + 12 :],
        "with nothing that fits": zipped(("readme.txt", b"hello"), ("a/b.bin", b"x")),
        "with a bomb": zipped(*first, (target, b"a,b,1\n" * 2**17 * 20)),
        "with a packed bomb": zipped(*first, (target + ".gz", bombs()["a bomb of rows"])),
    }  # fmt: skip
    for name, raw in faults.items():
        yield Case(replace(reader, file="all.zip"), f"zip {name}", {"all.zip": raw})


def parquet_faults(reader: Reader) -> Iterator[Case]:
    """Yield Parquet files that are damaged or have values that cannot be used."""
    good = reader.good()
    size = int.from_bytes(good[-8:-4], "little")
    foot = len(good) - 8 - size

    def length(number: int) -> bytes:
        return good[:-8] + (number % 2**32).to_bytes(4, "little") + good[-4:]

    damaged = {
        "cut off in the middle": good[: len(good) // 2],
        "cut off before its end": good[:-4],
        "of two heads": b"PAR1PAR1",
        "with an empty foot": length(0),
        "with an endless foot": length(2**31 - 1),
        "with a negative foot": length(-1),
        "whose foot is zeros": good[:foot] + bytes(size) + good[-8:],
        "whose foot is noise": good[:foot] + _noise(size) + good[-8:],
        "whose foot is changed": _changed(good, foot, 40),
        "whose rows are changed": _changed(good, 4, 60),
        "without its rows": good[:4] + good[foot:],
        "that is encrypted": good[:-4] + b"PARE",
        "of an endless nest": good[:foot] + b"\x19\x1c" * (size // 2) + b"\x00" * (size % 2) + good[-8:],
        "in gzip without saying so": gzip.compress(good, mtime=0),
    }
    for name, raw in damaged.items():
        yield case_of(reader, f"Parquet {name}", raw)
    for name, (table, options) in _tables(good_columns()).items():
        yield case_of(reader, f"Parquet {name}", parquet_bytes(table, **options))
    yield from _parquet_values(reader)


def _tables(columns: Mapping[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    names = list(columns)
    arrays = [pa.array(values) for values in columns.values()]
    rows = len(arrays[0])
    nested = pa.array([{"a": [{"b": 1}]}] * rows)
    many = pa.array(np.zeros(12_000_000, dtype=np.int8))
    # One text of 200,000 characters, stored once in the file and used in every row of the table.
    long = pa.DictionaryArray.from_arrays(np.zeros(4000, dtype=np.int32), pa.array(["x" * 200_000]))
    return {
        "without rows": (pa.table(columns).slice(0, 0), {}),
        "without columns": (pa.table({}), {}),
        "of nested columns": (pa.table([nested] * len(names), names=names), {}),
        "of binary columns": (pa.table([pa.array([b"\xff\xfe"] * rows)] * len(names), names=names), {}),
        "with one name twice": (pa.table([*arrays, arrays[0]], names=[*names, names[0]]), {}),
        "with other names": (pa.table(arrays, names=[f"other_{name}" for name in names]), {}),
        "of too many columns": (pa.table({**columns, **{f"c{n}": pa.nulls(rows) for n in range(2500)}}), {}),
        "with a very long name": (pa.table([*arrays, arrays[0]], names=[*names, "x" * 5000]), {}),
        "of far too many rows": (pa.table([many] * len(names), names=names), {}),
        "of one long text": (pa.table([long] * len(names), names=names), {}),
        "of one long text that does not say so": (pa.table([long] * len(names), names=names), {"store_schema": False}),
    }


def _parquet_values(reader: Reader) -> Iterator[Case]:
    """Yield Parquet files with one value or one type of a column that cannot be used."""
    good = good_columns()
    rows = len(good["user_id"])
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"x", b"\xbe\xff"], pa.binary()).buffers())
    texts = pa.concat_arrays([broken, pa.array(["i"] * (rows - 2))])
    types = {
        "item_id": {
            "is not UTF-8": texts,
            "is binary": pa.array([b"a"] * rows),
            "is a struct": pa.array([{"a": "b"}] * rows),
        },
        "user_id": {"is null throughout": pa.nulls(rows), "is a struct": pa.array([{"a": 1}] * rows)},
        "rating": {"is text": pa.array(["good"] * rows), "is a date": pa.array([0] * rows, pa.date32())},
        "timestamp": {
            "is a time of day": pa.array([1] * rows, pa.time64("us")),
            "is a duration": pa.array([1] * rows, pa.duration("s")),
            "is of a zone that is none": pa.array([1] * rows, pa.timestamp("us", tz="Mars/Phobos")),
        },
    }  # fmt: skip
    for column, kinds in types.items():
        for name, values in kinds.items():
            yield case_of(reader, f"Parquet whose {column} {name}", parquet_bytes(pa.table({**good, column: values})))
    wrong: dict[str, dict[str, Any]] = {
        "user_id": {"null": None, "blank": " ", "a NUL": "a\0b", "of 5000 letters": "u" * 5000},
        "item_id": {"null": None, "empty": "", "of 5000 letters": "i" * 5000},
        "rating": {"null": None, "NaN": float("nan"), "infinite": float("inf")},
        "timestamp": {"null": None},
    }
    for spot in (0, rows - 1):
        for column, values in wrong.items():
            for name, value in values.items():
                cells = [*good[column][:spot], value, *good[column][spot + 1 :]]
                raw = parquet_bytes(pa.table({**good, column: cells}))
                fault = f"Parquet whose {column} in row {spot + 1} is {name}"
                yield case_of(reader, fault, raw, rows=(spot + 1,), column=column)
