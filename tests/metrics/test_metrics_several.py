from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmrec.errors import LlmrecError
from llmrec.metrics import multi_target, ranking
from llmrec.metrics.multi_target import RelevantRanks, RequestItemValues, match_relevant
from tests.facts import Facts, raises


def _pairs(rows: Sequence[tuple[int, int, float]]) -> RequestItemValues:
    request, item, value = zip(*rows, strict=True) if rows else ((), (), ())
    return RequestItemValues(
        np.array(request, dtype=np.int64), np.array(item, dtype=np.int64), np.array(value, dtype=np.float64)
    )


def _one(scores: dict[int, float], gains: dict[int, float]) -> RelevantRanks:
    """Judge one request."""
    ranked = _pairs([(0, item, score) for item, score in scores.items()])
    return match_relevant(ranked, _pairs([(0, item, gain) for item, gain in gains.items()]), 1)


# ------------------------------------------------------------------ worked by hand


def test_two_relevant_items_without_ties() -> None:
    judged = _one({10: 5.0, 11: 4.0, 12: 3.0, 13: 2.0}, {11: 1.0, 13: 1.0})  # ranks 2 and 4
    assert multi_target.hit_rate(judged, 1)[0] == 0.0
    assert multi_target.hit_rate(judged, 2)[0] == 1.0
    assert multi_target.recall(judged, 3)[0] == 0.5
    assert multi_target.precision(judged, 4)[0] == 0.5
    assert multi_target.precision(judged, 10)[0] == pytest.approx(0.2)
    assert multi_target.reciprocal_rank(judged)[0] == 0.5
    assert multi_target.average_precision(judged)[0] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert multi_target.average_precision(judged, 3)[0] == pytest.approx(1 / 2 / 2)
    ideal = 1 + 1 / math.log2(3)
    assert multi_target.ndcg(judged, 10)[0] == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / ideal)


def test_a_tied_block_with_two_relevant_items() -> None:
    # One item above, then a block of three with two relevant ones: the other is at rank 2, 3 or 4.
    judged = _one({0: 9.0, 1: 5.0, 2: 5.0, 3: 5.0}, {1: 1.0, 3: 1.0})
    assert multi_target.hit_rate(judged, 2)[0] == pytest.approx(2 / 3)
    assert multi_target.hit_rate(judged, 3)[0] == pytest.approx(1.0)
    assert multi_target.recall(judged, 2)[0] == pytest.approx((2 / 3) / 2)
    assert multi_target.reciprocal_rank(judged)[0] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    orders = [(1 / 3 + 2 / 4) / 2, (1 / 2 + 2 / 4) / 2, (1 / 2 + 2 / 3) / 2]
    assert multi_target.average_precision(judged)[0] == pytest.approx(np.mean(orders))


def test_graded_gains() -> None:
    judged = _one({0: 3.0, 1: 2.0, 2: 1.0}, {0: 1.0, 2: 3.0, 9: 2.0})  # 9 is not ranked
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert multi_target.ndcg(judged, 3)[0] == pytest.approx((1 + 3 / 2) / ideal)
    assert multi_target.ndcg(judged, 1)[0] == pytest.approx(1 / 3)
    assert multi_target.recall(judged, 3)[0] == pytest.approx(2 / 3)
    assert multi_target.average_precision(judged)[0] == pytest.approx((1 + 2 / 3) / 3)


def test_requests_are_independent() -> None:
    ranked = _pairs([(2, 0, 1.0), (0, 1, 3.0), (0, 0, 1.0), (2, 1, 2.0)])
    judged = match_relevant(ranked, _pairs([(0, 0, 1.0), (2, 1, 1.0), (3, 0, 1.0)]), 4)
    assert multi_target.reciprocal_rank(judged).tolist() == [0.5, 0.0, 1.0, 0.0]
    assert judged.total.tolist() == [1, 0, 1, 1]
    assert judged.ranked.tolist() == [2, 0, 2, 0]
    for metric in _METRICS.values():
        assert metric(judged, 3)[[1, 3]].tolist() == [0.0, 0.0]


def test_nothing_ranked_and_nothing_relevant() -> None:
    for ranked, relevant in (([], [(0, 1, 1.0)]), ([(0, 1, 1.0)], []), ([], [])):
        judged = match_relevant(_pairs(ranked), _pairs(relevant), 2)
        for metric in _METRICS.values():
            assert metric(judged, 5).tolist() == [0.0, 0.0]


# ------------------------------------------------------------------ errors


