"""Cost: tokens and seconds by row and by arm, and their plot."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrec.report.costs import cost_by_arm, cost_by_row, cost_of
from llmrec.report.page import write_report
from llmrec.report.plots import cost_plot
from llmrec.report.results import parse_results
from llmrec.report.table import csv_text

Save = Callable[[dict[str, Any]], Path]


def test_cost_of_a_row_by_hand(results: dict[str, Any]) -> None:
    results["rows"][0].update(n=200, users=50)
    results["rows"][0]["cost"] = {"seconds": 30.0, "prompt_tokens": 9000, "completion_tokens": 1000}
    row = parse_results(results).rows[0]
    result = cost_of(row)
    assert (result.read, result.written, result.seconds) == (9000, 1000, 30.0)
    assert (result.tokens_per_request, result.tokens_per_user, result.seconds_per_request) == (50.0, 200.0, 0.15)
    assert cost_of(row.model_copy(update={"users": None})).tokens_per_user == 50.0
    nothing = cost_of(row.model_copy(update={"n": 0, "users": None}))
    assert nothing.tokens_per_request is nothing.tokens_per_user is nothing.seconds_per_request is None


def test_cost_of_an_ensemble_is_that_of_its_members(results: dict[str, Any]) -> None:
    model = next(row for row in results["rows"] if row["id"] == "direct/tuned/label/pick-one")
    model["cost"] = {"seconds": 30.0, "prompt_tokens": 41_234, "completion_tokens": 766, "forwards": 2000}
    parts = [{"name": name, "weight": 0.5} for name in (model["predictor"], "item-knn")]
    joined = copy.deepcopy(model) | {
        "id": "direct/tuned/fusion with models/pick-one",
        "predictor": "fusion with models",
    }
    joined |= {"fusion": {"form": "pool", "parts": parts}, "cost": {"seconds": 0.5}}
    results["rows"].append(joined)
    before = cost_by_arm(parse_results({**results, "rows": results["rows"][:-1]}))
    result = parse_results(results)
    costs = {cost.row.id: cost for cost in cost_by_row(result, "direct")}
    assert [row.arm for row in result.members(result.row(joined["id"]))] == ["tuned", "baseline"]
    assert (costs[joined["id"]].read, costs[joined["id"]].forwards_per_request) == (41_234, 10.0)
    assert costs[joined["id"]].seconds > costs[model["id"]].seconds >= 30.0
    tuned = [next(arm for arm in arms if arm.arm == "tuned") for arms in (before, cost_by_arm(result))]
    assert tuned[0].read == tuned[1].read and tuned[1].seconds == tuned[0].seconds + 0.5
    line = next(line for line in csv.DictReader(io.StringIO(csv_text(result))) if line["row"] == joined["id"])
    assert (line["tokens_per_request"], line["prompt_tokens"]) == ("210.0", "0")


def test_cost_of_an_arm_is_the_sum_over_rows(results: dict[str, Any]) -> None:
    result = {arm.arm: arm for arm in cost_by_arm(parse_results(results))}
    assert list(result) == ["zero-shot", "few-shot", "tuned", "baseline"]
    for name, arm in result.items():
        rows = [row for row in results["rows"] if row["arm"] == name]
        assert (arm.rows, arm.requests) == (len(rows), 200 * len(rows))
        assert arm.read == sum(row["cost"]["prompt_tokens"] for row in rows)
        assert arm.written == sum(row["cost"]["completion_tokens"] for row in rows)
        assert arm.seconds == pytest.approx(sum(row["cost"]["seconds"] for row in rows))
    assert result["baseline"].rate is None and result["tuned"].rate is not None
    assert result["tuned"].rate == pytest.approx(
        (result["tuned"].read + result["tuned"].written) / result["tuned"].seconds
    )


def test_plot_of_scores_and_tokens(results: dict[str, Any]) -> None:
    result = parse_results(results)
    plot = cost_plot(result, "direct")
    assert plot is not None and plot["levels"]["item-knn"] == 0.47
    costs = {cost.row.id: cost for cost in cost_by_row(result, "direct")}
    tokens = {cost.tokens_per_user for cost in costs.values() if cost.row.arm != "baseline"}
    assert {point["tokens"] for point in plot["points"]} == tokens and len(plot["points"]) == 4
    for row in results["rows"]:
        row["cost"] = {}
    assert cost_plot(parse_results(results), "direct") is None


def test_cost_in_page_markdown_and_csv(results: dict[str, Any], save: Save) -> None:
    row = next(row for row in results["rows"] if row["id"] == "direct/tuned/label/pick-one")
    row["cost"] = {"seconds": 30.0, "prompt_tokens": 41_234, "completion_tokens": 766, "forwards": 2000}
    pages = write_report(save(results))
    html = pages["html"].read_text("utf-8").split('id="cost"')[1].split("</section>")[0]
    assert html.count('class="plot" id="cost-') == 4 and 'id="budget"' in html
    assert "Forward passes per request" in html and '<td class="num">10</td><td class="num">41' in html
    cells = "".join(f'<td class="num">{cell}</td>' for cell in ("41\u2009234", "766", "210", "210", "30 s", "0.15 s"))
    assert cells in html
    text = pages["markdown"].read_text("utf-8").split("## Cost")[1].split("\n## ")[0]
    assert (
        "| Pick from candidates | fine-tuned · label · pick-one | 41\u2009234 | 766 | 210 | 30 s | 0.15 s | 10 |"
        in text
        and "| train | 6 min 1 s |" in text
        and "| Total | 17 min 23 s |" in text
    )
    line = next(
        line for line in csv.DictReader(io.StringIO(csv_text(parse_results(results)))) if line["row"] == row["id"]
    )
    assert (line["tokens_per_request"], line["seconds_per_request"], line["users"]) == ("210.0", "0.15", "200")
    assert line["forwards_per_request"] == "10.0"
    assert line["candidates"] == "5f3c1a9b" * 8


def test_page_without_tokens_or_budget(results: dict[str, Any], save: Save) -> None:
    results["budget"] = []
    for row in results["rows"]:
        row["cost"] = {}
    html = write_report(save(results))["html"].read_text("utf-8").split('id="cost"')[1].split("</section>")[0]
    assert 'class="plot"' not in html and "Time by stage" not in html and "dashed line" not in html
    assert "Cost of evaluation by setting" in html
