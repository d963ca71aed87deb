"""Planned comparisons in words, the same on the pages of suites and of benchmarks."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from llmrec.bench.records import SuiteLine, SuitePair
from llmrec.metrics.significance import detectable_from, detectable_line
from llmrec.report.escape import cell
from llmrec.report.wording import SEEDS, USERS, coverage, difference, outcome, p_value
from llmrec.results import Pair

_NORMAL = 1.96
_NONE = "there is no such request"


def planned_line(pair: Pair, between: str) -> str:
    """Return one planned comparison as text for Markdown.

    Args:
        pair: The comparison.
        between: The word between the two rows.
    """
    found = f"{difference(pair.value, pair.low, pair.high, 4)} ({coverage(pair.level)})"
    return f"{cell(pair.a)} {between} {cell(pair.b)}: {found}, p {cell(p_value(pair.p))}, {outcome(pair.verdict)}"


def planned_lines(pairs: Sequence[SuitePair]) -> list[str]:
    """Return the planned comparisons of a suite's table as a list in Markdown."""
    return [
        f"- {cell(pair.metric)}{_where(pair)}: "
        + (planned_line(pair, "less") if pair.n != 0 else f"{cell(pair.a)} less {cell(pair.b)}: {_NONE}")
        for pair in pairs
    ]


def explored_lines(pairs: Sequence[SuitePair]) -> list[str]:
    """Return comparisons without verdicts as a list in Markdown."""
    return [
        f"- {cell(pair.metric)}{_where(pair)}: {cell(pair.a)} less {cell(pair.b)}: "
        + (difference(pair.value, pair.low, pair.high, 4) if pair.n != 0 else _NONE)
        for pair in pairs
    ]


def _where(pair: SuitePair) -> str:
    """Say on which requests a comparison is, where they are not all."""
    if pair.items is None:
        return ""
    if pair.items == "warm":
        return f", the {pair.n or 0:,} requests for items with training interactions"
    few = ", exploratory" if 0 < (pair.n or 0) < USERS else ""
    items = f", of {pair.clusters:,} items and clustered by these" if pair.clusters else ""
    return f", the {pair.n or 0:,} requests for items without training interactions{items}{few}"


def standing(users: int, seeds: int) -> str:
    """Say that a table is exploratory, with what it has too few of; nothing where it has enough.

    Args:
        users: Whose requests it holds.
        seeds: Of its rows that learn with any randomness.
    """
    few = [f"{users:,} users, fewer than {USERS}"] if users < USERS else []
    few += [f"{seeds} training {'seed' if seeds == 1 else 'seeds'}, fewer than {SEEDS}"] if seeds < SEEDS else []
    if not few:
        return ""
    return f"Exploratory ({'; '.join(few)}): figures and verdicts describe this run; nothing is claimed from them."


def fewer(rows: Sequence[SuiteLine]) -> str:
    """Say which rows have fewer training seeds than their suite, too few to claim anything; nothing without any."""
    few = [f"{row.name} ({len(row.seeds)})" for row in rows if row.fewer_seeds and len(row.seeds) < SEEDS]
    said = f"Exploratory, with fewer than {SEEDS} training seeds, whatever is said of them below"
    return f"{said}: {', '.join(few)}." if few else ""


def drawn(version: str, rows: Collection[str]) -> str:
    """Say that a row ``random`` is one draw; nothing where there is none, or where it is the exact expectation.

    Args:
        version: Of llmrec, which wrote the results.
        rows: Names of the rows.
    """
    if "random" not in rows or not version.startswith("0.1."):
        return ""
    return "An earlier version drew `random` once: its figure is not that of a random ranking; compare no row with it."


def planned_note(comparisons: int, *, earlier: bool) -> str:
    """Say how a file's planned comparisons were tested, over all its tables.

    Args:
        comparisons: How many there are.
        earlier: Whether an earlier version wrote them, which corrected each table by itself.
    """
    over = "The one planned comparison has" if comparisons == 1 else f"The {comparisons} planned comparisons have"
    start = (
        f"{over} p Holm-adjusted over all tables of the file, and the row named first is *significantly better* or "
        "*worse* where it is at most .05."
    )
    if earlier:
        return (
            f"{start} An earlier version wrote these results and corrected p in each table by itself: p is corrected "
            "anew from what it stored, and intervals are unadjusted 95 %, so that one may leave out 0 where p is above "
            ".05."
        )
    return f"{start} Each interval is at the level of its own Holm step, and leaves out 0 exactly there."


def about_detectable(metric: str, pairs: Sequence[Pair], *, users: int) -> str:
    """Say what a table's comparisons could have shown where an earlier version did not store it.

    The standard error of a difference is then about half the width of its 95 % interval over the normal quantile.

    Args:
        metric: What the rows are compared by.
        pairs: Its comparisons, with unadjusted 95 % intervals.
        users: Number of users.
    """
    found = [
        detectable_from((pair.high - pair.low) / 2 / _NORMAL, users)
        for pair in pairs
        if pair.high is not None and pair.low is not None
    ]
    return f"{detectable_line(metric, found, users=users, comparisons=0)} Reckoned from the width of the intervals."
