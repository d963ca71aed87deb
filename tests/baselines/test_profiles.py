"""Features of users as the first token of a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrec.baselines.base import InteractionLog
from llmrec.baselines.gru4rec import GRU4Rec
from llmrec.baselines.neural import training_segments
from llmrec.baselines.sasrec import SASRec
from llmrec.data.features import Features, Pair, Provenance, publish
from llmrec.data.split import SplitDataset
from llmrec.errors import DataError
from llmrec.types import Event, Request
from tests.baselines.trained import all_trained, make_dataset
from tests.facts import Facts, raises

pytest.importorskip("torch")
MODELS = (SASRec, GRU4Rec)
USERS, FIRST = 160, 8
QUICK: dict[str, Any] = {"dim": 16, "dropout": 0.0, "learning_rate": 0.01, "batch": 64, "epochs": 30, "quiet": True}


def _data() -> SplitDataset:
    """Users with a random item, followed by A or B, which only the users' features predict."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        rows += [(f"u{user:03d}", f"i{rng.integers(FIRST)}", 0.0), (f"u{user:03d}", "AB"[user % 2], 1.0)]
    return all_trained(make_dataset(rows, "timestamp", [*(f"i{n}" for n in range(FIRST)), "A", "B"]))


def _store(folder: Path, *, split: str = "", seen: Mapping[str, frozenset[Pair]] | None = None) -> str:
    """Features of the users of `_data` and of the same number of other users."""
    names = [*(f"u{n:03d}" for n in range(USERS)), *(f"v{n:03d}" for n in range(USERS))]
    kinds = np.array([n % 2 for n in range(USERS)] * 2)
    vectors = np.stack([kinds * 2.0 - 1, np.random.default_rng(1).normal(size=len(names))], axis=1)
    publish(folder, [Features("user", names, vectors, Provenance(system="planted", split=split), seen=seen or {})])
    return str(folder)


def _right(model: Any) -> float:
    """Return the share of users without training interactions for whom A and B are in the right order."""
    requests = [Request(id="r", user_id=f"v{n:03d}", history=(Event(item_id=f"i{n % FIRST}"),)) for n in range(USERS)]
    items = list(model._fitted.items)
    scores = model.scores(requests)[:, [items.index("A"), items.index("B")]]
    return float(np.mean(scores.argmax(axis=1) == np.arange(USERS) % 2))


@pytest.mark.parametrize("model_class", MODELS)
def test_features_help_unless_shuffled(model_class: Any, tmp_path: Path) -> None:
    folder, right = _store(tmp_path / "store"), {}
    for shuffled in (False, True):
        model = model_class(model_class.Config(**QUICK, patience=None, features=folder, shuffled=shuffled))
        model.fit(_data())
        right[shuffled] = _right(model)
    assert right[False] > 0.95 and right[True] < 0.75


@pytest.mark.parametrize("model_class", MODELS)
def test_restored_state_gives_the_same_scores(model_class: Any, tmp_path: Path) -> None:
    settings = model_class.Config(**{**QUICK, "epochs": 2}, patience=None, features=_store(tmp_path / "store"))
    first, second = model_class(settings), model_class(settings)
    first.fit(_data())
    second.restore(_data(), first.state())
    histories = [(), (Event(item_id="i1"),), tuple(Event(item_id=f"i{n % FIRST}") for n in range(70))]
    requests = [Request(id="r", user_id=user, history=past) for user in ("v001", "unknown") for past in histories]
    assert np.array_equal(first.scores(requests), second.scores(requests))
    # Without a history the features decide; an unknown user gets their mean.
    assert not np.array_equal(first.scores(requests[:1]), first.scores(requests[3:4]))


@pytest.mark.parametrize("longest", [1, 5])
def test_each_piece_starts_with_its_user(longest: int) -> None:
    sizes = [1, 3, 7]
    items = np.arange(sum(sizes), dtype=np.int32)
    users = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    pieces = training_segments(
        InteractionLog(users, items, np.zeros(len(items)), len(sizes)), longest, np.array([100, 101, 102])
    )
    assert all(100 <= piece[0] < 103 and (piece[1:] < 100).all() and len(piece) <= longest + 2 for piece in pieces)
    assert {int(item) for piece in pieces for item in piece[1:]} == set(items.tolist())
    assert all((users[piece[1:]] == piece[0] - 100).all() for piece in pieces)


def test_rejects_features_that_leak_or_do_not_fit(tmp_path: Path) -> None:
    data = _data()
    leaking = _store(tmp_path / "leaking", seen={"u000": frozenset({("u000", "A")})})
    with raises(DataError, Facts("leak", file=leaking, says=("'u000'", "'A'", "data.split.kind=prefix"))):
        SASRec(SASRec.Config(features=leaking)).fit(data)
    other = _store(tmp_path / "other", split="another")
    with raises(DataError, Facts("mismatch", file=other)):
        SASRec(SASRec.Config(features=other)).fit(data)
    publish(tmp_path / "items", [Features("item", ["A"], np.ones((1, 2)), Provenance(system="planted"))])
    with raises(DataError, Facts("missing-value", file=tmp_path / "items")):
        SASRec(SASRec.Config(features=str(tmp_path / "items"))).fit(data)
