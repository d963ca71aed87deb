from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llmrec.baselines import knn
from llmrec.baselines.base import MAX_RANKED_ITEMS, break_ties_by_popularity, recency_weights
from llmrec.baselines.ease import EASE
from llmrec.baselines.knn import ItemKNN, RP3Beta
from llmrec.baselines.markov import FirstOrder, Markov, MarkovCooccurrence
from llmrec.baselines.popular import Popularity, Random, RecentPopularity
from llmrec.data.split import SplitDataset, request_of
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import evaluate
from llmrec.metrics.ranking import TargetRank, target_rank
from llmrec.pipeline.study import load_split
from llmrec.recipe.schema import DataSection
from llmrec.registry import BASELINES, import_component
from llmrec.tasks.family import family_of
from llmrec.types import Case, Event, Predictor, Ranking, Request
from tests.baselines.trained import all_trained, make_dataset, request


def _trained(sequences: dict[str, list[str]], catalogue: list[str]) -> SplitDataset:
    """Return a split with these training sequences and without held-out data."""
    rows = [
        (user, item, float(position))
        for user, items in sorted(sequences.items())
        for position, item in enumerate(items)
    ]
    return all_trained(make_dataset(rows, "timestamp", catalogue))


def _ask(predictor: Predictor, history: str, candidates: str | None) -> Ranking:
    candidates_ = None if candidates is None else tuple(candidates)
    (ranking,) = predictor.answer([replace(request(history), candidates=candidates_)])
    assert isinstance(ranking, Ranking)
    return ranking


def _scores(ranking: Ranking) -> dict[str, float]:
    return dict(zip(ranking.items, ranking.scores, strict=True))


