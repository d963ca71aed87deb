"""Every reader of data files, each with small good files of its own: what the malformed ones are made from."""

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

from llmrec.build.init import init
from llmrec.data.items import read_items
from llmrec.data.request_files import open_requests
from llmrec.data.requests import read_request
from llmrec.data.sources import load
from llmrec.errors import DataError
from llmrec.recipe import DataSection, Split
from llmrec.types import Item

Files = dict[str, bytes]
Refused = Mapping[int, str]
"""Lines of a file of requests that were refused, each with the reason."""

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


@dataclass(frozen=True)
class Reader:
    """A reader with the files that it reads.

    Attributes:
        name: Of the reader and of the file that is spoiled for it.
        file: The file that is spoiled.
        form: What stands in it.
        roles: What its columns are called: user, item, rating, time, title.
        read: Reads the folder.
        others: The files beside it.
        python: Whether Python dictionaries are read in place of JSON.
        old: Whether bytes that are no UTF-8 are read as Latin-1.
        strict: Whether ratings must lie on a scale.
        requests: Whether bad rows are refused one by one.
        single: Whether an item that appears once is looked up; files of items only look at those.
    """

    name: str
    file: str
    form: Form
    roles: Mapping[str, str]
    read: Callable[[Path], Refused]
    others: Files = field(default_factory=dict)
    python: bool = False
    old: bool = False
    strict: bool = False
    requests: bool = False

    @property
    def kind(self) -> str:
        return "delimited" if isinstance(self.form, Grid) else self.form if isinstance(self.form, str) else "objects"

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


def _cells(*order: str, separator: str, header: bool = True, quoted: bool = True, more: str = "") -> Grid:
    """Return the interactions with their columns in some order: letters of user, item, rating, time and title."""
    places = "uirt"
    rows = []
    for event in EVENTS:
        row = [event[places.index(name[0])] if name[0] in places else TITLES[event[1]] for name in order]
        rows.append(tuple(row))
    names = tuple(name.partition("=")[2] for name in order)
    return Grid(names, tuple(rows), separator, header, quoted)


def _items(*names: str, separator: str, header: bool = True, quoted: bool = True) -> Grid:
    """Return items: id, title, and a word in every further column."""
    rows = tuple((item, title, *("Drama" for _ in names[2:])) for item, title in TITLES.items())
    return Grid(names, rows, separator, header, quoted)


def _reviews(user: str, item: str, rating: str | None, time: str, clock: str | None, **more: Any) -> Records:
    rows = []
    for who, what, stars, when in EVENTS:
        row: dict[str, Any] = {user: who, item: what, time: int(when) if clock is None else clock.format(int(when[-1]))}
        if rating is not None:
            row[rating] = int(stars)
        rows.append({**row, **more})
    return tuple(rows)


def _named(item: str, title: str, **more: Any) -> Records:
    return tuple({item: name, title: words, **more} for name, words in TITLES.items())


def _load(source: str, path: str = "", items: str | None = None, **keys: Any) -> Callable[[Path], Refused]:
    """Return a call of a source on a folder, or on a file in it."""

    def read(folder: Path) -> Refused:
        named = str(folder / items) if items is not None else None
        load(DataSection(source=source, path=str(folder / path), items=named, **keys), seed=0)
        return {}

    return read


def _table(file: str) -> Callable[[Path], Refused]:
    return _load("table", file)


def _init(file: str) -> Callable[[Path], Refused]:
    def read(folder: Path) -> Refused:
        init(str(folder / file), out=folder / "recipe.yaml", name="mine", force=True, backend="hf")
        return {}

    return read


def _rank_items(file: str) -> Callable[[Path], Refused]:
    def read(folder: Path) -> Refused:
        read_items(folder / file)
        return {}

    return read


def _requests(file: str) -> Callable[[Path], Refused]:
    """Return what `llmrec rank` does with a file of requests before it asks a model."""
    known = {name: Item(item_id=name, title=title) for name, title in TITLES.items()}

    def read(folder: Path) -> Refused:
        refused = {}
        for number, raw in enumerate(open_requests(folder / file), start=1):
            if raw.error or raw.record is None:
                refused[raw.line] = raw.error
                continue
            try:
                read_request(raw.record, number, known)
            except DataError as error:
                refused[raw.line] = str(error)
        return refused

    return read


