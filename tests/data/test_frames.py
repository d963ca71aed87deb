"""Frames in memory: whatever holds them, they are the table that a file of the same rows is."""

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
    "eval": {
        "arms": ["zero-shot"],
        "backend": "fake",
        "scorer": "fake",
        "users": 10,
        "bootstrap": 20,
        "candidates": {"count": 5},
    },
}


def as_pandas(frame: pl.DataFrame) -> Any:
    pytest.importorskip("pandas")
    return frame.to_pandas()


def as_dataset(frame: pl.DataFrame) -> Any:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(frame.to_dicts())
    # What is selected and turned round stands beside its table, and must be read as it is shown.
    turned = list(reversed(range(len(rows))))
    return rows.select(turned).select(turned)


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
def test_every_kind_is_the_same_table(kind: str) -> None:
    table = as_arrow(KINDS[kind](ROWS), "frame")
    assert pl.DataFrame(pl.from_arrow(table)).with_columns(IDS.cast(pl.String)).equals(ROWS)


def test_an_index_is_a_column_only_where_it_has_a_name() -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"user": ["a", "b", "c"], "item": ["x", "y", "z"]})
    assert as_arrow(frame[frame["user"] != "b"], "frame").column_names == ["user", "item"]
    assert as_arrow(frame[1:], "frame").to_pylist() == [{"user": "b", "item": "y"}, {"user": "c", "item": "z"}]
    assert "user" in as_arrow(frame.set_index("user"), "frame").column_names


def test_rows_that_lack_a_column_have_nothing_in_it() -> None:
    rows = ROWS.to_dicts()
    first = {name: value for name, value in rows[0].items() if name not in ("rating", "timestamp")}
    table = pl.DataFrame(pl.from_arrow(as_arrow([first, *rows[1:]], "frame")))
    assert table.columns == ["user_id", "item_id", "rating", "timestamp"]
    assert table["rating"].null_count() == 1 and table[1:].equals(ROWS[1:])
    for nothing in ([], {}):
        with raises(DataError, Facts("empty", "interactions frame")):
            llmrec.check(RECIPE, data=nothing)


def test_lists_of_texts_are_fields_whatever_holds_them() -> None:
    items = ITEMS.with_columns(pl.Series("genres", [["Drama", "Crime"]] * ITEMS.height))
    for frame in (items, items.to_arrow(), items.to_dicts()):
        assert llmrec.check(RECIPE, data=ROWS, items=frame).cases["sequential"] == 10


@pytest.mark.parametrize("kind", ["pandas", pytest.param("datasets", marks=pytest.mark.slow)])
def test_a_run_over_frames_is_the_run_over_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ROWS.write_parquet("rows.parquet")
    ITEMS.write_parquet("items.parquet")
    files = {**RECIPE, "data": {**RECIPE["data"], "path": "rows.parquet", "items": "items.parquet"}}
    wanted = llmrec.run(files, "files", quiet=True)
    found = llmrec.run(RECIPE, "frames", data=KINDS[kind](ROWS), items=KINDS[kind](ITEMS), quiet=True)
    figures = [{row["id"]: row["metrics"] for row in run.results["rows"]} for run in (wanted, found)]
    assert figures[0] == figures[1] and len(figures[0]) > 5
    prints = [run.results["data"]["main"]["fingerprint"] for run in (wanted, found)]
    assert prints[0] == prints[1]
    assert sorted(path.name for path in Path("frames", "data").iterdir()) == ["interactions.parquet", "items.parquet"]
    # What the run folder holds is enough to run it again, without the frames.
    again = llmrec.run("frames/recipe.yaml", "frames", quiet=True)
    assert again.results["rows"] == found.results["rows"]


def test_another_frame_in_the_same_folder_makes_rows_anew(tmp_path: Path) -> None:
    first = llmrec.run(RECIPE, tmp_path / "run", data=ROWS, items=ITEMS, quiet=True)
    other = llmrec.run(RECIPE, tmp_path / "run", data=ROWS[:-40], items=ITEMS, quiet=True)
    assert first.results["data"]["main"]["fingerprint"] != other.results["data"]["main"]["fingerprint"]
    assert first.results["rows"] != other.results["rows"]


def test_check_says_what_there_is_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = llmrec.check(RECIPE, data=ROWS, items=ITEMS)
    assert found.cases == {"sequential": 10, "rating": 10}
    # Two events share a moment in this data.
    assert len(found.warnings) == 1 and "last_basket" in found.warnings[0]
    assert found.statistics["users"] == 40
    assert not list(tmp_path.iterdir())


