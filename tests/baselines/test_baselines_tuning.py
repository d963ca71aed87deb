from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from llmrec.baselines.knn import ItemKNN
from llmrec.baselines.markov import Markov
from llmrec.baselines.popular import Popularity, RecentPopularity
from llmrec.baselines.tune import fitted, points, tune
from llmrec.baselines.validation import drawn, mean_ndcgs, ranking_cases, rating_cases
from llmrec.data.dataset import Dataset, Review
from llmrec.data.split import SplitDataset, split
from llmrec.errors import DataError, RecipeError
from llmrec.evaluate.catalogue import rank_catalogue
from llmrec.metrics.ranking import ndcg
from llmrec.recipe.schema import Split
from llmrec.types import Case, CatalogueScorer, Event, Item, Request
from tests.facts import Facts, raises


def _data(kind: str = "leave_one_out", seed: int = 0) -> SplitDataset:
    """80 users, 25 items, rating levels of users and items; what is popular changes with time."""
    rng = np.random.default_rng(seed)
    likes, level = rng.normal(0, 0.7, (80, 2)), rng.normal(0, 0.7, (25, 2))
    rows = []
    for user in range(80):
        for step in range(9):
            item = int(rng.integers(0, 25)) if rng.random() < 0.4 else (step * 2 + int(rng.integers(0, 4))) % 25
            rating = float(np.clip(round(3 + 2 * likes[user] @ level[item] + rng.normal(0, 0.3)), 1, 5))
            rows.append((f"u{user:02d}", f"i{item:02d}", rating, float(step * 100 + user)))
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    frame = frame.unique(["user_id", "item_id"], keep="first", maintain_order=True)
    items = {f"i{n:02d}": Item(item_id=f"i{n:02d}", title="t") for n in range(25)}
    whole = Dataset(name="toy", noun="things", interactions=frame, items=items, rating_scale=(1.0, 5.0))
    return split(whole, Split(kind=kind, valid=0.2, test=0.2), seed=1)  # type: ignore[arg-type]


class _Blind:
    """A split that fails the test when the test split, or the whole table, is looked at."""

    def __init__(self, data: SplitDataset) -> None:
        self._data = data
        whole = data.dataset
        self.dataset = _Table(
            name=whole.name, items=whole.items, rating_scale=whole.rating_scale, reviews=whole.reviews
        )

    @property
    def __class__(self) -> Any:
        """Pass for a split."""
        return SplitDataset

    def __getattr__(self, name: str) -> Any:
        if name in ("test", "held_out", "holdouts", "fingerprint"):
            raise AssertionError(f"tuning looked at {name!r}")
        return getattr(self._data, name)

    def history(self, user_id: str, split: str) -> tuple[Event, ...]:
        assert split == "valid"
        return self._data.history(user_id, "valid")


class _Table:
    def __init__(self, **allowed: Any) -> None:
        self.__dict__.update(allowed)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"tuning looked at {name!r} of the whole table")


# A few points of each, whatever its own grid is.
TUNED: dict[str, dict[str, tuple[Any, ...]]] = {
    "recent-popularity": {"half_life": (0.05, 0.2)},
    "item-knn": {"history": (5, 20), "decay": (0.5, 1.0)},
    "rp3beta": {"beta": (0.0, 0.6)},
    "markov": {"order": (1, 3)},
    "markov-cooccurrence": {"transition": (0.1, 1.0)},
    "ease": {"penalty": (10.0, 100.0)},
    "user-item-bias": {"recency": (0.0, 1.0)},
    "mf": {"factors": (2, 5)},
    "popularity": {},
}


@pytest.mark.parametrize("name", sorted(TUNED))
def test_tuning_does_not_look_at_the_test_split(name: str) -> None:
    data = _data()
    blind: Any = _Blind(data)
    garbage = data.test.with_columns(
        pl.lit("nobody").alias("user_id"), pl.lit("i00").alias("item_id"), pl.lit(-99.0).alias("rating")
    )
    expected = tune(name, data, seed=0, grid=TUNED[name])
    assert tune(name, blind, seed=0, grid=TUNED[name]) == expected
    assert tune(name, replace(data, test=garbage), seed=0, grid=TUNED[name]) == expected


