"""Plots over a number: training curves, quality against cost, figures by position."""

from __future__ import annotations

import math
from typing import Literal

from llmrec.report.drawing.canvas import MARKS, NARROW, SMALL, Canvas, cut, text_width
from llmrec.report.drawing.rows import settings
from llmrec.report.drawing.scale import Scale, apart, fitted, spanning
from llmrec.report.plots import CostPlot, Lines, Panel, Positions, Series

_HUES = ("zero-shot", "few-shot", "good", "baseline", "bad")
_FORMS = ("circle", "diamond", "square", "triangle", "right")
_MARKED = 30  # a line of more points than this has no marks
_LEFT, _RIGHT = 54, 12


def lines(plot: Lines, width: float) -> Canvas:
    """Draw lines by optimiser step, each with its name at its end; no single point flattens the others."""
    series = [each for each in plot["series"] if each["x"]]
    narrow = width <= NARROW
    named = [each for each in series if len(series) > 1]
    room = 0.0 if narrow or not named else min(0.4 * width, 36 + max(text_width(s["name"], SMALL) for s in named))
    top, below = 10, 20 * len(named) if narrow else 0
    bottom = top + 240
    canvas = Canvas(width=width, height=bottom + 46 + below)
    values = [value for each in series for value in each["y"]] or [0.0, 1.0]
    rise = spanning(values, bottom, top)
    steps = [step for each in series for step in each["x"]] or [0, 1]
    along = Scale(low=0.0, high=float(max(1, *steps)), start=_LEFT, end=width - _RIGHT - room)
    canvas.left(rise, _LEFT, along.end, ticks=6)
    unit = f"{plot['unit']}{', log scale' if rise.log else ''}"
    canvas.below(along, bottom, bottom, f"{unit}, by optimiser step", ticks=4 if narrow else 6)
    ends = apart([rise(each["y"][-1]) for each in named], 16, top, bottom)
    held = 0
    for place, each in enumerate(series):
        valid = each["kind"] == "valid"
        hue, form = (_HUES[held % len(_HUES)], _FORMS[held % len(_FORMS)]) if valid else ("tuned", "triangle")
        held += valid
        _curve(canvas, each, along, rise, hue, form)
        if not named:
            continue
        y = bottom + 58 + 20 * place if narrow else ends[place]
        x = _LEFT if narrow else along.end + 12
        canvas.mark(form, x, y, f"fill {hue}", size=4)
        canvas.text(x + 9, y + 4, each["name"], "tick", width=width - x - 12)
    return canvas


def _curve(canvas: Canvas, series: Series, along: Scale, rise: Scale, hue: str, form: str) -> None:
    points = [(along(x), rise(y)) for x, y in zip(series["x"], series["y"], strict=True)]
    if len(points) > 1:
        canvas.path(points, f"curve {hue}{' dotted' if series['kind'] == 'valid' else ''}")
    if len(points) > _MARKED:
        return
    for (x, y), step, value in zip(points, series["x"], series["y"], strict=True):
        canvas.mark(form, x, y, f"fill {hue}", size=4, title=f"{series['name']}, step {step}: {value:.4g}")


def cost(plot: CostPlot, width: float) -> Canvas:
    """Draw figures against tokens; named points have numbers, which the list below explains."""
    points = sorted(plot["points"], key=lambda point: point["tokens"])
    named = [point for point in points if point["named"]]
    top, bottom = 30, 250
    canvas = Canvas(width=width, height=bottom + 50 + 20 * len(named))
    tokens = [point["tokens"] for point in points]
    far = max(tokens) / min(tokens) > 30
    along = Scale(
        low=min(tokens) / 1.5 if far else 0.0, high=max(tokens) * (1.5 if far else 1.1), start=_LEFT,
        end=width - _RIGHT, log=far,
    )  # fmt: skip
    ends = [point[end] for point in points for end in ("value", "low", "high")]
    rise = fitted([*ends, plot["reference"]], bottom, top)
    canvas.left(rise, _LEFT, along.end)
    unit = f"tokens {plot['unit']}{', log scale' if far else ''}"
    canvas.below(along, bottom, bottom, f"{plot['metric']} ({plot['better']} is better) by {unit}", ticks=5)
    if plot["reference"] is not None:
        level = rise(plot["reference"])
        canvas.line(_LEFT, level, along.end, level, "reference")
        canvas.text(_LEFT + 4, level - 5, plot["control"] or "", "tick halo", width=0.6 * width)
    if len(named) < len(points):
        canvas.path([(along(point["tokens"]), rise(point["value"])) for point in named], "curve text")
    taken: list[tuple[float, float]] = [(along(point["tokens"]), rise(point["value"])) for point in points]
    for point in points:
        x, y = along(point["tokens"]), rise(point["value"])
        canvas.stem(rise, point["low"], point["high"], x, f"stroke {point['arm']}")
        canvas.mark(MARKS[point["arm"]], x, y, f"fill {point['arm']}", title=f"{point['label']}: {point['text']}")
        if not point["named"]:
            continue
        number = named.index(point) + 1
        where = _free(x, y, taken, along.end, (top, bottom))
        taken.append(where)
        canvas.text(where[0], where[1] + 4, str(number), "name halo", anchor="middle")
        canvas.text(_LEFT, bottom + 60 + 20 * (number - 1), str(number), "name", anchor="end")
        room = width - _LEFT - 24 - text_width(point["short"], SMALL)
        label = f"{cut(point['label'], room, SMALL)}: {point['short']}"
        canvas.text(_LEFT + 8, bottom + 60 + 20 * (number - 1), label, "tick")
    settings(canvas, [point["arm"] for point in points])
    return canvas