def test_rejects_malformed_tables() -> None:
    good = _pairs([(0, 1, 1.0)])
    with raises(LlmrecError, Facts("bad-value", says="request at index 0")):
        match_relevant(_pairs([(0, 1, math.nan), (0, 2, 1.0)]), good, 1)
    with pytest.raises(ValueError, match="duplicate items"):
        match_relevant(_pairs([(0, 1, 1.0), (0, 1, 0.5)]), good, 1)
    with pytest.raises(ValueError, match="duplicates"):
        match_relevant(good, _pairs([(0, 1, 1.0), (0, 1, 1.0)]), 1)
    with pytest.raises(ValueError, match="above 0"):
        match_relevant(good, _pairs([(0, 1, 0.0)]), 1)
    with pytest.raises(ValueError, match="request indices"):
        match_relevant(_pairs([(1, 1, 1.0)]), good, 1)
    with pytest.raises(ValueError, match="request indices"):
        match_relevant(_pairs([(0, -1, 1.0)]), good, 1)
    with pytest.raises(ValueError, match="same shape"):
        match_relevant(RequestItemValues(np.array([0]), np.array([1, 2]), np.array([1.0])), good, 1)
    with pytest.raises(ValueError, match="at least 1"):
        multi_target.ndcg(match_relevant(good, good, 1), 0)


def test_infinite_scores_are_ranked() -> None:
    judged = _one({0: math.inf, 1: -math.inf, 2: 0.0}, {2: 1.0})
    assert multi_target.reciprocal_rank(judged)[0] == 0.5


# ------------------------------------------------------------------ properties

Metric = Callable[[RelevantRanks, int], NDArray[np.float64]]
_METRICS: dict[str, Metric] = {
    "hit": multi_target.hit_rate,
    "recall": multi_target.recall,
    "precision": multi_target.precision,
    "ndcg": multi_target.ndcg,
    "map": multi_target.average_precision,
    "mrr": multi_target.reciprocal_rank,
}
_GAINS = st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.0]), min_size=1, max_size=6)


def _by_hand(order: Sequence[int], gains: dict[int, float], k: int) -> dict[str, float]:
    """Compute every metric of one order without ties from its definition."""
    relevant = [item in gains for item in order]
    ranks = [rank for rank, hit in enumerate(relevant, start=1) if hit and rank <= k]
    ideal = sorted(gains.values(), reverse=True)[:k]
    dcg = sum(gains[order[rank - 1]] / math.log2(rank + 1) for rank in ranks)
    return {
        "hit": float(bool(ranks)),
        "recall": len(ranks) / len(gains),
        "precision": len(ranks) / k,
        "ndcg": dcg / sum(gain / math.log2(rank + 1) for rank, gain in enumerate(ideal, start=1)),
        "map": sum(sum(relevant[:rank]) / rank for rank in ranks) / len(gains),
        "mrr": 1 / ranks[0] if ranks else 0.0,
    }


@given(data=st.data(), gains=_GAINS, k=st.integers(1, 7), missing=st.booleans())
def test_expectation_equals_mean_over_orders_of_ties(
    data: st.DataObject, gains: list[float], k: int, missing: bool
) -> None:
    scores = data.draw(st.lists(st.integers(0, 2), min_size=len(gains), max_size=len(gains)))
    expected = {item: gain for item, gain in enumerate(gains) if gain} | ({77: 1.0} if missing else {})
    if not expected:
        return
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    each = [_by_hand(order, expected, k) for order in orders]
    judged = _one(dict(enumerate(map(float, scores))), expected)
    for name, metric in _METRICS.items():
        assert metric(judged, k)[0] == pytest.approx(np.mean([one[name] for one in each]), abs=1e-12), name
    uncut = [_by_hand(order, expected, 99) for order in orders]
    assert multi_target.average_precision(judged)[0] == pytest.approx(np.mean([one["map"] for one in uncut]), abs=1e-12)
    assert multi_target.reciprocal_rank(judged)[0] == pytest.approx(np.mean([one["mrr"] for one in uncut]), abs=1e-12)


def _random(rng: np.random.Generator, n: int, *, levels: int) -> tuple[RequestItemValues, RequestItemValues]:
    """Make n requests with rankings of up to 40 items and up to 8 relevant ones, of which some are not ranked."""
    ranked, relevant = [], []
    for request in range(n):
        items = rng.permutation(50)[: rng.integers(1, 41)]
        scores = rng.permutation(len(items)) if not levels else rng.integers(0, levels, len(items))
        ranked += [(request, int(item), float(score)) for item, score in zip(items, scores, strict=True)]
        expected = rng.permutation(50)[: rng.integers(1, 9)]
        relevant += [(request, int(item), float(rng.integers(1, 4))) for item in expected]
    return _pairs(ranked), _pairs(relevant)


