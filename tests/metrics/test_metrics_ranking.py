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
from llmrec.metrics.ranking import (
    Standing,
    auc,
    average_precision,
    expected_rank,
    hit_rate,
    ndcg,
    precision,
    reciprocal_rank,
    standing,
    tie_rate,
)
from llmrec.types import Ranking
from tests.facts import Facts, raises


def _ranking(scores: dict[str, float]) -> Ranking:
    return Ranking(request_id="r", items=tuple(scores), scores=tuple(scores.values()))


def _one(metric: Callable[..., NDArray[np.float64]], place: Standing, *k: int) -> float:
    return float(metric(np.array([place.greater]), np.array([place.tied]), *k)[0])


# ------------------------------------------------------------------ worked by hand


def test_third_place_without_ties() -> None:
    place = standing(_ranking({"a": 5.0, "b": 4.0, "target": 3.0, "c": 1.0}), "target", pool=4)
    assert place == Standing(greater=2, tied=1, missing=False)
    assert _one(hit_rate, place, 2) == 0.0
    assert _one(hit_rate, place, 3) == 1.0
    assert _one(ndcg, place, 10) == pytest.approx(0.5)  # 1 / log2(4)
    assert _one(reciprocal_rank, place) == pytest.approx(1 / 3)
    assert _one(expected_rank, place) == 3.0


def test_a_list_that_is_cut_inside_the_block_at_its_end() -> None:
    cut = Ranking(request_id="r", items=("a", "b", "c"), scores=(2.0, 1.0, 1.0), unlisted=4)
    assert standing(cut, "a", pool=9) == Standing(greater=0, tied=1, missing=False)
    for target in ("b", "c", "elsewhere"):
        assert standing(cut, target, pool=9) == Standing(greater=1, tied=6, missing=False)
    with pytest.raises(ValueError, match="7 items are ranked, but there are only 6 candidates"):
        standing(cut, "a", pool=6)


def test_a_block_of_three_behind_one() -> None:
    place = standing(_ranking({"a": 9.0, "b": 2.0, "target": 2.0, "c": 2.0, "d": 0.0}), "target", pool=5)
    assert place == Standing(greater=1, tied=3, missing=False)  # ranks 2, 3 and 4
    assert _one(hit_rate, place, 1) == 0.0
    assert _one(hit_rate, place, 3) == pytest.approx(2 / 3)
    assert _one(ndcg, place, 3) == pytest.approx((1 / math.log2(3) + 1 / math.log2(4)) / 3)
    assert _one(reciprocal_rank, place) == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert _one(reciprocal_rank, place, 3) == pytest.approx((1 / 2 + 1 / 3) / 3)
    assert _one(expected_rank, place) == 3.0


def test_all_tied_scores_what_chance_scores() -> None:
    place = standing(_ranking({f"i{n}": 0.0 for n in range(20)}), "i0", pool=20)
    assert _one(hit_rate, place, 5) == pytest.approx(0.25)
    assert _one(ndcg, place, 10) == pytest.approx(sum(1 / math.log2(rank + 1) for rank in range(1, 11)) / 20)


def test_a_missing_target_counts_zero_at_every_cutoff() -> None:
    place = standing(_ranking({"a": 1.0, "b": 0.5}), "target", pool=20)
    assert place == Standing(greater=20, tied=0, missing=True)
    for k in (1, 10, 20, 1000):
        assert _one(hit_rate, place, k) == 0.0
        assert _one(ndcg, place, k) == 0.0
    assert _one(reciprocal_rank, place) == 0.0
    assert math.isnan(_one(expected_rank, place))


def test_infinite_scores_are_ranked() -> None:
    assert standing(_ranking({"a": -math.inf, "t": -math.inf, "b": 0.0}), "t", pool=3) == Standing(1, 2, False)


def test_precision_average_precision_and_auc() -> None:
    place = standing(_ranking({"a": 9.0, "b": 2.0, "target": 2.0, "c": 2.0, "d": 0.0}), "target", pool=5)
    assert _one(precision, place, 3) == pytest.approx(2 / 3 / 3)
    assert _one(average_precision, place) == _one(reciprocal_rank, place)
    # One item above, two beside and one below it.
    assert _one(auc, place, 5) == pytest.approx((0 + 0.5 + 0.5 + 1) / 4)
    missing = standing(_ranking({"a": 1.0}), "target", pool=5)
    assert _one(auc, missing, 5) == 0.0
    assert _one(auc, Standing(0, 1, False), 1) == 0.5
    with pytest.raises(ValueError, match="more items"):
        _one(auc, place, 3)


def test_tie_rate_counts_targets_that_share_a_score() -> None:
    assert tie_rate(np.array([1, 2, 5, 0])) == 0.5


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("where", ["target", "other"])
def test_a_nan_score_is_an_error(where: str) -> None:
    with raises(LlmrecError, Facts("bad-value", says=("request 'r'", "model.dtype=float32"))):
        standing(_ranking({"target": 1.0, "other": 2.0} | {where: math.nan}), "target", pool=2)


def test_malformed_rankings_are_errors() -> None:
    with pytest.raises(ValueError, match="duplicate item"):
        standing(Ranking(request_id="r", items=("a", "a"), scores=(1.0, 0.0)), "a", pool=3)
    with pytest.raises(ValueError, match="2 items, but 1 scores"):
        standing(Ranking(request_id="r", items=("a", "b"), scores=(1.0,)), "a", pool=3)
    with pytest.raises(ValueError, match="only 1 candidates"):
        standing(_ranking({"a": 1.0, "b": 0.0}), "a", pool=1)


def test_malformed_arrays_are_errors() -> None:
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


