"""An id is the same however a library spelled its number, and times have one unit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from llmrec.data.dataset import Dataset
from llmrec.errors import DataError
from llmrec.experiment.study import load_split
from llmrec.recipe.load import as_recipe
from tests.facts import Facts, raises

ROWS = [(user, item, 10 * user + step) for user in (1, 2) for step, item in enumerate(range(5, 12))]
FRAME = pl.DataFrame(ROWS, schema=["user_id", "item_id", "timestamp"], orient="row")


def loaded(path: Path, **more: Any) -> Dataset:
    recipe = as_recipe(
        {"name": "x", "data": {"source": "table", "path": str(path), **more}, "tasks": {"sequential": {}}}
    )
    return load_split(recipe.data, 0).dataset


def users(path: Path) -> set[str]:
    return set(loaded(path).interactions["user_id"].cast(pl.String))


@pytest.mark.parametrize("floats", [("user_id",), ("item_id",), ("user_id", "item_id")])
def test_parts_of_which_some_have_floats_agree_on_ids(floats: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    FRAME[:7].write_parquet(tmp_path / "parts" / "a.parquet")
    FRAME[7:].with_columns(pl.col(floats).cast(pl.Float64)).write_parquet(tmp_path / "parts" / "b.parquet")
    data = loaded(tmp_path / "parts")
    assert users(tmp_path / "parts") == {"1", "2"} and set(data.items) == {str(item) for item in range(5, 12)}


def test_ids_of_json_lines_that_are_written_as_1_and_1_0_are_one(tmp_path: Path) -> None:
    lines = [
        json.dumps({"user_id": user if step % 2 else float(user), "item_id": item, "timestamp": step})
        for step, (user, item, _) in enumerate(ROWS)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert users(tmp_path / "t.jsonl") == {"1", "2"}
    # A column with other fractions keeps all of them.
    lines = [json.dumps({**json.loads(line), "price": 1.0 + step / 2}) for step, line in enumerate(lines)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    items = loaded(tmp_path / "t.jsonl", columns={"fields": ["price"]}).items
    assert {item.fields["price"] for item in items.values()} >= {"1.0", "1.5"}


@pytest.mark.parametrize(
    ("times", "row"),
    [
        ([1_700_000_000, 1_700_000_100, 1_700_000_200_000], 3),
        ([1_700_000_000_000, 1_700_000_100, 1_700_000_200_000], 2),
        ([1_700_000_000_000_000, 1_700_000_000_001, 1_700_000_000_000_002], 2),
    ],
)
def test_times_of_two_units_are_refused(times: list[int], row: int, tmp_path: Path) -> None:
    FRAME.with_columns(timestamp=pl.Series([*times, *[times[0]] * (len(ROWS) - 3)])).write_csv(tmp_path / "t.csv")
    with raises(DataError, Facts("bad-value", "t.csv", row=row, column="timestamp", says="one unit")):
        loaded(tmp_path / "t.csv")


def test_numbers_that_are_no_times_since_1970_are_an_order(tmp_path: Path) -> None:
    FRAME.with_columns(timestamp=pl.Series([0, 5, 10**7, *range(10**9, 10**9 + len(ROWS) - 3)])).write_csv(
        tmp_path / "t.csv"
    )
    assert loaded(tmp_path / "t.csv").interactions.height == len(ROWS)
