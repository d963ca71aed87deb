from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy.special import expit

from llmrec.baselines import ctr
from llmrec.baselines import rating_features as liked
from llmrec.baselines.ctr import LikeRatio, Logistic
from llmrec.baselines.rated import training_ratings
from llmrec.baselines.tune import tune
from llmrec.data.split import SplitDataset, liked_threshold, split_dataset
from llmrec.metrics.probability import auc, log_loss
from llmrec.recipe.schema import Split
from llmrec.types import Event, Probability, Request
from tests.baselines.trained import make_dataset


def _data(users: int = 200, items: int = 30) -> SplitDataset:
    """Users and items with different levels: a like is more likely if both are high."""
    rng = np.random.default_rng(0)
    of_user, of_item = rng.normal(0, 1, users), rng.normal(0, 1.5, items)
    rows = []
    for user in range(users):
        for step, item in enumerate(rng.permutation(items)[:12]):
            yes = rng.random() < expit(of_user[user] + of_item[item])
            rows.append((f"u{user:03d}", f"i{item:02d}", 4.0 if yes else 2.0, float(step)))
    dataset = make_dataset(rows, "rating timestamp", [f"i{n:02d}" for n in range(items)], rating_scale=(1.0, 5.0))
    return split_dataset(dataset, Split(kind="global_time", valid=0.2, test=0.2), seed=1)


def _request(*values: float, item: str | None = "i01") -> Request:
    events = tuple(Event(item_id=f"i{number:02d}", rating=value) for number, value in enumerate(values))
    return Request(id="r", user_id="unknown", history=events, item=item)


def _value(answer: object) -> float:
    assert isinstance(answer, Probability)
    return answer.value


def test_default_threshold() -> None:
    assert liked_threshold((1.0, 5.0), None) == 4.0
    assert liked_threshold((0.5, 5.0), None) == pytest.approx(3.875)
    assert liked_threshold((1.0, 5.0), 3.0) == 3.0


def test_like_ratio_by_hand() -> None:
    data = _data()
    share = float((data.train["rating"] >= 4).mean())  # type: ignore[operator]
    model = LikeRatio()
    model.fit(data)
    values = [
        _value(a) for a in model.answer([_request(5.0, 4.0, 3.9, 1.0), _request(), _request(5.0, item="unknown")])
    ]
    assert values == pytest.approx([(2 + share) / 5, share, (1 + share) / 2])
    other = LikeRatio(LikeRatio.Config(liked=3.5))
    other.fit(data)
    assert _value(other.answer([_request(5.0, 4.0, 3.9, 1.0)])[0]) > 0.6


def test_training_features_exclude_the_row_itself() -> None:
    data = _data()
    turned = data.train.with_row_index().with_columns(
        pl.when(pl.col("index") == 5).then(6 - pl.col("rating")).otherwise(pl.col("rating")).alias("rating")
    )
    other = replace(data, train=turned.drop("index").select(data.train.columns))
    tables = []
    for each in (data, other):
        known = training_ratings(each, "logistic")
        # Share and mean of all ratings form the prior, which depends on every rating, so they are fixed here.
        counts = replace(liked.RatingCounts.of(known, None), share=0.5, mean=3.0)
        past = liked._RatingHistory.of(each, known, counts)
        tables.append(
            (
                known,
                np.column_stack(
                    [liked._leave_one_out_features(known, counts, past), liked._earlier_residual_means(past, 0.7)]
                ),
            )
        )
    (known, before), (_, after) = tables
    user, item = data.train["user_id"][5], data.train["item_id"][5]
    row_itself = (known.users == known.user_index[user]) & (known.items == known.item_index[item])
    assert row_itself.sum() == 1
    np.testing.assert_allclose(before[row_itself], after[row_itself], atol=1e-12)
    near = (known.users == known.user_index[user]) & ~row_itself
    # The user's features change, except the decayed feature of earlier ratings.
    assert np.abs(before[near] - after[near]).max(axis=0)[[0, 5]].min() > 1e-3
    earlier = near & (known.order < known.order[row_itself])
    assert earlier.any() and np.array_equal(before[earlier, 6], after[earlier, 6])
    assert np.abs(before[near & ~earlier, 6] - after[near & ~earlier, 6]).max() > 1e-3
    same = (known.items == known.item_index[item]) & ~row_itself
    assert np.abs(before[same] - after[same]).max(axis=0)[[2, 4]].min() > 1e-3


def test_weights_minimize_the_penalized_loss() -> None:
    rng = np.random.default_rng(2)
    features = rng.normal(size=(400, 3))
    truth = (rng.random(400) < expit(features @ [1.0, -2.0, 0.0] + 0.5)).astype(float)

    def loss(weights: np.ndarray, penalty: float) -> float:
        margins = (2 * truth - 1) * (features @ weights[:-1] + weights[-1])
        return float(np.logaddexp(0, -margins).mean() + penalty / 800 * (weights[:-1] ** 2).sum())

    free = ctr._fit_weights(features, truth, np.full(3, 1e-6))
    assert free == pytest.approx([1.0, -2.0, 0.0, 0.5], abs=0.45)
    for penalty in (1e-6, 1.0, 50.0):
        weights_ = ctr._fit_weights(features, truth, np.full(3, penalty))
        for step in rng.normal(0, 0.01, size=(20, 4)):
            assert loss(weights_ + step, penalty) > loss(weights_, penalty) - 1e-12
    assert np.abs(ctr._fit_weights(features, truth, np.full(3, 1e6))[:-1]).max() < 0.01


