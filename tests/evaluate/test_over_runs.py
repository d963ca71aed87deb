"""Metrics over several training seeds: the interval is over users, each measured with all seeds."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from llmrec.evaluate.compare import average_over_seeds
from llmrec.evaluate.figures import mean_interval
from llmrec.metrics.probability import auc, gauc
from llmrec.results import Figure

USERS, SEEDS = 200, 5


def _figure(metric: str, values: NDArray[np.float64], users: list[str]) -> Figure:
    result = mean_interval(metric, values, users, resamples=500, seed=0)
    return Figure(value=result.value, low=result.low, high=result.high)


@pytest.mark.parametrize("metric", ["NDCG@10", "RMSE"])
def test_random_differences_of_seeds_do_not_widen_the_interval(metric: str) -> None:
    rng = np.random.default_rng(0)
    users = [f"u{n}" for n in range(USERS)]
    level, noise = rng.random(USERS), rng.random((SEEDS, USERS))
    values = level + 3 * noise
    each = [_figure(metric, one, users) for one in values]
    result = average_over_seeds(each, list(values), metric=metric, users=users, resamples=500)
    assert result.value == pytest.approx(np.mean([one.value for one in each]))
    assert result.low is not None and result.high is not None and result.low < result.value < result.high
    # 3.92 standard errors of the mean over seeds; the intervals of single seeds have nearly twice that.
    root = (lambda x: np.sqrt(x.mean(axis=1))) if metric == "RMSE" else (lambda x: x.mean(axis=1))
    means = [root(values[:, rng.integers(0, USERS, USERS)]).mean() for _ in range(2000)]
    assert result.high - result.low == pytest.approx(3.92 * np.std(means), rel=0.1)
    single = np.mean([one.high - one.low for one in each if one.high is not None and one.low is not None])
    assert result.high - result.low < 0.7 * single


@pytest.mark.parametrize("metric", ["AUC", "GAUC"])
def test_auc_is_averaged_and_not_the_probabilities(metric: str) -> None:
    rng = np.random.default_rng(1)
    users = [f"u{n // 10}" for n in range(600)]
    truth = rng.random(600) < 0.5
    probabilities = np.clip(0.5 + 0.2 * (truth - 0.5) + 0.3 * rng.normal(size=(SEEDS, 600)), 0.01, 0.99)
    signed = [np.where(truth, one, -one) for one in probabilities]
    area = [auc(one, truth) if metric == "AUC" else np.nanmean(gauc(one, truth, users).values) for one in probabilities]
    each = [Figure(value=float(one), low=float(one) - 0.2, high=float(one) + 0.2) for one in area]
    result = average_over_seeds(each, signed, metric=metric, users=users, resamples=300)
    assert result.value == pytest.approx(np.mean(area))
    assert result.low is not None and result.high is not None and result.low < result.value < result.high
    assert result.high - result.low < 0.1


def test_metric_of_a_corpus_has_the_mean_interval() -> None:
    each = [Figure(value=0.4, low=0.3, high=0.6), Figure(value=0.6, low=0.4, high=0.7)]
    result = average_over_seeds(each, metric="BLEU-4", users=["a"], resamples=10)
    assert (result.value, result.low, result.high) == pytest.approx((0.5, 0.35, 0.65))
    assert average_over_seeds(each[:1], [np.zeros(1)], metric="NDCG@10", users=["a"], resamples=10) is each[0]
