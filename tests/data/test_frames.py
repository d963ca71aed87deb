"""Frames in memory: every kind equals a file with the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

import llmrec
from llmrec.data.frames import as_arrow
from llmrec.errors import DataError, RecipeError
from tests.facts import Facts, raises
from tests.tasks.task_data import make_dataset

DATASET = make_dataset(hostile=False)
IDS = pl.col("user_id", "item_id")
ROWS = DATASET.interactions.select(IDS.cast(pl.String), "rating", "timestamp")
ITEMS = pl.DataFrame([{"item_id": item.item_id, "title": item.title, **item.fields} for item in DATASET.items.values()])
RECIPE: dict[str, Any] = {
    "name": "frames",
    "data": {"source": "table", "columns": {"rating": "rating", "time": "timestamp", "fields": ["genres"]}},
    "tasks": {"sequential": {"strategies": ["likelihood"]}, "rating": {"strategies": ["parsed"]}},
    "eval": {"arms": ["zero-shot"], "backend": "fake", "scorer": "fake", "users": 10, "bootstrap": 20}
    | {"candidates": {"count": 5}},
}


def as_pandas(frame: pl.DataFrame) -> Any:
    pytest.importorskip("pandas")
    return frame.to_pandas()


def as_dataset(frame: pl.DataFrame) -> Any:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(frame.to_dicts())
    # A selection has indices into its table.
    reverse = list(reversed(range(len(rows))))
    return rows.select(reverse).select(reverse)


KINDS: dict[str, Any] = {
    "pandas": as_pandas,
    "polars": lambda frame: frame,
    "categories": lambda frame: frame.with_columns(IDS.cast(pl.Categorical)),
    "arrow": lambda frame: frame.to_arrow(),
    "batches": lambda frame: pa.RecordBatchReader.from_batches(frame.to_arrow().schema, frame.to_arrow().to_batches()),
    "datasets": as_dataset,
    "dictionaries": lambda frame: frame.to_dicts(),
    "columns": lambda frame: frame.to_dict(as_series=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_frames_give_same_table(kind: str) -> None:
    table = as_arrow(KINDS[kind](ROWS), "frame")
    assert pl.DataFrame(pl.from_arrow(table)).with_columns(IDS.cast(pl.String)).equals(ROWS)


def test_named_index_is_a_column() -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"user": ["a", "b", "c"], "item": ["x", "y", "z"]})
    assert as_arrow(frame[frame["user"] != "b"], "frame").column_names == ["user", "item"]
    assert as_arrow(frame[1:], "frame").to_pylist() == [{"user": "b", "item": "y"}, {"user": "c", "item": "z"}]
    assert "user" in as_arrow(frame.set_index("user"), "frame").column_names


def test_missing_keys_are_null() -> None:
    rows = ROWS.to_dicts()
    first = {name: value for name, value in rows[0].items() if name not in ("rating", "timestamp")}
    table = pl.DataFrame(pl.from_arrow(as_arrow([first, *rows[1:]], "frame")))
    assert table.columns == ["user_id", "item_id", "rating", "timestamp"]
    assert table["rating"].null_count() == 1 and table[1:].equals(ROWS[1:])
    for nothing in ([], {}):
        with raises(DataError, Facts("empty", "interactions frame")):
            llmrec.check(RECIPE, data=nothing)


def test_lists_of_texts_are_fields() -> None:
    items = ITEMS.with_columns(pl.Series("genres", [["Drama", "Crime"]] * ITEMS.height))
    for frame in (items.to_arrow(), items.to_dicts()):
        assert llmrec.check(RECIPE, data=ROWS, items=frame).cases["sequential"] == 10


@pytest.mark.parametrize("kind", ["pandas", pytest.param("datasets", marks=pytest.mark.slow)])
def test_run_over_frames_equals_run_over_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ROWS.write_parquet("rows.parquet")
    ITEMS.write_parquet("items.parquet")
    recipe = {**RECIPE, "tasks": {"rating": {"strategies": ["parsed"]}}}
    files = {**recipe, "data": {**RECIPE["data"], "path": "rows.parquet", "items": "items.parquet"}}
    expected = llmrec.run(files, "files", quiet=True).results
    result = llmrec.run(recipe, "frames", data=KINDS[kind](ROWS), items=KINDS[kind](ITEMS), quiet=True).results
    figures = [{row["id"]: row["metrics"] for row in each["rows"]} for each in (expected, result)]
    assert figures[0] == figures[1] and len(figures[0]) > 2
    # Two events have the same time.
    assert any("last_basket" in note for note in result["notes"])
    assert result["data"]["main"]["fingerprint"] == expected["data"]["main"]["fingerprint"]
    assert sorted(path.name for path in Path("frames", "data").iterdir()) == ["interactions.parquet", "items.parquet"]
    # The run folder is sufficient to repeat the run.
    assert llmrec.run("frames/recipe.yaml", "frames", quiet=True).results["rows"] == result["rows"]
    # A different frame in the same folder is evaluated anew.
    other = llmrec.run(recipe, "frames", data=ROWS[:-40], items=ITEMS, quiet=True).results
    assert other["data"]["main"]["fingerprint"] != expected["data"]["main"]["fingerprint"]
    assert other["rows"] != expected["rows"]


def test_check_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = llmrec.check(RECIPE, data=ROWS, items=ITEMS)
    assert result.cases == {"sequential": 10, "rating": 10}
    # Two events have the same time in this data.
    assert len(result.warnings) == 1 and "last_basket" in result.warnings[0]
    assert result.statistics["users"] == 40
    assert not list(tmp_path.iterdir())


HOLES = ROWS.with_columns(pl.Series("rating", [None, *ROWS["rating"].to_list()[1:]]))


@pytest.mark.parametrize(
    ("frame", "arguments", "parts"),
    [
        (ROWS.select(pl.col("rating"), pl.col("timestamp").alias("b")), {}, ['user="COLUMN" item="COLUMN"']),
        (ROWS, {"user": "usr_id"}, ["named by user;", "did you mean 'user_id'"]),
        (ROWS, {"user": "user_id", "item": "user_id"}, ["two options: user, item"]),
        (HOLES, {"rating": "rating"}, ['rating="none" to ignore ratings']),
        (ROWS.with_columns(when=pl.lit("03/04/2024")), {"time": "when"}, ['dates="day-first" or dates="month-first"']),
    ],
)
def test_init_names_arguments_instead_of_options(
    frame: pl.DataFrame, arguments: dict[str, str], parts: list[str]
) -> None:
    try:
        text = llmrec.init(frame, **arguments).found
    except DataError as error:
        text = str(error)
    assert "--" not in text and all(part in text for part in parts)


def test_recipe_of_init_reads_the_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = llmrec.init(ROWS, ITEMS, name="films")
    data = result.recipe.data
    assert (data.path, data.items, data.columns.user, data.columns.time) == (None, None, "user_id", "timestamp")
    assert "tasks" in result.found and "llmrec run" not in result.found
    assert "interactions frame: " in result.found and ".parquet" not in result.found
    assert not list(tmp_path.iterdir())
    named = llmrec.init(ROWS.rename({"rating": "stars"}), ITEMS, rating="none")
    assert named.recipe.data.columns.rating is None
    checked = llmrec.check(result.recipe, data=ROWS, items=ITEMS)
    assert all(count > 0 for count in checked.cases.values())


def test_malformed_frames() -> None:
    with raises(DataError, Facts("wrong-format", says=("pathlib", "pandas"))):
        llmrec.check(RECIPE, data=Path("rows.csv"))
    mixed = [{"user_id": "u1", "item_id": "i1"}, {"user_id": 2, "item_id": "i2"}]
    with raises(DataError, Facts("bad-value", says="values of several types")):
        llmrec.check(RECIPE, data=mixed)
    with raises(DataError, Facts("missing-column", "interactions frame", column="user_id")) as caught:
        llmrec.check(RECIPE, data=ROWS.drop("user_id"), items=ITEMS)
    assert "/" not in str(caught.value).partition(":")[0]
    users = ROWS["user_id"].to_list()
    holes = ROWS.with_columns(user_id=pl.Series([*users[:2], None, *users[3:]]))
    with raises(DataError, Facts("missing-value", "interactions frame", row=3, column="user_id")):
        llmrec.check(RECIPE, data=holes, items=ITEMS)


def test_other_sources_reject_frames() -> None:
    with raises(RecipeError, Facts("contradiction", column="data.source", says="movielens-100k")):
        llmrec.check({**RECIPE, "data": {"source": "movielens-100k"}}, data=ROWS)
    parts = {"source": "table", "files": {"train": "a.csv", "test": "b.csv"}, "split": {"kind": "given"}}
    with raises(RecipeError, Facts("contradiction", column="data.source", says="data.files")):
        llmrec.check({**RECIPE, "data": parts}, data=ROWS)
