"""Small interaction data for the data tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import polars as pl
from hypothesis import strategies as st

from llmrec.data.dataset import Dataset
from llmrec.recipe.schema import DataSection
from llmrec.types import Item

Row = tuple[str, str, float, float]


def dataset(rows: list[Row], *, timed: bool = True) -> Dataset:
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    if not timed:
        frame = frame.drop("timestamp")
    items = {item: Item(item_id=item, title=f"Title {item}") for item in sorted({row[1] for row in rows})}
    return Dataset(name="case", noun="things", interactions=frame, items=items, rating_scale=(1.0, 5.0))


def random_rows(seed: int, *, users: int = 12, items: int = 15, repeats: bool = False, moments: int = 6) -> list[Row]:
    """Rows with many ties in time; each user has 1 to 9 interactions."""
    dice = random.Random(seed)
    rows = []
    for user in range(users):
        size = dice.randint(1, 9)
        chosen = dice.choices(range(items), k=size) if repeats else dice.sample(range(items), size)
        rows += [
            (f"u{user}", f"i{item}", float(dice.randint(1, 5)), float(dice.randint(1, moments))) for item in chosen
        ]
    dice.shuffle(rows)
    return rows


def shuffled(rows: list[Row], seed: int) -> list[Row]:
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    return rows


def section(path: Path | str, **keys: Any) -> DataSection:
    return DataSection(source="table", path=str(path), **keys)


seeds = st.integers(0, 2**32 - 1)
