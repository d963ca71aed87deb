"""The final terminal output of a run: a table of main metrics, and the effects of fine-tuning and ensembles."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator

from rich.table import Table
from rich.text import Text

from llmrec.display import single_line
from llmrec.registry import is_lower_better
from llmrec.report.marks import VERDICT_SIGNS
from llmrec.report.summary import Headline, exploratory_reason, headline, main_finding, tuning_tally
from llmrec.report.table import console_table
from llmrec.report.wording import (
    DASH,
    VERDICT_COLOURS,
    describe_undefined,
    format_duration,
    format_figure,
    format_interval,
    format_number,
    format_verdict,
    is_single_language_model,
    rows_with_value,
    title,
    verdict,
)
from llmrec.results import LANGUAGE_MODEL_ARMS, Results, Row, Verdict, arm_name

WIDTH = 80
# the sign for comparisons that were not planned
_EXPLORATORY_SIGN = "◇"
# number of stages to name with their duration
_MAX_NAMED_STAGES = 3


def metrics_table(results: Results) -> Table:
    """Return the final table of a run: the main metric of each task by setting, and the best baseline.

    A setting shows the best row of the model alone. The last column is the first difference of the report
    (`llmrec.report.summary`). A run without a language model shows its best single recommender and its ensemble.
    """
    firsts = {task: headline(results, task) for task in results.tasks}
    asks = results.has_language_model
    single = {row.arm for row in results.rows if is_single_language_model(row)}
    arms: list[str] = [arm for arm in LANGUAGE_MODEL_ARMS if arm in single]
    table = console_table("", [_verdict_legend(result.verdict for result in firsts.values() if result.difference)])
    table.title = None
    table.add_column("Task and metric", overflow="fold")
    for arm in arms or ["ensemble"]:
        table.add_column(arm_name(arm).replace("-", "\n"), justify="right", no_wrap=True)
    table.add_column("best baseline" if asks else "best single", justify="right", overflow="fold")
    table.add_column("difference", justify="right", no_wrap=True)
    for task, result in firsts.items():
        metric = result.metric
        rows = [_best_model(results, task, arm) for arm in arms] if asks else [result.model]
        cells = [DASH if row is None else format_figure(row.metrics.get(metric)) for row in rows]
        control = (
            result.control and f"{format_number(result.control.metrics[metric].value)}\n{single_line(result.names[1])}"
        )
        direction = ", lower is better" if is_lower_better(metric) else ""
        table.add_row(
            Text(f"{single_line(title(task))}\n{single_line(metric)}{direction}"),
            *map(Text, cells),
            Text(control or DASH),
            _difference_cell(result),
        )
    return table


def _best_model(results: Results, task: str, arm: str) -> Row | None:
    """Return the best zero-shot, few-shot or tuned model of a task; None if no model has a value."""
    return next(
        (row for row in rows_with_value(results, task) if row.arm == arm and is_single_language_model(row)), None
    )


def _difference_cell(found: Headline) -> Text:
    """Return the difference between model and baseline with a sign for the verdict, above its interval."""
    entry = found.difference
    if entry is None:
        return Text(DASH)
    sign = VERDICT_SIGNS[entry.verdict] if entry.verdict else _EXPLORATORY_SIGN
    message = f"{sign} {format_number(entry.value, sign=True)}\n{format_interval(entry.low, entry.high, sign=True)}"
    return Text(message, style=VERDICT_COLOURS[entry.verdict] if entry.verdict else "")


def _verdict_legend(verdicts: Iterable[Verdict | None]) -> str:
    signs = {VERDICT_SIGNS[verdict] if verdict else _EXPLORATORY_SIGN: format_verdict(verdict) for verdict in verdicts}
    return "   ".join(f"{sign} {words}" for sign, words in signs.items())


def closing_lines(results: Results) -> list[str]:
    """Return the text below the final table, as lines of at most `WIDTH` columns.

    It names the reasons of missing figures, the contributions to an ensemble, the effect of tuning, and why the run
    is exploratory.
    """
    matches = [verdict(results, task) for task in results.tasks]
    texts = [text for task in results.tasks for text in describe_undefined(results, task)]
    tally = tuning_tally(matches) if any(entry.tuned for entry in matches) else ""
    texts += [main_finding(results), tally, exploratory_reason(results)]
    return [line for text in texts for line in wrap_paragraph(text)]


def verdict_patterns() -> Iterator[tuple[re.Pattern[str], str]]:
    """Yield a pattern for each verdict in words, with its colour."""
    for outcome, colour in VERDICT_COLOURS.items():
        yield re.compile(r"\s+".join(format_verdict(outcome).split())), colour


def describe_run_time(results: Results) -> str:
    """Return the duration of a run and its longest stages."""
    longest = sorted((stage for stage in results.budget if stage.seconds), key=lambda stage: -(stage.seconds or 0))
    named = ", ".join(
        f"{single_line(stage.stage)} {format_duration(stage.seconds)}" for stage in longest[:_MAX_NAMED_STAGES]
    )
    return f"{format_duration(results.seconds)}{f' ({named})' if named else ''}"


def wrap_paragraph(text: str, *, hang: int = 2) -> list[str]:
    """Wrap a paragraph at `WIDTH` columns, with all lines after the first indented by ``hang``.

    A longer name is not broken.
    """
    # no line break within an interval, or between it and its value
    text = re.sub(r"\[(\S+), (\S+)\]", "[\\1,\N{NO-BREAK SPACE}\\2]", text)
    result = textwrap.wrap(text, WIDTH, subsequent_indent=" " * hang, break_on_hyphens=False, break_long_words=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in result]
