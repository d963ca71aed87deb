"""What a mean rating that leaves the row's own rating out tells of that rating, by the step to which it is rounded.

``python -m eval.benchmarks.shown_means`` on MovieLens-100K; docs/m6.md has the table. Of two readers of the shown mean
one does not know the item, and has the correlation of mean and rating. The other knows by heart, for each item and each
shown mean, the commonest rating of these training rows.
"""

from __future__ import annotations

import sys

import polars as pl

from llmrec.experiment.study import load_split
from llmrec.recipe.schema import DataSection

STEPS = (0.1, 0.5, 1.0)
BANDS = ((2, 5), (6, 20), (21, 100), (101, 10_000))


def rounded(total: pl.Expr, count: pl.Expr, step: float) -> pl.Expr:
    """A mean to the nearest step."""
    return (total / count / step).round(0) * step


def by_heart(rows: pl.DataFrame, *known: str) -> float:
    """Share of rows whose rating is the commonest of those with the same values of ``known``."""
    counts = rows.group_by(*known, "rating").len().group_by(known).agg(pl.col("len").max())
    return float(counts["len"].sum() / len(rows))


def main() -> None:
    """Print a line a step."""
    data = load_split(DataSection(source="movielens-100k"), seed=0)
    sums = data.train.group_by("item_id").agg(pl.len().alias("count"), pl.col("rating").sum().alias("total"))
    train = data.train.join(sums, on="item_id").filter(pl.col("count") > 1)
    held = pl.concat([data.valid, data.test]).join(sums, on="item_id")
    others, rest = pl.col("total") - pl.col("rating"), pl.col("count") - 1
    for step in STEPS:
        shown = train.with_columns(mean=rounded(others, rest, step))
        asked = held.with_columns(mean=rounded(pl.col("total"), pl.col("count"), step))
        correlations = [float(rows.select(pl.corr("mean", "rating")).item()) for rows in (shown, asked)]
        parts = []
        for low, high in BANDS:
            band = shown.filter(pl.col("count").is_between(low, high))
            parts.append(f"{low}-{high}: {by_heart(band, 'item_id', 'mean'):.2f}/{by_heart(band, 'item_id'):.2f}")
        train_r, held_r = correlations
        sys.stdout.write(f"step {step}: correlation {train_r:.3f} train, {held_r:.3f} held out; {'; '.join(parts)}\n")


if __name__ == "__main__":
    main()
