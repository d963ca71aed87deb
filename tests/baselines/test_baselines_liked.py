from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy.special import expit

from llmrec.baselines import counted as liked
from llmrec.baselines import yes_no
from llmrec.baselines.rated import ratings
from llmrec.baselines.tune import tune
from llmrec.baselines.yes_no import LikeRatio, Logistic
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split, threshold
from llmrec.metrics.probability import auc, log_loss
from llmrec.recipe.schema import Split
from llmrec.types import Event, Item, Probability, Request


def _data(users: int = 200, items: int = 30) -> SplitDataset:
    """Users and items of different levels: a like is likelier where both are high."""
    rng = np.random.default_rng(0)
    of_user, of_item = rng.normal(0, 1, users), rng.normal(0, 1.5, items)
    rows = []
    for user in range(users):
        for step, item in enumerate(rng.permutation(items)[:12]):
            yes = rng.random() < expit(of_user[user] + of_item[item])
            rows.append((f"u{user:03d}", f"i{item:02d}", 4.0 if yes else 2.0, float(step)))
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    catalogue = {f"i{n:02d}": Item(item_id=f"i{n:02d}", title="t") for n in range(items)}
    whole = Dataset(name="toy", noun="things", interactions=frame, items=catalogue, rating_scale=(1.0, 5.0))
    return split(whole, Split(kind="global_time", valid=0.2, test=0.2), seed=1)


def _asked(*rated: float, item: str | None = "i01") -> Request:
    events = tuple(Event(item_id=f"i{place:02d}", rating=value) for place, value in enumerate(rated))
    return Request(id="r", user_id="somebody", history=events, item=item)


def _value(answer: object) -> float:
    assert isinstance(answer, Probability)
    return answer.value


def test_the_threshold_is_three_quarters_up_the_scale_unless_given() -> None:
    assert threshold((1.0, 5.0), None) == 4.0
    assert threshold((0.5, 5.0), None) == pytest.approx(3.875)
    assert threshold((1.0, 5.0), 3.0) == 3.0


def test_the_like_ratio_by_hand() -> None:
    data = _data()
    share = float((data.train["rating"] >= 4).mean())  # type: ignore[operator]
    model = LikeRatio()
    model.fit(data)
    found = [_value(a) for a in model.answer([_asked(5.0, 4.0, 3.9, 1.0), _asked(), _asked(5.0, item="unknown")])]
    assert found == pytest.approx([(2 + share) / 5, share, (1 + share) / 2])
    other = LikeRatio(LikeRatio.Config(liked=3.5))
    other.fit(data)
    assert _value(other.answer([_asked(5.0, 4.0, 3.9, 1.0)])[0]) > 0.6


def test_the_like_ratio_does_not_look_at_the_item() -> None:
    model = LikeRatio()
    model.fit(_data())
    assert len({_value(model.answer([_asked(5.0, 1.0, item=f"i{n:02d}")])[0]) for n in range(30)}) == 1


def test_no_training_row_tells_its_own_answer() -> None:
    """Turning one rating over moves the features of other rows only."""
    data = _data()
    turned = data.train.with_row_index().with_columns(
        pl.when(pl.col("index") == 5).then(6 - pl.col("rating")).otherwise(pl.col("rating")).alias("rating")
    )
    other = replace(data, train=turned.drop("index").select(data.train.columns))
    tables = []
    for each in (data, other):
        known = ratings(each, "logistic")
        # Share and mean of all ratings are the prior, which a single rating does move: they are held where they were.
        found = replace(liked.Counts.of(known, None), share=0.5, mean=3.0)
        past = liked._Past.of(each, known, found)
        tables.append((known, np.column_stack([liked._others(known, found, past), liked._before(past, 0.7)])))
    (known, before), (_, after) = tables
    user, item = data.train["user_id"][5], data.train["item_id"][5]
    own = (known.users == known.user_index[user]) & (known.items == known.item_index[item])
    assert own.sum() == 1
    np.testing.assert_allclose(before[own], after[own], atol=1e-12)
    near = (known.users == known.user_index[user]) & ~own
    # Every feature of the user, and none that is fading of ratings before.
    assert np.abs(before[near] - after[near]).max(axis=0)[[0, 5]].min() > 1e-3
    earlier = near & (known.order < known.order[own])
    assert earlier.any() and np.array_equal(before[earlier, 6], after[earlier, 6])
    assert np.abs(before[near & ~earlier, 6] - after[near & ~earlier, 6]).max() > 1e-3
    same = (known.items == known.item_index[item]) & ~own
    assert np.abs(before[same] - after[same]).max(axis=0)[[2, 4]].min() > 1e-3


