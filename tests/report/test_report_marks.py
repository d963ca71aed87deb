"""Significance marks, and the spread of a result over its templates."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrec.report.marks import best_baseline, has_marks, legend, marks, rule, singles, spreads
from llmrec.report.page import write
from llmrec.report.results import results_of
from llmrec.report.table import csv_text
from tests.report.made import turn

Save = Callable[[dict[str, Any]], Path]
BETTER, WORSE = "significantly better", "significantly worse"
TUNED = "sequential/tuned/likelihood/continue-list"
FEW = "sequential/few-shot/likelihood/continue-list"


def _row_of(html: str, place: int, predictor: str, arm: str, template: str = "") -> str:
    """Return one row of a task's table, as HTML."""
    table = html.split(f'id="task-{place}-caption"')[1].split("</table>")[0]
    return next(
        row for row in table.split("<tr ") if f"<bdi>{predictor}</bdi>" in row and f">{arm}<" in row and template in row
    )


# --------------------------------------------------------------------------- marks


def test_a_row_is_marked_against_its_zero_shot_row_and_the_best_baseline(results: dict[str, Any]) -> None:
    found = marks(results_of(results), "sequential")
    assert set(found) == {
        row["id"] for row in results["rows"] if row["task"] == "sequential" and row["arm"] != "baseline"
    }
    tuned = found[TUNED]
    assert tuned.zero_shot is not None and tuned.zero_shot.verdict == "shown"
    assert tuned.baseline is not None and (tuned.baseline.verdict, tuned.baseline.b) == (
        "contradicted",
        "sequential/baseline/markov-1",
    )
    # What is exploratory makes no mark, and a zero-shot row is nobody's rival but the baseline's.
    assert any(entry["a"] == FEW for entry in results["comparisons"])
    assert found[FEW].zero_shot is None and found[FEW].baseline is None
    assert found["sequential/zero-shot/likelihood/continue-list"].zero_shot is None


def test_a_comparison_that_stands_the_other_way_round_is_turned(results: dict[str, Any]) -> None:
    before = marks(results_of(results), "sequential")[TUNED]
    turn(results)
    assert marks(results_of(results), "sequential")[TUNED] == before


def test_only_the_headline_metric_and_the_best_baseline_count(results: dict[str, Any]) -> None:
    for entry in results["comparisons"]:
        if entry["a"] == TUNED:
            entry["metric"] = "HR@1"
    assert marks(results_of(results), "sequential")[TUNED].zero_shot is None
    for row in results["rows"]:
        if row["id"] == "rating/baseline/item-mean":
            row["metrics"]["RMSE"]["value"] = 0.5
    found = results_of(results)
    control = best_baseline(found, "rating")
    assert control is not None and control.predictor == "item-mean"
    assert marks(found, "rating")["rating/tuned/expected/half-stars"].baseline is None


def test_marks_stand_in_words_in_every_form(results: dict[str, Any], save: Save) -> None:
    pages = write(save(results))
    html = pages["html"].read_text("utf-8")
    row = _row_of(html, 2, "likelihood", "fine-tuned", "<bdi>continue-list")
    assert re.search(r'class="sig shown"><span aria-hidden="true">✓</span> vs. zero-shot<span class="vh">: signif', row)
    assert re.search(
        r'class="sig contradicted"><span aria-hidden="true">✗</span> vs. baseline.*?: significantly worse', row
    )
    assert "sig" not in _row_of(html, 2, "markov-1", "baseline")
    assert html.count('href="#verdicts"') == 4 and html.count('id="verdicts"') == 1
    text = pages["markdown"].read_text("utf-8").split("### Next item")[1]
    assert "| NDCG@10 | vs. zero-shot | vs. best baseline | HR@1 |" in text
    assert re.search(rf"\| fine-tuned · likelihood · continue-list \| 0\.500 \[[^|]*\| {BETTER} \| {WORSE} \|", text)
    assert re.search(r"\| few-shot · likelihood · continue-list \| 0\.320 \[[^|]*\| – \| – \|", text)
    assert re.search(r"\| markov-1 \(baseline\) \| [^|]*\| – \| – \|", text)
    tex = pages["latex"].read_text("utf-8").split(r"\label{tab:llmrec-2}")[1].split(r"\end{table}")[0]
    assert re.search(rf"tuned \S+ likelihood \S+ continue-list &[^&]*& {BETTER} & {WORSE} &", tex)
    table = csv.DictReader(io.StringIO(csv_text(results_of(results))))
    lines = {line["row"]: line for line in table if line["metric"] == "NDCG@10"}
    assert [lines[TUNED][key] for key in ("beats_zero_shot", "beats_best_baseline", "best_baseline")] == [
        *(BETTER, WORSE), "sequential/baseline/markov-1",
    ]  # fmt: skip
    assert float(lines[TUNED]["beats_zero_shot_p"]) == 0.0004
    assert lines["sequential/baseline/markov-1"]["beats_zero_shot"] == ""


def test_the_legend_says_what_is_compared_and_the_rule_by_what(results: dict[str, Any]) -> None:
    found = results_of(results)
    said = legend(found, "sequential")
    assert "NDCG@10 of a language model" in said and "markov-1" in said
    assert "Holm-corrected over all 8 planned comparisons, is at most .05" in rule(found)
    results["comparisons"] = results["comparisons"][:1]
    found = results_of(results)
    assert "over the only planned comparison" in rule(found)
    assert legend(found, "sequential") == "" and not has_marks(found, "sequential") and has_marks(found, "rating")


