"""A split in which each topic follows another."""

from __future__ import annotations

import numpy as np

from llmrec.data.split import SplitDataset, split_dataset
from llmrec.recipe.schema import Split
from tests.baselines.trained import make_dataset

TOPICS = 6
WORDS = ("anvil", "banjo", "candle", "drum", "engine", "feather")


def ring() -> SplitDataset:
    """After an item of one topic comes one of the next; the last item of each topic has no interactions."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user:03d}", f"{(start + step) % TOPICS}{rng.integers(4)}", float(step))
        for user, start in enumerate(rng.integers(0, TOPICS, 150).tolist())
        for step in range(6)
    ]
    titles = {
        f"{topic}{number}": f"{word} {('one', 'two', 'three', 'four', 'one two')[number]}"
        for topic, word in enumerate(WORDS)
        for number in range(5)
    }
    return split_dataset(make_dataset(rows, "timestamp", titles), Split(kind="leave_one_out"), seed=0)
