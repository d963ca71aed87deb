"""A benchmark's page: one table and one picture of quality against cost for each family and protocol."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from llmrec.bench.records import BenchmarkLine, BenchmarkResult, BenchmarkTable, retested
from llmrec.bench.wording import about_detectable, drawn, planned_line, planned_note, standing
from llmrec.pipeline.fusion.parts import FUSIONS
from llmrec.report.escape import cell, code, flat
from llmrec.report.table import grid
from llmrec.report.wording import DASH, SEEDS, UNDEFINED, difference, title, undefined_lines
from llmrec.results import Figure, Pair, lower

_WIDTH, _HEIGHT = 960, 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 24, 70, 64
_INK, _SOFT, _LINE, _BACK, _RULE = "#1f2430", "#5b6375", "#d5dae3", "#ffffff", "#b4541f"
_ARMS = {"zero-shot": "#7fa6c4", "few-shot": "#2f6f9f", "tuned": "#123a5a"}
_TICKS = (1, 2, 5)
_CHAR = 6.6
# Between the names of two rows that stand above each other.
_NAME = 15


def pages(results: BenchmarkResult) -> dict[str, str]:
    """Return a benchmark's page and pictures, by file name.

    Args:
        results: What `llmrec.bench.benchmark` wrote.
    """
    name = results.benchmark
    results = results.model_copy(update={"tables": tuple(map(_with_members, results.tables))})
    names = _names(name, results.tables)
    found = {file: picture(table) for file, table in zip(names, results.tables, strict=True) if _drawn(table)}
    return {f"{name}.md": page(results, names), **found}


def _with_members(table: BenchmarkTable) -> BenchmarkTable:
    """Return a table in which an ensemble costs what its members cost, and what joining them costs."""
    return table.model_copy(update={"rows": tuple(_whole(row, _members(row, table)) for row in table.rows)})


def _members(row: BenchmarkLine, table: BenchmarkTable) -> list[BenchmarkLine]:
    if row.members is not None:
        return [each for each in table.rows if each.name in row.members]
    if row.predictor != FUSIONS["language model"]:
        return []
    # Earlier results do not say what an ensemble joins: at least the language model of its run, and that is what costs.
    own = (row.run, row.arm, row.template, row.shots)
    return [each for each in table.rows if each is not row and (each.run, each.arm, each.template, each.shots) == own]


def _whole(row: BenchmarkLine, members: Sequence[BenchmarkLine]) -> BenchmarkLine:
    names = ("tokens_per_request", "forwards_per_request", "seconds_per_request")
    return row.model_copy(update={name: sum(getattr(each, name) for each in (row, *members)) for name in names})


def page(results: BenchmarkResult, names: Sequence[str]) -> str:
    """Return the Markdown page; ``names`` are the pictures' files, one a table."""
    machine = results.machine
    rows, ensembles = [row for table in results.tables for row in table.rows], set(FUSIONS.values())
    where = f"{machine.get('cpu') or 'an unknown processor'}, {machine.get('cores') or 'unknown'} cores"
    lines = [
        f"# {cell(results.benchmark)}",
        "",
        f"{cell(results.description)} {code(results.command)}, {results.seconds / 60:.0f} min on "
        f"{cell(where)}. Written by that command; do not edit.",
        "",
        "A row is a predictor, its template and its run. Intervals are 95 % over users; *sd* is over training seeds. "
        "*Less the best baseline* compares a row with the best baseline of its table on the same users. It is "
        "exploratory: the interval is an unadjusted 95 %, without p and verdict. Cost is per request: tokens read and "
        "written, model calls (a generated token is one), seconds."
        + (" An ensemble costs what its members cost." if any(row.predictor in ensembles for row in rows) else ""),
    ]
    tested = retested([table.pairs for table in results.tables])
    if many := sum(map(len, tested)):
        lines += ["", planned_note(many, earlier=any(pair.earlier for pairs in tested for pair in pairs))]
    lines += ["", chance] if (chance := drawn(results.llmrec, [row.name for row in rows])) else []
    if results.missing:
        lines += ["", f"**{results.missing} runs are missing**: the same command resumes."]
    for table, file, pairs in zip(results.tables, names, tested, strict=True):
        lines += ["", *_section(table, file, pairs)]
    return "\n".join([*lines, ""])