def test_comparisons_say_what_they_could_have_shown(results: dict[str, Any], save: Save) -> None:
    results["comparisons"][0]["detectable"] = 0.0421
    pages = write(save(results))
    html = pages["html"].read_text("utf-8").split('id="comparisons"')[1].split("</section>")[0]
    assert '<td class="num">0.042</td>' in html and "80 % power" in html
    assert "| 0.042 |" in pages["markdown"].read_text("utf-8").split("## Comparisons")[1]
    assert "does not mean that both are equal" in html


def test_exploratory_comparisons_stand_apart_without_p_and_verdict(results: dict[str, Any], save: Save) -> None:
    pages = write(save(results))
    html = pages["html"].read_text("utf-8").split('id="comparisons"')[1].split("</section>")[0]
    tested, described = html.split('id="exploratory-caption"')
    assert "8 planned comparisons" in tested and "4 exploratory comparisons" in tested
    assert tested.count("badge") == 8 and "badge" not in described and "few-shot" in described
    assert "97.5 %" in tested and "unadjusted 95" in described
    text = pages["markdown"].read_text("utf-8").split("### Exploratory")[1].split("## Training")[0]
    assert text.count("few-shot") == 4 and "significant" not in text and "no p-value and no verdict" in text


# --------------------------------------------------------------------------- templates


def test_the_spread_is_worked_out_by_hand(several: dict[str, Any]) -> None:
    values = {
        "pick-one": 0.5, "one-of-these": 0.4, "which-next": 0.6, "unseen-pick-one": 0.3, "unseen-question": 0.1,
    }  # fmt: skip
    for row in several["rows"]:
        if row["task"] == "direct" and row["arm"] == "tuned":
            row["metrics"]["NDCG@10"]["value"] = values[row["template"].rpartition("/")[2]]
    found = next(spread for spread in spreads(results_of(several), "direct") if spread.arm == "tuned")
    assert found.seen is not None and found.unseen is not None and not found.single
    assert set(found.seen.templates) == {"pick-one", "one-of-these", "which-next"}
    assert (found.seen.mean, found.seen.low, found.seen.high) == (pytest.approx(0.5), 0.4, 0.6)
    assert set(found.unseen.templates) == {"unseen-pick-one", "unseen-question"}
    assert (found.unseen.mean, found.unseen.low, found.unseen.high) == (pytest.approx(0.2), 0.1, 0.3)


def test_every_arm_and_strategy_has_its_own_spread(several: dict[str, Any]) -> None:
    for row in several["rows"]:
        if row["id"] == "direct/zero-shot/label/pick-one":
            row.update(id="direct/zero-shot/list/pick-one", predictor="list")
    several["comparisons"] = []
    found = {(s.arm, s.predictor): s for s in spreads(results_of(several), "direct")}
    assert set(found) == {("zero-shot", "label"), ("zero-shot", "list"), ("few-shot", "label"), ("tuned", "label")}
    assert found["zero-shot", "list"].single and found["zero-shot", "list"].unseen is None
    assert singles(results_of(several), "direct") == {"direct/zero-shot/list/pick-one"}


def test_a_row_without_a_value_counts_for_no_spread(several: dict[str, Any]) -> None:
    for row in several["rows"]:
        if row["task"] == "direct" and row["arm"] == "tuned" and row["template_use"] == "unseen":
            row["metrics"]["NDCG@10"]["value"] = None
    found = next(spread for spread in spreads(results_of(several), "direct") if spread.arm == "tuned")
    assert found.unseen is None and found.seen is not None and len(found.seen.templates) == 3


def test_seen_and_unseen_stand_in_the_page_and_in_markdown(several: dict[str, Any], save: Save) -> None:
    found = next(spread for spread in spreads(results_of(several), "direct") if spread.arm == "tuned")
    assert found.seen is not None and found.unseen is not None
    pages = write(save(several))
    html = pages["html"].read_text("utf-8").split('id="templates-3-caption"')[1].split("</table>")[0]
    row = html.split("tuned</span>")[1]
    for over in (found.seen, found.unseen):
        cells = (f"{len(over.templates)}", f"{over.mean:.3f}", f"{over.low:.3f} to {over.high:.3f}")
        assert "".join(f'<td class="num">{said}</td>' for said in cells) in row
    line = next(
        line
        for line in pages["markdown"].read_text("utf-8").splitlines()
        if line.startswith("| fine-tuned · label | 3 |")
    )
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:9] == [
        str(part) if isinstance(part, int) else f"{part:.3f}"
        for over in (found.seen, found.unseen)
        for part in (len(over.templates), over.mean, over.low, over.high)
    ]
    assert "single template" not in line


def test_a_result_with_one_template_is_marked(several: dict[str, Any], results: dict[str, Any], save: Save) -> None:
    pages = write(save(several))
    html, text = pages["html"].read_text("utf-8"), pages["markdown"].read_text("utf-8")
    # All of explanations, none of pick from candidates, and of ratings all but the tuned rows.
    assert html.split('id="task-4"')[1].split("</table>")[0].count("single template") == 3
    assert "All results of this task use a single template" in html.split('id="task-4"')[1]
    assert "single template" not in html.split('id="task-3"')[1].split("</section>")[0]
    ratings = html.split('id="task-1"')[1].split("</table>")[0]
    assert ratings.count("single template") == 2
    assert "single template" in _row_of(html, 1, "expected", "zero-shot")
    assert "single template" not in _row_of(html, 1, "expected", "fine-tuned")
    assert "| explanation/because (seen, single template) |" in text and "| rating/half-stars (seen) |" in text
    lines = list(csv.DictReader(io.StringIO(csv_text(results_of(several)))))
    said = {(line["task"], line["arm"]): line["single_template"] for line in lines}
    assert said["explanation", "tuned"] == "yes" and said["direct", "tuned"] == "no"
    assert said["rating", "zero-shot"] == "yes" and said["rating", "tuned"] == "no" and said["rating", "baseline"] == ""
