"""Generates the table of metrics in docs/evaluation-protocol-and-metrics.md from the registry."""

from __future__ import annotations

from llmrec.registry import METRICS
from llmrec.report.table import grid

PAGE = "docs/evaluation-protocol-and-metrics.md"
_KINDS = {
    "ranking": "rankings",
    "lists": "lists",
    "rating": "ratings",
    "probability": "yes/no",
    "text": "texts",
}


def table() -> str:
    """Return every registered metric with its meaning, direction, and use in comparisons."""
    rows = []
    for name, entry in METRICS.items():
        names = [name] * (entry.both or not entry.cut) + [f"{name}@k"] * (entry.both or entry.cut)
        where = _KINDS[entry.kind] + (", full ranking" if entry.full else "")
        better = "lower" if entry.lower else "higher"
        shown = ", ".join(f"`{each}`" for each in names)
        rows.append([shown, where, entry.about, better, "yes" if entry.compared else "no"])
    return grid(["metric", "of", "meaning", "better", "compared"], rows, 5)
