"""Compares models on the same users: planned comparisons with corrected tests, and exploratory ones without tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmrec.errors import LlmrecError
from llmrec.evaluate.figures import mean_interval, statistic_of, taken
from llmrec.metrics.significance import (
    detectable,
    detectable_from,
    detectable_line,
    holm_adjusted,
    over_users_and_seeds,
    required_resamples,
    signflip,
)
from llmrec.metrics.stats import (
    BootstrapDifference,
    Difference,
    Interval,
    MetricValues,
    at_all,
    interval_of,
    mean_of,
    paired_of,
    root_or_not,
    verdict,
)
from llmrec.registry import better, metric_of
from llmrec.results import Figure, Pair

if TYPE_CHECKING:
    from llmrec.metrics.stats import Statistic

# Smaller differences are rounding errors.
_DUST = 1e-12


@dataclass(frozen=True, slots=True)
class ModelValues:
    """The values of a model for comparisons.

    Attributes:
        name: Name of the model.
        value: Its figure; None if undefined, and the model is then not compared.
        values: Its values, as for `compare`.
    """

    name: str
    value: float | None
    values: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Contrast:
    """Two models to compare, a − b, in one metric on the same requests of ``users``."""

    metric: str
    a: ModelValues
    b: ModelValues
    users: Sequence[str]

    def sampled(self, *, resamples: int, seed: int) -> BootstrapDifference:
        """Return the difference between the models, with its bootstrap resamples."""
        return sampled(self.metric, self.a.values, self.b.values, self.users, resamples=resamples, seed=seed)

    def detectable(self, difference: BootstrapDifference, comparisons: int) -> float | None:
        """Return the minimum detectable effect at a power of 80 %.

        Args:
            difference: The result of `sampled`; its resamples give the standard error of metrics that are not means
                and of models with several seeds.
            comparisons: Number of comparisons corrected together.
        """
        if not _is_mean(self.metric) or max(np.ndim(row.values) for row in (self.a, self.b)) > 1:
            # Half the width of the central 68 %, because resamples over seeds have heavy tails.
            low, high = np.quantile(difference.draws, [0.15866, 0.84134])
            return detectable_from(float(high - low) / 2, len(set(self.users)), comparisons=comparisons)
        one, other, users = _means(self.metric, self.a.values, self.b.values, self.users)
        return detectable(one, other, comparisons=comparisons, users=users, statistic=statistic_of(self.metric))


@dataclass(frozen=True, slots=True)
class Plan:
    """The comparisons to make in a table of results, all in one metric.

    ``planned`` comparisons were planned beforehand, and ``described`` ones are exploratory. ``partial`` are planned
    comparisons on a subset of the requests, which the sentence on detectable differences omits.
    """

    metric: str
    planned: Sequence[Contrast]
    described: Sequence[Contrast] = ()
    partial: Sequence[Contrast] = ()


@dataclass(frozen=True, slots=True)
class Comparisons:
    """The comparisons of a `Plan` with their results and minimum detectable effects."""

    planned: Sequence[Pair]
    described: Sequence[Pair]
    partial: Sequence[Pair]
    detectable: str


def compare_tables(tables: Sequence[Plan], *, resamples: int, seed: int = 0, more: int = 0) -> list[Comparisons]:
    """Test the planned comparisons of all tables as one family, and estimate exploratory differences; see `planned`."""
    family = [contrast for table in tables for contrast in (*table.planned, *table.partial)]
    tested = iter(planned(family, resamples=resamples, seed=seed, more=more))
    results = []
    for table in tables:
        planned_pairs, partial = ([next(tested) for _ in contrasts] for contrasts in (table.planned, table.partial))
        described = exploratory(table.described, resamples=resamples, seed=seed)
        # Comparisons may have different numbers of users.
        groups: dict[int, list[Pair]] = {}
        for contrast, pair in zip((*table.planned, *table.described), (*planned_pairs, *described), strict=True):
            groups.setdefault(len(set(contrast.users)), []).append(pair)
        lines = [
            reach(table.metric, pairs, users=users, comparisons=len(family) + more) for users, pairs in groups.items()
        ]
        results.append(Comparisons(planned_pairs, described, partial, " ".join(lines)))
    return results


def planned(contrasts: Sequence[Contrast], *, resamples: int, seed: int = 0, more: int = 0) -> list[Pair]:
    """Test the planned comparisons of all tables as one family.

    p-values and confidence intervals are Holm-adjusted over all of them: an interval excludes 0 exactly if the adjusted
    p is at most .05; see `llmrec.metrics.significance.holm_adjusted`.

    Args:
        contrasts: All planned comparisons of a file.
        resamples: Minimum number; the smallest level of the family may need more.
        seed: Seed of the resamples.
        more: Number of planned comparisons that were not run.
    """
    size = len(contrasts) + more
    results = [contrast.sampled(resamples=required_resamples(resamples, size), seed=seed) for contrast in contrasts]
    return [
        Pair(
            a=contrast.a.name,
            b=contrast.b.name,
            value=decision.value,
            low=decision.low,
            high=decision.high,
            level=decision.level,
            p=decision.p,
            p_raw=decision.p_raw,
            verdict=verdict(
                Difference(decision.value, decision.low, decision.high, decision.p), better(contrast.metric)
            ),
            detectable=contrast.detectable(drawn, size),
        )
        for contrast, drawn, decision in zip(contrasts, results, holm_adjusted(results, more=more), strict=True)
    ]


def exploratory(contrasts: Sequence[Contrast], *, resamples: int, seed: int = 0) -> list[Pair]:
    """Return exploratory differences with unadjusted 95 % intervals."""
    pairs = []
    for contrast in contrasts:
        drawn = contrast.sampled(resamples=resamples, seed=seed)
        result = drawn.at()
        pairs.append(
            Pair(
                a=contrast.a.name,
                b=contrast.b.name,
                value=result.value,
                low=result.low,
                high=result.high,
                detectable=contrast.detectable(drawn, 1),
            )
        )
    return pairs


def reach(metric: str, pairs: Sequence[Pair], *, users: int, comparisons: int) -> str:
    """Return a sentence on the minimum detectable effects of planned and exploratory comparisons.

    ``pairs`` are comparisons of both kinds in one metric, and ``comparisons`` is the size of the planned family.
    """
    lines = []
    for many in dict.fromkeys((comparisons, 0)):
        results = [pair.detectable for pair in pairs if (pair.verdict is not None) == (many > 0)]
        if results:
            lines.append(detectable_line(metric, results, users=users, comparisons=many))
    return " ".join(lines)


def compare(
    metric: str,
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    users: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> Difference:
    """Compare two models with an unadjusted 95 % interval; see `sampled`."""
    return sampled(metric, a, b, users, resamples=resamples, seed=seed).at()


def sampled(
    metric: str,
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    users: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> BootstrapDifference:
    """Return the paired difference a − b of two models on the same requests of ``users``.

    Means are compared by a sign-flip test over users, see `significance`: RMSE as a root mean of squared errors, GAUC
    over the users with both classes. AUC is not a mean and gets the paired bootstrap.

    A model may have several seeds. Values are averaged over them first; for metrics that are not means over requests
    the figures are averaged, since the AUC of averaged probabilities would be that of an ensemble. The variance over
    seeds is added to that over users, see `llmrec.metrics.significance.over_users_and_seeds`.

    Args:
        metric: Name of the metric.
        a: Values of the first model from `Evaluated.values`, shape (n,) or (seeds, n). For metrics that are not means
            over requests these are probabilities, with a minus sign (also for 0) where the truth is no.
        b: Values of the second model.
        users: The user of each request.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Raises:
        LlmrecError: If models of probabilities have different truths, or the metric is undefined for one of them.
    """
    if not _is_mean(metric):
        truth = _truth(metric, *np.atleast_2d(a), *np.atleast_2d(b))
        first, second = (mean_of(_statistics(metric, np.atleast_2d(row), truth, users)) for row in (a, b))
        difference = paired_of(lambda rows: first(rows) - second(rows), len(set(users)), resamples=resamples, seed=seed)
    else:
        one, other, owners = _means(metric, a, b, users)
        difference = signflip(one, other, users=owners, resamples=resamples, seed=seed, statistic=statistic_of(metric))
    return over_users_and_seeds(difference, *(_by_seed(metric, row, users) for row in (a, b)), seed=seed)


def _by_seed(metric: str, values: NDArray[np.float64], users: Sequence[str]) -> NDArray[np.float64]:
    """Return the result of each seed of a model, shape (seeds,)."""
    seeds = np.atleast_2d(values)
    if len(seeds) == 1:
        return np.zeros(1)
    if is_by_request(metric):
        return np.asarray(root_or_not(seeds.mean(axis=1), statistic_of(metric)))
    truth = _truth(metric, *seeds)
    if not _is_mean(metric):
        return np.array([at_all(entry, len(set(users))) for entry in _statistics(metric, seeds, truth, users)])
    return np.array([np.mean(np.asarray(_recompute(metric, row, truth, users).result)) for row in seeds])


def is_by_request(metric: str) -> bool:
    """Whether a metric is a mean over requests, so that its values can be averaged over seeds."""
    entry = metric_of(metric)
    return entry is None or entry.unit == "request"


def _is_mean(metric: str) -> bool:
    entry = metric_of(metric)
    return entry is None or entry.unit != "all"


def _means(
    metric: str, a: NDArray[np.float64], b: NDArray[np.float64], users: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64], Sequence[str] | None]:
    """Return the values of two models, averaged over seeds or aggregated by user."""
    left, right = np.atleast_2d(a), np.atleast_2d(b)
    if is_by_request(metric):
        first, second = left.mean(axis=0), right.mean(axis=0)
        # Means of equal values over different numbers of seeds may differ by rounding.
        return first, np.where(np.abs(first - second) < _DUST, first, second), users
    truth = _truth(metric, *left, *right)
    of_users = ([_recompute(metric, row, truth, users) for row in seeds] for seeds in (left, right))
    first, second = (np.mean([np.asarray(result.result) for result in seeds], axis=0) for seeds in of_users)
    return first, second, None


def _recompute(
    metric: str, values: NDArray[np.float64], truth: NDArray[np.bool_], users: Sequence[str]
) -> MetricValues:
    """Recompute a metric of probabilities from the stored values of a model."""
    entry = metric_of(metric)
    assert entry is not None
    inputs = {"probabilities": np.abs(values), "labels": truth, "owners": users}
    result = taken(metric, entry, inputs)
    if result is None or result.result is None:
        raise LlmrecError(
            f"{metric} cannot be compared: {result.undefined if result else 'it was not computed'}", kind="too-few"
        )
    return result


def _statistics(
    metric: str, seeds: NDArray[np.float64], truth: NDArray[np.bool_], users: Sequence[str]
) -> list[Statistic]:
    results = [_recompute(metric, row, truth, users).result for row in seeds]
    return [result for result in results if callable(result)]


def _truth(metric: str, *rows: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return the true answers, which are stored as the signs of the values."""
    truth: NDArray[np.bool_] = ~np.signbit(rows[0])
    if any(not np.array_equal(truth, ~np.signbit(row)) for row in rows):
        raise LlmrecError(
            f"{metric}: the two models were evaluated with different targets, so they cannot be compared",
            kind="mismatch",
        )
    return truth


