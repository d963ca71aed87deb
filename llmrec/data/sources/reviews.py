"""Reviews as people wrote them: one category of the Amazon 5-core sets of 2014, with texts, headlines and stars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import polars as pl

from llmrec.data.assemble import assemble, catalogue
from llmrec.data.dataset import Dataset, Review
from llmrec.data.derived import NAMES, TITLES, keyphrases
from llmrec.data.reading.limits import is_no_text
from llmrec.data.reading.markup import plain
from llmrec.data.reading.objects import json_object
from llmrec.data.reading.table import read_table
from llmrec.data.reading.text import Table, decode, read_bytes, user_path
from llmrec.data.reading.typed import ids, numbers, texts
from llmrec.errors import DataError, Place
from llmrec.recipe.schema import Columns, DataSection
from llmrec.types import Item

_NEEDED = ("reviewerID", "asin", "reviewText", "overall", "unixReviewTime")
_TEXT, _HEADLINE = "reviewText", "summary"
_SCALE = (1.0, 5.0)


def amazon_reviews(section: DataSection, *, seed: int) -> Dataset:
    """Load a file of the 2014 form, one JSON object a line, gzipped or plain.

    HTML entities are decoded once. Ratings are stars from 1 to 5, times are by the day, texts are whole reviews;
    headlines and keyphrases stand in `Dataset.reviews`. Names of reviewers are not read: the split makes pseudonyms.
    Titles come from ``data.items``, a table with item_id and title; without one the split makes them of training
    reviews.

    Raises:
        DataError: If the file is missing or damaged, or holds a row that cannot be used.
        MissingExtra: If the package that extracts keyphrases is not installed.
    """
    if section.path is None:
        raise DataError(
            "source 'amazon-reviews' reads one category's 5-core reviews, a file such as "
            "reviews_Musical_Instruments_5.json.gz; set data.path=FILE",
            kind="missing-key",
            column="data.path",
        )
    own = Columns(title=section.columns.title, fields=section.columns.fields)
    if section.columns != own:
        raise DataError(
            "source 'amazon-reviews' knows the columns of its file; of data.columns it takes title and fields alone, "
            "which name columns of data.items, so leave the others out",
            kind="contradiction",
            column="data.columns",
        )
    main = _read(user_path(section.path))
    listed = read_table(user_path(section.items)) if section.items is not None else None
    series = {
        "user_id": ids(main, "reviewerID"),
        "item_id": ids(main, "asin"),
        "rating": numbers(main, "overall", "rating"),
        "timestamp": numbers(main, "unixReviewTime", "time"),
    }
    given = texts(main, _TEXT)
    series["text"] = given.set(given.str.strip_chars() == "", None)
    frame = pl.DataFrame(series)
    items = (
        {item: Item(item_id=item, title=item) for item in frame["item_id"].unique()}
        if listed is None
        else catalogue(section, main, frame["item_id"], listed)
    )
    dataset = assemble(
        section,
        main,
        frame,
        items,
        {},
        name="amazon-reviews",
        noun="products",
        scale=_SCALE,
        provenance={
            "source": "amazon-reviews",
            "path": main.name if listed is None else f"{main.name}; {listed.name}",
            "sha256": main.sha256 if listed is None else f"{main.sha256}; {listed.sha256}",
            "rows": str(main.frame.height),
            "made": "no",
            "derived": _said(listed is None),
            "licence": "research use; the reviews may not be passed on",
        },
    )
    headlines = (
        frame.with_columns(texts(main, _HEADLINE).alias("headline")) if _HEADLINE in main.frame.columns else None
    )
    derives = frozenset({NAMES, TITLES} if listed is None else {NAMES})
    return replace(dataset, reviews=_reviews(dataset.interactions, headlines), derives=derives)


def _said(titles: bool) -> str:
    made = "features and sentences (keyphrases), user names (pseudonyms)"
    return f"titles (keyphrases of training reviews), {made}" if titles else made


def _reviews(rows: pl.DataFrame, headlines: pl.DataFrame | None) -> dict[tuple[str, str], Review]:
    above: dict[tuple[str, str], str] = {}
    if headlines is not None:
        # Of a pair that stands twice the latest row was kept, and its headline is the one that is written last here.
        latest = headlines.with_row_index("_row").sort("timestamp", "_row")
        above = {(user, item): said for user, item, said in latest.select("user_id", "item_id", "headline").iter_rows()}
    told = [(user, item, text or "") for user, item, text in rows.select("user_id", "item_id", "text").iter_rows()]
    found = keyphrases([text for *_, text in told])
    return {
        (user, item): Review(text=text, headline=" ".join(above.get((user, item), "").split()), phrases=phrases)
        for (user, item, text), phrases in zip(told, found, strict=True)
    }


def _read(path: Path) -> Table:
    """Read the columns that are needed; the others hold names, votes and dates in words."""
    raw, sha256 = read_bytes(path)
    name = str(path)
    rows: dict[str, list[str]] = {key: [] for key in (*_NEEDED, _HEADLINE)}
    lines: list[int] = []
    for number, line in enumerate(decode(name, raw, header=0).split("\n"), start=1):
        if not line.strip():
            continue
        place = Place(name, line=number)
        record = json_object(place, line)
        for key, values in rows.items():
            values.append(_text(place, key, record))
        lines.append(number)
    if not lines:
        raise DataError.at(name, "empty", " is empty; fetch the file again")
    return Table(name, pl.DataFrame(rows, schema=dict.fromkeys(rows, pl.String)), sha256, lines)


def _text(place: Place, key: str, record: Mapping[str, object]) -> str:
    if key not in record and key in _NEEDED and key != _TEXT:
        raise DataError.at(
            place,
            "missing-column",
            f" has no {key!r}; this source reads the 5-core reviews of 2014, with the keys {', '.join(_NEEDED)}",
            key,
        )
    value = record.get(key)
    if value is not None and not isinstance(value, str | int | float):
        raise DataError.at(
            place,
            "bad-value",
            f": {key!r} is a nested value, and must be one text or number; fetch the file again",
            key,
        )
    text = "" if value is None else plain(str(value))
    if is_no_text(text):
        raise DataError.at(
            place,
            "encoding",
            f": {key!r} holds a character that is no text (NUL or half of a surrogate); remove it",
            key,
        )
    return text
