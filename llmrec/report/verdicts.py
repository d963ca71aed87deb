"""The last screen of a run: a paragraph a task in the words of the report, and what tuning did; no tables."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from llmrec.report.escape import flat
from llmrec.report.headline import headline
from llmrec.report.summary import brought, caution, few_users, tuning_tally
from llmrec.report.wording import (
    TaskVerdict,
    arm_label,
    duration,
    label,
    number,
    outcome,
    title,
    undefined,
    verdict,
    winner_sentence,
    with_interval,
)
from llmrec.results import Results, Row, lower

WIDTH = 80
STYLES = {"significantly better": "green", "significantly worse": "red", "no significant difference": "yellow"}
"""Colours of verdicts on a terminal, which stand beside the words and never in place of them."""
HEAD = "The best language-model row against the best control:"
# Stages that are named of a run's time.
_LONGEST = 3


def screen(results: Results) -> list[str]:
    """Return the verdicts of a run as lines of at most `WIDTH` columns.

    A task with a language model says which of its rows is the best, the best control, and the difference; one without,
    what the fusion or the best recommender reaches. Then what tuning did, and what makes the run exploratory.
    """
    found = [verdict(results, task) for task in results.tasks]
    lines = [HEAD] if any(row.arm != "baseline" for row in results.rows) else []
    lines += [line for each in found for line in wrapped(_paragraph(results, each))]
    if any(each.tuned for each in found):
        lines += wrapped(tuning_tally(found))
    if warning := caution(results):
        lines += wrapped(warning)
    return lines


def coloured() -> Iterator[tuple[re.Pattern[str], str]]:
    """Yield what finds each verdict, wherever lines are broken, and its style."""
    for words, style in STYLES.items():
        yield re.compile(r"\s+".join(words.split())), style


def spent(results: Results) -> str:
    """Return how long a run took, and its longest stages."""
    longest = sorted((stage for stage in results.budget if stage.seconds), key=lambda stage: -(stage.seconds or 0))
    named = ", ".join(f"{flat(stage.stage)} {duration(stage.seconds)}" for stage in longest[:_LONGEST])
    return f"{duration(results.seconds)}{f' ({named})' if named else ''}"


def _paragraph(results: Results, found: TaskVerdict) -> str:
    head = f"{title(found.task)}, {found.metric}{' (lower is better)' if lower(found.metric) else ''}: "
    asked = any(row.task == found.task and row.arm != "baseline" for row in results.rows)
    if not asked:
        return brought(results, found.task) or f"{title(found.task)}: {winner_sentence(found)}"
    first = headline(results, found.task)
    model, control, lead = first.model, first.control, first.difference
    if model is None:
        reasons = " ".join(undefined(results, found.task))
        return f"{head}no language-model row has a figure. {reasons}".rstrip()
    told = f"{head}{_named(results, model)} {_reached(model, found.metric)}"
    if control is None:
        return f"{told}; no control has a figure."
    told += f" against {label(control)} {_reached(control, found.metric)}; "
    if lead is None:
        return f"{told}their difference was not tested."
    told += f"{with_interval(lead.value, lead.low, lead.high, sign=True)}, {outcome(lead.verdict)}"
    weak = lead.verdict is not None and (model.arm == "tuned" or few_users(results, found.task))
    return f"{told}{' (exploratory)' if weak else ''}."


def _named(results: Results, row: Row) -> str:
    """Return a row's setting and strategy, and its template where there are several to tell apart."""
    alike = sum((each.task, each.arm, each.predictor) == (row.task, row.arm, row.predictor) for each in results.rows)
    return label(row) if alike > 1 else arm_label(row.arm, row.predictor)


def _reached(row: Row, metric: str) -> str:
    return number(row.metrics[metric].value)


def wrapped(text: str, *, hang: int = 2) -> list[str]:
    """Return a paragraph in lines of at most `WIDTH` columns, those after the first indented by ``hang``.

    A name that is longer stays whole.
    """
    # A number stays beside its interval, and an interval in one piece.
    text = re.sub(r"\[(\S+), (\S+)\]", "[\\1,\N{NO-BREAK SPACE}\\2]", text)
    found = textwrap.wrap(text, WIDTH, subsequent_indent=" " * hang, break_on_hyphens=False, break_long_words=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in found]
