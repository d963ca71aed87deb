"""A split whose text column is what a family writes: of a review its explaining sentence, or its headline."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import polars as pl

from llmrec.data.split import SplitDataset

Part = Literal["sentence", "headline"]


def written(data: SplitDataset, part: Part) -> SplitDataset:
    """Return a split with one part of each review as its texts; data without reviews as it is.

    The task, the baselines and the metrics of a family then read the same column. An interaction without that part
    has no text. Beside sentences the frames have a column ``feature``.
    """
    reviews = data.dataset.reviews
    if not reviews:
        return data

    def said(frame: pl.DataFrame) -> pl.DataFrame:
        found = [reviews.get(pair) for pair in frame.select("user_id", "item_id").iter_rows()]
        columns = {"text": part, "feature": "feature"} if part == "sentence" else {"text": part}
        return frame.with_columns(
            pl.Series(column, [(getattr(review, name) if review else None) or None for review in found], pl.String)
            for column, name in columns.items()
        )

    whole = data.dataset
    return replace(
        data,
        dataset=replace(whole, interactions=said(whole.interactions)),
        train=said(data.train),
        valid=said(data.valid),
        test=said(data.test),
        known=said(data.known),
    )
