"""Compares the rows of a suite over the same users: the best with every other, and pairs that were named beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.evaluate import LOWER_IS_BETTER, compare, statistic_of
from llmrec.metrics.significance import detectable, detectable_line
from llmrec.metrics.stats import holm, verdict
from llmrec.suites import Suite

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
        """Pair the best row with every other, p-values Holm-adjusted; say what the comparisons could have shown."""
        best = max(self.rows, key=lambda row: self._sign * row["tables"][seen]["metrics"][self.metric]["value"])
        others = [row for row in self.rows if row is not best]
        if not others:
            return [], ""
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
        return self._lines(seen, [(named[a], named[b]) for a, b in self.suite.pairs])

    @property
    def _sign(self) -> int:
        return -1 if self.metric in LOWER_IS_BETTER else 1

    def _values(self, row: Mapping[str, Any], seen: str) -> NDArray[np.float64]:
        return np.array(row["values"][seen][self.metric])

    def _lines(self, seen: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[dict[str, Any]]:
        found = [
            compare(
                self.metric,
                self._values(a, seen),
                self._values(b, seen),
                users=self.users,
                resamples=self.suite.bootstrap,
                seed=0,
            )
            for a, b in pairs
        ]
        return [
            {
                "seen": seen,
                "metric": self.metric,
                "a": a["name"],
                "b": b["name"],
                "value": difference.value,
                "low": difference.low,
                "high": difference.high,
                "p": p,
                "verdict": verdict(difference, "higher" if self._sign > 0 else "lower", p=p),
            }
            for (a, b), difference, p in zip(pairs, found, holm([d.p for d in found]), strict=True)
        ]
