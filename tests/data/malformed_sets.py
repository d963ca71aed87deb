"""The published sets' readers, each with small good files in the form of its set."""

from __future__ import annotations

from functools import cache

from malformed_readers import (
    EVENTS,
    TITLES,
    USERS,
    Grid,
    Reader,
    cells,
    items_of,
    loads,
    named,
    object_lines,
    ready_made,
    reviews,
    tables,
)


def _movielens() -> list[Reader]:
    events = ("u=user", "i=movie", "r=rating", "t=timestamp")
    roles = {"user": "user", "item": "movie", "rating": "rating", "time": "timestamp"}
    films = {"item": "movie", "title": "title"}
    dat = cells(*events, separator="::", header=False, quoted=False)
    movies = items_of("movie", "title", "genres", separator="::", header=False, quoted=False)
    people = Grid(
        ("user", "gender", "age", "occupation", "zip"),
        tuple((f"u{user}", "F", "25", "3", "12345") for user in range(USERS)),
        "::",
        False,
        False,
    )
    old = {"ratings.dat": dat.bytes(), "movies.dat": movies.bytes(), "users.dat": people.bytes()}
    csv = cells("u=userId", "i=movieId", "r=rating", "t=timestamp", separator=",")
    listed = items_of("movieId", "title", "genres", separator=",")
    names = {"user": "userId", "item": "movieId", "rating": "rating", "time": "timestamp"}
    new = {"ratings.csv": csv.bytes(), "movies.csv": listed.bytes()}
    data = cells("u=user", "i=item", "r=rating", "t=timestamp", separator="\t", header=False, quoted=False)
    wide = ("id", "title", "released", "video", "link", *(f"g{n}" for n in range(19)))
    flags = Grid(
        wide, tuple((i, t, "1", "", "x", *("1" for _ in range(19))) for i, t in TITLES.items()), "|", False, False
    )
    first = {"u.data": data.bytes(), "u.item": flags.bytes()}
    own = {"user": "user", "item": "item", "rating": "rating", "time": "timestamp"}
    load_1m, load_20m = loads("movielens-1m"), loads("movielens-20m")
    load_small, load_100k = loads("movielens-small"), loads("movielens-100k")
    title = {"item": "movieId", "title": "title"}
    return [
        Reader("ml-100k", "u.data", data, own, load_100k, first, old=True),
        Reader("ml-100k-films", "u.item", flags, {"item": "id", "title": "title"}, load_100k, first, old=True),
        Reader("ml-small", "ratings.csv", csv, names, load_small, new),
        Reader("ml-small-films", "movies.csv", listed, title, load_small, new),
        Reader("ml-1m", "ratings.dat", dat, roles, load_1m, old, old=True),
        Reader("ml-1m-films", "movies.dat", movies, films, load_1m, old, old=True),
        Reader("ml-1m-people", "users.dat", people, {"user": "user"}, load_1m, old, old=True),
        Reader("ml-20m", "ratings.csv", csv, names, load_20m, new),
        Reader("ml-20m-films", "movies.csv", listed, title, load_20m, new),
    ]


def _published() -> list[Reader]:
    amazon = {"user": "reviewerID", "item": "asin", "rating": "overall", "time": "unixReviewTime"}
    said = reviews("reviewerID", "asin", "overall", "unixReviewTime", None, reviewText="Good.", summary="ok")
    meta = named("asin", "title", brand="Acme", categories=[["A", "B"]])
    beauty = {"reviews_Beauty_5.json": object_lines(said), "meta_Beauty.json": object_lines(meta)}
    new = reviews("user_id", "parent_asin", "rating", "timestamp", None, text="Good.")
    ratings = cells("u=user", "i=item", "r=rating", "t=timestamp", separator=",", header=False, quoted=False)
    names = {"user": "user", "item": "item", "rating": "rating", "time": "timestamp"}
    steam = reviews("username", "product_id", None, "date", "2017-12-1{}", text="Good.")
    yelp = reviews("user_id", "business_id", "stars", "date", "2018-07-07 10:00:0{}", text="Good.")
    day = "Fri Apr 19 08:15:1{} -0700 2013"
    books = reviews("user_id", "book_id", "rating", "date_added", day, review_text="Good.")
    shelf = Grid(
        ("user_id", "book_id", "is_read", "rating", "is_reviewed"),
        tuple((u, i, "1", r, "0") for u, i, r, _ in EVENTS),
        ",",
    )
    ids = Grid(("book_id_csv", "book_id"), tuple((i, i) for i in TITLES), ",")
    listed = {"book_id_map.csv": ids.bytes(), "goodreads_books.json": object_lines(named("book_id", "title"))}
    rated = {"user": "user_id", "item": "book_id", "rating": "rating"}
    return [
        Reader("amazon-2014", "reviews_Beauty_5.json", said, amazon, loads("amazon-2014"), beauty, python=True),
        Reader("amazon-2014-meta", "meta_Beauty.json", meta, {"item": "asin"}, loads("amazon-2014"), beauty, True),
        Reader("amazon-2014-csv", "ratings_Beauty.csv", ratings, names, loads("amazon-2014")),
        Reader("amazon-2018", "Beauty_5.json", said, amazon, loads("amazon-2018"), python=True),
        Reader(
            "amazon-2023",
            "Beauty.jsonl",
            new,
            {"user": "user_id", "item": "parent_asin", "rating": "rating", "time": "timestamp"},
            loads("amazon-2023"),
        ),
        Reader(
            "steam",
            "steam_reviews.json",
            steam,
            {"user": "username", "item": "product_id", "time": "date"},
            loads("steam"),
            python=True,
        ),
        Reader(
            "yelp",
            "yelp_academic_dataset_review.json",
            yelp,
            {"user": "user_id", "item": "business_id", "rating": "stars", "time": "date"},
            loads("yelp"),
        ),
        Reader("goodreads", "goodreads_reviews_poetry.json", books, rated | {"time": "date_added"}, loads("goodreads")),
        Reader("goodreads-csv", "goodreads_interactions.csv", shelf, rated, loads("goodreads"), listed),
        Reader(
            "goodreads-map",
            "book_id_map.csv",
            ids,
            {},
            loads("goodreads"),
            {**listed, "goodreads_interactions.csv": shelf.bytes()},
        ),
    ]


def _music_and_news() -> list[Reader]:
    listens = cells("u=userID", "i=artistID", "r=weight", separator="\t", quoted=False)
    artists = items_of("id", "name", "url", separator="\t", quoted=False)
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
            loads("lastfm-2k"),
            two,
        ),
        Reader("lastfm-2k-artists", "artists.dat", artists, {"item": "id"}, loads("lastfm-2k"), two),
        Reader(
            "lastfm-1k",
            "userid-timestamp-artid-artname-traid-traname.tsv",
            plays,
            {"user": "userid", "time": "timestamp"},
            loads("lastfm-1k", duplicates="keep_last"),
        ),
        Reader("mind", "behaviors.tsv", logs, {"user": "user", "time": "time"}, loads("mind"), mind),
        Reader("mind-news", "news.tsv", news, {"item": "id"}, loads("mind"), mind),
    ]


@cache
def readers() -> tuple[Reader, ...]:
    return tuple([*tables(), *_movielens(), *_published(), *_music_and_news(), *ready_made()])
