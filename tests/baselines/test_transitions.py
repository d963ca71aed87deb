"""Normalised item-to-item transitions, text similarity, and both combined."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmrec.baselines.content import Content
from llmrec.baselines.item_texts import TextsConfig, text_vectors
from llmrec.baselines.transitions import Transitions, TransitionsText, nearest_neighbour_similarities
from llmrec.data.split import SplitDataset
from llmrec.errors import DataError
from tests.baselines.trained import all_trained, make_dataset, request
from tests.facts import Facts, raises

SEQUENCES = {"u1": "abcd", "u2": "abd", "u3": "bca", "u4": "ad"}
# Item e is in no sequence, and its text is similar to that of item a.
TITLES = {
    "a": "red garden hose",
    "b": "wooden toy train",
    "c": "wooden toy boat",
    "d": "steel kitchen knife",
    "e": "green garden hose",
}
ORDER = sorted(TITLES)


def _data(titles: dict[str, str] = TITLES) -> SplitDataset:
    rows = [(user, item, float(position)) for user, items in SEQUENCES.items() for position, item in enumerate(items)]
    return all_trained(make_dataset(rows, "timestamp", titles))


def _scores(model: Any, *histories: str) -> NDArray[np.float64]:
    return np.array(model.scores([request(history) for history in histories]))


def _fitted(model_class: Any, **parameters: Any) -> Any:
    model = model_class(model_class.Config(**parameters))
    model.fit(_data())
    return model


def _by_hand(history: str, config: Any) -> NDArray[np.float64]:
    """Evaluate the formula of the docstring, event by event."""
    index = {item: number for number, item in enumerate(ORDER)}
    steps = np.zeros((len(ORDER), len(ORDER)))
    popular = np.zeros(len(ORDER))
    for items in SEQUENCES.values():
        for second, later in enumerate(items):
            popular[index[later]] += 1
            for first, before in enumerate(items[:second]):
                if (gap := second - first) <= config.reach:
                    steps[index[before], index[later]] += config.fade ** (gap - 1)
    both = steps + config.backward * steps.T
    both = both / ((both.sum(1, keepdims=True) + config.smoothing) ** config.leaving * (popular + 1) ** config.arriving)
    total = np.zeros(len(ORDER))
    for age, item in enumerate(reversed(history[-config.history :])):
        total += config.decay**age * both[index[item]]
    return total


@pytest.mark.parametrize(
    "parameters",
    [
        {"reach": 1, "backward": 0.0, "leaving": 0.0, "arriving": 0.0},
        {"reach": 3, "fade": 0.3, "backward": 0.8, "leaving": 1.0, "arriving": 0.5, "smoothing": 5.0, "history": 2},
    ],
)
def test_scores_equal_the_formula(parameters: dict[str, Any]) -> None:
    model = _fitted(Transitions, **parameters)
    for history in ("d", "ab", "bcad"):
        scores, expected = _scores(model, history)[0], _by_hand(history, model.config)
        assert np.allclose(scores[expected > 0], expected[expected > 0], rtol=1e-5)
        # Items without votes are ordered by popularity, below all items with votes.
        assert scores[expected == 0].max(initial=0.0) < scores[expected > 0].min(initial=np.inf)


def test_item_without_interactions_is_ranked_by_its_text() -> None:
    cold = ORDER.index("e")
    plain, text = _scores(_fitted(Transitions), "a")[0], _scores(_fitted(TransitionsText, text=5.0), "a")[0]
    assert plain[cold] == plain.min() and text[cold] == text.max()
    content = _scores(_fitted(Content, history=1), "a")[0]
    assert content.argsort()[-2:].tolist() == [cold, ORDER.index("a")]


def test_zero_text_weights_equal_transitions() -> None:
    text = _fitted(TransitionsText, text=0.0, onward=0.0)
    assert np.allclose(_scores(text, "ab", "dca"), _scores(_fitted(Transitions), "ab", "dca"))


def test_onward_weight_raises_similar_next_items() -> None:
    # Transitions from b lead to c, d and a; e is similar to a.
    without, onward = (_scores(_fitted(TransitionsText, text=0.0, onward=weight), "b")[0] for weight in (0.0, 1.0))
    assert onward[ORDER.index("e")] > without[ORDER.index("e")] + 0.01


def test_nearest_neighbours() -> None:
    vectors = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    neighbours = nearest_neighbour_similarities(vectors, 2).toarray()
    assert neighbours[0].tolist() == [0.0, 0.8, 0.0, 0.0] and np.allclose(neighbours[2], [0.0, 0.6, 0.0, 0.0])
    assert (np.diag(neighbours) == 0).all() and nearest_neighbour_similarities(vectors[:1], 5).shape == (1, 1)
    # Ties with the last neighbour are added, but not those of many items with the same text.
    same = np.ones((12, 1))
    assert nearest_neighbour_similarities(same, 2).nnz == 12 * 11
    assert nearest_neighbour_similarities(same, 1).nnz == 0


def test_lsa_is_deterministic_and_groups_similar_texts() -> None:
    data = _data()
    one, two = (text_vectors(data, ORDER, TextsConfig()) for _ in range(2))
    assert np.array_equal(one, two) and np.allclose(np.linalg.norm(one[[0, 1, 2, 4]], axis=1), 1)
    cosines = one @ one.T
    assert cosines[0, 4] > 0.9 and cosines[1, 2] > 0.9 and abs(cosines[0, 1]) < 0.1
    with raises(DataError, Facts("missing-value")):
        text_vectors(_data(dict.fromkeys(TITLES, "")), ORDER, TextsConfig())