def _section(table: BenchmarkTable, file: str, pairs: Sequence[Pair]) -> list[str]:
    metric = table.metric
    against = {entry.a: entry for entry in table.against_best_baseline}
    others = [name for name in table.rows[0].metrics if name != metric][:3]
    rows = []
    for row in table.rows:
        own, compared = row.metrics[metric], against.get(row.name)
        rows.append(
            [
                cell(row.name) + (" (baseline)" if row.arm == "baseline" else ""),
                _figure(own),
                *(_value(row.value(name)) if name in row.metrics else DASH for name in others),
                DASH if compared is None else difference(compared.value, compared.low, compared.high),
                *_cost(row),
            ]
        )
    header = ["Row", metric, *others, "less the best baseline", "tokens", "calls", "seconds"]
    direction = "lower is better" if lower(metric) else "higher is better"
    small = standing(table.users, min((row.seeds for row in table.rows if row.arm == "tuned"), default=SEEDS))
    lines = [
        f"## {cell(title(table.task))}: {cell(metric)}",
        "",
        f"{table.requests:,} requests of {table.users:,} users, {direction}; {code(table.signature)}.",
        *(["", small] if small else []),
        "",
        grid([cell(name) for name in header], rows),
        *(part for line in _undefined(table, (metric, *others)) for part in ("", cell(line))),
    ]
    every = [*table.pairs, *table.against_best_baseline]
    reach = table.detectable or about_detectable(metric, every, users=table.users)
    lines += ["", cell(reach)] if every else []
    if pairs:
        lines += ["", "Planned comparisons:", "", *(f"- {planned_line(pair, 'less')}" for pair in pairs)]
    if _drawn(table):
        lines += ["", f"![{cell(metric)} by tokens a request]({file})"]
    return lines


def _names(name: str, tables: Sequence[BenchmarkTable]) -> list[str]:
    """Return a file name for each table's picture: its family, and a number where a family has several."""
    found: list[str] = []
    for table in tables:
        same = sum(own.startswith(f"{name}-{table.task}") for own in found)
        found.append(f"{name}-{table.task}{f'-{same + 1}' if same else ''}.svg")
    return found


def _figure(figure: Figure) -> str:
    text = _value(figure.value)
    if figure.low is not None and figure.high is not None:
        text += f" [{figure.low:.3f}, {figure.high:.3f}]"
    return text + (f" sd {figure.sd:.3f}" if figure.sd is not None else "")


def _value(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.3f}"


def _undefined(table: BenchmarkTable, metrics: Sequence[str]) -> list[str]:
    """Say which figures of a table are not defined, of which rows and why."""
    rows = table.rows
    figures = [(row.name, name, row.metrics[name]) for row in rows for name in metrics if name in row.metrics]
    missing = [(row, name, figure.undefined) for row, name, figure in figures if figure.value is None]
    return undefined_lines(missing, len(rows), table.metric)


def _cost(row: BenchmarkLine) -> list[str]:
    if row.arm == "baseline":
        return [DASH, DASH, f"{row.seconds_per_request:.3f}"]
    tokens, calls = f"{row.tokens_per_request:,.0f}", f"{row.forwards_per_request:,.1f}"
    return [tokens, calls, f"{row.seconds_per_request:.2f}"]


# --------------------------------------------------------------------------- the picture


def _drawn(table: BenchmarkTable) -> bool:
    return len(_asked(table)) > 1


def _asked(table: BenchmarkTable) -> list[BenchmarkLine]:
    return [
        row
        for row in table.rows
        if row.arm != "baseline" and row.tokens_per_request > 0 and row.value(table.metric) is not None
    ]


def _at(row: BenchmarkLine, metric: str) -> float:
    """Return a figure that is drawn: those that are not defined are not."""
    value = row.value(metric)
    assert value is not None, f"{row.name}: {metric} is not defined"
    return value


def frontier(rows: Sequence[BenchmarkLine], metric: str) -> list[BenchmarkLine]:
    """Return the rows that no other row beats at the same or a lower cost, cheapest first (the Pareto front)."""
    sign = -1 if lower(metric) else 1
    best, found = -math.inf, []
    for row in sorted(rows, key=lambda row: (row.tokens_per_request, -sign * _at(row, metric))):
        value = sign * _at(row, metric)
        if value > best:
            best = value
            found.append(row)
    return found


