"""Figures by slice in one compact table a task: the best row of each setting beside the best baseline."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from llmrec.guard import clean
from llmrec.report.marks import best_baseline
from llmrec.results import Metric, Results, Row, SliceOfRow, lower

_NAMES = (
    (r"item:cold-below-(\d+)", "Rare items: fewer than {0} training interactions"),
    (r"item:warm-from-(\d+)", "Warm items: {0} training interactions or more"),
    (r"item:head-(0?\.\d+)", "Head items: the most popular, with {share} of training interactions"),
    (r"item:long-tail-(0?\.\d+)", "Long-tail items: all others"),
    (r"count:0-0", "Targets without training interactions"),
    (r"count:(\d+)-(\d+)", "Targets with {0} to {1} training interactions"),
    (r"count:from-(\d+)", "Targets with {0} training interactions or more"),
    (r"words:(\d+)-(\d+)", "Targets with {0} to {1} words of title and fields"),
    (r"words:from-(\d+)", "Targets with {0} words of title and fields or more"),
    (r"history:(\d+)-(\d+)", "History of {0} to {1} events"),
    (r"history:from-(\d+)", "History of {0} events or more"),
    (r"activity:(\d+)-(\d+)", "Users with {0} to {1} training interactions"),
    (r"activity:from-(\d+)", "Users with {0} training interactions or more"),
    (r"age:quarter-1", "Asked soonest after training: the first quarter of held-out interactions"),
    (r"age:quarter-([23])", "Asked later: quarter {0} of 4"),
    (r"age:quarter-4", "Asked last: the last quarter of held-out interactions"),
    (r"user:([^:=]+)=([^:=]+)", "Users with {0}: {1}"),
    (r"user:([^:=]+):other", "Users with a less frequent {0}"),
    (r"user:([^:=]+):below-([^:=]+)", "Users with {0} below {1}"),
    (r"user:([^:=]+):([^:=]+)-to-([^:=]+)", "Users with {0} from {1} to below {2}"),
    (r"user:([^:=]+):from-([^:=]+)", "Users with {0} from {1} on"),
    (r"user:([^:=]+):none", "Users whose {0} is not given"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceLine:
    """One slice over the table's rows.

    Attributes:
        title: Its name in words.
        n: Number of cases.
        users: Number of their users, where it is known.
        small: Whether the cases are too few to say much.
        figures: One figure a row; None where a row has none.
        best: The best value among them; None where there are few cases, or nothing to choose.
    """

    title: str
    n: int
    users: int | None
    small: bool
    figures: tuple[Metric | None, ...]
    best: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceTable:
    """A task's slices.

    Attributes:
        metric: What is shown.
        rows: The columns: the best row of each setting, then the best baseline.
        lines: Slices that hold cases.
        empty: Names, in words, of those that hold none.
    """

    metric: str
    rows: tuple[Row, ...]
    lines: tuple[SliceLine, ...]
    empty: tuple[str, ...]


def in_words(name: str) -> str:
    """Return a slice's name in words; an unknown one as it is."""
    for pattern, words in _NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            share = f"{100 * float(match[1]):g} %" if "{share}" in words else ""
            # Names and values of attributes are percent-encoded, and what others wrote.
            return words.format(*(clean(unquote(part)) for part in match.groups()), share=share)
    return name


def slice_table(results: Results, task: str) -> SliceTable | None:
    """Return a task's slices, or None where its rows have none."""
    rows = [row for row in _columns(results, task) if row.slices]
    if not rows:
        return None
    metric = _metric(results, task, rows)
    names = dict.fromkeys(part.name for row in rows for part in row.slices)
    lines, empty = [], []
    for name in names:
        parts = [next((part for part in row.slices if part.name == name), None) for row in rows]
        own = next(part for part in parts if part is not None)
        if own.n:
            lines.append(_line(own, [part.metrics.get(metric) if part else None for part in parts], metric))
        else:
            empty.append(in_words(name))
    return SliceTable(metric=metric, rows=tuple(rows), lines=tuple(lines), empty=tuple(empty))


def _columns(results: Results, task: str) -> list[Row]:
    standings = results.standings(task)
    arms = ("zero-shot", "few-shot", "tuned")
    found = [next((row for row in standings if row.arm == arm and row.fusion is None), None) for arm in arms]
    return [row for row in (*found, best_baseline(results, task)) if row is not None]


def _metric(results: Results, task: str, rows: list[Row]) -> str:
    """Return the headline metric if slices carry it; AUC has no slices, and another metric stands in."""
    carried = dict.fromkeys(name for row in rows for part in row.slices for name in part.metrics)
    headline = results.headline[task]
    return headline if headline in carried else next(iter(carried), headline)


def _line(part: SliceOfRow, figures: list[Metric | None], metric: str) -> SliceLine:
    values = [figure.value for figure in figures if figure is not None and figure.value is not None]
    chosen = len(set(values)) > 1 and not part.small
    return SliceLine(
        title=in_words(part.name),
        n=part.n,
        users=part.users,
        small=part.small,
        # One case has no spread to take an interval from.
        figures=tuple(figures if part.n > 1 else map(_bare, figures)),
        best=(min(values) if lower(metric) else max(values)) if chosen else None,
    )


def _bare(figure: Metric | None) -> Metric | None:
    return figure and figure.model_copy(update={"low": None, "high": None})