LETTERS = {"u1": list("abcd"), "u2": list("abd"), "u3": list("bca"), "u4": list("ad")}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("recent-popularity", {"half_life": 0.0}),
        ("item-knn", {"history": 0}),
        ("item-knn", {"decay": 0.0}),
        ("item-knn", {"asymmetry": 1.1}),
        ("item-knn", {"shrinkage": -1.0}),
        ("rp3beta", {"alpha": -0.1}),
        ("rp3beta", {"beta": -1.0}),
        ("markov", {"order": 0}),
        ("markov", {"decay": 1.1}),
        ("markov-cooccurrence", {"transition": -1.0}),
        ("ease", {"penalty": 0.0}),
        ("bpr", {"decay": 0.0}),
        ("user-item-bias", {"user_penalty": 0.0}),
        ("mf", {"penalty": 0.0}),
        ("svd", {"penalty": 0.0}),
        ("logistic", {"penalty": 0}),
        ("sasrec", {"dropout": 1.0}),
        ("gru4rec", {"dropout": -0.1}),
    ],
)
def test_rejects_options_out_of_range(name: str, options: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        import_component(BASELINES, name, "baseline").Config(**options)


def test_catalogue_ranking_is_cut_after_the_tied_block() -> None:
    many = {f"u{n}": [f"i{k}" for k in range(n, 150)] for n in range(1, 150)}
    catalogue = [f"i{k}" for k in range(300)]
    model = Popularity()
    model.fit(_trained(many, catalogue))
    answer = _ask(model, "", None)
    assert len(answer.items) == MAX_RANKED_ITEMS and answer.items[:2] == ("i149", "i148")
    few = Popularity()
    few.fit(_trained({"u": ["i0", "i1"]}, catalogue))
    # Two items have a count; rank 100 is among the 298 items without one, which are not split.
    assert len(_ask(few, "", None).items) == 300
    random = Random()
    random.fit(_trained(many, catalogue))
    assert len(_ask(random, "", None).items) == MAX_RANKED_ITEMS


@pytest.mark.parametrize(("candidates", "ndcg_at_10", "hr_at_10"), [(20, 0.2272, 0.5), (7, 0.5197, 1.0)])
def test_random_is_evaluated_as_an_expectation(candidates: int, ndcg_at_10: float, hr_at_10: float) -> None:
    pool = tuple(f"i{n:03d}" for n in range(candidates))
    protocol = EvalProtocol(split="s", candidates="c", cutoffs=(10,), resamples=50, seed=0, catalogue=200)
    for seed in (0, 1):
        model = Random(seed=seed)
        model.fit(_trained(LETTERS, list("abcd")))
        cases = [
            Case(request=Request(id=f"r{n}", user_id=f"u{n}", candidates=pool), truth=pool[n % candidates])
            for n in range(5)
        ]
        result = evaluate(model, cases, name="direct", kind=family_of("direct").answer, protocol=protocol)
        assert result.values["NDCG@10"] == pytest.approx(np.full(5, ndcg_at_10), abs=5e-5)
        assert result.values["HR@10"] == pytest.approx(np.full(5, hr_at_10))
        assert result.figures.metrics["NDCG@10"].value == pytest.approx(result.values["NDCG@10"][0])
        assert result.figures.tie_rate == 1.0


def test_random_over_a_catalogue_is_exact_with_a_cut_list() -> None:
    catalogue = [f"i{n:03d}" for n in range(400)]
    model = Random()
    model.fit(_trained({"u": catalogue[:2]}, catalogue))
    history = tuple(Event(item_id=item) for item in catalogue[:50])
    requests = [Request(id=f"r{n}", user_id="u", history=history) for n in range(200)]
    answers = [answer for answer in model.answer(requests) if isinstance(answer, Ranking)]
    for answer in answers:
        assert len(set(answer.items)) == MAX_RANKED_ITEMS and not set(answer.items) & set(catalogue[:50])
        for target in ("i050", "i399"):
            assert target_rank(answer, target, 400) == TargetRank(greater=0, tied=350, missing=False)
    # The items of a list are random: each of 350 is in 200 * 100 / 350 = 57 lists on average, deviation 6.4.
    counts = Counter(item for answer in answers for item in answer.items)
    assert len(counts) == 350 and min(counts.values()) > 30 and max(counts.values()) < 85


def test_recent_popularity_halves_with_age() -> None:
    half_life = 0.1
    rows = [("u1", "a", 1.0), ("u2", "a", 1.0), ("u1", "b", 2.0), ("u2", "c", 3.0), ("u3", "d", 3.0)]
    model = RecentPopularity(RecentPopularity.Config(half_life=half_life))
    model.fit(all_trained(make_dataset(sorted(rows), "timestamp", "abcdz")))
    # 3 of 5 interactions are later than a, 2 are later than b, and none is later than c and d.
    expected = {"a": 2 * 0.5 ** (0.6 / half_life), "b": 0.5 ** (0.4 / half_life), "c": 1.0, "d": 1.0, "z": 0.0}
    assert _scores(_ask(model, "", "abcdz")) == pytest.approx(expected, abs=1e-6)


def test_recent_popularity_without_timestamps_uses_positions() -> None:
    data = _trained({"u1": list("abc"), "u2": list("c"), "u3": list("bd")}, list("abcd"))
    data = replace(data, train=data.train.with_columns(pl.lit(None, dtype=pl.Float64).alias("timestamp")))
    model = RecentPopularity(RecentPopularity.Config(half_life=0.5))
    model.fit(data)
    # The last event of each user has age 0; the one before it has three of six later events, and a has five.
    scores = _scores(_ask(model, "", "abcd"))
    expected = {"a": 0.5 ** (5 / 6 / 0.5), "b": 2 * 0.5 ** (3 / 6 / 0.5), "c": 2.0, "d": 1.0}
    assert scores == pytest.approx(expected, abs=1e-6)


_SEQUENCES = st.dictionaries(
    st.sampled_from(["u1", "u2", "u3", "u4", "u5"]),
    st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12),
    min_size=1,
)


def _matrix(sequences: dict[str, list[str]], catalogue: str) -> np.ndarray:
    return np.array([[float(item in items) for item in catalogue] for _, items in sorted(sequences.items())])


@given(
    sequences=_SEQUENCES,
    history=st.text("abcdefz", max_size=10),
    window=st.integers(1, 6),
    decay=st.floats(0.1, 1),
    asymmetry=st.floats(0, 1),
    shrinkage=st.floats(0, 20),
    weighting=st.sampled_from(("none", "user-idf", "tf-idf")),
)
def test_item_knn_equals_dense_cosines(
    sequences: dict[str, list[str]],
    history: str,
    window: int,
    decay: float,
    asymmetry: float,
    shrinkage: float,
    weighting: Literal["none", "user-idf", "tf-idf"],
) -> None:
    model = ItemKNN(
        ItemKNN.Config(history=window, decay=decay, asymmetry=asymmetry, shrinkage=shrinkage, weighting=weighting)
    )
    model.fit(_trained(sequences, list("abcdefz")))
    matrix = _matrix(sequences, "abcdefz")
    if weighting == "user-idf":
        matrix *= np.log(1 + 7 / matrix.sum(axis=1, keepdims=True))
    if weighting == "tf-idf":
        matrix *= np.log(1 + len(sequences) / np.maximum(matrix.sum(axis=0), 1))
        matrix /= np.sqrt((matrix**2).sum(axis=1, keepdims=True))
    scores = _scores(_ask(model, history, "abcdefz"))
    for column, item in enumerate("abcdefz"):
        expected = 0.0
        for age, past in enumerate(reversed(history[-window:])):
            item_column, other = matrix[:, column], matrix[:, "abcdefz".index(past)]
            if past != item and item_column @ other:
                divisor = (item_column @ item_column) ** asymmetry * (other @ other) ** (1 - asymmetry) + shrinkage
                expected += decay**age * (item_column @ other) / divisor
        assert scores[item] == pytest.approx(expected, rel=1e-6, abs=1e-4)  # tolerance for the popularity filler


