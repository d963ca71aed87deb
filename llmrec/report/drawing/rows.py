"""Plots with a row for each thing: differences, figures with intervals, weights of parts, times of stages."""

from __future__ import annotations

from collections.abc import Sequence

from llmrec.report.drawing.canvas import MARKS, NARROW, SMALL, Canvas, text_width
from llmrec.report.drawing.scale import Scale, fitted
from llmrec.report.plots import BudgetPlot, Differences, Forest, Weights
from llmrec.results import Verdict

_FORMS: dict[Verdict | None, str] = {"shown": "right", "contradicted": "left", "not shown": "circle", None: "diamond"}
_LOOKS: dict[Verdict | None, str] = {"shown": "good", "contradicted": "bad", "not shown": "even", None: "open"}
_WORDS: dict[Verdict | None, str] = {
    "shown": "better", "contradicted": "worse", "not shown": "no significant difference", None: "exploratory",
}  # fmt: skip
_MARGIN = 12
_SHARE = 0.42  # of the width for names beside a plot, at most


def differences(plot: Differences, width: float) -> Canvas:
    """Draw what models gain over controls: a mark and an interval a family, zero, and what would have been detected."""
    rows, step, top = plot["rows"], 54, 30
    canvas = Canvas(width=width, height=top + step * len(rows) + 64)
    bottom = top + step * len(rows)
    ends = [row[end] for row in rows for end in ("value", "low", "high")]
    bands = [side * (row["detectable"] or 0.0) for row in rows for side in (-1, 1)]
    scale = fitted([*ends, *bands, 0.0], _MARGIN, width - _MARGIN)
    canvas.below(scale, top, bottom, plot["unit"], ticks=5 if width <= NARROW else 7)
    canvas.text(width / 2, bottom + 54, plot["sides"], "axis-title", anchor="middle", width=width)
    for place, row in enumerate(rows):
        upper = top + place * step
        middle = upper + 36
        if row["detectable"]:
            left, right = scale(-row["detectable"]), scale(row["detectable"])
            said = "Shaded: a true difference this small would often be missed"
            canvas.box(left, middle - 11, right - left, 22, "band", title=said)
        canvas.text(_MARGIN, upper + 15, row["label"], "name halo", width=width - 2 * _MARGIN)
        look, said = _LOOKS[row["verdict"]], f"{row['label']}: {row['beside']}: {row['text']}"
        canvas.whisker(scale, row["low"], row["high"], middle, f"stroke {look}")
        canvas.mark(_FORMS[row["verdict"]], scale(row["value"]), middle, f"mark-{look}", size=6, title=said)
    canvas.line(scale(0.0), top - 6, scale(0.0), bottom, "zero")
    _verdicts(canvas, list(dict.fromkeys(row["verdict"] for row in rows)))
    return canvas


def _verdicts(canvas: Canvas, verdicts: Sequence[Verdict | None]) -> None:
    """Write what the marks mean along the top."""
    x = float(_MARGIN)
    for verdict in verdicts:
        canvas.mark(_FORMS[verdict], x + 5, 10, f"mark-{_LOOKS[verdict]}")
        canvas.text(x + 16, 14, _WORDS[verdict], "tick")
        x += 34 + text_width(_WORDS[verdict], SMALL)


def forest(plot: Forest, width: float) -> Canvas:
    """Draw figures with intervals, best first, and the best baseline as a dashed line."""
    rows, narrow = plot["rows"], width <= NARROW
    step, top = 42 if narrow else 28, 30
    bottom = top + step * len(rows)
    canvas = Canvas(width=width, height=bottom + 46)
    names = 0.0 if narrow else _names([row["label"] for row in rows], width)
    scale = fitted([row[end] for row in rows for end in ("value", "low", "high")], names + _MARGIN, width - _MARGIN)
    canvas.below(scale, top, bottom, f"{plot['metric']} ({plot['better']} is better)", ticks=5 if narrow else 8)
    if plot["reference"] is not None:
        canvas.line(scale(plot["reference"]), top, scale(plot["reference"]), bottom, "reference")
    for place, row in enumerate(rows):
        middle = top + place * step + (28 if narrow else step / 2)
        if narrow:
            canvas.text(_MARGIN, middle - 12, row["label"], "halo", width=width - 2 * _MARGIN)
        else:
            canvas.text(names, middle + 4, row["label"], anchor="end", width=names)
        canvas.whisker(scale, row["low"], row["high"], middle, f"stroke {row['arm']}")
        said = f"{row['label']}: {row['text']}"
        canvas.mark(MARKS[row["arm"]], scale(row["value"]), middle, f"fill {row['arm']}", title=said)
    settings(canvas, [row["arm"] for row in rows])
    return canvas


