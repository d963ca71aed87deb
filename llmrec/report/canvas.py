"""Shapes of a plot, which a template renders as SVG.

Colours are classes of the style sheet, so a plot follows the reader's colour scheme; a plot has no script, id or inline
style.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llmrec.display import single_line

# --------------------------------------------------------------------------- scales


_TICK_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_LOG_RATIO = 4.0  # the smallest ratio of largest to smallest value for which an axis is logarithmic


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Maps values to pixels on a linear or logarithmic scale.

    Attributes:
        low: The value at ``start``; above 0 on a logarithmic scale.
        high: The value at ``end``, above ``low``.
        start: Pixels.
        end: Pixels; less than ``start`` for a vertical axis.
        log: Whether the scale is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; values outside the scale are clipped."""
        inside = min(self.high, max(self.low, value))
        if self.log:
            part = math.log(inside / self.low) / math.log(self.high / self.low)
        else:
            part = (inside - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self, count: int) -> tuple[float, ...]:
        """Return about ``count`` round values within the scale."""
        if not self.log:
            return _linear_ticks(self.low, self.high, count)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        choices = [
            tuple(tick for power in decades for part in parts if self.low <= (tick := part * 10.0**power) <= self.high)
            for parts in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
        ]
        ticks = next((ticks for ticks in choices if len(ticks) <= count), choices[-1])
        return ticks if len(ticks) > 1 else _linear_ticks(self.low, self.high, count)


def _linear_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(part * power for part in _TICK_STEPS if part * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(index * step, 12) for index in range(first, last + 1))


def linear_scale(values: Iterable[float | None], start: float, end: float, *, holds: Sequence[float] = ()) -> Scale:
    """Return a linear scale with some space around the values, within the limits ``holds``."""
    known = [value for value in values if value is not None]
    every = [*known, *holds]
    low, high = min(every, default=0.0), max(every, default=1.0)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return Scale(
        low=low if low in holds and low not in known else low - room,
        high=high if high in holds and high not in known else high + room,
        start=start,
        end=end,
    )


def linear_or_log_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """Return a scale that is logarithmic if positive values span a factor of four or more."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= _LOG_RATIO:
        return Scale(low=low / 1.1, high=high * 1.1, start=start, end=end, log=True)
    return linear_scale(values, start, end)


def format_tick(value: float) -> str:
    """Return a tick label without trailing zeros."""
    text = f"{value:,.6g}" if abs(value) >= 1000 else f"{value:.6g}"
    return text.replace("-", "−").replace(",", "\u2009")


def spread_positions(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions on a line so that neighbours are at least ``gap`` apart."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    gap = min(gap, (high - low) / max(1, len(positions) - 1))
    result = [0.0] * len(positions)
    reached = low - gap
    for index in order:
        reached = result[index] = max(positions[index], reached + gap)
    # Push back positions that were moved past the end.
    reached = high + gap
    for index in reversed(order):
        reached = result[index] = min(result[index], reached - gap)
    return result


Tag = Literal["line", "rect", "path", "text"]
Anchor = Literal["start", "middle", "end"]
WIDE, NARROW, HALF = 960, 350, 540
"""Widths in pixels: of a full-width plot, of one on a phone, and of one of two side by side."""
SMALL, NORMAL = 12, 13
"""Sizes of text in pixels."""
ARM_MARKERS = {"zero-shot": "circle", "few-shot": "diamond", "tuned": "triangle", "baseline": "square"}
"""The form of a mark by setting, so that settings are distinguishable without colour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """An SVG element with classes of the style sheet and geometry; its text and its tooltip ``title`` are untrusted."""

    tag: Tag
    look: str
    at: tuple[tuple[str, str], ...]
    text: str = ""
    title: str = ""


