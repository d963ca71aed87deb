"""Plots about an item index: token usage, and branching of codes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmrec.index.diagnostics import Depth, Diagnostics, Level
from llmrec.report import index_summary
from llmrec.report.canvas import NARROW, SMALL, WIDE, Canvas, Scale, linear_or_log_scale, text_width

_LEFT, _RIGHT = 48, 12


def draw_index_plots(diagnostics: Diagnostics) -> dict[str, tuple[Canvas, Canvas]]:
    """Return all plots, wide and narrow, by the id of their HTML element."""
    levels, items, plots = shared_levels(diagnostics), diagnostics.items, {}
    if levels:
        plots["usage"] = draw_token_usage(levels, items, WIDE), draw_token_usage(levels, items, NARROW)
    if len(diagnostics.depths) > 1:
        plots["branching"] = (draw_branching(diagnostics.depths, WIDE), draw_branching(diagnostics.depths, NARROW))
    return plots


def shared_levels(diagnostics: Diagnostics) -> list[Level]:
    """Return the levels that have a token with two or more items."""
    return [level for level in diagnostics.levels if level.counts and level.counts[0] > 1]


def draw_token_usage(levels: Sequence[Level], items: int, width: float) -> Canvas:
    """Draw the number of items per token, most used first, with one panel per level."""
    gap, head, body, foot = 44, 30, 132, 34
    across = width - _LEFT - _RIGHT
    most = max(1, int((across + gap) // (280 if width <= NARROW else 240)))
    deep = math.ceil(len(levels) / most)
    columns = math.ceil(len(levels) / deep)
    one = (across - gap * (columns - 1)) / columns
    canvas = Canvas(width=width, height=deep * (head + body + foot) + 18)
    for index, level in enumerate(levels):
        left = _LEFT + (index % columns) * (one + gap)
        upper = (index // columns) * (head + body + foot) + head
        # Each token is one rank wide; unused tokens leave space on the right.
        along = Scale(low=0.5, high=level.available + 0.5, start=left, end=left + one)
        rise = Scale(low=0.0, high=1.05 * level.counts[0], start=upper + body, end=upper)
        canvas.left(rise, left, along.end, ticks=4)
        canvas.below(along, upper + body, upper + body, ticks=4)
        title = f"items per {index_summary.level_title(level)}"
        canvas.text(left, upper - 8, title, "tick", width=one)
        _draw_usage_boxes(canvas, level.counts, items, along, rise)
        even = rise(sum(level.counts) / level.available)
        canvas.line(left, even, along.end, even, "reference")
    canvas.text(width / 2, canvas.height - 4, "token, by rank", "axis-title", anchor="middle")
    return canvas


def _draw_usage_boxes(canvas: Canvas, counts: Sequence[int], items: int, along: Scale, rise: Scale) -> None:
    """Draw tokens with equal counts as one box."""
    start = 0
    for index, count in enumerate(counts, 1):
        if index == len(counts) or counts[index] != count:
            ranks = f"rank {start + 1}" if index == start + 1 else f"ranks {start + 1} to {index}"
            title = f"{ranks}: {count} items each, {100 * count / items:.2g} %"
            left, right = along(start + 0.5), along(index + 0.5)
            canvas.box(left, rise(count), right - left, rise(0.0) - rise(count), "bar", title=title)
            start = index


def draw_branching(depths: Sequence[Depth], width: float) -> Canvas:
    """Draw mean and maximum by prefix length in two panels, side by side if there is room."""
    gap, head, body, foot = 64, 50, 180, 46
    panels = (("items with the prefix", "items"), ("possible next tokens", "fan_out"))
    columns = 1 if width <= NARROW else 2
    across = width - _LEFT - _RIGHT
    one = (across - gap * (columns - 1)) / columns
    canvas = Canvas(width=width, height=math.ceil(len(panels) / columns) * (head + body + foot))
    for index, (title, key) in enumerate(panels):
        mean, most = ([getattr(depth, name) for depth in depths] for name in (key, f"most_{key}"))
        left = _LEFT + (index % columns) * (one + gap)
        upper = (index // columns) * (head + body + foot) + head
        along = Scale(low=-0.25, high=depths[-1].length + 0.25, start=left, end=left + one)
        rise = linear_or_log_scale([*mean, *most], upper + body, upper)
        canvas.left(rise, left, along.end, ticks=5)
        canvas.below(along, upper + body, upper + body, "length of the prefix, tokens", ticks=min(8, len(depths)))
        scale = " (log scale)" if rise.log else ""
        canvas.text(left, upper - 28, f"{title}{scale}", "axis-title", width=one)
        x = left + 5
        for name, values, form, hue in (("mean", mean, "circle", "zero-shot"), ("most", most, "square", "tuned")):
            points = [(along(depth.length), rise(value)) for depth, value in zip(depths, values, strict=True)]
            canvas.path(points, f"curve {hue}")
            for (a, b), depth, value in zip(points, depths, values, strict=True):
                canvas.mark(form, a, b, f"fill {hue}", size=4, title=f"{name} at length {depth.length}: {value:.4g}")
            canvas.mark(form, x, upper - 13, f"fill {hue}", size=4)
            canvas.text(x + 9, upper - 9, name, "tick")
            x += 30 + text_width(name, SMALL)
    return canvas
