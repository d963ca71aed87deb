"""UniSRec: its parts by hand, and transfer to new items and another domain."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file, save_file

from llmrec.baselines.neural import SequenceBatch
from llmrec.data.dataset import Dataset
from llmrec.data.features import Features, Provenance, publish
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.errors import DataError, ModelError, RecipeError
from llmrec.recipe.schema import Split
from llmrec.systems.unisrec.baseline import UniSRec
from llmrec.systems.unisrec.network import (
    DropWords,
    augment_sequences,
    contrastive_loss,
    create_network,
    gate_weights,
    mix_whitenings,
)
from llmrec.types import Event, Item, Request
from tests.encoders import tiny_encoder
from tests.facts import Facts, raises

torch = pytest.importorskip("torch")

TOPICS = 5
WORDS = ("anvil", "banjo", "candle", "drum", "engine")
CARD = "unisrec.json"
SMALL: dict[str, Any] = {
    "dim": 16,
    "layers": 1,
    "experts": 3,
    "max_len": 8,
    "batch": 64,
    "patience": None,
    "quiet": True,
}


@cache
def _ring(name: str = "ring", *, new: int = 0, shift: int = 1) -> SplitDataset:
    """Return sequences in which an item of the next topic follows; the last items of a topic are in none."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user:03d}", f"{(start + shift * step) % TOPICS}{rng.integers(4)}", float(step))
        for user, start in enumerate(rng.integers(0, TOPICS, 120).tolist())
        for step in range(6)
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    kinds = ("one", "two", "three", "four", "one two", *("two three", "one four")[:new])
    items = {
        f"{topic}{number}": Item(item_id=f"{topic}{number}", title=f"{word} {kind}")
        for topic, word in enumerate(WORDS)
        for number, kind in enumerate(kinds)
    }
    dataset = Dataset(name=name, noun="things", interactions=frame, items=items)
    return split_dataset(dataset, Split(kind="leave_one_out"), seed=0)


def _model(**settings: Any) -> UniSRec:
    return UniSRec(UniSRec.Config(**(SMALL | settings)), seed=3)


def _fitted(data: SplitDataset | None = None, **settings: Any) -> UniSRec:
    model = _model(**settings)
    model.fit(data or _ring())
    return model


def _requests(*history: str) -> list[Request]:
    return [Request(id="r", user_id="unknown", history=tuple(Event(item_id=item) for item in history))]


def _best(model: UniSRec, *history: str, k: int = 5) -> list[str]:
    (scores,) = model.scores(_requests(*history))
    return [model.items[n] for n in np.argsort(-scores, kind="stable")[:k]]


def _drawn(experts: int = 3, width: int = 7, **settings: Any) -> Any:
    network = create_network(width, 0, UniSRec.Config(**(SMALL | {"experts": experts} | settings)))
    with torch.no_grad():
        for parameter in network["adaptor"].values():
            parameter.normal_()
    return network


@pytest.mark.slow
def test_features_replace_texts(tmp_path: Path) -> None:
    data = _ring()
    names = sorted(data.dataset.items)
    topics = np.eye(TOPICS, dtype=np.float32)[[int(name[0]) for name in names]]
    publish(tmp_path / "facts", [Features("item", names, topics, Provenance(system="facts"))])
    model = _fitted(data, encoder=f"store:{tmp_path / 'facts'}", ids=True, epochs=20, learning_rate=0.01, dropout=0.0)
    # Only the features give the topic of the last item, which is in no sequence.
    assert sum(name[0] == "3" for name in _best(model, "24")) >= 4


def test_adaptor_is_a_mixture_of_whitenings() -> None:
    network, vectors = _drawn().eval(), torch.randn(11, 7)
    adaptor = network["adaptor"]
    gates = torch.softmax(vectors @ adaptor["gate"], dim=1)
    by_hand = sum(gates[:, [k]] * ((vectors - adaptor["shifts"][k]) @ adaptor["maps"][k]) for k in range(3))
    torch.testing.assert_close(mix_whitenings(network, vectors, 0.5), by_hand, rtol=1e-4, atol=1e-4)
    # A shift by the mean centres the output of one whitening.
    alone = _drawn(experts=1).eval()
    with torch.no_grad():
        alone["adaptor"]["shifts"][0] = vectors.mean(dim=0)
    torch.testing.assert_close(mix_whitenings(alone, vectors, 0.5).mean(dim=0), torch.zeros(16), rtol=0, atol=1e-4)


