"""Published data sets, from small files in the official formats: folders, gzip, zip and malformed files."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_cases import archive, dicts, folder, lines
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.dataset import Dataset
from llmrec.data.read.files import DataFile, normalise_file_name
from llmrec.data.read.table import read_blocks
from llmrec.data.read.text import TextFormat
from llmrec.data.sets import pages as sets
from llmrec.data.sets.locate import match_wildcard
from llmrec.data.sets.pages import DatasetSize
from llmrec.data.sets.table import load_data
from llmrec.data.split import split_dataset
from llmrec.errors import DataError, ErrorKind, RecipeError
from llmrec.recipe.schema import Columns, DataSection, Split
from llmrec.registry import SOURCES
from tests.facts import Facts, raises

Files = dict[str, bytes]


ML_1M: Files = {
    "ratings.dat": lines("1::10::5::978300760", "1::20::3::978302109", "2::10::4::978301968", "2::30::1::978300275"),
    "movies.dat": (
        "10::Fugitive, The (1993)::Drama|Thriller\n20::Café au Lait (1993)::Comedy\n30::Babylon 5::Sci-Fi\n"
        "40::Never Rated (1990)::Drama\n"
    ).encode("latin-1"),
    "users.dat": lines("1::F::1::10::48067", "2::M::56::16::70072", "3::M::25::15::55117"),
}
ML_CSV: Files = {
    "ratings.csv": lines(
        "userId,movieId,rating,timestamp", "1,10,4.5,978300760", "1,20,0.5,978302109", "2,10,3.0,978301968"
    ),
    "movies.csv": lines(
        "movieId,title,genres",
        '10,"Postman, The (Postino, Il) (1994)",Comedy|Drama',
        "20,Babylon 5,(no genres listed)",
        '30,"Say ""Hi"" (2000)",Drama',
    ),
}
STEAM: Files = {
    "steam_reviews.json": dicts(
        {"username": "Chaos", "hours": 22.4, "product_id": "725280", "date": "2017-12-17", "text": "Good &amp; short"},
        {"username": "Chaos", "product_id": "328100", "date": "2018-01-02", "text": "", "early_access": False},
        {"username": "₮ʜᴇ", "product_id": "725280", "date": "2018-01-02", "text": "It's ok", "user_id": "765611"},
    ).replace(b"{'username'", b"{u'username'"),
    "steam_games.json": dicts(
        {"id": "725280", "app_name": "Lost &amp; Found", "genres": ["Action", "Indie"], "developer": "A &lt; B"},
        {"id": "328100", "title": "Reversion", "release_date": "2014-12-05", "specs": None},
        {"app_name": "no id at all", "id": "1"},
    ),
}
YELP: Files = {
    "yelp_academic_dataset_review.json": lines(
        {"review_id": "r1", "user_id": "u1", "business_id": "b1"}
        | {"stars": 3.0, "text": "ok", "date": "2018-07-07 22:09:11"},
        {"review_id": "r2", "user_id": "u1", "business_id": "b2"}
        | {"stars": 5, "text": "great", "date": "2019-01-01 00:00:00"},
        {"review_id": "r3", "user_id": "u2", "business_id": "b1", "stars": 1.0, "text": "no", "date": "2017-01-01"},
    ),
    "yelp_academic_dataset_business.json": lines(
        {"business_id": "b1", "name": "Apple's Café", "city": "Tucson", "categories": "Bars, Food", "stars": 2.0},
        {"business_id": "b2", "name": "Zed", "city": "Reno", "categories": None, "attributes": {"a": "b"}},
        {"business_id": "b3", "name": "Unvisited", "city": "Reno", "categories": ""},
    ),
}


def goodreads_row(user: str, book: str, rating: int, day: str, **more: object) -> dict[str, object]:
    return {"user_id": user, "book_id": book, "review_id": "r", "rating": rating, "date_added": day} | more


DAY = "Fri Apr {} 08:15:15 -0700 2013"
GOODREADS: Files = {
    "goodreads_reviews_poetry.json": lines(
        goodreads_row("u1", "402", 5, DAY.format(19), review_text="Lovely"),
        goodreads_row("u1", "403", 0, DAY.format(12), review_text=""),
        goodreads_row("u2", "402", 3, DAY.format(5), review_text="So so"),
    ),
    "goodreads_books_poetry.json": lines(
        {"book_id": "402", "title": "Cats", "publication_year": "1982", "publisher": "HB", "average_rating": "4.2"},
        {"book_id": "403", "title": "", "title_without_series": "Hours", "publication_year": "", "format": "Paperback"},
    ),
}
GOODREADS_CSV: Files = {
    "goodreads_interactions.csv": lines(
        "user_id,book_id,is_read,rating,is_reviewed", "0,1,1,5,0", "0,2,1,0,0", "1,1,0,3,0"
    ),
    "book_id_map.csv": lines("book_id_csv,book_id", "1,402", "2,403", "402,1"),
    "goodreads_books.json": lines({"book_id": "402", "title": "Cats"}, {"book_id": "1", "title": "Wrong"}),
}
LASTFM_2K: Files = {
    "user_artists.dat": lines("userID\tartistID\tweight", "2\t51\t13883", "2\t52\t11690", "3\t51\t1"),
    "artists.dat": lines(
        "id\tname\turl\tpictureURL", '51\tDuran "2" Duran\thttp://x\thttp://y', "52\tMorcheeba\t\t", "53\tAir\t\t"
    ),
}
LASTFM_1K: Files = {
    "userid-timestamp-artid-artname-traid-traname.tsv": lines(
        "user_000001\t2009-05-04T23:08:57Z\tf1b1\tDeep Dish\t\tFuck Me Im Famous",
        "user_000001\t2009-05-04T13:54:10Z\t\tNo Id\tt2\tComposition 7",
        "user_000002\t2009-05-03T15:48:25Z\tf1b1\tDeep Dish\t\tOther",
    ),
    "userid-profile.tsv": lines(
        "#id\tgender\tage\tcountry\tregistered", "user_000001\tm\t\tJapan\tAug 13, 2006", "user_000002\tf\t19\tPeru\t"
    ),
}
MIND: Files = {
    "behaviors.tsv": lines(
        "1\tU1\t11/11/2019 9:05:58 AM\tN1 N2\tN3-0 N4-1",
        "2\tU1\t11/10/2019 11:05:58 PM\tN1 N2\tN5-1 N3-1",
        "3\tU2\t11/13/2019 12:36:57 PM\t\tN1-1 N2-0",
    ),
    "news.tsv": lines(
        *[f"N{n}\tnews\tworld\tTitle &amp; {n}\tText\thttp://x\t[]\t[]" for n in range(1, 6)],
        'N6\tlife\tpets\tA "quoted" title\t\thttp://x\t[]\t[]',
    ),
}
SETS: Mapping[str, Files] = {
    "movielens-1m": ML_1M,
    "movielens-32m": ML_CSV,
    "steam": STEAM,
    "yelp": YELP,
    "goodreads": GOODREADS,
    "lastfm-2k": LASTFM_2K,
    "lastfm-1k": LASTFM_1K,
    "mind": MIND,
}
KNOWN = {page.name: page for page in sets.known_formats()}


def read(source: str, path: Path | None, **keys: Any) -> Dataset:
    return load_data(DataSection(source=source, path=str(path) if path else None, **keys), seed=0)


def titles(data: Dataset) -> dict[str, str]:
    return {key: item.title for key, item in data.items.items()}


def rows(data: Dataset) -> list[tuple[Any, ...]]:
    return data.interactions.rows()


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "no cache"))


# --------------------------------------------------------------------------- content of each data set


def test_movielens_1m(tmp_path: Path) -> None:
    data = read("movielens-1m", folder(tmp_path, ML_1M))
    assert rows(data)[0] == ("1", "10", 5.0, 978300760.0, None) and len(rows(data)) == 4
    assert titles(data) == {"10": "The Fugitive (1993)", "20": "Café au Lait (1993)", "30": "Babylon 5"}
    assert data.items["10"].fields == {"genres": "Drama, Thriller", "year": "1993"}
    assert data.items["30"].fields == {"genres": "Sci-Fi", "year": "unknown"}
    assert data.users == {
        "1": {"age": "under 18", "gender": "female", "occupation": "K-12 student"},
        "2": {"age": "56 or older", "gender": "male", "occupation": "self-employed"},
    }
    assert (data.noun, data.rating_scale, data.made) == ("movies", (1.0, 5.0), False)
    assert "GroupLens" in data.provenance["licence"] and data.provenance["rows"] == "4"
    assert data.fingerprint.startswith("957be8a95eec")


def test_movielens_csv(tmp_path: Path) -> None:
    data = read("movielens-32m", folder(tmp_path, ML_CSV))
    assert titles(data) == {"10": "The Postman (Il Postino) (1994)", "20": "Babylon 5"}
    assert data.items["20"].fields == {"genres": "unknown", "year": "unknown"}
    assert data.users == {} and data.rating_scale == (0.5, 5.0)
    assert data.fingerprint == read("movielens-small", tmp_path).fingerprint


def test_steam(tmp_path: Path) -> None:
    data = read("steam", folder(tmp_path, STEAM))
    assert rows(data) == [
        ("Chaos", "725280", None, 1513468800.0, "Good & short"),
        ("Chaos", "328100", None, 1514851200.0, None),
        ("₮ʜᴇ", "725280", None, 1514851200.0, "It's ok"),
    ]
    assert titles(data) == {"725280": "Lost & Found", "328100": "Reversion"}
    assert data.items["725280"].fields == {"genres": "Action, Indie", "developer": "A < B", "release_date": ""}
    assert data.rating_scale is None


def test_games_without_id_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # The published file has two such rows: 75 and 30,962.
    blank = dicts({"app_name": "Lost", "genres": ["Action"]}, {"id": "", "title": "", "url": "http://a.b/app/"})
    data = read("steam", folder(tmp_path, {**STEAM, "steam_games.json": blank + STEAM["steam_games.json"]}))
    assert titles(data) == {"725280": "Lost & Found", "328100": "Reversion"}
    assert "2 rows of " in data.provenance["notes"]
    assert caplog.text.count("have no id and are ignored") == 1


def test_yelp(tmp_path: Path) -> None:
    data = read("yelp", folder(tmp_path, YELP))
    assert rows(data)[0] == ("u1", "b1", 3.0, 1531001351.0, "ok")
    assert rows(data)[2][3] == 1483228800.0
    assert titles(data) == {"b1": "Apple's Café", "b2": "Zed"}
    assert data.items["b2"].fields == {"categories": "", "city": "Reno"}


def test_goodreads_reviews(tmp_path: Path) -> None:
    data = read("goodreads", folder(tmp_path, GOODREADS))
    assert data.name == "goodreads-poetry"
    assert rows(data) == [
        ("u1", "402", 5.0, 1366384515.0, "Lovely"),
        ("u1", "403", None, 1365779715.0, None),
        ("u2", "402", 3.0, 1365174915.0, "So so"),
    ]
    assert titles(data) == {"402": "Cats", "403": "Hours"}
    assert data.items["402"].fields == {"year": "1982", "publisher": "HB", "format": ""}


def test_goodreads_csv_joins_books_through_the_map(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = read("goodreads", folder(tmp_path, GOODREADS_CSV))
    assert titles(data) == {"1": "Cats", "2": "2"}  # book 1 of the other file is a different book
    assert "1 of 2 items have no title" in data.provenance["notes"] and "1 of 2 items" in caplog.text
    assert data.interactions["rating"].to_list() == [5.0, None, 3.0]
    assert "a seeded hash orders the items of a user" in data.provenance["notes"]


def test_lastfm_2k_does_not_depend_on_row_order(tmp_path: Path) -> None:
    data = read("lastfm-2k", folder(tmp_path / "a", LASTFM_2K))
    assert titles(data) == {"51": 'Duran "2" Duran', "52": "Morcheeba"}
    assert data.interactions["rating"].null_count() == 3 and data.interactions["timestamp"].to_list() == [0.0] * 3
    head, *body = LASTFM_2K["user_artists.dat"].splitlines(keepends=True)
    turned = folder(tmp_path / "b", {**LASTFM_2K, "user_artists.dat": head + b"".join(reversed(body))})
    assert read("lastfm-2k", turned).fingerprint == data.fingerprint


def test_lastfm_1k(tmp_path: Path) -> None:
    data = read("lastfm-1k", folder(tmp_path, LASTFM_1K))
    assert titles(data) == {"f1b1": "Deep Dish", "No Id": "No Id"}
    assert rows(data)[1][:2] == ("user_000001", "No Id") and rows(data)[0][3] == 1241478537.0
    assert data.users == {
        "user_000001": {"age": "", "gender": "male", "country": "Japan"},
        "user_000002": {"age": "19", "gender": "female", "country": "Peru"},
    }


def test_mind_orders_history_before_clicks(tmp_path: Path) -> None:
    data = read("mind", folder(tmp_path, MIND))
    order = [item for user, item, *_ in rows(data) if user == "U1"]
    assert order == ["N1", "N2", "N5", "N3", "N4"]
    assert not data.has_time and titles(data)["N1"] == "Title & 1"
    assert data.items["N1"].fields == {"category": "news", "subcategory": "world"}
    assert data.fingerprint.startswith("b2d4f45355dc")
    cut = split_dataset(data, Split(), seed=0)
    assert [held.item_id for held in cut.holdouts("test")] == ["N4"]
    assert [event.item_id for event in cut.history("U1", "valid")] == ["N1", "N2", "N5"]


@pytest.mark.parametrize(
    ("old", "new", "facts"),
    [
        (b"N4-1", b"N1-1", Facts("duplicate", line=1, says="data.duplicates=keep_last")),
        (b"N4-1", b"N4", Facts("bad-value", line=1, column="impressions", says="use the train or dev split")),
        (b"11/11/2019 9", b"2019-11-11 9", Facts("bad-value", row=1, column="time")),
        (b"\tN1-1 N2-0", b"", Facts("ragged-row", row=3)),
    ],
)
def test_mind_errors(tmp_path: Path, old: bytes, new: bytes, facts: Facts) -> None:
    files = {**MIND, "behaviors.tsv": MIND["behaviors.tsv"].replace(old, new, 1)}
    with raises(DataError, replace(facts, file="behaviors.tsv")):
        read("mind", folder(tmp_path, files))


# --------------------------------------------------------------------------- locations of the files


@pytest.mark.parametrize("source", SETS)
def test_folder_gzip_and_zip_give_same_data(tmp_path: Path, source: str) -> None:
    files = SETS[source]
    plain = folder(tmp_path / "plain", files)
    data = read(source, plain)
    main = next(iter(files))
    packed = folder(tmp_path / "packed", files, packed=True)
    inside = (*KNOWN[source].folders, "")[0]
    around = tmp_path / "around"
    folder(around / inside, files)
    ways = [plain / main, packed, packed / f"{main}.gz", around]
    ways += [archive(tmp_path / "a.zip", files), archive(tmp_path / "b.zip", files, top="", packed=True)]
    for way in ways:
        again = read(source, way)
        assert again.fingerprint == data.fingerprint, way
        assert again.interactions.equals(data.interactions) and again.items == data.items and again.users == data.users
    assert len(data.provenance["sha256"].split("; ")) == len(files)


def test_cache_folder_is_used_without_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    ways = ("ml-1m.zip", "https://grouplens.org/", "terms: GroupLens")
    with raises(DataError, Facts("missing-key", column="data.path", says=ways)):
        read("movielens-1m", None)
    (tmp_path / "data").mkdir()
    archive(tmp_path / "data" / "ml-1m.zip", ML_1M)
    assert len(read("movielens-1m", None).items) == 3


def test_wrong_folder_names_missing_file_and_download_page(tmp_path: Path) -> None:
    page = KNOWN["goodreads"]
    (tmp_path / "notes.txt").write_text("nothing here")
    parts = (page.layouts[0].events.files[0], page.page, page.licence)
    with raises(DataError, Facts("missing-file", tmp_path, column="data.path", says=parts)):
        read("goodreads", tmp_path)
    with raises(DataError, Facts("missing-file", "nowhere", column="data.path")):
        read("goodreads", tmp_path / "nowhere")


def test_missing_files_of_a_set(tmp_path: Path) -> None:
    with raises(DataError, Facts("missing-file", tmp_path / "a", says=("movies.dat.gz", "ml-1m.zip"))):
        read("movielens-1m", folder(tmp_path / "a", {"ratings.dat": ML_1M["ratings.dat"]}))
    without = {name: raw for name, raw in ML_1M.items() if name != "users.dat"}
    assert read("movielens-1m", folder(tmp_path / "b", without)).users == {}


def test_several_interaction_files_are_ambiguous(tmp_path: Path) -> None:
    both = {**GOODREADS, **GOODREADS_CSV, "goodreads_reviews_spoiler.json": b"{}"}
    names = "goodreads_reviews_poetry.json, goodreads_interactions.csv"
    with raises(DataError, Facts("ambiguous", tmp_path, says=names)):
        read("goodreads", folder(tmp_path, both))
    assert read("goodreads", tmp_path / "goodreads_reviews_poetry.json").name == "goodreads-poetry"


def test_items_from_another_folder(tmp_path: Path) -> None:
    main = folder(tmp_path / "a", {"steam_reviews.json": STEAM["steam_reviews.json"]})
    folder(tmp_path / "b", {"games.json": STEAM["steam_games.json"]}, packed=True)
    data = read("steam", main, items=str(tmp_path / "b" / "games.json.gz"))
    assert data.fingerprint == read("steam", folder(tmp_path / "c", STEAM)).fingerprint
    with raises(DataError, Facts("missing-file", "lost.json")):
        read("steam", main, items=str(tmp_path / "lost.json"))
    with raises(DataError, Facts("contradiction", column="data.items")):
        read("lastfm-1k", folder(tmp_path / "d", LASTFM_1K), items="x.tsv")


def test_columns_cannot_be_renamed(tmp_path: Path) -> None:
    with raises(DataError, Facts("contradiction", column="data.columns")):
        read("yelp", folder(tmp_path, YELP), columns=Columns(rating="useful"))
    with raises(DataError, Facts("unknown-name", column="data.columns.text", says="are: text; use one of them")):
        read("yelp", tmp_path, columns=Columns(text="useful"))
    assert read("yelp", tmp_path, columns=Columns(text="none")).interactions["text"].null_count() == 3


# --------------------------------------------------------------------------- times, encodings, order


@pytest.mark.parametrize("source", ["movielens-1m", "movielens-32m", "steam", "lastfm-1k"])
def test_row_order_does_not_matter(tmp_path: Path, source: str) -> None:
    files = SETS[source]
    main = next(iter(files))
    body = files[main].splitlines(keepends=True)
    head = [body.pop(0)] if main.endswith(".csv") else []
    random.Random(3).shuffle(body)
    moved = {**files, main: b"".join(head + body)}
    one, other = read(source, folder(tmp_path / "a", files)), read(source, folder(tmp_path / "b", moved))
    assert one.fingerprint == other.fingerprint
    cuts = [
        split_dataset(data, Split(kind="global_time", valid=0.0, test=0.34), seed=0).fingerprint
        for data in (one, other)
    ]
    assert cuts[0] == cuts[1]


def test_milliseconds_become_seconds(tmp_path: Path) -> None:
    slow = ML_1M["ratings.dat"]
    fast = b"".join(line.rstrip(b"\n") + b"000\n" for line in slow.splitlines(keepends=True))
    one = read("movielens-1m", folder(tmp_path / "a", ML_1M))
    other = read("movielens-1m", folder(tmp_path / "b", {**ML_1M, "ratings.dat": fast}))
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize("first", ["seconds", "milliseconds"])
def test_mixed_time_units_are_an_error(tmp_path: Path, first: str) -> None:
    body = ML_1M["ratings.dat"].replace(b"978302109", b"978302109000")
    if first == "milliseconds":
        body = body.replace(b"978300760", b"978300760000")
    row = 2 if first == "seconds" else 3
    with raises(DataError, Facts("bad-value", "ratings.dat", row, "timestamp", says=f"begins with {first}")):
        read("movielens-1m", folder(tmp_path, {**ML_1M, "ratings.dat": body}))


def test_latin1_set_saved_as_utf8(tmp_path: Path) -> None:
    films = ML_1M["movies.dat"].decode("latin-1").encode()
    one, other = (
        read("movielens-1m", folder(tmp_path / name, files))
        for name, files in (("a", ML_1M), ("b", {**ML_1M, "movies.dat": films}))
    )
    assert one.items == other.items


# --------------------------------------------------------------------------- malformed files


Change = tuple[str, str, bytes, bytes, Facts]
REVIEWS, BUSINESSES = YELP
LISTENS = next(iter(LASTFM_1K))
CAFE = "Café au Lait (1993)".encode("latin-1")
BROKEN: list[Change] = [
    ("movielens-1m", "ratings.dat", b"1::20::3", b"1::20::bad", Facts("bad-value", row=2, column="rating")),
    ("movielens-1m", "ratings.dat", b"1::20::3::", b"1::20::9::", Facts("bad-value", row=2, column="rating")),
    ("movielens-1m", "ratings.dat", b"1::20::3::", b"1::99::3::", Facts("unknown-name", row=2, column="item_id")),
    ("movielens-1m", "ratings.dat", b"1::20::3::", b"1::10::3::", Facts("duplicate", row=2, says="of row 1")),
    ("movielens-1m", "ratings.dat", b"1::20::3::978302109", b"1::20::3", Facts("ragged-row", row=2)),
    ("movielens-1m", "movies.dat", CAFE, b" ", Facts("missing-value", row=2, column="title")),
    ("movielens-1m", "users.dat", b"2::M", b"::M", Facts("missing-value", row=2, column="user")),
    ("movielens-32m", "ratings.csv", b"978302109", b"97 http://x", Facts("bad-value", None, 2, "timestamp", line=3)),
    ("movielens-32m", "ratings.csv", b"movieId", b"film", Facts("missing-column", column="movieId")),
    ("movielens-32m", "movies.csv", b'"Say ""Hi""', b'"Say "Hi', Facts("syntax", row=3, line=4)),
    ("yelp", REVIEWS, b'"stars": 5', b'"stars": "x"', Facts("bad-value", row=2, column="stars")),
    ("yelp", REVIEWS, b"2019-01-01 00", b"2019-13-01 00", Facts("bad-value", row=2, column="date")),
    ("yelp", REVIEWS, b'"great"', b'"\\ud83d"', Facts("encoding", row=2, column="text")),
    ("yelp", REVIEWS, b'"user_id"', b'"who"', Facts("missing-column", column="user_id", says="are: review_id, who")),
    ("yelp", REVIEWS, b"great", b"gr\xe9at", Facts("encoding", line=2, says="0xe9")),
    ("yelp", REVIEWS, b'"r1", "user_id"', b'"r1", "x": "y"}\n{"user_id"', Facts("missing-column", column="user_id")),
    ("yelp", BUSINESSES, b'"name": "Zed"', b'"name": "Zed', Facts("syntax", row=2)),
    ("steam", "steam_reviews.json", b"'328100'", b"open('x')", Facts("syntax", row=2)),
    ("lastfm-2k", "user_artists.dat", b"2\t52\t11690", b"2\t52", Facts("ragged-row", row=2, line=3)),
    ("lastfm-1k", LISTENS, b"\tNo Id\t", b"\t\t", Facts("missing-value", row=2, column="artid", says="'artname'")),
]


@pytest.mark.parametrize(("source", "name", "old", "new", "facts"), BROKEN)
def test_malformed_files(tmp_path: Path, source: str, name: str, old: bytes, new: bytes, facts: Facts) -> None:
    assert old in SETS[source][name]
    path = folder(tmp_path, {**SETS[source], name: SETS[source][name].replace(old, new, 1)})
    with raises(DataError, replace(facts, file=path / name)):
        read(source, path)


def test_file_content_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    evil = f"{{'username': __import__('pathlib').Path({str(mark)!r}).touch(), 'product_id': '1'}}\n".encode()
    with raises(DataError, Facts("syntax", "steam_reviews.json", 1)):
        read("steam", folder(tmp_path, {**STEAM, "steam_reviews.json": evil}))
    assert not mark.exists()


def test_damaged_and_empty_files(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", ML_CSV, packed=True)
    main = path / "ratings.csv.gz"
    main.write_bytes(main.read_bytes()[:-12])
    with raises(DataError, Facts("damaged", main)):
        read("movielens-25m", path)
    main.write_bytes(gzip.compress(b"userId,movieId,rating,timestamp\n"))
    with raises(DataError, Facts("empty", main)):
        read("movielens-25m", path)
    (tmp_path / "x.zip").write_bytes(b"PK no zip at all")
    with raises(DataError, Facts("damaged", tmp_path / "x.zip")):
        read("movielens-25m", tmp_path / "x.zip")


def test_endless_line_is_rejected_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrec.data.read.text.BLOCK", 64)
    monkeypatch.setattr("llmrec.data.read.text.MAX_LINE_BYTES", 200)
    path = folder(tmp_path, {**YELP, "yelp_academic_dataset_review.json": b'{"user_id": "' + b"x" * 1000})
    with raises(DataError, Facts("too-large", REVIEWS, says="200 bytes")):
        read("yelp", path)


# --------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("source", SETS)
def test_block_size_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    data = read(source, folder(tmp_path, SETS[source]))
    monkeypatch.setattr("llmrec.data.read.text.BLOCK", 1)
    again = read(source, tmp_path)
    assert again.interactions.equals(data.interactions) and again.items == data.items and again.users == data.users


cells = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\ufeff"), max_size=6)


def as_csv(row: dict[str, str]) -> str:
    return ",".join('"' + value.replace('"', '""') + '"' for value in (row["a"], row["b"]))


@given(
    st.lists(st.fixed_dictionaries({"a": cells, "b": cells}), min_size=1, max_size=8),
    st.sampled_from(["json", "dicts", "python", "csv"]),
    st.integers(1, 40),
    st.booleans(),
)
def test_written_rows_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, str]], kind: str, size: int, gaps: bool
) -> None:
    write: Callable[[dict[str, str]], str] = {"csv": as_csv, "python": ascii}.get(kind, json.dumps)  # type: ignore[assignment]
    head = "a,b\n" if kind == "csv" else ""
    path = tmp_path_factory.mktemp("blocks") / "x"
    path.write_bytes((head + ("\n\n" if gaps else "\n").join(write(row) for row in values)).encode())
    form = TextFormat(kind={"csv": "delimited", "python": "dicts"}.get(kind, kind), quoted=True)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmrec.data.read.text.BLOCK", size)
        results = list(read_blocks(DataFile("x", path), form, {"b": "text", "a": "text"}))
    assert [row for block in results for row in block.frame.iter_rows(named=True)] == values
    if kind != "csv":
        step = 2 if gaps else 1
        assert [line for block in results for line in block.lines] == list(range(1, step * len(values) + 1, step))
        assert results[-1].where(results[-1].frame.height - 1).row == len(values)


def test_errors_count_rows_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrec.data.read.text.BLOCK", 40)
    body = b"\n".join(b"1::%d::3::978300760" % number for number in range(10)) + b"\n\n1::77::x::978300760\n"
    with raises(DataError, Facts("bad-value", "ratings.dat", 11, "rating", line=12)):
        read("movielens-1m", folder(tmp_path, {**ML_1M, "ratings.dat": body}))
    again = body.replace(b"77::x", b"5::3")
    movies = b"".join(b"%d::Film %d (2000)::Drama\n" % (number, number) for number in range(10))
    path = folder(tmp_path, {**ML_1M, "ratings.dat": again, "movies.dat": movies})
    with raises(DataError, Facts("duplicate", "ratings.dat", 11, line=12, says="of row 6")):
        read("movielens-1m", path)


# --------------------------------------------------------------------------- published counts


def test_different_counts_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = read("movielens-1m", folder(tmp_path, ML_1M))
    note = data.provenance["published"]
    assert note.startswith("published: 6,040 users / 3,706 items / 1,000,209 interactions (the set's README); here: ")
    assert "here: 2 users / 3 items / 4 interactions. This is expected if the file was filtered" in note
    assert note in caplog.text


def counted(tmp_path: Path, rows: int) -> str:
    """Return a page of MovieLens-1M with other counts."""
    page = tmp_path / "small.yaml"
    counts = f"{{origin: a page, files: {{ratings.dat: [2, 3, {rows}]}}}}"
    page.write_text(f"base: movielens-1m\ncounts: {counts}\n", encoding="utf-8")
    return str(page)


def test_equal_counts_give_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = read(counted(tmp_path, 4), folder(tmp_path, ML_1M), filter={"min_rating": 2})
    assert data.provenance["published"] == "as published: 2 users / 3 items / 4 interactions (a page)"
    assert data.interactions.height == 3 and not caplog.records  # counts are taken before the filter


def test_repeated_rows_count(tmp_path: Path) -> None:
    twice = {**ML_1M, "ratings.dat": ML_1M["ratings.dat"] + b"1::10::2::978400000\n"}
    data = read(counted(tmp_path, 5), folder(tmp_path, twice), duplicates="keep_last")
    assert data.provenance["published"].startswith("as published") and data.interactions.height == 4


@pytest.mark.parametrize(
    ("published", "counted", "same"),
    [
        (DatasetSize(10, 20, 30, ""), DatasetSize(10, 20, 31, ""), False),
        (DatasetSize(None, None, 30, ""), DatasetSize(1, 2, 30, ""), True),
        (DatasetSize(94_800, 25_600, 814_600, "", rounded=True), DatasetSize(94_762, 25_612, 814_586, ""), True),
        (DatasetSize(94_800, 25_600, 814_600, "", rounded=True), DatasetSize(94_762, 25_612, 814_686, ""), False),
        (DatasetSize(253, 356, 2_500, "", rounded=True), DatasetSize(253, 356, 2_535, ""), True),
        (DatasetSize(253, 356, 2_500, "", rounded=True), DatasetSize(254, 356, 2_500, ""), False),
    ],
)
def test_agreement(published: DatasetSize, counted: DatasetSize, same: bool) -> None:
    assert published.agrees(counted) is same


def test_published_counts_belong_to_files_that_a_source_reads() -> None:
    for source, known in KNOWN.items():
        patterns = [pattern for layout in known.layouts for pattern in layout.events.files]
        for file in known.counts.files if known.counts else ():
            assert any(match_wildcard(pattern, file) is not None for pattern in patterns), (source, file)
            assert normalise_file_name(file) == file


PAGE = """
noun: songs
scale: [1, 5]
layouts:
- events:
    files: [plays.txt]
    form: {kind: delimited, separator: ";", columns: [who, what, stars, when]}
    user: who
    item: [what]
    rating: stars
    time: when
    clock: ["%d.%m.%Y"]
  items:
    files: [songs.json]
    form: {kind: json}
    item: id
    titles: [name]
    attributes: [{name: band, column: artist}]
