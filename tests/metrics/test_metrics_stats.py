from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from llmrec.metrics.stats import (
    Difference,
    bootstrap_interval,
    mean_ranks,
    paired_difference,
    paired_statistic_difference,
    statistic_interval,
    verdict,
    wilson_interval,
)

_VALUES = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=40)


# ------------------------------------------------------------------ intervals


def test_interval_of_many_users_is_normal() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, size=2000)
    result = bootstrap_interval(values, resamples=4000, seed=1)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert result.value == pytest.approx(values.mean())
    assert result.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert result.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_root_mean_is_rmse() -> None:
    errors = np.array([1.0, 0.0, 9.0, 4.0])
    result = bootstrap_interval(errors, resamples=1000, seed=0, statistic="root_mean")
    assert result.value == pytest.approx(math.sqrt(3.5))
    assert 0 <= result.low < result.value < result.high <= 3


@pytest.mark.parametrize("statistic", ["mean", "root_mean"])
def test_bca_equals_scipy(statistic: Literal["mean", "root_mean"]) -> None:
    values = np.random.default_rng(3).exponential(1.0, size=40)
    result = bootstrap_interval(values, resamples=40_000, seed=0, statistic=statistic, method="bca")

    def figure(sample: np.ndarray, axis: int = -1) -> np.ndarray:
        mean = np.mean(sample, axis=axis)
        return np.sqrt(mean) if statistic == "root_mean" else mean

    theirs = scipy.stats.bootstrap((values,), figure, n_resamples=40_000, method="BCa", rng=1).confidence_interval
    assert result.low == pytest.approx(theirs.low, abs=0.01)
    assert result.high == pytest.approx(theirs.high, abs=0.015)
    plain = bootstrap_interval(values, resamples=40_000, seed=0, statistic=statistic)
    assert result.high > plain.high + 0.01  # skewed to the right: the correction moves the interval up


def test_interval_of_a_callable_equals_that_of_its_mean() -> None:
    values = np.random.default_rng(0).random(700)
    direct = bootstrap_interval(values, resamples=3000, seed=5)
    called = statistic_interval(lambda rows: values[rows].mean(axis=1), 700, resamples=3000, seed=5)
    assert [direct.value, direct.low, direct.high] == pytest.approx([called.value, called.low, called.high])


@given(values=_VALUES, seed=st.integers(0, 9), method=st.sampled_from(["percentile", "bca"]))
def test_bounds_are_ordered_deterministic_and_inside_the_data(
    values: list[float], seed: int, method: Literal["percentile", "bca"]
) -> None:
    for statistic in ("mean", "root_mean"):
        result = bootstrap_interval(values, resamples=100, seed=seed, statistic=statistic, method=method)
        assert result == bootstrap_interval(values, resamples=100, seed=seed, statistic=statistic, method=method)
        root = math.sqrt if statistic == "root_mean" else float
        assert root(min(values)) - 1e-9 <= result.low <= result.high <= root(max(values)) + 1e-9


def test_interval_of_equal_values_has_no_width() -> None:
    for method in ("percentile", "bca"):
        result = bootstrap_interval(np.full(50, 0.25), resamples=200, seed=0, method=method)
        assert (result.value, result.low, result.high) == (0.25, 0.25, 0.25)


def test_intervals_of_tiny_and_single_values() -> None:
    for values in ([0.0, 0.0, 5e-324, 1e-300], [1e-200, 2e-200, 9e-200], [0.5]):
        for statistic in ("mean", "root_mean"):
            result = bootstrap_interval(values, resamples=200, seed=0, statistic=statistic, method="bca")
            assert 0 <= result.low <= result.high <= math.sqrt(max(values)) + max(values)


def test_rejects_values_that_cannot_be_resampled() -> None:
    with pytest.raises(ValueError, match="n > 0"):
        bootstrap_interval([], resamples=10, seed=0)
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_interval([0.5, math.nan], resamples=10, seed=0)
    with pytest.raises(ValueError, match="non-negative"):
        bootstrap_interval([0.5, -1.0], resamples=10, seed=0, statistic="root_mean")
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_interval([0.5], resamples=0, seed=0)
    with pytest.raises(ValueError, match="3 values, but 2 users"):
        bootstrap_interval([1.0, 2.0, 3.0], resamples=10, seed=0, users=["a", "b"])


# ------------------------------------------------------------------ paired differences


def test_paired_root_mean_is_a_difference_of_rmse() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(200) * 2, rng.random(200)
    result = paired_difference(a, b, resamples=500, seed=0, statistic="root_mean")
    assert result.value == pytest.approx(math.sqrt(a.mean()) - math.sqrt(b.mean()))
    assert verdict(result, better="lower") == "contradicted"
    assert verdict(result, better="higher") == "shown"


