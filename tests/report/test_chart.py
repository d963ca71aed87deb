"""Charts that a notebook shows."""

from __future__ import annotations

from typing import Any

from llmrec.report.chart import bars, of_run
from llmrec.results import Metric


def test_bars_with_intervals() -> None:
    result = Metric(value=0.5, low=0.4, high=0.6, n=8, signature="NDCG@10")
    chart = bars({"item-knn": result, "<b>": result}, "NDCG@10")
    drawn = chart._repr_svg_()
    assert repr(chart) == "Chart of NDCG@10"
    assert drawn.lstrip().startswith("<svg") and drawn.count('class="bar"') == 2
    assert "item-knn" in drawn and "&lt;b&gt;" in drawn and "0.400" in drawn


def test_bars_leave_out_undefined_values() -> None:
    metrics = {"item-knn": Metric(value=-0.5, signature="R2"), "random": Metric(value=None, signature="R2")}
    drawn = bars(metrics, "R2")._repr_svg_()
    assert drawn.count('class="bar"') == 1 and "item-knn" in drawn and "random" not in drawn


def test_plot_of_a_run(results: dict[str, Any]) -> None:
    assert of_run(results, "forest-1")._repr_svg_().lstrip().startswith("<svg")
