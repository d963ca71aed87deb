"""Two towers over texts: what they learn of texts holds for items that nobody has chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from llmrec.baselines.towers.tower import Tower, TunedTower
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split
from llmrec.errors import RecipeError
from llmrec.recipe.schema import Split
from llmrec.types import Event, Item, Request
from tests.encoders import tiny_encoder
from tests.facts import Facts, raises

torch = pytest.importorskip("torch")

TOPICS = 6
WORDS = ("anvil", "banjo", "candle", "drum", "engine", "feather")
SETTINGS = {
    "dim": 16,
    "dropout": 0.0,
    "learning_rate": 0.02,
    "batch": 64,
    "epochs": 15,
    "patience": None,
    "quiet": True,
}


def _ring() -> SplitDataset:
    """After an item of one topic comes one of the next; the last item of each topic is in no sequence."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user:03d}", f"{(start + step) % TOPICS}{rng.integers(4)}", float(step))
        for user, start in enumerate(rng.integers(0, TOPICS, 150).tolist())
        for step in range(6)
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    items = {
        f"{topic}{number}": Item(
            item_id=f"{topic}{number}", title=f"{word} {('one', 'two', 'three', 'four', 'one two')[number]}"
        )
        for topic, word in enumerate(WORDS)
        for number in range(5)
    }
    whole = Dataset(name="ring", noun="things", interactions=frame, items=items)
    return split(whole, Split(kind="leave_one_out"), seed=0)


def _fitted(**settings: Any) -> Tower:
    model = Tower(Tower.Config(**(SETTINGS | settings)), seed=3)
    model.fit(_ring())
    return model


def _best(model: Tower, *history: str) -> list[str]:
    events = tuple(Event(item_id=item) for item in history)
    (scores,) = model.scores([Request(id="r", user_id="nobody", history=events)])
    return [model.items[place] for place in np.argsort(-scores, kind="stable")[:5]]


def test_it_learns_which_text_follows_and_ranks_items_that_nobody_chose_by_theirs() -> None:
    model = _fitted()
    for topic in range(TOPICS):
        following = {f"{(topic + 1) % TOPICS}{number}" for number in range(5)}
        assert set(_best(model, f"{topic}2")) == following
        # A history of items that nobody chose is understood too.
        assert set(_best(model, f"{topic}4")) == following


def test_with_shuffled_texts_it_knows_nothing_of_items_that_nobody_chose() -> None:
    order = Tower.Config(shuffled=True).order(30)
    assert sorted(order) == list(range(30)) and all(place != own for place, own in enumerate(order))
    model = _fitted(shuffled=True)
    again = _fitted(shuffled=True)
    right = 0
    for topic in range(TOPICS):
        following = {f"{(topic + 1) % TOPICS}{number}" for number in range(5)}
        right += len(set(_best(model, f"{topic}4")) & following)
        assert _best(model, f"{topic}4") == _best(again, f"{topic}4")
    assert right < 0.6 * 5 * TOPICS


def test_the_last_item_counts_more_than_those_before_it() -> None:
    assert {item[0] for item in _best(_fitted(), "01", "12", "23")} == {"3"}


def test_validation_users_who_choose_the_epoch_are_named() -> None:
    data = _ring()
    assert _fitted().looked_at == frozenset()
    model = Tower(Tower.Config(**(SETTINGS | {"epochs": 2, "patience": 1})))
    model.fit(data)
    assert model.looked_at == frozenset(data.valid["user_id"].to_list())


def test_another_seed_gives_other_maps_and_the_same_seed_the_same() -> None:
    request = [Request(id="r", user_id="nobody", history=(Event(item_id="01"),))]
    one, two = _fitted(epochs=1), _fitted(epochs=1)
    assert np.array_equal(one.scores(request), two.scores(request))
    other = Tower(Tower.Config(**(SETTINGS | {"epochs": 1})), seed=4)
    other.fit(_ring())
    assert not np.array_equal(one.scores(request), other.scores(request))


def test_without_any_text_it_says_the_same_of_all_items() -> None:
    data = _ring()
    bare = {item: Item(item_id=item, title="thing") for item in data.dataset.items}
    blank = Dataset(name="ring", noun="things", interactions=data.dataset.interactions, items=bare)
    model = Tower(Tower.Config(**(SETTINGS | {"epochs": 1})))
    model.fit(split(blank, Split(kind="leave_one_out"), seed=0))
    (scores,) = model.scores([Request(id="r", user_id="nobody", history=(Event(item_id="01"),))])
    assert np.ptp(scores) == 0


def _tuned(**settings: Any) -> TunedTower:
    chosen = SETTINGS | {"encoder": tiny_encoder(), "blocks": 2, "epochs": 3} | settings
    model = TunedTower(TunedTower.Config(**chosen), seed=3)
    model.fit(_ring())
    return model


def _likelihood(model: Tower) -> float:
    """Mean log-probability of the topic that follows, over one item of each."""
    requests = [Request(id="r", user_id="nobody", history=(Event(item_id=f"{topic}1"),)) for topic in range(TOPICS)]
    scores = np.asarray(model.scores(requests), dtype=np.float64)
    chances = np.exp(scores - np.logaddexp.reduce(scores, axis=1)[:, None])
    following = [[item[0] == str((topic + 1) % TOPICS) for item in model.items] for topic in range(TOPICS)]
    return float(np.log((chances * np.array(following)).sum(axis=1)).mean())


@pytest.mark.slow
def test_a_tuned_encoder_fits_better_than_the_maps_over_a_fixed_one() -> None:
    fixed, tuned = (_tuned(dim=3, epochs=10, encoder_rate=rate, map_rate=1e-12) for rate in (1e-12, 1e-4))
    assert _likelihood(tuned) > _likelihood(fixed) + 0.03


def test_an_encoder_that_is_no_better_tuned_is_kept_as_it_was() -> None:
    # So large a step ruins the encoder; the validation split says so.
    model, fixed = (_tuned(encoder_rate=rate, map_rate=1e-12, epochs=2, patience=1) for rate in (0.5, 1e-12))
    request = [Request(id="r", user_id="nobody", history=(Event(item_id="01"),))]
    assert np.abs(model.scores(request) - fixed.scores(request)).max() < 0.01


def test_what_cannot_be_tuned_is_refused() -> None:
    with raises(RecipeError, Facts("bad-value", column="encoder", says="lsa is no pretrained model")):
        _tuned(encoder="lsa")
