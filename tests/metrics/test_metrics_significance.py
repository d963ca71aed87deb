from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from eval.benchmarks.calibration import KINDS, MODELS, calibrate, familywise, keeps, run_like, swapped
from llmrec.evaluate.compare import Contrast
from llmrec.metrics.significance import (
    add_seed_variance,
    attainable_p_value,
    describe_detectable_effects,
    detectable_effect,
    sign_flip_p_value,
    sign_flip_test,
)
from llmrec.metrics.stats import Difference, StatisticName, bootstrap_interval, paired_difference, verdict

_DIFFERENCES = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.0, 0.25, 0.5, 1.0, 1.7]), min_size=1, max_size=9)


def _sums(differences: list[float]) -> np.ndarray:
    """Return the absolute sum of every pattern of signs."""
    signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    return np.abs(signs @ np.array(differences))


def _every_sign(differences: list[float]) -> float:
    return float(np.mean(_sums(differences) >= abs(sum(differences)) - 1e-9))


# ------------------------------------------------------------------ p


def test_p_by_hand() -> None:
    # Of 16 patterns of 1, 2, 3, 4 only all plus and all minus reach a sum of 10.
    assert sign_flip_p_value([1, 2, 3, 4], resamples=10, seed=0) == pytest.approx(2 / 16)
    # A sum of 8 is also reached if only 1 has the opposite sign.
    assert sign_flip_p_value([-1, 2, 3, 4], resamples=10, seed=0) == pytest.approx(4 / 16)
    assert sign_flip_p_value([0, 0, 0], resamples=10, seed=0) == 1.0
    assert sign_flip_p_value([5.0, 0, 0], resamples=10, seed=0) == 1.0


@given(differences=_DIFFERENCES)
def test_p_of_few_users_is_exact(differences: list[float]) -> None:
    assert sign_flip_p_value(differences, resamples=1, seed=0) == pytest.approx(_every_sign(differences))


def test_p_of_hits_equals_the_exact_mcnemar_test() -> None:
    differences = np.concatenate([np.ones(60), -np.ones(35), np.zeros(9905)])
    expected = scipy.stats.binomtest(60, 95).pvalue
    assert sign_flip_p_value(differences, resamples=1, seed=0) == pytest.approx(expected)


def test_sampled_p_is_near_the_exact_p() -> None:
    rng = np.random.default_rng(0)
    differences = rng.normal(0.35, 1, 40)
    result = sign_flip_p_value(differences, resamples=20_000, seed=0)
    theirs = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=1
    ).pvalue
    assert result == pytest.approx(theirs, abs=0.005)
    tied = np.concatenate([differences, rng.choice([-0.5, 0.5], 300)])
    p = sign_flip_p_value(tied, resamples=20_000, seed=0)
    normal = 2 * scipy.stats.norm.sf(abs(tied.sum()) / np.sqrt(np.sum(tied**2)))
    assert p == pytest.approx(normal, abs=0.01)


@given(differences=_DIFFERENCES, seed=st.integers(0, 9), scale=st.sampled_from([1e-300, 1e-3, 1.0, 1e200]))
def test_p_does_not_depend_on_order_sign_or_unit(differences: list[float], seed: int, scale: float) -> None:
    p = sign_flip_p_value(differences, resamples=1, seed=0)
    assert 0 < p <= 1
    order = np.random.default_rng(seed).permutation(len(differences))
    assert sign_flip_p_value(-scale * np.array(differences)[order], resamples=1, seed=0) == pytest.approx(p)


def test_p_of_many_users_does_not_depend_on_order() -> None:
    differences = np.random.default_rng(0).normal(0.05, 1, 500)
    one, other = (sign_flip_p_value(each, resamples=500, seed=3) for each in (differences, differences[::-1]))
    assert one == other


