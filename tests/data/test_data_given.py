"""A published split in a table: a column of parts or one file a part, and everything that can be wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.sets.table import SPELLED, load
from llmrec.data.split import SplitDataset, request_of, split
from llmrec.data.stats import statistics
from llmrec.errors import DataError, LlmrecError, RecipeError
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import DataSection, Split
from tests.facts import Facts, raises

Row = tuple[Any, ...]
COLUMNS = ("user_id", "item_id", "rating", "timestamp", "text", "part")
ROWS: list[Row] = [
    ("a", "x", 5, 10, "tall and blue", "train"),
    ("a", "y", 2, 30, "small and red", "train"),
    ("a", "z", 4, 20, "wide and green", "valid"),
    ("a", "w", 1, 40, "thin and grey", "test"),
    ("b", "x", 3, 11, "", "train"),
    ("b", "z", 4, 12, "flat and white", "test"),
]
GIVEN = Split(kind="given")


def one(folder: Path, rows: list[Row], **keys: Any) -> DataSection:
    path = folder / "all.csv"
    pl.DataFrame(rows, schema=COLUMNS, orient="row").write_csv(path)
    return DataSection(source="table", path=str(path), split=GIVEN, **{"columns": {"split": "part"}, **keys})


def several(folder: Path, rows: list[Row], **keys: Any) -> DataSection:
    files = {}
    for part in dict.fromkeys(row[-1] for row in rows):
        files[part] = str(folder / f"{part}.csv")
        frame = pl.DataFrame([row[:-1] for row in rows if row[-1] == part], schema=COLUMNS[:-1], orient="row")
        frame.write_csv(files[part])
    return DataSection(source="table", files=files, split=GIVEN, **keys)


def cut(section: DataSection, seed: int = 0) -> SplitDataset:
    return split(load(section, seed=seed), section.split, seed=seed)


def pairs(frame: pl.DataFrame) -> set[tuple[str, str]]:
    return set(frame.select("user_id", "item_id").iter_rows())


def fails(section: DataSection, facts: Facts) -> None:
    with raises(DataError, facts):
        cut(section)


# --------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("written", [one, several])
def test_every_row_goes_where_the_source_says(tmp_path: Path, written: Any) -> None:
    data = cut(written(tmp_path, ROWS))
    assert pairs(data.train) == {("a", "x"), ("a", "y"), ("b", "x")}
    assert pairs(data.valid) == {("a", "z")}
    assert pairs(data.test) == {("a", "w"), ("b", "z")}
    assert data.known.is_empty() and data.kind == "given"
    assert data.held_out == pairs(data.valid) | pairs(data.test)
    (held,) = (each for each in data.holdouts("test") if each.user_id == "a")
    assert (held.rating, held.timestamp, held.text) == (1.0, 40.0, "thin and grey")
    # Validation events stand where their time puts them.
    assert [event.item_id for event in request_of(data, held, "test").history] == ["x", "z", "y"]
    assert [event.item_id for event in data.history("a", "valid")] == ["x", "y"]
    assert data.dataset.provenance["split"] == "train 3, valid 1, test 2"


def test_a_column_and_files_give_the_same_data(tmp_path: Path) -> None:
    assert cut(one(tmp_path, ROWS)).fingerprint == cut(several(tmp_path, ROWS)).fingerprint


@given(st.permutations(ROWS), st.integers(0, 99))
def test_neither_the_order_of_rows_nor_the_seed_moves_a_given_split(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], seed: int
) -> None:
    base = tmp_path_factory.mktemp("given")
    assert cut(one(base, rows), seed).fingerprint == cut(one(base, ROWS)).fingerprint


@pytest.mark.parametrize("spelling", [*SPELLED, " Train ", "VALIDATION", "Test"])
def test_the_spellings_of_parts(tmp_path: Path, spelling: str) -> None:
    part = SPELLED[spelling.strip().lower()]
    rows = [(*row[:-1], spelling if row[-1] == part else row[-1]) for row in ROWS]
    assert cut(one(tmp_path, rows)).fingerprint == cut(one(tmp_path, ROWS)).fingerprint


def test_a_column_called_split_needs_no_naming(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    pl.DataFrame(ROWS, schema=[*COLUMNS[:-1], "split"], orient="row").write_csv(path)
    assert cut(DataSection(source="table", path=str(path), split=GIVEN)).test.height == 2
    # Another kind of split does not look at it.
    assert cut(DataSection(source="table", path=str(path))).kind == "leave_one_out"


def test_files_of_other_types_and_a_second_table_of_items(tmp_path: Path) -> None:
    section = several(tmp_path, ROWS)
    assert section.files is not None
    frame = pl.read_csv(section.files.test).with_columns(pl.col("rating").cast(pl.Float64))
    frame.write_parquet(tmp_path / "test.parquet")
    (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(f"{i},Title {i}\n" for i in "wxyz"))
    files = {**section.files.model_dump(), "test": str(tmp_path / "test.parquet")}
    data = cut(DataSection(source="table", files=files, items=str(tmp_path / "items.csv"), split=GIVEN))
    assert data.test["rating"].to_list() == [1.0, 4.0]
    assert data.dataset.items["w"].title == "Title w" and data.dataset.name == tmp_path.name


def test_files_are_looked_for_under_llmrec_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several(tmp_path, ROWS)
    monkeypatch.setenv("LLMREC_DATA", str(tmp_path))
    files = {"train": "train.csv", "test": "test.csv"}
    assert cut(DataSection(source="table", files=files, split=GIVEN)).test.height == 2


# --------------------------------------------------------------------------- cold, earlier, missing


def test_cold_users_and_items_stay_in_the_test_part(tmp_path: Path) -> None:
    rows = [*ROWS, ("new", "x", 4, 50, "", "test"), ("b", "unheard", 4, 51, "", "test")]
    data = cut(one(tmp_path, rows))
    assert {("new", "x"), ("b", "unheard")} <= pairs(data.test)
    assert data.history("new", "test") == () and "unheard" in data.dataset.items
    counts = statistics(data)
    # w and z are in no training row either.
    assert (counts["cold_users_test"], counts["cold_items_test"]) == (1, 3)


def test_test_rows_earlier_than_training_rows_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    early = [*ROWS, ("b", "w", 2, 5, "", "test")]
    data = cut(one(tmp_path, early))
    assert "1 of 3 test rows are earlier than a training row" in caplog.text
    assert "1 of 3 test rows" in data.dataset.provenance["notes"]
    # The history is what the source says, whatever its time.
    assert [event.item_id for event in data.history("b", "test")] == ["x"]
    caplog.clear()
    assert "notes" not in cut(one(tmp_path, ROWS)).dataset.provenance and not caplog.text


@pytest.mark.parametrize("written", [one, several])
def test_without_a_valid_part_there_is_only_a_test_part(tmp_path: Path, written: Any) -> None:
    data = cut(written(tmp_path, [row for row in ROWS if row[-1] != "valid"]))
    assert data.valid.is_empty() and data.test.height == 2
    assert "no validation split" in data.dataset.provenance["notes"]


# --------------------------------------------------------------------------- refusals


def test_another_word_is_named_with_its_row(tmp_path: Path) -> None:
    rows = [*ROWS[:4], (*ROWS[4][:-1], "holdout"), ROWS[5]]
    facts = Facts("bad-value", "all.csv", row=5, line=6, column="part", says=("holdout", "validation", "dev"))
    fails(one(tmp_path, rows), facts)
    fails(one(tmp_path, [*ROWS, ("b", "y", 1, 1, "", "")]), Facts("bad-value", "all.csv", row=7, column="part"))


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_part_is_named(tmp_path: Path, part: str) -> None:
    rows = [row for row in ROWS if row[-1] != part]
    fails(one(tmp_path, rows), Facts("too-few", "all.csv", column="part", says=part))
    with pytest.raises(ValueError, match=rf"files\.{part}"):
        several(tmp_path, rows)


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_a_file_without_rows_is_named(tmp_path: Path, part: str) -> None:
    section = several(tmp_path, ROWS)
    (tmp_path / f"{part}.csv").write_text(",".join(COLUMNS[:-1]) + "\n")
    fails(section, Facts("empty", f"{part}.csv"))


def test_a_file_that_is_not_there_or_lacks_a_column_is_named(tmp_path: Path) -> None:
    section = several(tmp_path, ROWS)
    frame = pl.read_csv(tmp_path / "test.csv")
    frame.drop("rating").write_csv(tmp_path / "test.csv")
    fails(section, Facts("missing-column", "test.csv", column="rating"))
    frame.with_columns(extra=1).write_csv(tmp_path / "test.csv")
    fails(section, Facts("missing-column", "train.csv", column="extra"))
    (tmp_path / "test.csv").unlink()
    fails(section, Facts("missing-file", "test.csv"))


def test_errors_name_the_file_and_the_row_in_it(tmp_path: Path) -> None:
    rows = [*ROWS, ("b", "w", "four", 13, "", "test")]
    fails(several(tmp_path, [tuple(map(str, row)) for row in rows]), Facts("bad-value", "test.csv", row=3, line=4))
    fails(several(tmp_path, [*ROWS, ("b", " ", 4, 13, "", "valid")]), Facts("missing-value", "valid.csv", row=2))
    off = several(tmp_path, [*ROWS, ("b", "w", 9, 13, "", "test")], rating_scale=(1, 5))
    fails(off, Facts("bad-value", "test.csv", row=3, column="rating"))


@pytest.mark.parametrize("written", [one, several])
def test_a_pair_in_two_parts_is_an_error_or_held_out(tmp_path: Path, written: Any) -> None:
    # The training row is later: that must not take the pair out of the test part.
    rows = [*ROWS, ("a", "w", 5, 99, "said again", "train")]
    file, row = ("all.csv", 7) if written is one else ("test.csv", 1)
    facts = Facts("duplicate", file, row=row, says=("train", "test", "data.duplicates=keep_last"))
    fails(written(tmp_path, rows), facts)
    kept = cut(written(tmp_path, rows, duplicates="keep_last"))
    assert kept.fingerprint == cut(written(tmp_path, ROWS)).fingerprint


def test_a_pair_in_valid_and_test_is_for_test(tmp_path: Path) -> None:
    rows = [*ROWS, ("a", "w", 5, 99, "said again", "valid")]
    kept = cut(one(tmp_path, rows, duplicates="keep_last"))
    assert pairs(kept.valid) == {("a", "z")} and ("a", "w") in pairs(kept.test)
    assert kept.test.filter(pl.col("item_id") == "w")["rating"].to_list() == [1.0]


def test_a_filter_that_leaves_nothing_held_out_is_refused(tmp_path: Path) -> None:
    rows = [(*row[:2], 1 if row[-1] != "train" else 5, *row[3:]) for row in ROWS]
    fails(one(tmp_path, rows, filter={"min_rating": 2}), Facts("too-few", column="data.filter"))


def test_a_table_without_any_column_of_parts_is_refused(tmp_path: Path) -> None:
    section = one(tmp_path, ROWS, columns={})
    fails(section, Facts("missing-column", "all.csv", column="split", says=("data.columns.split", "data.files")))
    fails(one(tmp_path, ROWS, columns={"split": "prat"}), Facts("missing-column", column="prat", says="part"))


FILES = "files: {train: a.csv, test: b.csv}"
REFUSED = {
    "data.files": [f"{FILES}, path: c.csv, split: {{kind: given}}", f"{FILES}"],
    "data.columns.split": [
        "path: a.csv, columns: {split: part}",
        f"{FILES}, columns: {{split: part}}, split: {{kind: given}}",
    ],
}


@pytest.mark.parametrize(("key", "data"), [(key, data) for key, pages in REFUSED.items() for data in pages])
def test_keys_that_do_not_go_together(tmp_path: Path, key: str, data: str) -> None:
    page = tmp_path / "page.yaml"
    page.write_text(f"name: n\ndata: {{source: table, {data}}}\ntasks: {{rating: {{}}}}\n")
    with pytest.raises(RecipeError, match=key.replace(".", r"\.")):
        load_recipe(str(page))


def test_files_are_for_tables_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.yaml"
    page.write_text(
        f"name: n\ndata: {{source: movielens-100k, {FILES}, split: {{kind: given}}}}\ntasks: {{rating: {{}}}}\n"
    )
    with pytest.raises(LlmrecError, match=r"data\.files"):
        load_recipe(str(page))
