"""Bootstrap over users: intervals, paired differences and verdicts; `significance` has the permutation tests.

The resampling unit is the user with all of their requests: requests of one user are correlated, and treating them as
independent makes intervals too narrow. With one request per user, as in leave-one-out, ``users`` may be omitted.
Resampling with replacement follows Efron and Tibshirani, "An Introduction to the Bootstrap" (1993): percentile
intervals (chapter 13), BCa intervals (chapter 14). If every request has the same value, such as no hit, the interval
has width 0, which does not mean certainty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from llmrec.entries import MetricDirection
from llmrec.results import Verdict

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    #: Computes a metric for resampled users: index arrays of shape (b, m) -> b values.
    Statistic = Callable[[NDArray[np.intp]], NDArray[np.float64]]

StatisticName = Literal["mean", "root_mean"]
IntervalMethod = Literal["percentile", "bca"]

ALPHA = 0.05
"""The largest p-value of a significant difference, after correction for several comparisons."""

# Number of indices or signs per batch, 4 MB, so that the gathered values stay in the cache.
_CHUNK = 1 << 19
# Minimum distance of percentiles from 0 and 1, whose normal quantiles are infinite.
_MIN_PERCENTILE = 1e-9
_NORMAL_QUANTILE = float(ndtri(0.975))


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricValues:
    """The result of a metric function.

    Attributes:
        result: Values whose mean is the figure, shape (n,), a number or a statistic over users; None if undefined.
        users: The users of the values or of the statistic; None if each request has a different user.
        how: Further details of the figure, for its signature.
        undefined: Why the figure is undefined.
    """

    result: NDArray[np.float64] | float | Statistic | None
    users: Sequence[str] | None = None
    how: str | None = None
    undefined: str = ""


@dataclass(frozen=True, slots=True)
class Interval:
    """A metric and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference a − b of a metric between two systems, with its interval and two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, slots=True)
class BootstrapDifference:
    """A difference with its resamples, from which intervals of any level can be computed.

    Attributes:
        value: The difference a − b of the figures.
        p: Two-sided p-value of no difference.
        draws: The resampled differences; their percentiles are the ends of intervals.
    """

    value: float
    p: float
    draws: NDArray[np.float64]

    def at(self, level: float = 0.95) -> Difference:
        """Return the difference with its interval at a confidence level."""
        low, high = np.quantile(self.draws, _tail_percentiles(level))
        return Difference(self.value, float(low), float(high), self.p)


