from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from llmrec.baselines.mf import MF, SVD
from llmrec.baselines.rating import GlobalMean, ItemMean, UserItemBias, UserMean
from llmrec.data.split import SplitDataset
from llmrec.types import Event, Predictor, Rating, Request
from tests.baselines.trained import all_trained, make_dataset

Rows = list[tuple[str, str, float | None]]
ROWS: Rows = [("u1", "a", 5.0), ("u1", "b", 3.0), ("u2", "a", 4.0), ("u2", "c", 1.0), ("u3", "c", None)]


def _trained(rows: Rows, scale: tuple[float, float] | None = (1.0, 5.0)) -> SplitDataset:
    rows = sorted(rows, key=lambda row: row[0])
    return all_trained(make_dataset(rows, "rating", sorted({row[1] for row in rows}), rating_scale=scale))


def _value(model: Predictor, user: str, item: str, *history: Event) -> float:
    (answer,) = model.answer([Request(id="r", user_id=user, item=item, history=history)])
    assert isinstance(answer, Rating)
    return answer.value


def test_means_by_hand() -> None:
    world, user, item = GlobalMean(), UserMean(), ItemMean()
    for model in (world, user, item):
        model.fit(_trained(ROWS))
    assert _value(world, "u1", "c") == 13 / 4
    assert _value(user, "u1", "c") == 4.0
    assert _value(user, "u2", "b") == 2.5
    assert _value(item, "u9", "a") == 4.5
    assert _value(item, "u1", "c") == 1.0


def test_unknown_users_get_the_item_mean_or_the_global_mean() -> None:
    user, item = UserMean(), ItemMean()
    user.fit(_trained(ROWS))
    item.fit(_trained(ROWS))
    assert _value(user, "u9", "a") == 4.5
    assert _value(user, "u3", "a") == 4.5  # u3 is in the training data, without a rating
    assert _value(user, "u9", "new") == 13 / 4
    assert _value(item, "u1", "new") == 13 / 4


def test_unknown_user_is_rated_by_the_request_history() -> None:
    user, bias = UserMean(), UserItemBias(UserItemBias.Config(user_penalty=1.0, recency=0.0))
    user.fit(_trained(ROWS))
    bias.fit(_trained(ROWS))
    past = (Event(item_id="a", rating=2.0), Event(item_id="b", rating=1.0), Event(item_id="c"))
    assert _value(user, "u9", "b", *past) == 1.5
    assert _value(bias, "u9", "b", *past) < _value(bias, "u9", "b") - 0.5
    # A known user's level is learned in training; without recency, the request does not change it.
    assert _value(user, "u1", "b", *past) == 4.0
    assert _value(bias, "u1", "b", *past) == _value(bias, "u1", "b")


def test_biases_solve_the_ridge_problem() -> None:
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 12, 150), rng.integers(0, 9, 150)
    ratings = np.clip(np.round(3 + users / 8 - items / 6 + rng.normal(0, 0.7, 150)), 1, 5)
    rows: Rows = [(f"u{u:02d}", f"i{i}", float(r)) for u, i, r in zip(users, items, ratings, strict=True)]
    model = UserItemBias(UserItemBias.Config(user_penalty=2.0, item_penalty=5.0))
    model.fit(_trained(rows))
    design = np.zeros((150 + 21, 21))
    design[np.arange(150), users] = 1
    design[np.arange(150), 12 + items] = 1
    design[150 + np.arange(21), np.arange(21)] = np.sqrt([2.0] * 12 + [5.0] * 9)
    target = np.concatenate([ratings - ratings.mean(), np.zeros(21)])
    exact = np.linalg.lstsq(design, target, rcond=None)[0]
    for user in range(12):
        for item in range(9):
            expected = np.clip(ratings.mean() + exact[user] + exact[12 + item], 1, 5)
            assert _value(model, f"u{user:02d}", f"i{item}") == pytest.approx(expected, abs=1e-8)
    assert _value(model, "unknown", "i3") == pytest.approx(ratings.mean() + exact[12 + 3], abs=1e-8)
    assert _value(model, "u03", "nothing") == pytest.approx(ratings.mean() + exact[3], abs=1e-8)


def test_predictions_stay_on_the_scale() -> None:
    rows: Rows = [(f"u{n}", "good", 5.0) for n in range(30)] + [("u0", "x", 5.0), ("u1", "bad", 1.0), ("u1", "y", 1.0)]
    model = UserItemBias(UserItemBias.Config(user_penalty=0.01, item_penalty=0.01))
    model.fit(_trained(rows))
    assert _value(model, "u0", "good") <= 5.0
    assert _value(model, "u1", "bad") >= 1.0
    narrow = GlobalMean()
    narrow.fit(_trained(rows, scale=(1.0, 2.0)))
    assert _value(narrow, "u0", "good") == 2.0
    # Without a given scale, the training ratings define it.
    seen = UserMean()
    seen.fit(_trained(ROWS, scale=None))
    assert _value(seen, "u9", "a", Event(item_id="a", rating=99.0)) == 5.0


def _low_rank(seed: int = 0) -> tuple[Rows, Rows]:
    """Ratings of 70 users for 50 items from levels and two latent factors; half of them for training."""
    rng = np.random.default_rng(seed)
    user_level, item_level = rng.normal(0, 0.4, 70), rng.normal(0, 0.4, 50)
    tastes, kinds = rng.normal(0, 1, (70, 2)), rng.normal(0, 0.7, (50, 2))
    rows: Rows = []
    for user in range(70):
        for item in range(50):
            if rng.random() < 0.8:
                exact = 3 + user_level[user] + item_level[item] + tastes[user] @ kinds[item]
                rows.append((f"u{user:02d}", f"i{item:02d}", float(np.clip(exact + rng.normal(0, 0.1), 1, 5))))
    permutation = rng.permutation(len(rows)).tolist()
    half = len(rows) // 2
    return [rows[row] for row in permutation[:half]], [rows[row] for row in permutation[half:]]


