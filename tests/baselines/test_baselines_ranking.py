from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmrec.baselines import knn
from llmrec.baselines.base import TOP, fading, filled
from llmrec.baselines.ease import EASE
from llmrec.baselines.knn import ItemKNN, RP3Beta
from llmrec.baselines.markov import FirstOrder, Markov, MarkovCooccurrence
from llmrec.baselines.popular import Popularity, Random, RecentPopularity
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, request_of
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import evaluate
from llmrec.metrics.ranking import Standing, hit_rate, standing
from llmrec.pipeline.study import load_split
from llmrec.recipe.schema import DataSection
from llmrec.tasks.family import family_of
from llmrec.types import Case, Event, Item, Predictor, Ranking, Request
from tests.baselines.trained import all_trained


def _trained(sequences: dict[str, list[str]], catalogue: list[str]) -> SplitDataset:
    """A split whose training rows are these sequences, and nothing held out."""
    rows = [(user, item, float(place)) for user, items in sorted(sequences.items()) for place, item in enumerate(items)]
    frame = pl.DataFrame(
        rows, schema={"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Float64}, orient="row"
    )
    items = {item: Item(item_id=item, title=item) for item in catalogue}
    data = Dataset(name="toy", noun="things", interactions=frame, items=items)
    return all_trained(data)


def _ask(predictor: Predictor, history: str, candidates: str | None) -> Ranking:
    request = Request(
        id="r",
        user_id="asker",
        history=tuple(Event(item_id=item) for item in history),
        candidates=None if candidates is None else tuple(candidates),
    )
    (answer,) = predictor.answer([request])
    assert isinstance(answer, Ranking)
    return answer


def _scores(ranking: Ranking) -> dict[str, float]:
    return dict(zip(ranking.items, ranking.scores, strict=True))


LETTERS = {"u1": list("abcd"), "u2": list("abd"), "u3": list("bca"), "u4": list("ad")}


# ------------------------------------------------------------------ popularity and chance


def test_popularity_counts_training_interactions() -> None:
    model = Popularity()
    model.fit(_trained(LETTERS, list("abcdez")))
    assert _scores(_ask(model, "", "zeabcd")) == {"a": 4.0, "b": 3.0, "d": 3.0, "c": 2.0, "e": 0.0, "z": 0.0}


def test_whole_catalogues_are_cut_after_the_tied_block_at_the_top() -> None:
    many = {f"u{n}": [f"i{k}" for k in range(n, 150)] for n in range(1, 150)}
    catalogue = [f"i{k}" for k in range(300)]
    model = Popularity()
    model.fit(_trained(many, catalogue))
    answer = _ask(model, "", None)
    assert len(answer.items) == TOP and answer.items[:2] == ("i149", "i148")
    few = Popularity()
    few.fit(_trained({"u": ["i0", "i1"]}, catalogue))
    # Two items have a count; the hundredth place falls among the 298 without one, which stay together.
    assert len(_ask(few, "", None).items) == 300
    chance = Random()
    chance.fit(_trained(many, catalogue))
    assert len(_ask(chance, "", None).items) == TOP


@pytest.mark.parametrize(
    ("candidates", "ndcg_at_10", "hr_at_10"), [(20, 0.2272, 0.5), (100, 0.0454, 0.1), (7, 0.5197, 1.0)]
)
def test_chance_is_the_expectation_over_all_orders_and_no_draw(
    candidates: int, ndcg_at_10: float, hr_at_10: float
) -> None:
    pool = tuple(f"i{n:03d}" for n in range(candidates))
    protocol = EvalProtocol(split="s", candidates="c", cutoffs=(10,), resamples=50, seed=0, catalogue=200)
    for seed in (0, 1):
        model = Random(seed=seed)
        model.fit(_trained(LETTERS, list("abcd")))
        cases = [
            Case(request=Request(id=f"r{n}", user_id=f"u{n}", candidates=pool), truth=pool[n % candidates])
            for n in range(5)
        ]
        found = evaluate(model, cases, name="direct", kind=family_of("direct").answer, protocol=protocol)
        assert found.values["NDCG@10"] == pytest.approx(np.full(5, ndcg_at_10), abs=5e-5)
        assert found.values["HR@10"] == pytest.approx(np.full(5, hr_at_10))
        assert found.figures.metrics["NDCG@10"].value == pytest.approx(found.values["NDCG@10"][0])
        assert found.figures.tie_rate == 1.0


def test_chance_over_a_catalogue_is_exact_though_its_list_is_cut() -> None:
    catalogue = [f"i{n:03d}" for n in range(400)]
    model = Random()
    model.fit(_trained({"u": catalogue[:2]}, catalogue))
    history = tuple(Event(item_id=item) for item in catalogue[:50])
    requests = [Request(id=f"r{n}", user_id="u", history=history) for n in range(200)]
    answers = [answer for answer in model.answer(requests) if isinstance(answer, Ranking)]
    for answer in answers:
        assert len(set(answer.items)) == TOP and not set(answer.items) & set(catalogue[:50])
        for target in ("i050", "i399"):
            assert standing(answer, target, 400) == Standing(greater=0, tied=350, missing=False)
    # Which items a list shows is drawn: each of 350 stands in 200 * 100 / 350 = 57 of the lists, give or take 6.4.
    shown = Counter(item for answer in answers for item in answer.items)
    assert len(shown) == 350 and min(shown.values()) > 30 and max(shown.values()) < 85


@pytest.mark.parametrize("half_life", [0.1, 0.5])
def test_recent_popularity_halves_with_age(half_life: float) -> None:
    rows = [("u1", "a", 1.0), ("u2", "a", 1.0), ("u1", "b", 2.0), ("u2", "c", 3.0), ("u3", "d", 3.0)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    base = _trained({}, list("abcdz"))
    data = replace(base, train=Dataset("toy", "things", frame, base.dataset.items).interactions.sort("user_id"))
    model = RecentPopularity(RecentPopularity.Config(half_life=half_life))
    model.fit(data)
    # Later than a are 3 of 5 interactions, later than b 2, later than c and d none.
    expected = {"a": 2 * 0.5 ** (0.6 / half_life), "b": 0.5 ** (0.4 / half_life), "c": 1.0, "d": 1.0, "z": 0.0}
    assert _scores(_ask(model, "", "abcdz")) == pytest.approx(expected, abs=1e-6)


def test_without_timestamps_recent_popularity_goes_by_the_place_from_the_end() -> None:
    data = _trained({"u1": list("abc"), "u2": list("c"), "u3": list("bd")}, list("abcd"))
    data = replace(data, train=data.train.with_columns(pl.lit(None, dtype=pl.Float64).alias("timestamp")))
    model = RecentPopularity(RecentPopularity.Config(half_life=0.5))
    model.fit(data)
    # The three last ones are of age 0; one before the last has three later ones of six, a has five.
    scores = _scores(_ask(model, "", "abcd"))
    expected = {"a": 0.5 ** (5 / 6 / 0.5), "b": 2 * 0.5 ** (3 / 6 / 0.5), "c": 2.0, "d": 1.0}
    assert scores == pytest.approx(expected, abs=1e-6)


def test_a_half_life_must_be_positive() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        RecentPopularity(RecentPopularity.Config(half_life=0.0))


# ------------------------------------------------------------------ item-knn


def test_cosines_by_hand() -> None:
    model = ItemKNN(ItemKNN.Config(history=5, decay=1.0))
    model.fit(_trained(LETTERS, list("abcd")))
    # a has 4 readers, b 3, c 2, d 3; a and b share 3, a and c 2, a and d 3.
    scores = _scores(_ask(model, "a", "bcd"))
    assert scores == pytest.approx({"b": 3 / math.sqrt(12), "c": 2 / math.sqrt(8), "d": 3 / math.sqrt(12)}, abs=1e-5)


def test_later_items_of_the_history_weigh_more() -> None:
    pairs = {"u1": list("ax"), "u2": list("by")}
    model = ItemKNN(ItemKNN.Config(decay=0.8))
    model.fit(_trained(pairs, list("abxy")))
    assert _ask(model, "ab", "xy").items == ("y", "x")
    assert _ask(model, "ba", "xy").items == ("x", "y")
    assert _scores(_ask(model, "ab", "xy")) == pytest.approx({"y": 1.0, "x": 0.8}, abs=1e-5)


def test_without_neighbours_popularity_decides() -> None:
    model = ItemKNN()
    model.fit(_trained(LETTERS, list("abcdz")))
    assert _ask(model, "", "cab").items == ("a", "b", "c")
    assert _ask(model, "z", "cab").items == ("a", "b", "c")


_SEQUENCES = st.dictionaries(
    st.sampled_from(["u1", "u2", "u3", "u4", "u5"]),
    st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12),
    min_size=1,
)


@given(sequences=_SEQUENCES, history=st.text("abcdefz", max_size=10), window=st.integers(1, 6), decay=st.floats(0.1, 1))
def test_knn_equals_dense_cosines(sequences: dict[str, list[str]], history: str, window: int, decay: float) -> None:
    model = ItemKNN(ItemKNN.Config(history=window, decay=decay))
    model.fit(_trained(sequences, list("abcdef")))
    found = _scores(_ask(model, history, "abcdefz"))
    readers = {item: {user for user, items in sequences.items() if item in items} for item in "abcdefz"}
    for item, score in found.items():
        expected = 0.0
        for age, past in enumerate(reversed(history[-window:])):
            both = len(readers[item] & readers[past])
            if past != item and both:
                expected += decay**age * both / math.sqrt(len(readers[item]) * len(readers[past]))
        assert score == pytest.approx(expected, rel=1e-6, abs=1e-4)  # the rest is the filler


def _matrix(sequences: dict[str, list[str]], catalogue: str) -> np.ndarray:
    return np.array([[float(item in items) for item in catalogue] for _, items in sorted(sequences.items())])


@given(
    sequences=_SEQUENCES,
    history=st.text("abcdefz", max_size=10),
    asymmetry=st.floats(0, 1),
    shrinkage=st.floats(0, 20),
    weighting=st.sampled_from(("none", "user-idf", "tf-idf")),
)
def test_asymmetric_and_shrunk_cosines_equal_the_dense_ones(
    sequences: dict[str, list[str]],
    history: str,
    asymmetry: float,
    shrinkage: float,
    weighting: Literal["none", "user-idf", "tf-idf"],
) -> None:
    config = ItemKNN.Config(history=4, decay=0.5, asymmetry=asymmetry, shrinkage=shrinkage, weighting=weighting)
    model = ItemKNN(config)
    model.fit(_trained(sequences, list("abcdefz")))
    matrix = _matrix(sequences, "abcdefz")
    if weighting == "user-idf":
        matrix *= np.log(1 + 7 / matrix.sum(axis=1, keepdims=True))
    if weighting == "tf-idf":
        matrix *= np.log(1 + len(sequences) / np.maximum(matrix.sum(axis=0), 1))
        matrix /= np.sqrt((matrix**2).sum(axis=1, keepdims=True))
    found = _scores(_ask(model, history, "abcdefz"))
    for place, item in enumerate("abcdefz"):
        expected = 0.0
        for age, past in enumerate(reversed(history[-4:])):
            own, other = matrix[:, place], matrix[:, "abcdefz".index(past)]
            if past != item and own @ other:
                divisor = (own @ own) ** asymmetry * (other @ other) ** (1 - asymmetry) + shrinkage
                expected += 0.5**age * (own @ other) / divisor
        assert found[item] == pytest.approx(expected, rel=1e-6, abs=1e-4)  # the rest is the filler


def test_which_side_of_a_cosine_the_exponent_belongs_to() -> None:
    # a was had by all four, d by three of them, c by two: with 0 only the history's item divides, with 1 the other.
    first, last = (ItemKNN(ItemKNN.Config(asymmetry=exponent)) for exponent in (0.0, 1.0))
    for model in (first, last):
        model.fit(_trained(LETTERS, list("abcd")))
    assert _scores(_ask(first, "a", "cd")) == pytest.approx({"d": 3 / 4, "c": 2 / 4}, abs=1e-5)
    assert _scores(_ask(last, "a", "cd")) == pytest.approx({"d": 1.0, "c": 1.0}, abs=1e-5)


def test_items_are_counted_in_blocks_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _trained(LETTERS, list("abcd"))
    requests = [Request(id=text, user_id="u", history=tuple(Event(item_id=i) for i in text)) for text in ("abd", "c")]
    for made in (ItemKNN, RP3Beta):
        model = made()
        model.fit(data)
        whole = model.scores(requests)
        monkeypatch.setattr("llmrec.baselines.knn._BLOCK", 1)
        np.testing.assert_allclose(model.scores(requests), whole, rtol=1e-12)
        monkeypatch.undo()


@pytest.mark.parametrize("settings_", [{"asymmetry": -0.1}, {"asymmetry": 1.1}, {"shrinkage": -1.0}])
def test_knn_likeness_out_of_range_is_an_error(settings_: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="should be"):
        ItemKNN(ItemKNN.Config(**settings_))  # type: ignore[arg-type]


# ------------------------------------------------------------------ rp3beta


def test_walks_of_three_steps_by_hand() -> None:
    """With the exponents 1 and 0 a score is a chance: from a to one of its four users, then to one of the user's items.
    c is reached through u1, who has four items, and u3, who has three: (1/4 + 1/3) / 4."""
    model = RP3Beta(RP3Beta.Config(alpha=1.0, beta=0.0))
    model.fit(_trained(LETTERS, list("abcdz")))
    expected = {"b": (1 / 4 + 1 / 3 + 1 / 3) / 4, "c": (1 / 4 + 1 / 3) / 4, "d": (1 / 4 + 1 / 3 + 1 / 2) / 4, "z": 0.0}
    assert _scores(_ask(model, "a", "bcdz")) == pytest.approx(expected, abs=1e-6)
    less = model.with_config(RP3Beta.Config(alpha=1.0, beta=1.0))
    popular = {"b": 3, "c": 2, "d": 3, "z": 1}
    assert _scores(_ask(less, "a", "bcdz")) == pytest.approx({i: s / popular[i] for i, s in expected.items()}, abs=1e-6)


@given(
    sequences=_SEQUENCES,
    history=st.text("abcdefz", max_size=10),
    alpha=st.floats(0, 2),
    beta=st.floats(0, 1),
    decay=st.floats(0.1, 1),
)
def test_walks_equal_those_of_dense_matrices(
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
    found = _scores(_ask(model, history, "abcdefz"))
    for place, item in enumerate("abcdefz"):
        steps = [decay**age * walks["abcdefz".index(past), place] for age, past in enumerate(reversed(history[-4:]))]
        assert found[item] == pytest.approx(sum(steps), rel=1e-6, abs=1e-4)  # the rest is the filler


@pytest.mark.parametrize("settings_", [{"alpha": -0.1}, {"beta": -1.0}, {"decay": 0.0}, {"history": 0}])
def test_walk_settings_out_of_range_are_errors(settings_: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="should be"):
        RP3Beta(RP3Beta.Config(**settings_))  # type: ignore[arg-type]


# ------------------------------------------------------------------ markov


def test_transitions_by_hand() -> None:
    model = Markov(Markov.Config(order=1))
    model.fit(_trained(LETTERS, list("abcd")))
    # a is followed by b twice and by d once; only the last item of the history votes.
    assert _scores(_ask(model, "ca", "bcd")) == pytest.approx({"b": 2.0, "d": 1.0, "c": 0.0}, abs=1e-6)


def test_skips_and_ages_decay() -> None:
    model = Markov(Markov.Config(order=3, decay=0.5))
    model.fit(_trained({"u": list("abcd")}, list("abcd")))
    assert _scores(_ask(model, "a", "bcd")) == pytest.approx({"b": 1.0, "c": 0.5, "d": 0.25}, abs=1e-6)
    # b votes for d with .5 (a skip), a with .5 * .25 (older by one, two skips).
    assert _scores(_ask(model, "ab", "d")) == pytest.approx({"d": 0.5 + 0.5 * 0.25}, abs=1e-6)


def test_steps_do_not_cross_from_one_user_to_the_next() -> None:
    model = Markov()
    model.fit(_trained({"u1": ["a"], "u2": ["b"]}, list("ab")))
    assert _scores(_ask(model, "a", "b")) == pytest.approx({"b": 0.0}, abs=1e-6)


def test_popularity_fills_ties() -> None:
    model = Markov(Markov.Config(order=1))
    model.fit(_trained(LETTERS, list("abcdz")))
    assert _ask(model, "", "zcab").items == ("a", "b", "c", "z")
    # After d nothing is known but d itself, at the end of every sequence; after c, a and d have one step each.
    assert _ask(model, "d", "cabz").items == ("a", "b", "c", "z")
    assert _ask(model, "c", "dabz").items == ("a", "d", "b", "z")


@given(sequences=_SEQUENCES, history=st.text("abcdefz", max_size=10), order=st.integers(1, 6), decay=st.floats(0.1, 1))
def test_markov_equals_counting_one_by_one(
    sequences: dict[str, list[str]], history: str, order: int, decay: float
) -> None:
    model = Markov(Markov.Config(order=order, decay=decay))
    model.fit(_trained(sequences, list("abcdef")))
    steps: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for items in sequences.values():
        for place, item in enumerate(items):
            for later in range(place + 1, min(place + order + 1, len(items))):
                steps[item][items[later]] += decay ** (later - place - 1)
    for item, score in _scores(_ask(model, history, "abcdefz")).items():
        votes = sum(decay**age * steps[past][item] for age, past in enumerate(reversed(history[-order:])))
        assert score == pytest.approx(votes, rel=1e-6, abs=1e-4)  # the rest is the filler


@pytest.mark.parametrize("settings_", [{"order": 0}, {"decay": 0.0}, {"decay": 1.1}])
def test_markov_settings_out_of_range_are_errors(settings_: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="should be"):
        Markov(Markov.Config(**settings_))  # type: ignore[arg-type]


@pytest.mark.parametrize("settings_", [{"history": 0}, {"decay": 0.0}, {"decay": 1.1}])
def test_knn_settings_out_of_range_are_errors(settings_: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="should be"):
        ItemKNN(ItemKNN.Config(**settings_))  # type: ignore[arg-type]


def test_the_first_order_chain_is_markov_with_one_vote() -> None:
    data = _trained(LETTERS, list("abcdz"))
    one, other = FirstOrder(), Markov(Markov.Config(order=1))
    one.fit(data)
    other.fit(data)
    requests = [
        Request(id="r", user_id="u", history=tuple(Event(item_id=item) for item in "cza"[:n])) for n in range(4)
    ]
    assert np.array_equal(one.scores(requests), other.scores(requests))


@given(
    sequences=_SEQUENCES,
    history=st.text("abcdefz", max_size=10),
    window=st.integers(1, 6),
    decay=st.floats(0.1, 1),
    transition=st.floats(0, 3),
)
def test_cooccurrence_equals_counting_one_by_one(
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
        assert score == pytest.approx(expected, rel=1e-6, abs=1e-4)  # the rest is the filler


@pytest.mark.parametrize("settings_", [{"history": 0}, {"decay": 0.0}, {"transition": -1.0}])
def test_cooccurrence_settings_out_of_range_are_errors(settings_: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="should be"):
        MarkovCooccurrence(MarkovCooccurrence.Config(**settings_))  # type: ignore[arg-type]


# ------------------------------------------------------------------ popularity below what was seen


def _votes(name: str, sequences: dict[str, list[str]], history: str) -> set[str]:
    """What a counting baseline has seen beside the items of a history: after the last of them, or with any of them."""
    if name in ("item-knn", "rp3beta"):
        with_them = {item for items in sequences.values() if set(items) & set(history) for item in items}
        return with_them - set(history)
    reach = 1 if name == "markov-1" else 3
    window = history[-1:] if name == "markov-1" else history[-3:]
    found = {
        items[later]
        for items in sequences.values()
        for place, item in enumerate(items)
        for later in range(place + 1, min(place + reach + 1, len(items)))
        if item in window
    }
    if name == "markov-cooccurrence":
        found |= {item for items in sequences.values() if set(items) & set(history) for item in items}
    return found - set(history)


_COUNTING: dict[str, Any] = {
    "markov-1": FirstOrder(),
    "markov": Markov(Markov.Config(order=3, decay=0.3)),
    "markov-cooccurrence": MarkovCooccurrence(MarkovCooccurrence.Config(history=10, decay=0.5)),
    "item-knn": ItemKNN(ItemKNN.Config(history=10, decay=0.5, asymmetry=0.7, weighting="tf-idf", shrinkage=2.0)),
    "rp3beta": RP3Beta(RP3Beta.Config(history=10, decay=0.5)),
}


@pytest.mark.parametrize("name", _COUNTING)
@settings(max_examples=25)
@given(
    sequences=_SEQUENCES,
    history=st.text("abcdef", min_size=1, max_size=6),
    crowds=st.tuples(*[st.integers(0, 3000)] * 4),
)
@example(sequences={"u1": list("acb")}, history="a", crowds=(3000, 1000, 3000, 0))
def test_however_popular_no_item_passes_one_that_was_seen_to_follow(
    name: str, sequences: dict[str, list[str]], history: str, crowds: tuple[int, ...]
) -> None:
    # Users of one item each make items popular and leave every transition as it was.
    crowd = {f"{item}{n:04d}": [item] for item, size in zip("abxy", crowds, strict=True) for n in range(size)}
    model = _COUNTING[name]
    model.fit(_trained(sequences | crowd, list("abcdefxyz")))
    scores = _scores(_ask(model, history, "abcdefxyz"))
    seen = _votes(name, sequences, history)
    others = set("abcdefxyz") - seen - set(history)
    assert min((scores[item] for item in seen), default=math.inf) > max(scores[item] for item in others)
    popular = Counter(item for items in (*sequences.values(), *crowd.values()) for item in items)
    for one, other in itertools.combinations(sorted(others), 2):
        assert np.sign(scores[one] - scores[other]) == np.sign(popular[one] - popular[other])


@given(
    least=st.floats(1e-30, 1e8),
    more=st.floats(1.0, 1e6),
    counts=st.lists(st.integers(0, 10**8), min_size=2, max_size=6),
)
def test_a_filler_keeps_every_order_up_to_a_hundred_million_interactions(
    least: float, more: float, counts: list[int]
) -> None:
    # Two scored items without any interaction, and unscored ones from none to 1e8, with neighbours one apart.
    popular = np.array([0.0, 0.0, *sorted({*counts, 10**8 - 1, 10**8})])
    scores = np.zeros((2, len(popular)))
    scores[0, :2] = least, least * more
    scored, unscored = filled(scores, popular)
    assert scored[2:].max() < scored[0] <= scored[1]
    for row in (scored, unscored):
        assert (np.diff(row[2:]) > 0).all()


# ------------------------------------------------------------------ ease


def test_ease_by_hand() -> None:
    """Three items, readers {a, b} and {b, c}: X'X = [[1, 1, 0], [1, 2, 1], [0, 1, 1]]; with the penalty 1 its inverse
    is [[5, -2, 1], [-2, 4, -2], [1, -2, 5]] / 8, so B[a, b] = 2/4, B[a, c] = -1/5, B[b, a] = B[b, c] = 2/5."""
    model = EASE(EASE.Config(penalty=1.0, decay=1.0))
    model.fit(_trained({"u1": list("ab"), "u2": list("bc")}, list("abc")))
    assert _scores(_ask(model, "a", "abc")) == pytest.approx({"a": 0.0, "b": 1 / 2, "c": -1 / 5})
    assert _scores(_ask(model, "b", "abc")) == pytest.approx({"a": 2 / 5, "b": 0.0, "c": 2 / 5})
    # Both together, and an event that occurs again counts once.
    assert _scores(_ask(model, "aba", "abc")) == pytest.approx({"a": 2 / 5, "b": 1 / 2, "c": 1 / 5})


@pytest.mark.parametrize(("dtype", "close"), [("float64", 1e-10), ("float32", 1e-4)])
def test_ease_equals_the_closed_form_by_a_plain_inverse(dtype: Literal["float32", "float64"], close: float) -> None:
    # More items than one tile of the inverse has.
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
    request = Request(id="r", user_id="u", history=tuple(Event(item_id=names[place]) for place in history))
    (found,) = model.scores([request])
    assert found.dtype == dtype
    scores = dict(zip(model.items, found.tolist(), strict=True))
    assert [scores[name] for name in names] == pytest.approx(weights[history].sum(axis=0), abs=close)
    assert scores["cold"] < min(scores[name] for name in names)


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_history_of_ease_fades(decay: float) -> None:
    """The weights of the test by hand; the item z, which nobody had, has no age, and a is as old as its last event."""
    model = EASE(EASE.Config(penalty=1.0, decay=decay))
    model.fit(_trained({"u1": list("ab"), "u2": list("bc")}, list("abcz")))
    expected = {"a": 2 / 5 * decay, "b": 1 / 2, "c": 2 / 5 * decay - 1 / 5}
    assert _scores(_ask(model, "abza", "abc")) == pytest.approx(expected)


@given(histories=st.lists(st.lists(st.integers(0, 6), max_size=12), max_size=4), decay=st.floats(0.1, 1))
def test_fading_weights_equal_counting_one_by_one(histories: list[list[int]], decay: float) -> None:
    arrays = [np.array(history, dtype=np.int64) for history in histories]
    found = fading(arrays, 7, decay).toarray()
    assert found.shape == (len(histories), 7)
    for history, row in zip(histories, found, strict=True):
        ages = {item: history[::-1].index(item) for item in history}
        assert row.tolist() == pytest.approx([decay ** ages[item] if item in ages else 0.0 for item in range(7)])


def test_ease_settings_out_of_range_are_errors() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        EASE(EASE.Config(penalty=0.0))
    with pytest.raises(ValueError, match="float32"):
        EASE(EASE.Config(dtype="int8"))  # type: ignore[arg-type]


# ------------------------------------------------------------------ they find what is there


def test_on_a_walk_with_structure_markov_beats_knn_beats_popularity_beats_chance() -> None:
    """Users walk through a ring of 40 items: from each it goes 1 ahead mostly, and at times jumps to a popular one."""
    rng = np.random.default_rng(0)
    sequences: dict[str, list[str]] = {}
    for user in range(300):
        place, walk = int(rng.integers(40)), []
        for _ in range(10):
            place = (place + 1) % 40 if rng.random() < 0.7 else int(40 * rng.random() ** 2)
            walk.append(f"i{place:02d}")
        sequences[f"u{user}"] = walk
    data = _trained({user: walk[:-1] for user, walk in sequences.items()}, [f"i{n:02d}" for n in range(40)])
    hits: list[float] = []
    for model in (Random(), Popularity(), ItemKNN(), Markov(Markov.Config(order=5, decay=0.7))):
        model.fit(data)
        requests = [
            Request(
                id=user,
                user_id=user,
                history=tuple(Event(item_id=item) for item in walk[:-1]),
                candidates=tuple(data.dataset.items),
            )
            for user, walk in sequences.items()
        ]
        places = [
            standing(a, sequences[a.request_id][-1], 40) for a in model.answer(requests) if isinstance(a, Ranking)
        ]
        hits.append(float(hit_rate([p.greater for p in places], [p.tied for p in places], 3).mean()))
    chance, popular, knn, markov = hits
    assert chance == pytest.approx(3 / 40) and chance < popular < knn < markov
    assert markov > 0.6


@pytest.mark.parametrize("kind", [ItemKNN, RP3Beta])
def test_pairs_of_a_small_catalogue_are_those_of_a_large_one(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_split(DataSection(source="made-reviews"), 0)
    requests = [request_of(data, held, "test") for held in data.holdouts("test")]
    changes: list[dict[str, Any]] = [{}, {"history": 3}, {"decay": 1.0}]
    changes += [{"weighting": "tf-idf"}, {"asymmetry": 0.0, "shrinkage": 2.0}] if kind is ItemKNN else [{"alpha": 1.4}]
    model = kind(seed=0)
    model.fit(data)
    for change in changes:
        tuned = model.with_config(kind.Config(**change))
        small = tuned.scores(requests)
        for block in (1, 7, 256):
            with monkeypatch.context() as patched:
                patched.setattr(knn, "_DENSE", 1)
                patched.setattr(knn, "_BLOCK", block)
                large = tuned.scores(requests)
                # To the last digit: the sums of a request do not depend on who else asks.
                assert np.array_equal(np.concatenate([tuned.scores([request]) for request in requests]), large)
            assert np.isfinite(small).all() and np.allclose(small, large, rtol=1e-9, atol=1e-12)