def settings(canvas: Canvas, arms: Sequence[str]) -> None:
    """Write along the top which mark stands for which setting."""
    legend(canvas, [(arm, form, arm) for arm, form in MARKS.items() if arm in arms], _MARGIN)


def legend(canvas: Canvas, marks: Sequence[tuple[str, str, str]], start: float) -> None:
    """Write along the top which mark stands for what: its name, form and colour, from ``start`` on."""
    x = float(start)
    for name, form, hue in marks:
        canvas.mark(form, x + 5, 10, f"fill {hue}")
        canvas.text(x + 16, 14, name, "tick")
        x += 34 + text_width(name, SMALL)


def weights(plot: Weights, width: float) -> Canvas:
    """Draw the weights of a fusion's parts as bars from zero, with their limits."""
    parts = plot["parts"]
    values = [part[end] for part in parts for end in ("value", "low", "high")]
    entries = [(part["label"], part["text"], part["value"], part["low"], part["high"]) for part in parts]
    return _bars(entries, [*values, 0.0], plot["unit"], width)


def budget(plot: BudgetPlot, width: float) -> Canvas:
    """Draw the seconds of each stage, in the order in which the stages ran."""
    stages = plot["stages"]
    entries = [(stage["label"], stage["text"], stage["seconds"], None, None) for stage in stages]
    return _bars(entries, [0.0, *(stage["seconds"] for stage in stages)], "seconds", width)


def _bars(
    entries: Sequence[tuple[str, str, float, float | None, float | None]],
    values: Sequence[float | None],
    unit: str,
    width: float,
) -> Canvas:
    """Draw bars from zero, each with its name at the left and its value in words at the right."""
    narrow = width <= NARROW
    step, top = 40 if narrow else 26, 4
    bottom = top + step * len(entries)
    canvas = Canvas(width=width, height=bottom + 46)
    names = 0.0 if narrow else _names([entry[0] for entry in entries], width)
    said = max((text_width(entry[1], SMALL) for entry in entries), default=0.0)
    end = width - _MARGIN if narrow else max(width - _MARGIN - said - 8, names + _MARGIN + 80)
    scale: Scale = fitted(values, names + _MARGIN, end, holds=(0.0,) if min(v or 0.0 for v in values) >= 0 else ())
    canvas.below(scale, top, bottom, unit, ticks=4 if narrow else 6)
    for place, (name, text, value, low, high) in enumerate(entries):
        middle = top + place * step + (28 if narrow else step / 2)
        if narrow:
            canvas.text(_MARGIN, middle - 12, f"{name}: {text}", "halo", width=width - 2 * _MARGIN)
        else:
            canvas.text(names, middle + 4, name, anchor="end", width=names)
            canvas.text(end + 8, middle + 4, text, "tick")
        left, right = sorted((scale(0.0), scale(value)))
        canvas.box(left, middle - 7, right - left, 14, "bar", title=f"{name}: {text}")
        canvas.whisker(scale, low, high, middle, "stroke text")
    canvas.line(scale(0.0), top, scale(0.0), bottom, "zero")
    return canvas


def _names(names: Sequence[str], width: float) -> float:
    """Return the width that names beside a plot get."""
    return min(_SHARE * width, 8 + max((text_width(name) for name in names), default=0.0))
