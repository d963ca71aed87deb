"""Draws the plots of a report: forest plots, bars, training curves, quality against cost, results by position."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmrec.report.breakdowns import position_bands
from llmrec.report.canvas import (
    ARM_MARKERS,
    HALF,
    NARROW,
    SMALL,
    WIDE,
    Canvas,
    Scale,
    linear_or_log_scale,
    linear_scale,
    spread_positions,
    text_width,
    truncate_to_width,
)
from llmrec.report.plots import Bars, CostPlot, Differences, Forest, Lines, Plot, Positions, Series
from llmrec.report.wording import arm_label, label, short_template
from llmrec.results import Verdict, arm_name


def draw_wide_and_narrow(plot: Plot) -> tuple[Canvas, Canvas]:
    """Draw a plot for wide and for narrow screens."""
    one_line = plot["kind"] == "lines" and len(plot["series"]) == 1
    wide = HALF if one_line or plot["kind"] in ("differences", "cost") else WIDE
    return draw_plot(plot, wide), draw_plot(plot, NARROW)


def draw_plot(plot: Plot, width: float) -> Canvas:
    """Draw a plot.

    Args:
        plot: The data of the plot.
        width: Pixels.
    """
    match plot["kind"]:
        case "differences":
            return draw_differences(plot, width)
        case "forest":
            return draw_forest(plot, width)
        case "bars":
            return draw_bars(plot, width)
        case "lines":
            return draw_lines(plot, width)
        case "positions":
            return draw_positions(plot, width)
        case "cost":
            return draw_cost(plot, width)


# --------------------------------------------------------------------------- plots with one line per model


_VERDICT_MARKERS: dict[Verdict | None, str] = {
    "shown": "right",
    "contradicted": "left",
    "not shown": "circle",
    None: "diamond",
}
_VERDICT_STYLES: dict[Verdict | None, str] = {"shown": "good", "contradicted": "bad", "not shown": "even", None: "open"}
_VERDICT_LABELS: dict[Verdict | None, str] = {
    "shown": "better", "contradicted": "worse", "not shown": "no significant difference", None: "exploratory",
}  # fmt: skip
_MARGIN = 12
_MAX_LABEL_SHARE = 0.42  # the largest share of the width for names next to a plot


def draw_differences(plot: Differences, width: float) -> Canvas:
    """Draw the gains of models over baselines by task, with intervals and the minimum detectable effect."""
    rows, step, top = plot["rows"], 54, 30
    canvas = Canvas(width=width, height=top + step * len(rows) + 64)
    bottom = top + step * len(rows)
    ends = [row[end] for row in rows for end in ("value", "low", "high")]
    bands = [side * (row["detectable"] or 0.0) for row in rows for side in (-1, 1)]
    scale = linear_scale([*ends, *bands, 0.0], _MARGIN, width - _MARGIN)
    canvas.below(scale, top, bottom, plot["unit"], ticks=5 if width <= NARROW else 7)
    canvas.text(width / 2, bottom + 54, plot["sides"], "axis-title", anchor="middle", width=width)
    for index, row in enumerate(rows):
        upper = top + index * step
        middle = upper + 36
        if row["detectable"]:
            left, right = scale(-row["detectable"]), scale(row["detectable"])
            title = "Shaded: below the minimum detectable effect"
            canvas.box(left, middle - 11, right - left, 22, "band", title=title)
        canvas.text(_MARGIN, upper + 15, row["label"], "name halo", width=width - 2 * _MARGIN)
        look, title = _VERDICT_STYLES[row["verdict"]], f"{row['label']}: {row['beside']}: {row['text']}"
        canvas.whisker(scale, row["low"], row["high"], middle, f"stroke {look}")
        canvas.mark(_VERDICT_MARKERS[row["verdict"]], scale(row["value"]), middle, f"mark-{look}", size=6, title=title)
    canvas.line(scale(0.0), top - 6, scale(0.0), bottom, "zero")
    _draw_verdict_legend(canvas, list(dict.fromkeys(row["verdict"] for row in rows)))
    return canvas


def _draw_verdict_legend(canvas: Canvas, verdicts: Sequence[Verdict | None]) -> None:
    """Draw the legend of markers at the top."""
    x = float(_MARGIN)
    for verdict in verdicts:
        canvas.mark(_VERDICT_MARKERS[verdict], x + 5, 10, f"mark-{_VERDICT_STYLES[verdict]}")
        canvas.text(x + 16, 14, _VERDICT_LABELS[verdict], "tick")
        x += 34 + text_width(_VERDICT_LABELS[verdict], SMALL)


def draw_forest(plot: Forest, width: float) -> Canvas:
    """Draw results with intervals, best first, and the best baseline as a dashed line."""
    rows, narrow = plot["rows"], width <= NARROW
    step, top = 42 if narrow else 28, 30
    bottom = top + step * len(rows)
    canvas = Canvas(width=width, height=bottom + 46)
    names = 0.0 if narrow else _label_width([row["label"] for row in rows], width)
    scale = linear_scale(
        [row[end] for row in rows for end in ("value", "low", "high")], names + _MARGIN, width - _MARGIN
    )
    canvas.below(scale, top, bottom, f"{plot['metric']} ({plot['better']} is better)", ticks=5 if narrow else 8)
    if plot["reference"] is not None:
        canvas.line(scale(plot["reference"]), top, scale(plot["reference"]), bottom, "reference")
    for index, row in enumerate(rows):
        middle = top + index * step + (28 if narrow else step / 2)
        if narrow:
            canvas.text(_MARGIN, middle - 12, row["label"], "halo", width=width - 2 * _MARGIN)
        else:
            canvas.text(names, middle + 4, row["label"], anchor="end", width=names)
        canvas.whisker(scale, row["low"], row["high"], middle, f"stroke {row['arm']}")
        title = f"{row['label']}: {row['text']}"
        canvas.mark(ARM_MARKERS[row["arm"]], scale(row["value"]), middle, f"fill {row['arm']}", title=title)
    draw_arm_legend(canvas, [row["arm"] for row in rows])
    return canvas


def draw_arm_legend(canvas: Canvas, arms: Sequence[str]) -> None:
    """Draw the legend of the kinds of model (baseline, fine-tuned, ...) at the top."""
    draw_legend(canvas, [(arm_name(arm), form, arm) for arm, form in ARM_MARKERS.items() if arm in arms], _MARGIN)


def draw_legend(canvas: Canvas, marks: Sequence[tuple[str, str, str]], start: float) -> None:
    """Draw a legend of names, markers and colours at the top, beginning at ``start``."""
    x, widths = float(start), [text_width(name, SMALL) for name, _, _ in marks]
    # narrow plots have less space between names
    room = (canvas.width - start - 16 - sum(widths)) / max(1, len(marks) - 1)
    for (name, form, hue), width in zip(marks, widths, strict=True):
        canvas.mark(form, x + 5, 10, f"fill {hue}")
        canvas.text(x + 16, 14, name, "tick")
        x += max(22.0, min(34.0, room)) + width


def draw_bars(plot: Bars, width: float) -> Canvas:
    """Draw bars from zero, each with its name on the left and its value on the right."""
    narrow = width <= NARROW
    step, top = 40 if narrow else 26, 4
    entries, values = plot["bars"], [0.0, *(bar[end] for bar in plot["bars"] for end in ("value", "low", "high"))]
    bottom = top + step * len(entries)
    canvas = Canvas(width=width, height=bottom + 46)
    names = 0.0 if narrow else _label_width([bar["label"] for bar in entries], width)
    room = max((text_width(bar["text"], SMALL) for bar in entries), default=0.0)
    end = width - _MARGIN if narrow else max(width - _MARGIN - room - 8, names + _MARGIN + 80)
    scale: Scale = linear_scale(
        values, names + _MARGIN, end, holds=(0.0,) if min(v or 0.0 for v in values) >= 0 else ()
    )
    canvas.below(scale, top, bottom, plot["unit"], ticks=4 if narrow else 6)
    for index, bar in enumerate(entries):
        name, text = bar["label"], bar["text"]
        middle = top + index * step + (28 if narrow else step / 2)
        if narrow:
            canvas.text(_MARGIN, middle - 12, f"{name}: {text}", "halo", width=width - 2 * _MARGIN)
        else:
            canvas.text(names, middle + 4, name, anchor="end", width=names)
            canvas.text(end + 8, middle + 4, text, "tick")
        left, right = sorted((scale(0.0), scale(bar["value"])))
        canvas.box(left, middle - 7, right - left, 14, "bar", title=f"{name}: {text}")
        canvas.whisker(scale, bar["low"], bar["high"], middle, "stroke text")
    canvas.line(scale(0.0), top, scale(0.0), bottom, "zero")
    return canvas


def _label_width(names: Sequence[str], width: float) -> float:
    """Return the width of the names next to a plot."""
    return min(_MAX_LABEL_SHARE * width, 8 + max((text_width(name) for name in names), default=0.0))


_SERIES_COLOURS = ("zero-shot", "few-shot", "good", "baseline", "bad")
_SERIES_MARKERS = ("circle", "diamond", "square", "triangle", "right")
_MAX_MARKED_POINTS = 30  # the largest number of points for which a line has markers
_LEFT, _RIGHT = 54, 12


def draw_lines(plot: Lines, width: float) -> Canvas:
    """Draw lines over optimiser steps, each named at its end."""
    series = [entry for entry in plot["series"] if entry["x"]]
    narrow = width <= NARROW
    named = [entry for entry in series if len(series) > 1]
    room = 0.0 if narrow or not named else min(0.4 * width, 36 + max(text_width(s["name"], SMALL) for s in named))
    top, below = 28, 20 * len(named) if narrow else 0
    bottom = top + 240
    canvas = Canvas(width=width, height=bottom + 46 + below)
    values = [value for entry in series for value in entry["y"]] or [0.0, 1.0]
    rise = linear_or_log_scale(values, bottom, top)
    steps = [step for entry in series for step in entry["x"]] or [0, 1]
    along = Scale(low=0.0, high=float(max(1, *steps)), start=_LEFT, end=width - _RIGHT - room)
    canvas.left(rise, _LEFT, along.end, f"{plot['unit']}{', log scale' if rise.log else ''}", ticks=6)
    canvas.below(along, bottom, bottom, "optimiser step", ticks=4 if narrow else 6)
    ends = spread_positions([rise(entry["y"][-1]) for entry in named], 16, top, bottom)
    held = 0
    for index, entry in enumerate(series):
        valid = entry["kind"] == "valid"
        hue, form = (
            (_SERIES_COLOURS[held % len(_SERIES_COLOURS)], _SERIES_MARKERS[held % len(_SERIES_MARKERS)])
            if valid
            else ("tuned", "triangle")
        )
        held += valid
        _draw_curve(canvas, entry, along, rise, hue, form)
        if not named:
            continue
        y = bottom + 58 + 20 * index if narrow else ends[index]
        x = _LEFT if narrow else along.end + 12
        canvas.mark(form, x, y, f"fill {hue}", size=4)
        canvas.text(x + 9, y + 4, entry["name"], "tick", width=width - x - 12)
    return canvas


def _draw_curve(canvas: Canvas, series: Series, along: Scale, rise: Scale, hue: str, form: str) -> None:
    points = [(along(x), rise(y)) for x, y in zip(series["x"], series["y"], strict=True)]
    if len(points) > 1:
        canvas.path(points, f"curve {hue}{' dotted' if series['kind'] == 'valid' else ''}")
    if len(points) > _MAX_MARKED_POINTS:
        return
    for (x, y), step, value in zip(points, series["x"], series["y"], strict=True):
        canvas.mark(form, x, y, f"fill {hue}", size=4, title=f"{series['name']}, step {step}: {value:.4g}")


def draw_cost(plot: CostPlot, width: float) -> Canvas:
    """Draw results against token cost."""
    points = sorted(plot["points"], key=lambda point: point["tokens"])
    top, bottom = 52, 272
    canvas = Canvas(width=width, height=bottom + 50 + 20 * len(points))
    tokens = [point["tokens"] for point in points]
    far = max(tokens) / min(tokens) > 30
    along = Scale(
        low=min(tokens) / 1.5 if far else 0.0, high=max(tokens) * (1.5 if far else 1.1), start=_LEFT,
        end=width - _RIGHT, log=far,
    )  # fmt: skip
    ends = [point[end] for point in points for end in ("value", "low", "high")]
    rise = linear_scale([*ends, *plot["levels"].values()], bottom, top)
    canvas.left(rise, _LEFT, along.end, f"{plot['metric']} ({plot['better']} is better)")
    canvas.below(along, bottom, bottom, f"tokens per user{', log scale' if far else ''}", ticks=5)
    for name, value in plot["levels"].items():
        level = rise(value)
        canvas.line(_LEFT, level, along.end, level, "reference")
        canvas.text(_LEFT + 4, level - 5, name, "tick halo", width=0.6 * width)
    taken: list[tuple[float, float]] = [(along(point["tokens"]), rise(point["value"])) for point in points]
    for number, point in enumerate(points, 1):
        x, y = along(point["tokens"]), rise(point["value"])
        canvas.stem(rise, point["low"], point["high"], x, f"stroke {point['arm']}")
        canvas.mark(ARM_MARKERS[point["arm"]], x, y, f"fill {point['arm']}", title=f"{point['label']}: {point['text']}")
        where = _free_position(x, y, taken, along.end, (top, bottom))
        taken.append(where)
        canvas.text(where[0], where[1] + 4, str(number), "name halo", anchor="middle")
        canvas.text(_LEFT, bottom + 60 + 20 * (number - 1), str(number), "name", anchor="end")
        room = width - _LEFT - 24 - text_width(point["short"], SMALL)
        label = f"{truncate_to_width(point['label'], room, SMALL)}: {point['short']}"
        canvas.text(_LEFT + 8, bottom + 60 + 20 * (number - 1), label, "tick")
    draw_arm_legend(canvas, [point["arm"] for point in points])
    return canvas


def _free_position(
    x: float, y: float, taken: list[tuple[float, float]], right: float, sides: tuple[float, float]
) -> tuple[float, float]:
    """Return a free position next to a marker for its number."""
    around = [
        (x + reach * math.cos(turn * math.pi / 4), y + reach * math.sin(turn * math.pi / 4))
        for reach in (14, 22, 30, 40)
        for turn in (0, 7, 1, 4, 5, 3)
    ]
    inside = [(a, b) for a, b in around if a < right and sides[0] < b < sides[1]] or around
    clear = [(a, b) for a, b in inside if all(abs(a - c) > 11 or abs(b - d) > 13 for c, d in taken)]
    return (clear or inside)[0]


def draw_positions(plot: Positions, width: float) -> Canvas:
    """Draw HR@1 and the mean rank of each model in panels, with the baseline as a dashed line."""
    gap, head, body, foot = 18, 42, 112, 30
    rows, measures = plot["rows"], (("hit", "HR@1"), ("rank", "mean rank"))
    control = position_bands(plot["control"]) if plot["control"] else ()
    across = width - _LEFT - _RIGHT
    most = max(1, int((across + gap) // (140 if width <= NARROW else 210)))
    deep = math.ceil(len(rows) / most)
    columns = math.ceil(len(rows) / deep)
    panel = (across - gap * (columns - 1)) / columns
    canvas = Canvas(width=width, height=len(measures) * deep * (head + body + foot) + 26)
    for block, (key, measure) in enumerate(measures):
        every = [*control, *(band for row in rows for band in position_bands(row))]
        ends = [getattr(band, name) for band in every for name in (key, f"{key}_low", f"{key}_high")]
        for index, row in enumerate(rows):
            left = _LEFT + (index % columns) * (panel + gap)
            upper = (block * deep + index // columns) * (head + body + foot) + head
            along = Scale(low=0.0, high=position_bands(row)[-1].middle + 1, start=left, end=left + panel)
            rise = linear_scale(ends, upper + body, upper)
            canvas.left(rise, left, along.end, ticks=4, named=index % columns == 0)
            canvas.below(along, upper + body, upper + body, ticks=4)
            canvas.text(left, upper - 24, f"{measure}: {arm_label(row.arm, row.predictor)}", "tick", width=panel)
            canvas.text(left, upper - 9, short_template(row), "tick", width=panel)
            if control:
                canvas.path([(along(band.middle), rise(getattr(band, key))) for band in control], "reference")
            canvas.path(
                [(along(band.middle), rise(getattr(band, key))) for band in position_bands(row)], f"curve {row.arm}"
            )
            for band in position_bands(row):
                x, value = along(band.middle), getattr(band, key)
                low, high = getattr(band, f"{key}_low"), getattr(band, f"{key}_high")
                canvas.stem(rise, low, high, x, f"stroke {row.arm}")
                title = f"{label(row)}, target at {band.name}: {measure} {value:.3g}, n = {band.n}"
                canvas.mark(ARM_MARKERS[row.arm], x, rise(value), f"fill {row.arm}", size=3.5, title=title)
    canvas.text(width / 2, canvas.height - 6, "position of the target", "axis-title", anchor="middle")
    return canvas