def test_ways_out_for_a_frame_are_those_of_python() -> None:
    holes = ROWS.with_columns(pl.Series("rating", [None, *ROWS["rating"].to_list()[1:]]))
    with pytest.raises(DataError) as caught:
        llmrec.init(holes, rating="rating")
    assert 'rating="none" to ignore ratings' in str(caught.value) and "--" not in str(caught.value)


@pytest.mark.parametrize(
    ("frame", "said", "parts"),
    [
        (ROWS.select(pl.col("rating"), pl.col("timestamp").alias("b")), {}, ['user="COLUMN" item="COLUMN"']),
        (ROWS.with_columns(client=pl.col("user_id").str.head(1)), {}, []),
        (ROWS, {"user": "usr_id"}, ["named by user;", "did you mean 'user_id'"]),
        (ROWS, {"user": "user_id", "item": "user_id"}, ["two options: user, item"]),
        (ROWS.with_columns(stars=pl.lit("a")), {"rating": "stars"}, ['rating="none"']),
        (ROWS.with_columns(when=pl.lit("03/04/2024")), {"time": "when"}, ['dates="day-first" or dates="month-first"']),
    ],
)
def test_init_speaks_of_arguments_and_not_of_options(
    frame: pl.DataFrame, said: dict[str, str], parts: list[str]
) -> None:
    try:
        text = llmrec.init(frame, **said).found
    except DataError as error:
        text = str(error)
    assert "--" not in text and all(part in text for part in parts)


def test_check_names_cut_offs_of_the_recipes_own_that_are_beyond_what_is_ranked() -> None:
    recipe = {**RECIPE, "eval": {**RECIPE["eval"], "cutoffs": [1, 5]}}
    found = llmrec.check(recipe, data=ROWS, items=ITEMS)
    assert any("5 items are ranked per request, so HR@5 is always 1" in warning for warning in found.warnings)


def test_init_looks_at_a_frame_and_its_recipe_runs_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    begun = llmrec.init(ROWS, ITEMS, name="films")
    data = begun.recipe.data
    assert (data.path, data.items, data.columns.user, data.columns.time) == (None, None, "user_id", "timestamp")
    assert "tasks" in begun.found and "llmrec run" not in begun.found
    assert "interactions frame: " in begun.found and ".parquet" not in begun.found
    assert not list(tmp_path.iterdir())
    named = llmrec.init(ROWS.rename({"rating": "stars"}), ITEMS, rating="none")
    assert named.recipe.data.columns.rating is None
    found = llmrec.check(begun.recipe, data=ROWS, items=ITEMS)
    assert all(count > 0 for count in found.cases.values())


# --------------------------------------------------------------------------- what cannot be used


def test_what_is_no_frame_is_said_with_its_type() -> None:
    with raises(DataError, Facts("wrong-format", says=("pathlib", "pandas"))):
        llmrec.check(RECIPE, data=Path("rows.csv"))
    mixed = [{"user_id": "u1", "item_id": "i1"}, {"user_id": 2, "item_id": "i2"}]
    with raises(DataError, Facts("bad-value", says="values of several types")):
        llmrec.check(RECIPE, data=mixed)
    with raises(DataError, Facts("missing-column", "interactions frame", column="user_id")) as found:
        llmrec.check(RECIPE, data=ROWS.drop("user_id"), items=ITEMS)
    assert "/" not in str(found.value).partition(":")[0]
    with raises(DataError, Facts("missing-value", "interactions frame", row=3, column="user_id")):
        llmrec.check(
            RECIPE,
            data=ROWS.with_row_index().with_columns(
                pl.when(pl.col("index") == 2).then(None).otherwise(pl.col("user_id")).alias("user_id")
            ),
            items=ITEMS,
        )


def test_a_source_that_is_no_table_takes_no_frame() -> None:
    with raises(RecipeError, Facts("contradiction", column="data.source", says="movielens-100k")):
        llmrec.check({**RECIPE, "data": {"source": "movielens-100k"}}, data=ROWS)
    parts = {"source": "table", "files": {"train": "a.csv", "test": "b.csv"}, "split": {"kind": "given"}}
    with raises(RecipeError, Facts("contradiction", column="data.source", says="data.files")):
        llmrec.check({**RECIPE, "data": parts}, data=ROWS)


def test_a_mapping_is_checked_like_a_page() -> None:
    with raises(RecipeError, Facts("unknown-key", column="eval.userz", says="did you mean 'users'")):
        llmrec.check({**RECIPE, "eval": {"userz": 3}})
    with raises(RecipeError, Facts("bad-value", says="set")):
        llmrec.check({**RECIPE, "description": {1, 2}})
    recipe = llmrec.Recipe.model_validate({"data": {"source": "table"}, **RECIPE})
    assert llmrec.check(recipe, data=ROWS, items=ITEMS).cases