# --------------------------------------------------------------------------- the readers

_ROLES = {"user": "user_id", "item": "item_id", "rating": "rating", "time": "timestamp", "title": "title"}
_FOUR = ("u=user_id", "i=item_id", "r=rating", "t=timestamp", "x=title")


def _tables() -> list[Reader]:
    comma, tab = _cells(*_FOUR, separator=","), _cells(*_FOUR, separator="\t")
    records = tuple(dict(zip(comma.names, row, strict=True)) for row in comma.rows)
    things = _items("item_id", "title", "genres", separator=",")
    rows = tuple(dict(zip(things.names, row, strict=True)) for row in things.rows)
    names = {"item": "item_id", "title": "title"}
    plain = _cells(*_FOUR[:4], separator=",").bytes()
    listed = {"items": "items.csv", "columns": {"fields": ("genres",)}}
    return [
        Reader("table-csv", "events.csv", comma, _ROLES, _table("events.csv")),
        Reader("table-tsv", "events.tsv", tab, _ROLES, _table("events.tsv")),
        Reader("table-jsonl", "events.jsonl", records, _ROLES, _table("events.jsonl")),
        Reader("table-parquet", "events.parquet", "parquet", _ROLES, _table("events.parquet")),
        Reader("table-items", "items.csv", things, names, _load("table", "e.csv", **listed), {"e.csv": plain}),
        Reader("init-csv", "events.csv", comma, _ROLES, _init("events.csv")),
        Reader("init-jsonl", "events.jsonl", records, _ROLES, _init("events.jsonl")),
        Reader("init-parquet", "events.parquet", "parquet", _ROLES, _init("events.parquet")),
        Reader("rank-items-csv", "items.csv", things, names, _rank_items("items.csv")),
        Reader("rank-items-jsonl", "items.jsonl", rows, names, _rank_items("items.jsonl")),
        Reader("rank-items-parquet", "items.parquet", "parquet", names, _rank_items("items.parquet")),
    ]


def _movielens() -> list[Reader]:
    events = ("u=user", "i=movie", "r=rating", "t=timestamp")
    roles = {"user": "user", "item": "movie", "rating": "rating", "time": "timestamp"}
    films = {"item": "movie", "title": "title"}
    dat = _cells(*events, separator="::", header=False, quoted=False)
    movies = _items("movie", "title", "genres", separator="::", header=False, quoted=False)
    people = Grid(
        ("user", "gender", "age", "occupation", "zip"),
        tuple((f"u{user}", "F", "25", "3", "12345") for user in range(USERS)),
        "::",
        False,
        False,
    )
    old = {"ratings.dat": dat.bytes(), "movies.dat": movies.bytes(), "users.dat": people.bytes()}
    csv = _cells("u=userId", "i=movieId", "r=rating", "t=timestamp", separator=",")
    listed = _items("movieId", "title", "genres", separator=",")
    names = {"user": "userId", "item": "movieId", "rating": "rating", "time": "timestamp"}
    new = {"ratings.csv": csv.bytes(), "movies.csv": listed.bytes()}
    data = _cells("u=user", "i=item", "r=rating", "t=timestamp", separator="\t", header=False, quoted=False)
    wide = ("id", "title", "released", "video", "link", *(f"g{n}" for n in range(19)))
    flags = Grid(
        wide, tuple((i, t, "1", "", "x", *("1" for _ in range(19))) for i, t in TITLES.items()), "|", False, False
    )
    first = {"u.data": data.bytes(), "u.item": flags.bytes()}
    own = {"user": "user", "item": "item", "rating": "rating", "time": "timestamp"}
    load_1m, load_20m = _load("movielens-1m"), _load("movielens-20m")
    load_small, load_100k = _load("movielens-small"), _load("movielens-100k")
    title, strict = {"item": "movieId", "title": "title"}, {"strict": True}
    return [
        Reader("ml-100k", "u.data", data, own, load_100k, first, old=True, strict=True),
        Reader("ml-100k-films", "u.item", flags, {"item": "id", "title": "title"}, load_100k, first, old=True),
        Reader("ml-small", "ratings.csv", csv, names, load_small, new, **strict),
        Reader("ml-small-films", "movies.csv", listed, title, load_small, new),
        Reader("ml-1m", "ratings.dat", dat, roles, load_1m, old, old=True, strict=True),
        Reader("ml-1m-films", "movies.dat", movies, films, load_1m, old, old=True),
        Reader("ml-1m-people", "users.dat", people, {"user": "user"}, load_1m, old, old=True),
        Reader("ml-20m", "ratings.csv", csv, names, load_20m, new, **strict),
        Reader("ml-20m-films", "movies.csv", listed, title, load_20m, new),
    ]


