"""Readers of data files with small valid files, from which the malformed ones are derived."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmrec.data.sets.table import load_data
from llmrec.recipe.schema import DataSection

USERS, ITEMS = 6, 6
EVENTS = [
    (f"u{user}", f"i{(user + step) % ITEMS}", str(1 + (user + 2 * step) % 5), str(1_700_000_000 + 1000 * user + step))
    for user in range(USERS)
    for step in range(4)
]
TITLES = {f"i{item}": f"Film {item} (199{item})" for item in range(ITEMS)}


@dataclass(frozen=True)
class Grid:
    """Rows of delimited text; without a header, the file does not contain the column names."""

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
"""Delimited text, one object per line, or the name of another kind of file."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A reader with valid files; ``roles`` are the names of its columns."""

    name: str
    file: str
    form: Form
    roles: Mapping[str, str]
    source: str = "table"
    others: Mapping[str, bytes] = field(default_factory=dict)
    python: bool = False  # Reads Python dictionaries instead of JSON.
    old: bool = False  # Reads bytes that are not UTF-8 as Latin-1.

    @property
    def kind(self) -> str:
        return "delimited" if isinstance(self.form, Grid) else self.form if isinstance(self.form, str) else "objects"

    @property
    def streamed(self) -> bool:
        """Whether it reads a published data set in blocks, also from an archive, and only the columns that it needs."""
        return self.source != "table"

    def read(self, file: Path) -> str:
        """Return the fingerprint of a table, or of the data set in the folder of a file."""
        path = file.parent if self.streamed and file.suffix != ".zip" else file
        return load_data(DataSection(source=self.source, path=str(path)), seed=0).fingerprint

    def good(self) -> bytes:
        if isinstance(self.form, Grid):
            return self.form.bytes()
        if self.form == "parquet":
            return parquet_bytes(pa.table(good_columns()))
        if isinstance(self.form, str):
            rows = [f"u{user} " + " ".join(f"i{(user + step) % ITEMS}" for step in range(4)) for user in range(USERS)]
            return "".join(f"{row}\n" for row in rows).encode()
        return object_lines(self.form)


def object_lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parquet_bytes(table: Any, **options: Any) -> bytes:
    stream = BytesIO()
    pq.write_table(table, stream, **options)
    return stream.getvalue()


def good_columns() -> dict[str, Any]:
    """Return the valid columns of a Parquet file."""
    users, items, ratings, times = zip(*EVENTS, strict=True)
    return {
        "user_id": list(users),
        "item_id": list(items),
        "rating": [float(rating) for rating in ratings],
        "timestamp": [int(time) for time in times],
        "title": [TITLES[item] for item in items],
    }


def cells(*order: str, separator: str, header: bool = True, quoted: bool = True) -> Grid:
    """Return the interactions with columns in the given order: LETTER=NAME for user, item, rating, time and title."""
    rows = [
        tuple(event["uirt".index(name[0])] if name[0] in "uirt" else TITLES[event[1]] for name in order)
        for event in EVENTS
    ]
    names = tuple(name.partition("=")[2] for name in order)
    return Grid(names, tuple(rows), separator, header, quoted)


def reviews(user: str, item: str, rating: str | None, clock: str, **more: Any) -> Records:
    return tuple(
        {user: who, item: what, "date": clock.format(when[-1])} | ({rating: int(stars)} if rating else {}) | more
        for who, what, stars, when in EVENTS
    )


@cache
def readers() -> tuple[Reader, ...]:
    roles = {"user": "user_id", "item": "item_id", "rating": "rating", "time": "timestamp", "title": "title"}
    comma = cells("u=user_id", "i=item_id", "r=rating", "t=timestamp", "x=title", separator=",")
    records = tuple(dict(zip(comma.names, row, strict=True)) for row in comma.rows)
    dat = cells("u=user", "i=movie", "r=rating", "t=timestamp", separator="::", header=False, quoted=False)
    old_roles = {"user": "user", "item": "movie", "rating": "rating", "time": "timestamp"}
    old_movies = {"movies.dat": "".join(f"{item}::{title}::Drama\n" for item, title in TITLES.items()).encode()}
    csv = cells("u=userId", "i=movieId", "r=rating", "t=timestamp", separator=",")
    new_roles = {"user": "userId", "item": "movieId", "rating": "rating", "time": "timestamp"}
    movies = "movieId,title,genres\n" + "".join(f"{item},{title},Drama\n" for item, title in TITLES.items())
    steam = reviews("username", "product_id", None, "2018-07-1{}", text="Good.")
    yelp = reviews("user_id", "business_id", "stars", "2018-07-07 10:00:0{}", text="Good.")
    yelp_roles = {"user": "user_id", "item": "business_id", "rating": "stars", "time": "date"}
    titles = "item_id\ttitle\n" + "".join(f"{item}\t{title}\n" for item, title in TITLES.items())
    return (
        Reader("table-csv", "events.csv", comma, roles),
        Reader("table-jsonl", "events.jsonl", records, roles),
        Reader("table-parquet", "events.parquet", "parquet", roles),
        Reader("ml-1m", "ratings.dat", dat, old_roles, "movielens-1m", old_movies, old=True),
        Reader("ml-20m", "ratings.csv", csv, new_roles, "movielens-20m", {"movies.csv": movies.encode()}),
        Reader(
            "steam", "steam_reviews.json", steam, {"user": "username", "item": "product_id"}, "steam", {}, python=True
        ),
        Reader("yelp", "yelp_academic_dataset_review.json", yelp, yelp_roles, "yelp"),
        Reader("sequences", "sequences.txt", "lines", {}, "sequences", {"items.tsv": titles.encode()}),
    )


@dataclass(frozen=True)
class Case:
    """A folder with a malformed file, and the row or line and the column that the error must name."""

    reader: Reader
    fault: str
    files: Mapping[str, bytes]
    make: Callable[[Path], None] | None = None  # Creates a link or a folder instead of a file.
    rows: tuple[int, ...] = ()
    column: str = ""

    @property
    def name(self) -> str:
        return f"{self.reader.name}: {self.fault}"


def case_of(reader: Reader, fault: str, raw: bytes, **more: Any) -> Case:
    return Case(reader, fault, {**reader.others, reader.file: raw}, **more)
