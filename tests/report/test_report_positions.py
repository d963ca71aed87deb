"""Position bias: bands of positions, their intervals, sentences, and the curve."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from llmrec.report.breakdowns import describe_bias, position_bands, position_bias_sentences, rows_with_positions
from llmrec.report.canvas import WIDE
from llmrec.report.charts import draw_plot
from llmrec.report.plots import positions_plot
from llmrec.report.render import render_markdown_page
from llmrec.report.results import parse_results
from llmrec.report.wording import label
from llmrec.results import PositionBias, PositionResult, Row


def _row(*entries: PositionResult) -> Row:
    return Row(id="r", task="direct", arm="tuned", predictor="label", engine="hf", n=1, metrics={}, by_position=entries)


def _at(
    position: int, n: int, hit: float | None = 0.5, rank: float | None = 3.0, sd: float | None = 1.0
) -> PositionResult:
    return PositionResult(position=position, n=n, hit=hit, rank=rank, rank_sd=sd)


# --------------------------------------------------------------------------- bands


def test_band_equals_its_pooled_requests() -> None:
    rng = np.random.default_rng(0)
    ranks = {1: rng.integers(1, 9, 7).astype(float), 2: rng.integers(1, 9, 4).astype(float)}
    hits = {position: (values == 1).astype(float) for position, values in ranks.items()}
    entries = [
        _at(position, len(values), float(hits[position].mean()), float(values.mean()), float(values.std(ddof=1)))
        for position, values in ranks.items()
    ]
    result = position_bands(_row(*entries, _at(3, 11), _at(4, 11)))
    assert [band.name for band in result] == ["1–2", "3–4"]
    first, pooled = result[0], np.concatenate(list(ranks.values()))
    assert first.n == 11 and first.hit == pytest.approx(np.concatenate(list(hits.values())).mean())
    assert first.rank == pytest.approx(pooled.mean())
    half = t.ppf(0.975, 10) * pooled.std(ddof=1) / math.sqrt(11)
    assert first.rank_low == pytest.approx(pooled.mean() - half) and first.rank_high == pytest.approx(
        pooled.mean() + half
    )
    assert first.mean_rank == f"{pooled.mean():.1f}"
    assert first.rank_bounds == f"[{first.rank_low:.1f}, {first.rank_high:.1f}]"


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 30)), max_size=40, unique_by=lambda each: each[0]))
def test_each_request_is_in_one_band(entries: list[tuple[int, int]]) -> None:
    result = position_bands(_row(*(_at(position, n) for position, n in entries)))
    kept = {position: n for position, n in entries if n}
    assert sum(band.n for band in result) == sum(kept.values())
    assert all(after.first > before.last for before, after in pairwise(result))
    for band in result:
        assert band.n == sum(n for position, n in kept.items() if band.first <= position <= band.last) > 0
        assert 0 <= band.hit_low <= band.hit <= band.hit_high <= 1


def test_positions_without_values_and_single_requests() -> None:
    assert position_bands(_row()) == ()
    assert position_bands(_row(_at(1, 0), _at(2, 3, hit=None), _at(3, 3, rank=None))) == ()
    (only,) = position_bands(_row(_at(5, 1, sd=None)))
    assert (only.name, only.rank_low, only.rank_high, only.rank_bounds) == ("1–5", None, None, "")


# --------------------------------------------------------------------------- words


def test_sentences_name_biased_rows(results: dict[str, Any]) -> None:
    result = parse_results(results)
    assert position_bias_sentences(result, "direct") == (
        "Significant position bias (the rank of the target depends on its position among the candidates): zero-shot · "
        "label · pick-one (46 % of the variance of the rank, 10 % expected by chance; rank correlation +0.41; "
        "corrected p < 0.001).",
        "No significant position bias: few-shot · label · pick-one and fine-tuned · label with both templates.",
    )
    assert position_bias_sentences(result, "rating") == ()


def test_rows_with_several_templates_are_named_together(several: dict[str, Any]) -> None:
    tuned = [row for row in several["rows"] if row["task"] == "direct" and row["arm"] == "tuned"]
    for row, share, rho, p in zip(tuned[:3], (0.5, 0.3, 0.4), (-0.5, -0.304, 0), (0.004, 0.0402, 0.001), strict=True):
        row["position_bias"] = {"share": share, "chance": 0.1, "rho": rho, "p": p}
    first, rest = position_bias_sentences(parse_results(several), "direct")
    assert first.endswith(
        "and fine-tuned · label with 3 of 5 templates (30 % to 50 % of the variance of the rank, 10 % expected by "
        "chance; rank correlation −0.50 to +0.00; corrected p at most 0.040)."
    )
    assert rest == (
        "No significant position bias: few-shot · label with all 5 templates and fine-tuned · label with 2 of 5 "
        "templates."
    )


def test_sentence_without_biased_rows(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        if row.get("position_bias"):
            row["position_bias"] = {"share": None, "chance": None, "rho": None, "p": None}
    assert position_bias_sentences(parse_results(results), "direct") == (
        "No language model has a significant position bias.",
    )
    nothing = PositionBias(share=None, chance=None, rho=None, p=None)
    assert describe_bias(nothing) == (
        "– of the variance of the rank, – expected by chance; rank correlation –; corrected p –"
    )


def test_run_of_baselines_has_no_table_of_positions(results: dict[str, Any]) -> None:
    results["rows"] = [row for row in results["rows"] if row["arm"] == "baseline"]
    results["comparisons"] = []
    assert rows_with_positions(parse_results(results), "direct") == ()
    assert "Position of the target" not in render_markdown_page(parse_results(results), {}, None, fix="")


# --------------------------------------------------------------------------- the curve


def test_curve_has_every_language_model_and_the_best_baseline(results: dict[str, Any]) -> None:
    result = parse_results(results)
    plot = positions_plot(result, "direct")
    assert [label(row) for row in plot["rows"]] == [
        "zero-shot · label · pick-one",
        "few-shot · label · pick-one",
        "fine-tuned · label · pick-one",
        "fine-tuned · label · unseen-pick-one",
    ]
    assert plot["control"] is not None and label(plot["control"]) == "item-knn"
    drawn = position_bands(plot["rows"][0])
    assert [band.name for band in drawn] == [f"{first}–{first + 1}" for first in range(1, 20, 2)]
    assert [band.middle for band in drawn] == [first + 0.5 for first in range(1, 20, 2)]
    shapes = draw_plot(plot, WIDE).shapes
    titles = [shape.title for shape in shapes if shape.title.startswith("zero-shot") and "target at" in shape.title]
    assert titles == [
        f"zero-shot · label · pick-one, target at {band.name}: {name} {getattr(band, key):.3g}, n = 20"
        for key, name in (("hit", "HR@1"), ("rank", "mean rank"))
        for band in drawn
    ]
    assert positions_plot(result, "rating")["rows"] == []


def test_positions_in_page_and_markdown(pages: dict[str, Path]) -> None:
    html = pages["html"].read_text("utf-8")
    assert html.count('id="positions-2"') == html.count('id="positions-3"') == 1 and 'id="positions-1"' not in html
    part = html.split('id="positions-3-caption"')[1].split("</table>")[0]
    assert part.count("<tr>") == 1 + 5 * 10 and part.count("of the variance of the rank") == 4
    text = pages["markdown"].read_text("utf-8").split("### Pick from candidates")[1].split("\n### ")[0]
    lines = text.split("#### Position of the target")[1].split("####")[0].splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + 5 * 10
    assert re.search(r"\| item-knn \| 19–20 \| 20 \| 0\.\d{3} \[[^|]*\] \| \d+\.\d \[[^|]*\] \|", text)
