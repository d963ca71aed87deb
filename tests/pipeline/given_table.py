"""A synthetic table with a given split, times, ratings, titles and texts, and a recipe with five tasks."""

from __future__ import annotations

import random
from pathlib import Path

import polars as pl

PAGE = """\
name: published
model: {{name: {model}, dtype: float32}}
data:
  source: table
  path: {folder}/all.csv
  columns: {{split: part}}
  split: {{kind: given}}
tasks:
  rating: {{}}
  ctr: {{liked: 4}}
  sequential: {{}}
  direct: {{}}
  explanation: {{}}
eval: {{arms: [zero-shot], backend: fake, scorer: fake, users: 40, bootstrap: 50, candidates: {{count: 10}}}}
"""


def write(folder: Path) -> Path:
    """Write a table with times, ratings, titles and texts; one user and one item are only in the test part."""
    dice, rows = random.Random(7), []
    for user in range(24):
        for step, item in enumerate(dice.sample(range(30), 12)):
            part = "test" if step >= 10 else "dev" if step == 9 else "train"
            text = f"Item {item} is {dice.choice(['quiet', 'bright', 'heavy'])} and easy to clean"
            rows.append((f"u{user}", f"i{item}", dice.randint(1, 5), 100 * step + user, f"Title {item}", text, part))
    rows.append(("cold", "i1", 4, 5000, "Title 1", "Item 1 is quiet enough for me", "test"))
    rows.append(("u0", "new", 4, 5000, "Title new", "This is the first text about it", "test"))
    columns = ["user_id", "item_id", "rating", "timestamp", "title", "text", "part"]
    frame = pl.DataFrame(rows, schema=columns, orient="row")
    frame.write_csv(folder / "all.csv")
    for (part,), rows_of_part in frame.group_by("part"):
        rows_of_part.drop("part").write_csv(folder / f"{part}.csv")
    return folder
