"""Readers of data files, each with small good files of its own: what the malformed ones are made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from llmrec.data.assemble import read_items
from llmrec.data.request_file import open_requests
from llmrec.data.requests import read_request
from llmrec.data.sets.table import load
from llmrec.errors import DataError
from llmrec.recipe.schema import Columns, DataSection, Split
from llmrec.types import Item

pytest.importorskip("llmrec.start", reason="the extension is not there")

from llmrec.start.init import init

Files = dict[str, bytes]


class Refused(dict[int, str]):
    """Lines of a file of requests that were refused, each with the reason, beside what was read from the others."""

    found: tuple[object, ...] = ()


USERS, ITEMS = 6, 6
EVENTS = [
    (f"u{user}", f"i{(user + step) % ITEMS}", str(1 + (user + 2 * step) % 5), str(1_700_000_000 + 1000 * user + step))
    for user in range(USERS)
    for step in range(4)
]


@dataclass(frozen=True)
class Grid:
    """Rows of delimited text.

    Attributes:
        names: Names of the columns, whether they stand in the file or not.
        rows: The cells.
        separator: Between cells.
        header: Whether the names stand in the first line.
        quoted: Whether double quotes open a field.
    """

    names: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    separator: str
    header: bool = True
    quoted: bool = True

    def lines(self) -> list[str]:
        head = [self.separator.join(self.names)] if self.header else []
        return [*head, *(self.separator.join(row) for row in self.rows)]

    def bytes(self) -> bytes:
        return "".join(f"{line}\n" for line in self.lines()).encode()


Records = tuple[Mapping[str, Any], ...]
Form = Grid | Records | str
"""Delimited text, one object a line, or (as the name of its kind) a file that is written by other means."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A reader with the files that it reads.

    Attributes:
        name: Of the reader and of the file that is spoiled for it.
        file: The file that is spoiled.
        form: What stands in it.
        roles: What its columns are called: user, item, rating, time, title.
        read: Reads the file, or the folder around it, and returns something to compare; of requests `Refused`.
        others: The files beside it.
        python: Whether Python dictionaries are read in place of JSON.
        old: Whether bytes that are no UTF-8 are read as Latin-1.
        requests: Whether bad rows are refused one by one.
    """

    name: str
    file: str
    form: Form
    roles: Mapping[str, str]
    read: Callable[[Path], object]
    others: Files = field(default_factory=dict)
    python: bool = False
    old: bool = False
    requests: bool = False

    @property
    def kind(self) -> str:
        return "delimited" if isinstance(self.form, Grid) else self.form if isinstance(self.form, str) else "objects"

    @property
    def streamed(self) -> bool:
        """Whether it reads a published set, also in an archive, of which only the needed columns are looked at."""
        return not self.requests and not self.name.startswith(("table", "init", "rank-items"))

    def good(self) -> bytes:
        if isinstance(self.form, Grid):
            return self.form.bytes()
        if self.form == "parquet":
            return parquet_of(self)
        if isinstance(self.form, str):
            return sequence_lines()
        return object_lines(self.form)


def object_lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def sequence_lines() -> bytes:
    rows = [f"u{user} " + " ".join(f"i{(user + step) % ITEMS}" for step in range(4)) for user in range(USERS)]
    return "".join(f"{row}\n" for row in rows).encode()


def parquet_bytes(table: Any, **options: Any) -> bytes:
    stream = BytesIO()
    pq.write_table(table, stream, **options)
    return stream.getvalue()


def columns_of(reader: Reader) -> dict[str, Any]:
    """Return the good columns of a Parquet file."""
    if reader.requests:
        lists = [record["candidates"] for record in REQUESTS]
        return {"id": [record["id"] for record in REQUESTS], "candidates": lists}
    if "user" not in reader.roles:
        return {"item_id": list(TITLES), "title": list(TITLES.values())}
    users, items, ratings, times = zip(*EVENTS, strict=True)
    return {
        "user_id": list(users),
        "item_id": list(items),
        "rating": [float(rating) for rating in ratings],
        "timestamp": [int(time) for time in times],
        "title": [TITLES[item] for item in items],
    }


def parquet_of(reader: Reader) -> bytes:
    return parquet_bytes(pa.table(columns_of(reader)))


# --------------------------------------------------------------------------- good files

TITLES = {f"i{item}": f"Film {item} (199{item})" for item in range(ITEMS)}
REQUESTS: Records = tuple(
    {"id": f"r{n}", "history": ["i0", "i1"], "candidates": ["i2", "i3", f"i{4 + n % 2}"]} for n in range(8)
)


def cells(*order: str, separator: str, header: bool = True, quoted: bool = True) -> Grid:
    """Return the interactions with their columns in some order: letters of user, item, rating, time and title."""
    places = "uirt"
    rows = []
    for event in EVENTS:
        row = [event[places.index(name[0])] if name[0] in places else TITLES[event[1]] for name in order]
        rows.append(tuple(row))
    names = tuple(name.partition("=")[2] for name in order)
    return Grid(names, tuple(rows), separator, header, quoted)


def items_of(*names: str, separator: str, header: bool = True, quoted: bool = True) -> Grid:
    """Return items: id, title, and a word in every further column."""
    rows = tuple((item, title, *("Drama" for _ in names[2:])) for item, title in TITLES.items())
    return Grid(names, rows, separator, header, quoted)


def reviews(user: str, item: str, rating: str | None, time: str, clock: str | None, **more: Any) -> Records:
    rows = []
    for who, what, stars, when in EVENTS:
        row: dict[str, Any] = {user: who, item: what, time: int(when) if clock is None else clock.format(int(when[-1]))}
        if rating is not None:
            row[rating] = int(stars)
        rows.append({**row, **more})
    return tuple(rows)


def named(item: str, title: str, **more: Any) -> Records:
    return tuple({item: name, title: words, **more} for name, words in TITLES.items())


def loads(source: str, **keys: Any) -> Callable[[Path], object]:
    """Return a call of a source on the folder around a file."""

    def read(file: Path) -> object:
        where = file if file.suffix == ".zip" else file.parent
        return load(DataSection(source=source, path=str(where), **keys), seed=0).fingerprint

    return read


def _table(file: Path) -> object:
    return load(DataSection(source="table", path=str(file)), seed=0).fingerprint


def _table_of_items(file: Path) -> object:
    columns = Columns(fields=("genres",))
    section = DataSection(source="table", path=str(file.with_name("e.csv")), items=str(file), columns=columns)
    return load(section, seed=0).fingerprint


def _init(file: Path) -> object:
    made = init(str(file), out=file.with_name("recipe.yaml"), name="mine", force=True, backend="hf")
    return yaml.safe_load(made.recipe.read_text(encoding="utf-8"))["data"] | {"path": ""}


def _rank_items(file: Path) -> object:
    return read_items(file)


def _requests(file: Path) -> Refused:
    """Do what `llmrec rank` does with a file of requests before it asks a model."""
    known = {name: Item(item_id=name, title=title) for name, title in (*TITLES.items(), ("1", "Heat"))}
    refused, found = Refused(), []
    for number, raw in enumerate(open_requests(file), start=1):
        if raw.error or raw.record is None:
            refused[raw.line] = raw.error
            continue
        try:
            found.append(read_request(raw.record, number, known))
        except DataError as error:
            refused[raw.line] = str(error)
    refused.found = tuple(found)
    return refused


# --------------------------------------------------------------------------- the readers

_ROLES = {"user": "user_id", "item": "item_id", "rating": "rating", "time": "timestamp", "title": "title"}
_FOUR = ("u=user_id", "i=item_id", "r=rating", "t=timestamp", "x=title")


def tables() -> list[Reader]:
    comma = cells(*_FOUR, separator=",")
    records = tuple(dict(zip(comma.names, row, strict=True)) for row in comma.rows)
    things = items_of("item_id", "title", "genres", separator=",")
    names = {"item": "item_id", "title": "title"}
    plain = cells(*_FOUR[:4], separator=",").bytes()
    return [
        Reader("table-csv", "events.csv", comma, _ROLES, _table),
        Reader("table-jsonl", "events.jsonl", records, _ROLES, _table),
        Reader("table-parquet", "events.parquet", "parquet", _ROLES, _table),
        Reader("table-items", "items.csv", things, names, _table_of_items, {"e.csv": plain}),
        Reader("init-csv", "events.csv", comma, _ROLES, _init),
        Reader("init-jsonl", "events.jsonl", records, _ROLES, _init),
        Reader("rank-items-csv", "items.csv", things, names, _rank_items),
    ]


def ready_made() -> list[Reader]:
    things = items_of("item_id", "title", "genres", separator="\t")
    train = Grid(
        ("user_id", "history", "target"),
        tuple((f"u{n}", f"i{n % 6} i{(n + 1) % 6}", f"i{(n + 2) % 6}") for n in range(USERS)),
        "\t",
    )
    held = Grid(train.names, (("u0", "i0 i1 i2", "i3"), ("u1", "i1 i2 i3", "i4")), "\t")
    last = Grid(train.names, (("u0", "i0 i1 i2 i3", "i4"), ("u1", "i1 i2 i3 i4", "i5")), "\t")
    files = {
        "train.tsv": train.bytes(), "valid.tsv": held.bytes(), "test.tsv": last.bytes(), "items.tsv": things.bytes(),
    }  # fmt: skip
    given = loads("samples", split=Split(kind="given"))
    csv = Grid(
        ("id", "history", "candidates"),
        tuple((str(r["id"]), "|".join(r["history"]), "|".join(r["candidates"])) for r in REQUESTS),
        ",",
    )
    asked = {"requests": True}
    return [
        Reader("sequences", "sequences.txt", "lines", {}, loads("sequences"), {"items.tsv": things.bytes()}),
        Reader("samples-train", "train.tsv", train, {}, given, files),
        Reader("requests-jsonl", "asked.jsonl", REQUESTS, {}, _requests, **asked),
        Reader("requests-csv", "asked.csv", csv, {}, _requests, **asked),
        Reader("requests-parquet", "asked.parquet", "parquet", {}, _requests, **asked),
    ]


# --------------------------------------------------------------------------- what is wrong


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
    make: Callable[[Path], None] | None = None
    places: tuple[int, ...] = ()
    column: str = ""
    line: int = 0

    @property
    def name(self) -> str:
        return f"{self.reader.name}: {self.fault}"


def case_of(reader: Reader, fault: str, raw: bytes, **more: Any) -> Case:
    return Case(reader, fault, {**reader.others, reader.file: raw}, **more)