def average_over_seeds(
    figures: Sequence[Figure],
    values: Sequence[NDArray[np.float64]] = (),
    *,
    metric: str,
    users: Sequence[str],
    resamples: int,
) -> Figure:
    """Average a result over training seeds; the interval is over users, and ``sd`` over seeds.

    Args:
        figures: One per seed.
        values: Per-request values of each seed from `Evaluated.values`; users are resampled jointly for all seeds.
            Without them the interval is the mean of the seeds' intervals, which is wider.
        metric: Name of the metric.
        users: The user of each request.
        resamples: Number of resamples.

    Returns:
        The average, with the signature of the first figure; or the first undefined figure with its reason.
    """
    result = next((figure for figure in figures if figure.value is None), figures[0])
    if len(figures) == 1:
        return result

    def mean(ends: Sequence[float | None]) -> float | None:
        known = [end for end in ends if end is not None]
        return float(np.mean(known)) if len(known) == len(ends) else None

    by_seed = [figure.value for figure in figures]
    low, high = mean([figure.low for figure in figures]), mean([figure.high for figure in figures])
    if len(values) == len(figures) and None not in by_seed:
        spread = _interval(metric, values, users, resamples)
        low, high = spread.low, spread.high
    return result.model_copy(
        update={
            "value": mean(by_seed),
            "low": low,
            "high": high,
            "sd": None if None in by_seed else float(np.std(np.array(by_seed, dtype=np.float64), ddof=1)),
        }
    )


def _interval(metric: str, seeds: Sequence[NDArray[np.float64]], users: Sequence[str], resamples: int) -> Interval:
    """Return the confidence interval of a result averaged over seeds."""
    values, owners = np.array(seeds, dtype=np.float64), list(users)
    if not _is_mean(metric):
        statistic = mean_of(_statistics(metric, values, _truth(metric, *values), users))
        return interval_of(statistic, len(set(users)), resamples=resamples, seed=0)
    if not is_by_request(metric):
        results = [_recompute(metric, row, _truth(metric, *values), users) for row in values]
        values, owners = np.array([item.result for item in results]), list(results[0].users or ())
    return mean_interval(metric, values, owners, resamples=resamples, seed=0)
