"""The chart of docs/model-size.md: quality of text encoders by size and processor time, from encoder_tuning.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrec.report.canvas import WIDE, Canvas, Scale, linear_scale, spread_positions
from llmrec.report.render import render_svg

NAME = "docs/model-size.svg"

# Variants by the label of their curve, with its colour and the form of its marks.
_ENCODERS = {
    "lsa": ("LSA", "baseline", "square"),
    "default": ("MiniLM, 22M", "zero-shot", "circle"),
    "all-mpnet-base-v2": ("mpnet, 110M", "few-shot", "diamond"),
    "SmolLM2-135M": ("SmolLM2, 135M", "tuned", "triangle"),
}
# The data set, and the prefix of its variants.
_PANELS = (("Amazon Toys", ""), ("Amazon Beauty", "beauty-"))
_LEFT, _GAP, _TOP, _BOTTOM, _LABELS = 52, 64, 52, 292, 106


def chart(variants: Mapping[str, Any]) -> str:
    """Return the chart as an SVG file, with a panel for each data set."""
    canvas = Canvas(width=WIDE, height=_BOTTOM + 50)
    wide = (WIDE - _LEFT - _GAP) / 2 - _LABELS
    for place, (title, prefix) in enumerate(_PANELS):
        left = _LEFT + place * (wide + _LABELS + _GAP)
        curves = {name: _points(variants[prefix + name]) for name in _ENCODERS if prefix + name in variants}
        base = variants[f"{prefix}no-text"]["curve"][0]["tuned"]["others"]
        rise = linear_scale([base, *(value for points in curves.values() for _, value in points)], _BOTTOM, _TOP)
        minutes = [time for points in curves.values() for time, _ in points]
        along = Scale(low=min(minutes) / 1.5, high=max(minutes) * 1.2, start=left, end=left + wide, log=True)
        canvas.text(left, 16, title, "name")
        canvas.left(rise, left, along.end)
        canvas.text(left, _TOP - 14, "NDCG@10", "axis-title")
        canvas.below(along, _BOTTOM, _BOTTOM, "minutes on one core (log scale)", ticks=5)
        canvas.line(left, rise(base), along.end, rise(base), "reference")
        canvas.text(along.end, rise(base) - 5, "without text", "tick halo", anchor="end")
        ends = spread_positions([rise(points[-1][1]) for points in curves.values()], 16, _TOP, _BOTTOM)
        for name, end in zip(curves, ends, strict=True):
            label, hue, form = _ENCODERS[name]
            points = [(along(time), rise(value)) for time, value in curves[name]]
            canvas.path(points, f"curve {hue}")
            for (x, y), (time, value) in zip(points, curves[name], strict=True):
                canvas.mark(form, x, y, f"fill {hue}", size=4, title=f"{label}: {value:.4f} after {time:.1f} minutes")
            canvas.text(along.end + 6, end + 4, label, "tick")
    return render_svg(canvas, "NDCG@10 of text encoders on two data sets, before and during fine-tuning, by minutes")


def _points(variant: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return minutes and NDCG@10 of `transitions-text` with an encoder, before and during fine-tuning."""
    return [(look["seconds"] / 60, look["tuned"]["others"]) for look in variant["curve"]]
