"""Times ways of doing the same, in turn, and keeps each figure beside the goal that was set for it."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.provenance import provenance
from llmrec.durable import write_json

Summary = dict[str, dict[str, float]]


def seconds_now() -> float:
    """Return a time in seconds: on the clock, or of the processor under ``BENCH_CLOCK=processor``.

    Where others use the cores too, a clock measures them as well.
    """
    return time.process_time() if os.environ.get("BENCH_CLOCK") == "processor" else time.perf_counter()


def alternated(rounds: int, ways: dict[str, Callable[[], Any]]) -> tuple[Summary, dict[str, Any]]:
    """Time every way once a round, in turn; return seconds (`seconds_now`), and what each gave last."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    given: dict[str, Any] = {}
    for _ in range(rounds):
        for name, once in ways.items():
            # What was given before is freed outside the time.
            given.pop(name, None)
            begin = seconds_now()
            result = once()
            spent[name].append(seconds_now() - begin)
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


def measured(
    target: Path, head: Mapping[str, Any], parts: Mapping[str, Callable[[], dict[str, Any]]], only: Sequence[str] = ()
) -> None:
    """Measure parts, one after the other, and write each as soon as it is there.

    Args:
        target: The result file.
        head: What stands above its sections.
        parts: What gives a section, by name.
        only: Measure these alone, and leave the others as the file has them; each then has its machine with it.
    """
    begin = time.perf_counter()
    kept = json.loads(target.read_text(encoding="utf-8")) if only else {}
    found = dict(kept.get("sections", {}))
    for name in only or parts:
        before = os.getloadavg()[0]
        found[name] = parts[name]() | {"load": {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)}}
        if only:
            clock = os.environ.get("BENCH_CLOCK", "wall")
            found[name]["apart"] = {**head, **provenance(), "clock": clock}
        for each in found[name]["goals"].values():
            figures = ", ".join(f"{value:.2f}" for value in each["found"].values())
            sys.stdout.write(f"{name}: {figures} {each['what']}, {'met' if each['met'] else 'NOT met'}\n")
            sys.stdout.flush()
        sections = {each: found[each] for each in parts if each in found}
        whole = kept or {**head, **provenance(), "seconds": time.perf_counter() - begin}
        write_json(target, {**whole, "sections": sections})
