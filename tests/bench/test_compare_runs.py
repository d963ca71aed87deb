"""`llmrec compare`: differences between two finished runs, and rejection of runs with different cases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from llmrec.bench.runs import compare_runs
from llmrec.cli.main import app
from llmrec.errors import DataError
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.runs import read_finished_results, read_stored_row
from tests.facts import Facts, raises

RECIPE = """\
name: shop
data: {source: made-reviews, noun: products, split: {kind: last_share, valid: 0.2, test: 0.4}}
tasks:
  sequential: {baselines: [random, popularity, item-knn, markov-1]}
  rating: {baselines: [global-mean, user-mean, item-mean, user-item-bias]}
eval: {arms: [], users: 12, bootstrap: 50, candidates: {count: 5}, fusion: {controls: false}}
"""


def run(folder: Path, name: str, *changes: str) -> Path:
    (folder / "page.yaml").write_text(RECIPE)
    return pipeline.run(folder / "page.yaml", folder / name, overrides=changes, quiet=True).folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    other = "tasks.sequential.baselines=[random, popularity, {name: item-knn, shrinkage: 3}, markov-1, markov]"
    return run(folder, "a"), run(folder, "b", other)


def test_differences_are_paired_by_user(runs: tuple[Path, Path]) -> None:
    result = compare_runs(*runs)
    assert result.headline == {"sequential": "NDCG@10", "rating": "RMSE"}
    (best,) = (pair for pair in result.differences if pair.best and pair.metric == "NDCG@10")
    pairs = list(zip(runs, (best.a, best.b), strict=True))
    rows = [read_stored_row(folder, read_finished_results(folder).row(name)) for folder, name in pairs]
    a, b = (row.values["NDCG@10"] for row in rows)
    assert best.value == pytest.approx(float(np.mean(a - b))) and best.users == 12
    assert (best.a_value, best.b_value) == pytest.approx((a.mean(), b.mean()))
    assert best.low <= best.value <= best.high and best.verdict is None and best.p is None
    assert all(name == read_finished_results(folder).standings("sequential")[0].id for folder, name in pairs)
    same = [pair for pair in result.differences if pair.a == pair.b == "sequential/baseline/popularity"]
    assert {pair.metric for pair in same} >= {"NDCG@10", "HR@10", "MRR"}
    assert {(pair.value, pair.low, pair.high) for pair in same} == {(0, 0, 0)}
    assert result.only_a == ("sequential/baseline/item-knn",)
    assert result.only_b == ("sequential/baseline/item-knn(shrinkage=3)", "sequential/baseline/markov")
    swapped = compare_runs(runs[1], runs[0])
    assert swapped.differences[0].value == pytest.approx(-result.differences[0].value)
    assert str(result).startswith("Two runs compared") and "A − B" in result._repr_html_()


def test_command_writes_every_difference_to_a_file(runs: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "differences.csv"
    for _ in ("new", "replaces its own output"):
        done = CliRunner().invoke(app, ["compare", *map(str, runs), "--to", str(file)], catch_exceptions=False)
        assert done.exit_code == 0
    assert "Next item from history: NDCG@10, 12 users" in done.stdout and f"file: {file}" in done.stdout
    frame, expected = pl.read_csv(file), compare_runs(*runs).differences
    assert frame["difference"].to_list() == pytest.approx([pair.value for pair in expected])
    assert frame["row_b"].to_list() == [pair.b for pair in expected]
    file.write_text("another file")
    with raises(DataError, Facts("exists", column="--to")):
        CliRunner().invoke(app, ["compare", *map(str, runs), "--to", str(file)], catch_exceptions=False)


def test_accepts_results_of_run(runs: tuple[Path, Path]) -> None:
    class Run:
        folder = runs[0]

    assert compare_runs(Run, str(runs[1])) == compare_runs(*runs)
    assert json.loads(json.dumps(compare_runs(*runs).as_json()))["differences"][0]["best"] is True


@pytest.mark.parametrize(
    ("changes", "column", "says"),
    [
        (["eval.users=11"], "eval.users", "12 and 11"),
        (["eval.candidates.count=4"], "eval.candidates", "other candidates"),
        (["data.split.test=0.3"], "data", "other data or another split"),
        (["tasks={ctr: {baselines: [like-ratio, logistic]}}"], "tasks", "no task in common"),
    ],
)
def test_rejects_runs_on_other_cases(
    runs: tuple[Path, Path], tmp_path: Path, changes: list[str], column: str, says: str
) -> None:
    other = run(tmp_path, "other", *changes)
    with raises(DataError, Facts("mismatch", other, column=column, says=says)):
        compare_runs(runs[0], other)


def test_compares_common_metrics(runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = run(tmp_path, "other", "eval.cutoffs=[1, 5]")
    metrics = {pair.metric for pair in compare_runs(runs[0], other).differences if pair.task == "sequential"}
    assert metrics == {"HR@1", "HR@5", "NDCG@5", "MRR"}


def test_rejects_unfinished_run(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with raises(DataError, Facts("missing-file", tmp_path)):
        compare_runs(runs[0], tmp_path)