def test_stopping_and_tuning_together_do_not_look_at_the_test_split() -> None:
    pytest.importorskip("torch")
    data = _data()
    blind: Any = _Blind(data)
    grid: dict[str, tuple[Any, ...]] = {
        "dim": (8,),
        "dropout": (0.0, 0.5),
        "epochs": (3,),
        "patience": (1,),
        "quiet": (True,),
    }
    assert tune("sasrec", blind, seed=0, grid=grid) == tune("sasrec", data, seed=0, grid=grid)


@pytest.mark.parametrize("kind", ["leave_one_out", "global_time", "user_disjoint"])
def test_the_best_point_of_the_grid_is_chosen(kind: str) -> None:
    data = _data(kind)
    found = tune("recent-popularity", data, seed=0)
    assert [dict(trial.parameters) for trial in found.trials] == points(RecentPopularity.GRID)
    assert found.metric == "NDCG@10"
    values = [trial.values["excluded"] for trial in found.trials]
    assert max(values) > min(values)
    (best,) = {trial.values["excluded"] for trial in found.trials if trial.parameters == found.parameters}
    assert best == max(values)
    model = RecentPopularity(RecentPopularity.Config(**found.parameters))
    model.fit(data)
    assert mean_ndcgs(model, ranking_cases(data)) == {"excluded": best}


def test_ratings_are_tuned_to_the_lowest_error() -> None:
    grid = {"factors": (2, 5), "penalty": (0.05, 0.15)}
    found = tune("mf", _data(), seed=0, tables=("rating",), grid=grid)
    assert found.metric == "RMSE" and [dict(trial.parameters) for trial in found.trials] == points(grid)
    values = {trial.values["rating"] for trial in found.trials}
    assert {t.values["rating"] for t in found.trials if t.parameters == found.parameters} == {min(values)}


def test_of_equal_points_the_first_is_kept_and_a_grid_can_be_given() -> None:
    found = tune("item-knn", _data(), seed=0, grid={"history": (20, 30), "decay": (1.0,)})
    assert len(found.trials) == 2 and found.trials[0].values == found.trials[1].values
    assert found.parameters is found.trials[0].parameters
    assert points({}) == [{}] and tune("popularity", _data(), seed=0).parameters == {}


def test_what_cannot_be_tuned_is_said() -> None:
    data = _data()
    with raises(RecipeError, Facts("unknown-name", says="did you mean 'markov'")):
        tune("marcov", data, seed=0)
    with raises(RecipeError, Facts("contradiction", says="'frequent-text'")):
        tune("frequent-text", data, seed=0)
    with raises(DataError, Facts("empty", "toy", column="data.split.valid", says="validation interactions")):
        tune("markov", replace(data, valid=data.valid.clear()), seed=0)
    with raises(DataError, Facts("empty", "toy", column="data.split.valid", says="validation ratings")):
        tune("mf", replace(data, valid=data.valid.with_columns(pl.lit(None, pl.Float64).alias("rating"))), seed=0)


def test_a_sample_of_ratings_is_drawn_as_that_of_rankings() -> None:
    data = _data()
    few = {case.request.id for case in rating_cases(data, 5)}
    assert len(few) == 5 and few == {case.request.id for case in ranking_cases(data, 5)}
    turned = replace(data, drawn=(np.uint64(2**64 - 1) - drawn(data)))
    assert {case.request.id for case in rating_cases(turned, 5)} == {c.request.id for c in ranking_cases(turned, 5)}
    assert few != {case.request.id for case in rating_cases(turned, 5)}


def test_ratings_are_asked_with_their_reviews() -> None:
    data = _data()
    user, item, _ = data.valid.select("user_id", "item_id", "rating").row(0)
    reviews = {(user, item): Review(text="Fine."), ("u00", "elsewhere"): Review(text="Other.")}
    cases = rating_cases(replace(data, dataset=replace(data.dataset, reviews=reviews)))
    assert [case.request.context for case in cases if case.request.user_id == user] == [{"review": "Fine."}]
    assert all(not case.request.context for case in rating_cases(data))


# ------------------------------------------------------------------ the measure itself


@pytest.mark.parametrize("kind", ["leave_one_out", "global_time", "user_disjoint"])
@pytest.mark.parametrize("made", [Popularity, Markov])
def test_the_measure_is_that_of_full_ranking(made: Any, kind: str) -> None:
    data = _data(kind)
    model: CatalogueScorer = made()
    model.fit(data)  # type: ignore[attr-defined]
    cases = ranking_cases(data)
    assert {(c.request.user_id, c.truth) for c in cases} == set(data.valid.select("user_id", "item_id").iter_rows())
    found = rank_catalogue(model, cases, cutoffs=(), seen=("excluded",))["excluded"]
    expected = ndcg(found.greater, found.tied, 10).mean()
    assert mean_ndcgs(model, cases)["excluded"] == pytest.approx(expected, abs=1e-12)


