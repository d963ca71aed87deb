from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl
import pytest

from llmrec.baselines.factors import ALS, BPR
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset
from llmrec.errors import MissingExtra
from llmrec.types import Event, Item, Request
from tests.baselines.trained import all_trained
from tests.facts import Facts, raises

pytest.importorskip("implicit")


def _blocks(seed: int = 0) -> SplitDataset:
    """60 users and 40 items in four blocks; each user has six of the ten items of the own block."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{user:02d}", f"i{user % 4 * 10 + item:02d}")
        for user in range(60)
        for item in rng.choice(10, size=6, replace=False).tolist()
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row")
    items = {f"i{n:02d}": Item(item_id=f"i{n:02d}", title="t") for n in range(40)}
    data = Dataset(name="blocks", noun="things", interactions=frame, items=items)
    return all_trained(data)


def _request(*places: int, user: str = "nobody") -> Request:
    return Request(id="r", user_id=user, history=tuple(Event(item_id=f"i{place:02d}") for place in places))


@pytest.mark.parametrize(
    "model",
    [
        ALS(ALS.Config(factors=4, alpha=10.0)),
        BPR(BPR.Config(factors=8, iterations=200, learning_rate=0.1)),
    ],
)
def test_planted_blocks_are_found_for_users_who_were_never_seen(model: ALS | BPR) -> None:
    model.fit(_blocks())
    scores = model.scores([_request(block * 10, block * 10 + 3) for block in range(4)])
    for block, row in enumerate(scores):
        own = np.zeros(40, dtype=bool)
        own[block * 10 : block * 10 + 10] = True
        assert row[own].min() > row[~own].max()


def test_the_vector_of_als_is_the_least_squares_solution_for_the_history() -> None:
    model = ALS(ALS.Config(factors=8, regularization=0.7, alpha=5.0, user="solve", decay=1.0))
    model.fit(_blocks())
    assert model._model is not None
    vectors = model._model.vectors.astype(np.float64)
    mine = vectors[[2, 7, 15]]
    # Hu et al., equation 4: everything has confidence 1, the history alpha.
    left = vectors.T @ vectors + 4.0 * mine.T @ mine + 0.7 * np.eye(8)
    user = np.linalg.solve(left, 5.0 * mine.sum(axis=0))
    (found,) = model.scores([_request(2, 7, 15)])
    np.testing.assert_allclose(found, vectors @ user, atol=1e-4)


def test_late_events_have_more_confidence_where_the_vector_is_solved_for() -> None:
    model = ALS(ALS.Config(factors=8, regularization=0.7, alpha=5.0, user="solve", decay=0.6))
    model.fit(_blocks())
    assert model._model is not None
    vectors = model._model.vectors.astype(np.float64)
    mine = vectors[[2, 7, 15]]
    confidence = 5.0 * np.array([0.36, 0.6, 1.0])
    left = vectors.T @ vectors + (mine.T * (confidence - 1)) @ mine + 0.7 * np.eye(8)
    user = np.linalg.solve(left, confidence @ mine)
    # An item that comes back is as old as its last event; an unknown one has no age.
    (found,) = model.scores([_request(7, 2, 7, 99, 15)])
    np.testing.assert_allclose(found, vectors @ user, atol=1e-4)


def test_the_mean_of_als_fades_with_the_history() -> None:
    model = ALS(ALS.Config(factors=8, decay=0.5))
    model.fit(_blocks())
    assert model._model is not None
    vectors = model._model.vectors.astype(np.float64)
    user = (0.25 * vectors[2] + 0.5 * vectors[7] + vectors[15]) / 1.75
    found, empty = model.scores([_request(7, 2, 7, 99, 15), _request()])
    np.testing.assert_allclose(found, vectors @ user, atol=1e-5)
    popular = model._model.warm.popular
    assert np.array_equal(np.argsort(empty, kind="stable"), np.argsort(popular, kind="stable"))


@pytest.mark.parametrize("user", ["mean", "solve"])
def test_the_history_and_not_the_user_decides(user: Literal["mean", "solve"]) -> None:
    model = ALS(ALS.Config(factors=8, user=user))
    model.fit(_blocks())
    one, other, moved = model.scores([_request(1, 2, user="u00"), _request(1, 2), _request(11, 12, user="u00")])
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert np.abs(one - moved).max() > 0.1


def test_bpr_weighs_late_events_more() -> None:
    model = BPR(BPR.Config(factors=8, iterations=200, learning_rate=0.1, decay=0.5))
    model.fit(_blocks())
    first, second = model.scores([_request(1, 11), _request(11, 1)])
    assert first[10:20].mean() > first[:10].mean() and second[:10].mean() > second[10:20].mean()
    with pytest.raises(ValueError, match="decay"):
        BPR(BPR.Config(decay=0.0))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_move_als(threads: int) -> None:
    one, more = ALS(ALS.Config(factors=8)), ALS(ALS.Config(factors=8, threads=threads))
    one.fit(_blocks())
    more.fit(_blocks())
    np.testing.assert_allclose(more.scores([_request(1, 2)]), one.scores([_request(1, 2)]), atol=1e-5)


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "implicit"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "implicit", None)
    with raises(MissingExtra, Facts("not-installed", says=("'implicit'", "pip install 'llmrec[baselines]'"))):
        ALS().fit(_blocks())
