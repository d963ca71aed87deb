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
from llmrec.baselines.popular import RecentPopularity
from llmrec.baselines.tune import fit_baseline, grid_combinations, tune
from llmrec.baselines.validation import mean_ndcgs, ranking_cases, rating_cases, sampling_keys
from llmrec.data.dataset import Review
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.errors import DataError, RecipeError
from llmrec.evaluate.catalogue import rank_catalogue
from llmrec.metrics.ranking import ndcg
from llmrec.recipe.schema import Split
from llmrec.types import Case, Event, Request
from tests.baselines.trained import make_dataset
from tests.facts import Facts, raises


def _data(kind: str = "leave_one_out", seed: int = 0) -> SplitDataset:
    """Return 80 users and 25 items with latent factors; popularity changes over time."""
    rng = np.random.default_rng(seed)
    likes, level = rng.normal(0, 0.7, (80, 2)), rng.normal(0, 0.7, (25, 2))
    rows = []
    for user in range(80):
        for step in range(9):
            item = int(rng.integers(0, 25)) if rng.random() < 0.4 else (step * 2 + int(rng.integers(0, 4))) % 25
            rating = float(np.clip(round(3 + 2 * likes[user] @ level[item] + rng.normal(0, 0.3)), 1, 5))
            rows.append((f"u{user:02d}", f"i{item:02d}", rating, float(step * 100 + user)))
    first = {row[:2]: row for row in reversed(rows)}
    rows = [row for row in rows if first[row[:2]] is row]
    dataset = make_dataset(rows, "rating timestamp", [f"i{n:02d}" for n in range(25)], rating_scale=(1.0, 5.0))
    return split_dataset(dataset, Split(kind=kind, valid=0.2, test=0.2), seed=1)  # type: ignore[arg-type]


# A few grid points for each model.
TUNED: dict[str, dict[str, tuple[Any, ...]]] = {
    "item-knn": {"history": (5, 20), "decay": (0.5, 1.0)},
    "ease": {"penalty": (10.0, 100.0)},
    "mf": {"factors": (2, 5)},
    "popularity": {},
    "sasrec": {"dim": (8,), "dropout": (0.0, 0.5), "epochs": (3,), "patience": (1,), "quiet": (True,)},
}


@pytest.mark.parametrize("name", sorted(TUNED))
def test_tuning_ignores_the_test_split(name: str) -> None:
    if name == "sasrec":
        pytest.importorskip("torch")
    data = _data()

    def changed(frame: pl.DataFrame) -> pl.DataFrame:
        return frame.with_columns(pl.lit("u00").alias("user_id"), pl.lit("i00").alias("item_id"), rating=-99.0)

    # Only training and validation rows are unchanged.
    dataset = replace(data.dataset, interactions=changed(data.dataset.interactions))
    other = replace(data, test=changed(data.test), held_out=frozenset(), dataset=dataset)
    assert tune(name, other, seed=0, grid=TUNED[name]) == tune(name, data, seed=0, grid=TUNED[name])


@pytest.mark.parametrize("kind", ["leave_one_out", "user_disjoint"])
def test_chooses_the_best_grid_point(kind: str) -> None:
    data = _data(kind)
    result = tune("recent-popularity", data, seed=0)
    assert [dict(trial.parameters) for trial in result.trials] == grid_combinations(RecentPopularity.GRID)
    assert result.metric == "NDCG@10"
    values = [trial.values["excluded"] for trial in result.trials]
    assert max(values) > min(values)
    (best,) = {trial.values["excluded"] for trial in result.trials if trial.parameters == result.parameters}
    assert best == max(values)
    model = RecentPopularity(RecentPopularity.Config(**result.parameters))
    model.fit(data)
    assert mean_ndcgs(model, ranking_cases(data)) == {"excluded": best}


def test_rating_baselines_are_tuned_by_rmse() -> None:
    grid = {"factors": (2, 5), "penalty": (0.05, 0.15)}
    result = tune("mf", _data(), seed=0, tables=("rating",), grid=grid)
    assert result.metric == "RMSE" and [dict(trial.parameters) for trial in result.trials] == grid_combinations(grid)
    values = {trial.values["rating"] for trial in result.trials}
    assert {t.values["rating"] for t in result.trials if t.parameters == result.parameters} == {min(values)}


def test_first_of_equal_points_wins() -> None:
    result = tune("item-knn", _data(), seed=0, grid={"history": (20, 30), "decay": (1.0,)})
    assert len(result.trials) == 2 and result.trials[0].values == result.trials[1].values
    assert result.parameters is result.trials[0].parameters
    assert grid_combinations({}) == [{}] and tune("popularity", _data(), seed=0).parameters == {}


def test_rejects_what_cannot_be_tuned() -> None:
    data = _data()
    with raises(RecipeError, Facts("unknown-name", says="did you mean 'markov'")):
        tune("marcov", data, seed=0)
    with raises(RecipeError, Facts("contradiction", says="'frequent-text'")):
        tune("frequent-text", data, seed=0)
    with raises(DataError, Facts("empty", "toy", column="data.split.valid", says="validation interactions")):
        tune("markov", replace(data, valid=data.valid.clear()), seed=0)
    with raises(DataError, Facts("empty", "toy", column="data.split.valid", says="validation ratings")):
        tune("mf", replace(data, valid=data.valid.with_columns(pl.lit(None, pl.Float64).alias("rating"))), seed=0)


