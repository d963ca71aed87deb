"""Measures the leak of a rating through the leave-one-out mean rating of its item, by rounding step.

``python -m eval.benchmarks.shown_means eval/results/shown_means.json`` on MovieLens-100K; see docs/reproduce-papers.md.
A model that does not identify the item can use the correlation of mean and rating. A model that memorises items can
predict, for each item and each shown mean, the most frequent rating of these training examples.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from eval.benchmarks.provenance import provenance
from llmrec.durable import write_json
from llmrec.pipeline.study import load_split
from llmrec.recipe.schema import DataSection

STEPS = (0.1, 0.5, 1.0)
BANDS = {"2-5": (2, 5), "6-20": (6, 20), "21-100": (21, 100), "more": (101, 10_000)}


def rounded(total: pl.Expr, count: pl.Expr, step: float) -> pl.Expr:
    """Round a mean to the nearest step."""
    return (total / count / step).round(0) * step


def by_heart(rows: pl.DataFrame, *known: str) -> float:
    """Share of ratings equal to the most frequent one with the same values of ``known``."""
    counts = rows.group_by(*known, "rating").len().group_by(known).agg(pl.col("len").max())
    return float(counts["len"].sum() / len(rows))


def main(target: Path) -> None:
    """Write the results for each step."""
    data = load_split(DataSection(source="movielens-100k"), seed=0)
    sums = data.train.group_by("item_id").agg(pl.len().alias("count"), pl.col("rating").sum().alias("total"))
    train = data.train.join(sums, on="item_id").filter(pl.col("count") > 1)
    held = pl.concat([data.valid, data.test]).join(sums, on="item_id")
    others, rest = pl.col("total") - pl.col("rating"), pl.col("count") - 1
    steps = {}
    for step in STEPS:
        shown = train.with_columns(mean=rounded(others, rest, step))
        asked = held.with_columns(mean=rounded(pl.col("total"), pl.col("count"), step))
        steps[str(step)] = {
            "correlation": {
                name: rows.select(pl.corr("mean", "rating")).item()
                for name, rows in (("training", shown), ("held out", asked))
            },
            "by_heart": {name: by_heart(band, "item_id", "mean") for name, band in _bands(shown)},
        }
    bands = dict(_bands(train))
    result = {
        "command": "python -m eval.benchmarks.shown_means eval/results/shown_means.json",
        "what": "a mean rating without the row's own: what it tells of that rating, and how often an item's commonest "
        "rating at the same mean is right; MovieLens-100K, by the training ratings of the item",
        "steps": steps,
        "no_mean": {name: by_heart(band, "item_id") for name, band in bands.items()},
        "share_of_rows": {name: len(band) / len(train) for name, band in bands.items()},
        **provenance(),
    }
    write_json(target, result)


def _bands(rows: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    for name, (low, high) in BANDS.items():
        yield name, rows.filter(pl.col("count").is_between(low, high))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