@given(
    sequences=_SEQUENCES,
    history=st.text("abcdefz", max_size=10),
    alpha=st.floats(0, 2),
    beta=st.floats(0, 1),
    decay=st.floats(0.1, 1),
)
def test_rp3beta_equals_dense_matrices(
    sequences: dict[str, list[str]], history: str, alpha: float, beta: float, decay: float
) -> None:
    model = RP3Beta(RP3Beta.Config(history=4, decay=decay, alpha=alpha, beta=beta))
    model.fit(_trained(sequences, list("abcdefz")))
    matrix = _matrix(sequences, "abcdefz")
    readers = np.maximum(matrix.sum(axis=0), 1)
    to_user = (matrix / readers) ** alpha * (matrix > 0)
    to_item = (matrix / matrix.sum(axis=1, keepdims=True)) ** alpha * (matrix > 0)
    walks = to_user.T @ to_item / readers**beta
    np.fill_diagonal(walks, 0.0)
    scores = _scores(_ask(model, history, "abcdefz"))
    for column, item in enumerate("abcdefz"):
        steps = [decay**age * walks["abcdefz".index(past), column] for age, past in enumerate(reversed(history[-4:]))]
        assert scores[item] == pytest.approx(sum(steps), rel=1e-6, abs=1e-4)  # tolerance for the popularity filler


@given(sequences=_SEQUENCES, history=st.text("abcdefz", max_size=10), order=st.integers(1, 6), decay=st.floats(0.1, 1))
def test_markov_equals_counting_by_hand(
    sequences: dict[str, list[str]], history: str, order: int, decay: float
) -> None:
    model = Markov(Markov.Config(order=order, decay=decay))
    model.fit(_trained(sequences, list("abcdef")))
    steps: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for items in sequences.values():
        for position, item in enumerate(items):
            for later in range(position + 1, min(position + order + 1, len(items))):
                steps[item][items[later]] += decay ** (later - position - 1)
    for item, score in _scores(_ask(model, history, "abcdefz")).items():
        votes = sum(decay**age * steps[past][item] for age, past in enumerate(reversed(history[-order:])))
        assert score == pytest.approx(votes, rel=1e-6, abs=1e-4)  # tolerance for the popularity filler


def test_first_order_is_markov_of_order_one() -> None:
    data = _trained(LETTERS, list("abcdz"))
    one, other = FirstOrder(), Markov(Markov.Config(order=1))
    one.fit(data)
    other.fit(data)
    requests = [request("cza"[:n]) for n in range(4)]
    assert np.array_equal(one.scores(requests), other.scores(requests))


@given(
    sequences=_SEQUENCES,
    history=st.text("abcdefz", max_size=10),
    window=st.integers(1, 6),
    decay=st.floats(0.1, 1),
    transition=st.floats(0, 3),
)
def test_cooccurrence_equals_counting_by_hand(
    sequences: dict[str, list[str]], history: str, window: int, decay: float, transition: float
) -> None:
    model = MarkovCooccurrence(MarkovCooccurrence.Config(history=window, decay=decay, transition=transition))
    model.fit(_trained(sequences, list("abcdef")))
    steps = Counter((a, b) for items in sequences.values() for a, b in itertools.pairwise(items))
    both = Counter(
        (a, b) for items in sequences.values() for i, a in enumerate(items) for j, b in enumerate(items) if i != j
    )
    popular = Counter(item for items in sequences.values() for item in items)
    for item, score in _scores(_ask(model, history, "abcdefz")).items():
        expected = transition * steps[history[-1], item] if history else 0.0
        for age, past in enumerate(reversed(history[-window:])):
            expected += decay**age * both[past, item] / math.sqrt(popular[past] * popular[item] + 1)
        assert score == pytest.approx(expected, rel=1e-6, abs=1e-4)  # tolerance for the popularity filler


