"""Rankings of the full catalogue equal those of a slow loop, with and without seen items."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from llmrec.baselines.popular import Popularity, Random
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.errors import LlmrecError
from llmrec.evaluate.catalogue import evaluate_catalogue, rank_catalogue
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.lists import ListMetricData
from llmrec.evaluate.predictor import evaluate
from llmrec.metrics.beyond import ItemContents
from llmrec.metrics.ranking import target_rank
from llmrec.metrics.signature import parse_signature
from llmrec.recipe.schema import Split
from llmrec.tasks.family import family_of
from llmrec.types import Case, Event, Item, Ranking, Request
from tests.facts import Facts, raises


class Scored:
    """Returns the scores that a test sets, by request id."""

    name = "scored"

    def __init__(self, items: Sequence[str], table: dict[str, Sequence[float]], dtype: Any = np.float64) -> None:
        self.items, self.table, self.dtype = tuple(items), table, dtype
        self.sizes: list[int] = []

    def scores(self, requests: Sequence[Request]) -> NDArray[Any]:
        self.sizes.append(len(requests))
        return np.array([self.table[request.id] for request in requests], dtype=self.dtype)


def case(k: int, truth: str, history: str = "") -> Case:
    events = tuple(Event(item_id=item) for item in history)
    return Case(request=Request(id=f"r{k}", user_id=f"u{k}", history=events), truth=truth)


def protocol(items: int, cutoffs: tuple[int, ...] = (1, 2)) -> EvalProtocol:
    return EvalProtocol(
        split="leave_one_out/test", candidates="uniform-4", cutoffs=cutoffs, resamples=100, seed=0, catalogue=items
    )


# ------------------------------------------------------------------ standings


def test_ranks_by_hand() -> None:
    # Ranked above the target b: a and d; tied with it: c. The user had a, c and twice d; z is not in the catalogue.
    result = rank_catalogue(Scored("abcde", {"r0": [4, 2, 2, 3, 1]}), [case(0, "b", "acddz")], cutoffs=(3,))
    assert (result["included"].greater[0], result["included"].tied[0], result["included"].pool[0]) == (2, 2, 5)
    assert (result["excluded"].greater[0], result["excluded"].tied[0], result["excluded"].pool[0]) == (0, 1, 2)
    assert result["excluded"].lists.tolist() == [[1, 4, -1]]
    assert np.isnan(result["excluded"].scores[0, 2])
    assert result["included"].lists[0, :2].tolist() == [0, 3]
    assert result["included"].lists[0, 2] in (1, 2)

    # A target in the history can be ranked.
    repeated = rank_catalogue(Scored("abc", {"r0": [3, 2, 1]}), [case(0, "b", "ab")], cutoffs=(2,))["excluded"]
    assert (repeated.greater[0], repeated.tied[0], repeated.pool[0]) == (0, 1, 2)
    assert repeated.lists.tolist() == [[1, 2]]
    # A target outside the catalogue is a miss.
    missing = rank_catalogue(Scored("abc", {"r0": [3, 2, 1]}), [case(0, "z", "a")], cutoffs=())
    for seen, pool in (("excluded", 2), ("included", 3)):
        assert (missing[seen].greater[0], missing[seen].tied[0], missing[seen].lists.size) == (pool, 0, 0)


_SCORES = st.lists(st.lists(st.integers(-2, 2), min_size=7, max_size=7), min_size=1, max_size=9)


@given(table=_SCORES, data=st.data(), batch=st.sampled_from([None, 1, 2, 5]), narrow=st.booleans())
def test_equals_a_slow_loop(table: list[list[int]], data: st.DataObject, batch: int | None, narrow: bool) -> None:
    items = "abcdefg"
    cases = [
        case(k, data.draw(st.sampled_from(items)), data.draw(st.text(alphabet=items + "z", max_size=5)))
        for k in range(len(table))
    ]
    scorer = Scored(items, {f"r{k}": row for k, row in enumerate(table)}, np.float32 if narrow else np.float64)
    finished: list[int] = []
    result = rank_catalogue(scorer, cases, cutoffs=(1, 3), batch=batch, progress=finished.append)
    assert scorer.sizes == finished and sum(finished) == len(cases) and max(finished) <= (batch or len(cases))
    for k, (one, row) in enumerate(zip(cases, table, strict=True)):
        gone = {event.item_id for event in one.request.history} - {str(one.truth)}
        for seen, hidden in (("excluded", gone), ("included", set())):
            left = {item: float(score) for item, score in zip(items, row, strict=True) if item not in hidden}
            ranking = Ranking(request_id="r", items=tuple(left), scores=tuple(left.values()))
            expected = target_rank(ranking, str(one.truth), len(left))
            ranked = result[seen]
            assert (ranked.greater[k], ranked.tied[k], ranked.pool[k]) == (expected.greater, expected.tied, len(left))
            shown = [items[number] for number in ranked.lists[k] if number >= 0]
            assert len(shown) == len(set(shown)) == min(3, len(left))
            assert [left[item] for item in shown] == sorted(left.values(), reverse=True)[: len(shown)]


def test_lists_do_not_depend_on_batches_or_order() -> None:
    rng = np.random.default_rng(0)
    items = [f"i{n:03d}" for n in range(60)]
    table = {f"r{k}": rng.integers(0, 4, 60).astype(float) for k in range(40)}
    cases = [case(k, items[int(rng.integers(60))]) for k in range(40)]
    names = np.array(items)
    first = rank_catalogue(Scored(items, table), cases, cutoffs=(10,), seen=("included",))["included"]
    by_id = {one.request.id: names[row].tolist() for one, row in zip(cases, first.lists, strict=True)}
    order = rng.permutation(60)
    moved = Scored([items[n] for n in order], {key: row[order] for key, row in table.items()})
    other = [cases[n] for n in rng.permutation(40)]
    again = rank_catalogue(moved, other, cutoffs=(10,), seen=("included",), batch=7)["included"]
    for one, row in zip(other, again.lists, strict=True):
        assert [moved.items[number] for number in row] == by_id[one.request.id]
    reseeded = rank_catalogue(Scored(items, table), cases, cutoffs=(10,), seen=("included",), seed=1)["included"]
    assert (reseeded.lists != first.lists).any()
    assert np.array_equal(reseeded.scores, first.scores)


def test_tied_items_are_shown_equally_often() -> None:
    items = [f"i{n}" for n in range(20)]
    for fill in (0.0, -1.0):  # all items tie; half of them tie, which is another code branch
        row = np.where(np.arange(20) < 10, 0.0, fill)
        scorer = Scored(items, {f"r{k}": row for k in range(3000)})
        result = rank_catalogue(scorer, [case(k, "i0") for k in range(3000)], cutoffs=(2,), seen=("included",))
        shown = np.bincount(result["included"].lists.ravel(), minlength=20)[: 20 if fill == 0 else 10]
        share = 6000 / len(shown)
        assert shown.sum() == 6000
        assert np.abs(shown - share).max() < 5 * np.sqrt(share)
        first = np.bincount(result["included"].lists[:, 0], minlength=20)[: len(shown)]
        assert np.abs(first - 3000 / len(shown)).max() < 5 * np.sqrt(3000 / len(shown))


def test_scores_may_be_read_only() -> None:
    class Fixed(Scored):
        def scores(self, requests: Sequence[Request]) -> NDArray[Any]:
            return np.broadcast_to(np.array([1.0, 3.0, 2.0]), (len(requests), 3))

    result = rank_catalogue(Fixed("abc", {}), [case(0, "a", "b"), case(1, "c")], cutoffs=(2,))
    assert result["excluded"].lists.tolist() == [[2, 0], [1, 2]]


# ------------------------------------------------------------------ errors


def test_rejects_defects_of_a_scorer() -> None:
    for bad in (np.nan, -np.inf):
        scorer = Scored("abc", {"r0": [1, 2, 3], "r1": [1, bad, 3]})
        with raises(LlmrecError, Facts("bad-value", says=("request 'r1'", "item 'b'", "float32"))):
            rank_catalogue(scorer, [case(0, "a"), case(1, "a")], cutoffs=(1,))
    with raises(LlmrecError, Facts("defect", says=("scored", "(1, 2) for 1 requests and 3 items"))):
        rank_catalogue(Scored("abc", {"r0": [1, 2]}), [case(0, "a")], cutoffs=(1,))
    with raises(LlmrecError, Facts("defect", says="scored")):
        rank_catalogue(Scored("aab", {"r0": [1, 2, 3]}), [case(0, "a")], cutoffs=(1,))
    with raises(LlmrecError, Facts("empty")):
        rank_catalogue(Scored("abc", {}), [], cutoffs=(1,))
    with raises(LlmrecError, Facts("mismatch", says="scored scores 3 items, but the catalogue has 4")):
        evaluate_catalogue(Scored("abc", {"r0": [1, 2, 3]}), [case(0, "a")], protocol(4))


# ------------------------------------------------------------------ figures


@pytest.fixture(scope="module")
def data() -> SplitDataset:
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user:02d}", f"i{item:02d}", 4.0, float(index))
        for user in range(60)
        for index, item in enumerate(rng.choice(30, size=int(rng.integers(4, 12)), replace=False, p=_skewed(30)))
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    genres = ["drama", "drama|war", "comedy", ""]
    items = {
        name: Item(item_id=name, title=name, fields={"genres": genres[int(name[1:]) % 4]})
        for name in sorted(set(frame["item_id"]))
    }
    return split_dataset(Dataset(name="made", noun="things", interactions=frame, items=items), Split(), seed=0)


def _skewed(n: int) -> NDArray[np.float64]:
    weights = 1 / np.arange(1, n + 1)
    return weights / weights.sum()


def _cases(data: SplitDataset) -> list[Case]:
    return [
        Case(
            request=Request(id=held.user_id, user_id=held.user_id, history=data.history(held.user_id, "test")),
            truth=held.item_id,
        )
        for held in data.holdouts("test")
    ]


@pytest.fixture(scope="module")
def popular(data: SplitDataset) -> Popularity:
    fitted = Popularity()
    fitted.fit(data)
    return fitted


def test_metrics_equal_those_of_a_predictor(data: SplitDataset, popular: Popularity) -> None:
    cases, size = _cases(data), len(data.dataset.items)
    predicted = evaluate(
        popular, cases, name="sequential", kind=family_of("sequential").answer, protocol=protocol(size, (1, 5, 10))
    )
    result = evaluate_catalogue(popular, cases, protocol(size, (1, 5, 10)))["excluded"]
    for name, figure in predicted.figures.metrics.items():
        mine = result.figures.metrics[name]
        assert [mine.value, mine.low, mine.high] == pytest.approx([figure.value, figure.low, figure.high])
        assert result.values[name] == pytest.approx(predicted.values[name])
    assert result.figures.tie_rate == predicted.figures.tie_rate
    assert result.figures.n == predicted.figures.n == len(cases)
    assert [record.rank for record in result.records] == [record.rank for record in predicted.records]
    assert result.records[0].as_json().keys() == predicted.records[0].as_json().keys()


def test_precision_map_and_auc_equal_other_libraries(data: SplitDataset) -> None:
    """Scores without ties, full rankings: trec_eval's precision and average precision, scipy's Mann-Whitney U."""
    measures = pytest.importorskip("ir_measures", reason="ir-measures is not installed: pip install 'llmrec[dev]'")
    pytest.importorskip("pytrec_eval", reason="pytrec-eval is not installed: pip install 'llmrec[dev]'")
    pairs = (("Precision", measures.P), ("MAP", measures.AP))
    cases, items = _cases(data), tuple(sorted(data.dataset.items))
    rng = np.random.default_rng(0)
    table = {one.request.id: rng.permutation(len(items)).astype(float) for one in cases}
    result = evaluate_catalogue(Scored(items, table), cases, protocol(len(items), (1, 5, 10)))
    for seen, row in result.items():
        figures = row.figures.metrics
        run, qrels, areas = {}, {}, []
        for one in cases:
            gone = {event.item_id for event in one.request.history} if seen == "excluded" else set()
            scores = dict(zip(items, table[one.request.id].tolist(), strict=True))
            kept = {item: score for item, score in scores.items() if item == one.truth or item not in gone}
            run[one.request.id], qrels[one.request.id] = kept, {str(one.truth): 1}
            others = [score for item, score in kept.items() if item != one.truth]
            areas.append(mannwhitneyu([scores[str(one.truth)]], others).statistic / len(others))
        expected = {f"{name}@{k}": kind @ k for name, kind in pairs for k in (5, 10)}
        theirs = measures.calc_aggregate(expected.values(), qrels, run)
        for name, measure in expected.items():
            assert figures[name].value == pytest.approx(theirs[measure], abs=1e-9), (seen, name)
        assert figures["RankAUC"].value == pytest.approx(np.mean(areas), abs=1e-12)
        assert 0 < figures["RankAUC"].low < figures["RankAUC"].value < figures["RankAUC"].high < 1
        assert parse_signature(figures["RankAUC"].signature).seen == seen
        # They follow from other metrics, so they are not used in comparisons, and there is no cut-off of 1.
        assert not {"RankAUC", "Precision@5", "MAP@5"} & row.values.keys() and "Precision@1" not in figures


def test_diversity_by_vectors(data: SplitDataset, popular: Popularity) -> None:
    size = len(data.dataset.items)
    vectors = np.random.default_rng(0).normal(size=(size, 4))
    background = replace(ListMetricData.of(data), contents=ItemContents(vectors=vectors, source="an encoder"))
    result = evaluate_catalogue(popular, _cases(data), protocol(size, (5,)), background=background)["included"]
    figure = result.figures.metrics["ILD@5"]
    assert "how:cosine-an-encoder" in figure.signature
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = []
    for record in result.records:
        shown = [popular.items.index(item) for item in json.loads(record.parsed)["items"]]
        expected.append(np.mean([1 - unit[a] @ unit[b] for a, b in itertools.combinations(shown, 2)]))
    assert figure.value == pytest.approx(np.mean(expected))


def test_signatures(data: SplitDataset, popular: Popularity) -> None:
    size = len(data.dataset.items)
    result = evaluate_catalogue(popular, _cases(data), protocol(size, (10,)))
    assert set(result) == {"excluded", "included"}
    for seen, row in result.items():
        sign = parse_signature(row.figures.metrics["NDCG@10"].signature)
        assert (sign.candidates, sign.seen, sign.users) == ("full", seen, "60")
        assert row.figures.seen == seen
        shown = json.loads(row.records[0].parsed)
        assert len(shown["items"]) == len(shown["scores"]) == 10
    only = evaluate_catalogue(popular, _cases(data), protocol(size), seen=("included",))
    assert set(only) == {"included"}


def test_random_baseline_is_exact(data: SplitDataset) -> None:
    random, size = Random(seed=3), len(data.dataset.items)
    random.fit(data)
    cases = _cases(data)
    result = evaluate_catalogue(random, cases, protocol(size, (5,)))
    assert result["included"].values["HR@5"] == pytest.approx(np.full(len(cases), 5 / size))
    left = [
        size - len({event.item_id for event in one.request.history} & set(random.items) - {str(one.truth)})
        for one in cases
    ]
    assert result["excluded"].values["HR@5"] == pytest.approx(np.minimum(5 / np.array(left), 1))


def test_list_metrics(data: SplitDataset) -> None:
    cases, size = _cases(data), len(data.dataset.items)
    background = ListMetricData.of(data, field="genres")
    rows = {}
    for scorer in (Popularity(), Random(seed=0)):
        scorer.fit(data)
        rows[scorer.name] = evaluate_catalogue(scorer, cases, protocol(size, (5, 10)), background=background)
    popular, random = (row["excluded"].figures.metrics for row in rows.values())
    names = {"Coverage@10", "Novelty@10", "Gini@10", "PopularityLift@10", "ILD@10", "Serendipity@10"}
    assert names <= popular.keys()
    assert popular["Coverage@10"].value < random["Coverage@10"].value <= 1
    assert popular["Gini@10"].value > random["Gini@10"].value
    assert popular["Novelty@10"].value < random["Novelty@10"].value
    # The catalogue is so small that histories contain the popular items.
    lifts = [row["included"].figures.metrics["PopularityLift@10"] for row in rows.values()]
    assert lifts[0].low > 0 > lifts[1].high
    assert popular["Serendipity@10"].value == pytest.approx(0.0, abs=0.01)  # ties may be broken differently
    assert 0 < random["ILD@10"].value <= 1
    assert random["ILD@10"].signature.split("|")[:2] == ["ILD@10", "ties:seeded"]
    assert "how:jaccard-genres" in random["ILD@10"].signature
    assert random["Coverage@10"].low is None
    assert {"Novelty@10", "ILD@10", "Serendipity@10"} <= rows["random"]["excluded"].values.keys()


def test_background_counts_training_only(data: SplitDataset, popular: Popularity) -> None:
    background = ListMetricData.of(data)
    counts = dict(data.train.group_by("item_id").len().iter_rows())
    assert background.counts.tolist() == [counts.get(item, 0) for item in sorted(data.dataset.items)]
    assert background.users == data.train["user_id"].n_unique()
    with raises(LlmrecError, Facts("unknown-name", "made", says="'colour'")):
        ListMetricData.of(data, field="colour")
    stranger = Scored("abc", {"r0": [1, 2, 3]})
    with raises(LlmrecError, Facts("mismatch")):
        evaluate_catalogue(stranger, [case(0, "a")], protocol(3), background=background)
    # Without histories the lift is undefined.
    bare = [Case(request=Request(id=f"r{k}", user_id=f"u{k}"), truth="i01") for k in range(3)]
    figures = evaluate_catalogue(popular, bare, protocol(len(data.dataset.items), (10,)), background=background)
    assert figures["excluded"].figures.metrics["PopularityLift@10"].value is None
