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
from llmrec.report.wording import DASH, arm_label, label, listed, p_value
from llmrec.results import AtPosition, Results, Row, Trend

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

    @property
    def mean_rank(self) -> str:
        """The mean rank with one decimal; few requests bear no more."""
        return f"{self.rank:.1f}"

    @property
    def rank_bounds(self) -> str:
        """Its interval; empty for a single request."""
        low, high = self.rank_low, self.rank_high
        return "" if low is None or high is None else f"[{low:.1f}, {high:.1f}]".replace("-", "−")


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
    """Say which rows of language models prefer early or late positions, and of which it is not shown.

    Rows of one setting and strategy, which differ in their template, are named together.
    """
    tested = [row for row in results.rows if row.task == task and row.position_trend is not None]
    named = {end: _named([row for row in tested if _end(row) == end], tested) for end in ("early", "late", "")}
    found = [
        f"The {way} the target stands among its candidates, the better it is ranked by {listed(named[end])}."
        for end, way in (("early", "earlier"), ("late", "later"))
        if named[end]
    ]
    if named[""] and not found:
        return ("No language-model row is shown to prefer either end of the list.",)
    return (*found, *([f"No such preference is shown for {listed(named[''])}."] if named[""] else []))


def trend_words(trend: Trend) -> str:
    """Return a row's rank correlation and its corrected p in words."""
    return _correlation([trend])


def _end(row: Row) -> str:
    return (row.position_trend.prefers if row.position_trend else None) or ""


def _named(rows: Sequence[Row], tested: Sequence[Row]) -> list[str]:
    """Return one name for the rows of a setting and strategy, with what was found where they prefer an end."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.arm, row.predictor), []).append(row)
    found = []
    for (arm, predictor), own in groups.items():
        of = sum((row.arm, row.predictor) == (arm, predictor) for row in tested)
        share = ("both" if of == 2 else f"all {of}") if len(own) == of else f"{len(own)} of {of}"
        name = label(own[0]) if of == 1 else f"{arm_label(arm, predictor)} with {share} templates"
        said = f" ({_correlation([row.position_trend for row in own if row.position_trend])})" if _end(own[0]) else ""
        found.append(f"{name}{said}")
    return found


def _correlation(trends: Sequence[Trend]) -> str:
    values = [f"{value:+.2f}".replace("-", "−") for value in sorted(t.rho for t in trends if t.rho is not None)]
    ends = list(dict.fromkeys((values[0], values[-1]))) if values else [DASH]
    known = [trend.p for trend in trends if trend.p is not None]
    p = p_value(max(known, default=None))
    is_p = p if p[0] in f"<{DASH}" else f"= {p}" if len(known) == 1 else f"at most {p}"
    return f"rank correlation {' to '.join(ends)}, corrected p {is_p}"
