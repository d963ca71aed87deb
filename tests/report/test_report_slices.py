"""Slices: which rows, which figures, which names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrec.errors import LlmrecError
from llmrec.report.breakdowns import in_words, slice_table
from llmrec.report.page import write
from llmrec.report.results import results_of
from tests.facts import Facts, raises
from tests.report.made import SLICES

Save = Callable[[dict[str, Any]], Path]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("item:cold-below-5", "Rare items: fewer than 5 training interactions"),
        ("item:warm-from-5", "Warm items: 5 training interactions or more"),
        ("item:head-0.8", "Head items: the most popular, with 80 % of training interactions"),
        ("item:long-tail-0.8", "Long-tail items: all others"),
        ("history:5-9", "History of 5 to 9 interactions"),
        ("history:from-50", "History of 50 interactions or more"),
        ("activity:0-4", "Users with 0 to 4 training interactions"),
        ("activity:from-50", "Users with 50 training interactions or more"),
        ("genre:drama", "genre:drama"),
        ("history:5-9 <b>", "history:5-9 <b>"),
    ],
)
def test_names_in_words(name: str, said: str) -> None:
    assert in_words(name) == said


def test_the_columns_are_the_best_row_of_each_arm_and_the_best_baseline(results: dict[str, Any]) -> None:
    found = results_of(results)
    table = slice_table(found, "direct")
    assert table is not None and table.metric == "NDCG@10"
    assert [row.id for row in table.rows] == [
        "direct/zero-shot/label/pick-one",
        "direct/few-shot/label/pick-one",
        "direct/tuned/label/pick-one",
        "direct/baseline/item-knn",
    ]
    assert [line.n for line in table.lines] == [n for n in SLICES.values() if n]
    assert table.empty == ("History of 0 to 4 interactions",)
    for line, name in zip(table.lines, (name for name, n in SLICES.items() if n), strict=True):
        values = [next(part.metrics["NDCG@10"].value for part in row.slices if part.name == name) for row in table.rows]
        assert [figure and figure.value for figure in line.figures] == values
        assert line.small == (line.n < 20)
        assert line.best == (None if line.small else max(value for value in values if value is not None))
    ratings = slice_table(found, "rating")
    assert ratings is not None
    line = ratings.lines[1]
    assert line.best == min(figure.value for figure in line.figures if figure and figure.value is not None)


def test_a_slice_of_one_case_has_no_interval_and_equal_figures_no_best(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        for part in row["slices"]:
            if part["name"] == "history:5-9":
                part.update(n=1, users=1)
            for metric in part["metrics"].values():
                metric["value"] = 0.5 if part["name"] == "history:from-50" else metric["value"]
    table = slice_table(results_of(results), "direct")
    assert table is not None
    lines = {line.title: line for line in table.lines}
    assert all(
        figure and figure.low is figure.high is None for figure in lines["History of 5 to 9 interactions"].figures
    )
    assert lines["History of 50 interactions or more"].best is None


def test_auc_is_sliced_by_another_metric_and_tasks_without_slices_have_no_table(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        if row["task"] == "rating":
            row["metrics"]["AUC"] = {"value": 0.6, "signature": "AUC|split:loo-test|llmrec:0.1.0"}
            row["metrics"] = {"AUC": row["metrics"]["AUC"]}
        if row["task"] == "direct":
            row["slices"] = []
    results["headline"]["rating"], results["comparisons"] = "AUC", []
    found = results_of(results)
    table = slice_table(found, "rating")
    assert table is not None and table.metric == "RMSE"
    assert slice_table(found, "direct") is None


def test_slices_of_different_cases_are_refused(results: dict[str, Any]) -> None:
    row = next(row for row in results["rows"] if row["task"] == "direct" and row["arm"] == "tuned")
    row["slices"][1]["n"] = 185
    with raises(LlmrecError, Facts("mismatch", "results.json", says=("slice 'item:warm-from-5', n = 186", "n = 185"))):
        results_of(results)


def test_thresholds_of_slices_must_agree(results: dict[str, Any]) -> None:
    row = next(row for row in results["rows"] if row["task"] == "direct" and row["arm"] == "tuned")
    metric = row["slices"][1]["metrics"]["NDCG@10"]
    metric["signature"] = metric["signature"].replace("warm-from-5", "warm-from-3")
    with raises(LlmrecError, Facts("mismatch", "results.json", says=(row["id"], "slice:item:warm-from-5"))):
        results_of(results)


def test_slices_stand_in_the_page_and_in_markdown(results: dict[str, Any], save: Save) -> None:
    table = slice_table(results_of(results), "direct")
    assert table is not None
    pages = write(save(results))
    html = pages["html"].read_text("utf-8").split('id="slices-3-caption"')[1].split("</table>")[0]
    rows = html.split("<tr ")[1:]
    assert len(rows) == len(table.lines) == 8
    for text, line in zip(rows, table.lines, strict=True):
        assert re.search(rf">{line.n}( <em class=\"few\">few</em>)?<span class=\"ci\">{line.users} users<", text)
        assert ("few" in text) == line.small and text.count('class="best"') == (0 if line.small else 1)
        for figure in line.figures:
            assert (
                figure is not None
                and f"{figure.value:.3f}<" in text
                and f"[{figure.low:.3f}, {figure.high:.3f}]" in text
            )
    text = pages["markdown"].read_text("utf-8").split("### Pick from candidates")[1].split("#### Slices")[1]
    assert "| Rare items: fewer than 5 training interactions (few) | 14, 13 users | " in text
    assert "Slices without cases: History of 0 to 4 interactions." in text
