"""The last screen of a run says what the report says, in eighty columns."""

from __future__ import annotations

from typing import Any

import pytest

from llmrec.report.render import markdown_page
from llmrec.report.results import results_of
from llmrec.report.summary import caution, tuning_tally
from llmrec.report.verdicts import HEAD, WIDTH, screen, spent
from llmrec.report.wording import facing, number, title, verdict


def joined(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def test_each_task_has_its_best_model_its_best_control_and_their_difference(results: dict[str, Any]) -> None:
    found = results_of(results)
    lines = screen(found)
    assert lines[0] == HEAD and max(map(len, lines)) <= WIDTH
    text = joined(lines)
    for task in found.tasks:
        each = verdict(found, task)
        assert each.best is not None and each.rival is not None
        model, control = (each.rival, each.best) if each.best.arm == "baseline" else (each.best, each.rival)
        own = text.split(f"{title(task)}, {each.metric}")[1]
        assert f"{model.arm} · {model.predictor}" in own.split(" against ")[0]
        assert number(model.metrics[each.metric].value) in own.split(" against ")[0]
        assert own.split(" against ")[1].startswith(f"{control.predictor} {number(control.metrics[each.metric].value)}")
        if each.lead is not None:
            assert number(facing(each.lead, model.id).value, sign=True) in own


def test_it_never_contradicts_the_report(results: dict[str, Any]) -> None:
    found = results_of(results)
    text = joined(screen(found))
    page = markdown_page(found, {}, None, fix="").replace("\\", "")
    tally = tuning_tally([verdict(found, task) for task in found.tasks])
    for sentence in (tally, caution(found)):
        assert sentence and sentence in text and sentence in page


@pytest.mark.parametrize(("users", "trained", "says"), [(300, True, "one training seed."), (60, False, "fewer than")])
def test_what_makes_a_run_exploratory(results: dict[str, Any], users: int, trained: bool, says: str) -> None:
    for row in results["rows"]:
        row["users"] = users
    if not trained:
        results["training"] = None
    assert says in caution(results_of(results))
    assert "(exploratory)" in joined(screen(results_of(results)))


def test_a_run_without_a_language_model_says_what_leads(results: dict[str, Any]) -> None:
    results["rows"] = [row for row in results["rows"] if row["arm"] == "baseline"]
    known = {row["id"] for row in results["rows"]}
    results["comparisons"] = [each for each in results["comparisons"] if {each["a"], each["b"]} <= known]
    results["training"] = None
    lines = screen(results_of(results))
    assert HEAD not in lines and max(map(len, lines)) <= WIDTH
    assert "Rating prediction" in lines[0] and "zero-shot" not in joined(lines)


def test_no_figure_of_a_model_is_said(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        if row["task"] == "rating" and row["arm"] != "baseline":
            row["metrics"]["RMSE"].update(value=None, low=None, high=None, undefined="no request has a rating")
    results["comparisons"] = [each for each in results["comparisons"] if each["task"] != "rating"]
    text = joined(screen(results_of(results)))
    assert "no language-model row has a figure" in text and "no request has a rating" in text


def test_time_names_the_longest_stages(results: dict[str, Any]) -> None:
    said = spent(results_of(results))
    longest = max(results["budget"], key=lambda stage: stage["seconds"])["stage"]
    assert said.split("(")[1].startswith(longest)
