"""Features of users before a sequence: they are used, dealt out anew they are not, and none knows an answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from llmrec.baselines.base import Log
from llmrec.baselines.gru4rec import GRU4Rec
from llmrec.baselines.neural import pieces_of
from llmrec.baselines.sasrec import SASRec
from llmrec.data.dataset import Dataset
from llmrec.data.features import Features, Pair, Provenance, publish
from llmrec.data.split import SplitDataset
from llmrec.errors import DataError
from llmrec.types import Event, Item, Request
from tests.baselines.trained import all_trained
from tests.facts import Facts, raises

pytest.importorskip("torch")
MODELS = (SASRec, GRU4Rec)
USERS, FIRST = 160, 8
QUICK: dict[str, Any] = {"dim": 16, "dropout": 0.0, "learning_rate": 0.01, "batch": 64, "epochs": 30, "quiet": True}


def _data() -> SplitDataset:
    """Users who choose something at random, and then A or B: which, nothing but their features says."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        rows += [(f"u{user:03d}", f"i{rng.integers(FIRST)}", 0.0), (f"u{user:03d}", "AB"[user % 2], 1.0)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    catalogue = {each: Item(item_id=each, title=each) for each in [*(f"i{n}" for n in range(FIRST)), "A", "B"]}
    return all_trained(Dataset(name="toy", noun="things", interactions=frame, items=catalogue))


def _store(folder: Path, *, split: str = "", seen: Mapping[str, frozenset[Pair]] | None = None) -> str:
    """Features of the users of `_data` and of as many others."""
    names = [*(f"u{n:03d}" for n in range(USERS)), *(f"v{n:03d}" for n in range(USERS))]
    kinds = np.array([n % 2 for n in range(USERS)] * 2)
    vectors = np.stack([kinds * 2.0 - 1, np.random.default_rng(1).normal(size=len(names))], axis=1)
    publish(folder, [Features("user", names, vectors, Provenance(system="planted", split=split), seen=seen or {})])
    return str(folder)


def _right(model: Any) -> float:
    """Return the share of users without training interactions for whom A is above B, or B above A, as it should be."""
    asked = [Request(id="r", user_id=f"v{n:03d}", history=(Event(item_id=f"i{n % FIRST}"),)) for n in range(USERS)]
    items = list(model._fitted.items)
    scores = model.scores(asked)[:, [items.index("A"), items.index("B")]]
    return float(np.mean(scores.argmax(axis=1) == np.arange(USERS) % 2))


@pytest.mark.parametrize("made", MODELS)
def test_what_features_tell_is_used_and_dealt_out_anew_it_is_not(made: Any, tmp_path: Path) -> None:
    folder, right = _store(tmp_path / "store"), {}
    for shuffled in (False, True):
        model = made(made.Config(**QUICK, patience=None, features=folder, shuffled=shuffled))
        model.fit(_data())
        right[shuffled] = _right(model)
    assert right[False] > 0.95 and right[True] < 0.75


@pytest.mark.parametrize("made", MODELS)
def test_what_is_restored_answers_as_what_was_fitted(made: Any, tmp_path: Path) -> None:
    settings = made.Config(**{**QUICK, "epochs": 2}, patience=None, features=_store(tmp_path / "store"))
    first, second = made(settings), made(settings)
    first.fit(_data())
    second.restore(_data(), first.state())
    histories = [(), (Event(item_id="i1"),), tuple(Event(item_id=f"i{n % FIRST}") for n in range(70))]
    asked = [Request(id="r", user_id=user, history=past) for user in ("v001", "stranger") for past in histories]
    assert np.array_equal(first.scores(asked), second.scores(asked))
    # Without a history there is the user, and of a stranger what all have in common.
    assert not np.array_equal(first.scores(asked[:1]), first.scores(asked[3:4]))


@pytest.mark.parametrize("longest", [1, 2, 5])
def test_the_user_stands_before_every_piece_and_every_step_is_a_target(longest: int) -> None:
    sizes = [1, 3, 7]
    items = np.arange(sum(sizes), dtype=np.int32)
    users = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    pieces = pieces_of(Log(users, items, np.zeros(len(items)), len(sizes)), longest, np.array([100, 101, 102]))
    assert all(100 <= piece[0] < 103 and (piece[1:] < 100).all() and len(piece) <= longest + 2 for piece in pieces)
    assert {int(item) for piece in pieces for item in piece[1:]} == set(items.tolist())
    assert all((users[piece[1:]] == piece[0] - 100).all() for piece in pieces)


def test_features_that_know_an_answer_are_refused(tmp_path: Path) -> None:
    data = _data()
    told = _store(tmp_path / "told", seen={"u000": frozenset({("u000", "A")})})
    with raises(DataError, Facts("leak", file=told, says=("'u000'", "'A'", "data.split.kind=prefix"))):
        SASRec(SASRec.Config(features=told)).fit(data)
    other = _store(tmp_path / "other", split="another")
    with raises(DataError, Facts("mismatch", file=other)):
        SASRec(SASRec.Config(features=other)).fit(data)


def test_a_store_of_items_alone_is_refused(tmp_path: Path) -> None:
    publish(tmp_path / "store", [Features("item", ["A"], np.ones((1, 2)), Provenance(system="planted"))])
    with raises(DataError, Facts("missing-value", file=tmp_path / "store")):
        SASRec(SASRec.Config(features=str(tmp_path / "store"))).fit(_data())