def test_the_weights_are_the_minimum_of_the_penalised_loss() -> None:
    rng = np.random.default_rng(2)
    features = rng.normal(size=(400, 3))
    truth = (rng.random(400) < expit(features @ [1.0, -2.0, 0.0] + 0.5)).astype(float)

    def loss(weights: np.ndarray, penalty: float) -> float:
        margins = (2 * truth - 1) * (features @ weights[:-1] + weights[-1])
        return float(np.logaddexp(0, -margins).mean() + penalty / 800 * (weights[:-1] ** 2).sum())

    free = yes_no._weights(features, truth, np.full(3, 1e-6))
    assert free == pytest.approx([1.0, -2.0, 0.0, 0.5], abs=0.45)
    for penalty in (1e-6, 1.0, 50.0):
        found = yes_no._weights(features, truth, np.full(3, penalty))
        for step in rng.normal(0, 0.01, size=(20, 4)):
            assert loss(found + step, penalty) > loss(found, penalty) - 1e-12
    assert np.abs(yes_no._weights(features, truth, np.full(3, 1e6))[:-1]).max() < 0.01


def test_features_of_a_request_by_hand() -> None:
    data = _data()
    model = Logistic(Logistic.Config(features="recent", decay=0.5))
    model.fit(data)
    train = data.train
    mean = float(train["rating"].mean())  # type: ignore[arg-type]

    def level(item: str) -> float:
        mine = train.filter(pl.col("item_id") == item)["rating"]
        return float((mine - mean).sum()) / (len(mine) + 3) if len(mine) else 0.0

    left = [5.0 - mean - level("i00"), 1.0 - mean - level("i01")]
    row = model._fitted.counted.plain(_asked(5.0, 1.0, item="i07"))
    assert row[1] == pytest.approx(np.log(3)) and row[4] == pytest.approx(level("i07"))
    assert row[5:] == pytest.approx([sum(left) / 12, (0.5 * left[0] + left[1]) / 3.5])
    assert model._fitted.counted.plain(_asked(item="unknown"))[4:] == [0.0, 0.0, 0.0]


def test_fading_residuals_before_a_rating_are_those_of_its_request() -> None:
    """A training row has the features of a request whose history is what came before it."""
    data = _data(users=20)
    known = ratings(data, "logistic")
    found = liked.Counts.of(known, None)
    fading = liked._before(liked._Past.of(data, known, found), 0.6)
    model = Logistic(Logistic.Config(features="recent", decay=0.6))
    model.fit(data)
    for user in ("u003", "u011"):
        events = data.train_events(user)
        for place, event in enumerate(events):
            row = (known.users == known.user_index[user]) & (known.items == known.item_index[event.item_id])
            request = Request(id="r", user_id=user, history=events[:place], item=event.item_id)
            assert fading[row].tolist() == pytest.approx([model._fitted.counted.plain(request)[6]])


def test_what_is_history_alone_counts_for_the_user_in_training_as_in_requests() -> None:
    data = _data(users=20)
    early = data.train.with_row_index().filter(pl.col("index").is_in(range(0, data.train.height, 3))).drop("index")
    late = data.train.join(early, on=["user_id", "item_id"], how="anti")
    cut = replace(data, train=late.select(data.train.columns), known=early.select(data.train.columns))
    counted, known, rows = liked.Counted.of(cut, "logistic", None, 0.7)
    plain = rows * counted.scale + counted.mean
    sizes = {user: len(cut.known_events(user)) + cut.train_counts()[user] for user in known.user_index}
    for user, place in known.user_index.items():
        own = known.users == place
        assert plain[own, 1] == pytest.approx(np.log1p(sizes[user] - 1))
    # The last training rating of a user is seen as a request after all before it would be, but for its own item.
    user = "u003"
    events = [*cut.known_events(user), *cut.train_events(user)]
    last = events[-1]
    request = Request(id="r", user_id=user, history=tuple(events[:-1]), item=last.item_id)
    row = (known.users == known.user_index[user]) & (known.items == known.item_index[last.item_id])
    assert plain[row, 6].tolist() == pytest.approx([counted.plain(request)[6]])


