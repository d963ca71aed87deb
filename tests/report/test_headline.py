"""The first question of a report: which two rows are set against each other, and what is said of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrec.report.page import write
from llmrec.report.plots import differences
from llmrec.report.results import results_of
from llmrec.report.summary import gain, headline, sentence
from llmrec.report.wording import verdict, winner_sentence
from tests.report.made import turn
from tests.report.test_verdicts import with_ensembles

Save = Callable[[dict[str, Any]], Path]


def test_the_model_is_the_best_language_model_row_and_the_control_the_best_baseline(results: dict[str, Any]) -> None:
    found = headline(results_of(results), "sequential")
    assert found.model is not None and found.control is not None and found.difference is not None
    assert (found.model.id, found.control.predictor) == ("sequential/tuned/likelihood/continue-list", "markov-1")
    # As the table of comparisons has it, model less control, although the control is ahead.
    entry = next(e for e in results["comparisons"] if e["a"] == found.model.id and e["b"] == found.control.id)
    assert (found.difference.value, found.verdict) == (entry["value"], "contradicted") and entry["value"] < 0
    assert sentence(found) == (
        "fine-tuned · likelihood · continue-list is significantly worse than markov-1: NDCG@10 −0.060 [−0.085, "
        "−0.035], 200 users."
    )


def test_an_ensemble_with_the_model_is_neither_model_nor_control(results: dict[str, Any], save: Save) -> None:
    found = results_of(with_ensembles(results, weight=0.0))
    told = headline(found, "sequential")
    assert told.model is not None and told.control is not None
    assert (told.model.id, told.control.id) == (
        "sequential/tuned/likelihood/continue-list",
        "sequential/baseline/fusion",
    )
    assert told.verdict == "contradicted"
    card = write(save(results))["html"].read_text("utf-8").split('class="card"')[2].split("</article>")[0]
    assert re.search(r"0\.500.*best baseline.*0\.600.*−0\.100.*in an ensemble.*\+0\.006.*weight 0", card, re.DOTALL)
    assert "0.985" not in card
    best = winner_sentence(verdict(found, "sequential"))
    assert best.startswith("Apart from ensembles that contain the language model: the best model is a baseline, fus")


def test_the_first_screen_shows_one_user(results: dict[str, Any], save: Save) -> None:
    results["example"].update(history=["Alien", "Heat"], listed=["Big", "Up <b>"], truth="Up <b>", hit=2)
    pages = write(save(results))
    html, text = (pages[kind].read_text("utf-8") for kind in ("html", "markdown"))
    part = html.split('id="example-title"')[1].split("</article>")[0]
    assert html.index('id="example-title"') < html.index('class="cards"')
    assert "the latest 2 of 41" in part and part.index("Alien") < part.index("Heat")
    assert '<strong class="best"><bdi>Up &lt;b&gt;</bdi></strong>' in part and "rank 2 of 20" in part
    assert "- Held out: Up &lt;b&gt;: rank 2 of 20" in text and text.index("Held out") < text.index("## Results")
    del results["example"]
    pages = write(save(results))
    assert not any("Held out" in page.read_text("utf-8") for page in pages.values())


def test_the_sign_does_not_depend_on_how_a_comparison_was_written(results: dict[str, Any]) -> None:
    before = {task: headline(results_of(results), task).difference for task in results["headline"]}
    turn(results)
    assert {task: headline(results_of(results), task).difference for task in results["headline"]} == before


def test_a_pair_that_was_not_compared_has_no_verdict(results: dict[str, Any]) -> None:
    results["comparisons"] = []
    found = headline(results_of(results), "rating")
    assert found.difference is None and found.verdict is None
    assert sentence(found).endswith("user-item-bias 0.930 (lower is better); the difference was not tested.")
    assert differences(results_of(results))["rows"] == []


def test_an_exploratory_difference_makes_no_claim(results: dict[str, Any]) -> None:
    for entry in results["comparisons"]:
        for key in ("verdict", "p", "p_raw", "level"):
            entry.pop(key, None)
    said = sentence(headline(results_of(results), "direct"))
    ahead = "fine-tuned · label · pick-one is ahead of item-knn on these users (exploratory): NDCG@10 +0.050"
    assert said.startswith(ahead) and "significant" not in said and "better" not in said


def test_without_a_language_model_the_fusion_is_set_against_its_best_part(results: dict[str, Any]) -> None:
    rows = [row for row in results["rows"] if row["arm"] == "baseline"]
    part = next(row for row in rows if row["id"] == "direct/baseline/item-knn")
    part.update(id="direct/baseline/item-knn(k=5)", predictor="item-knn(k=5)")
    joined = copy.deepcopy(part) | {"id": "direct/baseline/fusion", "predictor": "fusion"}
    joined["fusion"] = {"form": "logit", "parts": [{"name": "item-knn(k=5)", "weight": 1.0}]}
    joined["metrics"]["NDCG@10"]["value"] = 0.49
    numbers = {"value": 0.02, "low": -0.01, "high": 0.05, "detectable": 0.03}
    compared = {"task": "direct", "metric": "NDCG@10", "a": joined["id"], "b": part["id"], **numbers}
    results.update(rows=[*rows, joined], comparisons=[compared], training=None)
    found = results_of(results)
    told = headline(found, "direct")
    assert told.model is not None and told.names == ("fusion", "item-knn")
    none = "There is no significant difference between fusion and item-knn (exploratory): NDCG@10 +0.020"
    assert sentence(told).startswith(f"{none} [−0.010, +0.050]")
    assert sentence(headline(found, "rating")) == "No language model or ensemble has a value for RMSE."


@pytest.mark.parametrize(("metric", "better"), [("NDCG@10", 0.1), ("RMSE", -0.1), ("LogLoss", -0.1), ("AUC", 0.1)])
def test_a_gain_is_above_0_whichever_way_the_metric_goes(metric: str, better: float) -> None:
    assert gain(metric, better) == pytest.approx(0.1)