@dataclass
class _Fixed:
    """Gives every request the same scores of three items."""

    values: NDArray[np.float64]
    name: str = "fixed"
    items: tuple[str, ...] = ("a", "b", "c")

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        return self.values

    def answer(self, requests: Sequence[Request]) -> list[Any]:
        raise NotImplementedError


def test_a_target_that_stands_in_the_history_can_still_be_ranked() -> None:
    scores = np.array([[3.0, 2.0, 1.0]])
    history = tuple(Event(item_id=item) for item in "ab")

    def value(truth: str) -> float:
        case = Case(request=Request(id="r", user_id="u", history=history), truth=truth)
        return mean_ndcgs(_Fixed(scores), [case], k=2)["excluded"]

    # Of a and b only the target remains, so each is first; c stands alone as well.
    assert value("a") == 1.0 and value("c") == 1.0
    assert value("b") == 1.0
    assert scores.tolist() == [[3.0, 2.0, 1.0]]


def test_validation_cases_show_what_was_known_before_and_no_more() -> None:
    data = _data()
    for case in ranking_cases(data):
        shown = [event.item_id for event in case.request.history]
        assert shown == [event.item_id for event in data.train_events(case.request.user_id)]
        assert case.truth not in shown
    assert {case.request.item for case in rating_cases(data)} == set(data.valid["item_id"])
    few, many = ranking_cases(data, 10), ranking_cases(data)
    assert few == many[:10] and [c.request.id for c in many] != sorted(c.request.id for c in many)


def test_the_grid_of_the_shipped_settings_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Markov, "GRID", {"order": (1,)})
    assert [dict(trial.parameters) for trial in tune("markov", _data(), seed=0).trials] == [{"order": 1}]


# ------------------------------------------------------------------ one choice a table


def test_each_convention_chooses_for_itself_from_the_same_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data()
    grid: dict[str, tuple[Any, ...]] = {"history": (1, 2, 5, 20), "decay": (0.3, 0.6, 1.0)}
    fits = []
    genuine = ItemKNN.fit
    monkeypatch.setattr(ItemKNN, "fit", lambda self, data: (fits.append(1), genuine(self, data))[1])
    found = tune("item-knn", data, seed=0, tables=("excluded", "included"), grid=grid)
    assert len(found.trials) == 12 and len(fits) <= 12
    for table, choice in found.choices.items():
        assert choice.parameters == max(found.trials, key=lambda trial: trial.values[table]).parameters
        model = choice.model
        assert model.config == ItemKNN.Config(**choice.parameters)
        best = max(trial.values[table] for trial in found.trials)
        assert mean_ndcgs(model, ranking_cases(data), (table,)) == {table: best}
    assert all(set(trial.values) == {"excluded", "included"} for trial in found.trials)


def test_points_of_an_earlier_call_are_not_fitted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    data, kept = _data(), []
    grid: dict[str, tuple[Any, ...]] = {"order": (1, 2, 5)}
    whole = tune("markov", data, seed=0, grid=grid, kept=lambda trials: kept.append(tuple(trials)))
    assert [len(trials) for trials in kept] == [1, 2, 3] and kept[-1] == whole.trials
    monkeypatch.setattr(Markov, "fit", lambda self, data: pytest.fail("fitted again"))
    again = tune("markov", data, seed=0, grid=grid, known=kept[-1])
    assert again == whole and again.choices["excluded"].model is None


def test_a_baseline_may_limit_its_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Markov, "FITS", 2)
    monkeypatch.setattr(Markov, "AT_ANSWER", frozenset())
    found = tune("markov", _data(), seed=0, grid={"order": (1, 2, 5)})
    # A grid with more settings than may be fitted is searched from the default.
    assert [trial.parameters["order"] for trial in found.trials] == [10, 5]


def test_what_has_no_part_in_fitting_is_not_fitted_again() -> None:
    data = _data()
    first = fitted("ease", {"penalty": 10.0}, data, seed=0)
    assert fitted("ease", {"penalty": 10.0}, data, seed=0, like=[first])._model is first._model
    assert fitted("ease", {"penalty": 20.0}, data, seed=0, like=[first])._model is not first._model
