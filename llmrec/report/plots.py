"""The numbers behind the plots, as JSON that is safe inside an HTML page.

Colours, fonts and layout are chosen by report.js, which knows the width and the colour scheme.
"""

from __future__ import annotations

import json
from typing import Any

from llmrec.report.results import LOWER_IS_BETTER, Results
from llmrec.report.wording import duration, interval, label, number, title, visible

_LONGEST_LABEL = 48  # characters beside or above a mark; hovering shows the rest

# Plotly reads a little HTML in labels, and JSON in a page must not spell a closing tag or a comment.
_LABEL = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_SCRIPT = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "'": "\\u0027", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)


def plain(text: str, longest: int | None = None) -> str:
    """Return untrusted text as a plot label that shows as it is written, cut to ``longest`` characters."""
    flat = visible(" ".join(text.split()))
    if longest is not None and len(flat) > longest:
        flat = f"{flat[: longest - 1]}…"
    return flat.translate(_LABEL)


def page_json(content: object) -> str:
    """Return JSON that ends no script element, whatever its strings hold.

    Raises:
        ValueError: If a number is NaN or infinite.
    """
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_SCRIPT)


def plots(results: Results) -> dict[str, Any]:
    """Return every plot's data by the id of the element that holds it."""
    found: dict[str, Any] = {f"forest-{place}": forest(results, task) for place, task in enumerate(results.tasks, 1)}
    if results.training and results.training.log:
        found["training-loss"] = losses(results)
        if any(line.tokens_per_second is not None for line in results.training.log):
            found["training-speed"] = speed(results)
    if results.budget:
        found["budget"] = budget(results)
    return found


def forest(results: Results, task: str) -> dict[str, Any]:
    """Return a task's headline values with intervals, best first, and the best baseline as reference line."""
    metric = results.headline[task]
    rows = []
    for row in results.standings(task):
        score = row.metrics.get(metric)
        if score is None or score.value is None:
            continue
        text = f"{number(score.value)} {interval(score.low, score.high)}".rstrip()
        rows.append(
            {
                "label": plain(label(row)),
                "short": plain(label(row), _LONGEST_LABEL),
                "arm": row.arm,
                "value": score.value,
                "low": score.low,
                "high": score.high,
                "text": text,
            }
        )
    control = next((row for row in rows if row["arm"] == "baseline"), None)
    return {
        "kind": "forest",
        "metric": plain(metric),
        "better": "lower" if metric in LOWER_IS_BETTER else "higher",
        "rows": rows,
        "reference": control and control["value"],
    }


def losses(results: Results) -> dict[str, Any]:
    """Return the training loss and each task's validation loss by optimiser step."""
    log = results.training.log if results.training else ()
    names = dict.fromkeys(name for line in log for name in (line.valid_loss or {}))
    series = [_series("training", "train", [(line.step, line.loss) for line in log])]
    for name in names:
        points = [(line.step, (line.valid_loss or {}).get(name)) for line in log]
        series.append(_series(f"valid: {title(name)}", "valid", points))
    return {"kind": "lines", "unit": "loss, nats a token", "series": series}


def speed(results: Results) -> dict[str, Any]:
    """Return training tokens a second by optimiser step."""
    log = results.training.log if results.training else ()
    points = [(line.step, line.tokens_per_second) for line in log]
    return {"kind": "lines", "unit": "tokens/s", "series": [_series("tokens/s", "speed", points)]}


def _series(name: str, kind: str, points: list[tuple[int, float | None]]) -> dict[str, Any]:
    kept = [(step, value) for step, value in points if value is not None]
    return {"name": plain(name), "kind": kind, "x": [step for step, _ in kept], "y": [value for _, value in kept]}


def budget(results: Results) -> dict[str, Any]:
    """Return seconds a stage, in the order in which the stages ran."""
    stages = [
        {
            "label": plain(entry.stage),
            "short": plain(entry.stage, _LONGEST_LABEL // 2),
            "seconds": entry.seconds,
            "text": duration(entry.seconds),
        }
        for entry in results.budget
    ]
    return {"kind": "budget", "stages": stages}
