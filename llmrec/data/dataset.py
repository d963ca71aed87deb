"""The data of an experiment: interactions, items and users, and the filters of a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property

import numpy as np
import polars as pl

from llmrec.data.hashing import digest_frame, digest_strings
from llmrec.data.read.codes import encode_ids, pair_codes, values_and_codes
from llmrec.data.read.limits import format_error
from llmrec.display import Displayed, Summary
from llmrec.errors import DataError
from llmrec.guard import clean
from llmrec.recipe.schema import Filter
from llmrec.types import Item

SCHEMA: Mapping[str, pl.DataType] = {
    "user_id": pl.String(),
    "item_id": pl.String(),
    "rating": pl.Float64(),
    "timestamp": pl.Float64(),
    "text": pl.String(),
}
"""The interaction columns. The last three may have nulls; a column with nulls only was not in the source.

In a `Dataset` and its split, ids are coded (see `llmrec.data.read.codes`), and a text column of nulls takes no memory.
"""

PARTS = ("train", "valid", "test")
"""The parts of a split; a pair that the source has in several parts belongs to the last one."""


def conform_to_schema(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the interaction columns in the order and types of the schema; missing columns become null.

    Raises:
        DataError: If user_id or item_id is missing or has nulls, or a column has another type.
    """
    for name in ("user_id", "item_id"):
        if name not in frame.columns:
            raise DataError(
                f"interactions need a column {name!r}; the columns are {', '.join(frame.columns)}",
                kind="missing-column",
                column=name,
            )
        if frame[name].null_count():
            raise DataError(f"interactions need a value in every row of {name!r}", kind="missing-value", column=name)
    try:
        nothing = pl.repeat(None, frame.height, dtype=pl.Null, eager=True)
        available = {name: frame[name] if name in frame.columns else nothing for name in SCHEMA}
        columns = {name: encode_ids(available[name]) for name in ("user_id", "item_id")}
        columns |= {name: available[name].cast(SCHEMA[name]) for name in ("rating", "timestamp")}
        has_text = available["text"].null_count() < frame.height
        columns["text"] = available["text"].cast(pl.String) if has_text else nothing
        return pl.DataFrame(columns)
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"an interaction column has a type that cannot be used: {format_error(error)}", kind="bad-value"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """A user's review of an item.

    Attributes:
        text: The full review.
        headline: Its headline; empty if there is none.
        phrases: Keyphrases of its text, best first.
        feature: The keyphrase that it is about, chosen by `llmrec.data.derived`; empty if there is none.
        sentence: The sentence that contains the feature.
    """

    text: str
    headline: str = ""
    phrases: tuple[str, ...] = ()
    feature: str = ""
    sentence: str = ""


@dataclass(frozen=True)
class GivenSplit:
    """A split that is given by the source.

    Attributes:
        valid: Held-out (user_id, item_id) pairs for validation.
        test: Held-out (user_id, item_id) pairs for testing.
        history_only: Users whose other interactions are shown as history but never used for training.
    """

    valid: frozenset[tuple[str, str]]
    test: frozenset[tuple[str, str]]
    history_only: frozenset[str] = frozenset()