def _published() -> list[Reader]:
    amazon = {"user": "reviewerID", "item": "asin", "rating": "overall", "time": "unixReviewTime"}
    reviews = _reviews("reviewerID", "asin", "overall", "unixReviewTime", None, reviewText="Good.", summary="ok")
    meta = _named("asin", "title", brand="Acme", categories=[["A", "B"]])
    beauty = {"reviews_Beauty_5.json": object_lines(reviews), "meta_Beauty.json": object_lines(meta)}
    new = _reviews("user_id", "parent_asin", "rating", "timestamp", None, text="Good.")
    ratings = _cells("u=user", "i=item", "r=rating", "t=timestamp", separator=",", header=False, quoted=False)
    names = {"user": "user", "item": "item", "rating": "rating", "time": "timestamp"}
    steam = _reviews("username", "product_id", None, "date", "2017-12-1{}", text="Good.")
    yelp = _reviews("user_id", "business_id", "stars", "date", "2018-07-07 10:00:0{}", text="Good.")
    day = "Fri Apr 19 08:15:1{} -0700 2013"
    books = _reviews("user_id", "book_id", "rating", "date_added", day, review_text="Good.")
    shelf = Grid(
        ("user_id", "book_id", "is_read", "rating", "is_reviewed"),
        tuple((u, i, "1", r, "0") for u, i, r, _ in EVENTS),
        ",",
    )
    ids = Grid(("book_id_csv", "book_id"), tuple((i, i) for i in TITLES), ",")
    listed = {"book_id_map.csv": ids.bytes(), "goodreads_books.json": object_lines(_named("book_id", "title"))}
    rated = {"user": "user_id", "item": "book_id", "rating": "rating"}
    strict = {"strict": True}
    return [
        Reader(
            "amazon-2014", "reviews_Beauty_5.json", reviews, amazon, _load("amazon-2014"), beauty, python=True, **strict
        ),
        Reader("amazon-2014-meta", "meta_Beauty.json", meta, {"item": "asin"}, _load("amazon-2014"), beauty, True),
        Reader("amazon-2014-csv", "ratings_Beauty.csv", ratings, names, _load("amazon-2014"), **strict),
        Reader("amazon-2018", "Beauty_5.json", reviews, amazon, _load("amazon-2018"), python=True, **strict),
        Reader(
            "amazon-2023",
            "Beauty.jsonl",
            new,
            {"user": "user_id", "item": "parent_asin", "rating": "rating", "time": "timestamp"},
            _load("amazon-2023"),
            **strict,
        ),
        Reader(
            "steam",
            "steam_reviews.json",
            steam,
            {"user": "username", "item": "product_id", "time": "date"},
            _load("steam"),
            python=True,
        ),
        Reader(
            "yelp",
            "yelp_academic_dataset_review.json",
            yelp,
            {"user": "user_id", "item": "business_id", "rating": "stars", "time": "date"},
            _load("yelp"),
            **strict,
        ),
        Reader(
            "goodreads", "goodreads_reviews_poetry.json", books, rated | {"time": "date_added"}, _load("goodreads")
        ),
        Reader("goodreads-csv", "goodreads_interactions.csv", shelf, rated, _load("goodreads"), listed, **strict),
        Reader(
            "goodreads-map",
            "book_id_map.csv",
            ids,
            {},
            _load("goodreads"),
            {**listed, "goodreads_interactions.csv": shelf.bytes()},
        ),
    ]


