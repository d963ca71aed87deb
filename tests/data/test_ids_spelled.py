"""An id is the same however a library spelled its number, and times have one unit."""

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
    with raises(DataError, Facts("bad-value", "t.csv", row=row, column="timestamp", says="the same unit")):
        loaded(tmp_path / "t.csv")


def test_numbers_that_are_no_times_since_1970_are_an_order(tmp_path: Path) -> None:
    FRAME.with_columns(timestamp=pl.Series([0, 5, 10**7, *range(10**9, 10**9 + len(ROWS) - 3)])).write_csv(
        tmp_path / "t.csv"
    )
    assert loaded(tmp_path / "t.csv").interactions.height == len(ROWS)


def test_large_ids_that_json_writes_as_fractions_stay_apart(tmp_path: Path) -> None:
    first = 2**53
    lines = [
        f'{{"user_id": {first + user}.0, "item_id": {first + 100 + item}.0, "timestamp": {step}}}'
        for step, (user, item, _) in enumerate(ROWS)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert users(tmp_path / "t.jsonl") == {str(first + 1), str(first + 2)}
    assert set(loaded(tmp_path / "t.jsonl").items) == {str(first + 100 + item) for item in range(5, 12)}
    # An exponent is a whole number too.
    (tmp_path / "t.jsonl").write_text("\n".join(lines).replace(f"{first + 1}.0", "9.007199254740993e15"))
    assert users(tmp_path / "t.jsonl") == {str(first + 1), str(first + 2)}


def test_floats_that_cannot_tell_ids_apart_are_refused(tmp_path: Path) -> None:
    large = FRAME.with_columns((pl.col("user_id") + 2**53).cast(pl.Float64))
    large.with_columns(pl.when(pl.col("timestamp") > 12).then("user_id")).write_parquet(tmp_path / "t.parquet")
    with raises(DataError, Facts("bad-value", "t.parquet", 4, "user_id")):
        loaded(tmp_path / "t.parquet")
    # Missing values make floats of ids, and say so by themselves.
    FRAME.with_columns(pl.when(pl.col("timestamp") > 12).then("user_id").cast(pl.Float64)).write_parquet(
        tmp_path / "t.parquet"
    )
    with raises(DataError, Facts("missing-value", "t.parquet", 1, "user_id")):
        loaded(tmp_path / "t.parquet")


@pytest.mark.parametrize("quoted", [False, True])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_byte_order_mark_within_a_file_belongs_to_no_id(ending: str, quoted: bool, tmp_path: Path) -> None:
    half = [FRAME[:7], FRAME[7:]]
    if ending == "csv":
        parts = [
            half[0].write_csv(quote_style="always" if quoted else None),
            half[1].write_csv(include_header=False, quote_style="always" if quoted else None),
        ]
    else:
        parts = [part.write_ndjson() + ("\n" if quoted else "") for part in half]
    (tmp_path / f"t.{ending}").write_bytes(b"".join(b"\xef\xbb\xbf" + part.encode() for part in parts))
    assert users(tmp_path / f"t.{ending}") == {"1", "2"}


@pytest.mark.parametrize("twin", ["u\u200b1", "u\u00ad1", "u1 ", "\tu1", "\ufeffu1", "u1\u2060"])
def test_ids_that_look_alike_are_pointed_out(twin: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = {1: "u1", 2: twin}
    frame = FRAME.with_columns(pl.col("user_id").replace_strict(names, return_dtype=pl.String))
    frame.write_csv(tmp_path / "t.csv", quote_style="always")
    assert users(tmp_path / "t.csv") == {"u1", twin}
    (note,) = [record.getMessage() for record in caplog.records]
    assert "t.csv: the ids of 2 users" in note and "'u1'" in note and ascii(twin) in note


def test_letters_that_are_composed_otherwise_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    apart, one = "caf\u0065\u0301", "caf\u00e9"
    frame = FRAME.with_columns(pl.col("item_id").cast(pl.String).replace({"5": apart, "6": one}))
    frame.write_csv(tmp_path / "t.csv")
    assert set(loaded(tmp_path / "t.csv").items) > {apart, one}
    assert ascii(apart) in caplog.text and "2 items" in caplog.text
    caplog.clear()
    frame.filter(pl.col("item_id") != apart).write_csv(tmp_path / "t.csv")
    loaded(tmp_path / "t.csv")
    assert "differ" not in caplog.text