@given(
    least=st.floats(1e-30, 1e8),
    more=st.floats(1.0, 1e6),
    counts=st.lists(st.integers(0, 10**8), min_size=2, max_size=6),
)
def test_filler_keeps_the_order_up_to_1e8_interactions(least: float, more: float, counts: list[int]) -> None:
    # Two scored items without interactions, and unscored ones with up to 1e8, two of which differ by one.
    popular = np.array([0.0, 0.0, *sorted({*counts, 10**8 - 1, 10**8})])
    scores = np.zeros((2, len(popular)))
    scores[0, :2] = least, least * more
    scored, unscored = break_ties_by_popularity(scores, popular)
    assert scored[2:].max() < scored[0] <= scored[1]
    for row in (scored, unscored):
        assert (np.diff(row[2:]) > 0).all()


@pytest.mark.parametrize(("dtype", "close"), [("float64", 1e-10), ("float32", 1e-4)])
def test_ease_equals_the_closed_form(dtype: Literal["float32", "float64"], close: float) -> None:
    # More items than fit into one tile of the inverse.
    rng = np.random.default_rng(0)
    names = [f"i{n:04d}" for n in range(1100)]
    sequences = {f"u{n}": [names[k] for k in rng.choice(1100, 20, replace=False)] for n in range(400)}
    sequences["u0"] = names
    data = _trained(sequences, [*names, "cold"])
    model = EASE(EASE.Config(penalty=50.0, decay=1.0, dtype=dtype))
    model.fit(data)
    binary = np.array([[item in set(items) for item in names] for _, items in sorted(sequences.items())], dtype=float)
    inverse = np.linalg.inv(binary.T @ binary + 50.0 * np.eye(1100))
    weights = np.eye(1100) - inverse / np.diag(inverse)[None, :]
    history = [3, 77, 1099]
    (row,) = model.scores([request(names[position] for position in history)])
    assert row.dtype == dtype
    scores = dict(zip(model.items, row.tolist(), strict=True))
    assert [scores[name] for name in names] == pytest.approx(weights[history].sum(axis=0), abs=close)
    assert scores["cold"] < min(scores[name] for name in names)


def test_ease_history_fades() -> None:
    """Weights by hand; the item z has no training interactions and thus no age; a has the age of its last event.

    Users {a, b} and {b, c}: X'X = [[1, 1, 0], [1, 2, 1], [0, 1, 1]]; with the penalty 1 its inverse is
    [[5, -2, 1], [-2, 4, -2], [1, -2, 5]] / 8, so B[a, b] = 2/4, B[a, c] = -1/5, B[b, a] = B[b, c] = 2/5.
    """
    decay = 0.5
    model = EASE(EASE.Config(penalty=1.0, decay=decay))
    model.fit(_trained({"u1": list("ab"), "u2": list("bc")}, list("abcz")))
    expected = {"a": 2 / 5 * decay, "b": 1 / 2, "c": 2 / 5 * decay - 1 / 5}
    assert _scores(_ask(model, "abza", "abc")) == pytest.approx(expected)


@given(histories=st.lists(st.lists(st.integers(0, 6), max_size=12), max_size=4), decay=st.floats(0.1, 1))
def test_fading_weights_equal_counting_by_hand(histories: list[list[int]], decay: float) -> None:
    arrays = [np.array(history, dtype=np.int64) for history in histories]
    weights = recency_weights(arrays, 7, decay).toarray()
    assert weights.shape == (len(histories), 7)
    for history, row in zip(histories, weights, strict=True):
        ages = {item: history[::-1].index(item) for item in history}
        assert row.tolist() == pytest.approx([decay ** ages[item] if item in ages else 0.0 for item in range(7)])


@pytest.mark.parametrize("kind", [ItemKNN, RP3Beta])
def test_dense_and_sparse_scores_are_equal(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_split(DataSection(source="made-reviews"), 0)
    requests = [request_of(data, held, "test") for held in data.holdouts("test")][:40]
    changes: list[dict[str, Any]] = [{}, {"history": 3, "decay": 1.0}]
    changes += [{"weighting": "tf-idf"}, {"asymmetry": 0.0, "shrinkage": 2.0}] if kind is ItemKNN else [{"alpha": 1.4}]
    model = kind(seed=0)
    model.fit(data)
    for change in changes:
        tuned = model.with_config(kind.Config(**change))
        small = tuned.scores(requests)
        for block in (1, 7):
            with monkeypatch.context() as patched:
                patched.setattr(knn, "_MAX_DENSE_ITEMS", 1)
                patched.setattr(knn, "_BLOCK_ITEMS", block)
                large = tuned.scores(requests)
                # Exactly: the sums of a request do not depend on the other requests.
                assert np.array_equal(np.concatenate([tuned.scores([request]) for request in requests]), large)
            assert np.isfinite(small).all() and np.allclose(small, large, rtol=1e-9, atol=1e-12)
