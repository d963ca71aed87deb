from __future__ import annotations

import numpy as np
import pytest

from llmrec.baselines.factors import ALS, BPR
from llmrec.data.split import SplitDataset
from llmrec.types import Request
from tests.baselines.trained import all_trained, make_dataset, request

pytest.importorskip("implicit")


def _blocks(seed: int = 0) -> SplitDataset:
    """60 users and 40 items in four blocks; each user has six of the ten items of one block."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{user:02d}", f"i{user % 4 * 10 + item:02d}")
        for user in range(60)
        for item in rng.choice(10, size=6, replace=False).tolist()
    ]
    return all_trained(make_dataset(rows, "", [f"i{n:02d}" for n in range(40)]))


def _request(*items: int, user: str = "unknown") -> Request:
    return request([f"i{item:02d}" for item in items], user=user)


@pytest.mark.parametrize(
    "model", [ALS(ALS.Config(factors=4, alpha=10.0)), BPR(BPR.Config(factors=8, iterations=200, learning_rate=0.1))]
)
def test_planted_blocks_are_found_for_unknown_users(model: ALS | BPR) -> None:
    model.fit(_blocks())
    scores = model.scores([_request(block * 10, block * 10 + 3) for block in range(4)])
    for block, row in enumerate(scores):
        inside = np.zeros(40, dtype=bool)
        inside[block * 10 : block * 10 + 10] = True
        assert row[inside].min() > row[~inside].max()


def test_als_solves_least_squares_with_decayed_confidence() -> None:
    model = ALS(ALS.Config(factors=8, regularization=0.7, alpha=5.0, user="solve", decay=0.6))
    model.fit(_blocks())
    assert model._model is not None
    vectors = model._model.vectors.astype(np.float64)
    history_vectors = vectors[[2, 7, 15]]
    confidence = 5.0 * np.array([0.36, 0.6, 1.0])
    # Hu et al., equation 4: everything has confidence 1, the history alpha.
    matrix = vectors.T @ vectors + (history_vectors.T * (confidence - 1)) @ history_vectors + 0.7 * np.eye(8)
    user = np.linalg.solve(matrix, confidence @ history_vectors)
    # A repeated item has the age of its last event; an unknown one has no age.
    (scores,) = model.scores([_request(7, 2, 7, 99, 15, user="u00")])
    np.testing.assert_allclose(scores, vectors @ user, atol=1e-4)


def test_als_mean_decays_with_the_history() -> None:
    model = ALS(ALS.Config(factors=8, decay=0.5))
    model.fit(_blocks())
    assert model._model is not None
    vectors = model._model.vectors.astype(np.float64)
    user = (0.25 * vectors[2] + 0.5 * vectors[7] + vectors[15]) / 1.75
    scores, empty = model.scores([_request(7, 2, 7, 99, 15, user="u00"), _request()])
    np.testing.assert_allclose(scores, vectors @ user, atol=1e-5)
    popular = model._model.warm.popular
    assert np.array_equal(np.argsort(empty, kind="stable"), np.argsort(popular, kind="stable"))


def test_bpr_weights_recent_events_more() -> None:
    model = BPR(BPR.Config(factors=8, iterations=200, learning_rate=0.1, decay=0.5))
    model.fit(_blocks())
    first, second = model.scores([_request(1, 11), _request(11, 1)])
    assert first[10:20].mean() > first[:10].mean() and second[:10].mean() > second[10:20].mean()


def test_threads_do_not_change_als() -> None:
    one, more = ALS(ALS.Config(factors=8)), ALS(ALS.Config(factors=8, threads=2))
    one.fit(_blocks())
    more.fit(_blocks())
    np.testing.assert_allclose(more.scores([_request(1, 2)]), one.scores([_request(1, 2)]), atol=1e-5)
