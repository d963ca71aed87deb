"""The test for a position bias: any dependence of the target's rank on its position, monotone or not."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from llmrec.pipeline.results import position_bias

PLACES = 20


def ranked(preferred: np.ndarray, requests: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return positions drawn at random, and the ranks of a row that likes positions as ``preferred`` says."""
    rng = np.random.default_rng(seed)
    position = rng.integers(1, PLACES + 1, requests)
    liked = preferred[position - 1] + noise * rng.normal(size=requests)
    return position, np.clip(np.round(liked), 1, PLACES)


def test_a_preference_for_labels_anywhere_in_the_list_is_found() -> None:
    """A row that has learned a few labels, as one did from fifteen examples: its correlation shows nothing."""
    order = np.array(["OPFRHDBMIANSTECJLGKQ".index(label) + 1.0 for label in "ABCDEFGHIJKLMNOPQRST"])
    position, rank = ranked(order, 100, noise=1.5)
    found = position_bias(position, rank, resamples=999, seed=0)
    assert found is not None and found.p == 0.001
    assert scipy.stats.spearmanr(position, rank).pvalue > 0.05
    assert found.share > 0.8 > 0.25 > found.chance > 0.15


def test_the_share_is_the_statistic_of_kruskal_and_wallis() -> None:
    position, rank = ranked(np.linspace(5, 9, PLACES), 300, noise=4.0)
    found = position_bias(position, rank, resamples=50, seed=0)
    assert found is not None
    wanted = scipy.stats.kruskal(*(rank[position == place] for place in np.unique(position)))
    assert found.share == pytest.approx(wanted.statistic / 299)
    assert found.rho == pytest.approx(scipy.stats.spearmanr(position, rank).statistic)
    assert found.chance == pytest.approx((len(np.unique(position)) - 1) / 299)


def test_without_a_bias_p_is_as_often_small_as_it_should_be() -> None:
    flat = np.full(PLACES, 10.0)
    found = [position_bias(*ranked(flat, 80, noise=5.0, seed=seed), resamples=99, seed=seed) for seed in range(200)]
    p = np.array([each.p for each in found if each is not None])
    assert len(p) == 200 and (p <= 0.05).mean() == pytest.approx(0.05, abs=0.04)
    assert np.mean([each.share - each.chance for each in found if each is not None]) == pytest.approx(0, abs=0.02)


def test_what_cannot_be_tested_is_not() -> None:
    ones, places = np.ones(6), np.arange(1, 7)
    for position, rank in ((places, ones), (ones.astype(int), places.astype(float)), (places, places.astype(float))):
        assert position_bias(position, rank, resamples=9, seed=0) is None
