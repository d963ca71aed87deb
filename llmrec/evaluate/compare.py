"""Compares rows over the same users: of a suite the best with every other, and pairs that were named beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.evaluate.predictor import compare, statistic_of
from llmrec.metrics.significance import detectable, detectable_line
from llmrec.metrics.stats import Difference, holm, verdict
from llmrec.recipe.comparisons import Suite
from llmrec.results import Better, better, lower

if TYPE_CHECKING:
    from numpy.typing import NDArray

    #: A row's name, and its value of each request.
    Named = tuple[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Comparing:
    """What comparisons share.

    Attributes:
        suite: Its ``bootstrap`` and ``pairs``.
        rows: Finished rows, with their per-request values.
        users: The user of each request.
        metric: What rows are compared by.
    """

    suite: Suite
    rows: Sequence[Mapping[str, Any]]
    users: Sequence[str]
    metric: str

    def best_with_others(self, seen: str) -> tuple[list[dict[str, Any]], str]:
        """Pair the best row with every other, p-values Holm-adjusted; say what the comparisons could have shown.

        A row whose figure is not defined is compared with none.
        """
        rows = [row for row in self.rows if self._value(row, seen) is not None]
        if len(rows) < 2:
            return [], ""
        best = max(rows, key=lambda row: self._sign * (self._value(row, seen) or 0.0))
        others = [row for row in rows if row is not best]
        lines = self._lines(seen, [(best, row) for row in others])
        if self.metric == "AUC":
            return lines, ""  # no mean over users, so it has no such line
        statistic, own = statistic_of(self.metric), self._values(best, seen)
        small = [
            detectable(own, self._values(row, seen), comparisons=len(others), users=self.users, statistic=statistic)
            for row in others
        ]
        return lines, detectable_line(self.metric, small, users=len(set(self.users)), comparisons=len(others))

    def pairs(self, seen: str) -> list[dict[str, Any]]:
        """Compare the pairs that the suite names, p-values Holm-adjusted among them."""
        named = {row["name"]: row for row in self.rows}
        asked = [(named[a], named[b]) for a, b in self.suite.pairs]
        return self._lines(seen, [pair for pair in asked if None not in (self._value(row, seen) for row in pair)])

    @property
    def _sign(self) -> int:
        return -1 if lower(self.metric) else 1

    def _value(self, row: Mapping[str, Any], seen: str) -> float | None:
        found: float | None = row["tables"][seen]["metrics"][self.metric]["value"]
        return found

    def _values(self, row: Mapping[str, Any], seen: str) -> NDArray[np.float64]:
        return np.array(row["values"][seen][self.metric])

    def _lines(self, seen: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[dict[str, Any]]:
        named = [tuple((row["name"], self._values(row, seen)) for row in pair) for pair in pairs]
        found = compared(self.metric, named, self.users, resamples=self.suite.bootstrap)
        return [{"seen": seen, "metric": self.metric, **line} for line in found]


def compared(
    metric: str, pairs: Sequence[tuple[Named, ...]], users: Sequence[str], *, resamples: int
) -> list[dict[str, Any]]:
    """Pair rows over the same requests, each a less b, p-values Holm-adjusted among the pairs.

    Args:
        metric: What they are compared by.
        pairs: Two rows each, a and b, with their values as `llmrec.evaluate.predictor.compare` takes them.
        users: The user of each request.
        resamples: Of the intervals and tests.
    """
    found = [compare(metric, a, b, users, resamples=resamples, seed=0) for (_, a), (_, b) in pairs]
    return judged([(one, other) for (one, _), (other, _) in pairs], found, better(metric))


def judged(pairs: Sequence[tuple[str, str]], found: Sequence[Difference], better: Better) -> list[dict[str, Any]]:
    """Return differences of named rows as lines of a table, p-values Holm-adjusted among them."""
    return [
        {
            "a": one,
            "b": other,
            "value": difference.value,
            "low": difference.low,
            "high": difference.high,
            "p": p,
            "verdict": verdict(difference, better, p=p),
        }
        for (one, other), difference, p in zip(pairs, found, holm([each.p for each in found]), strict=True)
    ]


def over_runs(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average a figure over training seeds: an interval covers the choice of users, ``sd`` is the seeds' own spread.

    Args:
        figures: One a seed, with ``value``, ``low`` and ``high``, each None where it is not defined.

    Returns:
        The other keys as they are, of the first one, or of the first that is not defined.
    """
    found = dict(next((figure for figure in figures if figure["value"] is None), figures[0]))
    if len(figures) == 1:
        return found
    for end in ("value", "low", "high"):
        ends = [figure[end] for figure in figures]
        found[end] = None if None in ends else float(np.mean(ends))
    each = [figure["value"] for figure in figures]
    found["sd"] = None if None in each else float(np.std(each, ddof=1))
    return found
