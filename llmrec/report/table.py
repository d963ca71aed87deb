"""Results as CSV, terminal tables and Markdown tables."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from llmrec.data.cells import write_rows
from llmrec.display import single_line
from llmrec.report.costs import cost_of
from llmrec.report.marks import (
    Mark,
    best_baseline,
    comparison_marks,
    planned_comparisons,
    significance_rule,
    single_template_ids,
)
from llmrec.report.wording import (
    INPUT_KINDS,
    NOT_EVALUATED,
    UNDEFINED,
    VERDICT_COLOURS,
    describe_undefined,
    format_figure,
    format_interval,
    format_p_value,
    format_percentage,
    format_verdict,
    format_with_interval,
    label,
    title,
)
from llmrec.results import Metric, Results, Row

CSV_COLUMNS = (
    "task", "row", "arm", "predictor", "template", "template_use", "shots", "engine", "inputs", "n", "metric", "value",
    "low", "high", "signature", "parse_rate", "tie_rate", "seconds", "prompt_tokens", "completion_tokens",
    "beats_zero_shot", "beats_zero_shot_p", "best_baseline", "beats_best_baseline", "beats_best_baseline_p",
    "single_template", "users", "candidates", "tokens_per_request", "seconds_per_request",
    "forwards_per_request", "undefined",
)  # fmt: skip


# --------------------------------------------------------------------------- Markdown


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numeric_from: int = 1, numeric_to: int | None = None
) -> str:
    """Return escaped cells as a Markdown table.

    Columns from ``numeric_from`` up to ``numeric_to`` are right-aligned.
    """
    numeric = range(len(header))[numeric_from:numeric_to]
    rule = ["---:" if column in numeric else "---" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


# --------------------------------------------------------------------------- CSV


def csv_text(results: Results) -> str:
    """Return results as CSV, with one line per model and metric and the columns `CSV_COLUMNS`."""
    buffer = io.StringIO()
    # line ending of RFC 4180
    lines = ([line.get(name) for name in CSV_COLUMNS] for line in _csv_lines(results))
    write_rows(buffer, CSV_COLUMNS, lines, end="\r\n")
    return buffer.getvalue()


def _csv_lines(found: Results) -> Iterator[dict[str, object]]:
    """Yield the values of each line by column; a column that is not in a line is empty."""
    for task in found.tasks:
        marked, alone = comparison_marks(found, task), single_template_ids(found, task)
        control = best_baseline(found, task)
        for row in found.standings(task):
            cost = cost_of(row, found.members(row))
            same = ("task", "arm", "predictor", "template", "template_use", "shots", "engine", "inputs", "n")
            shared: dict[str, object] = {name: getattr(row, name) for name in (*same, "users", "candidates")} | {
                "row": row.id, "parse_rate": row.parse_rate, "tie_rate": row.tie_rate, "seconds": row.cost.seconds,
                "prompt_tokens": row.cost.prompt_tokens, "completion_tokens": row.cost.completion_tokens,
                "tokens_per_request": cost.tokens_per_request, "seconds_per_request": cost.seconds_per_request,
                "forwards_per_request": cost.forwards_per_request,
            }  # fmt: skip
            if row.template is not None:
                shared["single_template"] = "yes" if row.id in alone else "no"
            for name in found.metrics(task):
                if name in row.metrics:
                    mark = marked.get(row.id) if name == found.headline[task] else None
                    yield {**shared, **_csv_metric(name, row.metrics[name]), **_csv_marks(mark, control)}
        for missing in found.missing(task):
            known = ("task", "arm", "predictor", "template", "template_use", "shots")
            reason = {"metric": found.headline[task], "undefined": f"{NOT_EVALUATED}: {missing.reason}"}
            yield {**{name: getattr(missing, name) for name in known}, "row": missing.id, **reason}


def _csv_metric(name: str, metric: Metric) -> dict[str, object]:
    why = None if metric.value is not None else metric.undefined or UNDEFINED
    ends = {"value": metric.value, "low": metric.low, "high": metric.high}
    return {"metric": name, **ends, "signature": metric.signature, "undefined": why}


def _csv_marks(mark: Mark | None, control: Row | None) -> dict[str, object]:
    line: dict[str, object] = {}
    if mark and mark.zero_shot:
        line |= {"beats_zero_shot": format_verdict(mark.zero_shot.verdict), "beats_zero_shot_p": mark.zero_shot.p}
    if mark and mark.baseline and control:
        line |= {"best_baseline": control.id, "beats_best_baseline": format_verdict(mark.baseline.verdict)}
        line["beats_best_baseline_p"] = mark.baseline.p
    return line


# --------------------------------------------------------------------------- terminal


def console_tables(results: Results) -> list[Table]:
    """Return a terminal table for each task and for planned comparisons, at most 80 columns wide."""
    tables = [_task_table(results, task) for task in results.tasks]
    return [*tables, _comparison_table(results)] if planned_comparisons(results) else tables


def plain_text(text: str, style: str = "") -> Text:
    """Return text that rich prints literally, without markup and escape sequences."""
    return Text(single_line(text), style=style)


def _task_table(results: Results, task: str) -> Table:
    names = results.metrics(task)[:2]
    # A value that all models share, without failures, needs no column.
    parsed = any(row.parse_rate is not None and row.parse_rate < 1 for row in results.standings(task))
    table = console_table(title(task), describe_undefined(results, task))
    table.add_column("Model", overflow="fold")
    for index, name in enumerate(names):
        table.add_column(plain_text(name), justify="right", no_wrap=True)
        if index == 0:
            table.add_column("95 %", justify="right", no_wrap=True)
    if parsed:
        table.add_column("Parsed", justify="right", no_wrap=True)
    best = {name: results.best(task, name) for name in names}
    for kind, group in results.kinds(task):
        if kind:
            table.add_row(plain_text(INPUT_KINDS[kind], "italic"))
        for row in group:
            cells = [plain_text(label(row), "dim" if row.arm == "baseline" else "")]
            for index, name in enumerate(names):
                metric = row.metrics.get(name)
                leads = metric is not None and metric.value is not None and metric.value == best[name]
                cells.append(Text(format_figure(metric), style="bold green" if leads else ""))
                if index == 0:
                    cells.append(Text(format_interval(metric.low, metric.high) if metric else ""))
            table.add_row(*cells, *([Text(format_percentage(row.parse_rate))] if parsed else []))
    for missing in results.missing(task):
        table.add_row(plain_text(label(missing)), Text(NOT_EVALUATED, style="red"))
    return table


def _comparison_table(results: Results) -> Table:
    table = console_table("Planned comparisons", [significance_rule(results)])
    table.add_column("a − b", overflow="fold")
    for head in ("Difference", "p"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("a is")
    for entry in planned_comparisons(results):
        one, other = (label(results.row(side)) for side in (entry.a, entry.b))
        table.add_row(
            plain_text(f"{one} − {other} ({entry.metric})"),
            Text(format_with_interval(entry.value, entry.low, entry.high, sign=True)),
            Text(format_p_value(entry.p)),
            Text(format_verdict(entry.verdict), style=VERDICT_COLOURS[entry.verdict] if entry.verdict else ""),
        )
    return table


def console_table(head: str, notes: Sequence[str]) -> Table:
    """Return a table of 80 columns without vertical lines, with notes below it."""
    caption = plain_text("\n".join(notes)) if notes else None
    return Table(
        title=plain_text(head, "bold"), title_justify="left", header_style="bold",
        caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_edge=False,
    )  # fmt: skip
