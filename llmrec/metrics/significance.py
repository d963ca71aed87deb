"""Paired sign-flip tests, averages over seeds, and the minimum detectable effect.

If two systems are equally good, a user's two results are exchangeable, so every pattern of swaps is equally likely. The
test counts the patterns with a difference at least as large as the observed one (Fisher 1935; for retrieval, Smucker,
Allan and Carterette, CIKM 2007). The interval contains the differences that the test would not reject: its ends are
percentiles of the means over random halves of the users, each user in or out with probability 1/2 (Hartigan, "Using
Subsample Values as Typical Values", JASA 1969). Neither assumes a normal distribution. Unlike with bootstrap intervals
of differences, the false-positive rate stays at its level for few users and for hit rates with many zeros
(``eval/benchmarks/calibration.py`` compares them).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import gammaln, stdtrit

from llmrec.metrics.stats import (
    ALPHA,
    BootstrapDifference,
    Difference,
    StatisticName,
    chunk_sizes,
    paired_user_sums,
    statistic_from_means,
    two_sided_p_value,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


MAX_EXACT_PATTERNS = 1 << 16
"""Maximum number of patterns that are enumerated; more are sampled."""

# Probability with which a minimum detectable effect is detected.
_POWER = 0.8


def sign_flip_test(
    a: ArrayLike,
    b: ArrayLike,
    *,
    resamples: int,
    seed: int,
    statistic: StatisticName = "mean",
    users: Sequence[str] | None = None,
) -> BootstrapDifference:
    """Compare two systems on the same requests by a sign-flip test: difference a − b and p-value.

    Args:
        a: Values of the first system, shape (n,).
        b: Values of the second system in the same order of requests, shape (n,).
        resamples: Number of patterns drawn, for the interval and, if there are too many to enumerate, for p.
        seed: Seed of the patterns.
        statistic: ``root_mean`` for squared errors, to compare RMSE.
        users: The user of each request; all requests of a user are swapped together. None if each has a different user.

    Raises:
        ValueError: If the systems differ in length, are empty or have values that are not finite.
    """
    left, right, sizes = paired_user_sums(a, b, statistic, users)
    value = float(
        statistic_from_means(left.sum() / sizes.sum(), statistic)
        - statistic_from_means(right.sum() / sizes.sum(), statistic)
    )
    if statistic == "mean":
        value = float((left - right).sum() / sizes.sum())
    draws = _half_sample_differences(left, right, sizes, statistic, resamples, seed)
    return BootstrapDifference(value, sign_flip_p_value(left - right, resamples=resamples, seed=seed), draws)


def add_seed_variance(difference: BootstrapDifference, a: ArrayLike, b: ArrayLike, *, seed: int) -> BootstrapDifference:
    """Add the variance over training seeds to a difference that was resampled over users.

    Users and seeds are crossed random effects: with the same users, another set of seeds gives another difference
    (Bouthillier et al., "Accounting for Variance in Machine Learning Benchmarks", MLSys 2021). Each resample gets a
    draw of Student's t with the standard error over seeds, and p is at least the share of resamples beyond 0. Two
    systems with the same number of seeds are paired by seed, since their seeds may share members and samples. The
    variance over users is in both terms, which makes the interval conservative.

    Args:
        difference: The difference with its resamples over users.
        a: The figure of each seed of the first system, shape (seeds,); one value for a deterministic one.
        b: The figures of the second system.
        seed: Seed of the draws.
    """
    one, other = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    groups = [one - other] if one.size == other.size else [one, other]
    drawn = [group for group in groups if group.size > 1]
    error = math.sqrt(sum(float(np.var(group, ddof=1)) / group.size for group in drawn))
    if not error:
        return difference
    freedom = min(group.size for group in drawn) - 1
    noise = np.random.default_rng([seed, 1]).standard_t(freedom, size=len(difference.draws))
    draws = difference.draws + error * noise
    return BootstrapDifference(difference.value, max(difference.p, two_sided_p_value(draws)), draws)


def sign_flip_p_value(differences: ArrayLike, *, resamples: int, seed: int) -> float:
    """Return the two-sided p-value of a sum of differences under random signs.

    Users with equal absolute differences are exchangeable, so only their number with each sign matters: hits of
    thousands of users have few different patterns, and p is exact (for hits it is McNemar's exact test). Otherwise p is
    ``(1 + as large) / (1 + resamples)`` from drawn patterns (Phipson and Smyth 2010), which is never 0. It also applies
    to root means: under a swap, the difference of RMSE is monotonic in the difference of the sums.

    Args:
        differences: One value per user, shape (n,); the order does not matter.
        resamples: Number of patterns drawn if there are more than `MAX_EXACT_PATTERNS`.
        seed: Seed of the patterns.
    """
    array = np.asarray(differences, dtype=np.float64)
    size = np.abs(array)
    if not size.any():
        return 1.0
    # Scaled to avoid underflow and overflow.
    unit = float(size.max())
    observed = abs(float(np.sum(array / unit)))
    values, counts = _distinct_magnitudes(size[size > 0] / unit)
    slack = 1e-9 * float(values @ counts)
    if np.sum(np.log(counts + 1.0)) <= math.log(MAX_EXACT_PATTERNS):
        sums, weights = _all_pattern_sums(values, counts)
        return min(1.0, float(weights[np.abs(sums) >= observed - slack].sum()))
    beyond = sum(
        int(np.count_nonzero(np.abs(sums) >= observed - slack))
        for sums in _sample_pattern_sums(values, counts, resamples, seed)
    )
    return (1 + beyond) / (1 + resamples)


def attainable_p_value(differences: ArrayLike, *, alpha: float = 0.05) -> float:
    """Return the largest p-value up to alpha that `sign_flip_p_value` can return for these differences.

    It is the test's false-positive rate. If few users differ it is far below alpha, and 0 if no outcome can be
    significant: with 5 users of equal absolute differences, p is at least 0.06.

    Args:
        differences: One value per user, shape (n,).
        alpha: Largest p that counts as significant.

    Returns:
        A level in [0, alpha]; alpha with more patterns than `MAX_EXACT_PATTERNS`, whose p-values leave no gaps.
    """
    size = np.abs(np.asarray(differences, dtype=np.float64))
    if not size.any():
        return 0.0
    values, counts = _distinct_magnitudes(size[size > 0] / float(size.max()))
    if np.sum(np.log(counts + 1.0)) > math.log(MAX_EXACT_PATTERNS):
        return alpha
    sums, weights = _all_pattern_sums(values, counts)
    order = np.argsort(-np.abs(sums), kind="stable")
    far, mass = np.abs(sums)[order], np.cumsum(weights[order])
    # A p-value counts all sign patterns that are at least as extreme.
    last = np.append(far[1:] < far[:-1] - 1e-9 * float(values @ counts), True)
    levels = mass[last & (mass <= alpha)]
    return float(levels[-1]) if len(levels) else 0.0


def detectable_effect(
    a: ArrayLike,
    b: ArrayLike,
    *,
    comparisons: int = 1,
    statistic: StatisticName = "mean",
    users: Sequence[str] | None = None,
) -> float | None:
    """Return the minimum detectable effect: the smallest true difference that is detected with a probability of 0.8.

    ``(t(1 - alpha / (2 m)) + t(0.8)) sd / sqrt(n)`` with the standard deviation of the n users' differences,
    quantiles of Student's t with n - 1 degrees of freedom, and m comparisons: alpha / m is the level of Holm's method
    for the smallest p, so the value is conservative. If the true difference is smaller, a non-significant result is
    inconclusive.

    Args:
        a: Values of the first system, shape (n,).
        b: Values of the second system, in the same order of requests.
        comparisons: Number of comparisons corrected together.
        statistic: See `sign_flip_test`; for root means, the differences are those of the linearised RMSE.
        users: See `sign_flip_test`.

    Returns:
        A difference above 0, in units of the figure; None if the differences of all users are equal.
    """
    left, right, sizes = paired_user_sums(a, b, statistic, users)
    influence = _user_influence(left, sizes, statistic) - _user_influence(right, sizes, statistic)
    n = influence.size
    sd = float(np.std(influence, ddof=1)) if n > 1 else 0.0
    if sd <= 1e-12 * (float(np.abs(influence).max(initial=0.0)) + 1e-300):
        return None
    return detectable_effect_from_error(sd / math.sqrt(n), n, comparisons=comparisons)


def detectable_effect_from_error(error: float, users: int, *, comparisons: int = 1) -> float | None:
    """Return the minimum detectable effect from a standard error, for metrics that are not means.

    See `detectable_effect`.

    Args:
        error: Standard error of the difference, such as the standard deviation of its resamples.
        users: Number of users.
        comparisons: See `detectable_effect`.
    """
    if users < 2 or error <= 0:
        return None
    reach = stdtrit(users - 1, 1 - ALPHA / (2 * comparisons)) + stdtrit(users - 1, _POWER)
    return float(reach * error)


def describe_detectable_effects(metric: str, effects: Sequence[float | None], *, users: int, comparisons: int) -> str:
    """Return a sentence on the minimum detectable effects of the comparisons in a table.

    Args:
        metric: Name of the metric.
        effects: `detectable_effect` of each comparison.
        users: Number of users.
        comparisons: Number of planned comparisons corrected together; 0 for exploratory ones.
    """
    known = sorted(value for value in effects if value is not None)
    if not known:
        return f"The minimum detectable effect on {metric} is unknown: all {users:,} users have the same difference."
    reach = f"{known[0]:.2g}" if f"{known[0]:.2g}" == f"{known[-1]:.2g}" else f"{known[0]:.2g} to {known[-1]:.2g}"
    pairs = "1 planned comparison" if comparisons == 1 else f"{comparisons} planned comparisons"
    start, what = (f"With {users:,} users and {pairs}", "be significant")
    if not comparisons:
        start, what = (f"With {users:,} users", "leave 0 outside an unadjusted 95 % interval")
    return (
        f"{start}, a true difference in {metric} of {reach} would {what} in 80 of 100 repetitions. Smaller "
        "differences would usually not be, so no significant difference does not mean equal."
    )


# --------------------------------------------------------------------------- helpers


def _user_influence(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], statistic: StatisticName
) -> NDArray[np.float64]:
    """Return the influence of each user on a metric, from which its standard error follows."""
    mean = sums.sum() / sizes.sum()
    influence: NDArray[np.float64] = (sums - mean * sizes) / sizes.mean()
    if statistic == "mean":
        return influence
    return influence / (2 * math.sqrt(mean)) if mean > 0 else np.zeros_like(influence)


def _random_bits(rows: int, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    packed = rng.integers(0, 256, size=(rows, -(-n // 8)), dtype=np.uint8)
    bits: NDArray[np.float64] = np.unpackbits(packed, axis=1, count=n).astype(np.float64)
    return bits


def _half_sample_differences(
    left: NDArray[np.float64],
    right: NDArray[np.float64],
    sizes: NDArray[np.float64],
    statistic: StatisticName,
    resamples: int,
    seed: int,
) -> NDArray[np.float64]:
    """Return the differences on random halves of the users; empty halves are skipped."""
    rng = np.random.default_rng(seed)
    columns = np.stack([left - right, sizes] if statistic == "mean" else [left, right, sizes], axis=1)
    drawn = []
    for rows in chunk_sizes(len(sizes), resamples):
        sums = _random_bits(rows, len(sizes), rng) @ columns
        # With one or two users, all halves can be empty.
        sums = sums[sums[:, -1] > 0] if sums[:, -1].any() else columns.sum(axis=0, keepdims=True)
        means = sums[:, :-1] / sums[:, -1:]
        drawn.append(means[:, 0] if statistic == "mean" else np.sqrt(means[:, 0]) - np.sqrt(means[:, 1]))
    return np.concatenate(drawn)


def _distinct_magnitudes(sizes: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the distinct absolute differences, up to rounding, and how often each occurs."""
    ordered = np.sort(sizes)
    starts = np.flatnonzero(np.r_[True, np.diff(ordered) > 1e-12])
    return ordered[starts], np.diff(np.r_[starts, len(ordered)])


def _all_pattern_sums(
    values: NDArray[np.float64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return every possible sum with its probability."""
    sums, weights = np.zeros(1), np.ones(1)
    for value, count in zip(values, counts, strict=True):
        up = np.arange(count + 1)
        probability = np.exp(gammaln(count + 1) - gammaln(up + 1) - gammaln(count - up + 1) - count * math.log(2))
        sums = (sums[:, None] + value * (2 * up - count)).ravel()
        weights = (weights[:, None] * probability).ravel()
    return sums, weights


def _sample_pattern_sums(
    values: NDArray[np.float64], counts: NDArray[np.int64], resamples: int, seed: int
) -> Iterator[NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    once, more = values[counts == 1], values[counts > 1]
    repeats = counts[counts > 1]
    for rows in chunk_sizes(len(values), resamples):
        sums = 2 * (_random_bits(rows, len(once), rng) @ once) - once.sum() if len(once) else np.zeros(rows)
        if len(more):
            up = rng.binomial(repeats, 0.5, size=(rows, len(repeats)))
            sums = sums + (2 * up - repeats) @ more
        yield sums


# --------------------------------------------------------------------------- multiple tests
# Multiple tests: Holm's correction, and intervals that agree with the corrected p-values.
#
# Holm's procedure (1979) tests the smallest of m p-values at alpha / m, the next one at alpha / (m - 1), and so
# on; it stops at the first that fails, and rejects neither that one nor any later one. The last level at which a
# difference was tested is thus that of its step if it was rejected, else that of the step at which the procedure
# stopped. Its interval is the inversion of that test. A fixed 95 % interval could exclude 0 although the
# corrected p is above .05. Each interval covers at least 1 - alpha; simultaneous coverage is not claimed.


# Minimum number of draws beyond each end of the widest interval; with fewer, its ends are noisy.
_MIN_TAIL_DRAWS = 20


@dataclass(frozen=True, slots=True)
class AdjustedDifference(Difference):
    """A difference after correction for multiple tests; 0 is outside its interval exactly if ``p`` is at most alpha.

    Attributes:
        p_raw: The p-value before Holm's correction over the family.
        level: Coverage of the single interval.
    """

    p_raw: float
    level: float


def holm_p_values(p_values: Sequence[float]) -> list[float]:
    """Return Holm-adjusted p-values (Holm, 1979), in the given order.

    The i-th smallest of m is multiplied by ``m - i + 1``, made monotonic and capped at 1.

    Raises:
        ValueError: If a p-value is outside [0, 1].
    """
    p, order = _order_p_values(p_values)
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


def holm_levels(p_values: Sequence[float]) -> list[float]:
    """Return the level at which Holm's procedure last tested each difference, in the given order.

    ``alpha / (m - i + 1)`` for the i-th smallest if it is rejected; for the others that of the failed step. A p-value
    is at most its level exactly if the adjusted one is at most alpha.

    Raises:
        ValueError: If a p-value is outside [0, 1].
    """
    p, order = _order_p_values(p_values)
    left = np.arange(p.size, 0, -1)
    failed = np.flatnonzero(p[order] * left > ALPHA)
    last = failed[0] if len(failed) else p.size
    levels = np.empty_like(p)
    levels[order] = ALPHA / left[np.minimum(np.arange(p.size), last)]
    return [float(value) for value in levels]


def required_resamples(resamples: int, comparisons: int) -> int:
    """Return the number of resamples needed for the confidence intervals.

    Args:
        resamples: The minimum number.
        comparisons: Number of differences corrected together.
    """
    return max(resamples, math.ceil(2 * _MIN_TAIL_DRAWS * comparisons / ALPHA))


def holm_adjusted(differences: Sequence[BootstrapDifference], *, more: int = 0) -> list[AdjustedDifference]:
    """Correct p-values for multiple tests, and adjust the confidence intervals to agree with them.

    The interval comes from resamples, p from an exact count or other draws, so they can disagree at the border. Then p
    decides, and the end of the interval moves: to 0 if the difference is not significant, else to the resampled
    difference nearest to 0 on its side.

    Args:
        differences: The differences; see `required_resamples` for the required resamples.
        more: Number of differences of the family that are not yet known; they count as p = 1.
    """
    p_values = [*(item.p for item in differences), *[1.0] * more]
    decisions = []
    for item, p, alpha in zip(differences, holm_p_values(p_values), holm_levels(p_values), strict=False):
        plain = item.at(1 - alpha)
        low, high = _adjust_interval(plain.low, plain.high, item, differs=p <= ALPHA and item.value != 0)
        decisions.append(AdjustedDifference(value=item.value, low=low, high=high, p=p, p_raw=item.p, level=1 - alpha))
    return decisions


def _adjust_interval(low: float, high: float, difference: BootstrapDifference, *, differs: bool) -> tuple[float, float]:
    """Adjust an interval so that 0 is outside exactly if the difference is significant."""
    if not differs:
        return min(low, 0.0), max(high, 0.0)
    side = 1.0 if difference.value > 0 else -1.0
    same = difference.draws[difference.draws * side > 0] * side
    nearest = side * float(same.min() if len(same) else abs(difference.value))
    return (max(low, nearest), max(high, nearest)) if side > 0 else (min(low, nearest), min(high, nearest))


def _order_p_values(p_values: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must be in [0, 1]: {list(p_values)}")
    return p, np.argsort(p, kind="stable")