def test_features_of_a_request_by_hand() -> None:
    data = _data()
    model = Logistic(Logistic.Config(features="recent", decay=0.5))
    model.fit(data)
    train = data.train
    mean = float(train["rating"].mean())  # type: ignore[arg-type]

    def level(item: str) -> float:
        item_ratings = train.filter(pl.col("item_id") == item)["rating"]
        return float((item_ratings - mean).sum()) / (len(item_ratings) + 3) if len(item_ratings) else 0.0

    residuals = [5.0 - mean - level("i00"), 1.0 - mean - level("i01")]
    row = model._fitted.counted.plain(_request(5.0, 1.0, item="i07"))
    assert row[1] == pytest.approx(np.log(3)) and row[4] == pytest.approx(level("i07"))
    assert row[5:] == pytest.approx([sum(residuals) / 12, (0.5 * residuals[0] + residuals[1]) / 3.5])
    assert model._fitted.counted.plain(_request(item="unknown"))[4:] == [0.0, 0.0, 0.0]


def test_training_features_equal_those_of_requests() -> None:
    data = _data(users=20)
    known = training_ratings(data, "logistic")
    counts = liked.RatingCounts.of(known, None)
    decayed = liked._earlier_residual_means(liked._RatingHistory.of(data, known, counts), 0.6)
    model = Logistic(Logistic.Config(features="recent", decay=0.6))
    model.fit(data)
    for user in ("u003", "u011"):
        events = data.train_events(user)
        for position, event in enumerate(events):
            row = (known.users == known.user_index[user]) & (known.items == known.item_index[event.item_id])
            request = Request(id="r", user_id=user, history=events[:position], item=event.item_id)
            assert decayed[row].tolist() == pytest.approx([model._fitted.counted.plain(request)[6]])


def test_known_history_counts_in_training_and_requests() -> None:
    data = _data(users=20)
    early = data.train.with_row_index().filter(pl.col("index").is_in(range(0, data.train.height, 3))).drop("index")
    late = data.train.join(early, on=["user_id", "item_id"], how="anti")
    cut = replace(data, train=late.select(data.train.columns), known=early.select(data.train.columns))
    counted, known, rows = liked.RequestFeatures.of(cut, "logistic", None, 0.7)
    plain = rows * counted.scale + counted.mean
    sizes = {user: len(cut.known_events(user)) + cut.train_counts()[user] for user in known.user_index}
    for user, index in known.user_index.items():
        rows_of_user = known.users == index
        assert plain[rows_of_user, 1] == pytest.approx(np.log1p(sizes[user] - 1))
    # The last training rating of a user has the features of a request with all earlier ones as history.
    user = "u003"
    events = [*cut.known_events(user), *cut.train_events(user)]
    last = events[-1]
    request = Request(id="r", user_id=user, history=tuple(events[:-1]), item=last.item_id)
    row = (known.users == known.user_index[user]) & (known.items == known.item_index[last.item_id])
    assert plain[row, 6].tolist() == pytest.approx([counted.plain(request)[6]])


def test_id_features_separate_users_and_ignore_unknown_ones() -> None:
    data = _data()
    plain, ids = (Logistic(Logistic.Config(features=kind, id_penalty=1.0)) for kind in ("counts", "ids"))  # type: ignore[arg-type]
    for model in (plain, ids):
        model.fit(data)
    assert ids._model is not None and set(ids._model.of_items) == set(data.train["item_id"])
    assert max(map(abs, ids._model.of_users.values())) > 0.1
    first, second = (replace(_request(5.0, 1.0), user_id=user) for user in ("u001", "u002"))
    assert _value(ids.answer([first])[0]) != _value(ids.answer([second])[0])
    assert _value(plain.answer([first])[0]) == _value(plain.answer([second])[0])
    unknown = _value(ids.answer([_request(5.0, item="unknown")])[0])
    assert unknown == pytest.approx(
        expit(ids._model.counted.row(_request(5.0, item="unknown")) @ ids._model.weights + ids._model.bias)
    )


@pytest.mark.parametrize("users", [7, 200])
def test_users_with_equal_counts_keep_the_regression_stable(users: int) -> None:
    # All users have ten training ratings, so this count is constant in training and different in requests.
    rng = np.random.default_rng(1)
    level, rows = rng.normal(0, 2, 20), []
    for user in range(users):
        for step, item in enumerate(rng.permutation(20)[:12]):
            yes = rng.random() < expit(level[item])
            rows.append((f"u{user:03d}", f"i{item:02d}", 5.0 if yes else 1.0, float(step)))
    dataset = make_dataset(rows, "rating timestamp", [f"i{n:02d}" for n in range(20)], rating_scale=(1.0, 5.0))
    data = split_dataset(dataset, Split(), seed=0)
    model = Logistic()
    model.fit(data)
    requests = [
        Request(id=held.user_id, user_id=held.user_id, history=data.history(held.user_id, "test"), item=held.item_id)
        for held in data.holdouts("test")
    ]
    values = np.array([_value(answer) for answer in model.answer(requests)])
    truth = np.array([float(held.rating == 5.0) for held in data.holdouts("test")])
    assert values.min() > 0.001 and values.max() < 0.999 and np.ptp(values) > 0.1
    assert float(log_loss(values, truth).mean()) < 1.0
    if users >= 60:
        assert auc(values, truth) > 0.7


def test_tuning_minimizes_log_loss() -> None:
    grid: dict[str, tuple[float, ...]] = {"penalty": (1.0, 1e7), "liked": (4.0,)}
    result = tune("logistic", _data(), seed=0, tables=("yes-no",), grid=grid)
    assert result.metric == "LogLoss"
    assert result.parameters == {"penalty": 1.0, "liked": 4.0}
    assert result.trials[0].values["yes-no"] < result.trials[1].values["yes-no"]
