"""Compares models on the same users: planned comparisons with corrected tests, and exploratory ones without tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmrec.errors import LlmrecError
from llmrec.evaluate.figures import compute_metric, mean_interval, metric_statistic
from llmrec.metrics.significance import (
    add_seed_variance,
    describe_detectable_effects,
    detectable_effect,
    detectable_effect_from_error,
    holm_adjusted,
    required_resamples,
    sign_flip_test,
)
from llmrec.metrics.stats import (
    BootstrapDifference,
    Difference,
    Interval,
    MetricValues,
    averaged_statistic,
    full_sample_value,
    paired_statistic_difference,
    statistic_from_means,
    statistic_interval,
    verdict,
)
from llmrec.registry import find_metric, metric_direction
from llmrec.results import Figure, Pair

if TYPE_CHECKING:
    from llmrec.metrics.stats import Statistic

# Smaller differences are rounding errors.
_ROUNDING_TOLERANCE = 1e-12


@dataclass(frozen=True, slots=True)
class ModelValues:
    """The values of a model for comparisons.

    Attributes:
        name: Name of the model.
        value: Its figure; None if undefined, and the model is then not compared.
        values: Its values, as for `compare_values`.
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
        return resampled_difference(
            self.metric, self.a.values, self.b.values, self.users, resamples=resamples, seed=seed
        )

    def detectable(self, difference: BootstrapDifference, comparisons: int) -> float | None:
        """Return the minimum detectable effect at a power of 80 %.

        Args:
            difference: The result of `resampled_difference`; its resamples give the standard error of metrics that are
                not means and of models with several seeds.
            comparisons: Number of comparisons corrected together.
        """
        if not _is_mean_metric(self.metric) or max(np.ndim(row.values) for row in (self.a, self.b)) > 1:
            # Half the width of the central 68 %, because resamples over seeds have heavy tails.
            low, high = np.quantile(difference.draws, [0.15866, 0.84134])
            return detectable_effect_from_error(float(high - low) / 2, len(set(self.users)), comparisons=comparisons)
        one, other, users = _paired_values(self.metric, self.a.values, self.b.values, self.users)
        return detectable_effect(
            one, other, comparisons=comparisons, users=users, statistic=metric_statistic(self.metric)
        )


@dataclass(frozen=True, slots=True)
class ComparisonPlan:
    """The comparisons to make in a table of results, all in one metric.

    ``planned`` comparisons were planned beforehand, and ``described`` ones are exploratory. ``partial`` are planned
    comparisons on a subset of the requests, which the sentence on detectable differences omits.
    """

    metric: str
    planned: Sequence[Contrast]
    described: Sequence[Contrast] = ()
    partial: Sequence[Contrast] = ()


@dataclass(frozen=True, slots=True)
class TableComparisons:
    """The comparisons of a `ComparisonPlan` with their results and minimum detectable effects."""

    planned: Sequence[Pair]
    described: Sequence[Pair]
    partial: Sequence[Pair]
    detectable: str


def compare_tables(
    tables: Sequence[ComparisonPlan], *, resamples: int, seed: int = 0, more: int = 0
) -> list[TableComparisons]:
    """Test the planned comparisons of all tables as one family, and estimate exploratory differences.

    See `compare_planned`.
    """
    family = [contrast for table in tables for contrast in (*table.planned, *table.partial)]
    tested = iter(compare_planned(family, resamples=resamples, seed=seed, more=more))
    results = []
    for table in tables:
        planned_pairs, partial = ([next(tested) for _ in contrasts] for contrasts in (table.planned, table.partial))
        described = compare_exploratory(table.described, resamples=resamples, seed=seed)
        # Comparisons may have different numbers of users.
        groups: dict[int, list[Pair]] = {}
        for contrast, pair in zip((*table.planned, *table.described), (*planned_pairs, *described), strict=True):
            groups.setdefault(len(set(contrast.users)), []).append(pair)
        lines = [
            describe_effects_by_kind(table.metric, pairs, users=users, comparisons=len(family) + more)
            for users, pairs in groups.items()
        ]
        results.append(TableComparisons(planned_pairs, described, partial, " ".join(lines)))
    return results


def compare_planned(contrasts: Sequence[Contrast], *, resamples: int, seed: int = 0, more: int = 0) -> list[Pair]:
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
            verdict=verdict(decision, metric_direction(contrast.metric)),
            detectable=contrast.detectable(drawn, size),
        )
        for contrast, drawn, decision in zip(contrasts, results, holm_adjusted(results, more=more), strict=True)
    ]


def compare_exploratory(contrasts: Sequence[Contrast], *, resamples: int, seed: int = 0) -> list[Pair]:
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


def describe_effects_by_kind(metric: str, pairs: Sequence[Pair], *, users: int, comparisons: int) -> str:
    """Return a sentence on the minimum detectable effects of planned and exploratory comparisons.

    ``pairs`` are comparisons of both kinds in one metric, and ``comparisons`` is the size of the planned family.
    """
    lines = []
    for many in dict.fromkeys((comparisons, 0)):
        results = [pair.detectable for pair in pairs if (pair.verdict is not None) == (many > 0)]
        if results:
            lines.append(describe_detectable_effects(metric, results, users=users, comparisons=many))
    return " ".join(lines)