def picture(table: BenchmarkTable) -> str:
    """Draw quality against tokens a request, on a logarithmic axis; the best baseline is a line, as it reads none."""
    metric, rows = table.metric, _asked(table)
    controls = [row for row in table.rows if row.arm == "baseline" and row.value(metric) is not None]
    front = frontier(rows, metric)
    tokens = [float(row.tokens_per_request) for row in rows]
    values = [float(_at(row, metric)) for row in (*rows, *controls[:1])]
    low, high = math.log10(min(tokens)) - 0.1, math.log10(max(tokens)) + 0.1
    pad = (max(values) - min(values)) * 0.12 or 0.01
    bottom, top = min(values) - pad, max(values) + pad

    def x(count: float) -> float:
        return _LEFT + (math.log10(count) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - bottom) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_text(24, 34, f"{title(table.task)}: {metric} by tokens a request", size=18)]
    parts.append(_text(24, 54, "lower is better" if lower(metric) else "higher is better", ink=_SOFT))
    parts += _axes(low, high, bottom, top, x, y)
    for row in controls[:1]:
        at = y(_at(row, metric))
        parts.append(_path([(_LEFT, at), (_WIDTH - _RIGHT, at)], _RULE, dashed=True))
        parts.append(_text(_LEFT + 6, at - 6, f"{row.name}, no tokens", ink=_RULE))
    if len(front) > 1:
        parts.append(_path([(x(r.tokens_per_request), y(_at(r, metric))) for r in front], _SOFT))
    for row in rows:
        spot = x(row.tokens_per_request), y(_at(row, metric))
        name = escape(f"{row.name}: {_at(row, metric):.3f}, {row.tokens_per_request:,.0f} tokens")
        parts.append(
            f'<circle cx="{spot[0]:.1f}" cy="{spot[1]:.1f}" r="{6 if row in front else 4}" '
            f'fill="{_ARMS.get(row.arm, _SOFT)}"><title>{name}</title></circle>'
        )
    parts += _labels(front, metric, x, y)
    for place, (arm, ink) in enumerate(_ARMS.items()):
        left = _WIDTH - 330 + 105 * place
        parts.append(f'<circle cx="{left}" cy="30" r="6" fill="{ink}"/>{_text(left + 12, 35, arm, ink=_SOFT)}')
    frame = f'<rect x="1" y="1" width="{_WIDTH - 2}" height="{_HEIGHT - 2}" rx="10" fill="{_BACK}" stroke="{_LINE}"/>'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" role="img" aria-label="{escape(metric)} by tokens a request">'
    )
    return "\n".join([head, frame, *parts, "</svg>"]) + "\n"


def _axes(low: float, high: float, bottom: float, top: float, x: Any, y: Any) -> list[str]:
    parts = []
    for power in range(math.floor(low), math.ceil(high) + 1):
        for digit in _TICKS:
            count = digit * 10**power
            if low <= math.log10(count) <= high:
                parts.append(_path([(x(count), _TOP), (x(count), _HEIGHT - _BOTTOM)], _LINE))
                parts.append(_text(x(count), _HEIGHT - _BOTTOM + 20, f"{count:,.0f}", ink=_SOFT, anchor="middle"))
    step = 10 ** math.floor(math.log10(top - bottom))
    # The range is less than ten steps: steps twice as long are few enough in any case.
    step = next(step * part for part in (0.1, 0.2, 0.5, 1, 2) if (top - bottom) / (step * part) <= 8)
    tick = math.ceil(bottom / step) * step
    while tick <= top:
        parts.append(_path([(_LEFT, y(tick)), (_WIDTH - _RIGHT, y(tick))], _LINE))
        parts.append(_text(_LEFT - 8, y(tick) + 4, f"{tick:.3g}", ink=_SOFT, anchor="end"))
        tick += step
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 18, "tokens a request, logarithmic", ink=_SOFT, anchor="end"))
    return parts


def _labels(front: Sequence[BenchmarkLine], metric: str, x: Any, y: Any) -> list[str]:
    """Name the rows of the front, on the side where the frame leaves room, each above those that it would cover."""
    parts = []
    taken: list[tuple[float, float, float]] = []
    for row in front:
        at, name = x(row.tokens_per_request), flat(row.name)
        width = len(name) * _CHAR
        left = at + 10 + width > _WIDTH - _RIGHT
        begin = at - 10 - width if left else at + 10
        height = y(_at(row, metric)) - 9
        while any(abs(height - other) < _NAME and begin < to and start < begin + width for start, to, other in taken):
            height -= _NAME
        taken.append((begin, begin + width, height))
        # A line that passes behind it stops short of it.
        anchor = "end" if left else "start"
        parts.append(_text(at - 10 if left else at + 10, height, name, anchor=anchor, halo=True))
    return parts


def _text(
    x: float, y: float, text: str, *, size: int = 13, ink: str = _INK, anchor: str = "start", halo: bool = False
) -> str:
    look = f'font-family="system-ui, Segoe UI, Helvetica, sans-serif" font-size="{size}" fill="{ink}"'
    look += f' stroke="{_BACK}" stroke-width="4" paint-order="stroke"' if halo else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {look}>{escape(text)}</text>'


def _path(points: Sequence[tuple[float, float]], ink: str, *, dashed: bool = False) -> str:
    listed = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="6 5"' if dashed else ""
    return f'<polyline points="{listed}" fill="none" stroke="{ink}" stroke-width="1.5"{dash}/>'