def bootstrap_interval(
    values: ArrayLike,
    *,
    resamples: int,
    seed: int,
    statistic: StatisticName = "mean",
    users: Sequence[str] | None = None,
    method: IntervalMethod = "percentile",
    widen: bool = False,
) -> Interval:
    """Bootstrap the mean (or root mean) of per-request values, or its average over training seeds.

    Intervals have a nominal coverage of 95 %.

    Args:
        values: One value per request, shape (n,), such as NDCG, or squared errors with ``root_mean`` for RMSE; for
            several training seeds shape (seeds, n): each resample takes the same users for all of them.
        resamples: Number of bootstrap samples.
        seed: Equal seeds and values give equal intervals. The order of the values changes the resamples, but not the
            estimand.
        statistic: The statistic of the values.
        users: The user of each request; None if each has a different user.
        method: ``bca`` corrects bias and skewness.
        widen: Widen percentiles for few users, as Student's t does compared with the normal distribution
            (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015): plain ones are too narrow by a factor
            of sqrt(1 - 1 / n) and the ratio of the quantiles of t and z. From about 200 users on it has no effect.

    Raises:
        ValueError: If there are no values or some are not finite.
    """
    rows = [
        sums_by_user(validated_values(item, statistic), users)
        for item in np.atleast_2d(np.asarray(values, dtype=np.float64))
    ]
    draws = _resample_statistic(
        averaged_statistic([_make_statistic(*row, statistic) for row in rows]), rows[0][0].size, resamples, seed
    )
    left_out = np.mean([_jackknife_values(*row, statistic) for row in rows], axis=0)
    value = float(np.mean([statistic_from_means(sums.sum() / sizes.sum(), statistic) for sums, sizes in rows]))
    tails = _tail_percentiles(widened_for=left_out.size if widen else None)
    return Interval(value, *_interval_bounds(draws, value, left_out, method, tails))


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share of n independent requests or votes (Wilson, JASA 1927)."""
    centre = (share + _NORMAL_QUANTILE**2 / (2 * n)) / (1 + _NORMAL_QUANTILE**2 / n)
    half = (
        _NORMAL_QUANTILE
        / (1 + _NORMAL_QUANTILE**2 / n)
        * math.sqrt(max(0.0, share * (1 - share) / n + _NORMAL_QUANTILE**2 / (4 * n**2)))
    )
    return max(0.0, centre - half), min(1.0, centre + half)


def averaged_statistic(statistics: Sequence[Statistic]) -> Statistic:
    """Return the average of several metrics on the same resampled users."""
    return lambda rows: np.mean([statistic(rows) for statistic in statistics], axis=0)


def statistic_interval(statistic: Statistic, n: int, *, resamples: int, seed: int) -> Interval:
    """Bootstrap a metric that is not a mean, such as corpus BLEU, over n users.

    Args:
        statistic: Function from index arrays of shape (b, m), entries below n, to b values.
        n: Number of users, or of requests with one request per user.
        resamples: See `bootstrap_interval`.
        seed: See `bootstrap_interval`.
    """
    low, high = np.quantile(_resample_statistic(statistic, n, resamples, seed), _tail_percentiles())
    return Interval(full_sample_value(statistic, n), float(low), float(high))


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    resamples: int,
    seed: int,
    statistic: StatisticName = "mean",
    users: Sequence[str] | None = None,
    method: IntervalMethod = "percentile",
) -> Difference:
    """Bootstrap the difference a − b of two systems on the same requests.

    Each resample draws users once for both systems.

    Args:
        a: Values of the first system, shape (n,).
        b: Values of the second system in the same order of requests, shape (n,).
        resamples: See `bootstrap_interval`.
        seed: See `bootstrap_interval`.
        statistic: See `bootstrap_interval`.
        users: See `bootstrap_interval`.
        method: See `bootstrap_interval`. With few users, ``bca`` intervals of differences exclude 0 too often.

    Returns:
        The difference with its interval. ``p`` is twice the smaller share of resamples at or beyond 0,
        counting the observed one, so it is below 0.05 (about) if the interval excludes 0.

    Raises:
        ValueError: If the systems differ in length, are empty or have values that are not finite.
    """
    sums, others, sizes = paired_user_sums(a, b, statistic, users)
    if statistic == "mean":
        # One lookup instead of two; the difference of equal systems is exactly 0.
        difference = _make_statistic(sums - others, sizes, "mean")
    else:
        difference = _difference_statistic(
            _make_statistic(sums, sizes, statistic), _make_statistic(others, sizes, statistic)
        )
    left_out = _jackknife_values(sums, sizes, statistic) - _jackknife_values(others, sizes, statistic)
    draws = _resample_statistic(difference, sums.size, resamples, seed)
    value = full_sample_value(difference, sums.size)
    return Difference(
        value, *_interval_bounds(draws, value, left_out, method, _tail_percentiles()), two_sided_p_value(draws)
    )


def paired_statistic_difference(difference: Statistic, n: int, *, resamples: int, seed: int) -> BootstrapDifference:
    """Bootstrap a difference between metrics that are not means, such as two corpus BLEU scores."""
    draws = _resample_statistic(difference, n, resamples, seed)
    return BootstrapDifference(full_sample_value(difference, n), two_sided_p_value(draws), draws)


def verdict(difference: Difference, better: MetricDirection = "higher") -> Verdict:
    """Return the verdict on whether system a is better than system b.

    Args:
        difference: The difference a − b.
        better: Whether higher or lower figures are better.

    Returns:
        ``"shown"`` or ``"contradicted"`` if the interval excludes 0 and p is at most 0.05, by the sign; otherwise
        ``"not shown"``.
    """
    if difference.p > ALPHA or difference.low <= 0 <= difference.high:
        return "not shown"
    return "shown" if (difference.value > 0) == (better == "higher") else "contradicted"


# --------------------------------------------------------------------------- helpers


def validated_values(values: ArrayLike, statistic: StatisticName) -> NDArray[np.float64]:
    """Return per-request values as an array.

    Raises:
        ValueError: If there are none, some are not finite, or some are negative with a root mean.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"a bootstrap needs an array of shape (n,) with n > 0, not {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("a value is not finite; give a failed request the metric's worst value")
    if statistic == "root_mean" and array.min() < 0:
        raise ValueError("a root mean square needs non-negative values")
    return array


def statistic_from_means(means: NDArray[np.float64], statistic: StatisticName) -> NDArray[np.float64]:
    """Return means, or their roots for root-mean metrics."""
    # After a subtraction, a mean of zeros may be slightly negative by rounding.
    return np.sqrt(np.maximum(means, 0.0)) if statistic == "root_mean" else means


def mean_ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Return ascending ranks from 1, shape (n,); equal values share their mean rank."""
    # Equals scipy.stats.rankdata, whose import takes most of a second.
    _, group, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def paired_user_sums(
    a: ArrayLike, b: ArrayLike, statistic: StatisticName, users: Sequence[str] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the sums of two systems and the number of values for each user."""
    first, second = validated_values(a, statistic), validated_values(b, statistic)
    if first.shape != second.shape:
        raise ValueError(f"paired models must have the same requests, but have {first.size} and {second.size} values")
    (left, sizes), (right, _) = sums_by_user(first, users), sums_by_user(second, users)
    return left, right, sizes


