"""Compares rows over the same users: two of them, the best with every other, and pairs that were named beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmrec.errors import LlmrecError
from llmrec.evaluate.figures import statistic_of
from llmrec.metrics import probability
from llmrec.metrics.significance import detectable, detectable_line, signflip
from llmrec.metrics.stats import Difference, holm, paired_of, verdict
from llmrec.results import Better, Figure, Pair, better, lower


@dataclass(frozen=True, slots=True)
class Standing:
    """A row as comparisons need it.

    Attributes:
        name: Of the row.
        value: Its figure; a row whose figure is not defined, None, is compared with none.
        values: Its values as `compare` takes them.
    """

    name: str
    value: float | None
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Comparing:
    """What the comparisons of one table share.

    Attributes:
        metric: What rows are compared by.
        rows: The rows of the table.
        users: The user of each request.
        resamples: Of the intervals and tests.
    """

    metric: str
    rows: Sequence[Standing]
    users: Sequence[str]
    resamples: int

    def best_with_others(self) -> tuple[list[Pair], str]:
        """Pair the best row with every other, p-values Holm-adjusted; say what the comparisons could have shown."""
        rows = [row for row in self.rows if row.value is not None]
        if len(rows) < 2:
            return [], ""
        sign = -1 if lower(self.metric) else 1
        best = max(rows, key=lambda row: sign * (row.value or 0.0))
        others = [row for row in rows if row is not best]
        found = self._compared([(best, row) for row in others])
        if self.metric == "AUC":
            return found, ""  # no mean over users, so it has no such line
        statistic = statistic_of(self.metric)
        small = [
            detectable(best.values, row.values, comparisons=len(others), users=self.users, statistic=statistic)
            for row in others
        ]
        return found, detectable_line(self.metric, small, users=len(set(self.users)), comparisons=len(others))

    def pairs(self, names: Iterable[tuple[str, str]]) -> list[Pair]:
        """Compare pairs by name, p-values Holm-adjusted among them."""
        rows: Mapping[str, Standing] = {row.name: row for row in self.rows}
        asked = [(rows[a], rows[b]) for a, b in names]
        return self._compared([pair for pair in asked if None not in (pair[0].value, pair[1].value)])

    def _compared(self, pairs: Sequence[tuple[Standing, Standing]]) -> list[Pair]:
        found = [
            compare(self.metric, a.values, b.values, self.users, resamples=self.resamples, seed=0) for a, b in pairs
        ]
        return judged([(a.name, b.name) for a, b in pairs], found, better(self.metric))


def compare(
    metric: str,
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    users: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> Difference:
    """Pair two rows over the same requests of ``users``, a less b.

    Means are compared by flipping signs over users, see `significance`; RMSE as a root mean of squared errors; GAUC
    over the users who have both classes. AUC is no mean over users and gets the paired bootstrap.

    A row may have been made with several seeds. Values are averaged over them first; AUC and GAUC, which are no means
    of a request's values, are averaged themselves: the AUC of averaged probabilities would be that of an ensemble.

    Args:
        metric: Name of the metric.
        a: Values of the first row as `Evaluated.values` has them, shape (n,), or (seeds, n). For AUC and GAUC these are
            the probabilities, with a minus sign (also before 0) where the truth is no.
        b: Values of the second row.
        users: Whose request each value is.
        resamples: Number of resamples.
        seed: Seeds them.

    Raises:
        LlmrecError: If rows of AUC or GAUC have different truths, or no user has both classes.
    """
    left, right = np.atleast_2d(a), np.atleast_2d(b)
    if metric in ("AUC", "GAUC"):
        return _compare_auc(metric, left, right, users, resamples=resamples, seed=seed)
    first, second = left.mean(axis=0), right.mean(axis=0)
    return signflip(first, second, users=users, resamples=resamples, seed=seed, statistic=statistic_of(metric))


def _compare_auc(
    metric: str, a: NDArray[np.float64], b: NDArray[np.float64], users: Sequence[str], *, resamples: int, seed: int
) -> Difference:
    truth = ~np.signbit(a[0])
    if any(not np.array_equal(truth, ~np.signbit(each)) for each in (*a, *b)):
        raise LlmrecError(f"{metric}: the two rows have different truths, so they cannot be paired", kind="mismatch")
    if metric == "AUC":
        first, second = ([probability.auc_statistic(np.abs(each), truth, users) for each in seeds] for seeds in (a, b))

        def difference(rows: NDArray[np.intp]) -> NDArray[np.float64]:
            one, other = (np.mean([auc(rows) for auc in seeds], axis=0) for seeds in (first, second))
            return one - other  # type: ignore[no-any-return]

        return paired_of(difference, len(set(users)), resamples=resamples, seed=seed)
    left, right = (
        np.mean([probability.gauc(np.abs(each), truth, users).values for each in seeds], axis=0) for seeds in (a, b)
    )
    both = np.isfinite(left)
    if not both.any():
        raise LlmrecError("GAUC: no user has both a yes and a no, so there is nothing to compare", kind="too-few")
    return signflip(left[both], right[both], resamples=resamples, seed=seed)


def judged(pairs: Sequence[tuple[str, str]], found: Sequence[Difference], better: Better) -> list[Pair]:
    """Return differences of named rows, p-values Holm-adjusted among them."""
    return [
        Pair(
            a=one,
            b=other,
            value=difference.value,
            low=difference.low,
            high=difference.high,
            p=p,
            verdict=verdict(difference, better, p=p),
        )
        for (one, other), difference, p in zip(pairs, found, holm([each.p for each in found]), strict=True)
    ]


def over_runs(figures: Sequence[Figure]) -> Figure:
    """Average a figure over training seeds: an interval covers the choice of users, ``sd`` is the seeds' own spread.

    Args:
        figures: One a seed.

    Returns:
        The signature of the first one, or of the first that is not defined, with its reason.
    """
    found = next((figure for figure in figures if figure.value is None), figures[0])
    if len(figures) == 1:
        return found

    def mean(ends: Sequence[float | None]) -> float | None:
        known = [end for end in ends if end is not None]
        return float(np.mean(known)) if len(known) == len(ends) else None

    each = [figure.value for figure in figures]
    return found.model_copy(
        update={
            "value": mean(each),
            "low": mean([figure.low for figure in figures]),
            "high": mean([figure.high for figure in figures]),
            "sd": None if None in each else float(np.std(np.array(each, dtype=np.float64), ddof=1)),
        }
    )