def test_gates_are_noisy_only_in_training() -> None:
    network, vectors = _drawn(), torch.randn(11, 7)
    for training in (True, False):
        network.train(training)
        one, other = gate_weights(network, vectors), gate_weights(network, vectors)
        torch.testing.assert_close(one.sum(dim=1), torch.ones(11))
        assert torch.equal(one, other) != training
    untaught = create_network(7, 0, UniSRec.Config(**SMALL)).eval()
    torch.testing.assert_close(gate_weights(untaught, vectors), torch.full((11, 3), 1 / 3))


def test_contrastive_loss() -> None:
    nothing, numbers = torch.zeros(32, 5), torch.arange(32)
    assert float(contrastive_loss(nothing, nothing, numbers, 0.07)) == pytest.approx(math.log(32))
    # Rows with the same target are not negatives of each other: of 32 rows, 16 or 18 are left.
    assert float(contrastive_loss(nothing, nothing, numbers // 17 * 100, 0.07)) == pytest.approx(
        (17 * math.log(16) + 15 * math.log(18)) / 32
    )
    left, right = torch.randn(4, 3), torch.randn(4, 3)
    logits = (left @ right.T / 0.5).numpy()
    by_hand = np.mean([np.log(np.exp(row).sum()) - row[n] for n, row in enumerate(logits)])
    assert float(contrastive_loss(left, right, torch.arange(4), 0.5)) == pytest.approx(by_hand, rel=1e-5)


def test_changed_sequences_are_subsets() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 300)
    items, targets = np.zeros((300, 8), np.int64), np.full((300, 8), -1)
    for row, length in enumerate(lengths.tolist()):
        items[row, :length], targets[row, :length] = np.arange(length) + 10 * row + 1, 1
    changed, ends = augment_sequences(SequenceBatch(items, targets), 0.5, 5000, rng)
    worded = changed[:, 0] >= 5000
    assert 0.3 < worded.mean() < 0.7
    for row, length in enumerate(lengths.tolist()):
        new, before = changed[row, : ends[row] + 1], items[row, :length]
        assert len(new) >= 1 and not changed[row, ends[row] + 1 :].any()
        if worded[row]:
            assert (new - 5000).tolist() == before.tolist()
        else:
            assert new.tolist() == [item for item in before if item in set(new.tolist())]
    assert 0.4 < (ends[~worded] + 1).sum() / lengths[~worded].sum() < 0.65
    same, _ = augment_sequences(SequenceBatch(items, targets), 0.0, 0, rng)
    assert (same == items).all()


def test_words_are_dropped_but_not_all() -> None:
    fewer, text = DropWords(0.5, 0), " ".join(f"w{n}" for n in range(200))
    kept = fewer(text).split()
    assert 70 < len(kept) < 130 and kept == [word for word in text.split() if word in set(kept)]
    assert all(fewer("word") == "word" for _ in range(20))


@pytest.fixture(scope="module")
def taught() -> UniSRec:
    return _fitted(encoder=tiny_encoder(), epochs=30, learning_rate=0.01, dropout=0.0)


@pytest.fixture(scope="module")
def plain() -> UniSRec:
    return _fitted(epochs=1)


def test_learns_which_text_follows_and_ranks_unseen_items() -> None:
    model = _fitted(epochs=20, learning_rate=0.01, dropout=0.0)
    for topic in range(TOPICS):
        following = {f"{(topic + 1) % TOPICS}{number}" for number in range(5)}
        # The fifth item of a topic is in no sequence, as a target or as a history.
        assert len(set(_best(model, f"{topic}2")) & following) >= 4
        assert len(set(_best(model, f"{topic}4")) & following) >= 4


def test_inductive_model_has_no_parameters_of_items(taught: UniSRec, plain: UniSRec) -> None:
    models = (plain, _fitted(_ring(new=2), epochs=1))
    shapes = [{name: value.shape for name, value in model._fitted.network.state_dict().items()} for model in models]
    widths = [model._fitted.vectors.shape[1] for model in models]
    assert {name: shape for name, shape in shapes[0].items() if widths[0] not in shape} == {
        name: shape for name, shape in shapes[1].items() if widths[1] not in shape
    }
    assert "table" not in taught._fitted.network
    with_ids = _fitted(epochs=1, ids=True)
    assert with_ids._fitted.network["table"].weight.shape == (TOPICS * 4, 16)
    assert np.isfinite(with_ids.scores(_requests("02", "04"))).all()


