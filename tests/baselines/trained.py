"""Small datasets, splits without held-out data, and requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset
from llmrec.types import Event, Item, Request

_TYPES = {"rating": pl.Float64, "timestamp": pl.Float64}


def make_dataset(
    rows: Sequence[tuple[Any, ...]], columns: str, titles: Mapping[str, str] | Iterable[str], **options: Any
) -> Dataset:
    """Return a dataset of rows with user_id, item_id and further columns; without titles, items have their ids."""
    schema = {name: _TYPES.get(name, pl.String) for name in ("user_id", "item_id", *columns.split())}
    titles = titles if isinstance(titles, Mapping) else {item: item for item in titles}
    items = {item: Item(item_id=item, title=title) for item, title in titles.items()}
    return Dataset("toy", "things", pl.DataFrame(rows, schema=schema, orient="row"), items, **options)


def all_trained(data: Dataset) -> SplitDataset:
    """Return a split whose training rows are all interactions of a dataset."""
    none = data.interactions.clear()
    return SplitDataset(data, "leave_one_out", 0, data.interactions, none, none, frozenset())


def request(items: Iterable[str], *, user: str = "unknown") -> Request:
    """Return a request with a history."""
    return Request(id="r", user_id=user, history=tuple(Event(item_id=item) for item in items))
