"""Charts in notebooks, drawn like the plots of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrec.report.charts import draw_plot
from llmrec.report.plots import Plot, make_bar, report_plots
from llmrec.report.render import render_svg
from llmrec.results import Metric, Results

# pixels
_WIDTH = 720


class Chart:
    """A plot with a name, which notebooks show as SVG."""

    def __init__(self, plot: Plot, name: str) -> None:
        self._name, self._svg = name, render_svg(draw_plot(plot, _WIDTH), name)

    def __repr__(self) -> str:
        return f"Chart of {self._name}"

    def _repr_svg_(self) -> str:
        return self._svg


def bars(values: Mapping[str, Metric], unit: str) -> Chart:
    """Draw metric values with their confidence intervals; undefined values are left out.

    Args:
        values: Values by the name of the model.
        unit: The name of the metric.
    """
    drawn = [make_bar(name, m.value, m.low, m.high) for name, m in values.items() if m.value is not None]
    return Chart({"kind": "bars", "unit": unit, "bars": drawn}, unit)


def of_run(results: Mapping[str, Any], plot: str) -> Chart:
    """Draw a plot from the report of a run, such as ``forest-1`` or ``training-loss``.

    Args:
        results: `llmrec.pipeline.run.Run.results`.
        plot: The id of the plot in the page of the report.
    """
    return Chart(report_plots(Results.model_validate(results))[plot], plot)
