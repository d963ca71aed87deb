"""Data on which a learned ranker is selected: the length of the history decides which recommender is right."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

ITEMS, USERS = 60, 480
WORDS = ("kettle", "rake", "lamp", "mat", "pillow", "violin", "puzzle", "tripod", "saddle", "easel")
"""The topics of the items, which their titles name: that of item ``i07`` is the word with this index."""
_LONG, _SHORT = 9, 4


def write(folder: Path) -> Path:
    """Write events and items: half of the users stay within a topic, and half walk along one ring of items.

    Users who stay within a topic have short histories. So texts predict the next item of short histories, and
    transitions that of long ones, which no fixed weights of the two can express.
    """
    dice = np.random.default_rng(0)
    ring = dice.permutation(ITEMS)
    folder.mkdir(exist_ok=True)
    with (folder / "items.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["item_id", "title", "price"])
        rows.writerows([f"i{n:02d}", f"A {WORDS[n % len(WORDS)]} of kind {n}", 1 + n % 7] for n in range(ITEMS))
    with (folder / "events.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["user_id", "item_id", "timestamp"])
        for user in range(USERS):
            if user % 2:
                items = np.roll(ring, -int(dice.integers(ITEMS)))[:_LONG]
            else:
                items = dice.permutation(np.arange(user // 2 % len(WORDS), ITEMS, len(WORDS)))[:_SHORT]
            rows.writerows([f"u{user}", f"i{item:02d}", 100 * user + step] for step, item in enumerate(items.tolist()))
    return folder


def changes(folder: Path) -> tuple[str, ...]:
    """Write the data into a folder, and return the overrides that add them to a recipe."""
    data = write(folder)
    return (
        f"data={{source: table, path: {data}/events.csv, items: {data}/items.csv, noun: products, "
        "columns: {fields: [price]}}",
        # With few candidates, every form of ensemble is good.
        "eval.candidates.count=20",
    )
