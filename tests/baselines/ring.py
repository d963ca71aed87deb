"""A split in which each topic follows another."""

from __future__ import annotations

import numpy as np
import polars as pl

from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split
from llmrec.recipe.schema import Split
from llmrec.types import Item

TOPICS = 6
WORDS = ("anvil", "banjo", "candle", "drum", "engine", "feather")


def ring() -> SplitDataset:
    """After an item of one topic comes one of the next; the last item of each topic is in no sequence."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user:03d}", f"{(start + step) % TOPICS}{rng.integers(4)}", float(step))
        for user, start in enumerate(rng.integers(0, TOPICS, 150).tolist())
        for step in range(6)
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    items = {
        f"{topic}{number}": Item(
            item_id=f"{topic}{number}", title=f"{word} {('one', 'two', 'three', 'four', 'one two')[number]}"
        )
        for topic, word in enumerate(WORDS)
        for number in range(5)
    }
    whole = Dataset(name="ring", noun="things", interactions=frame, items=items)
    return split(whole, Split(kind="leave_one_out"), seed=0)
