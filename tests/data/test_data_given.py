"""Published splits of tables, in a column or in one file per part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from data_cases import pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.data.sets.table import PART_SPELLINGS, load_data
from llmrec.data.split import SplitDataset, request_of, split_dataset
from llmrec.data.stats import statistics
from llmrec.errors import DataError, RecipeError
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
    return split_dataset(load_data(section, seed=seed), section.split, seed=seed)


def fails(section: DataSection, facts: Facts) -> None:
    with raises(DataError, facts):
        cut(section)


@pytest.mark.parametrize("written", [one, several])
def test_rows_are_in_their_part(tmp_path: Path, written: Any) -> None:
    data = cut(written(tmp_path, ROWS))
    assert set(pairs(data.train)) == {("a", "x"), ("a", "y"), ("b", "x")}
    assert set(pairs(data.valid)) == {("a", "z")}
    assert set(pairs(data.test)) == {("a", "w"), ("b", "z")}
    assert data.known.is_empty() and data.kind == "given"
    assert data.held_out == set(pairs(data.valid)) | set(pairs(data.test))
    (held,) = (each for each in data.holdouts("test") if each.user_id == "a")
    assert (held.rating, held.timestamp, held.text) == (1.0, 40.0, "thin and grey")
    # Validation events are ordered by time.
    assert [event.item_id for event in request_of(data, held, "test").history] == ["x", "z", "y"]
    assert [event.item_id for event in data.history("a", "valid")] == ["x", "y"]
    assert data.dataset.provenance["split"] == "train 3, valid 1, test 2"


@settings(max_examples=5)
@given(st.permutations(ROWS), st.integers(0, 99))
def test_row_order_and_seed_do_not_matter(tmp_path_factory: pytest.TempPathFactory, rows: list[Row], seed: int) -> None:
    base = tmp_path_factory.mktemp("given")
    assert cut(one(base, rows), seed).fingerprint == cut(one(base, ROWS)).fingerprint


@pytest.mark.parametrize("spelling", [" Train ", "VALIDATION", "dev"])
def test_spellings_of_parts(tmp_path: Path, spelling: str) -> None:
    part = PART_SPELLINGS[spelling.strip().lower()]
    rows = [(*row[:-1], spelling if row[-1] == part else row[-1]) for row in ROWS]
    assert cut(one(tmp_path, rows)).fingerprint == cut(one(tmp_path, ROWS)).fingerprint


def test_column_named_split_is_found(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    pl.DataFrame(ROWS, schema=[*COLUMNS[:-1], "split"], orient="row").write_csv(path)
    assert cut(DataSection(source="table", path=str(path), split=GIVEN)).test.height == 2
    # Other splits ignore the column.
    assert cut(DataSection(source="table", path=str(path))).kind == "leave_one_out"


def test_other_file_types_and_table_of_items(tmp_path: Path) -> None:
    section = several(tmp_path, ROWS)
    assert section.files is not None
    frame = pl.read_csv(section.files.test).with_columns(pl.col("rating").cast(pl.Float64))
    frame.write_parquet(tmp_path / "test.parquet")
    (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(f"{i},Title {i}\n" for i in "wxyz"))
    files = {**section.files.model_dump(), "test": str(tmp_path / "test.parquet")}
    data = cut(DataSection(source="table", files=files, items=str(tmp_path / "items.csv"), split=GIVEN))
    assert data.test["rating"].to_list() == [1.0, 4.0]
    assert data.dataset.items["w"].title == "Title w" and data.dataset.name == tmp_path.name


def test_relative_files_in_llmrec_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several(tmp_path, ROWS)
    monkeypatch.setenv("LLMREC_DATA", str(tmp_path))
    files = {"train": "train.csv", "test": "test.csv"}
    assert cut(DataSection(source="table", files=files, split=GIVEN)).test.height == 2


def test_cold_users_and_items_stay_in_the_test_part(tmp_path: Path) -> None:
    rows = [*ROWS, ("new", "x", 4, 50, "", "test"), ("b", "unknown", 4, 51, "", "test")]
    data = cut(one(tmp_path, rows))
    assert {("new", "x"), ("b", "unknown")} <= set(pairs(data.test))
    assert data.history("new", "test") == () and "unknown" in data.dataset.items
    counts = statistics(data)
    # w and z are not in any training row either.
    assert (counts["cold_users_test"], counts["cold_items_test"]) == (1, 3)


def test_reports_test_rows_before_training_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    early = [*ROWS, ("b", "w", 2, 5, "", "test")]
    data = cut(one(tmp_path, early))
    assert "1 of 3 test rows are earlier than a training row" in caplog.text
    assert "1 of 3 test rows" in data.dataset.provenance["notes"]
    # The history is the training part, whatever its time.
    assert [event.item_id for event in data.history("b", "test")] == ["x"]
    caplog.clear()
    assert "notes" not in cut(one(tmp_path, ROWS)).dataset.provenance and not caplog.text


@pytest.mark.parametrize("written", [one, several])
def test_without_validation_part(tmp_path: Path, written: Any) -> None:
    data = cut(written(tmp_path, [row for row in ROWS if row[-1] != "valid"]))
    assert data.valid.is_empty() and data.test.height == 2
    assert "no validation split" in data.dataset.provenance["notes"]


def test_unknown_part(tmp_path: Path) -> None:
    rows = [*ROWS[:4], (*ROWS[4][:-1], "holdout"), ROWS[5]]
    facts = Facts("bad-value", "all.csv", row=5, line=6, column="part", says=("holdout", "validation", "dev"))
    fails(one(tmp_path, rows), facts)
    fails(one(tmp_path, [*ROWS, ("b", "y", 1, 1, "", "")]), Facts("bad-value", "all.csv", row=7, column="part"))


@pytest.mark.parametrize("part", ["train", "test"])
def test_empty_part(tmp_path: Path, part: str) -> None:
    rows = [row for row in ROWS if row[-1] != part]
    fails(one(tmp_path, rows), Facts("too-few", "all.csv", column="part", says=part))
    with pytest.raises(ValueError, match=rf"files\.{part}"):
        several(tmp_path, rows)


def test_file_without_rows(tmp_path: Path) -> None:
    section = several(tmp_path, ROWS)
    (tmp_path / "valid.csv").write_text(",".join(COLUMNS[:-1]) + "\n")
    fails(section, Facts("empty", "valid.csv"))


def test_missing_file_or_column(tmp_path: Path) -> None:
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
def test_pair_in_training_and_test(tmp_path: Path, written: Any) -> None:
    # The training row is later; it must not remove the pair from the test part.
    rows = [*ROWS, ("a", "w", 5, 99, "again", "train")]
    file, row = ("all.csv", 7) if written is one else ("test.csv", 1)
    facts = Facts("duplicate", file, row=row, says=("train", "test", "data.duplicates=keep_last"))
    fails(written(tmp_path, rows), facts)
    kept = cut(written(tmp_path, rows, duplicates="keep_last"))
    assert kept.fingerprint == cut(written(tmp_path, ROWS)).fingerprint


def test_pair_in_validation_and_test(tmp_path: Path) -> None:
    rows = [*ROWS, ("a", "w", 5, 99, "again", "valid")]
    kept = cut(one(tmp_path, rows, duplicates="keep_last"))
    assert set(pairs(kept.valid)) == {("a", "z")} and ("a", "w") in set(pairs(kept.test))
    assert kept.test.filter(pl.col("item_id") == "w")["rating"].to_list() == [1.0]


def test_filter_without_held_out_rows(tmp_path: Path) -> None:
    rows = [(*row[:2], 1 if row[-1] != "train" else 5, *row[3:]) for row in ROWS]
    fails(one(tmp_path, rows, filter={"min_rating": 2}), Facts("too-few", column="data.filter"))


def test_table_without_column_of_parts(tmp_path: Path) -> None:
    section = one(tmp_path, ROWS, columns={})
    fails(section, Facts("missing-column", "all.csv", column="split", says=("data.columns.split", "data.files")))
    fails(one(tmp_path, ROWS, columns={"split": "prat"}), Facts("missing-column", column="prat", says="part"))


FILES = "files: {train: a.csv, test: b.csv}"


@pytest.mark.parametrize(
    ("key", "data"),
    [
        ("data.files", f"source: table, {FILES}, path: c.csv, split: {{kind: given}}"),
        ("data.files", f"source: table, {FILES}"),
        ("data.files", f"source: movielens-100k, {FILES}, split: {{kind: given}}"),
        ("data.columns.split", "source: table, path: a.csv, columns: {split: part}"),
        ("data.columns.split", f"source: table, {FILES}, columns: {{split: part}}, split: {{kind: given}}"),
    ],
)
def test_contradicting_keys(tmp_path: Path, key: str, data: str) -> None:
    page = tmp_path / "page.yaml"
    page.write_text(f"name: n\ndata: {{{data}}}\ntasks: {{rating: {{}}}}\n")
    with pytest.raises(RecipeError, match=key.replace(".", r"\.")):
        load_recipe(str(page))
