"""Item-to-item transitions with a fine-tuned text encoder: pairs and loss by hand, and results for new items."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
from scipy import sparse

from llmrec.baselines.base import Catalogue
from llmrec.baselines.neural import info_nce
from llmrec.baselines.pairs import ItemPairs, TransitionsTuned
from llmrec.baselines.transitions import TransitionCounts, TransitionsText
from llmrec.errors import RecipeError
from tests.baselines.ring import TOPICS, ring
from tests.baselines.trained import request
from tests.encoders import tiny_encoder
from tests.facts import Facts, raises

torch = pytest.importorskip("torch")


def _fitted(**settings: Any) -> TransitionsTuned:
    options = {"encoder": tiny_encoder(), "steps": 20, "batch": 32, "epochs": 2, "patience": None, "quiet": True}
    model = TransitionsTuned(TransitionsTuned.Config(**(options | {"learning_rate": 2e-3} | settings)), seed=3)
    model.fit(ring())
    return model


def _vectors(model: TransitionsTuned) -> dict[str, Any]:
    return dict(zip(model.items, model.state()["vectors"], strict=True))


def test_pairs_are_weighted_and_exclude_known_negatives() -> None:
    # One sequence a, b, c, and one a, b, b.
    gaps = (np.array([[0, 2, 0], [0, 1, 1], [0, 0, 0]]), np.array([[0, 1, 1], [0, 0, 0], [0, 0, 0]]))
    catalogue = Catalogue(ids=("a", "b", "c"), index={"a": 0, "b": 1, "c": 2})
    steps = TransitionCounts(catalogue, tuple(sparse.csr_array(gap) for gap in gaps), np.array([2.0, 3.0, 1.0]))
    pairs = ItemPairs.of(steps, apart=2, nearby=0.5)
    weights = {(int(a), int(b)): float(w) for a, b, w in zip(pairs.first, pairs.then, pairs.weights, strict=True)}
    assert weights == pytest.approx({(0, 1): 2.5 / 4, (0, 2): 0.5 / 4, (1, 2): 1 / 4})
    negatives = pairs.unknown(np.array([0, 1, 0]), np.array([1, 2, 2]))
    assert negatives.tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_loss_equals_a_double_loop() -> None:
    rng = np.random.default_rng(0)
    first, then = (unit / np.linalg.norm(unit, axis=1, keepdims=True) for unit in rng.standard_normal((2, 4, 3)))
    negatives = rng.random((4, 4)) < 0.6
    np.fill_diagonal(negatives, True)
    often = np.log(rng.random(4))
    total = 0.0
    for row in range(4):
        logits = [first[row] @ then[column] / 0.05 - 0.5 * often[column] for column in range(4)]
        total += np.log(sum(np.exp(logits[column]) for column in range(4) if negatives[row, column])) - logits[row]
    similarities = torch.from_numpy(first @ then.T / 0.05 - 0.5 * often)
    assert float(info_nce(similarities, torch.from_numpy(~negatives))) == pytest.approx(total / 4, abs=1e-9)


def test_tuning_moves_texts_of_successive_items_together() -> None:
    before, after = (_vectors(_fitted(learning_rate=rate, apart=1, temperature=0.2)) for rate in (1e-12, 5e-3))

    def nearer(vectors: dict[str, Any], item: int) -> float:
        """Return how much more similar an item is to the next topic than to the opposite topic."""
        return float(
            np.mean(
                [
                    vectors[f"{topic}{item}"]
                    @ (vectors[f"{(topic + 1) % TOPICS}1"] - vectors[f"{(topic + 3) % TOPICS}1"])
                    for topic in range(TOPICS)
                ]
            )
        )

    assert nearer(after, 1) > nearer(before, 1) + 0.1
    # The fifth item of each topic has no interactions.
    assert nearer(after, 4) > nearer(before, 4) + 0.1


def test_encoder_is_restored_without_improvement() -> None:
    worse = ({"excluded": -float(epoch)} for epoch in range(3))
    with mock.patch("llmrec.baselines.pairs.mean_ndcgs", side_effect=worse) as judged:
        model = _fitted(learning_rate=0.5, patience=1)
    assert judged.call_count == 2  # the pretrained encoder and one epoch
    same = {"text": model.config.text, "sharpness": model.config.sharpness}
    fixed = TransitionsText(TransitionsText.Config(encoder=tiny_encoder(), **same))
    fixed.fit(ring())
    requests = [request(["01"])]
    assert model.scores(requests) == pytest.approx(fixed.scores(requests), abs=0.02)
    assert model.looked_at == frozenset(ring().valid["user_id"].to_list())
    assert _fitted(steps=1).looked_at == frozenset()


def test_restored_state_gives_the_same_scores() -> None:
    model, requests = _fitted(steps=2), [request(["01"])]
    other = TransitionsTuned(TransitionsTuned.Config(encoder=tiny_encoder(), patience=None), seed=3)
    other.restore(ring(), model.state())
    assert np.array_equal(other.scores(requests), model.scores(requests))


def test_rejects_encoders_that_cannot_be_tuned() -> None:
    for name in ("lsa", "store:features"):
        with raises(RecipeError, Facts("bad-value", column="encoder", says=f"and {name} is not one")):
            _fitted(encoder=name)
