"""What a dataset and its split look like, in figures."""

from __future__ import annotations

from collections import Counter

import polars as pl

from llmrec.data.split import SplitDataset

_QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}


def statistics(data: SplitDataset) -> dict[str, object]:
    """Return named figures of a split dataset; every value can be written as JSON.

    Shares lie in [0, 1]. ``tied_last_share`` is the share of users whose last two events carry one timestamp,
    so that the tie rule decides what is held out; it is None without timestamps. A held-out event is *cold* when
    its user or its item has no training interaction.
    """
    dataset = data.dataset
    rows = dataset.interactions
    users, items = rows["user_id"].n_unique(), rows["item_id"].n_unique()
    titles = Counter(item.title for item in dataset.items.values())
    return {
        "name": dataset.name,
        "made": dataset.made,
        "users": users,
        "items": items,
        "interactions": rows.height,
        "density": rows.select("user_id", "item_id").n_unique() / (users * items),
        "rating_scale": list(dataset.rating_scale) if dataset.rating_scale else None,
        "ratings": _histogram(rows),
        "interactions_per_user": _per(rows, "user_id"),
        "interactions_per_item": _per(rows, "item_id"),
        "tied_last_share": tied_last_share(rows),
        "with_text": rows.height - rows["text"].null_count(),
        "shared_titles": sum(count for count in titles.values() if count > 1),
        "split": data.kind,
        "train": data.train.height,
        "valid": data.valid.height,
        "test": data.test.height,
        "history_only": data.known.height,
        "cold_items_valid": _cold(data.valid, data.train, "item_id"),
        "cold_items_test": _cold(data.test, data.train, "item_id"),
        "cold_users_valid": _cold(data.valid, data.train, "user_id"),
        "cold_users_test": _cold(data.test, data.train, "user_id"),
        "fingerprint": dataset.fingerprint,
        "split_fingerprint": data.fingerprint,
        "provenance": dict(dataset.provenance),
    }


def tied_last_share(rows: pl.DataFrame) -> float | None:
    """Return the share of users with two or more events at their last timestamp; None without timestamps."""
    if rows["timestamp"].null_count() == rows.height:
        return None
    last = rows.filter(pl.col("timestamp") == pl.col("timestamp").max().over("user_id"))
    tied = last.group_by("user_id").len().filter(pl.col("len") > 1).height
    return tied / rows["user_id"].n_unique()


def _histogram(rows: pl.DataFrame) -> dict[str, int]:
    counts = rows.drop_nulls("rating").group_by("rating").len().sort("rating")
    return {f"{rating:g}": count for rating, count in counts.iter_rows()}


def _per(rows: pl.DataFrame, column: str) -> dict[str, float]:
    counts = rows.group_by(column).len()["len"].cast(pl.Float64)
    found = {name: counts.quantile(share, interpolation="linear") for name, share in _QUANTILES.items()}
    found["mean"] = rows.height / counts.len()
    return {name: float(value) for name, value in found.items() if value is not None}


def _cold(held: pl.DataFrame, train: pl.DataFrame, column: str) -> int:
    """Return how many held-out events have a user or an item that training never saw."""
    return held.join(train.select(column).unique(), on=column, how="anti").height
