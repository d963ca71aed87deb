"""The checks that every source's interactions pass on their way into a `Dataset`."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import polars as pl

from llmrec.data.dataset import Dataset, conform
from llmrec.data.files import Table
from llmrec.data.opening import ID_LIMIT, shown
from llmrec.errors import DataError
from llmrec.recipe import DataSection
from llmrec.types import Item

log = logging.getLogger(__name__)

_PAIR = ["user_id", "item_id"]
_ROW = "_row"
# What tables write where there is no user, and the share of all rows that nobody has among so many users.
_NOBODY = ("na", "n/a", "nan", "null", "none", "nil", "unknown", "undefined", "anonymous", "guest", "-", "?")
_LARGE, _SEVERAL = 0.2, 20


def assemble(
    section: DataSection,
    table: Table,
    interactions: pl.DataFrame,
    items: Mapping[str, Item],
    users: Mapping[str, Mapping[str, str]],
    *,
    name: str,
    noun: str,
    scale: tuple[float, float] | None,
    provenance: Mapping[str, str],
) -> Dataset:
    """Check interactions and bind them to their items.

    Args:
        section: The recipe's section.
        table: Where the interactions were read; its rows are theirs, for messages.
        interactions: Columns of `llmrec.data.dataset.SCHEMA`; optional ones may be missing.
        items: Entries by item id; those without an interaction are dropped.
        users: Profiles by user id; those without an interaction are dropped.
        name: Short name of the data.
        noun: What the source calls its items, where the recipe says nothing of its own.
        scale: The source's own rating scale; the recipe's goes first, and what the data shows is last.
        provenance: See `Dataset`.

    Raises:
        DataError: If a pair is repeated, a rating is off the scale, an item has no entry, or there is one item only.
    """
    frame = conform(interactions).with_row_index(_ROW)
    _short_ids(table, frame)
    _one_for_many(table, frame)
    frame = _without_repeats(section, table, frame)
    _all_known(table, frame, items)
    scale = _scale(section, table, frame, scale)
    kept = frame["item_id"].unique()
    if kept.len() < 2:
        raise DataError(f"{table.name}: there is only one item, {shown(kept[0])}; a recommender needs at least 2")
    default = DataSection.model_fields["noun"].default
    present = set(frame["user_id"].unique())
    return Dataset(
        name=name,
        noun=noun if section.noun == default else section.noun,
        interactions=frame.drop(_ROW),
        items={item_id: items[item_id] for item_id in kept.sort()},
        users={user: users[user] for user in sorted(users) if user in present},
        rating_scale=scale,
        provenance=provenance,
    )


def _short_ids(table: Table, frame: pl.DataFrame) -> None:
    for column in _PAIR:
        long = frame.filter(pl.col(column).str.len_chars() > ID_LIMIT)
        if not long.is_empty():
            row, text = long.select(_ROW, column).row(0)
            raise DataError(
                f"{table.where(row)}: the {column.removesuffix('_id')} is {shown(text)}, {len(text)} characters long; "
                f"an id has at most {ID_LIMIT}, so correct the row"
            )


def _one_for_many(table: Table, frame: pl.DataFrame) -> None:
    """Warn of a user who seems to stand for all those that are not known: by a word for nothing, or a large share."""
    sizes = frame["user_id"].value_counts(sort=True)
    nobody = pl.col("user_id").str.to_lowercase().is_in(_NOBODY)
    large = (pl.col("count") > _LARGE * frame.height) & (sizes.height >= _SEVERAL)
    for user, count in sizes.filter(nobody | large).iter_rows():
        log.warning(
            "%s: user %s has %d of %d rows; if it stands for people who are not known, leave these rows out, or name "
            "another column as the user",
            *(table.name, shown(user), count, frame.height),
        )


def _without_repeats(section: DataSection, table: Table, frame: pl.DataFrame) -> pl.DataFrame:
    again = frame.filter(~pl.struct(_PAIR).is_first_distinct())
    if again.is_empty():
        return frame
    if section.duplicates == "error":
        row, user, item = again.select(_ROW, *_PAIR).row(0)
        first = frame.filter((pl.col("user_id") == user) & (pl.col("item_id") == item))[_ROW][0]
        raise DataError(
            f"{table.where(row)} repeats user {shown(user)} with item {shown(item)} of row {first + 1} "
            f"({again.height} such rows); drop the repeats, or set data.duplicates=keep_last to keep the latest of each"
        )
    # The latest in time; within one moment, and without timestamps, the last in the file.
    latest = frame.sort("timestamp", _ROW).unique(subset=_PAIR, keep="last", maintain_order=True)
    return latest.sort(_ROW)


def _all_known(table: Table, frame: pl.DataFrame, items: Mapping[str, Item]) -> None:
    absent = [item for item in frame["item_id"].unique(maintain_order=True) if item not in items]
    if absent:
        row = frame.filter(pl.col("item_id") == absent[0])[_ROW][0]
        raise DataError(
            f"{table.where(row)}: item {shown(absent[0])} is not in the table of items ({len(absent)} such items); "
            "add it there, or drop its rows here"
        )


def _scale(
    section: DataSection, table: Table, frame: pl.DataFrame, scale: tuple[float, float] | None
) -> tuple[float, float] | None:
    ratings = frame["rating"].drop_nulls()
    if ratings.is_empty():
        return None
    low, high = section.rating_scale or scale or (_number(ratings.min()), _number(ratings.max()))
    if section.rating_scale is not None and not low < high:
        raise DataError(f"data.rating_scale is ({low:g}, {high:g}); give the lowest rating and then the highest one")
    off = frame.filter((pl.col("rating") < low) | (pl.col("rating") > high))
    if not off.is_empty():
        row, rating = off.select(_ROW, "rating").row(0)
        raise DataError(
            f"{table.where(row)}: the rating {rating:g} is off the scale from {low:g} to {high:g}; correct the row, "
            "or set data.rating_scale=[lowest, highest]"
        )
    return float(low), float(high)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
