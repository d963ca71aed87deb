"""Normalised transitions, what resembles items in text, and both together."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from llmrec.baselines.content import Content
from llmrec.baselines.item_texts import TextsConfig, text_vectors
from llmrec.baselines.transitions import Transitions, TransitionsText, nearest
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset
from llmrec.errors import DataError
from llmrec.types import Event, Item, Request
from tests.baselines.trained import all_trained
from tests.facts import Facts, raises

SEQUENCES = {"u1": "abcd", "u2": "abd", "u3": "bca", "u4": "ad"}
# Item e is in no sequence, and reads like item a.
TITLES = {
    "a": "red garden hose",
    "b": "wooden toy train",
    "c": "wooden toy boat",
    "d": "steel kitchen knife",
    "e": "green garden hose",
}
ORDER = sorted(TITLES)


def _data(titles: dict[str, str] = TITLES) -> SplitDataset:
    rows = [(user, item, float(place)) for user, items in SEQUENCES.items() for place, item in enumerate(items)]
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Float64}
    items = {item: Item(item_id=item, title=title) for item, title in titles.items()}
    data = Dataset(name="toy", noun="things", interactions=pl.DataFrame(rows, schema=schema, orient="row"), items=items)
    return all_trained(data)


def _request(history: str) -> Request:
    return Request(id=history or "none", user_id="asker", history=tuple(Event(item_id=item) for item in history))


def _scores(model: Any, *histories: str) -> NDArray[np.float64]:
    return np.array(model.scores([_request(history) for history in histories]))


def _made(made: Any, **parameters: Any) -> Any:
    model = made(made.Config(**parameters))
    model.fit(_data())
    return model


def _by_hand(history: str, config: Any) -> NDArray[np.float64]:
    """The formula of the docstring, event by event."""
    place = {item: number for number, item in enumerate(ORDER)}
    steps = np.zeros((len(ORDER), len(ORDER)))
    popular = np.zeros(len(ORDER))
    for items in SEQUENCES.values():
        for second, later in enumerate(items):
            popular[place[later]] += 1
            for first, before in enumerate(items[:second]):
                if (gap := second - first) <= config.reach:
                    steps[place[before], place[later]] += config.fade ** (gap - 1)
    both = steps + config.backward * steps.T
    both = both / ((both.sum(1, keepdims=True) + config.smoothing) ** config.leaving * (popular + 1) ** config.arriving)
    total = np.zeros(len(ORDER))
    for age, item in enumerate(reversed(history[-config.history :])):
        total += config.decay**age * both[place[item]]
    return total


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"reach": 1, "backward": 0.0, "leaving": 0.0, "arriving": 0.0},
        {"reach": 3, "fade": 0.3, "backward": 0.8, "leaving": 1.0, "arriving": 0.5, "smoothing": 5.0, "history": 2},
    ],
)
def test_scores_are_those_of_the_formula(parameters: dict[str, Any]) -> None:
    model = _made(Transitions, **parameters)
    for history in ("d", "ab", "bcad"):
        found, expected = _scores(model, history)[0], _by_hand(history, model.config)
        assert np.allclose(found[expected > 0], expected[expected > 0], rtol=1e-5)
        # Popularity orders what has no votes, below everything that has some.
        assert found[expected == 0].max(initial=0.0) < found[expected > 0].min(initial=np.inf)


def test_an_empty_or_unknown_history_is_answered_by_popularity() -> None:
    for made in (Transitions, TransitionsText):
        empty, unknown = _scores(_made(made), "", "z")
        assert np.array_equal(np.argsort(-empty, kind="stable"), np.argsort(-unknown, kind="stable"))
        assert empty.argmax() == ORDER.index("a") and empty[ORDER.index("e")] == empty.min()


@pytest.mark.parametrize("made", [Transitions, TransitionsText, Content])
def test_what_answering_reads_takes_no_fit(made: Any) -> None:
    grid = {name: values for name, values in made.GRID.items() if name in made.AT_ANSWER}
    assert grid == made.GRID
    model = _made(made)
    for name, values in grid.items():
        for value in (values[0], values[-1]):
            other = made.Config(**{name: value})
            assert np.array_equal(
                _scores(model.with_config(other), "ab", "d"), _scores(_made(made, **{name: value}), "ab", "d")
            )
    assert np.array_equal(_scores(model, "ab"), _scores(_made(made), "ab"))


def test_an_item_that_nobody_chose_is_found_by_its_text() -> None:
    cold = ORDER.index("e")
    plain, text = _scores(_made(Transitions), "a")[0], _scores(_made(TransitionsText, text=5.0), "a")[0]
    assert plain[cold] == plain.min() and text[cold] == text.max()
    content = _scores(_made(Content, history=1), "a")[0]
    assert content.argsort()[-2:].tolist() == [cold, ORDER.index("a")]


def test_without_weights_of_text_it_is_transitions() -> None:
    text = _made(TransitionsText, text=0.0, onward=0.0)
    assert np.allclose(_scores(text, "ab", "dca"), _scores(_made(Transitions), "ab", "dca"))


def test_what_resembles_the_items_stepped_to_is_part_of_it() -> None:
    # From b the steps lead to c, d and a; e resembles a.
    without, onward = (_scores(_made(TransitionsText, text=0.0, onward=weight), "b")[0] for weight in (0.0, 1.0))
    assert onward[ORDER.index("e")] > without[ORDER.index("e")] + 0.01


def test_scores_do_not_depend_on_what_else_is_asked_or_how_items_are_called() -> None:
    for made in (Transitions, TransitionsText, Content):
        model = _made(made)
        assert np.array_equal(_scores(model, "ab", "d", "ca")[[0, 2]], _scores(model, "ab", "ca"))


def test_neighbours_are_the_nearest_others() -> None:
    vectors = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    found = nearest(vectors, 2).toarray()
    assert found[0].tolist() == [0.0, 0.8, 0.0, 0.0] and np.allclose(found[2], [0.0, 0.6, 0.0, 0.0])
    assert (np.diag(found) == 0).all() and nearest(vectors[:1], 5).shape == (1, 1)


def test_latent_semantic_analysis_is_repeatable_and_puts_like_texts_together() -> None:
    data = _data()
    one, two = (text_vectors(data, ORDER, TextsConfig()) for _ in range(2))
    assert np.array_equal(one, two) and np.allclose(np.linalg.norm(one[[0, 1, 2, 4]], axis=1), 1)
    likeness = one @ one.T
    assert likeness[0, 4] > 0.9 and likeness[1, 2] > 0.9 and abs(likeness[0, 1]) < 0.1
    with raises(DataError, Facts("missing-value")):
        text_vectors(_data(dict.fromkeys(TITLES, "")), ORDER, TextsConfig())
