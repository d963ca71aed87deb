"""Families of tests: Holm levels, and intervals that agree with the adjusted p-values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.metrics.significance import holm_adjusted, holm_levels, holm_p_values, required_resamples, sign_flip_test
from llmrec.metrics.stats import ALPHA, BootstrapDifference, StatisticName

_P = st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.0125, 0.02, 0.025, 0.03, 0.05, 0.3, 1.0]), min_size=1, max_size=8)


def test_levels_by_hand() -> None:
    # .01 <= .05 / 4 and .015 <= .05 / 3 are rejected, .03 > .05 / 2 is not, and the procedure stops there.
    assert holm_levels([0.04, 0.015, 0.01, 0.03]) == pytest.approx([0.025, 0.05 / 3, 0.0125, 0.025])
    assert holm_p_values([0.04, 0.015, 0.01, 0.03]) == pytest.approx([0.06, 0.045, 0.04, 0.06])
    assert holm_levels([0.001, 0.04]) == [0.025, 0.05]
    # Both adjusted p are .04, reached at the first step; .03 is above that step's level, .025, yet is rejected.
    assert holm_p_values([0.02, 0.03]) == pytest.approx([0.04, 0.04])
    assert holm_levels([0.02, 0.03]) == [0.025, 0.05]
    assert holm_p_values([]) == holm_levels([]) == []
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm_p_values([1.2])


@given(_P)
def test_adjusted_p_and_level_agree(p_values: list[float]) -> None:
    for p, adjusted, level in zip(p_values, holm_p_values(p_values), holm_levels(p_values), strict=True):
        assert (adjusted <= ALPHA) == (p <= level + 1e-15)


def test_number_of_resamples() -> None:
    assert (
        required_resamples(2000, 1) == 2000
        and required_resamples(2000, 6) == 4800
        and required_resamples(10_000, 6) == 10_000
    )
    for comparisons in (1, 7, 40):
        assert required_resamples(1, comparisons) * ALPHA / comparisons / 2 == pytest.approx(20)


def _family(rng: np.random.Generator) -> list[BootstrapDifference]:
    """Return a family of up to seven comparisons of few or many users, with effects near the limit of significance."""
    result = []
    for _ in range(int(rng.integers(1, 8))):
        n, effect = int(rng.integers(2, 60)), rng.normal(0, 3)
        kind = rng.integers(0, 4)
        if kind == 0:
            a, b = rng.normal(effect / n**0.5, 1, n), np.zeros(n)
        elif kind == 1:
            a, b = ((rng.random(n) < share).astype(float) for share in rng.uniform(0, 0.6, 2))
        elif kind == 2:
            a, b = rng.integers(0, 3, n) / 2 + effect / 10, rng.integers(0, 3, n) / 2
        else:
            a, b = rng.exponential(1, n) * np.exp(effect / 8), rng.exponential(1, n)
        statistic: StatisticName = "root_mean" if kind == 3 else "mean"
        result.append(
            sign_flip_test(a, b, resamples=int(rng.choice([60, 300])), seed=int(rng.integers(99)), statistic=statistic)
        )
    return result


def test_verdict_and_interval_agree() -> None:
    """Use too few resamples, so that intervals and counted p-values sometimes disagree at the threshold."""
    rng = np.random.default_rng(5)
    significant, moved, number = 0, 0, 0
    for _ in range(200):
        family = _family(rng)
        for sampled, result in zip(family, holm_adjusted(family), strict=True):
            outside = not result.low <= 0 <= result.high
            assert outside == (result.p <= ALPHA), result
            assert result.low <= result.high and (not outside or (result.low > 0) == (result.value > 0))
            plain = sampled.at(result.level)
            moved += (plain.low, plain.high) != (result.low, result.high)
            significant, number = significant + outside, number + 1
    assert 0.1 < significant / number < 0.9 and 0 < moved / number < 0.2


def test_interval_away_from_zero_is_not_changed() -> None:
    rng = np.random.default_rng(1)
    family = [sign_flip_test(rng.normal(mean, 1, 80), np.zeros(80), resamples=3000, seed=0) for mean in (1.0, 0.9, 0.0)]
    for sampled, result, level in zip(family, holm_adjusted(family), (0.05 / 3, 0.025, 0.05), strict=True):
        assert (result.low, result.high) == (sampled.at(1 - level).low, sampled.at(1 - level).high)
        assert result.level == pytest.approx(1 - level) and result.p_raw == sampled.p


def test_interval_ends_move_to_agree_with_p() -> None:
    draws = np.array([-0.1, -0.05, 0.02, 0.3, 0.5, 0.6])
    (result,) = holm_adjusted([BootstrapDifference(0.3, 0.01, draws)])
    assert result.low == 0.02 and result.high > 0.3
    (result,) = holm_adjusted([BootstrapDifference(-0.3, 0.01, -draws)])
    assert result.high == -0.02
    (result,) = holm_adjusted([BootstrapDifference(0.3, 0.2, draws + 1)])
    assert result.low == 0.0 and result.high > 1
    (result,) = holm_adjusted([BootstrapDifference(0.3, 0.01, np.array([-0.1, -0.2]))])
    assert 0 < result.low <= result.high == 0.3
