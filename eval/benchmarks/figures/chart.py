"""The chart of docs/should-you-use-an-llm.md: the best model of each kind by data set, from eval/leaderboard.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmrec.report.canvas import WIDE, Canvas, linear_scale
from llmrec.report.render import render_svg

NAME = "docs/models-by-data-set.svg"

# Levels and kinds of models, from top to bottom: the label, the type in the leaderboard or the model, the colour.
_ROWS = (
    ("Random", "Random", "baseline"),
    ("Popularity", "Popularity", "baseline"),
    ("Interactions only", "interactions", "zero-shot"),
    ("Frozen text encoder", "text", "few-shot"),
    ("Fine-tuned text encoder", "fine-tuned text encoder", "tuned"),
    ("Ensemble", "ensemble", "good"),
    ("Fine-tuned LLM", "language model", "bad"),
)
_NAMES, _GAP, _STEP, _TOP = 176, 22, 30, 34


def chart(board: Sequence[Mapping[str, Any]]) -> str:
    """Return the chart of the first group of the leaderboard as an SVG file, with a panel for each data set."""
    group = board[0]
    columns = group["columns"]
    bottom = _TOP + _STEP * len(_ROWS)
    canvas = Canvas(width=WIDE, height=bottom + 52)
    for index, (label, _, _) in enumerate(_ROWS):
        canvas.text(_NAMES, _TOP + _STEP * index + _STEP / 2 + 4, label, anchor="end")
    wide = (WIDE - _NAMES - 12) / len(columns)
    for column_index, column in enumerate(columns):
        left = _NAMES + 12 + column_index * wide
        cells = [_best(group["rows"], kind, column_index) for _, kind, _ in _ROWS]
        known = [cell[end] for _, cell in filter(None, cells) for end in ("value", "low", "high")]
        scale = linear_scale(known, left, left + wide - _GAP, holds=(0.0,))
        canvas.text(left, _TOP - 14, column["title"], "name")
        canvas.below(scale, _TOP, bottom, group["metric"], ticks=3)
        for index, ((_, _, look), cell) in enumerate(zip(_ROWS, cells, strict=True)):
            middle = _TOP + _STEP * index + _STEP / 2
            if cell is None:
                canvas.text(left + 4, middle + 4, "no result", "tick")
                continue
            model, figures = cell
            title = f"{model}: {figures['value']:.4f} [{figures['low']:.4f}, {figures['high']:.4f}]"
            canvas.box(left, middle - 8, scale(figures["value"]) - left, 16, f"fill {look}", title=title)
            canvas.whisker(scale, figures["low"], figures["high"], middle, "stroke text")
        canvas.line(left, _TOP, left, bottom, "zero")
    return render_svg(canvas, f"{group['metric']} of the best model of each kind on each data set, with 95 % intervals")


def _best(rows: Sequence[Mapping[str, Any]], kind: str, column: int) -> tuple[str, Mapping[str, Any]] | None:
    """Return the best model of a type, or the model of that name, with its figures on a data set; None without one."""
    known = [
        (row["model"], row["cells"][column])
        for row in rows
        if kind in (row["type"], row["model"]) and row["cells"][column] is not None
    ]
    return max(known, key=lambda entry: entry[1]["value"], default=None)
