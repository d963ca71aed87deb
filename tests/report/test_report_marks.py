"""Significance marks, and the spread of a result over its templates."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest

from llmrec.report.marks import (
    best_baseline,
    comparison_marks,
    has_marks,
    marks_legend,
    significance_rule,
    single_template_ids,
    template_spreads,
)
from llmrec.report.results import parse_results

BETTER, WORSE = "significantly better", "significantly worse"
TUNED = "sequential/tuned/likelihood/continue-list"
FEW = "sequential/few-shot/likelihood/continue-list"


def _row_of(html: str, number: int, predictor: str, arm: str, template: str = "") -> str:
    """Return one row of a task's table, as HTML."""
    table = html.split(f'id="task-{number}-caption"')[1].split("</table>")[0]
    return next(
        row for row in table.split("<tr ") if f"<bdi>{predictor}</bdi>" in row and f">{arm}<" in row and template in row
    )


# --------------------------------------------------------------------------- marks


def test_marks_compare_with_zero_shot_and_the_best_baseline(results: dict[str, Any]) -> None:
    result = comparison_marks(parse_results(results), "sequential")
    assert set(result) == {
        row["id"] for row in results["rows"] if row["task"] == "sequential" and row["arm"] != "baseline"
    }
    tuned = result[TUNED]
    assert tuned.zero_shot is not None and tuned.zero_shot.verdict == "shown"
    assert tuned.baseline is not None and (tuned.baseline.verdict, tuned.baseline.b) == (
        "contradicted",
        "sequential/baseline/markov-1",
    )
    # Exploratory comparisons have no mark, and zero-shot rows are only compared with the baseline.
    assert any(entry["a"] == FEW for entry in results["comparisons"])
    assert result[FEW].zero_shot is None and result[FEW].baseline is None
    assert result["sequential/zero-shot/likelihood/continue-list"].zero_shot is None


def test_marks_use_the_main_metric_and_the_best_baseline(results: dict[str, Any]) -> None:
    for entry in results["comparisons"]:
        if entry["a"] == TUNED:
            entry["metric"] = "HR@1"
    assert comparison_marks(parse_results(results), "sequential")[TUNED].zero_shot is None
    for row in results["rows"]:
        if row["id"] == "rating/baseline/item-mean":
            row["metrics"]["RMSE"]["value"] = 0.5
    result = parse_results(results)
    control = best_baseline(result, "rating")
    assert control is not None and control.predictor == "item-mean"
    assert comparison_marks(result, "rating")["rating/tuned/expected/half-stars"].baseline is None


def test_marks_in_every_file(pages: dict[str, Path]) -> None:
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
    table = csv.DictReader(io.StringIO(pages["csv"].read_text("utf-8")))
    lines = {line["row"]: line for line in table if line["metric"] == "NDCG@10"}
    assert [lines[TUNED][key] for key in ("beats_zero_shot", "beats_best_baseline", "best_baseline")] == [
        *(BETTER, WORSE), "sequential/baseline/markov-1",
    ]  # fmt: skip
    assert float(lines[TUNED]["beats_zero_shot_p"]) == 0.0004
    assert lines["sequential/baseline/markov-1"]["beats_zero_shot"] == ""


def test_legend_and_rule(results: dict[str, Any]) -> None:
    result = parse_results(results)
    text = marks_legend(result, "sequential")
    assert "NDCG@10 of a language model" in text and "markov-1" in text
    assert "Holm-corrected over all 8 planned comparisons, is at most .05" in significance_rule(result)
    results["comparisons"] = results["comparisons"][:1]
    result = parse_results(results)
    assert "over the only planned comparison" in significance_rule(result)
    assert (
        marks_legend(result, "sequential") == "" and not has_marks(result, "sequential") and has_marks(result, "rating")
    )


def test_exploratory_comparisons_have_no_p_and_verdict(pages: dict[str, Path], results: dict[str, Any]) -> None:
    html = pages["html"].read_text("utf-8").split('id="comparisons"')[1].split("</section>")[0]
    tested, described = html.split('id="exploratory-caption"')
    assert "8 planned comparisons" in tested and "4 exploratory comparisons" in tested
    assert tested.count("badge") == 8 and "badge" not in described and "few-shot" in described
    assert "97.5 %" in tested and "unadjusted 95" in described
    text = pages["markdown"].read_text("utf-8").split("### Exploratory")[1].split("## Training")[0]
    assert text.count("few-shot") == 4 and "significant" not in text and "no p-value and no verdict" in text
    detectable = f"{results['comparisons'][0]['detectable']:.3f}"
    assert f'<td class="num">{detectable}</td>' in tested and "80 % power" in html
    assert f"| {detectable} |" in pages["markdown"].read_text("utf-8").split("## Comparisons")[1]


