from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmrec.errors import LlmrecError
from llmrec.metrics.ranking import (
    TargetRank,
    auc,
    average_precision,
    expected_rank,
    hit_rate,
    ndcg,
    precision,
    reciprocal_rank,
    target_rank,
    tie_rate,
)
from llmrec.types import Ranking
from tests.facts import Facts, raises


def _ranking(scores: dict[str, float]) -> Ranking:
    return Ranking(request_id="r", items=tuple(scores), scores=tuple(scores.values()))


def _one(metric: Callable[..., NDArray[np.float64]], at: TargetRank, *k: int) -> float:
    return float(metric(np.array([at.greater]), np.array([at.tied]), *k)[0])


# ------------------------------------------------------------------ worked by hand


def test_third_place_without_ties() -> None:
    at = target_rank(_ranking({"a": 5.0, "b": 4.0, "target": 3.0, "c": 1.0}), "target", pool=4)
    assert at == TargetRank(greater=2, tied=1, missing=False)
    assert _one(hit_rate, at, 2) == 0.0
    assert _one(hit_rate, at, 3) == 1.0
    assert _one(ndcg, at, 10) == pytest.approx(0.5)  # 1 / log2(4)
    assert _one(reciprocal_rank, at) == pytest.approx(1 / 3)
    assert _one(expected_rank, at) == 3.0


def test_list_cut_inside_a_tied_block() -> None:
    cut = Ranking(request_id="r", items=("a", "b", "c"), scores=(2.0, 1.0, 1.0), unlisted=4)
    assert target_rank(cut, "a", pool=9) == TargetRank(greater=0, tied=1, missing=False)
    for target in ("b", "c", "elsewhere"):
        assert target_rank(cut, target, pool=9) == TargetRank(greater=1, tied=6, missing=False)
    with pytest.raises(ValueError, match="7 items are ranked, but there are only 6 candidates"):
        target_rank(cut, "a", pool=6)


def test_tied_block_of_three() -> None:
    at = target_rank(_ranking({"a": 9.0, "b": 2.0, "target": 2.0, "c": 2.0, "d": 0.0}), "target", pool=5)
    assert at == TargetRank(greater=1, tied=3, missing=False)  # ranks 2, 3 and 4
    assert _one(hit_rate, at, 1) == 0.0
    assert _one(hit_rate, at, 3) == pytest.approx(2 / 3)
    assert _one(ndcg, at, 3) == pytest.approx((1 / math.log2(3) + 1 / math.log2(4)) / 3)
    assert _one(reciprocal_rank, at) == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert _one(reciprocal_rank, at, 3) == pytest.approx((1 / 2 + 1 / 3) / 3)
    assert _one(expected_rank, at) == 3.0


def test_missing_target_counts_zero() -> None:
    at = target_rank(_ranking({"a": 1.0, "b": 0.5}), "target", pool=20)
    assert at == TargetRank(greater=20, tied=0, missing=True)
    for k in (20, 1000):
        assert _one(hit_rate, at, k) == 0.0
        assert _one(ndcg, at, k) == 0.0
    assert _one(reciprocal_rank, at) == 0.0
    assert math.isnan(_one(expected_rank, at))


def test_infinite_scores_are_ranked() -> None:
    assert target_rank(_ranking({"a": -math.inf, "t": -math.inf, "b": 0.0}), "t", pool=3) == TargetRank(1, 2, False)


def test_precision_average_precision_and_auc() -> None:
    at = target_rank(_ranking({"a": 9.0, "b": 2.0, "target": 2.0, "c": 2.0, "d": 0.0}), "target", pool=5)
    assert _one(precision, at, 3) == pytest.approx(2 / 3 / 3)
    assert _one(average_precision, at) == _one(reciprocal_rank, at)
    # One item above, two tied and one below it.
    assert _one(auc, at, 5) == pytest.approx((0 + 0.5 + 0.5 + 1) / 4)
    missing = target_rank(_ranking({"a": 1.0}), "target", pool=5)
    assert _one(auc, missing, 5) == 0.0
    assert _one(auc, TargetRank(0, 1, False), 1) == 0.5
    with pytest.raises(ValueError, match="more items"):
        _one(auc, at, 3)


def test_tie_rate_counts_targets_that_share_a_score() -> None:
    assert tie_rate(np.array([1, 2, 5, 0])) == 0.5


# ------------------------------------------------------------------ errors


def test_rejects_malformed_rankings() -> None:
    with raises(LlmrecError, Facts("bad-value", says=("request 'r'", "model.dtype=float32"))):
        target_rank(_ranking({"target": 1.0, "other": math.nan}), "target", pool=2)
    with pytest.raises(ValueError, match="duplicate item"):
        target_rank(Ranking(request_id="r", items=("a", "a"), scores=(1.0, 0.0)), "a", pool=3)
    with pytest.raises(ValueError, match="2 items, but 1 scores"):
        target_rank(Ranking(request_id="r", items=("a", "b"), scores=(1.0,)), "a", pool=3)
    with pytest.raises(ValueError, match="only 1 candidates"):
        target_rank(_ranking({"a": 1.0, "b": 0.0}), "a", pool=1)


