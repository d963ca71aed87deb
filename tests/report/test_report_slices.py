"""Slices in the report: rows, values and titles."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llmrec.errors import LlmrecError
from llmrec.report.breakdowns import slice_table
from llmrec.report.results import parse_results
from tests.facts import Facts, raises
from tests.report.sample_run import SLICES


def test_columns_are_the_best_rows_of_the_arms(results: dict[str, Any]) -> None:
    result = parse_results(results)
    table = slice_table(result, "direct")
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
    ratings = slice_table(result, "rating")
    assert ratings is not None
    line = ratings.lines[1]
    assert line.best == min(figure.value for figure in line.figures if figure and figure.value is not None)


def test_slices_with_one_case_or_equal_values(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        for part in row["slices"]:
            if part["name"] == "history:5-9":
                part.update(n=1, users=1)
            for metric in part["metrics"].values():
                metric["value"] = 0.5 if part["name"] == "history:from-50" else metric["value"]
    table = slice_table(parse_results(results), "direct")
    assert table is not None
    lines = {line.title: line for line in table.lines}
    assert all(
        figure and figure.low is figure.high is None for figure in lines["History of 5 to 9 interactions"].figures
    )
    assert lines["History of 50 interactions or more"].best is None


def test_slices_of_auc_use_another_metric(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        if row["task"] == "rating":
            row["metrics"]["AUC"] = {"value": 0.6, "signature": "AUC|split:loo-test|llmrec:0.1.0"}
            row["metrics"] = {"AUC": row["metrics"]["AUC"]}
        if row["task"] == "direct":
            row["slices"] = []
    results["headline"]["rating"], results["comparisons"] = "AUC", []
    result = parse_results(results)
    table = slice_table(result, "rating")
    assert table is not None and table.metric == "RMSE"
    assert slice_table(result, "direct") is None


def test_rejects_slices_of_different_cases(results: dict[str, Any]) -> None:
    row = next(row for row in results["rows"] if row["task"] == "direct" and row["arm"] == "tuned")
    row["slices"][1]["n"] = 185
    with raises(LlmrecError, Facts("mismatch", "results.json", says=("slice 'item:warm-from-5', n = 186", "n = 185"))):
        parse_results(results)
    row["slices"][1]["n"] = 186
    metric = row["slices"][1]["metrics"]["NDCG@10"]
    metric["signature"] = metric["signature"].replace("warm-from-5", "warm-from-3")
    with raises(LlmrecError, Facts("mismatch", "results.json", says=(row["id"], "slice:item:warm-from-5"))):
        parse_results(results)


def test_slices_in_page_and_markdown(results: dict[str, Any], pages: dict[str, Path]) -> None:
    table = slice_table(parse_results(results), "direct")
    assert table is not None
    html = pages["html"].read_text("utf-8").split('id="slices-3-caption"')[1].split("</table>")[0]
    rows = html.split("<tr ")[1:]
    assert len(rows) == len(table.lines) == 8
    for text, line in zip(rows, table.lines, strict=True):
        assert re.search(rf">{line.n}( <em class=\"few\">few</em>)?<span class=\"ci\">{line.users} users<", text)
        assert ("few" in text) == line.small and text.count('class="best"') == (0 if line.small else 1)
        for figure in line.figures:
            assert figure is not None and f"{figure.value:.3f}<" in text
            assert f"[{figure.low:.3f}, {figure.high:.3f}]" in text
    text = pages["markdown"].read_text("utf-8").split("### Pick from candidates")[1].split("#### Slices")[1]
    assert "| Rare items: fewer than 5 training interactions (few) | 14, 13 users | " in text
    assert "Slices without cases: History of 0 to 4 interactions." in text
