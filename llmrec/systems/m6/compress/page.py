"""The page of what was measured: quality against milliseconds, the front, and the table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from llmrec.durable import write_text
from llmrec.report.canvas import HALF, NARROW, Canvas, fitted, spanning
from llmrec.report.charts import legend
from llmrec.report.render import environment, style
from llmrec.results import lower
from llmrec.systems.m6.compress.rows import Compressed, Row

PAGE = "compress.html"
# Of each dtype, the form and the colour of its marks.
_LOOKS = {"bfloat16": ("circle", "zero-shot"), "float32": ("triangle", "tuned"), "int8": ("diamond", "few-shot")}
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 16, 34, 274


def write(found: Compressed, name: str, path: Path) -> None:
    """Write the page of a run's combinations."""
    rows = [row for row in found.rows if row.quality is not None]
    page = environment().get_template("compress.html.j2")
    nonce = hashlib.sha256(repr((name, found)).encode()).hexdigest()[:32]
    pictures = [front(rows, found, width) for width in (HALF, NARROW)] if rows else []
    write_text(path, page.render(name=name, found=found, plotted=pictures, nonce=nonce, style=style()))


def front(rows: Sequence[Row], found: Compressed, width: float) -> Canvas:
    """Draw rows that have a figure: numbers are layers, the line joins what no faster one equals."""
    canvas = Canvas(width=width, height=_BOTTOM + 46)
    times = [row.ms for row in rows]
    along = spanning([*times, found.target_ms] if found.target_ms > 0 else times, _LEFT, width - _RIGHT)
    rise = fitted([row.quality for row in rows], _BOTTOM, _TOP)
    canvas.left(rise, _LEFT, along.end)
    scale = "milliseconds, log scale" if along.log else "milliseconds"
    canvas.below(along, _TOP, _BOTTOM, f"{found.metric} by {scale}", ticks=5)
    if along.low <= found.target_ms <= along.high:
        place = along(found.target_ms)
        canvas.line(place, _TOP, place, _BOTTOM, "reference")
        canvas.text(min(place + 4, width - 46), _TOP - 4, "target", "tick halo")
    sign, best = -1 if lower(found.metric.partition(" of ")[0]) else 1, list[Row]()
    for row in sorted(rows, key=lambda row: row.ms):
        if not best or sign * float(row.quality or 0) > sign * float(best[-1].quality or 0):
            best.append(row)
    canvas.path([(along(row.ms), rise(float(row.quality or 0))) for row in best], "curve good")
    legend(canvas, [(dtype, *_LOOKS[dtype]) for dtype in dict.fromkeys(row.dtype for row in rows)], _LEFT)
    for row in rows:
        form, hue = _LOOKS[row.dtype]
        at, up = along(row.ms), rise(float(row.quality or 0))
        told = f"{row.layers} layers, {row.dtype}: {row.quality:.4g}, {row.ms:.0f} ms, {row.mb:.0f} MB"
        canvas.mark(form, at, up, f"fill {hue}", size=8 if row == found.chosen else 5, title=told)
        canvas.text(at, up - (14 if row == found.chosen else 10), str(row.layers), "tick halo", anchor="middle")
    return canvas
