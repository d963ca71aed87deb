"""Results as Markdown, as CSV and as tables for the console."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from llmrec.report.results import LOWER_IS_BETTER, Comparison, Results, Row, results_of
from llmrec.report.wording import (
    count,
    duration,
    interval,
    label,
    number,
    p_value,
    share,
    title,
    visible,
    with_interval,
)

CSV_COLUMNS = (
    "task", "row", "arm", "predictor", "template", "template_use", "shots", "engine", "inputs", "n", "metric", "value",
    "low", "high", "signature", "parse_rate", "tie_rate", "seconds", "prompt_tokens", "completion_tokens",
)  # fmt: skip

# A spreadsheet takes a cell that starts so for a formula; the last four are the full-width forms.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
# What opens code, emphasis, strike-through, maths or a cell; a bracket only where it would close a link.
_MARKDOWN = re.compile(r"[\\`*|~$#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=[(\[:])")
_MARKED_UP = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


# --------------------------------------------------------------------------- Markdown


def cell(text: str) -> str:
    """Return untrusted text as one Markdown table cell: no markup, no HTML, no line breaks."""
    flat = " ".join(visible(text).split())
    flat = "".join(_MARKED_UP.get(character, character) for character in flat)
    return _MARKDOWN.sub(lambda match: f"\\{match[0]}", flat)


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], numeric_from: int = 1) -> str:
    """Lay out finished cells as a Markdown table; columns from ``numeric_from`` on are right-aligned."""
    rule = ["---" if place < numeric_from else "---:" for place in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


def markdown(results: Results | Mapping[str, Any]) -> str:
    """Return one Markdown table a task and one of all comparisons.

    Args:
        results: The content of results.json.

    Raises:
        LlmrecError: If the content is incomplete or its rows must not share a table.
    """
    found = results_of(results)
    parts = [f"### {cell(title(task))}\n\n{task_markdown(found, task)}" for task in found.tasks]
    if found.comparisons:
        parts.append(f"### Comparisons\n\n{comparisons_markdown(found)}")
    return "\n\n".join(parts) + "\n"


def task_markdown(results: Results, task: str) -> str:
    """Return a task's table, best row first, and the line that says how to read it."""
    names = results.metrics(task)
    header = ["Row", *names, "Template", "Shots", "Engine", "n", "Parsed", "Ties", "Tokens/s", "Time"]
    best = {name: results.best(task, name) for name in names}
    rows = []
    for row in results.standings(task):
        mark = f"{cell(label(row))} (baseline)" if row.arm == "baseline" else cell(label(row))
        use = f" ({row.template_use})" if row.template_use else ""
        rows.append(
            [
                mark,
                *(_metric_cell(row, name, best[name], full=name == names[0]) for name in names),
                cell(f"{row.template}{use}") if row.template else "–",
                str(row.shots),
                cell(row.engine),
                count(row.n),
                share(row.parse_rate),
                share(row.tie_rate),
                count(row.cost.tokens_per_second),
                duration(row.cost.seconds),
            ]
        )
    direction = "lower" if names[0] in LOWER_IS_BETTER else "higher"
    note = f"Ordered by {cell(names[0])} ({direction} is better), 95 % intervals in brackets, best of a column bold."
    return f"{grid([cell(head) for head in header], rows)}\n\n{note}"


def _metric_cell(row: Row, name: str, best: float | None, *, full: bool) -> str:
    metric = row.metrics.get(name)
    if metric is None or metric.value is None:
        return "–"
    value = f"**{number(metric.value)}**" if metric.value == best else number(metric.value)
    bounds = interval(metric.low, metric.high) if full else ""
    return f"{value} {bounds}".rstrip()


def comparisons_markdown(results: Results) -> str:
    """Return the table of paired differences."""
    rows = [
        [cell(title(entry.task)), cell(entry.metric), *_sides(results, entry), *_finding(entry)]
        for entry in results.comparisons
    ]
    header = ["Task", "Metric", "a", "b", "a − b", "p", "Verdict"]
    lower = " and ".join(sorted(LOWER_IS_BETTER))
    note = f"A positive difference favours a, except for {lower}, where lower is better."
    return f"{grid(header, rows, numeric_from=4)}\n\n{note}"