@given(differences=_DIFFERENCES)
def test_attainable_level_is_the_largest_possible_p(differences: list[float]) -> None:
    sums = _sums(differences)
    outcomes = [float(np.mean(sums >= total - 1e-9)) for total in np.unique(sums)]
    for alpha in (0.05, 0.3):
        expected = max((p for p in outcomes if p <= alpha + 1e-12), default=0.0)
        assert attainable_p_value(differences, alpha=alpha) == pytest.approx(expected, abs=1e-12)


def test_attainable_level_of_many_values_is_alpha() -> None:
    assert attainable_p_value(np.random.default_rng(0).normal(size=100)) == 0.05


# ------------------------------------------------------------------ the interval


def _flipped(*arms: ArrayLike, resamples: int, seed: int, statistic: StatisticName = "mean") -> Difference:
    return sign_flip_test(*arms, resamples=resamples, seed=seed, statistic=statistic).at()


BOTH = pytest.mark.parametrize("compare", [paired_difference, _flipped])


@BOTH
def test_pairing_removes_the_shared_part(compare: Callable[..., Difference]) -> None:
    rng = np.random.default_rng(0)
    user = rng.normal(0, 5, size=300)
    result = compare(user + 0.3 + rng.normal(0, 0.5, 300), user + rng.normal(0, 0.5, 300), resamples=2000, seed=0)
    assert result.value == pytest.approx(0.3, abs=0.1)
    assert 0 < result.low < result.value < result.high < 0.5
    # The bootstrap counts both tails.
    assert result.p == pytest.approx((2 if compare is paired_difference else 1) / 2001)
    assert verdict(result) == "shown"


@pytest.mark.parametrize("statistic", ["mean", "root_mean"])
def test_interval_of_many_users_equals_the_bootstrap(statistic: Literal["mean", "root_mean"]) -> None:
    a, b = np.random.default_rng(0).gamma(1, 1, size=(2, 2000))
    flipped = sign_flip_test(a, b, resamples=5000, seed=0, statistic=statistic).at()
    resampled = paired_difference(a, b, resamples=5000, seed=0, statistic=statistic)
    assert flipped.value == pytest.approx(resampled.value)
    half = (resampled.high - resampled.low) / 2
    assert [flipped.low, flipped.high] == pytest.approx([resampled.low, resampled.high], abs=0.1 * half)


def test_few_users_have_no_empty_halves() -> None:
    for users in (1, 4):
        flipped = sign_flip_test(np.ones(users), np.zeros(users), resamples=500, seed=0).at()
        assert (flipped.low, flipped.high) == (1.0, 1.0)