def compare_values(
    metric: str,
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    users: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> Difference:
    """Compare two models with an unadjusted 95 % interval; see `resampled_difference`."""
    return resampled_difference(metric, a, b, users, resamples=resamples, seed=seed).at()


def resampled_difference(
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
    seeds is added to that over users, see `llmrec.metrics.significance.add_seed_variance`.

    Args:
        metric: Name of the metric.
        a: Values of the first model from `EvaluationResult.values`, shape (n,) or (seeds, n). For metrics that are not
            means over requests these are probabilities, with a minus sign (also for 0) where the truth is no.
        b: Values of the second model.
        users: The user of each request.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Raises:
        LlmrecError: If models of probabilities have different truths, or the metric is undefined for one of them.
    """
    if not _is_mean_metric(metric):
        truth = _truth_from_signs(metric, *np.atleast_2d(a), *np.atleast_2d(b))
        first, second = (
            averaged_statistic(_seed_statistics(metric, np.atleast_2d(row), truth, users)) for row in (a, b)
        )
        difference = paired_statistic_difference(
            lambda rows: first(rows) - second(rows), len(set(users)), resamples=resamples, seed=seed
        )
    else:
        one, other, owners = _paired_values(metric, a, b, users)
        difference = sign_flip_test(
            one, other, users=owners, resamples=resamples, seed=seed, statistic=metric_statistic(metric)
        )
    return add_seed_variance(difference, *(_results_by_seed(metric, row, users) for row in (a, b)), seed=seed)


def _results_by_seed(metric: str, values: NDArray[np.float64], users: Sequence[str]) -> NDArray[np.float64]:
    """Return the result of each seed of a model, shape (seeds,)."""
    seeds = np.atleast_2d(values)
    if len(seeds) == 1:
        return np.zeros(1)
    if is_request_mean(metric):
        return np.asarray(statistic_from_means(seeds.mean(axis=1), metric_statistic(metric)))
    truth = _truth_from_signs(metric, *seeds)
    if not _is_mean_metric(metric):
        return np.array(
            [full_sample_value(entry, len(set(users))) for entry in _seed_statistics(metric, seeds, truth, users)]
        )
    return np.array([np.mean(np.asarray(_recompute_metric(metric, row, truth, users).result)) for row in seeds])


def is_request_mean(metric: str) -> bool:
    """Whether a metric is a mean over requests, so that its values can be averaged over seeds."""
    entry = find_metric(metric)
    return entry is None or entry.unit == "request"


def _is_mean_metric(metric: str) -> bool:
    entry = find_metric(metric)
    return entry is None or entry.unit != "all"


def _paired_values(
    metric: str, a: NDArray[np.float64], b: NDArray[np.float64], users: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64], Sequence[str] | None]:
    """Return the values of two models, averaged over seeds or aggregated by user."""
    left, right = np.atleast_2d(a), np.atleast_2d(b)
    if is_request_mean(metric):
        first, second = left.mean(axis=0), right.mean(axis=0)
        # Means of equal values over different numbers of seeds may differ by rounding.
        return first, np.where(np.abs(first - second) < _ROUNDING_TOLERANCE, first, second), users
    truth = _truth_from_signs(metric, *left, *right)
    of_users = ([_recompute_metric(metric, row, truth, users) for row in seeds] for seeds in (left, right))
    first, second = (np.mean([np.asarray(result.result) for result in seeds], axis=0) for seeds in of_users)
    return first, second, None


def _recompute_metric(
    metric: str, values: NDArray[np.float64], truth: NDArray[np.bool_], users: Sequence[str]
) -> MetricValues:
    """Recompute a metric of probabilities from the stored values of a model."""
    entry = find_metric(metric)
    assert entry is not None
    inputs = {"probabilities": np.abs(values), "labels": truth, "owners": users}
    result = compute_metric(metric, entry, inputs)
    if result is None or result.result is None:
        raise LlmrecError(
            f"{metric} cannot be compared: {result.undefined if result else 'it was not computed'}", kind="too-few"
        )
    return result


def _seed_statistics(
    metric: str, seeds: NDArray[np.float64], truth: NDArray[np.bool_], users: Sequence[str]
) -> list[Statistic]:
    results = [_recompute_metric(metric, row, truth, users).result for row in seeds]
    return [result for result in results if callable(result)]


def _truth_from_signs(metric: str, *rows: NDArray[np.float64]) -> NDArray[np.bool_]:
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
        values: Per-request values of each seed from `EvaluationResult.values`; users are resampled jointly for all
            seeds. Without them the interval is the mean of the seeds' intervals, which is wider.
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
        spread = _seed_average_interval(metric, values, users, resamples)
        low, high = spread.low, spread.high
    return result.model_copy(
        update={
            "value": mean(by_seed),
            "low": low,
            "high": high,
            "sd": None if None in by_seed else float(np.std(np.array(by_seed, dtype=np.float64), ddof=1)),
        }
    )


def _seed_average_interval(
    metric: str, seeds: Sequence[NDArray[np.float64]], users: Sequence[str], resamples: int
) -> Interval:
    """Return the confidence interval of a result averaged over seeds."""
    values, owners = np.array(seeds, dtype=np.float64), list(users)
    if not _is_mean_metric(metric):
        statistic = averaged_statistic(_seed_statistics(metric, values, _truth_from_signs(metric, *values), users))
        return statistic_interval(statistic, len(set(users)), resamples=resamples, seed=0)
    if not is_request_mean(metric):
        results = [_recompute_metric(metric, row, _truth_from_signs(metric, *values), users) for row in values]
        values, owners = np.array([item.result for item in results]), list(results[0].users or ())
    return mean_interval(metric, values, owners, resamples=resamples, seed=0)
