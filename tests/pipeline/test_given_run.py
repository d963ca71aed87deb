"""A given split end to end: every task that a table supports, in runs, training and suites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from llmrec.data.hashing import hash64
from llmrec.data.sets.table import load_data
from llmrec.errors import DataError, LlmrecError
from llmrec.pipeline.leaks import audit_training_interactions
from llmrec.pipeline.run import run
from llmrec.pipeline.study import build_study
from llmrec.recipe.comparisons import Suite
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import DataSection, Recipe
from tests.facts import Facts, raises
from tests.pipeline.given_table import PAGE, write

pytest.importorskip("llmrec.bench", reason="the extension is not there")

from llmrec.bench.run import run_benchmark

FAMILIES = ("rating", "ctr", "sequential", "direct", "explanation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def page(folder: Path, llama_folder: Path) -> Path:
    path = folder / "page.yaml"
    path.write_text(PAGE.format(folder=folder, model=llama_folder), encoding="utf-8")
    return path


def files(folder: Path, *parts: str) -> str:
    paths = ", ".join(f"{part}: {folder}/{'dev' if part == 'valid' else part}.csv" for part in parts)
    return f"data={{source: table, files: {{{paths}}}, split: {{kind: given}}}}"


def test_column_and_files_give_the_same_split(page: Path, folder: Path) -> None:
    column = build_study(load_recipe(str(page)))
    parts = build_study(load_recipe(str(page), [files(folder, "train", "valid", "test")]))
    order = ["user_id", "item_id", "timestamp"]
    for part in ("train", "valid", "test"):
        one, other = (getattr(study.data, part).sort(order) for study in (column, parts))
        assert one.equals(other), part
    for family in FAMILIES:
        assert column.cases(family) == parts.cases(family)


def test_every_task_runs_on_given_split(page: Path, tmp_path: Path) -> None:
    done = run(load_recipe(str(page)), tmp_path / "run", quiet=True)
    rows, main = done.results["rows"], done.results["data"]["main"]
    assert {row["task"] for row in rows} == set(FAMILIES)
    assert all(row["n"] == 50 and row["users"] == 25 for row in rows)
    assert (main["train"], main["valid"], main["test"], main["split"]) == (216, 24, 50, "given")
    assert json.loads((done.folder / "audit.json").read_text(encoding="utf-8"))["leaks"] == 0
    for row in rows:
        assert "split:given/test" in row["metrics"][done.results["headline"][row["task"]]]["signature"]


def test_model_is_trained_without_valid_part(page: Path, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    overrides = [
        files(folder, "train", "test"),
        "tasks={rating: {}, sequential: {}, ctr: {liked: 4}, direct: {}, explanation: {}}",
        "eval={arms: [tuned], backend: hf, users: 3, bootstrap: 50, candidates: {count: 5}}",
        "train={steps: 2, batch_tokens: 1024, max_row_tokens: 1000, valid_rows: 5, lora: {top_layers: 1}}",
    ]
    done = run(load_recipe(str(page), overrides), tmp_path / "r", quiet=True)
    assert {row["task"] for row in done.results["rows"] if row["arm"] == "tuned"} == set(FAMILIES)
    assert done.results["data"]["main"]["valid"] == 0


def test_rejects_validation_without_valid_part(page: Path, folder: Path, tmp_path: Path) -> None:
    bare = files(folder, "train", "test")
    with raises(LlmrecError, Facts("empty", column="eval.split", says="eval.split")):
        build_study(load_recipe(str(page), [bare, "eval.split=valid"]))
    with raises(LlmrecError, Facts("empty", column="tasks.ctr.calibrate", says="none")):
        build_study(load_recipe(str(page), [bare, "tasks.ctr.calibrate=valid"]))
    section = load_recipe(str(page), [bare]).data
    suite = Suite(suite="made", data=section, bootstrap=50, rows=[{"baseline": "item-knn"}])
    with raises(DataError, Facts("empty", column="data.split.valid", says="validation split")):
        run_benchmark(suite, out=tmp_path / "out", results=tmp_path / "results")


# --------------------------------------------------------------------------- MovieLens-100K


@pytest.fixture(scope="module")
def movielens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a split of MovieLens-100K like u1.base and u1.test: a random fifth of the ratings is held out."""
    folder = tmp_path_factory.mktemp("ml")
    data = load_data(DataSection(source="movielens-100k"), seed=0)
    rows = data.interactions.drop("text")
    chosen = pl.Series(hash64("u1", 0, rows["user_id"].to_list(), rows["item_id"].to_list()) % 5 == 0)
    rows.filter(~chosen).write_csv(folder / "base.tsv", separator="\t")
    rows.filter(chosen).write_csv(folder / "test.tsv", separator="\t")
    items = [(item.item_id, item.title, item.fields["genres"]) for item in data.items.values()]
    pl.DataFrame(items, schema=["item_id", "title", "genres"], orient="row").write_csv(folder / "items.csv")
    return folder


def section(folder: Path) -> dict[str, Any]:
    return {
        "source": "table",
        "files": {"train": str(folder / "base.tsv"), "test": str(folder / "test.tsv")},
        "items": str(folder / "items.csv"),
        "columns": {"rating": "rating", "time": "timestamp", "title": "title", "fields": ["genres"]},
        "split": {"kind": "given"},
        "noun": "movies",
    }


@pytest.mark.slow
def test_rating_baselines_on_published_split(movielens: Path, tmp_path: Path) -> None:
    rows = [{"baseline": name, "tune": False} for name in ("global-mean", "user-mean", "user-item-bias")]
    suite = Suite(suite="u1", task="rating", data=section(movielens), bootstrap=50, rows=rows)
    results = run_benchmark(suite, out=tmp_path / "out", results=tmp_path / "results").results
    assert results.protocol.split == "given/test" and results.protocol.requests == results.data.test
    assert (results.data.users, results.data.items, results.data.interactions) == (943, 1682, 100_000)
    error = {row.name: row.tables["rating"].metrics["RMSE"].value or 0.0 for row in results.rows}
    assert error["user-item-bias"] < 0.98 < 1.0 < error["user-mean"] < 1.07 < error["global-mean"] < 1.16


def test_audit_notes_that_split_is_not_cut_in_time(movielens: Path) -> None:
    recipe = Recipe.model_validate(
        {"name": "u1", "data": section(movielens), "tasks": {"rating": {}}, "eval": {"arms": ["zero-shot"]}}
    )
    check = audit_training_interactions(build_study(recipe).data)
    assert check.verdict == "notice" and check.figures["earlier"] > 10_000
    assert "histories contain later interactions" in check.found