# --------------------------------------------------------------------------- templates


def test_spread_by_hand(several: dict[str, Any]) -> None:
    values = {
        "pick-one": 0.5, "one-of-these": 0.4, "which-next": 0.6, "unseen-pick-one": 0.3, "unseen-question": 0.1,
    }  # fmt: skip
    for row in several["rows"]:
        if row["task"] == "direct" and row["arm"] == "tuned":
            row["metrics"]["NDCG@10"]["value"] = values[row["template"].rpartition("/")[2]]
    result = next(spread for spread in template_spreads(parse_results(several), "direct") if spread.arm == "tuned")
    assert result.seen is not None and result.unseen is not None and not result.single
    assert set(result.seen.templates) == {"pick-one", "one-of-these", "which-next"}
    assert (result.seen.mean, result.seen.low, result.seen.high) == (pytest.approx(0.5), 0.4, 0.6)
    assert set(result.unseen.templates) == {"unseen-pick-one", "unseen-question"}
    assert (result.unseen.mean, result.unseen.low, result.unseen.high) == (pytest.approx(0.2), 0.1, 0.3)
    # Rows without a value do not count.
    for row in several["rows"]:
        if row["task"] == "direct" and row["arm"] == "tuned" and row["template_use"] == "unseen":
            row["metrics"]["NDCG@10"]["value"] = None
    result = next(spread for spread in template_spreads(parse_results(several), "direct") if spread.arm == "tuned")
    assert result.unseen is None and result.seen is not None and len(result.seen.templates) == 3


def test_each_arm_and_strategy_has_a_spread(several: dict[str, Any]) -> None:
    for row in several["rows"]:
        if row["id"] == "direct/zero-shot/label/pick-one":
            row.update(id="direct/zero-shot/list/pick-one", predictor="list")
    several["comparisons"] = []
    result = {(s.arm, s.predictor): s for s in template_spreads(parse_results(several), "direct")}
    assert set(result) == {("zero-shot", "label"), ("zero-shot", "list"), ("few-shot", "label"), ("tuned", "label")}
    assert result["zero-shot", "list"].single and result["zero-shot", "list"].unseen is None
    assert single_template_ids(parse_results(several), "direct") == {"direct/zero-shot/list/pick-one"}


def test_spreads_in_page_and_markdown(several: dict[str, Any], several_pages: dict[str, Path]) -> None:
    result = next(spread for spread in template_spreads(parse_results(several), "direct") if spread.arm == "tuned")
    assert result.seen is not None and result.unseen is not None
    html = several_pages["html"].read_text("utf-8").split('id="templates-3-caption"')[1].split("</table>")[0]
    row = html.split("tuned</span>")[1]
    for over in (result.seen, result.unseen):
        cells = (f"{len(over.templates)}", f"{over.mean:.3f}", f"{over.low:.3f} to {over.high:.3f}")
        assert "".join(f'<td class="num">{cell}</td>' for cell in cells) in row
    lines = several_pages["markdown"].read_text("utf-8").splitlines()
    line = next(line for line in lines if line.startswith("| fine-tuned · label | 3 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:9] == [
        str(part) if isinstance(part, int) else f"{part:.3f}"
        for over in (result.seen, result.unseen)
        for part in (len(over.templates), over.mean, over.low, over.high)
    ]
    assert "single template" not in line


def test_results_with_a_single_template_are_marked(several_pages: dict[str, Path]) -> None:
    html, text = (several_pages[kind].read_text("utf-8") for kind in ("html", "markdown"))
    # All rows of explanations, no row of pick from candidates, and all but the tuned rows of ratings.
    assert html.split('id="task-4"')[1].split("</table>")[0].count("single template") == 3
    assert "All results of this task use a single template" in html.split('id="task-4"')[1]
    assert "single template" not in html.split('id="task-3"')[1].split("</section>")[0]
    ratings = html.split('id="task-1"')[1].split("</table>")[0]
    assert ratings.count("single template") == 2
    assert "single template" in _row_of(html, 1, "expected", "zero-shot")
    assert "single template" not in _row_of(html, 1, "expected", "fine-tuned")
    assert "| explanation/because (seen, single template) |" in text and "| rating/half-stars (seen) |" in text
    lines = csv.DictReader(io.StringIO(several_pages["csv"].read_text("utf-8")))
    single = {(line["task"], line["arm"]): line["single_template"] for line in lines}
    assert single["explanation", "tuned"] == "yes" and single["direct", "tuned"] == "no"
    assert (single["rating", "zero-shot"], single["rating", "tuned"], single["rating", "baseline"]) == ("yes", "no", "")
