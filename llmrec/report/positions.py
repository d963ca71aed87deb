"""Position bias: how a row fares by the place at which the target stands among its candidates.

Neighbouring places are pooled into bands of some twenty requests each. Intervals take requests for independent, which
they are where each user has one: Wilson's for the share of hits (JASA 1927), which also has a width where all or no
requests hit, and Student's for the mean rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import ndtri, stdtrit

from llmrec.report.marks import best_baseline
from llmrec.report.records import AtPosition, Results, Row, Trend
from llmrec.report.wording import DASH, label, listed, p_value

_A_BAND = 20  # requests
_Z = float(ndtri(0.975))


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Requests whose target stands from place ``first`` to place ``last``; hits and ranks with 95 % intervals."""

    first: int
    last: int
    n: int
    hit: float
    hit_low: float
    hit_high: float
    rank: float
    rank_low: float | None
    rank_high: float | None

    @property
    def name(self) -> str:
        """The places as text, such as ``5–8``."""
        return str(self.first) if self.first == self.last else f"{self.first}–{self.last}"


def has_positions(results: Results, task: str) -> bool:
    """Say whether any row of a task can be shown by position."""
    return any(bands(row) for row in results.rows if row.task == task)


def shown_rows(results: Results, task: str) -> tuple[Row, ...]:
    """Return the language-model rows with positions, as they were evaluated, and the best baseline as the control."""
    rows = [row for row in results.rows if row.task == task and row.arm != "baseline" and bands(row)]
    control = best_baseline(results, task)
    return (*rows, *([control] if control is not None and bands(control) else []))


def bands(row: Row) -> tuple[Band, ...]:
    """Pool a row's positions into bands of neighbours, as alike in width as can be."""
    entries = sorted((entry for entry in row.by_position if _usable(entry)), key=lambda entry: entry.position)
    if not entries:
        return ()
    last = entries[-1].position
    wanted = min(len(entries), max(2, sum(entry.n for entry in entries) // _A_BAND))
    edges = [round(place * last / wanted) for place in range(wanted + 1)]
    found = []
    for low, high in itertools.pairwise(edges):
        own = [entry for entry in entries if low < entry.position <= high]
        if own:
            found.append(_band(low + 1, high, own))
    return tuple(found)


def _usable(entry: AtPosition) -> bool:
    return entry.n > 0 and entry.position > 0 and entry.hit is not None and entry.rank is not None


def _band(first: int, last: int, entries: Sequence[AtPosition]) -> Band:
    n = sum(entry.n for entry in entries)
    hit = sum(entry.n * (entry.hit or 0.0) for entry in entries) / n
    rank = sum(entry.n * (entry.rank or 0.0) for entry in entries) / n
    # Squares within the positions and between them, as in an analysis of variance.
    squares = sum(
        (entry.n - 1) * (entry.rank_sd or 0.0) ** 2 + entry.n * ((entry.rank or 0.0) - rank) ** 2 for entry in entries
    )
    half = float(stdtrit(n - 1, 0.975)) * math.sqrt(squares / (n - 1) / n) if n > 1 else None
    low, high = wilson(hit, n)
    return Band(
        first=first,
        last=last,
        n=n,
        hit=hit,
        hit_low=low,
        hit_high=high,
        rank=rank,
        rank_low=None if half is None else rank - half,
        rank_high=None if half is None else rank + half,
    )


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share of n requests."""
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(max(0.0, share * (1 - share) / n + _Z**2 / (4 * n**2)))
    return max(0.0, centre - half), min(1.0, centre + half)


def sentences(results: Results, task: str) -> tuple[str, ...]:
    """Say which rows of language models prefer early or late positions, and of which it is not shown."""
    groups: dict[str, list[str]] = {"early": [], "late": [], "": []}
    for row in results.rows:
        trend = row.position_trend
        if row.task == task and trend is not None:
            groups[trend.prefers or ""].append(
                label(row) if trend.prefers is None else f"{label(row)} ({_said(trend)})"
            )
    found = [
        f"The {way} the target stands among its candidates, the better it is ranked by {listed(groups[end])}."
        for end, way in (("early", "earlier"), ("late", "later"))
        if groups[end]
    ]
    if groups[""] and not found:
        return ("No language-model row is shown to prefer either end of the list.",)
    return (*found, *([f"No such preference is shown for {listed(groups[''])}."] if groups[""] else []))


def _said(trend: Trend) -> str:
    rho = DASH if trend.rho is None else f"{trend.rho:+.2f}".replace("-", "−")
    p = p_value(trend.p)
    return f"rank correlation {rho}, corrected p {p if p.startswith('<') else f'= {p}'}"