"""
SONGS: Files = {
    "plays.txt": lines("ann;1;4;05.01.2020", "ann;2;2;06.01.2020", "bob;1;5;07.01.2020"),
    "songs.json": lines({"id": "1", "name": "Blue", "artist": "A"}, {"id": "2", "name": "Red", "artist": "B"}),
}


def test_user_page_describes_files(tmp_path: Path) -> None:
    page = tmp_path / "songs.yaml"
    page.write_text(PAGE, encoding="utf-8")
    data = read(str(page), folder(tmp_path, SONGS))
    assert data.noun == "songs" and data.interactions.height == 3
    assert data.items["1"].title == "Blue" and data.items["2"].fields == {"band": "B"}
    assert data.interactions["timestamp"].to_list()[0] == 1578182400.0


@pytest.mark.parametrize(
    ("change", "kind", "column"),
    [
        (("noun: songs", "nuon: songs"), "unknown-key", "nuon"),
        (("user: who", "user: [who, what]"), "bad-value", "layouts.0.events.user"),
        (("column: artist", 'column: artist, keep: "("'), "contradiction", "keep"),
        (("layouts:", "base: movielens-9m\nlayouts:"), "missing-file", None),
        (('separator: ";"', 'separator: ""'), "bad-value", "separator"),
        (('separator: ";"', 'encodings: [utf9], separator: ";"'), "contradiction", "encodings"),
    ],
)
def test_malformed_page_is_rejected(
    tmp_path: Path, change: tuple[str, str], kind: ErrorKind, column: str | None
) -> None:
    page = tmp_path / "songs.yaml"
    page.write_text(PAGE.replace(*change), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read(str(page), folder(tmp_path, SONGS))
    assert caught.value.kind == kind
    if column is not None:
        assert column in str(caught.value.column) and "songs.yaml" in str(caught.value)


def test_user_page_with_base(tmp_path: Path) -> None:
    page = tmp_path / "mine.yaml"
    page.write_text("base: movielens-10m\nnoun: films\n", encoding="utf-8")
    assert sets.read_known_format(str(page)).noun == "films" and sets.read_known_format(str(page)).scale == (0.5, 5.0)
    with pytest.raises(DataError) as caught:
        load_data(DataSection(source=str(page)), seed=0)
    assert caught.value.column == "data.path"


def test_missing_page_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml does not exist"):
        read(str(tmp_path / "none.yaml"), tmp_path)


def test_shipped_pages_are_consistent() -> None:
    for name, known in KNOWN.items():
        assert name in SOURCES and known.page.startswith("http") and known.licence and known.fetch
        for layout in known.layouts:
            events = layout.events
            named = [events.user, *events.item, events.rating, events.time, *events.texts, events.title]
            if events.form.columns:
                assert {column for column in named if column} <= set(events.form.columns), name
            items = layout.items
            if items is not None and items.form.columns:
                columns = {column for attribute in items.attributes for column in attribute.columns}
                assert {items.item, *items.titles} | columns <= set(items.form.columns), name
