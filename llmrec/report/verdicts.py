"""The final terminal output of a run: a table of main metrics, and the effects of fine-tuning and ensembles."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator

from rich.table import Table
from rich.text import Text

from llmrec.display import flat
from llmrec.registry import lower
from llmrec.report.marks import SIGNS
from llmrec.report.summary import Headline, caution, first_sentence, headline, tuning_tally
from llmrec.report.table import table_of
from llmrec.report.wording import (
    DASH,
    alone,
    duration,
    figure,
    interval,
    number,
    outcome,
    title,
    undefined,
    verdict,
    with_figures,
)
from llmrec.results import Results, Row, Verdict, arm_name

WIDTH = 80
STYLES = {"significantly better": "green", "significantly worse": "red", "no significant difference": "yellow"}
"""Colours of verdicts on a terminal, in addition to the words."""
_ARMS = ("zero-shot", "few-shot", "tuned")
# the sign for comparisons that were not planned
_OPEN = "◇"
# number of stages to name with their duration
_LONGEST = 3


def metrics_table(results: Results) -> Table:
    """Return the final table of a run: the main metric of each task by setting, and the best baseline.

    A setting shows the best row of the model alone. The last column is the first difference of the report
    (`llmrec.report.summary`). A run without a language model shows its best single recommender and its ensemble.
    """
    firsts = {task: headline(results, task) for task in results.tasks}
    asks = any(row.arm != "baseline" for row in results.rows)
    arms = [arm for arm in _ARMS if any(row.arm == arm and alone(row) for row in results.rows)]
    table = table_of("", [_legend(result.verdict for result in firsts.values() if result.difference)])
    table.title = None
    table.add_column("Task and metric", overflow="fold")
    for arm in arms or ["ensemble"]:
        table.add_column(arm_name(arm).replace("-", "\n"), justify="right", no_wrap=True)
    table.add_column("best baseline" if asks else "best single", justify="right", overflow="fold")
    table.add_column("difference", justify="right", no_wrap=True)
    for task, result in firsts.items():
        metric = result.metric
        rows = [_best(results, task, arm) for arm in arms] if asks else [result.model]
        cells = [DASH if row is None else figure(row.metrics.get(metric)) for row in rows]
        control = result.control and f"{number(result.control.metrics[metric].value)}\n{flat(result.names[1])}"
        table.add_row(
            Text(f"{flat(title(task))}\n{flat(metric)}{', lower is better' if lower(metric) else ''}"),
            *map(Text, cells),
            Text(control or DASH),
            _difference(result),
        )
    return table


def _best(results: Results, task: str, arm: str) -> Row | None:
    """Return the best zero-shot, few-shot or tuned model of a task; None if no model has a value."""
    return next((row for row in with_figures(results, task) if row.arm == arm and alone(row)), None)


def _difference(found: Headline) -> Text:
    """Return the difference between model and baseline with a sign for the verdict, above its interval."""
    entry = found.difference
    if entry is None:
        return Text(DASH)
    sign = SIGNS[entry.verdict] if entry.verdict else _OPEN
    message = f"{sign} {number(entry.value, sign=True)}\n{interval(entry.low, entry.high, sign=True)}"
    return Text(message, style=STYLES[outcome(entry.verdict)] if entry.verdict else "")


def _legend(verdicts: Iterable[Verdict | None]) -> str:
    signs = {SIGNS[verdict] if verdict else _OPEN: outcome(verdict) for verdict in verdicts}
    return "   ".join(f"{sign} {words}" for sign, words in signs.items())


def screen(results: Results) -> list[str]:
    """Return the text below the final table, as lines of at most `WIDTH` columns.

    It names the reasons of missing figures, the contributions to an ensemble, the effect of tuning, and why the run
    is exploratory.
    """
    matches = [verdict(results, task) for task in results.tasks]
    lines = [line for task in results.tasks for text in undefined(results, task) for line in wrapped(text)]
    if text := first_sentence(results):
        lines += wrapped(text)
    if any(entry.tuned for entry in matches):
        lines += wrapped(tuning_tally(matches))
    if warning := caution(results):
        lines += wrapped(warning)
    return lines


def coloured() -> Iterator[tuple[re.Pattern[str], str]]:
    """Yield a pattern for each verdict, with its style."""
    for words, style in STYLES.items():
        yield re.compile(r"\s+".join(words.split())), style


def spent(results: Results) -> str:
    """Return the duration of a run and its longest stages."""
    longest = sorted((stage for stage in results.budget if stage.seconds), key=lambda stage: -(stage.seconds or 0))
    named = ", ".join(f"{flat(stage.stage)} {duration(stage.seconds)}" for stage in longest[:_LONGEST])
    return f"{duration(results.seconds)}{f' ({named})' if named else ''}"


def wrapped(text: str, *, hang: int = 2) -> list[str]:
    """Wrap a paragraph at `WIDTH` columns, with all lines after the first indented by ``hang``.

    A longer name is not broken.
    """
    # no line break within an interval, or between it and its value
    text = re.sub(r"\[(\S+), (\S+)\]", "[\\1,\N{NO-BREAK SPACE}\\2]", text)
    result = textwrap.wrap(text, WIDTH, subsequent_indent=" " * hang, break_on_hyphens=False, break_long_words=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in result]
