"""Spellings of numeric IDs, and units of time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from llmrec.data.dataset import Dataset
from llmrec.errors import DataError
from llmrec.pipeline.study import load_split
from llmrec.recipe.load import as_recipe
from tests.facts import Facts, raises

ROWS = [(user, item, 10 * user + step) for user in (1, 2) for step, item in enumerate(range(5, 12))]
FRAME = pl.DataFrame(ROWS, schema=["user_id", "item_id", "timestamp"], orient="row")


def loaded(path: Path, **more: Any) -> Dataset:
    data = {"source": "table", "path": str(path), **more}
    return load_split(as_recipe({"name": "x", "data": data, "tasks": {"sequential": {}}}).data, 0).dataset


def users(path: Path) -> set[str]:
    return set(loaded(path).interactions["user_id"].cast(pl.String))


def test_parts_with_integers_and_floats_have_same_ids(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    FRAME[:7].write_parquet(tmp_path / "parts" / "a.parquet")
    FRAME[7:].with_columns(pl.col("user_id", "item_id").cast(pl.Float64)).write_parquet(
        tmp_path / "parts" / "b.parquet"
    )
    data = loaded(tmp_path / "parts")
    assert users(tmp_path / "parts") == {"1", "2"} and set(data.items) == {str(item) for item in range(5, 12)}


def test_integers_and_floats_of_json_are_same_ids(tmp_path: Path) -> None:
    lines = [
        json.dumps({"user_id": user if step % 2 else float(user), "item_id": item, "timestamp": step})
        for step, (user, item, _) in enumerate(ROWS)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert users(tmp_path / "t.jsonl") == {"1", "2"}
    # A column with fractions keeps them.
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
def test_rejects_times_of_two_units(times: list[int], row: int, tmp_path: Path) -> None:
    FRAME.with_columns(timestamp=pl.Series([*times, *[times[0]] * (len(ROWS) - 3)])).write_csv(tmp_path / "t.csv")
    with raises(DataError, Facts("bad-value", "t.csv", row=row, column="timestamp", says="the same unit")):
        loaded(tmp_path / "t.csv")


def test_small_numbers_are_an_order(tmp_path: Path) -> None:
    FRAME.with_columns(timestamp=pl.Series([0, 5, 10**7, *range(10**9, 10**9 + len(ROWS) - 3)])).write_csv(
        tmp_path / "t.csv"
    )
    assert loaded(tmp_path / "t.csv").interactions.height == len(ROWS)


def test_large_floats_of_json_are_exact_ids(tmp_path: Path) -> None:
    first = 2**53
    lines = [
        f'{{"user_id": {first + user}.0, "item_id": {first + 100 + item}.0, "timestamp": {step}}}'
        for step, (user, item, _) in enumerate(ROWS)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert users(tmp_path / "t.jsonl") == {str(first + 1), str(first + 2)}
    assert set(loaded(tmp_path / "t.jsonl").items) == {str(first + 100 + item) for item in range(5, 12)}
    # Integers in scientific notation are read as integers too.
    (tmp_path / "t.jsonl").write_text("\n".join(lines).replace(f"{first + 1}.0", "9.007199254740993e15"))
    assert users(tmp_path / "t.jsonl") == {str(first + 1), str(first + 2)}


def test_rejects_inexact_float_ids(tmp_path: Path) -> None:
    large = FRAME.with_columns((pl.col("user_id") + 2**53).cast(pl.Float64))
    large.with_columns(pl.when(pl.col("timestamp") > 12).then("user_id")).write_parquet(tmp_path / "t.parquet")
    with raises(DataError, Facts("bad-value", "t.parquet", 4, "user_id")):
        loaded(tmp_path / "t.parquet")
    # Missing values turn IDs into floats, and are themselves an error.
    FRAME.with_columns(pl.when(pl.col("timestamp") > 12).then("user_id").cast(pl.Float64)).write_parquet(
        tmp_path / "t.parquet"
    )
    with raises(DataError, Facts("missing-value", "t.parquet", 1, "user_id")):
        loaded(tmp_path / "t.parquet")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_byte_order_mark_in_a_file_belongs_to_no_id(ending: str, tmp_path: Path) -> None:
    one, other = FRAME[:7], FRAME[7:]
    if ending == "csv":
        parts = [one.write_csv(quote_style="always"), other.write_csv(include_header=False, quote_style="always")]
    else:
        parts = [one.write_ndjson(), other.write_ndjson()]
    (tmp_path / f"t.{ending}").write_bytes(b"".join(b"\xef\xbb\xbf" + part.encode() for part in parts))
    assert users(tmp_path / f"t.{ending}") == {"1", "2"}


@pytest.mark.parametrize("twin", ["u\u200b1", "u1 ", "\ufeffu1"])
def test_reports_ids_that_look_alike(twin: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = {1: "u1", 2: twin}
    frame = FRAME.with_columns(pl.col("user_id").replace_strict(names, return_dtype=pl.String))
    frame.write_csv(tmp_path / "t.csv", quote_style="always")
    assert users(tmp_path / "t.csv") == {"u1", twin}
    (note,) = [record.getMessage() for record in caplog.records]
    assert "t.csv: the ids of 2 users" in note and "'u1'" in note and ascii(twin) in note


def test_reports_ids_with_other_unicode_forms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    apart, one = "caf\u0065\u0301", "caf\u00e9"
    frame = FRAME.with_columns(pl.col("item_id").cast(pl.String).replace({"5": apart, "6": one}))
    frame.write_csv(tmp_path / "t.csv")
    assert set(loaded(tmp_path / "t.csv").items) > {apart, one}
    assert ascii(apart) in caplog.text and "2 items" in caplog.text
    caplog.clear()
    frame.filter(pl.col("item_id") != apart).write_csv(tmp_path / "t.csv")
    loaded(tmp_path / "t.csv")
    assert "differ" not in caplog.text