def _music_and_news() -> list[Reader]:
    listens = _cells("u=userID", "i=artistID", "r=weight", separator="\t", quoted=False)
    artists = _items("id", "name", "url", separator="\t", quoted=False)
    two = {"user_artists.dat": listens.bytes(), "artists.dat": artists.bytes()}
    stamp = "2009-05-04T23:08:{:02d}Z"
    plays = Grid(
        ("userid", "timestamp", "artid", "artname", "traid", "traname"),
        tuple((u, stamp.format(n), i, TITLES[i], "t", "Track") for n, (u, i, _, _) in enumerate(EVENTS)),
        "\t",
        False,
        False,
    )
    logs = Grid(
        ("impression", "user", "time", "history", "impressions"),
        tuple(
            (str(n), f"u{n}", f"11/1{n}/2019 8:15:0{n} AM", f"i{n % 6} i{(n + 1) % 6}", f"i{(n + 2) % 6}-1 i5-0")
            for n in range(USERS)
        ),
        "\t",
        False,
        False,
    )
    news = Grid(
        ("id", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities"),
        tuple((i, "news", "world", t, "", "", "[]", "[]") for i, t in TITLES.items()),
        "\t",
        False,
        False,
    )
    mind = {"behaviors.tsv": logs.bytes(), "news.tsv": news.bytes()}
    return [
        Reader(
            "lastfm-2k",
            "user_artists.dat",
            listens,
            {"user": "userID", "item": "artistID"},
            _load("lastfm-2k"),
            two,
        ),
        Reader("lastfm-2k-artists", "artists.dat", artists, {"item": "id"}, _load("lastfm-2k"), two),
        Reader(
            "lastfm-1k",
            "userid-timestamp-artid-artname-traid-traname.tsv",
            plays,
            {"user": "userid", "time": "timestamp"},
            _load("lastfm-1k", duplicates="keep_last"),
        ),
        Reader("mind", "behaviors.tsv", logs, {"user": "user", "time": "time"}, _load("mind"), mind),
        Reader("mind-news", "news.tsv", news, {"item": "id"}, _load("mind"), mind),
    ]


def _ready_made() -> list[Reader]:
    things = _items("item_id", "title", "genres", separator="\t")
    train = Grid(
        ("user_id", "history", "target"),
        tuple((f"u{n}", f"i{n % 6} i{(n + 1) % 6}", f"i{(n + 2) % 6}") for n in range(USERS)),
        "\t",
    )
    held = Grid(train.names, (("u0", "i0 i1 i2", "i3"), ("u1", "i1 i2 i3", "i4")), "\t")
    last = Grid(train.names, (("u0", "i0 i1 i2 i3", "i4"), ("u1", "i1 i2 i3 i4", "i5")), "\t")
    names = {"item": "item_id", "title": "title"}
    files = {
        "train.tsv": train.bytes(), "valid.tsv": held.bytes(), "test.tsv": last.bytes(), "items.tsv": things.bytes(),
    }  # fmt: skip
    given = _load("samples", split=Split(kind="given"))
    csv = Grid(
        ("id", "history", "candidates"),
        tuple((str(r["id"]), "|".join(r["history"]), "|".join(r["candidates"])) for r in REQUESTS),
        ",",
    )
    asked = {"requests": True}
    return [
        Reader("sequences", "sequences.txt", "lines", {}, _load("sequences"), {"items.tsv": things.bytes()}),
        Reader("sequences-items", "items.tsv", things, names, _load("sequences"), {"sequences.txt": sequence_lines()}),
        Reader("samples-train", "train.tsv", train, {}, given, files),
        Reader("samples-valid", "valid.tsv", held, {}, given, files),
        Reader("requests-jsonl", "asked.jsonl", REQUESTS, {}, _requests("asked.jsonl"), **asked),
        Reader("requests-csv", "asked.csv", csv, {}, _requests("asked.csv"), **asked),
        Reader("requests-parquet", "asked.parquet", "parquet", {}, _requests("asked.parquet"), **asked),
    ]


@cache
def readers() -> tuple[Reader, ...]:
    return tuple([*_tables(), *_movielens(), *_published(), *_music_and_news(), *_ready_made()])