def test_no_requests_give_no_values() -> None:
    none = np.array([], dtype=int)
    assert hit_rate(none, none, 3).shape == ndcg(none, none, 3).shape == reciprocal_rank(none, none).shape == (0,)


# ------------------------------------------------------------------ properties

_PLACES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=30)
_METRICS: list[Callable[..., NDArray[np.float64]]] = [hit_rate, ndcg, reciprocal_rank]


def _arrays(places: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    pairs = np.array(places, dtype=np.int64)
    return pairs[:, 0], pairs[:, 1]


@given(places=_PLACES, k=st.integers(1, 50))
def test_values_lie_between_zero_and_one_and_grow_with_k(places: list[tuple[int, int]], k: int) -> None:
    greater, tied = _arrays(places)
    for metric in _METRICS:
        small, large = metric(greater, tied, k), metric(greater, tied, k + 1)
        assert ((small >= 0) & (small <= 1)).all()
        assert (large >= small - 1e-12).all()
    assert (ndcg(greater, tied, k) <= hit_rate(greater, tied, k) + 1e-12).all()


@given(places=_PLACES, k=st.integers(1, 50), seed=st.integers(0, 999))
def test_the_order_of_users_does_not_matter(places: list[tuple[int, int]], k: int, seed: int) -> None:
    greater, tied = _arrays(places)
    order = np.random.default_rng(seed).permutation(len(greater))
    for metric in _METRICS:
        assert np.array_equal(metric(greater, tied, k)[order], metric(greater[order], tied[order], k))


@given(scores=st.lists(st.integers(0, 5), min_size=2, max_size=25), lift=st.floats(0, 6), k=st.integers(1, 25))
def test_moving_the_target_up_never_lowers_a_metric(scores: list[int], lift: float, k: int) -> None:
    names = [f"i{n}" for n in range(len(scores))]
    before = dict(zip(names, map(float, scores), strict=True))
    after = before | {"i0": before["i0"] + lift}
    low, high = (standing(_ranking(each), "i0", len(names)) for each in (before, after))
    for metric in _METRICS:
        assert _one(metric, high, k) >= _one(metric, low, k) - 1e-12


@given(scores=st.lists(st.integers(0, 3), min_size=1, max_size=6), k=st.integers(1, 7))
def test_the_expectation_equals_all_orders_of_the_tied_blocks(scores: list[int], k: int) -> None:
    place = standing(_ranking({f"i{n}": float(score) for n, score in enumerate(scores)}), "i0", len(scores))
    ranks = [
        order.index(0) + 1
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    assert abs(_one(hit_rate, place, k) - np.mean([rank <= k for rank in ranks])) < 1e-12
    assert abs(_one(ndcg, place, k) - np.mean([(rank <= k) / math.log2(rank + 1) for rank in ranks])) < 1e-12
    assert abs(_one(reciprocal_rank, place) - np.mean([1 / rank for rank in ranks])) < 1e-12
    assert abs(_one(expected_rank, place) - np.mean(ranks)) < 1e-12
    assert abs(_one(precision, place, k) - np.mean([rank <= k for rank in ranks]) / k) < 1e-12
    if len(scores) > 1:
        below = [(len(scores) - rank) / (len(scores) - 1) for rank in ranks]
        assert abs(_one(auc, place, len(scores)) - np.mean(below)) < 1e-12


@given(scores=st.permutations([3.0, 3.0, 3.0, 1.0, 2.0]))
def test_the_order_of_candidates_cannot_move_the_standing(scores: list[float]) -> None:
    names = {3.0: iter(["target", "x", "y"]), 1.0: iter(["z"]), 2.0: iter(["w"])}
    assert standing(_ranking({next(names[score]): score for score in scores}), "target", 5) == Standing(0, 3, False)


def test_large_catalogues_keep_their_precision() -> None:
    greater, tied = np.array([999_999, 0, 123_456]), np.array([1, 1_000_000, 7])
    exact = [math.fsum(1 / rank for rank in range(g + 1, g + t + 1)) / t for g, t in zip(greater, tied, strict=True)]
    assert reciprocal_rank(greater, tied) == pytest.approx(exact, rel=1e-8)


def test_tie_free_runs_equal_trec_eval() -> None:
    measures = pytest.importorskip("ir_measures", reason="ir-measures is not installed: pip install 'llmrec[dev]'")
    pytest.importorskip("pytrec_eval", reason="pytrec-eval is not installed: pip install 'llmrec[dev]'")
    rng = np.random.default_rng(0)
    qrels, run, places = {}, {}, []
    for query in range(1000):
        size = int(rng.integers(1, 60))
        scores = {f"d{n}": float(score) for n, score in enumerate(rng.permutation(size))}
        qrels[f"q{query}"] = {"d0": 1}
        missing = size > 1 and rng.random() < 0.1
        run[f"q{query}"] = {item: score for item, score in scores.items() if not (missing and item == "d0")}
        places.append(standing(_ranking(run[f"q{query}"]), "d0", size))
    greater, tied = np.array([p.greater for p in places]), np.array([p.tied for p in places])
    wanted = [measures.Success @ 5, measures.R @ 10, measures.nDCG @ 10, measures.nDCG @ 3, measures.RR]
    mine = [
        hit_rate(greater, tied, 5),
        hit_rate(greater, tied, 10),
        ndcg(greater, tied, 10),
        ndcg(greater, tied, 3),
        reciprocal_rank(greater, tied),
    ]
    found = {(str(row.measure), row.query_id): row.value for row in measures.iter_calc(wanted, qrels, run)}
    assert len(found) == 5000
    for measure, values in zip(wanted, mine, strict=True):
        theirs = np.array([found[(str(measure), f"q{query}")] for query in range(1000)])
        assert np.abs(theirs - values).max() < 1e-9, str(measure)
