"""Readers of published sets, one for each form of files, each with small good files in the form of its set."""

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
    dat = cells("u=user", "i=movie", "r=rating", "t=timestamp", separator="::", header=False, quoted=False)
    movies = items_of("movie", "title", "genres", separator="::", header=False, quoted=False)
    roles = {"user": "user", "item": "movie", "rating": "rating", "time": "timestamp"}
    old = {"ratings.dat": dat.bytes(), "movies.dat": movies.bytes()}
    csv = cells("u=userId", "i=movieId", "r=rating", "t=timestamp", separator=",")
    names = {"user": "userId", "item": "movieId", "rating": "rating", "time": "timestamp"}
    new = {"ratings.csv": csv.bytes(), "movies.csv": items_of("movieId", "title", "genres", separator=",").bytes()}
    films = {"item": "movie", "title": "title"}
    return [
        Reader("ml-1m", "ratings.dat", dat, roles, loads("movielens-1m"), old, old=True),
        Reader("ml-1m-films", "movies.dat", movies, films, loads("movielens-1m"), old, old=True),
        Reader("ml-20m", "ratings.csv", csv, names, loads("movielens-20m"), new),
    ]


def _reviews() -> list[Reader]:
    amazon = {"user": "reviewerID", "item": "asin", "rating": "overall", "time": "unixReviewTime"}
    said = reviews("reviewerID", "asin", "overall", "unixReviewTime", None, reviewText="Good.", summary="ok")
    meta = named("asin", "title", brand="Acme", categories=[["A", "B"]])
    beauty = {"reviews_Beauty_5.json": object_lines(said), "meta_Beauty.json": object_lines(meta)}
    yelp = reviews("user_id", "business_id", "stars", "date", "2018-07-07 10:00:0{}", text="Good.")
    roles = {"user": "user_id", "item": "business_id", "rating": "stars", "time": "date"}
    return [
        Reader("amazon-2014", "reviews_Beauty_5.json", said, amazon, loads("amazon-2014"), beauty, python=True),
        Reader("amazon-2014-meta", "meta_Beauty.json", meta, {"item": "asin"}, loads("amazon-2014"), beauty, True),
        Reader("yelp", "yelp_academic_dataset_review.json", yelp, roles, loads("yelp")),
    ]


def _books() -> list[Reader]:
    shelf = Grid(
        ("user_id", "book_id", "is_read", "rating", "is_reviewed"),
        tuple((u, i, "1", r, "0") for u, i, r, _ in EVENTS),
        ",",
    )
    ids = Grid(("book_id_csv", "book_id"), tuple((i, i) for i in TITLES), ",")
    files = {
        "goodreads_interactions.csv": shelf.bytes(),
        "book_id_map.csv": ids.bytes(),
        "goodreads_books.json": object_lines(named("book_id", "title")),
    }
    rated = {"user": "user_id", "item": "book_id", "rating": "rating"}
    return [
        Reader("goodreads-csv", "goodreads_interactions.csv", shelf, rated, loads("goodreads"), files),
        Reader("goodreads-map", "book_id_map.csv", ids, {}, loads("goodreads"), files),
    ]


def _news() -> Reader:
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
    files = {"behaviors.tsv": logs.bytes(), "news.tsv": news.bytes()}
    return Reader("mind", "behaviors.tsv", logs, {"user": "user", "time": "time"}, loads("mind"), files)


@cache
def readers() -> tuple[Reader, ...]:
    return tuple([*tables(), *_movielens(), *_reviews(), *_books(), _news(), *ready_made()])
