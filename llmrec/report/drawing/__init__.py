"""Plots as inline SVG, which a page holds in itself: shapes on a canvas, scales, and one function a kind of plot."""

from __future__ import annotations

from llmrec.report.drawing import charts as curves
from llmrec.report.drawing.canvas import HALF, NARROW, WIDE, Canvas
from llmrec.report.plots import Plot


def pictures(plot: Plot) -> tuple[Canvas, Canvas]:
    """Return a plot as it is drawn on a wide page and on a telephone; the page shows one of them."""
    one_line = plot["kind"] == "lines" and len(plot["series"]) == 1
    wide = HALF if one_line or plot["kind"] in ("differences", "cost") else WIDE
    return draw(plot, wide), draw(plot, NARROW)


def draw(plot: Plot, width: float) -> Canvas:
    """Draw a plot of a run's report.

    Args:
        plot: Its numbers and texts.
        width: Pixels.
    """
    match plot["kind"]:
        case "differences":
            return curves.differences(plot, width)
        case "forest":
            return curves.forest(plot, width)
        case "weights":
            return curves.weights(plot, width)
        case "budget":
            return curves.budget(plot, width)
        case "lines":
            return curves.lines(plot, width)
        case "positions":
            return curves.positions(plot, width)
        case "cost":
            return curves.cost(plot, width)