def test_bca_of_a_difference() -> None:
    a, b = np.random.default_rng(0).gamma(1, 1, size=(2, 60))
    pair = paired_difference(a, b, resamples=2000, seed=0, method="bca")
    alone = bootstrap_interval(a - b, resamples=2000, seed=0, method="bca")
    assert [pair.value, pair.low, pair.high] == pytest.approx([alone.value, alone.low, alone.high])
    roots = paired_difference(a, b, resamples=2000, seed=0, statistic="root_mean", method="bca")

    def figure(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.sqrt(np.mean(x, axis=axis)) - np.sqrt(np.mean(y, axis=axis))

    theirs = scipy.stats.bootstrap(
        (a, b), figure, paired=True, vectorized=True, n_resamples=5000, method="BCa", rng=1
    ).confidence_interval
    assert [roots.low, roots.high] == pytest.approx([theirs.low, theirs.high], abs=0.02)


@pytest.mark.parametrize("statistic", ["mean", "root_mean"])
def test_false_positive_rate_is_five_percent(statistic: Literal["mean", "root_mean"]) -> None:
    """Compare 600 pairs of equal distributions: 200 users, with a shared value per user and separate noise."""
    rng = np.random.default_rng(11)
    wrong = 0
    for trial in range(600):
        user = rng.random(200)
        a, b = (np.clip(user + rng.normal(0, 0.5, 200), 0, 2) for _ in range(2))
        result = paired_difference(a, b, resamples=400, seed=trial, statistic=statistic)
        wrong += verdict(result) != "not shown"
    assert 0.03 <= wrong / 600 <= 0.08


def test_coverage_is_ninety_five_percent() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(500):
        result = bootstrap_interval(rng.random(200) < 0.3, resamples=400, seed=trial)
        covered += result.low <= 0.3 <= result.high
    assert 0.92 <= covered / 500 <= 0.97


# ------------------------------------------------------------------ several requests per user


def test_requests_of_a_user_are_resampled_together() -> None:
    rng = np.random.default_rng(0)
    level = rng.random(50)
    users = [f"u{n}" for n in range(50) for _ in range(20)]
    values = np.repeat(level, 20)  # 1,000 requests, but only 50 independent values
    alone, together = (bootstrap_interval(values, resamples=2000, seed=0, users=each) for each in (None, users))
    once = bootstrap_interval(level, resamples=2000, seed=0)
    assert alone.value == pytest.approx(together.value) == pytest.approx(once.value)
    assert together.high - together.low == pytest.approx(once.high - once.low, rel=0.1)
    assert alone.high - alone.low < (together.high - together.low) / 3


def test_one_request_per_user_is_the_plain_bootstrap() -> None:
    a, b = np.random.default_rng(0).random((2, 80))
    users = [f"u{n:02d}" for n in range(80)]
    assert bootstrap_interval(a, resamples=300, seed=0, users=users) == bootstrap_interval(a, resamples=300, seed=0)
    assert paired_difference(a, b, resamples=300, seed=0, users=users) == paired_difference(a, b, resamples=300, seed=0)


@pytest.mark.parametrize("statistic", ["mean", "root_mean"])
def test_unequal_numbers_of_requests_equal_a_loop(statistic: Literal["mean", "root_mean"]) -> None:
    rng = np.random.default_rng(0)
    users = [f"u{n}" for n in rng.integers(0, 9, 40)]
    a, b = rng.random((2, 40))
    names = sorted(set(users))
    requests = {name: [index for index, user in enumerate(users) if user == name] for name in names}

    def figure(rows: np.ndarray) -> np.ndarray:
        out = []
        for row in rows:
            drawn = [index for user in row for index in requests[names[user]]]
            means = [each[drawn].mean() for each in (a, b)]
            root = math.sqrt if statistic == "root_mean" else float
            out.append(root(means[0]) - root(means[1]))
        return np.array(out)

    slow = paired_statistic_difference(figure, len(names), resamples=200, seed=3).at()
    fast = paired_difference(a, b, resamples=200, seed=3, statistic=statistic, users=users)
    assert [fast.value, fast.low, fast.high, fast.p] == pytest.approx([slow.value, slow.low, slow.high, slow.p])


# ------------------------------------------------------------------ verdicts


def test_verdicts() -> None:
    up, down = Difference(0.1, 0.02, 0.2, 0.01), Difference(-0.1, -0.2, -0.02, 0.01)
    assert verdict(up) == "shown"
    assert verdict(down) == "contradicted"
    assert verdict(up, "lower") == "contradicted"
    assert verdict(down, "lower") == "shown"
    assert verdict(Difference(0.1, -0.01, 0.2, 0.08)) == "not shown"
    assert verdict(Difference(0.1, 0.02, 0.2, 0.06)) == "not shown"


@given(st.lists(st.integers(-3, 3) | st.floats(-2, 2), min_size=1, max_size=12))
def test_mean_ranks_equal_scipy(values: list[float]) -> None:
    assert mean_ranks(values).tolist() == scipy.stats.rankdata(values).tolist()


def test_wilson_by_hand() -> None:
    # Wilson (1927) for 2 of 10, as in published tables.
    assert wilson_interval(0.2, 10) == (pytest.approx(0.0567, abs=1e-4), pytest.approx(0.5098, abs=1e-4))
    assert wilson_interval(0.0, 20) == (0.0, pytest.approx(0.1611, abs=1e-4))
    low, high = wilson_interval(1.0, 20)
    assert low == pytest.approx(0.8389, abs=1e-4) and high == pytest.approx(1.0)
