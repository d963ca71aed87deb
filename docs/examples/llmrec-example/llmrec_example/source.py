"""A data source: a corner shop whose customers keep to what they like."""

from __future__ import annotations

import random

import polars as pl

from llmrec.data.dataset import Dataset
from llmrec.recipe.schema import DataSection
from llmrec.types import Item

_KINDS = ("green tea", "black tea", "ground coffee", "dark chocolate")
_MAKERS = ("Abbot", "Birch", "Cole", "Dunn", "Ellis")


def corner_shop(section: DataSection, *, seed: int) -> Dataset:
    """Make 40 customers with 8 purchases each; ``section`` is the recipe's ``data``, of which it reads the noun."""
    rng = random.Random(seed)
    titles = [f"{maker} {kind}" for kind in _KINDS for maker in _MAKERS]
    items = {f"i{n}": Item(item_id=f"i{n}", title=title) for n, title in enumerate(titles)}
    rows = []
    for user in range(40):
        liked = rng.choice(_KINDS)
        weights = [4 if title.endswith(liked) else 1 for title in titles]
        keys = sorted(range(len(titles)), key=lambda n: rng.random() ** (1 / weights[n]), reverse=True)
        rows += [(f"u{user}", f"i{item}", float(time)) for time, item in enumerate(keys[:8])]
    return Dataset(
        name="corner-shop",
        noun=section.noun,
        interactions=pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"),
        items=items,
        provenance={"source": "corner-shop", "made": "yes", "licence": "CC0-1.0"},
    )