@BOTH
def test_equal_arms(compare: Callable[..., Difference]) -> None:
    values = np.random.default_rng(0).random(100)
    for statistic in ("mean", "root_mean"):
        assert compare(values, values, resamples=100, seed=0, statistic=statistic) == Difference(0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("statistic", ["mean", "root_mean"])
def test_requests_of_one_user_are_swapped_together(statistic: Literal["mean", "root_mean"]) -> None:
    rng = np.random.default_rng(1)
    level = rng.random((2, 40))
    users = [f"u{n}" for n in range(40) for _ in range(25)]
    many = sign_flip_test(*np.repeat(level, 25, axis=1), resamples=2000, seed=0, users=users, statistic=statistic).at()
    once = sign_flip_test(*level, resamples=2000, seed=0, statistic=statistic).at()
    assert many.value == pytest.approx(once.value)
    assert many.p == pytest.approx(once.p, abs=0.03)
    assert many.high - many.low == pytest.approx(once.high - once.low, rel=0.1)


@BOTH
@given(pairs=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_swapping_the_arms_reverses_the_difference(
    compare: Callable[..., Difference], pairs: list[tuple[float, float]]
) -> None:
    a, b = np.array(pairs).T
    for statistic in ("mean", "root_mean"):
        forth = compare(a, b, resamples=200, seed=0, statistic=statistic)
        back = compare(b, a, resamples=200, seed=0, statistic=statistic)
        assert [forth.value, forth.low, forth.high] == pytest.approx([-back.value, -back.high, -back.low], abs=1e-12)
        assert forth.p == pytest.approx(back.p)
        assert 0 < forth.p <= 1


@BOTH
def test_rejects_arms_that_cannot_be_paired(compare: Callable[..., Difference]) -> None:
    with pytest.raises(ValueError, match="2 and 1 values"):
        compare([0.5, 1.0], [0.5], resamples=10, seed=0)
    with pytest.raises(ValueError, match="not finite"):
        compare([math.nan], [0.5], resamples=10, seed=0)
    with pytest.raises(ValueError, match="resamples"):
        compare([0.5], [0.1], resamples=0, seed=0)


# ------------------------------------------------------------------ calibration


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_false_positive_rate_of_equal_arms(kind: str) -> None:
    """Make 300 A/A comparisons of 30 users; ``eval.benchmarks.calibration`` makes 1,000, also with 1,000 users."""
    row = calibrate(kind, 30, comparisons=300, resamples=400, bootstraps=kind == "ndcg")
    assert keeps(row, slack=3 * math.sqrt(0.05 * 0.95 / 300)), row
    assert row["verdict"] <= min(row["flip_p"], row["flip_interval"])
    if kind == "ndcg":  # the check detects a method that exceeds its level
        assert row["bca_interval"] > 0.1
        assert not keeps({**row, "flip_interval": row["bca_interval"]}, slack=0.038)


def test_false_positive_rate_of_families() -> None:
    """Use 150 families of six; the committed results use 1,000, also with more users and real rows."""
    row = familywise(partial(run_like, 30, 1), repetitions=150, resamples=400)
    assert row["comparisons"] == 6 and 0.03 < row["attainable"] <= 0.05
    assert row["any"] <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)
    effect = familywise(lambda rng: _worse(run_like(30, 1, rng)), repetitions=20, resamples=400)
    assert effect["any"] == effect["worse"] == 1.0  # so that the check can fail


def _worse(contrasts: list[Contrast]) -> list[Contrast]:
    """Give the first row of an RMSE comparison larger errors."""
    first = contrasts[0]
    return [replace(first, a=replace(first.a, values=first.b.values + 1)), *contrasts[1:]]


def test_swapped_seeds_keep_pairs_of_values() -> None:
    n = 400
    values = {(name, seen): (np.arange(n) + 0.5, -np.arange(n) - 0.5) for name in MODELS for seen in ("in", "out")}
    result = swapped(values, "NDCG@10", np.random.default_rng(0))
    assert len(result) == 2 * len(MODELS)
    for contrast in result:
        assert np.array_equal(contrast.a.values, -contrast.b.values)  # both of one user
        assert 0.4 < float((contrast.a.values > 0).mean()) < 0.6
        assert len(set(np.abs(contrast.a.values))) < n  # with replacement
    assert np.array_equal(result[0].a.values, result[1].a.values)  # one coin for both treatments of the history
    assert not np.array_equal(result[0].a.values, result[2].a.values)


def test_widened_intervals_of_few_users_have_better_coverage() -> None:
    rng = np.random.default_rng(0)
    missed = {True: 0, False: 0}
    for trial in range(600):
        values = rng.normal(1, 1, 12)
        for widen in missed:
            result = bootstrap_interval(values, resamples=300, seed=trial, widen=widen)
            missed[widen] += not result.low <= 1 <= result.high
    assert missed[True] / 600 <= 0.075 < missed[False] / 600


def test_many_users_are_not_widened() -> None:
    values = np.random.default_rng(0).random(3000)
    plain, wide = (bootstrap_interval(values, resamples=500, seed=0, widen=each) for each in (False, True))
    assert wide.low == pytest.approx(plain.low, abs=1e-4)
    for n in (1, 2, 3):
        result = bootstrap_interval(values[:n], resamples=200, seed=0, method="bca", widen=True)
        assert values[:n].min() <= result.low <= result.high <= values[:n].max()


# ------------------------------------------------------------------ seeds


def test_variance_over_seeds_keeps_the_level() -> None:
    rng = np.random.default_rng(0)
    wrong = alone = 0
    for trial in range(400):
        # Equal systems, whose seeds differ by as much as the mean over users does.
        user, shift = rng.normal(0, 0.5, 100), rng.normal(0, 0.05, 3)
        a = user + shift[:, None] + rng.normal(0, 0.1, (3, 100))
        b = user + rng.normal(0, 0.1, 100)
        result = sign_flip_test(a.mean(axis=0), b, resamples=200, seed=trial)
        both = add_seed_variance(result, a.mean(axis=1), b.mean(keepdims=True), seed=trial)
        assert both.value == result.value and both.p >= result.p
        alone += result.p <= 0.05
        wrong += both.p <= 0.05
    assert alone > 100 and wrong < 30
    # One seed has no variance, and neither have equal values.
    assert add_seed_variance(result, [0.1], [0.2], seed=0) is result
    assert add_seed_variance(result, [0.1, 0.1], [0.2], seed=0) is result
    # Rows with equal numbers of seeds are paired, so that the effect of a seed on both cancels out.
    shared = add_seed_variance(result, [0.1, 0.2, 0.3], [0.0, 0.1, 0.2], seed=0)
    assert np.allclose(shared.draws, result.draws)
    wide = add_seed_variance(result, [0.1, 0.2, 0.3], [0.0, 0.1], seed=0)
    assert np.ptp(wide.draws) > np.ptp(result.draws)


# ------------------------------------------------------------------ detectable differences


def test_detectable_difference_by_formula() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 400))
    sd = np.std(a - b, ddof=1)
    t = scipy.stats.t(399).ppf
    assert detectable_effect(a, b) == pytest.approx((t(0.975) + t(0.8)) * sd / 20)
    assert detectable_effect(a, b, comparisons=5) == pytest.approx((t(0.995) + t(0.8)) * sd / 20)
    assert detectable_effect([1.0, 1.0], [0.0, 0.0]) is None
    assert detectable_effect([1.0], [0.0]) is None
    users = [f"u{n}" for n in range(400) for _ in range(8)]
    together = detectable_effect(np.repeat(a, 8), np.repeat(b, 8), users=users)
    assert together == pytest.approx(detectable_effect(a, b))


