"""Retrieval heads on a tiny language model: the loss, what is masked, what is read once, and unseen items."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrec.baselines.base import Catalogue, Log
from llmrec.baselines.neural import info_nce
from llmrec.errors import ModelError, RecipeError
from llmrec.models.load import BUNDLE, load_model
from llmrec.recipe.schema import ModelSection
from llmrec.systems.m6.states import StateTower
from llmrec.types import Event, Ranking, Request
from tests.baselines.ring import TOPICS, ring
from tests.conftest import make_model
from tests.facts import Facts, raises

torch = pytest.importorskip("torch")

SETTINGS = {
    "dim": 16,
    "dropout": 0.0,
    "learning_rate": 0.02,
    "batch": 128,
    "epochs": 15,
    "patience": None,
    "quiet": True,
    "precision": "float32",
    "max_len": 6,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("decoder"), seed=3)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))


def fitted(folder: Path | str, **settings: Any) -> StateTower:
    model = StateTower(StateTower.Config(**(SETTINGS | {"encoder": str(folder)} | settings)), seed=3)
    model.fit(ring())
    return model


def request(*items: str, **more: Any) -> Request:
    return Request(id="r", user_id="nobody", history=tuple(Event(item_id=item) for item in items), **more)


def test_the_loss_of_heads_that_say_nothing_is_the_logarithm_of_the_batch() -> None:
    none = torch.zeros((8, 8))
    assert float(info_nce(none, torch.zeros((8, 8), dtype=torch.bool))) == pytest.approx(math.log(8))
    # What a user has is no negative, and the own target is never left out.
    assert float(info_nce(none, torch.ones((8, 8), dtype=torch.bool))) == pytest.approx(0)


def test_masked_loss_and_offset_are_those_of_a_double_loop() -> None:
    rng = np.random.default_rng(0)
    logits, has, offset = rng.normal(size=(6, 6)), rng.random((6, 6)) < 0.3, rng.normal(size=6)
    losses = []
    for user in range(6):
        below = sum(
            math.exp(logits[user, other] - offset[other]) for other in range(6) if other == user or not has[user, other]
        )
        losses.append(-math.log(math.exp(logits[user, user] - offset[user]) / below))
    found = info_nce(torch.from_numpy(logits - offset), torch.from_numpy(has))
    assert float(found) == pytest.approx(np.mean(losses))


def test_what_counts_as_a_false_negative_is_what_the_user_has_in_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmrec.systems.m6 import states

    seen = list[Any]()
    loss = states.info_nce
    monkeypatch.setattr(states, "info_nce", lambda logits, has: (seen.append(has), loss(logits, has))[1])
    model, data = fitted(folder, epochs=1, batch=10_000), ring()
    catalogue = Catalogue.of(data)
    events = Log.of(data, catalogue)
    own = [set(events.items[events.users == user].tolist()) for user in range(events.user_count)]
    # The order of the only batch.
    order = np.random.default_rng(3).permutation(len(model._row_users))
    (has,) = seen
    targets = [int(items[at]) for items in np.split(events.items, 4 * np.arange(1, len(own))) for at in range(1, 4)]
    for row, place in enumerate(order[:40].tolist()):
        user = own[model._row_users[place]]
        assert has[row].tolist() == [targets[other] in user for other in order.tolist()]


def test_one_pass_over_a_history_has_the_states_of_all_that_end_in_it(folder: Path) -> None:
    model = fitted(folder, epochs=1)
    rows = [["anvil one", "banjo two", "drum"], ["candle", "anvil one"]]
    whole = model.reader.after("Things:", rows, most=32)
    for row, states in zip(rows, whole, strict=True):
        for at, state in enumerate(states, start=1):
            (fresh,) = model.reader.last("Things:", [row[:at]], most=32)
            assert np.abs(state - fresh).max() < 1e-4 * np.abs(fresh).max()
    # From the cache folder they are the same, and nothing is read.
    before = model.reader.read
    again = model.reader.after("Things:", rows, most=32)
    assert model.reader.read == before
    assert all(np.array_equal(one, other) for one, other in zip(whole, again, strict=True))


def test_the_states_of_the_first_layers_are_those_of_a_model_that_is_cut_there(folder: Path) -> None:
    model = fitted(folder, epochs=1, layers=1)
    (found,) = model.reader.last("Things:", [["anvil one"]], most=32)
    whole = load_model(str(folder), ModelSection(name=str(folder), dtype="float32")).get_decoder()
    ids = torch.tensor([[*model.reader.ids("Things:"), *model.reader.ids("anvil one")]])
    with torch.no_grad():
        # The state behind the first layer, through the final norm.
        expected = whole.norm(whole(input_ids=ids, output_hidden_states=True).hidden_states[1])[0, -1]
    assert np.abs(found - expected.numpy()).max() < 1e-4


def test_what_is_remembered_of_histories_is_what_is_read_afresh(folder: Path) -> None:
    model = fitted(folder, epochs=1)
    histories = [np.array([3, 8, 1]), np.array([], dtype=np.int64), np.array([7])]
    fresh, before = model.states(histories), model.reader.read
    assert np.array_equal(model.states(histories), fresh) and model.reader.read == before
    model.reader._known.clear()
    assert np.array_equal(model.states(histories), fresh) and model.reader.read > before
    assert not fresh[1].any()


def test_it_learns_what_follows_and_ranks_items_that_nobody_chose(folder: Path) -> None:
    model, right = fitted(folder), 0
    for topic in range(TOPICS):
        (scores,) = model.scores([request(f"{(topic - 1) % TOPICS}1", f"{topic}2")])
        best = {model.items[place] for place in np.argsort(-scores, kind="stable")[:5]}
        # The fifth item of each topic is in no sequence.
        right += len(best & {f"{(topic + 1) % TOPICS}{number}" for number in range(5)})
    assert right > 0.8 * 5 * TOPICS
    (answer,) = model.answer([request("01", candidates=("14", "34", "11"))])
    assert isinstance(answer, Ranking) and set(answer.items) == {"14", "34", "11"} and answer.items[2] == "34"


def test_neighbours_are_exact_and_of_the_length_that_was_asked(folder: Path) -> None:
    model = fitted(folder, epochs=2)
    towers = model._fitted
    with torch.no_grad():
        items, user = towers.item_vectors(towers.vectors), towers.query([np.array([5, 9])])
    assert items.shape == (30, 16) and torch.allclose(items.norm(dim=1), torch.ones(30), atol=1e-5)
    assert float(user.norm()) == pytest.approx(1 / 0.07, rel=1e-5)
    (scores,) = model.scores([request(model.items[5], model.items[9])])
    by_loop = [float((user[0] * item).sum()) for item in items]
    assert scores == pytest.approx(by_loop, abs=1e-4)


def test_what_is_stored_of_a_fit_answers_as_it_did(folder: Path) -> None:
    model, asked = fitted(folder, epochs=2), [request("01", "12"), request()]
    other = StateTower(model.config, seed=3)
    other.restore(ring(), model.state())
    assert np.allclose(other.scores(asked), model.scores(asked), atol=1e-5)


def test_models_that_cannot_be_read_so_are_refused(folder: Path, tmp_path: Path) -> None:
    tuned = make_model(tmp_path / "tuned")
    (tuned / BUNDLE).write_text("{}", encoding="utf-8")
    with raises(ModelError, Facts("leak", column="encoder")):
        fitted(tuned)
    with raises(RecipeError, Facts("bad-value", column="encoder", says="use the baseline transitions-text")):
        fitted("lsa")
    with raises(ModelError, Facts("bad-value", column="layers", says="the 2 layers")):
        fitted(folder, layers=3)
    with raises(ModelError, Facts("too-large", column="max_len", says="lower max_len")):
        fitted(folder, epochs=1).reader.after("x", [["anvil"] * 4096], most=2)