def _sides(results: Results, entry: Comparison) -> list[str]:
    return [cell(label(results.row(side))) for side in (entry.a, entry.b)]


def _finding(entry: Comparison) -> list[str]:
    return [with_interval(entry.value, entry.low, entry.high, sign=True), p_value(entry.p), entry.verdict]


# --------------------------------------------------------------------------- CSV


def csv_cell(value: object) -> str:
    """Return one CSV cell: numbers to full precision, text that a spreadsheet would run with a leading apostrophe."""
    if value is None:
        return ""
    if isinstance(value, int | float):
        return repr(value)
    text = str(value).replace("\x00", "")
    return f"'{text}" if text.startswith(_FORMULA) else text


def csv_text(results: Results | Mapping[str, Any]) -> str:
    """Return one line a row and metric, under `CSV_COLUMNS`.

    Raises:
        LlmrecError: If the content is incomplete or its rows must not share a table.
    """
    found = results_of(results)
    buffer = io.StringIO()
    # The line ending of RFC 4180, for then the writer also quotes text that holds a lone carriage return.
    writer = csv.writer(buffer, lineterminator="\r\n")
    writer.writerow(CSV_COLUMNS)
    for task in found.tasks:
        for row in found.standings(task):
            for name in found.metrics(task):
                if name not in row.metrics:
                    continue
                metric, cost = row.metrics[name], row.cost
                line = (
                    row.task, row.id, row.arm, row.predictor, row.template, row.template_use, row.shots, row.engine,
                    row.inputs, row.n, name, metric.value, metric.low, metric.high, metric.signature, row.parse_rate,
                    row.tie_rate, cost.seconds, cost.prompt_tokens, cost.completion_tokens,
                )  # fmt: skip
                writer.writerow([csv_cell(value) for value in line])
    return buffer.getvalue()


# --------------------------------------------------------------------------- console


def console_tables(results: Results | Mapping[str, Any]) -> list[Table]:
    """Return one rich table a task, and one of comparisons if there are any, for the end of a run.

    Raises:
        LlmrecError: If the content is incomplete or its rows must not share a table.
    """
    found = results_of(results)
    tables = [_task_table(found, task) for task in found.tasks]
    return [*tables, _comparison_table(found)] if found.comparisons else tables


def _plain(text: str, style: str = "") -> Text:
    """Return text that rich takes as it is: no markup, no escape sequences."""
    return Text(visible(text.replace("\n", " ")), style=style)


def _task_table(results: Results, task: str) -> Table:
    names = results.metrics(task)[:3]
    table = Table(title=_plain(title(task), "bold"), title_justify="left", header_style="bold")
    table.add_column("Row", overflow="fold", ratio=1)
    for place, name in enumerate(names):
        table.add_column(_plain(name), justify="right", no_wrap=True)
        if place == 0:
            table.add_column("95 %", justify="right", no_wrap=True)
    for head in ("Parsed", "Ties", "Tok/s"):
        table.add_column(head, justify="right", no_wrap=True)
    best = {name: results.best(task, name) for name in names}
    for row in results.standings(task):
        cells = [_plain(label(row), "dim" if row.arm == "baseline" else "")]
        for place, name in enumerate(names):
            metric = row.metrics.get(name)
            value = metric.value if metric else None
            cells.append(Text(number(value), style="bold green" if value is not None and value == best[name] else ""))
            if place == 0:
                cells.append(Text(interval(metric.low, metric.high) if metric else ""))
        cells += [Text(share(row.parse_rate)), Text(share(row.tie_rate)), Text(count(row.cost.tokens_per_second))]
        table.add_row(*cells)
    return table


def _comparison_table(results: Results) -> Table:
    styles = {"shown": "green", "not shown": "yellow", "contradicted": "red"}
    table = Table(title="Comparisons", title_justify="left", header_style="bold")
    for head in ("Metric", "a", "b"):
        table.add_column(head, overflow="fold")
    for head in ("a − b, 95 %", "p"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("Verdict", no_wrap=True)
    for entry in results.comparisons:
        table.add_row(
            _plain(entry.metric),
            *(_plain(label(results.row(side))) for side in (entry.a, entry.b)),
            Text(with_interval(entry.value, entry.low, entry.high, sign=True)),
            Text(p_value(entry.p)),
            Text(entry.verdict, style=styles[entry.verdict]),
        )
    return table