@given(seed=st.integers(0, 999), levels=st.sampled_from([0, 3]))
def test_renaming_and_reordering_change_nothing(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    ranked, relevant = _random(rng, 6, levels=levels)
    before = match_relevant(ranked, relevant, 6)
    users, items = rng.permutation(6), rng.permutation(60)
    moved = []
    for table in (ranked, relevant):
        rows = rng.permutation(len(table.item))
        moved.append(RequestItemValues(users[table.request[rows]], items[table.item[rows]], table.value[rows]))
    after = match_relevant(moved[0], moved[1], 6)
    for metric in _METRICS.values():
        for k in (1, 20):
            assert metric(after, k)[users] == pytest.approx(metric(before, k), abs=1e-12)


def test_one_target_equals_the_single_target_metrics() -> None:
    rng = np.random.default_rng(0)
    for levels in (0, 3):
        ranked, _ = _random(rng, 200, levels=levels)
        targets = rng.integers(0, 50, 200)
        judged = match_relevant(ranked, RequestItemValues(np.arange(200), targets, np.ones(200)), 200)
        greater, tied = np.zeros(200, dtype=np.int64), np.zeros(200, dtype=np.int64)
        for request, target in enumerate(targets):
            scores = ranked.value[ranked.request == request]
            score = ranked.value[(ranked.request == request) & (ranked.item == target)]
            greater[request] = (scores > score).sum() if score.size else len(scores)
            tied[request] = (scores == score).sum() if score.size else 0
        for k in (1, 3, 10):
            for name in ("hit_rate", "precision", "ndcg", "average_precision", "reciprocal_rank"):
                one = getattr(ranking, name)(greater, tied, k)
                assert getattr(multi_target, name)(judged, k) == pytest.approx(one, abs=1e-12), name


def test_blocks_of_thousands_keep_their_precision() -> None:
    n = 5000
    judged = _one(dict.fromkeys(range(n), 0.0), dict.fromkeys(range(0, n, 50), 1.0))
    relevant = n // 50
    exact, probability = 0.0, relevant / n
    for rank in range(1, n - relevant + 2):
        exact += probability / rank
        probability *= (n - rank - relevant + 1) / (n - rank)
    assert multi_target.reciprocal_rank(judged)[0] == pytest.approx(exact, abs=1e-12)
    misses = math.prod((n - relevant - shown) / (n - shown) for shown in range(10))
    assert multi_target.hit_rate(judged, 10)[0] == pytest.approx(1 - misses, abs=1e-9)
    assert multi_target.recall(judged, 10)[0] == pytest.approx(10 / n)


def test_tie_free_runs_equal_trec_eval() -> None:
    measures = pytest.importorskip("ir_measures", reason="ir-measures is not installed: pip install 'llmrec[dev]'")
    pytest.importorskip("pytrec_eval", reason="pytrec-eval is not installed: pip install 'llmrec[dev]'")
    ranked, relevant = _random(np.random.default_rng(5), 500, levels=0)
    judged = match_relevant(ranked, relevant, 500)
    run: dict[str, dict[str, float]] = {}
    qrels: dict[str, dict[str, int]] = {}
    for request, item, score in zip(ranked.request, ranked.item, ranked.value, strict=True):
        run.setdefault(f"q{request}", {})[f"d{item}"] = float(score)
    for request, item, gain in zip(relevant.request, relevant.item, relevant.value, strict=True):
        qrels.setdefault(f"q{request}", {})[f"d{item}"] = int(gain)
    expected = {
        measures.Success @ 5: multi_target.hit_rate(judged, 5),
        measures.R @ 10: multi_target.recall(judged, 10),
        measures.P @ 10: multi_target.precision(judged, 10),
        measures.P @ 100: multi_target.precision(judged, 100),
        measures.nDCG @ 5: multi_target.ndcg(judged, 5),
        measures.nDCG @ 20: multi_target.ndcg(judged, 20),
        measures.AP @ 10: multi_target.average_precision(judged, 10),
        measures.AP: multi_target.average_precision(judged),
        measures.RR: multi_target.reciprocal_rank(judged),
    }
    result = {(row.measure, row.query_id): row.value for row in measures.iter_calc(list(expected), qrels, run)}
    assert len(result) == 4500
    for measure, mine in expected.items():
        theirs = np.array([result[(measure, f"q{query}")] for query in range(500)])
        assert np.abs(theirs - mine).max() < 1e-9, str(measure)
