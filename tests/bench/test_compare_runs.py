"""`llmrec compare`: differences of two finished runs are those of their answers; runs over other cases are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from llmrec.bench.runs import compare_runs
from llmrec.cli.main import app
from llmrec.errors import DataError
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.runs import finished, stored_row
from tests.facts import Facts, raises

RECIPE = """\
name: shop
data: {source: made-reviews, noun: products, split: {kind: last_share, valid: 0.2, test: 0.4}}
tasks:
  sequential: {baselines: [random, popularity, item-knn, markov-1]}
  rating: {baselines: [global-mean, user-mean, item-mean, user-item-bias]}
eval: {arms: [], users: 12, bootstrap: 50, candidates: {count: 5}, fusion: {controls: false}}
"""


def made(folder: Path, name: str, *changes: str) -> Path:
    (folder / "page.yaml").write_text(RECIPE)
    return pipeline.run(folder / "page.yaml", folder / name, overrides=changes, quiet=True).folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    other = "tasks.sequential.baselines=[random, popularity, {name: item-knn, shrinkage: 3}, markov-1, markov]"
    return made(folder, "a"), made(folder, "b", other)


def test_a_difference_is_that_of_the_answers_of_each_user(runs: tuple[Path, Path]) -> None:
    found = compare_runs(*runs)
    assert found.headline == {"sequential": "NDCG@10", "rating": "RMSE"}
    (best,) = (pair for pair in found.differences if pair.best and pair.metric == "NDCG@10")
    rows = [stored_row(run, finished(run).row(name)) for run, name in zip(runs, (best.a, best.b), strict=True)]
    a, b = (row.values["NDCG@10"] for row in rows)
    assert best.value == pytest.approx(float(np.mean(a - b))) and best.users == 12
    assert (best.a_value, best.b_value) == pytest.approx((a.mean(), b.mean()))
    assert best.low <= best.value <= best.high and best.verdict is None and best.p is None
    for run, name in zip(runs, (best.a, best.b), strict=True):
        assert name == finished(run).standings("sequential")[0].id
    same = [pair for pair in found.differences if pair.a == pair.b == "sequential/baseline/popularity"]
    assert {pair.metric for pair in same} >= {"NDCG@10", "HR@10", "MRR"}
    assert {(pair.value, pair.low, pair.high) for pair in same} == {(0, 0, 0)}
    assert found.only_a == ("sequential/baseline/item-knn",)
    assert found.only_b == ("sequential/baseline/item-knn(shrinkage=3)", "sequential/baseline/markov")
    turned = compare_runs(runs[1], runs[0])
    assert turned.differences[0].value == pytest.approx(-found.differences[0].value)
    assert str(found).startswith("Two runs compared") and "A − B" in found._repr_html_()


def told(*words: object) -> Any:
    done = CliRunner().invoke(app, ["compare", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_difference_goes_into_a_file(runs: tuple[Path, Path], tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"found{ending}"
    shown = told(*runs, "--to", file)
    assert "Next item from history: NDCG@10, 12 users" in shown and f"file: {file}" in shown
    reads = {".csv": pl.read_csv, ".jsonl": pl.read_ndjson, ".parquet": pl.read_parquet}
    frame = pl.read_csv(file, separator="\t") if ending == ".tsv" else reads[ending](file)
    wanted = compare_runs(*runs).differences
    assert frame["difference"].to_list() == pytest.approx([pair.value for pair in wanted])
    assert frame["row_b"].to_list() == [pair.b for pair in wanted]
    told(*runs, "--to", file)  # over what the command itself wrote
    file.write_text("mine")
    with raises(DataError, Facts("exists", column="--to")):
        CliRunner().invoke(app, ["compare", *map(str, runs), "--to", str(file)], catch_exceptions=False)


def test_python_takes_what_run_returned(runs: tuple[Path, Path]) -> None:
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
        (["eval.cutoffs=[1, 5]"], "", ""),
    ],
)
def test_runs_over_other_cases_are_refused(
    runs: tuple[Path, Path], tmp_path: Path, changes: list[str], column: str, says: str
) -> None:
    other = made(tmp_path, "other", *changes)
    if not column:
        # Metrics that both have are compared.
        metrics = {pair.metric for pair in compare_runs(runs[0], other).differences if pair.task == "sequential"}
        assert metrics == {"HR@1", "HR@5", "NDCG@5", "MRR"}
        return
    with raises(DataError, Facts("mismatch", other, column=column, says=says)):
        compare_runs(runs[0], other)


def test_what_is_no_finished_run_is_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with raises(DataError, Facts("missing-file", tmp_path)):
        compare_runs(runs[0], tmp_path)
