"""Times ways of doing the same, in turn, and keeps each figure beside the goal that was set for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

Summary = dict[str, dict[str, float]]


def alternated(rounds: int, ways: dict[str, Callable[[], Any]]) -> tuple[Summary, dict[str, Any]]:
    """Time every way once a round, in turn; return seconds, and what each gave last."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    given: dict[str, Any] = {}
    for _ in range(rounds):
        for name, once in ways.items():
            # What was given before is freed outside the time.
            given.pop(name, None)
            begin = time.perf_counter()
            result = once()
            spent[name].append(time.perf_counter() - begin)
            given[name] = result
    return {name: summary(values) for name, values in spent.items()}, given


def summary(values: Sequence[float]) -> dict[str, float]:
    """The fastest and the median round."""
    return {"min": min(values), "median": statistics.median(values)}


def faster(seconds: Summary, slow: str, fast: str, at_least: float) -> dict[str, Any]:
    """The goal that one way is so many times faster than another."""
    found = {of: seconds[slow][of] / seconds[fast][of] for of in ("min", "median")}
    bars = {name: seconds[name]["min"] for name in (fast, slow)}
    return {
        "found": found,
        "at_least": at_least,
        "met": min(found.values()) >= at_least,
        "bars": bars,
        "line": bars[slow] / at_least,
        "unit": "s",
    }


def within(seconds: Summary, own: str, limit: str, at_most: float) -> dict[str, Any]:
    """The goal that one way takes at most so many times as long as another."""
    found = {of: seconds[own][of] / seconds[limit][of] for of in ("min", "median")}
    bars = {name: seconds[name]["min"] for name in (own, limit)}
    return {
        "found": found,
        "at_most": at_most,
        "met": max(found.values()) <= at_most,
        "bars": bars,
        "line": bars[limit] * at_most,
        "unit": "s",
    }


def at_most(found: dict[str, float], limit: float, unit: str, others: dict[str, float] | None = None) -> dict[str, Any]:
    """The goal that a figure is no larger than a limit; ``others`` are drawn beside it."""
    return {
        "found": found,
        "at_most": limit,
        "met": max(found.values()) <= limit,
        "bars": {"llmrec": min(found.values())} | (others or {}),
        "line": limit,
        "unit": unit,
    }
