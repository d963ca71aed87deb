"""Loads a category of the Amazon 5-core review data of 2014, with texts, headlines and stars."""

from __future__ import annotations

from dataclasses import replace

import polars as pl

from llmrec.data.assemble import build_catalogue, build_dataset, build_provenance, check_column_settings
from llmrec.data.dataset import Dataset, Review
from llmrec.data.derived import NAMES, TITLES, keyphrases
from llmrec.data.read.files import DataFile, expand_path
from llmrec.data.read.table import read_table
from llmrec.data.sets.pages import read_known_format
from llmrec.data.sets.published import read_events
from llmrec.errors import DataError
from llmrec.recipe.schema import DataSection
from llmrec.types import Item

_TEXT, _HEADLINE = "reviewText", "summary"
_SCALE = (1.0, 5.0)


def load_amazon_reviews(section: DataSection, *, seed: int) -> Dataset:
    """Load a review file in the format of 2014, with one JSON object per line, gzipped or plain.

    HTML entities are decoded once. Ratings are stars from 1 to 5, timestamps are days, texts are whole reviews;
    headlines and keyphrases are stored in `Dataset.reviews`. Names of reviewers are not read: the split makes
    pseudonyms. Titles come from ``data.items``, a table with item_id and title; without it the split derives them from
    training reviews.

    Raises:
        DataError: If the file is missing or damaged, or has an invalid row.
    """
    if section.path is None:
        raise DataError(
            "source 'amazon-reviews' reads one category's 5-core reviews, a file such as "
            "reviews_Musical_Instruments_5.json.gz; set data.path=FILE",
            kind="missing-key",
            column="data.path",
        )
    check_column_settings(section, "amazon-reviews", "title", "fields")
    path = expand_path(section.path)
    member = DataFile(str(path), path)
    events = read_events(member, read_known_format("amazon-2014").layouts[0].events, _TEXT, (_HEADLINE,))
    main, frame = events.table, events.frame.drop(_HEADLINE)
    listed = read_table(expand_path(section.items)) if section.items is not None else None
    items = (
        {item: Item(item_id=item, title=item) for item in frame["item_id"].unique()}
        if listed is None
        else build_catalogue(section, main, frame["item_id"], listed)
    )
    dataset = build_dataset(
        section,
        main,
        frame,
        items,
        name="amazon-reviews",
        noun="products",
        scale=_SCALE,
        provenance=build_provenance(
            "amazon-reviews",
            (member, listed),
            rows=frame.height,
            licence="research use; the reviews may not be redistributed",
            more={
                "derived": ("titles (keyphrases of training reviews), " if listed is None else "")
                + "features and sentences (keyphrases), user names (pseudonyms)"
            },
        ),
    )
    headlines = events.frame.with_columns(pl.col(_HEADLINE).fill_null("").alias("headline"))
    derives = frozenset({NAMES, TITLES} if listed is None else {NAMES})
    return replace(dataset, reviews=_build_reviews(dataset.interactions, headlines), derives=derives)


def _build_reviews(rows: pl.DataFrame, headlines: pl.DataFrame) -> dict[tuple[str, str], Review]:
    # Of repeated pairs the latest row was kept; take the headline from the same row.
    latest = headlines.with_row_index("_row").sort("timestamp", "_row")
    headline_of = {
        (user, item): headline for user, item, headline in latest.select("user_id", "item_id", "headline").iter_rows()
    }
    texts = [(user, item, text or "") for user, item, text in rows.select("user_id", "item_id", "text").iter_rows()]
    result = keyphrases([text for *_, text in texts])
    return {
        (user, item): Review(text=text, headline=" ".join(headline_of.get((user, item), "").split()), phrases=phrases)
        for (user, item, text), phrases in zip(texts, result, strict=True)
    }
