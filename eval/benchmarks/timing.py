"""Times alternative implementations alternately, and compares the results with goals."""

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
    """Return a time in seconds: wall-clock time, or processor time with ``BENCH_CLOCK=processor``.

    Wall-clock time includes waiting for other processes.
    """
    return time.process_time() if os.environ.get("BENCH_CLOCK") == "processor" else time.perf_counter()


def alternated(rounds: int, ways: dict[str, Callable[[], Any]]) -> tuple[Summary, dict[str, Any]]:
    """Time every implementation once per round; return seconds (`seconds_now`), and the last result of each."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, once in ways.items():
            # Free the previous result outside the timed section.
            results.pop(name, None)
            begin = seconds_now()
            result = once()
            spent[name].append(seconds_now() - begin)
            results[name] = result
    return {name: summary(values) for name, values in spent.items()}, results


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return the fastest and the median round."""
    return {"min": min(values), "median": statistics.median(values)}


def faster(seconds: Summary, slow: str, fast: str, at_least: float) -> dict[str, Any]:
    """Return the goal of a minimum speed-up of one implementation over another."""
    ratios = {of: seconds[slow][of] / seconds[fast][of] for of in ("min", "median")}
    bars = {name: seconds[name]["min"] for name in (fast, slow)}
    return {
        "found": ratios,
        "at_least": at_least,
        "met": min(ratios.values()) >= at_least,
        "bars": bars,
        "line": bars[slow] / at_least,
        "unit": "s",
    }


def within(seconds: Summary, ours: str, limit: str, at_most: float) -> dict[str, Any]:
    """Return the goal of a maximum ratio of two times."""
    ratios = {of: seconds[ours][of] / seconds[limit][of] for of in ("min", "median")}
    bars = {name: seconds[name]["min"] for name in (ours, limit)}
    return {
        "found": ratios,
        "at_most": at_most,
        "met": max(ratios.values()) <= at_most,
        "bars": bars,
        "line": bars[limit] * at_most,
        "unit": "s",
    }


def at_most(value: dict[str, float], limit: float, unit: str, others: dict[str, float] | None = None) -> dict[str, Any]:
    """Return the goal of a maximum value; ``others`` are values for comparison."""
    return {
        "found": value,
        "at_most": limit,
        "met": max(value.values()) <= limit,
        "bars": {"llmrec": min(value.values())} | (others or {}),
        "line": limit,
        "unit": unit,
    }


def measured(
    target: Path, head: Mapping[str, Any], parts: Mapping[str, Callable[[], dict[str, Any]]], only: Sequence[str] = ()
) -> None:
    """Measure sections, one after the other, and write each result at once.

    Args:
        target: The result file.
        head: The entries before its sections.
        parts: Functions that measure a section, by name.
        only: Measure only these and keep the others in the file; each then records its machine.
    """
    begin = time.perf_counter()
    kept = json.loads(target.read_text(encoding="utf-8")) if only else {}
    results = dict(kept.get("sections", {}))
    for name in only or parts:
        before = os.getloadavg()[0]
        results[name] = parts[name]() | {"load": {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)}}
        results[name]["clock"] = os.environ.get("BENCH_CLOCK", "wall")
        if only:
            results[name]["apart"] = {**head, **provenance()}
        for goal in results[name]["goals"].values():
            figures = ", ".join(f"{value:.2f}" for value in goal["found"].values())
            sys.stdout.write(f"{name}: {figures} {goal['what']}, {'met' if goal['met'] else 'NOT met'}\n")
            sys.stdout.flush()
        sections = {part: results[part] for part in parts if part in results}
        document = kept or {**head, **provenance(), "seconds": time.perf_counter() - begin}
        write_json(target, {**document, "sections": sections})
