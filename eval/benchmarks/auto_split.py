"""Writes the split of a run as CSV files, for other libraries: ``python -m eval.benchmarks.auto_split RUN FOLDER``.

Writes ``train.csv``, ``valid.csv`` and ``test.csv`` (user_id, item_id, position in the user's sequence), and
``truth.csv`` (user_id, item_id) for `llmrec score`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl

from llmrec.data.split import SplitDataset
from llmrec.pipeline.study import load_tables
from llmrec.recipe.load import load_stored_recipe


def write_parts(data: SplitDataset, folder: Path) -> None:
    """Write a split."""
    folder.mkdir(parents=True, exist_ok=True)
    # Held-out interactions come after the known ones.
    for name, part, after in (("train", data.train, 0), ("valid", data.valid, 10**6), ("test", data.test, 2 * 10**6)):
        position = after + pl.int_range(pl.len()).over("user_id")
        part.select("user_id", "item_id", position=position).write_csv(folder / f"{name}.csv")
    data.test.select("user_id", "item_id").write_csv(folder / "truth.csv")


if __name__ == "__main__":
    write_parts(load_tables(load_stored_recipe(Path(sys.argv[1])))[0], Path(sys.argv[2]))