def test_padding_and_batch_do_not_matter(taught: UniSRec) -> None:
    model = taught._fitted
    model.network.eval()
    short, long = torch.from_numpy(np.array([[1, 2, 0, 0]])), torch.from_numpy(np.array([[1, 2, 9, 4]]))
    with torch.no_grad():
        one, other = (model.encoded(model.table[items])[0, :2] for items in (short, long))
    torch.testing.assert_close(one, other)
    requests = [*_requests("01", "12"), *_requests("34"), *_requests()]
    together = taught.scores(requests)
    for row, request in enumerate(requests):
        np.testing.assert_allclose(taught.scores([request])[0], together[row], rtol=1e-5, atol=1e-5)
    # Cosines by the temperature.
    assert np.abs(together[:2]).max() <= 1 / 0.07 + 1e-4


def test_items_are_added_without_training(taught: UniSRec, plain: UniSRec) -> None:
    more = taught.extended(_ring(new=2))
    assert len(more.items) == len(taught.items) + 2 * TOPICS
    before = dict(zip(taught.items, taught.scores(_requests("02"))[0].tolist(), strict=True))
    after = dict(zip(more.items, more.scores(_requests("02"))[0].tolist(), strict=True))
    assert {name: after[name] for name in before} == pytest.approx(before, abs=1e-4)
    # An item of the following topic ranks above the others that are new.
    fresh = [name for name in _best(more, "02", k=len(more.items)) if name not in before]
    assert fresh[0][0] == "1" and len(fresh) == 2 * TOPICS
    with raises(RecipeError, Facts("unsupported", column="encoder")):
        plain.extended(_ring(new=1))


def test_pretraining_transfers_to_another_domain(tmp_path: Path) -> None:
    source, target = _ring("source", new=2), _ring("target")
    settings = {"encoder": tiny_encoder(), "learning_rate": 0.01, "dropout": 0.0}
    teacher = _model(**settings, pretrain=40)
    teacher.pretrained(source)
    assert sum(name[0] == "2" for name in _best(teacher, "12")) >= 3
    teacher.save(tmp_path / "start", source)
    card = json.loads((tmp_path / "start" / CARD).read_text())
    assert card["data"] == "source" and card["dim"] == 16

    settings |= {"start": str(tmp_path / "start")}
    # With one epoch, epoch 0 is chosen.
    started = _model(**settings, epochs=1)
    started.fit(target)
    assert sum(name[0] == "2" for name in _best(started, "12")) >= 3
    one, other = (model._fitted.network.state_dict() for model in (teacher, started))
    same = {name for name in one if torch.equal(one[name], other[name])}
    # The sequence encoder is frozen, and the adaptor learns.
    assert {name for name in one if not name.startswith("adaptor")} <= same and "adaptor.maps" not in same


def test_rejects_other_weights(plain: UniSRec, tmp_path: Path) -> None:
    data, folder = _ring(), tmp_path / "start"
    model = _model(encoder=tiny_encoder())
    model.pretrained(data)
    model.save(folder, data)
    settings: dict[str, Any] = {"encoder": tiny_encoder(), "start": str(folder), "epochs": 1}
    with raises(ModelError, Facts("mismatch", column="dim", says="dim=16")):
        _fitted(**settings, dim=32)
    # The same shape, other weights.
    shutil.copytree(tiny_encoder(), tmp_path / "encoder")
    tensors = load_file(tmp_path / "encoder" / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, tmp_path / "encoder" / "model.safetensors")
    with raises(ModelError, Facts("mismatch", column="stamp")):
        _fitted(**(settings | {"encoder": str(tmp_path / "encoder")}))
    less = replace(data, train=data.train[:-1])
    with raises(DataError, Facts("leak", column="start")):
        _fitted(less, **settings)
    with pytest.raises(ValueError, match="name a text encoder"):
        UniSRec.Config(start=str(folder))
    with raises(RecipeError, Facts("unsupported", column="encoder")):
        plain.save(tmp_path / "lsa", data)
    (folder / CARD).write_text((folder / CARD).read_text().replace('"dim": 16', '"dim": 32'))
    with raises(ModelError, Facts("damaged")):
        _fitted(**settings)
    with raises(ModelError, Facts("damaged")):
        _fitted(**(settings | {"start": str(tmp_path / "nothing")}))