def test_rejects_malformed_arrays() -> None:
    with pytest.raises(ValueError, match="integers"):
        hit_rate(np.array([math.nan]), np.array([1]), 5)
    with pytest.raises(ValueError, match="negative"):
        ndcg(np.array([-1]), np.array([1]), 5)
    with pytest.raises(ValueError, match="same shape"):
        ndcg(np.array([1, 2]), np.array([1]), 5)
    with pytest.raises(ValueError, match="at least 1"):
        ndcg(np.array([1]), np.array([1]), 0)
    with pytest.raises(ValueError, match="without requests"):
        tie_rate(np.array([], dtype=int))


def test_no_requests() -> None:
    none = np.array([], dtype=int)
    assert hit_rate(none, none, 3).shape == ndcg(none, none, 3).shape == reciprocal_rank(none, none).shape == (0,)


# ------------------------------------------------------------------ properties


@given(scores=st.lists(st.integers(0, 3), min_size=1, max_size=6), k=st.integers(1, 7))
def test_expectation_equals_mean_over_orders_of_ties(scores: list[int], k: int) -> None:
    at = target_rank(_ranking({f"i{n}": float(score) for n, score in enumerate(scores)}), "i0", len(scores))
    ranks = [
        order.index(0) + 1
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    assert abs(_one(hit_rate, at, k) - np.mean([rank <= k for rank in ranks])) < 1e-12
    assert abs(_one(ndcg, at, k) - np.mean([(rank <= k) / math.log2(rank + 1) for rank in ranks])) < 1e-12
    assert abs(_one(reciprocal_rank, at) - np.mean([1 / rank for rank in ranks])) < 1e-12
    assert abs(_one(expected_rank, at) - np.mean(ranks)) < 1e-12
    assert abs(_one(precision, at, k) - np.mean([rank <= k for rank in ranks]) / k) < 1e-12
    if len(scores) > 1:
        below = [(len(scores) - rank) / (len(scores) - 1) for rank in ranks]
        assert abs(_one(auc, at, len(scores)) - np.mean(below)) < 1e-12


@given(scores=st.permutations([3.0, 3.0, 3.0, 1.0, 2.0]))
def test_standing_does_not_depend_on_candidate_order(scores: list[float]) -> None:
    names = {3.0: iter(["target", "x", "y"]), 1.0: iter(["z"]), 2.0: iter(["w"])}
    assert target_rank(_ranking({next(names[score]): score for score in scores}), "target", 5) == TargetRank(
        0, 3, False
    )


def test_large_catalogues_keep_their_precision() -> None:
    greater, tied = np.array([999_999, 0, 123_456]), np.array([1, 1_000_000, 7])
    exact = [math.fsum(1 / rank for rank in range(g + 1, g + t + 1)) / t for g, t in zip(greater, tied, strict=True)]
    assert reciprocal_rank(greater, tied) == pytest.approx(exact, rel=1e-8)


def test_tie_free_runs_equal_trec_eval() -> None:
    measures = pytest.importorskip("ir_measures", reason="ir-measures is not installed: pip install 'llmrec[dev]'")
    pytest.importorskip("pytrec_eval", reason="pytrec-eval is not installed: pip install 'llmrec[dev]'")
    rng = np.random.default_rng(0)
    qrels, run, standings = {}, {}, []
    for query in range(1000):
        size = int(rng.integers(1, 60))
        scores = {f"d{n}": float(score) for n, score in enumerate(rng.permutation(size))}
        qrels[f"q{query}"] = {"d0": 1}
        missing = size > 1 and rng.random() < 0.1
        run[f"q{query}"] = {item: score for item, score in scores.items() if not (missing and item == "d0")}
        standings.append(target_rank(_ranking(run[f"q{query}"]), "d0", size))
    greater, tied = np.array([s.greater for s in standings]), np.array([s.tied for s in standings])
    expected = [measures.Success @ 5, measures.R @ 10, measures.nDCG @ 10, measures.nDCG @ 3, measures.RR]
    mine = [
        hit_rate(greater, tied, 5),
        hit_rate(greater, tied, 10),
        ndcg(greater, tied, 10),
        ndcg(greater, tied, 3),
        reciprocal_rank(greater, tied),
    ]
    result = {(str(row.measure), row.query_id): row.value for row in measures.iter_calc(expected, qrels, run)}
    assert len(result) == 5000
    for measure, values in zip(expected, mine, strict=True):
        theirs = np.array([result[(str(measure), f"q{query}")] for query in range(1000)])
        assert np.abs(theirs - values).max() < 1e-9, str(measure)