def _error(model: Predictor, rows: Rows) -> float:
    guesses = [_value(model, user, item) for user, item, _ in rows]
    return math.sqrt(float(np.mean([(guess - (row[2] or 0)) ** 2 for guess, row in zip(guesses, rows, strict=True)])))


@pytest.mark.parametrize(
    "model", [MF(MF.Config(factors=3, penalty=0.02)), SVD(SVD.Config(factors=3, penalty=0.01, epochs=150, batch=50))]
)
def test_factors_beat_biases_on_low_rank_ratings(model: MF | SVD) -> None:
    known, held_out = _low_rank()
    bias = UserItemBias()
    bias.fit(_trained(known))
    model.fit(_trained(known))
    assert _error(model, held_out) < 0.5 * _error(bias, held_out)


def test_mf_item_vectors_solve_the_ridge_problem() -> None:
    known, _ = _low_rank()
    model = MF(MF.Config(factors=3, penalty=0.05, user_penalty=2.0, item_penalty=4.0, rounds=3))
    model.fit(_trained(known))
    fit = model._model
    assert fit is not None
    # Items were solved last: each is the least squares solution for the final users.
    for name in ("i00", "i17"):
        events = [(fit.known.user_index[user], rating or 0.0) for user, item, rating in known if item == name]
        users = np.array([user for user, _ in events])
        residuals = np.array([rating for _, rating in events]) - fit.known.mean - fit.user_bias[users]
        design = np.column_stack([np.ones(len(users)), fit.users[users]])
        penalty = np.diag([4.0, *[0.05 * len(users)] * 3])
        exact = np.linalg.solve(design.T @ design + penalty, design.T @ residuals)
        index = fit.known.item_index[name]
        assert [fit.item_bias[index], *fit.items[index]] == pytest.approx(exact.tolist(), abs=1e-9)


def test_svd_step_of_one_rating() -> None:
    rows: Rows = [("u1", "a", 5.0), ("u2", "b", 1.0)]
    model = SVD(SVD.Config(factors=2, penalty=0.1, learning_rate=0.05, epochs=1, batch=1), seed=3)
    model.fit(_trained(rows))
    rng = np.random.default_rng(3)
    users, items = (rng.normal(0, 0.1, (2, 4))[:, 2:] for _ in range(2))
    biases = np.zeros((2, 2))
    for row in rng.permutation(2).tolist():
        p, q = users[row].copy(), items[row].copy()
        error = rows[row][2] - 3.0 - p @ q  # type: ignore[operator]
        users[row] += 0.05 * (error * q - 0.1 * p)
        items[row] += 0.05 * (error * p - 0.1 * q)
        biases[row] = 0.05 * error
    assert model._model is not None
    np.testing.assert_allclose(model._model.users, users, atol=1e-12)
    np.testing.assert_allclose(model._model.items, items, atol=1e-12)
    np.testing.assert_allclose(model._model.user_bias, biases[:, 0], atol=1e-12)
    np.testing.assert_allclose(model._model.item_bias, biases[:, 1], atol=1e-12)


@pytest.mark.parametrize("model_class", [MF, SVD])
def test_factors_fall_back_to_biases(model_class: Any) -> None:
    known, _ = _low_rank()
    model = model_class(model_class.Config(recency=0.0))
    model.fit(_trained(known))
    assert model._model is not None
    fit = model._model
    mean, item = fit.known.mean, float(fit.item_bias[fit.known.item_index["i03"]])
    assert _value(model, "unknown", "i03") == pytest.approx(np.clip(mean + item, 1, 5))
    bias = float(fit.user_bias[fit.known.user_index["u05"]])
    assert _value(model, "u05", "nothing") == pytest.approx(np.clip(mean + bias, 1, 5))
    assert _value(model, "unknown", "nothing") == pytest.approx(mean)
    past = (Event(item_id="i03", rating=1.0), Event(item_id="i04"))
    expected = mean + item + (1.0 - mean - item) / (1 + 5.0)
    assert _value(model, "unknown", "i03", *past) == pytest.approx(np.clip(expected, 1, 5))


@pytest.mark.parametrize("model_class", [UserItemBias, MF, SVD])
def test_recent_errors_are_added_and_fade(model_class: Any) -> None:
    known, _ = _low_rank()
    flat = model_class(model_class.Config(recency=0.0))
    flat.fit(_trained(known))
    model = flat.with_config(model_class.Config(recency=0.5, decay=0.6))
    past = [Event(item_id="i03", rating=2.0), Event(item_id="i07"), Event(item_id="new", rating=4.0)]
    for user in ("u05", "unknown"):
        # The level of an unknown user comes from the same history, so the plain model gets the history too.
        plain = [_value(flat, user, item, *past) for item in ("i03", "new", "i11")]
        errors = [2.0 - plain[0], 4.0 - plain[1]]
        expected = plain[2] + 0.5 * (0.6 * errors[0] + errors[1]) / (0.6 + 1 + 2)
        assert min(plain) > 1.0 and max(plain) < 5.0 and 1.0 < expected < 5.0
        assert _value(model, user, "i11", *past) == pytest.approx(expected)
        assert _value(model, user, "i11") == _value(flat, user, "i11")
        # In reverse order, the other rating is the most recent one.
        assert _value(model, user, "i11", *past[::-1]) < _value(model, user, "i11", *past)