def sums_by_user(
    array: NDArray[np.float64], users: Sequence[str] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sum and the number of values for each user."""
    if users is None:
        return array, np.ones(array.size)
    if len(users) != array.size:
        raise ValueError(f"each value needs a user: there are {array.size} values, but {len(users)} users")
    owner = np.unique(np.array(users, dtype=object), return_inverse=True)[1]
    sums = np.bincount(owner, weights=array).astype(np.float64)
    return sums, np.bincount(owner).astype(np.float64)


def sum_rows_by_user(counts: NDArray[np.float64], users: Sequence[str]) -> NDArray[np.float64]:
    """Return the sum of the rows of each user, in sorted order of the users."""
    if len(users) != len(counts):
        raise ValueError(f"each text needs a user: there are {len(counts)} texts, but {len(users)} users")
    names, owner = np.unique(np.array(users, dtype=object), return_inverse=True)
    total = np.zeros((len(names), counts.shape[1]))
    np.add.at(total, owner, counts)
    return total


def _make_statistic(sums: NDArray[np.float64], sizes: NDArray[np.float64], name: StatisticName) -> Statistic:
    if (sizes == 1).all():
        return lambda rows: statistic_from_means(sums[rows].mean(axis=1), name)
    return lambda rows: statistic_from_means(sums[rows].sum(axis=1) / sizes[rows].sum(axis=1), name)


def _jackknife_values(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], statistic: StatisticName
) -> NDArray[np.float64]:
    """Return the metric with each user left out in turn, shape (users,)."""
    return statistic_from_means((sums.sum() - sums) / np.maximum(sizes.sum() - sizes, 1), statistic)


def _difference_statistic(left: Statistic, right: Statistic) -> Statistic:
    return lambda rows: left(rows) - right(rows)


def two_sided_p_value(draws: NDArray[np.float64]) -> float:
    """Return the two-sided p-value of resampled differences."""
    below, above = int(np.sum(draws <= 0)), int(np.sum(draws >= 0))
    return min(1.0, 2 * (min(below, above) + 1) / (len(draws) + 1))


def resample_counts(rows: NDArray[np.intp], n: int) -> NDArray[np.float64]:
    """Return how often each of n users occurs in each resample, shape (b, n)."""
    flat = (rows + n * np.arange(len(rows))[:, None]).ravel()
    return np.bincount(flat, minlength=len(rows) * n).reshape(len(rows), n).astype(np.float64)


def full_sample_value(statistic: Statistic, n: int) -> float:
    """Return the value of a statistic on all n users."""
    return float(statistic(np.arange(n)[None, :])[0])


def chunk_sizes(n: int, resamples: int) -> Iterator[int]:
    """Yield the numbers of resamples of n users that are drawn at a time.

    Raises:
        ValueError: If there are no resamples.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    rows = max(1, _CHUNK // max(1, n))
    return (min(rows, resamples - start) for start in range(0, resamples, rows))


def _resample_statistic(statistic: Statistic, n: int, resamples: int, seed: int) -> NDArray[np.float64]:
    if n < 1:
        raise ValueError("a bootstrap needs at least one request")
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, n, size=(rows, n), dtype=np.intp) for rows in chunk_sizes(n, resamples))
    return np.concatenate([statistic(rows) for rows in draws])


def _tail_percentiles(level: float = 0.95, widened_for: int | None = None) -> NDArray[np.float64]:
    """Return the two percentiles that bound an interval."""
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if widened_for is None or widened_for < 2:
        return tails
    n = widened_for
    widened: NDArray[np.float64] = ndtr(np.sqrt(n / (n - 1)) * stdtrit(n - 1, tails))
    return np.clip(widened, _MIN_PERCENTILE, 1 - _MIN_PERCENTILE)


def _interval_bounds(
    draws: NDArray[np.float64],
    value: float,
    left_out: NDArray[np.float64],
    method: IntervalMethod,
    tails: NDArray[np.float64],
) -> tuple[float, float]:
    if method == "bca":
        tails = _bca_percentiles(tails, draws, value, left_out)
    low, high = np.quantile(draws, tails)
    return float(low), float(high)


def _bca_percentiles(
    tails: NDArray[np.float64], draws: NDArray[np.float64], value: float, left_out: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Adjust percentiles for bias and skewness of the bootstrap (BCa; Efron 1987, equations 2.3 and 6.6)."""
    # Ties count half, since for discrete metrics such as HR many resamples equal the value.
    below = float(np.mean(draws < value) + np.mean(draws == value) / 2)
    deviation = left_out.mean() - left_out if left_out.size else np.zeros(1)
    largest = float(np.abs(deviation).max())
    if not 0 < below < 1 or largest == 0:
        return tails
    bias = float(ndtri(below))
    # Skewness is scale-free; scaling first avoids underflow for small deviations.
    deviation = deviation / largest
    acceleration = float(np.sum(deviation**3) / (6 * np.sum(deviation**2) ** 1.5))
    z = bias + ndtri(tails)
    # Beyond the pole of the formula (few, skewed values), use the last percentile.
    room = 1 - acceleration * z
    ends: NDArray[np.float64] = ndtr(np.where(room > 0, bias + z / np.where(room > 0, room, 1.0), np.sign(z) * np.inf))
    return ends
