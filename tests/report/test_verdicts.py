"""The summary of a run in the terminal: it agrees with the report, and has at most 80 columns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from rich.console import Console

from llmrec.report.render import render_markdown_page
from llmrec.report.results import parse_results
from llmrec.report.summary import exploratory_reason, tuning_tally
from llmrec.report.verdicts import WIDTH, closing_lines, describe_run_time, metrics_table
from llmrec.report.wording import verdict


def joined(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def shown(results: dict[str, Any]) -> str:
    console = Console(width=WIDTH)
    with console.capture() as text:
        console.print(metrics_table(parse_results(results)))
    assert max(map(len, text.get().splitlines())) <= WIDTH
    return text.get()


def ensemble(row: dict[str, Any], weight: float, level: float, name: str) -> dict[str, Any]:
    """Return an ensemble that has the row's model among its members."""
    added = copy.deepcopy(row)
    added.update(id=f"{row['task']}/{row['arm']}/{name}", predictor=name, template=None)
    added["metrics"]["NDCG@10"].update(value=level, low=level - 0.01, high=level + 0.01)
    parts = [{"name": "markov-1", "weight": 1.0}, {"name": "likelihood", "weight": weight}]
    added["fusion"] = {"form": "logit", "parts": parts if row["arm"] == "tuned" else parts[:1]}
    return added


def with_ensembles(results: dict[str, Any], weight: float) -> dict[str, Any]:
    """Add ensembles of baselines without and with the tuned model, without a significant difference."""
    rows = {row["id"]: row for row in results["rows"]}
    classic = ensemble(rows["sequential/baseline/markov-1"], weight, 0.6, "fusion")
    joined = ensemble(rows["sequential/tuned/likelihood/continue-list"], weight, 0.985, "fusion with models")
    numbers = {"value": 0.006, "low": -0.01, "high": 0.02, "p": 0.4, "p_raw": 0.4, "verdict": "not shown"}
    more = {"task": "sequential", "metric": "NDCG@10", "detectable": 0.03, "level": 0.95}
    alone = {"a": "sequential/tuned/likelihood/continue-list", "b": classic["id"]}
    results["rows"] += [classic, joined]
    results["comparisons"] += [
        {**more, **numbers, "a": joined["id"], "b": classic["id"]},
        {**more, **numbers, **alone, "value": -0.1, "low": -0.12, "high": -0.08, "verdict": "contradicted"},
    ]
    return results


def test_table_has_settings_and_the_best_baseline(results: dict[str, Any]) -> None:
    text = shown(results)
    head, *lines = [line.split() for line in text.splitlines() if line.strip()]
    assert head == ["zero", "few", "fine"]
    rating, unit = (line for line in lines if line[0] in ("Rating", "RMSE,"))
    assert rating[2:] == ["1.310", "1.220", "0.960", "0.930", "○", "+0.030"]
    assert unit[-3:] == ["user-item-bias", "[−0.018,", "+0.078]"]
    assert "✗ −0.060" in text and "✗ significantly worse" in " ".join(text.split())


@pytest.mark.parametrize(("weight", "note"), [(0.0, ", with weight 0, no"), (0.3, ", no")])
def test_ensemble_is_separate_from_the_model(results: dict[str, Any], weight: float, note: str) -> None:
    result = with_ensembles(results, weight=weight)
    text = shown(result)
    assert "0.985" not in text and "✗ −0.100" in text
    cells = text[text.index("Next item") :].splitlines()[0].split()
    assert cells[3:6] == ["0.310", "0.320", "0.500"]
    sentence = f"NDCG@10 +0.006 [−0.010, +0.020] in Next item from history{note} significant"
    assert sentence in joined(closing_lines(parse_results(result)))


def test_agrees_with_the_report(results: dict[str, Any]) -> None:
    result = parse_results(results)
    text = joined(closing_lines(result))
    page = render_markdown_page(result, {}, None, fix="").replace("\\", "")
    tally = tuning_tally([verdict(result, task) for task in result.tasks])
    for sentence in (tally, exploratory_reason(result)):
        assert sentence and sentence in text and sentence in page


@pytest.mark.parametrize(("users", "trained", "says"), [(300, True, "one training seed."), (60, False, "fewer than")])
def test_exploratory_runs(results: dict[str, Any], users: int, trained: bool, says: str) -> None:
    for row in results["rows"]:
        row["users"] = users
    if not trained:
        results["training"] = None
    assert says in exploratory_reason(parse_results(results))
    assert says in joined(closing_lines(parse_results(results)))


def test_run_without_a_language_model(results: dict[str, Any]) -> None:
    results["rows"] = [row for row in results["rows"] if row["arm"] == "baseline"]
    known = {row["id"] for row in results["rows"]}
    results["comparisons"] = [each for each in results["comparisons"] if {each["a"], each["b"]} <= known]
    results["training"] = None
    text = shown(results)
    assert text.split()[:7] == ["Task", "and", "metric", "ensemble", "best", "single", "difference"]
    assert "Rating prediction" in text and "user-item-bias" in text and "zero-shot" not in text


def test_undefined_values_of_a_model(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        if row["task"] == "rating" and row["arm"] != "baseline":
            row["metrics"]["RMSE"].update(value=None, low=None, high=None, undefined="no request has a rating")
    results["comparisons"] = [each for each in results["comparisons"] if each["task"] != "rating"]
    assert "no request has a rating" in joined(closing_lines(parse_results(results)))
    line = next(line for line in shown(results).splitlines() if line.startswith("Rating"))
    assert line.split()[2:] == ["–", "–", "–", "0.930", "–"]


def test_time_names_the_longest_stages(results: dict[str, Any]) -> None:
    assert describe_run_time(parse_results(results)).split("(")[1].startswith("evaluate")