def test_rating_and_ranking_samples_have_the_same_users() -> None:
    data = _data()
    few = {case.request.id for case in rating_cases(data, 5)}
    assert len(few) == 5 and few == {case.request.id for case in ranking_cases(data, 5)}
    turned = replace(data, drawn=(np.uint64(2**64 - 1) - sampling_keys(data)))
    assert {case.request.id for case in rating_cases(turned, 5)} == {c.request.id for c in ranking_cases(turned, 5)}
    assert few != {case.request.id for case in rating_cases(turned, 5)}


def test_rating_cases_have_their_reviews() -> None:
    data = _data()
    user, item, _ = data.valid.select("user_id", "item_id", "rating").row(0)
    reviews = {(user, item): Review(text="Fine."), ("u00", "elsewhere"): Review(text="Other.")}
    cases = rating_cases(replace(data, dataset=replace(data.dataset, reviews=reviews)))
    assert [case.request.context for case in cases if case.request.user_id == user] == [{"review": "Fine."}]
    assert all(not case.request.context for case in rating_cases(data))


@pytest.mark.parametrize("kind", ["leave_one_out", "global_time", "user_disjoint"])
def test_the_metric_equals_full_ranking(kind: str) -> None:
    data = _data(kind)
    model = Markov()
    model.fit(data)
    cases = ranking_cases(data)
    assert {(c.request.user_id, c.truth) for c in cases} == set(data.valid.select("user_id", "item_id").iter_rows())
    counts = rank_catalogue(model, cases, cutoffs=(), seen=("excluded",))["excluded"]
    expected = ndcg(counts.greater, counts.tied, 10).mean()
    assert mean_ndcgs(model, cases)["excluded"] == pytest.approx(expected, abs=1e-12)


@dataclass
class _Fixed:
    """Returns the same scores of three items for every request."""

    values: NDArray[np.float64]
    name: str = "fixed"
    items: tuple[str, ...] = ("a", "b", "c")

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        return self.values

    def answer(self, requests: Sequence[Request]) -> list[Any]:
        raise NotImplementedError


def test_target_in_the_history_is_ranked() -> None:
    scores = np.array([[3.0, 2.0, 1.0]])
    history = tuple(Event(item_id=item) for item in "ab")

    def value(truth: str) -> float:
        case = Case(request=Request(id="r", user_id="u", history=history), truth=truth)
        return mean_ndcgs(_Fixed(scores), [case], k=2)["excluded"]

    # The history is excluded except for the target, so each ranks first.
    assert value("a") == 1.0 and value("c") == 1.0
    assert value("b") == 1.0
    assert scores.tolist() == [[3.0, 2.0, 1.0]]


def test_validation_cases_have_training_history_only() -> None:
    data = _data()
    for case in ranking_cases(data):
        history = [event.item_id for event in case.request.history]
        assert history == [event.item_id for event in data.train_events(case.request.user_id)]
        assert case.truth not in history
    assert {case.request.item for case in rating_cases(data)} == set(data.valid["item_id"])
    few, many = ranking_cases(data, 10), ranking_cases(data)
    assert few == many[:10] and [c.request.id for c in many] != sorted(c.request.id for c in many)


def test_each_table_chooses_from_the_same_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data()
    grid: dict[str, tuple[Any, ...]] = {"history": (1, 2, 5, 20), "decay": (0.3, 0.6, 1.0)}
    fits = []
    original = ItemKNN.fit
    monkeypatch.setattr(ItemKNN, "fit", lambda self, data: (fits.append(1), original(self, data))[1])
    result = tune("item-knn", data, seed=0, tables=("excluded", "included"), grid=grid)
    assert len(result.trials) == 12 and len(fits) <= 12
    for table, choice in result.choices.items():
        assert choice.parameters == max(result.trials, key=lambda trial: trial.values[table]).parameters
        model = choice.model
        assert model.config == ItemKNN.Config(**choice.parameters)
        best = max(trial.values[table] for trial in result.trials)
        assert mean_ndcgs(model, ranking_cases(data), (table,)) == {table: best}
    assert all(set(trial.values) == {"excluded", "included"} for trial in result.trials)


def test_known_points_are_not_fitted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    data, recorded = _data(), []
    grid: dict[str, tuple[Any, ...]] = {"order": (1, 2, 5)}
    first = tune("markov", data, seed=0, grid=grid, kept=lambda trials: recorded.append(tuple(trials)))
    assert [len(trials) for trials in recorded] == [1, 2, 3] and recorded[-1] == first.trials
    monkeypatch.setattr(Markov, "fit", lambda self, data: pytest.fail("fitted again"))
    again = tune("markov", data, seed=0, grid=grid, known=recorded[-1])
    assert again == first and again.choices["excluded"].model is None


def test_baseline_limits_its_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Markov, "FITS", 2)
    monkeypatch.setattr(Markov, "AT_ANSWER", frozenset())
    result = tune("markov", _data(), seed=0, grid={"order": (1, 2, 5)})
    # A grid with more settings than may be fitted is searched from the default.
    assert [trial.parameters["order"] for trial in result.trials] == [10, 5]


def test_equal_fit_options_reuse_the_fit() -> None:
    data = _data()
    first = fit_baseline("ease", {"penalty": 10.0}, data, seed=0)
    assert fit_baseline("ease", {"penalty": 10.0}, data, seed=0, like=[first])._model is first._model
    assert fit_baseline("ease", {"penalty": 20.0}, data, seed=0, like=[first])._model is not first._model
