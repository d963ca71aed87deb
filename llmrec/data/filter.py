"""Which interactions are kept, before the split."""

from __future__ import annotations

import polars as pl

from llmrec.data.dataset import Dataset
from llmrec.errors import DataError
from llmrec.recipe import Filter


def core(interactions: pl.DataFrame, *, user_core: int, item_core: int) -> pl.DataFrame:
    """Return the largest part in which every user and every item has enough interactions.

    Users and items are dropped in turn until nothing changes, so the result does not depend on who goes first.

    Args:
        interactions: Rows with user_id and item_id.
        user_core: Fewest interactions of a user.
        item_core: Fewest interactions of an item.
    """
    while True:
        before = interactions.height
        interactions = interactions.filter(pl.len().over("user_id") >= user_core)
        interactions = interactions.filter(pl.len().over("item_id") >= item_core)
        if interactions.height == before:
            return interactions


def apply(dataset: Dataset, section: Filter) -> Dataset:
    """Return the dataset with only the interactions that a recipe's filter keeps.

    Raises:
        DataError: If ratings are filtered and there are none, or if nothing is left.
    """
    rows = dataset.interactions
    if section.min_rating is not None:
        if rows["rating"].null_count() == rows.height:
            raise DataError(f"{dataset.name} has no ratings, so data.filter.min_rating cannot be applied; leave it out")
        rows = rows.filter(pl.col("rating") >= section.min_rating)
    rated = rows.height
    rows = core(rows, user_core=section.user_core, item_core=section.item_core)
    if rows.height == dataset.interactions.height:
        return dataset
    if rows.is_empty():
        raise DataError(
            f"{dataset.name}: no interaction passes the filter. Of {dataset.interactions.height} rows, {rated} have "
            f"data.filter.min_rating={section.min_rating}, and none of these are left with "
            f"user_core={section.user_core} and item_core={section.item_core}; lower one of them"
        )
    return dataset.restrict(rows)
