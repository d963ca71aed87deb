"""Ways to spoil a data file as a whole: as something else, in other encodings, as no file, packed, in Parquet."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from malformed_readers import Case, Reader, case_of, columns_of, parquet_bytes

Pack = Callable[[Path], None]


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
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        warnings.simplefilter("ignore")  # a name that stands twice is meant
        for name, raw in entries:
            archive.writestr(name, raw)
    return stream.getvalue()


def _changed(raw: bytes, start: int, length: int) -> bytes:
    return raw[:start] + bytes(byte ^ 0x55 for byte in raw[start : start + length]) + raw[start + length :]


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
        yield case_of(reader, f"it is {name}", raw)


def encodings(reader: Reader) -> Iterator[Case]:
    """Return good files in encodings that are not read."""
    if reader.kind == "parquet":
        return
    text = reader.good().decode()
    # With its mark, UTF-16 is read in tables of the user's own: tests/data/test_file_kinds.py.
    own = reader.name.startswith(("table", "init", "rank-items"))
    for name in (*(() if own else ("utf-16",)), "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "cp037"):
        yield case_of(reader, f"it is in {name}", text.encode(name))


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
        "a broken link": lambda path: path.symlink_to(path.with_name("gone")),
        "a link to endless zeros": lambda path: path.symlink_to("/dev/zero"),
        "a link to a folder": lambda path: path.symlink_to(path.parent),
    }
    for name, make in ways.items():
        yield Case(reader, f"it is {name}", {n: raw for n, raw in reader.others.items() if n != reader.file}, make)


# --------------------------------------------------------------------------- gzip

STORED_BOMB = 20
"""Members of one MiB that a bomb unpacks to."""


@cache
def bombs() -> Mapping[str, bytes]:
    size = 2**20
    kinds = {"zeros": bytes(size), "line ends": b"\n" * size, "letters": b"a" * size, "rows": b"a,b,1\n" * (size // 6)}
    return {f"a bomb of {name}": gzip.compress(raw) * STORED_BOMB for name, raw in kinds.items()}


def packed(reader: Reader) -> Iterator[Case]:
    """Return gzip files that are damaged, or larger than they look."""
    if reader.kind == "parquet":
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
        "with changed bytes": _changed(good, middle, 8),
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


def archives(reader: Reader) -> Iterator[Case]:
    """Return zip archives of the files, damaged or full of tricks."""
    files = {**reader.others, reader.file: reader.good()}
    entries = list(files.items())
    good = _zip(*entries)
    target = reader.file
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
        "with changed bytes": _changed(good, good.find(target.encode()) + len(target) + 4, 20),
        "with a file that leaves it": _zip(*first, (f"../../{reader.file}", reader.good())),
        "with an absolute name": _zip(*first, (f"/tmp/{reader.file}", reader.good())),
        "with a name of another system": _zip(*first, (f"..\\..\\{reader.file}", reader.good())),
        "with a link": _zip(*first, (link, b"/etc/passwd")),  # type: ignore[arg-type]
        "with a file twice": _zip(*entries, (target, b"other,things\n1,2\n")),
        "with a password": good.replace(b"PK\x03\x04\x14\x00\x00\x00", b"PK\x03\x04\x14\x00\x01\x00").replace(
            b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"
        ),
        "of another method": good[: start + 10] + b"\x63\x00" + good[start + 12 :],
        "with a name that is no text": _zip(*first, ("é" + target, b"x")).replace("é".encode(), b"\xff\xfe"),
        "with nothing that fits": _zip(("readme.txt", b"hello"), ("a/b.bin", b"x")),
        **{f"with a bomb of {name}": _zip(*first, (target, raw * 20)) for name, raw in bomb.items()},
        "with a packed bomb": _zip(*first, (target + ".gz", bombs()["a bomb of rows"])),
    }  # fmt: skip
    for name, raw in faults.items():
        yield Case(replace(reader, file="all.zip"), f"zip {name}", {"all.zip": raw})


# --------------------------------------------------------------------------- Parquet


def parquet_faults(reader: Reader) -> Iterator[Case]:
    """Return Parquet files that are damaged, or hold what cannot be used."""
    good = reader.good()
    size = int.from_bytes(good[-8:-4], "little")
    foot = len(good) - 8 - size

    def length(number: int) -> bytes:
        return good[:-8] + (number % 2**32).to_bytes(4, "little") + good[-4:]

    damaged = {
        "cut off in its head": good[:3],
        "of its head alone": good[:4],
        "cut off in the middle": good[: len(good) // 2],
        "cut off before its end": good[:-4],
        "cut off by a byte": good[:-1],
        "of two heads": b"PAR1PAR1",
        "with an empty foot": length(0),
        "with a foot beyond its beginning": length(len(good)),
        "with an endless foot": length(2**31 - 1),
        "with a negative foot": length(-1),
        "whose foot is zeros": good[:foot] + bytes(size) + good[-8:],
        "whose foot is noise": good[:foot] + _noise(size) + good[-8:],
        "whose foot is changed": _changed(good, foot, 40),
        "whose rows are changed": _changed(good, 4, 60),
        "without its rows": good[:4] + good[foot:],
        "that is encrypted": good[:-4] + b"PARE",
        "without its last magic": good[:-4] + b"xxxx",
        "of an endless nest": good[:foot] + b"\x19\x1c" * (size // 2) + b"\x00" * (size % 2) + good[-8:],
        "with a byte before it": b"x" + good,
        "in gzip without saying so": gzip.compress(good, mtime=0),
    }
    for name, raw in damaged.items():
        yield case_of(reader, f"Parquet {name}", raw)
    for name, (table, options) in _tables(columns_of(reader)).items():
        if name != "with other names" or not reader.name.startswith("init"):
            yield case_of(reader, f"Parquet {name}", parquet_bytes(table, **options))
    if not reader.requests and "user" in reader.roles:
        yield from _parquet_values(reader)


def _tables(columns: Mapping[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    names = list(columns)
    arrays = [pa.array(values) for values in columns.values()]
    rows = len(arrays[0])
    nested = pa.array([{"a": [{"b": 1}]}] * rows)
    many = pa.array(np.zeros(12_000_000, dtype=np.int8))
    # One text of 200,000 letters, which stands once in the file and in every row of the table.
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
    """Return Parquet files of which one value, or the type of one column, cannot be used."""
    good = columns_of(reader)
    rows = len(good["user_id"])
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"x", b"\xbe\xff"], pa.binary()).buffers())
    texts = pa.concat_arrays([broken, pa.array(["i"] * (rows - 2))])
    whole = {
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
    for column, kinds in whole.items():
        for name, values in kinds.items():
            # `llmrec init` looks for other columns then, and says which.
            if not reader.name.startswith("init") or name == "is not UTF-8":
                yield case_of(
                    reader, f"Parquet whose {column} {name}", parquet_bytes(pa.table({**good, column: values}))
                )
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
                yield case_of(
                    reader,
                    f"Parquet whose {column} in row {spot + 1} is {name}",
                    raw,
                    places=(spot + 1,),
                    column=column,
                )
