"""Planned comparisons in words, the same on the pages of suites and of benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from llmrec.metrics.significance import detectable_from, detectable_line
from llmrec.report.escape import cell
from llmrec.report.wording import coverage, difference, outcome, p_value
from llmrec.results import Pair

_NORMAL = 1.96


def planned_line(pair: Pair, between: str) -> str:
    """Return one planned comparison as text for Markdown.

    Args:
        pair: The comparison.
        between: The word between the two rows.
    """
    found = f"{difference(pair.value, pair.low, pair.high, 4)} ({coverage(pair.level)})"
    return f"{cell(pair.a)} {between} {cell(pair.b)}: {found}, p {cell(p_value(pair.p))}, {outcome(pair.verdict)}"


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