@dataclass(frozen=True, repr=False)
class Dataset(Displayed):
    """Interactions, items and users of one source, filtered and not yet split.

    Attributes:
        name: Short name, such as ``movielens-100k``.
        noun: Plural name of the items in prompts.
        interactions: Columns of `SCHEMA`, in file order. Without timestamps, this order is the time order.
        items: The catalogue: exactly one entry for every item that has an interaction.
        users: Profile fields by user; may be empty.
        rating_scale: Lowest and highest rating, from the recipe or the source; None if neither sets them, or without
            ratings. Held-out ratings never define the scale: `llmrec.data.split.scale_of` uses those of training.
        provenance: Origin of the data: source, path, sha256, rows, made ("yes" or "no"), licence.
        given: The source's own split, used by ``data.split.kind=given``; None if there is none.
        reviews: Reviews by (user_id, item_id), including held-out ones; empty if the source has none.
        derives: Data that the source lacks and a split derives from its training reviews: ``titles``, ``names``.
    """

    name: str
    noun: str
    interactions: pl.DataFrame
    items: Mapping[str, Item]
    users: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    rating_scale: tuple[float, float] | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)
    given: GivenSplit | None = None
    reviews: Mapping[tuple[str, str], Review] = field(default_factory=dict)
    derives: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "interactions", conform_to_schema(self.interactions))
        absent = set(self.interactions["item_id"].unique()) - self.items.keys()
        if absent:
            raise DataError.at(
                self.name,
                "unknown-name",
                f": {len(absent)} items have interactions but no entry, such as {min(absent)!r}",
                "item_id",
            )

    def _summary(self) -> Summary:
        facts = {"interactions": f"{self.interactions.height:,}", self.noun: f"{len(self.items):,}"}
        return Summary(f"Data set {self.name!r}", facts)

    @property
    def made(self) -> bool:
        """Whether the data are synthetic and were generated by llmrec."""
        return self.provenance.get("made") == "yes"

    @property
    def has_time(self) -> bool:
        """Whether there are timestamps; without them, row order is time order."""
        return self.interactions["timestamp"].null_count() < self.interactions.height

    @cached_property
    def titles(self) -> Mapping[str, str]:
        """Titles by item id, cleaned for prompts."""
        return {item_id: clean(item.title) for item_id, item in self.items.items()}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the content, independent of the order of rows.

        The order of rows does not matter, except that without timestamps each user's order counts. Provenance is
        excluded, so that the same data from two sources has one fingerprint.
        """
        frame = self.interactions
        if not self.has_time:
            order = pl.int_range(pl.len()).over("user_id").cast(pl.Float64)
            frame = frame.with_columns(timestamp=order)
        catalogue = [
            part
            for item_id, item in sorted(self.items.items())
            for part in (item_id, item.title, json.dumps(dict(item.fields), sort_keys=True))
        ]
        profiles = [
            part
            for user_id, fields in sorted(self.users.items())
            for part in (user_id, json.dumps(dict(fields), sort_keys=True))
        ]
        parts = (digest_frame(_in_canonical_order(frame)), digest_strings(catalogue), digest_strings(profiles))
        return digest_strings([self.noun, repr(self.rating_scale), repr(self.has_time), *parts, *self._review_hashes()])

    def restrict(self, interactions: pl.DataFrame) -> Dataset:
        """Return the dataset with only these interactions and their users and items."""
        kept_items = set(interactions["item_id"].unique())
        kept_users = set(interactions["user_id"].unique())
        kept_pairs = set(interactions.select("user_id", "item_id").iter_rows()) if self.reviews else set()
        return replace(
            self,
            interactions=interactions,
            items={item_id: item for item_id, item in self.items.items() if item_id in kept_items},
            users={user_id: fields for user_id, fields in self.users.items() if user_id in kept_users},
            reviews={pair: review for pair, review in self.reviews.items() if pair in kept_pairs},
        )

    def _review_hashes(self) -> list[str]:
        """Return a hash over the reviews, and the derived data; empty without reviews."""
        if not self.reviews:
            return []
        rows = ((*pair, json.dumps(astuple(review))) for pair, review in sorted(self.reviews.items()))
        return [digest_strings([part for row in rows for part in row]), *sorted(self.derives)]


def _in_canonical_order(frame: pl.DataFrame) -> pl.DataFrame:
    """Return rows sorted by user and item, then by the other columns."""
    keys = pair_codes(frame["user_id"], frame["item_id"])
    order = np.argsort(keys)
    keys = keys[order]
    return frame.sort(frame.columns) if (keys[1:] == keys[:-1]).any() else frame[order]


def k_core(interactions: pl.DataFrame, *, user_core: int, item_core: int) -> pl.DataFrame:
    """Return the largest subset in which every user and every item has enough interactions (k-core).

    Users and items are dropped alternately until nothing changes, so the result does not depend on the order.

    Args:
        interactions: Rows with user_id and item_id.
        user_core: Minimum interactions per user.
        item_core: Minimum interactions per item.
    """
    while True:
        before = interactions.height
        for column, minimum in (("user_id", user_core), ("item_id", item_core)):
            if minimum > 1:
                row_codes = values_and_codes(interactions[column])[1]
                interactions = interactions.filter(np.bincount(row_codes)[row_codes] >= minimum)
        if interactions.height == before:
            return interactions


def filter_dataset(dataset: Dataset, section: Filter) -> Dataset:
    """Return the dataset with only the interactions that pass the filters of a recipe.

    Raises:
        DataError: If the filter is by rating and there are no ratings, or if nothing is left.
    """
    rows = dataset.interactions
    if section.min_rating is not None:
        if rows["rating"].null_count() == rows.height:
            raise DataError.at(
                dataset.name,
                "contradiction",
                " has no ratings, so data.filter.min_rating cannot be applied; remove the key",
                "data.filter.min_rating",
            )
        rows = rows.filter(pl.col("rating") >= section.min_rating)
    rated = rows.height
    rows = k_core(rows, user_core=section.user_core, item_core=section.item_core)
    if rows.height == dataset.interactions.height:
        return dataset
    if rows.is_empty():
        raise DataError.at(
            dataset.name,
            "too-few",
            f": no interaction passes the filter. Of {dataset.interactions.height} rows, {rated} have "
            f"data.filter.min_rating={section.min_rating}, and none of these remain with "
            f"user_core={section.user_core} and item_core={section.item_core}; lower one of them",
            "data.filter",
        )
    return dataset.restrict(rows)