def test_ids_tell_items_apart_that_are_counted_alike_and_leave_strangers_alone() -> None:
    data = _data()
    plain, ids = (Logistic(Logistic.Config(features=kind, id_penalty=1.0)) for kind in ("counts", "ids"))  # type: ignore[arg-type]
    for model in (plain, ids):
        model.fit(data)
    assert ids._model is not None and set(ids._model.of_items) == set(data.train["item_id"])
    assert max(map(abs, ids._model.of_users.values())) > 0.1
    first, second = (replace(_asked(5.0, 1.0), user_id=user) for user in ("u001", "u002"))
    assert _value(ids.answer([first])[0]) != _value(ids.answer([second])[0])
    assert _value(plain.answer([first])[0]) == _value(plain.answer([second])[0])
    stranger = _value(ids.answer([_asked(5.0, item="unknown")])[0])
    assert stranger == pytest.approx(
        expit(ids._model.counted.row(_asked(5.0, item="unknown")) @ ids._model.weights + ids._model.bias)
    )


def test_logistic_regression_sees_the_item_and_beats_the_ratio() -> None:
    data = _data()
    held = [row for row in data.holdouts("test") if row.rating is not None]
    requests = [
        Request(id=str(n), user_id=h.user_id, item=h.item_id, history=data.history(h.user_id, "test"))
        for n, h in enumerate(held)
    ]
    truth = [float((h.rating or 0) >= 4) for h in held]
    scores = {}
    for made in (LikeRatio, Logistic):
        model = made()
        model.fit(data)
        scores[made.name] = auc([_value(answer) for answer in model.answer(requests)], truth)
    assert scores["like-ratio"] > 0.55
    assert scores["logistic"] > scores["like-ratio"] + 0.05


@pytest.mark.parametrize("users", [7, 60, 200, 333])
def test_users_of_equal_counts_do_not_blow_up_the_regression(users: int) -> None:
    # Everybody rated ten items, so the number of a user's ratings is one number in training, and another when asked.
    rng = np.random.default_rng(1)
    level, rows = rng.normal(0, 2, 20), []
    for user in range(users):
        for step, item in enumerate(rng.permutation(20)[:12]):
            yes = rng.random() < expit(level[item])
            rows.append((f"u{user:03d}", f"i{item:02d}", 5.0 if yes else 1.0, float(step)))
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    catalogue = {f"i{n:02d}": Item(item_id=f"i{n:02d}", title="t") for n in range(20)}
    whole = Dataset(name="toy", noun="things", interactions=frame, items=catalogue, rating_scale=(1.0, 5.0))
    data = split(whole, Split(), seed=0)
    model = Logistic()
    model.fit(data)
    asked = [
        Request(id=held.user_id, user_id=held.user_id, history=data.history(held.user_id, "test"), item=held.item_id)
        for held in data.holdouts("test")
    ]
    found = np.array([_value(answer) for answer in model.answer(asked)])
    truth = np.array([float(held.rating == 5.0) for held in data.holdouts("test")])
    assert found.min() > 0.001 and found.max() < 0.999 and np.ptp(found) > 0.1
    assert float(log_loss(found, truth).mean()) < 1.0
    if users >= 60:
        assert auc(found, truth) > 0.7


def test_tuning_takes_the_lowest_log_loss() -> None:
    grid: dict[str, tuple[float, ...]] = {"penalty": (1.0, 1e7), "liked": (4.0,)}
    found = tune("logistic", _data(), seed=0, tables=("yes-no",), grid=grid)
    assert found.metric == "LogLoss"
    assert found.parameters == {"penalty": 1.0, "liked": 4.0}
    assert found.trials[0].values["yes-no"] < found.trials[1].values["yes-no"]


def test_a_penalty_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="penalty"):
        Logistic(Logistic.Config(penalty=0))
