"""predictions.parquet and items.parquet: what is needed to compute every figure of a run again, without llmrec.

docs/results.md describes every column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from llmrec.data.split import SplitDataset
from llmrec.durable import replacing
from llmrec.evaluate.slices import item_of
from llmrec.pipeline.evaluation import ResultRow
from llmrec.pipeline.study import Study
from llmrec.types import Case

ROW: Mapping[str, Any] = {
    "row_id": pl.String,
    "task": pl.String,
    "arm": pl.String,
    "predictor": pl.String,
    "template": pl.String,
}
"""Which row of results.json a line belongs to."""
REQUEST: Mapping[str, Any] = {
    "item_id": pl.String,
    "position": pl.Int32,
    "history": pl.Int32,
    "user_training": pl.Int32,
    "item_training": pl.Int32,
}
"""What a request is, the same in all rows."""
ANSWER: Mapping[str, Any] = {
    "request_id": pl.String,
    "user_id": pl.String,
    "truth": pl.String,
    "parsed": pl.String,
    "raw": pl.String,
    "prompt_hash": pl.String,
    "rank": pl.Float64,
    "error": pl.String,
    "prompt_tokens": pl.Int64,
    "completion_tokens": pl.Int64,
    "above": pl.Int32,
    "tied": pl.Int32,
    "pool": pl.Int32,
    "value": pl.Float64,
    "copied": pl.Boolean,
    "feature": pl.String,
    "feature_named": pl.Boolean,
    "features": pl.List(pl.String),
    "unsupported": pl.Int32,
    "truth_copied": pl.Boolean,
    "truth_features": pl.Int32,
    "truth_unsupported": pl.Int32,
    "forwards": pl.Int64,
}
"""The fields of `llmrec.results.Prediction`."""
SCHEMA: Mapping[str, Any] = {**ROW, **ANSWER, **REQUEST}
ITEMS: Mapping[str, Any] = {"table": pl.String, "item_id": pl.String, "training": pl.Int64, "users": pl.Int64}
"""Columns of items.parquet."""


def write_predictions(study: Study, rows: Sequence[ResultRow], path: Path) -> pl.DataFrame:
    """Write one line per row and request, and return them.

    Args:
        study: Its cases are those of the rows, in order.
        rows: Finished rows.
        path: The file.
    """
    asked = {family: list(_requests(study.task_data(family), study.cases(family))) for family in study.tasks}
    lines = [
        {**{key: getattr(row.figures, key) for key in ROW if key != "row_id"}, "row_id": row.figures.id}
        | dict(record)
        | about
        for row in rows
        for record, about in zip(row.records, asked[row.figures.task], strict=True)
    ]
    frame = pl.DataFrame(lines, schema=dict(SCHEMA))
    with replacing(path) as draft:
        frame.write_parquet(draft)
    return frame


def _requests(data: SplitDataset, cases: Sequence[Case]) -> Iterator[dict[str, object]]:
    users, items = (dict(data.train.group_by(column).len().iter_rows()) for column in ("user_id", "item_id"))
    for case in cases:
        request, item, target = case.request, item_of(case, data), str(case.truth)
        listed = request.candidates is not None and target in request.candidates
        yield {
            "item_id": item,
            "position": request.candidates.index(target) + 1 if listed and request.candidates else None,
            "history": len(request.history),
            "user_training": users.get(request.user_id, 0),
            "item_training": items.get(item, 0) if item is not None else None,
        }


def write_items(study: Study, path: Path) -> None:
    """Write one line per item of each table, in the order of ids: what training knows of it."""
    frames = []
    for name, data in (("main", study.data), ("reviews", study.reviews)):
        if data is None:
            continue
        counted = data.train.group_by("item_id").agg(
            pl.len().alias("training"), pl.col("user_id").n_unique().alias("users")
        )
        counted = counted.with_columns(pl.col("item_id").cast(pl.String))
        items = pl.DataFrame({"item_id": sorted(data.dataset.items)}).join(counted, on="item_id", how="left")
        frames.append(items.with_columns(pl.lit(name).alias("table"), pl.col("training", "users").fill_null(0)))
    frame = pl.concat([each.select(pl.col(name).cast(kind) for name, kind in ITEMS.items()) for each in frames])
    with replacing(path) as draft:
        frame.write_parquet(draft)
