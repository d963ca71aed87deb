"""Retrieval heads on a tiny language model: loss, masking, caching and unseen items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrec.baselines.base import Catalogue, InteractionLog
from llmrec.errors import ModelError, RecipeError
from llmrec.models.load import BUNDLE_FILE, load_model
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


@pytest.fixture(scope="module")
def model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StateTower:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMREC_CACHE", str(tmp_path_factory.mktemp("cache")))
        return fitted(folder)


def request(*items: str, **more: Any) -> Request:
    return Request(id="r", user_id="unknown", history=tuple(Event(item_id=item) for item in items), **more)


def test_training_items_of_the_user_are_no_negatives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrec.systems.m6 import states

    masks = list[Any]()
    loss = states.info_nce
    monkeypatch.setattr(states, "info_nce", lambda logits, has: (masks.append(has), loss(logits, has))[1])
    model, data = fitted(folder, epochs=1, batch=10_000), ring()
    catalogue = Catalogue.of(data)
    events = InteractionLog.of(data, catalogue)
    item_sets = [set(events.items[events.users == user].tolist()) for user in range(events.user_count)]
    # The order of the only batch.
    order = np.random.default_rng(3).permutation(len(model._row_users))
    (has,) = masks
    histories = np.split(events.items, 4 * np.arange(1, len(item_sets)))
    targets = [int(items[at]) for items in histories for at in range(1, 4)]
    for row, number in enumerate(order[:40].tolist()):
        items = item_sets[model._row_users[number]]
        assert has[row].tolist() == [targets[other] in items for other in order.tolist()]


def test_one_pass_has_the_states_of_every_prefix(model: StateTower) -> None:
    rows = [["anvil one", "banjo two", "drum"], ["candle", "anvil one"]]
    states_of = model.reader.after("Things:", rows, most=32)
    for row, states in zip(rows, states_of, strict=True):
        for at, state in enumerate(states, start=1):
            (expected,) = model.reader.last("Things:", [row[:at]], most=32)
            assert np.abs(state - expected).max() < 1e-4 * np.abs(expected).max()
    # The second call reads them from the cache.
    before = model.reader.read
    again = model.reader.after("Things:", rows, most=32)
    assert model.reader.read == before
    assert all(np.array_equal(one, other) for one, other in zip(states_of, again, strict=True))


def test_states_of_the_first_layers(folder: Path) -> None:
    model = fitted(folder, epochs=1, layers=1)
    (result,) = model.reader.last("Things:", [["anvil one"]], most=32)
    decoder = load_model(str(folder), ModelSection(name=str(folder), dtype="float32")).get_decoder()
    ids = torch.tensor([[*model.reader.ids("Things:"), *model.reader.ids("anvil one")]])
    with torch.no_grad():
        # The state after the first layer and the final norm.
        expected = decoder.norm(decoder(input_ids=ids, output_hidden_states=True).hidden_states[1])[0, -1]
    assert np.abs(result - expected.numpy()).max() < 1e-4


def test_remembered_states_equal_new_ones(model: StateTower) -> None:
    histories = [np.array([3, 8, 1]), np.array([], dtype=np.int64), np.array([7])]
    fresh, before = model.states(histories), model.reader.read
    assert np.array_equal(model.states(histories), fresh) and model.reader.read == before
    model.reader._known.clear()
    assert np.array_equal(model.states(histories), fresh) and model.reader.read > before
    assert not fresh[1].any()


def test_learns_what_follows_and_ranks_unseen_items(model: StateTower) -> None:
    right = 0
    for topic in range(TOPICS):
        (scores,) = model.scores([request(f"{(topic - 1) % TOPICS}1", f"{topic}2")])
        best = {model.items[n] for n in np.argsort(-scores, kind="stable")[:5]}
        # The fifth item of each topic is in no sequence.
        right += len(best & {f"{(topic + 1) % TOPICS}{number}" for number in range(5)})
    assert right > 0.8 * 5 * TOPICS
    (answer,) = model.answer([request("01", candidates=("14", "34", "11"))])
    assert isinstance(answer, Ranking) and set(answer.items) == {"14", "34", "11"} and answer.items[2] == "34"


def test_scores_are_exact_products(model: StateTower) -> None:
    towers = model._fitted
    with torch.no_grad():
        items, user = towers.item_vectors(towers.vectors), towers.query([np.array([5, 9])])
    assert items.shape == (30, 16) and torch.allclose(items.norm(dim=1), torch.ones(30), atol=1e-5)
    assert float(user.norm()) == pytest.approx(1 / 0.07, rel=1e-5)
    (scores,) = model.scores([request(model.items[5], model.items[9])])
    by_loop = [float((user[0] * item).sum()) for item in items]
    assert scores == pytest.approx(by_loop, abs=1e-4)


def test_restored_fit_gives_same_scores(model: StateTower) -> None:
    requests = [request("01", "12"), request()]
    other = StateTower(model.config, seed=3)
    other.restore(ring(), model.state())
    assert np.allclose(other.scores(requests), model.scores(requests), atol=1e-5)


def test_rejects_other_models(model: StateTower, folder: Path, tmp_path: Path) -> None:
    tuned = make_model(tmp_path / "tuned")
    (tuned / BUNDLE_FILE).write_text("{}", encoding="utf-8")
    with raises(ModelError, Facts("leak", column="encoder")):
        fitted(tuned)
    with raises(RecipeError, Facts("bad-value", column="encoder", says="use the baseline transitions-text")):
        fitted("lsa")
    with raises(ModelError, Facts("bad-value", column="layers", says="the 2 layers")):
        fitted(folder, layers=3)
    with raises(ModelError, Facts("too-large", column="max_len", says="lower max_len")):
        model.reader.after("x", [["anvil"] * 4096], most=2)
