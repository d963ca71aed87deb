"""The test for position bias: any dependence of the rank of the target on its position."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from llmrec.pipeline.results import position_bias

POSITIONS = 20


def ranked(preferred: np.ndarray, requests: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return random positions, and the ranks of a model with preferred positions."""
    rng = np.random.default_rng(seed)
    position = rng.integers(1, POSITIONS + 1, requests)
    liked = preferred[position - 1] + noise * rng.normal(size=requests)
    return position, np.clip(np.round(liked), 1, POSITIONS)


def test_finds_preference_for_some_labels() -> None:
    """The correlation of rank and position is near zero."""
    order = np.array(["OPFRHDBMIANSTECJLGKQ".index(label) + 1.0 for label in "ABCDEFGHIJKLMNOPQRST"])
    position, rank = ranked(order, 100, noise=1.5)
    bias = position_bias(position, rank, resamples=999, seed=0)
    assert bias is not None and bias.p == 0.001
    assert scipy.stats.spearmanr(position, rank).pvalue > 0.05
    assert bias.share > 0.8 > 0.25 > bias.chance > 0.15


def test_share_is_kruskal_wallis_statistic() -> None:
    position, rank = ranked(np.linspace(5, 9, POSITIONS), 300, noise=4.0)
    bias = position_bias(position, rank, resamples=50, seed=0)
    assert bias is not None
    expected = scipy.stats.kruskal(*(rank[position == each] for each in np.unique(position)))
    assert bias.share == pytest.approx(expected.statistic / 299)
    assert bias.rho == pytest.approx(scipy.stats.spearmanr(position, rank).statistic)
    assert bias.chance == pytest.approx((len(np.unique(position)) - 1) / 299)


def test_p_values_are_calibrated_without_bias() -> None:
    flat = np.full(POSITIONS, 10.0)
    results = [position_bias(*ranked(flat, 80, noise=5.0, seed=seed), resamples=99, seed=seed) for seed in range(200)]
    p = np.array([each.p for each in results if each is not None])
    assert len(p) == 200 and (p <= 0.05).mean() == pytest.approx(0.05, abs=0.04)
    assert np.mean([each.share - each.chance for each in results if each is not None]) == pytest.approx(0, abs=0.02)


def test_returns_none_if_test_is_impossible() -> None:
    ones, ranks = np.ones(6), np.arange(1, 7)
    for position, rank in ((ranks, ones), (ones.astype(int), ranks.astype(float)), (ranks, ranks.astype(float))):
        assert position_bias(position, rank, resamples=9, seed=0) is None
