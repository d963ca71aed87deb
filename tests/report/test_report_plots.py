"""The plots: their data, and the positions of their marks."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.report.canvas import (
    NARROW,
    WIDE,
    Canvas,
    Scale,
    Shape,
    linear_or_log_scale,
    linear_scale,
    spread_positions,
    text_width,
    truncate_to_width,
)
from llmrec.report.charts import draw_plot, draw_wide_and_narrow
from llmrec.report.page import write_report
from llmrec.report.plots import cost_plot, differences_plot, loss_plot, report_plots, weights_plot
from llmrec.report.render import render_markdown_page
from llmrec.report.results import parse_results
from llmrec.results import Row, arm_name
from tests.report.test_report_page import Tree, plot_of


def marks(canvas: Canvas, look: str) -> list[tuple[float, float, str]]:
    """Return the left end, the top and the hover text of marks, in the order in which they were drawn."""
    result = [shape for shape in canvas.shapes if shape.title and shape.look.startswith(look)]
    return [(*_start(shape), shape.title) for shape in result]


def _start(shape: Shape) -> tuple[float, float]:
    x, y = re.findall(r"-?[\d.]+", dict(shape.at)["d"])[:2]
    return float(x), float(y)


def zero_of(canvas: Canvas) -> float:
    return next(float(dict(shape.at)["x1"]) for shape in canvas.shapes if shape.look == "zero")


# --------------------------------------------------------------------------- differences


def test_better_is_to_the_right_for_every_metric(results: dict[str, Any]) -> None:
    result = parse_results(results)
    plot = differences_plot(result)
    rows = {row["label"]: row for row in plot["rows"]}
    # The tuned model has a higher RMSE and a lower NDCG than its control, and is better in the two others.
    signs = {name: row["value"] > 0 for name, row in rows.items()}
    assert list(signs.values()) == [False, False, True, True]
    assert plot["sides"] == "better → (RMSE: sign reversed, lower is better)" and "% of the baseline" in plot["unit"]
    rating = rows["Rating prediction"]
    assert rating["value"] == pytest.approx(-100 * 0.03 / 0.93) and "+0.030" in rating["text"]
    assert rating["low"] is not None and rating["high"] is not None
    assert rating["low"] < rating["value"] < rating["high"]
    for width in (WIDE, NARROW):
        canvas = draw_plot(plot, width)
        drawn = [(x > zero_of(canvas), title) for x, _, title in marks(canvas, "mark-")]
        assert [right for right, _ in drawn] == list(signs.values())
        assert [title.partition(":")[0] for _, title in drawn] == list(rows)


def test_marks_of_verdicts_and_band_of_the_detectable_difference(results: dict[str, Any]) -> None:
    for entry, verdict in zip(results["comparisons"][2::3], ("contradicted", "not shown", "shown", None), strict=True):
        entry["verdict"] = verdict
    plot = differences_plot(parse_results(results))
    canvas = draw_plot(plot, WIDE)
    looks = [shape.look for shape in canvas.shapes if shape.look.startswith("mark-") and shape.title]
    assert looks == ["mark-bad", "mark-even", "mark-good", "mark-open"]
    assert [row["verdict"] for row in plot["rows"]] == ["contradicted", "not shown", "shown", None]
    bands = [dict(shape.at) for shape in canvas.shapes if shape.look == "band"]
    middles = [float(band["x"]) + float(band["width"]) / 2 for band in bands]
    assert len(bands) == 4 and middles == pytest.approx([zero_of(canvas)] * 4, abs=0.2)


def test_differences_in_one_metric_have_its_unit(results: dict[str, Any]) -> None:
    for key in ("headline", "detectable"):
        results[key] = {task: results[key][task] for task in ("sequential", "direct")}
    for key in ("rows", "comparisons"):
        results[key] = [entry for entry in results[key] if entry["task"] in results["headline"]]
    plot = differences_plot(parse_results(results))
    assert plot["unit"] == "difference in NDCG@10" and plot["sides"] == "better →"
    assert [row["value"] for row in plot["rows"]] == pytest.approx([-0.06, 0.05])


def test_summary_has_the_plot_and_a_card_per_task(pages: dict[str, Path]) -> None:
    text = pages["html"].read_text("utf-8")
    first = text.split('<section id="summary"')[1].split("</section>")[0]
    label = first.split('id="differences"')[1].split('">')[0]
    assert "fine-tuned · likelihood · continue-list is significantly worse than markov-1" in label
    assert first.count('<article class="card">') == 4
    # The large value is that of the model, and the difference has the sign of the table of comparisons.
    large = re.findall(r'<span class="figure">([\d.]+)</span>', first)
    assert large == ["0.960", "0.500", "0.520", "0.270"]
    assert "best baseline 0.560" in re.sub(r"<[^>]+>", "", first) and "difference <strong>−0.060</strong>" in first
    table = text.split('id="comparisons-caption"')[1]
    assert "NDCG@10</span> −0.060" in table and "trivial" not in text


# --------------------------------------------------------------------------- other plots


def test_forest_is_in_order(results: dict[str, Any]) -> None:
    result = parse_results(results)
    canvas = draw_plot(report_plots(result)["forest-1"], WIDE)
    drawn = [mark for look in ("zero-shot", "few-shot", "tuned", "baseline") for mark in marks(canvas, f"fill {look}")]
    drawn.sort(key=lambda mark: mark[1])
    rows = [row for row in result.standings("rating")]
    assert [title.partition(":")[0].split(" · ")[0] for _, _, title in drawn] == [
        row.predictor if row.arm == "baseline" else arm_name(row.arm) for row in rows
    ]
    assert all(before[0] <= after[0] + 6 for before, after in pairwise(drawn)), "lower RMSE first, so further left"


def test_high_loss_does_not_flatten_the_curve(results: dict[str, Any]) -> None:
    results["training"]["log"][0]["loss"] = 40.0
    canvas = draw_plot(loss_plot(parse_results(results)), WIDE)
    curve = next(dict(shape.at)["d"] for shape in canvas.shapes if shape.look == "curve tuned")
    heights = [float(pair.split(",")[1]) for pair in curve[1:].split()]
    assert heights[0] == min(heights)
    # On a linear axis everything after the first step would lie within a fifteenth of the height.
    assert max(heights) - min(heights[1:]) > 0.15 * (max(heights) - heights[0])
    assert any("log scale" in shape.text for shape in canvas.shapes)


def test_unit_of_the_loss(results: dict[str, Any]) -> None:
    assert loss_plot(parse_results(results))["unit"] == "loss, nats per token"
    results["training"]["log"][0]["figures"] = {"rewards/margins": 0.5}
    assert loss_plot(parse_results(results))["unit"] == "loss"
    assert "the training loss is a mean over lists." in render_markdown_page(parse_results(results), {}, None, fix="")


def test_numbers_of_the_cost_plot_do_not_overlap(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        if row["task"] == "direct" and row["arm"] != "baseline":
            row["cost"] = {"seconds": 1.0, "prompt_tokens": 20_000, "completion_tokens": 0}
            row["metrics"]["NDCG@10"].update(value=0.5, low=0.45, high=0.55)
    plot = cost_plot(parse_results(results), "direct")
    assert plot is not None
    canvas = draw_plot(plot, NARROW)
    numbers = [shape for shape in canvas.shapes if shape.look == "name halo"]
    points = [(float(dict(shape.at)["x"]), float(dict(shape.at)["y"])) for shape in numbers]
    assert [shape.text for shape in numbers] == ["1", "2", "3", "4"]
    assert all(abs(a - c) > 8 or abs(b - d) > 11 for n, (a, b) in enumerate(points) for c, d in points[:n])
    listed = [shape.text for shape in canvas.shapes if shape.text.endswith("0.500, 100 tokens")]
    assert len(listed) == 4


def test_weights_are_sorted_bars_from_0(results: dict[str, Any]) -> None:
    parts = [
        {"name": "markov", "weight": 0.4, "low": 0.2, "high": 0.6},
        {"name": "<b>popularity</b>", "weight": -0.9, "low": -1.0, "high": -0.8},
    ]
    row = next(row for row in results["rows"] if row["arm"] == "baseline")
    plot = weights_plot(Row.model_validate({**row, "fusion": {"form": "logit", "parts": parts}}))
    assert [part["label"] for part in plot["bars"]] == ["<b>popularity</b>", "markov"]
    canvas = draw_plot(plot, WIDE)
    bars = [dict(shape.at) for shape in canvas.shapes if shape.look == "bar"]
    ends = [(float(bar["x"]), float(bar["x"]) + float(bar["width"])) for bar in bars]
    zero = zero_of(canvas)
    assert ends[0][1] == pytest.approx(zero, abs=0.2) and ends[1][0] == pytest.approx(zero, abs=0.2)
    assert (ends[0][1] - ends[0][0]) / (ends[1][1] - ends[1][0]) == pytest.approx(0.9 / 0.4, rel=0.02)


def test_page_has_the_weights_of_a_fusion(results: dict[str, Any], save: Any) -> None:
    evil = "</title><script>window.__pwned=1</script>"
    row = next(row for row in results["rows"] if row["id"] == "direct/baseline/item-knn")
    parts = [{"name": name, "weight": 0.4, "low": 0.2, "high": 0.6} for name in (evil, "markov")]
    row["fusion"] = {"form": "logit", "parts": parts}
    text = write_report(save(results))["html"].read_text("utf-8")
    assert any(evil in each for each in Tree(plot_of(text, "weights-3-1")).texts) and "<script" not in text


def test_single_bar_is_not_plotted(results: dict[str, Any], save: Any) -> None:
    row = next(row for row in results["rows"] if row["id"] == "direct/baseline/item-knn")
    row["fusion"] = {"form": "logit", "parts": [{"name": "markov", "weight": 1.0}]}
    results["budget"] = results["budget"][:1]
    assert not {"weights-3-1", "budget"} & set(report_plots(parse_results(results)))
    assert 'id="weights-3-1"' not in write_report(save(results))["html"].read_text("utf-8")


def test_axes_have_titles_with_units(results: dict[str, Any]) -> None:
    result = report_plots(parse_results(results))
    expected = {
        "forest-1": {"RMSE (lower is better)"}, "budget": {"seconds"},
        "training-loss": {"optimiser step", "loss, nats per token"}, "training-speed": {"optimiser step", "tokens/s"},
    }  # fmt: skip
    for name, titles in expected.items():
        for canvas in draw_wide_and_narrow(result[name]):
            assert {
                shape.text.removesuffix(", log scale") for shape in canvas.shapes if shape.look == "axis-title"
            } == titles


def test_shapes_are_inside_the_picture(results: dict[str, Any]) -> None:
    for plot in report_plots(parse_results(results)).values():
        for canvas in draw_wide_and_narrow(plot):
            for shape in canvas.shapes:
                at = dict(shape.at)
                across = [float(at[key]) for key in ("x", "x1", "x2") if key in at]
                down = [float(at[key]) for key in ("y", "y1", "y2") if key in at]
                assert all(-1 <= x <= canvas.width + 1 for x in across), (plot["kind"], shape)
                assert all(-1 <= y <= canvas.height + 1 for y in down), (plot["kind"], shape)


# --------------------------------------------------------------------------- scales

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=8))
def test_scale_and_ticks(values: list[float]) -> None:
    scale = linear_scale(values, 10, 200)
    assert all(10 <= scale(value) <= 200 for value in values)
    assert [scale(value) for value in sorted(values)] == sorted(scale(value) for value in values)
    ticks = scale.ticks(6)
    assert 1 <= len(ticks) <= 9 and all(scale.low - 1e-6 <= tick <= scale.high + 1e-6 for tick in ticks)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_logarithmic_scale(values: list[float]) -> None:
    scale = linear_or_log_scale(values, 200, 10)
    assert scale.log is (max(values) / min(values) >= 4)
    assert all(10 - 1e-6 <= scale(value) <= 200 + 1e-6 for value in values) and len(scale.ticks(6)) >= 1


def test_ticks_are_round() -> None:
    assert Scale(low=0, high=1, start=0, end=1).ticks(5) == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert Scale(low=0.7, high=11, start=0, end=1, log=True).ticks(6) == (1.0, 2.0, 5.0, 10.0)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_labels_do_not_overlap_and_keep_their_order(heights: list[float]) -> None:
    result = spread_positions(heights, 12, 0, 100)
    assert all(-1e-6 <= height <= 100 + 1e-6 for height in result)
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    assert all(result[b] - result[a] >= 12 - 1e-6 for a, b in pairwise(order))


@given(st.text(max_size=60), st.floats(30, 300))
def test_cut_text_fits(text: str, width: float) -> None:
    shown = truncate_to_width(text, width)
    assert text_width(shown) <= width and (shown == text or shown.endswith("…"))
