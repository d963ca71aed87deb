"""The main comparison of a report: its two rows and its sentence."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrec.report.marks import comparison_marks
from llmrec.report.page import write_report
from llmrec.report.plots import differences_plot
from llmrec.report.results import parse_results
from llmrec.report.summary import gain, headline, headline_sentence
from llmrec.report.wording import verdict, winner_sentence
from tests.report.sample_run import turn
from tests.report.test_verdicts import with_ensembles

Save = Callable[[dict[str, Any]], Path]


def test_compares_the_best_language_model_with_the_best_baseline(results: dict[str, Any]) -> None:
    result = headline(parse_results(results), "sequential")
    assert result.model is not None and result.control is not None and result.difference is not None
    assert (result.model.id, result.control.predictor) == ("sequential/tuned/likelihood/continue-list", "markov-1")
    # Model minus control, as in the table of comparisons, although the control is better.
    entry = next(e for e in results["comparisons"] if e["a"] == result.model.id and e["b"] == result.control.id)
    assert (result.difference.value, result.verdict) == (entry["value"], "contradicted") and entry["value"] < 0
    assert headline_sentence(result) == (
        "fine-tuned · likelihood · continue-list is significantly worse than markov-1: NDCG@10 −0.060 [−0.085, "
        "−0.035], 200 users."
    )


def test_ensemble_with_the_model_is_neither_model_nor_control(results: dict[str, Any], save: Save) -> None:
    result = parse_results(with_ensembles(results, weight=0.0))
    main = headline(result, "sequential")
    assert main.model is not None and main.control is not None
    assert main.model.id == "sequential/tuned/likelihood/continue-list"
    assert (main.control.id, main.verdict) == ("sequential/baseline/fusion", "contradicted")
    card = write_report(save(results))["html"].read_text("utf-8").split('class="card"')[2].split("</article>")[0]
    assert re.search(r"0\.500.*best baseline.*0\.600.*−0\.100.*in an ensemble.*\+0\.006.*weight 0", card, re.DOTALL)
    assert "0.985" not in card
    best = winner_sentence(verdict(result, "sequential"))
    assert best.startswith("Apart from ensembles that contain the language model: the best model is a baseline, fus")


def test_page_begins_with_one_user(results: dict[str, Any], save: Save) -> None:
    results["example"].update(history=["Alien", "Heat"], listed=["Big", "Up <b>"], truth="Up <b>", hit=2)
    pages = write_report(save(results))
    html, text = (pages[kind].read_text("utf-8") for kind in ("html", "markdown"))
    part = html.split('id="example-title"')[1].split("</article>")[0]
    assert html.index('id="example-title"') < html.index('class="cards"')
    assert "the latest 2 of 41" in part and part.index("Alien") < part.index("Heat")
    assert '<strong class="best"><bdi>Up &lt;b&gt;</bdi></strong>' in part and "rank 2 of 20" in part
    assert "- Held out: Up &lt;b&gt;: rank 2 of 20" in text and text.index("Held out") < text.index("## Results")


def test_order_of_a_comparison_does_not_matter(results: dict[str, Any]) -> None:
    def shown() -> list[Any]:
        result = parse_results(results)
        return [
            (headline(result, task).difference, comparison_marks(result, task), winner_sentence(verdict(result, task)))
            for task in results["headline"]
        ]

    before = shown()
    turn(results)
    assert shown() == before


def test_pair_without_a_comparison_has_no_verdict(results: dict[str, Any]) -> None:
    results["comparisons"] = []
    result = headline(parse_results(results), "rating")
    assert result.difference is None and result.verdict is None
    assert headline_sentence(result).endswith("user-item-bias 0.930 (lower is better); the difference was not tested.")
    assert differences_plot(parse_results(results))["rows"] == []


def test_sentence_of_an_exploratory_difference(results: dict[str, Any]) -> None:
    for entry in results["comparisons"]:
        for key in ("verdict", "p", "p_raw", "level"):
            entry.pop(key, None)
    text = headline_sentence(headline(parse_results(results), "direct"))
    ahead = "fine-tuned · label · pick-one is ahead of item-knn on these users (exploratory): NDCG@10 +0.050"
    assert text.startswith(ahead) and "significant" not in text and "better" not in text


def test_without_a_language_model_compares_the_fusion_with_its_best_member(results: dict[str, Any]) -> None:
    rows = [row for row in results["rows"] if row["arm"] == "baseline"]
    part = next(row for row in rows if row["id"] == "direct/baseline/item-knn")
    part.update(id="direct/baseline/item-knn(k=5)", predictor="item-knn(k=5)")
    joined = copy.deepcopy(part) | {"id": "direct/baseline/fusion", "predictor": "fusion"}
    joined["fusion"] = {"form": "logit", "parts": [{"name": "item-knn(k=5)", "weight": 1.0}]}
    joined["metrics"]["NDCG@10"]["value"] = 0.49
    numbers = {"value": 0.02, "low": -0.01, "high": 0.05, "detectable": 0.03}
    compared = {"task": "direct", "metric": "NDCG@10", "a": joined["id"], "b": part["id"], **numbers}
    results.update(rows=[*rows, joined], comparisons=[compared], training=None)
    result = parse_results(results)
    main = headline(result, "direct")
    assert main.model is not None and main.names == ("fusion", "item-knn")
    none = "There is no significant difference between fusion and item-knn (exploratory): NDCG@10 +0.020"
    assert headline_sentence(main).startswith(f"{none} [−0.010, +0.050]")
    assert headline_sentence(headline(result, "rating")) == "No language model or ensemble has a value for RMSE."


def test_gain_is_positive_for_an_improvement() -> None:
    assert (gain("NDCG@10", 0.1), gain("RMSE", -0.1)) == (0.1, 0.1)