@pytest.mark.parametrize("statistic", ["mean", "root_mean"])
def test_detectable_difference_has_eighty_percent_power(statistic: Literal["mean", "root_mean"]) -> None:
    rng = np.random.default_rng(3)
    n, shown = 150, 0
    trial_a, trial_b = rng.gamma(2, 1, n * 400), rng.gamma(2, 1, n * 400)
    lift = detectable_effect(trial_a[: n * 20], trial_b[: n * 20], statistic=statistic)
    assert lift is not None
    lift *= math.sqrt(20)  # of n users instead of 20 n
    factor = 1 + (2 * lift / math.sqrt(2) if statistic == "root_mean" else lift / 2)
    for trial in range(400):
        part = slice(trial * n, (trial + 1) * n)
        result = sign_flip_test(
            trial_a[part] * factor, trial_b[part], resamples=300, seed=trial, statistic=statistic
        ).at()
        shown += verdict(result) == "shown"
    assert 0.7 <= shown / 400 <= 0.88


def test_detectable_line() -> None:
    assert describe_detectable_effects("NDCG@10", [0.0123, 0.02], users=22363, comparisons=5).startswith(
        "With 22,363 users and 5 planned comparisons, a true difference in NDCG@10 of 0.012 to 0.02 would be "
    )
    assert "leave 0 outside an unadjusted" in describe_detectable_effects("RMSE", [0.0123], users=9, comparisons=0)
    assert "of 0.012 would" in describe_detectable_effects("RMSE", [0.0123, None], users=9, comparisons=1)
    assert "is unknown" in describe_detectable_effects("RMSE", [None], users=9, comparisons=1)
