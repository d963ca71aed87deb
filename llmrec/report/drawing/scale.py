"""Numbers -> places along an axis, and the ticks that people read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_WIDE = 4.0  # a log axis from this ratio of the largest to the smallest value on


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A linear or logarithmic map from values to pixels.

    Attributes:
        low: The value at ``start``; above 0 on a logarithmic scale.
        high: The value at ``end``, above ``low``.
        start: Pixels.
        end: Pixels; before ``start`` for an axis that rises.
        log: Whether equal ratios are equally far apart.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; values beyond the ends are put at the ends."""
        inside = min(self.high, max(self.low, value))
        if self.log:
            part = math.log(inside / self.low) / math.log(self.high / self.low)
        else:
            part = (inside - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self, wanted: int) -> tuple[float, ...]:
        """Return about ``wanted`` round values within the scale."""
        if not self.log:
            return _linear(self.low, self.high, wanted)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for parts in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            found = [part * 10.0**power for power in decades for part in parts]
            inside = tuple(value for value in found if self.low <= value <= self.high)
            if len(inside) <= wanted or parts == (1,):
                return inside if len(inside) > 1 else _linear(self.low, self.high, wanted)
        return ()


def _linear(low: float, high: float, wanted: int) -> tuple[float, ...]:
    rough = (high - low) / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(part * power for part in _STEPS if part * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(place * step, 12) for place in range(first, last + 1))


def fitted(values: Iterable[float | None], start: float, end: float, *, holds: Sequence[float] = ()) -> Scale:
    """Return a linear scale with some room around its values, and none beyond ``holds`` where these are its ends."""
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


def spanning(values: Sequence[float], start: float, end: float) -> Scale:
    """Return a scale that no single value flattens: logarithmic where positive values differ by a factor of four."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= _WIDE:
        return Scale(low=low / 1.1, high=high * 1.1, start=start, end=end, log=True)
    return fitted(values, start, end)


def tick_text(value: float) -> str:
    """Return a tick as text, without needless zeros."""
    text = f"{value:,.6g}" if abs(value) >= 1000 else f"{value:.6g}"
    return text.replace("-", "−").replace(",", "\u2009")


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places along a line until neighbours are ``gap`` apart, as little as can be; the order stays."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    found = [0.0] * len(places)
    reached = low - gap
    for index in order:
        reached = found[index] = max(places[index], reached + gap)
    # What was pushed past the end is pushed back.
    reached = high + gap
    for index in reversed(order):
        reached = found[index] = min(found[index], reached - gap)
    return found
