"""Undefined metrics: reported with the reason, and not compared."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmrec.pipeline.run import run
from llmrec.recipe.comparisons import Suite
from llmrec.recipe.load import load_recipe
from llmrec.report.results import parse_results
from llmrec.report.table import console_tables

pytest.importorskip("llmrec.bench", reason="the extension is not there")

from llmrec.bench.run import run_benchmark

ONE_CLASS = "all labels are of the same class"
OF_USERS = "no user has both positive and negative labels"
NOTHING = "Models without a value are not compared."


def table(folder: Path, last: Sequence[float]) -> Path:
    """Write 24 users with eight ratings each; the last two of a user are held out and equal."""
    rows = ["user_id,item_id,rating,timestamp"]
    for user in range(24):
        for step in range(8):
            rating = last[user % len(last)] if step >= 6 else (5.0, 1.0)[(user + step) % 2]
            rows.append(f"u{user},i{(user * 3 + step * 7) % 20},{rating},{step}")
    path = folder / "rows.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def suite(path: Path, **more: Any) -> Suite:
    data = {
        "source": "table",
        "path": str(path),
        "columns": {"rating": "rating", "time": "timestamp"},
        "split": {"kind": "last_share", "valid": 0.25, "test": 0.25},
    }
    rows = [{"baseline": "like-ratio"}, {"baseline": "logistic", "tune": False}]
    return Suite(suite="made", task="ctr", liked=4, data=data, bootstrap=50, rows=rows, **more)


def test_suite_reports_users_with_one_class(tmp_path: Path) -> None:
    page, lines = suite(table(tmp_path, (5.0, 1.0))), []
    for _ in range(2):  # the second run uses stored rows
        ran = run_benchmark(page, out=tmp_path / "out", results=tmp_path / "eval" / "results", say=lines.append)
    assert len(lines) == 4 and all(f"GAUC undefined ({OF_USERS})" in line and "AUC 0." in line for line in lines)
    assert [line.metric for line in ran.results.comparisons] == ["AUC"]
    board = ran.files["page"].read_text(encoding="utf-8")
    assert f"GAUC is undefined: {OF_USERS}." in board and NOTHING not in board
    assert all(line.split(" | ")[2] == "undefined" for line in board.splitlines() if line.startswith("| l"))


def test_suite_without_defined_metric_compares_nothing(tmp_path: Path) -> None:
    page = suite(table(tmp_path, (5.0,)), pairs=[("like-ratio", "logistic")], split_seeds=[0, 1])
    ran = run_benchmark(page, out=tmp_path / "out", results=tmp_path / "eval" / "results")
    assert ran.results.comparisons == () and ran.results.pairs == ()
    board = ran.files["page"].read_text(encoding="utf-8")
    assert f"AUC is undefined: {ONE_CLASS}. {NOTHING}" in board and "best row is better" not in board


RECIPE = """\
name: base
data: {{source: table, path: {path}, columns: {{rating: rating, time: timestamp}},
  split: {{kind: last_share, valid: 0.25, test: 0.25}}}}
tasks: {{ctr: {{strategies: [yes-no], liked: 4, baselines: [like-ratio, logistic]}}, rating: {{liked: 4}}}}
eval: {{arms: [zero-shot], backend: fake, scorer: fake, users: 20, bootstrap: 50}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    (path / "recipe.yaml").write_text(RECIPE.format(path=table(path, (5.0,))), encoding="utf-8")
    return path


def test_run_reports_undefined_metrics_in_every_format(folder: Path) -> None:
    done = run(load_recipe(str(folder / "recipe.yaml")), folder / "out")
    assert {line["task"] for line in done.results["comparisons"]} == {"rating"}
    undefined = {
        (row["task"], name, figure["undefined"])
        for row in done.results["rows"]
        for name, figure in row["metrics"].items()
        if figure["value"] is None
    }
    assert undefined == {("ctr", "AUC", ONE_CLASS), ("ctr", "GAUC", OF_USERS), ("rating", "LikedAUC", ONE_CLASS)}
    sentences = [f"AUC is undefined: {ONE_CLASS}. {NOTHING}", f"GAUC is undefined: {OF_USERS}."]
    for name in ("report.md", "index.html", "table.tex"):
        text = (folder / "out" / "report" / name).read_text(encoding="utf-8")
        assert all(sentence in text for sentence in sentences), name
    lines = list(csv.DictReader((folder / "out" / "report" / "table.csv").read_text(encoding="utf-8").splitlines()))
    for line in lines:
        reasons = {"AUC": ONE_CLASS, "LikedAUC": ONE_CLASS, "GAUC": OF_USERS}
        assert (line["value"] == "") == (line["metric"] in reasons)
        assert line["undefined"] == reasons.get(line["metric"], "")
    console = Console(width=200, record=True, file=(folder / "console.txt").open("w"))
    for shown in console_tables(parse_results(done.results)):
        console.print(shown)
    printed = " ".join(console.export_text().split())
    assert "undefined" in printed and f"GAUC is undefined: {OF_USERS}." in printed
