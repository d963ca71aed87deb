"""Small synthetic catalogues with interactions."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.index.table import ItemIndex
from llmrec.recipe.schema import Split
from llmrec.types import Item

KINDS = ("Tools > Hand > Saws", "Tools > Power", "Toys > Blocks", "Toys > Dolls > Houses", "Books")


def synthetic(users: int = 60, items: int = 40, seed: int = 0, *, shuffle: int | None = None) -> SplitDataset:
    """Users who mostly choose one of five kinds of items; some titles occur twice, two items have no training rows."""
    dice = random.Random(seed)
    names = [f"i{n:03d}" for n in range(items)]
    rows = []
    for user in range(users):
        kind = user % len(KINDS)
        of_kind = [name for n, name in enumerate(names[:-2]) if n % len(KINDS) == kind]
        chosen = dice.sample(of_kind, min(6, len(of_kind))) + dice.sample(names[:-2], 1)
        dice.shuffle(chosen)
        rows += [(f"u{user:03d}", item, float(t)) for t, item in enumerate(dict.fromkeys(chosen))]
    # Two users end with items that no other user has: they are held out, so training does not include them.
    rows += [("u000", names[-2], 99.0), ("u001", names[-1], 99.0)]
    if shuffle is not None:
        random.Random(shuffle).shuffle(rows)
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    catalogue = {
        name: Item(
            item_id=name,
            title=f"Thing {n // 2 if n < 8 else n}",
            fields={"categories": KINDS[n % len(KINDS)] if n % 7 else ""},
        )
        for n, name in enumerate(names)
    }
    if shuffle is not None:
        keys = list(catalogue)
        random.Random(shuffle).shuffle(keys)
        catalogue = {key: catalogue[key] for key in keys}
    return split_dataset(Dataset("toy", "things", frame, catalogue), Split(), seed=0)


def trained(pairs: Iterable[tuple[str, str]], items: Mapping[str, Item]) -> SplitDataset:
    """A catalogue without held-out data; pairs are (user, item)."""
    schema = {"user_id": pl.String, "item_id": pl.String}
    frame = pl.DataFrame(list(pairs), schema=schema, orient="row")
    dataset = Dataset("toy", "things", frame, items)
    none = dataset.interactions.clear()
    return SplitDataset(dataset, "leave_one_out", 0, dataset.interactions, none, none, frozenset())


def other_held_out(data: SplitDataset) -> SplitDataset:
    """The same training data with every held-out item replaced by another."""
    order = sorted(data.dataset.items)
    turned = dict(zip(order, order[7:] + order[:7], strict=True))
    other = pl.col("item_id").cast(pl.String).replace_strict(turned).cast(data.train["item_id"].dtype)
    parts = [frame.with_columns(other) for frame in (data.valid, data.test)]
    interactions = pl.concat([frame.select(data.train.columns) for frame in (data.train, *parts)])
    held = frozenset(pair for frame in parts for pair in frame.select("user_id", "item_id").iter_rows())
    dataset = replace(data.dataset, interactions=interactions)
    return replace(data, dataset=dataset, valid=parts[0], test=parts[1], held_out=held)


def check_codes(index: ItemIndex) -> None:
    """Check that codes decode to their items and are prefix-free."""
    assert all(index.decode(index.encode(item)) == item for item in index.codes)
    paths = sorted(index.codes.values())
    assert all(b[: len(a)] != a for a, b in pairwise(paths))


def embed(texts: Sequence[str]) -> NDArray[np.float32]:
    """Return vectors of character bigrams: similar texts have similar vectors."""
    vectors = np.zeros((len(texts), 64), dtype=np.float32)
    for row, text in enumerate(texts):
        for first, second in pairwise(text):
            vectors[row, (ord(first) * 31 + ord(second)) % 64] += 1
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
