"""Plots about an item index: token usage, and branching of codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

from llmrec.index.diagnostics import Depth, Diagnostics, Level
from llmrec.report import index_summary
from llmrec.report.canvas import NARROW, SMALL, WIDE, Canvas, Scale, spanning, text_width
from llmrec.report.escape import flat

_LEFT, _RIGHT = 48, 12


class Usage(TypedDict):
    """Number of items per token of a level, and the expected number if tokens were used equally."""

    title: str
    counts: list[int]
    available: int
    even: float
    items: int


class Branching(TypedDict):
    """Number of continuations of code prefixes, by prefix length."""

    title: str
    x: list[int]
    mean: list[float]
    most: list[int]


def pictures(found: Diagnostics) -> dict[str, tuple[Canvas, Canvas]]:
    """Return all plots, wide and narrow, by the id of their HTML element."""
    levels, depths = usage_of(found), branching_of(found.depths)
    drawn = {}
    if levels:
        drawn["usage"] = (usage(levels, WIDE), usage(levels, NARROW))
    if depths:
        drawn["branching"] = (branching(depths, WIDE), branching(depths, NARROW))
    return drawn


def usage_of(found: Diagnostics) -> list[Usage]:
    """Return the token usage of each level that has a token with two or more items."""
    return [_panel(level, found.items) for level in found.levels if level.counts and level.counts[0] > 1]


def _panel(level: Level, items: int) -> Usage:
    return {
        "title": flat(f"items per {index_summary.level_title(level)}"),
        "counts": list(level.counts),
        "available": level.available,
        "even": sum(level.counts) / level.available,
        "items": items,
    }


def branching_of(depths: Sequence[Depth]) -> list[Branching]:
    """Return items and continuations by prefix length; empty for codes of one token."""
    if len(depths) < 2:
        return []
    lengths = [depth.length for depth in depths]
    return [
        {
            "title": "items with the prefix",
            "x": lengths,
            "mean": [depth.items for depth in depths],
            "most": [depth.most_items for depth in depths],
        },
        {
            "title": "possible next tokens",
            "x": lengths,
            "mean": [depth.fan_out for depth in depths],
            "most": [depth.most_fan_out for depth in depths],
        },
    ]


def usage(panels: list[Usage], width: float) -> Canvas:
    """Draw the number of items per token, most used first, with one panel per level."""
    gap, head, body, foot = 44, 30, 132, 34
    across = width - _LEFT - _RIGHT
    most = max(1, int((across + gap) // (280 if width <= NARROW else 240)))
    deep = math.ceil(len(panels) / most)
    columns = math.ceil(len(panels) / deep)
    one = (across - gap * (columns - 1)) / columns
    canvas = Canvas(width=width, height=deep * (head + body + foot) + 18)
    for index, panel in enumerate(panels):
        left = _LEFT + (index % columns) * (one + gap)
        upper = (index // columns) * (head + body + foot) + head
        # Each token is one rank wide; unused tokens leave space on the right.
        along = Scale(low=0.5, high=panel["available"] + 0.5, start=left, end=left + one)
        rise = Scale(low=0.0, high=1.05 * max(panel["counts"]), start=upper + body, end=upper)
        canvas.left(rise, left, along.end, ticks=4)
        canvas.below(along, upper + body, upper + body, ticks=4)
        canvas.text(left, upper - 8, panel["title"], "tick", width=one)
        _steps(canvas, panel, along, rise)
        canvas.line(left, rise(panel["even"]), along.end, rise(panel["even"]), "reference")
    canvas.text(width / 2, canvas.height - 4, "token, by rank", "axis-title", anchor="middle")
    return canvas


def _steps(canvas: Canvas, panel: Usage, along: Scale, rise: Scale) -> None:
    """Draw tokens with equal counts as one box."""
    start = 0
    for index, count in enumerate(panel["counts"], 1):
        if index == len(panel["counts"]) or panel["counts"][index] != count:
            ranks = f"rank {start + 1}" if index == start + 1 else f"ranks {start + 1} to {index}"
            title = f"{ranks}: {count} items each, {100 * count / panel['items']:.2g} %"
            left, right = along(start + 0.5), along(index + 0.5)
            canvas.box(left, rise(count), right - left, rise(0.0) - rise(count), "bar", title=title)
            start = index


def branching(panels: list[Branching], width: float) -> Canvas:
    """Draw mean and maximum by prefix length in two panels, side by side if there is room."""
    gap, head, body, foot = 64, 50, 180, 46
    columns = 1 if width <= NARROW else 2
    across = width - _LEFT - _RIGHT
    one = (across - gap * (columns - 1)) / columns
    canvas = Canvas(width=width, height=math.ceil(len(panels) / columns) * (head + body + foot))
    for index, panel in enumerate(panels):
        left = _LEFT + (index % columns) * (one + gap)
        upper = (index // columns) * (head + body + foot) + head
        along = Scale(low=-0.25, high=panel["x"][-1] + 0.25, start=left, end=left + one)
        rise = spanning([*panel["mean"], *panel["most"]], upper + body, upper)
        canvas.left(rise, left, along.end, ticks=5)
        canvas.below(along, upper + body, upper + body, "length of the prefix, tokens", ticks=min(8, len(panel["x"])))
        scale = " (log scale)" if rise.log else ""
        canvas.text(left, upper - 28, f"{panel['title']}{scale}", "axis-title", width=one)
        x = left + 5
        for name, form, hue in (("mean", "circle", "zero-shot"), ("most", "square", "tuned")):
            values = panel["mean"] if name == "mean" else panel["most"]
            points = [(along(length), rise(value)) for length, value in zip(panel["x"], values, strict=True)]
            canvas.path(points, f"curve {hue}")
            for (a, b), length, value in zip(points, panel["x"], values, strict=True):
                canvas.mark(form, a, b, f"fill {hue}", size=4, title=f"{name} at length {length}: {value:.4g}")
            canvas.mark(form, x, upper - 13, f"fill {hue}", size=4)
            canvas.text(x + 9, upper - 9, name, "tick")
            x += 30 + text_width(name, SMALL)
    return canvas