def _free(
    x: float, y: float, taken: list[tuple[float, float]], right: float, sides: tuple[float, float]
) -> tuple[float, float]:
    """Return where a number stands beside its mark: the nearest place that no mark and no number has."""
    around = [
        (x + reach * math.cos(turn * math.pi / 4), y + reach * math.sin(turn * math.pi / 4))
        for reach in (14, 22, 30, 40)
        for turn in (0, 7, 1, 4, 5, 3)
    ]
    inside = [(a, b) for a, b in around if a < right and sides[0] < b < sides[1]] or around
    clear = [(a, b) for a, b in inside if all(abs(a - c) > 11 or abs(b - d) > 13 for c, d in taken)]
    return (clear or inside)[0]


def positions(plot: Positions, width: float) -> Canvas:
    """Draw a panel a row and measure; those of one measure share their range, and the control is a dashed line."""
    gap, head, body, foot = 18, 42, 112, 30
    across = width - _LEFT - _RIGHT
    most = max(1, int((across + gap) // (140 if width <= NARROW else 210)))
    deep = math.ceil(len(plot["panels"]) / most)
    columns = math.ceil(len(plot["panels"]) / deep)
    one = (across - gap * (columns - 1)) / columns
    canvas = Canvas(width=width, height=len(plot["measures"]) * deep * (head + body + foot) + 26)
    for block, measure in enumerate(plot["measures"]):
        key: Literal["hit", "rank"] = "hit" if measure["key"] == "hit" else "rank"
        every = [*plot["panels"], *([plot["control"]] if plot["control"] else [])]
        ends = [value for panel in every for part in ("y", "low", "high") for value in panel[key][part]]
        for place, panel in enumerate(plot["panels"]):
            left = _LEFT + (place % columns) * (one + gap)
            upper = (block * deep + place // columns) * (head + body + foot) + head
            along = Scale(low=0.0, high=panel["x"][-1] + 1, start=left, end=left + one)
            rise = fitted(ends, upper + body, upper)
            first = place % columns == 0
            canvas.left(rise, left, along.end, ticks=4, named=first)
            canvas.below(along, upper + body, upper + body, ticks=4)
            lines_above = [*panel["title"], ""][:2]
            canvas.text(left, upper - 24, f"{measure['title']}: {lines_above[0]}", "tick", width=one)
            canvas.text(left, upper - 9, lines_above[1], "tick", width=one)
            if plot["control"]:
                pairs = zip(plot["control"]["x"], plot["control"][key]["y"], strict=True)
                canvas.path([(along(x), rise(y)) for x, y in pairs], "reference")
            _panel(canvas, panel, key, measure["title"], along, rise)
    canvas.text(width / 2, canvas.height - 6, "position of the target", "axis-title", anchor="middle")
    return canvas


def _panel(canvas: Canvas, panel: Panel, key: Literal["hit", "rank"], measure: str, along: Scale, rise: Scale) -> None:
    own, hue = panel[key], panel["arm"]
    points = [(along(x), rise(y)) for x, y in zip(panel["x"], own["y"], strict=True)]
    canvas.path(points, f"curve {hue}")
    for at, (x, y) in enumerate(points):
        canvas.stem(rise, own["low"][at], own["high"][at], x, f"stroke {hue}")
        said = f"{panel['label']}, target at {panel['names'][at]}: {measure} {own['y'][at]:.3g}, n = {panel['n'][at]}"
        canvas.mark(MARKS[hue], x, y, f"fill {hue}", size=3.5, title=said)