@dataclass(slots=True, kw_only=True)
class Canvas:
    """The shapes of a plot in drawing order, with its width and height in pixels."""

    width: float
    height: float
    shapes: list[Shape] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, look: str) -> None:
        """Add a straight line."""
        self._add("line", look, x1=x1, y1=y1, x2=x2, y2=y2)

    def box(self, x: float, y: float, width: float, height: float, look: str, *, title: str = "") -> None:
        """Add a filled rectangle."""
        self._add("rect", look, title=title, x=x, y=y, width=max(0.0, width), height=max(0.0, height))

    def path(self, points: Sequence[tuple[float, float]], look: str) -> None:
        """Add a line through points."""
        steps = " ".join(f"{_format_coordinate(x)},{_format_coordinate(y)}" for x, y in points)
        self.shapes.append(Shape(tag="path", look=look, at=(("d", f"M{steps}"),)))

    def mark(self, form: str, x: float, y: float, look: str, *, size: float = 5, title: str = "") -> None:
        """Add a marker of the given form, ``2 * size`` pixels wide, centred at a point."""
        self.shapes.append(Shape(tag="path", look=look, at=(("d", _marker_path(form, x, y, size)),), title=title))

    def text(
        self, x: float, y: float, text: str, look: str = "", *, anchor: Anchor = "start", width: float | None = None
    ) -> None:
        """Add a line of text, cut to ``width`` pixels."""
        line = single_line(text)
        shown = line if width is None else truncate_to_width(line, width)
        at = (("x", _format_coordinate(x)), ("y", _format_coordinate(y)), ("text-anchor", anchor))
        self.shapes.append(Shape(tag="text", look=look, at=at, text=shown, title="" if width is None else line))

    def whisker(self, scale: Scale, low: float | None, high: float | None, across: float, look: str) -> None:
        """Add a horizontal confidence interval."""
        if low is None or high is None:
            return
        start, end = scale(low), scale(high)
        self.line(start, across, end, across, look)
        for x in (start, end):
            self.line(x, across - 4, x, across + 4, look)

    def stem(self, scale: Scale, low: float | None, high: float | None, along: float, look: str) -> None:
        """Add a vertical confidence interval."""
        if low is None or high is None:
            return
        start, end = scale(low), scale(high)
        self.line(along, start, along, end, look)
        for y in (start, end):
            self.line(along - 3, y, along + 3, y, look)

    def below(self, scale: Scale, top: float, bottom: float, title: str = "", *, ticks: int = 6) -> None:
        """Add a horizontal axis at ``bottom`` with grid lines up to ``top``."""
        for value in scale.ticks(ticks):
            x = scale(value)
            self.line(x, top, x, bottom, "grid")
            self.text(x, bottom + 16, format_tick(value), "tick", anchor="middle")
        self.line(scale.start, bottom, scale.end, bottom, "axis")
        if title:
            middle = (scale.start + scale.end) / 2
            room = text_width(title) / 2
            middle = min(max(middle, room + 2), self.width - room - 2) if 2 * room < self.width else middle
            self.text(middle, bottom + 36, title, "axis-title", anchor="middle")

    def left(
        self, scale: Scale, left: float, right: float, title: str = "", *, ticks: int = 5, named: bool = True
    ) -> None:
        """Add a vertical axis at ``left`` with grid lines up to ``right``, and its title above it."""
        for value in scale.ticks(ticks):
            y = scale(value)
            self.line(left, y, right, y, "grid")
            if named:
                self.text(left - 6, y + 4, format_tick(value), "tick", anchor="end")
        if title:
            self.text(2, scale.end - 12, truncate_to_width(title, self.width - 4), "axis-title")

    def _add(self, tag: Tag, look: str, *, title: str = "", **at: float) -> None:
        coordinates = tuple((name, _format_coordinate(value)) for name, value in at.items())
        self.shapes.append(Shape(tag=tag, look=look, at=coordinates, title=title))


def _format_coordinate(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _marker_path(form: str, x: float, y: float, size: float) -> str:
    """Return the SVG path of a marker."""
    if form == "circle":
        start, radius = f"{_format_coordinate(x - size)},{_format_coordinate(y)}", _format_coordinate(size)
        there, back = _format_coordinate(2 * size), _format_coordinate(-2 * size)
        return f"M{start}a{radius},{radius} 0 1 0 {there},0a{radius},{radius} 0 1 0 {back},0z"
    corners = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "diamond": ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)),
        "triangle": ((0, -1.15), (1.15, 0.9), (-1.15, 0.9)),
        "right": ((1.3, 0), (-0.9, -1.15), (-0.9, 1.15)),
        "left": ((-1.3, 0), (0.9, -1.15), (0.9, 1.15)),
    }[form]
    return (
        "M"
        + " ".join(f"{_format_coordinate(x + size * dx)},{_format_coordinate(y + size * dy)}" for dx, dy in corners)
        + "z"
    )


def text_width(text: str, size: float = NORMAL) -> float:
    """Return the approximate width of a line of text in pixels; fonts of browsers may differ by 10 %."""
    wide = sum(1.0 if unicodedata.east_asian_width(character) in "WF" else 0.58 for character in text)
    return size * wide


def truncate_to_width(text: str, width: float, size: float = NORMAL) -> str:
    """Return text cut to a width, with an ellipsis if it was cut."""
    if text_width(text, size) <= width:
        return text
    shown = ""
    for character in text:
        if text_width(f"{shown}{character}…", size) > width:
            break
        shown += character
    return f"{shown.rstrip()}…"
