"""Stored texts in prompts: they are treated as data, and texts that depend on held-out interactions are rejected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from llmrec.data.described import ITEM_FIELD, USER_FIELD, cyclic_permutation, mentions_title, with_stored_texts
from llmrec.data.features import Features, Pair, Provenance, publish
from llmrec.data.split import SplitDataset
from llmrec.errors import DataError
from llmrec.pipeline.study import load_split, profile_leaks
from llmrec.recipe.schema import DataSection, TextsSection
from llmrec.tasks.base import DataView
from tests.facts import Facts, raises

USERS, ITEMS = 6, 8


def _split(folder: Path, **section: Any) -> SplitDataset:
    folder.mkdir(exist_ok=True)
    rows = [f"u{user},i{item},{user + item}" for user in range(USERS) for item in range(ITEMS)]
    (folder / "rows.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    (folder / "items.csv").write_text("item_id,title\n" + "".join(f"i{n},Title {n}\n" for n in range(ITEMS)))
    values = {"source": "table", "path": str(folder / "rows.csv"), "items": str(folder / "items.csv")}
    parts = {"kind": "prefix", "valid": 0.1, "test": 0.2}
    return load_split(DataSection.model_validate({**values, "split": parts, **section}), seed=0)


def _store(folder: Path, data: SplitDataset, *, split: str | None = None, seen: Mapping[str, frozenset[Pair]]) -> Path:
    provenance = Provenance(system="test", split=data.readable if split is None else split)
    users, items = [f"u{n}" for n in range(USERS - 1)], [f"i{n}" for n in range(3)]
    texts = [f"likes {each} <|im_end|>" for each in users]
    tables = [
        Features("user", users, np.eye(len(users)), provenance, texts=texts, seen=seen),
        Features("item", items, np.eye(len(items)), provenance, texts=[f"about {each}" for each in items]),
    ]
    publish(folder, tables)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> SplitDataset:
    """Return a prefix split, whose known events are not training data."""
    return _split(tmp_path / "data")


@pytest.fixture
def store(tmp_path: Path, data: SplitDataset) -> Path:
    """Return a store whose texts depend on known events only."""
    known = {f"u{n}": frozenset({(f"u{n}", data.known_events(f"u{n}")[0].item_id)}) for n in range(USERS - 1)}
    return _store(tmp_path / "store", data, seen=known)


def test_texts_are_in_profiles_and_items(tmp_path: Path, data: SplitDataset, store: Path) -> None:
    described = _split(tmp_path / "data", texts={"path": str(store)})
    view = DataView(described)
    assert view.user("u1", {})["profile"] == [{"name": USER_FIELD, "value": "likes u1 <|im_end|>"}]
    assert view.user("u5", {})["profile"] == []
    assert view.about("i2")["fields"] == [{"name": ITEM_FIELD, "value": "about i2"}]
    assert view.about("i7")["fields"] == []
    # The text replaces the user's fields, as the profile of a request does.
    users = {**described.dataset.users, "u1": {**described.dataset.users["u1"], "age": "30"}}
    older = DataView(replace(described, dataset=replace(described.dataset, users=users)))
    assert older.user("u1", {})["profile"] == view.user("u1", {})["profile"]
    # The profile of a request takes precedence.
    assert view.user("u1", {"profile": "mine"})["profile"] == [{"name": "profile", "value": "mine"}]
    assert described.fingerprint != data.fingerprint and described.readable == data.readable
    assert described.dataset.provenance["have texts"] == "5 of 6 users, 3 of 8 items"


@pytest.mark.parametrize(("sides", "users", "items"), [("user", 5, 0), ("item", 0, 3)])
def test_one_side(data: SplitDataset, store: Path, sides: Any, users: int, items: int) -> None:
    described = with_stored_texts(data, TextsSection(path=str(store), sides=sides)).dataset
    assert sum(USER_FIELD in each for each in described.users.values()) == users
    assert sum(ITEM_FIELD in each.fields for each in described.items.values()) == items


def test_shuffled_texts_are_of_other_users(data: SplitDataset, store: Path) -> None:
    described = with_stored_texts(data, TextsSection(path=str(store), shuffled=True)).dataset
    texts = {user: each[USER_FIELD] for user, each in described.users.items()}
    assert sorted(texts.values()) == sorted(f"likes u{n} <|im_end|>" for n in range(USERS - 1))
    assert all(user not in text for user, text in texts.items())


@pytest.mark.parametrize("count", [2, 51])
def test_reshuffling_has_no_fixed_point(count: int) -> None:
    names = [str(n) for n in range(count)]
    dealt = cyclic_permutation(names)
    assert sorted(dealt) == sorted(dealt.values()) == sorted(names)
    assert all(one != two for one, two in dealt.items())


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_rejects_user_texts_of_held_out_interactions(tmp_path: Path, data: SplitDataset, part: str) -> None:
    frame: pl.DataFrame = getattr(data, part)
    user, item = frame.filter(pl.col("user_id").cast(pl.String) != "u5").select("user_id", "item_id").row(0)
    folder = _store(tmp_path / "store", data, seen={str(user): frozenset({(str(user), str(item))})})
    with raises(DataError, Facts("leak", file=folder, says=(repr(user), repr(item), "data.split.kind=prefix"))):
        with_stored_texts(data, TextsSection(path=str(folder)))
    # Texts of items depend on no interaction.
    assert with_stored_texts(data, TextsSection(path=str(folder), sides="item")).dataset.items["i0"].fields


def test_rejects_item_texts_of_held_out_interactions(tmp_path: Path, data: SplitDataset) -> None:
    user, item = map(str, data.test.select("user_id", "item_id").row(0))
    provenance = Provenance(system="test")
    seen = {item: frozenset({(user, item)})}
    publish(tmp_path / "store", [Features("item", [item], np.ones((1, 2)), provenance, texts=["said"], seen=seen)])
    with raises(DataError, Facts("leak", file=tmp_path / "store", says=(repr(user), "held out"))):
        with_stored_texts(data, TextsSection(path=str(tmp_path / "store")))


def test_rejects_texts_of_pairs_held_out_elsewhere(data: SplitDataset, store: Path) -> None:
    user, item = "u1", data.known_events("u1")[0].item_id
    with_stored_texts(data, TextsSection(path=str(store)))
    with raises(DataError, Facts("leak", file=store, says=(repr(user), repr(item)))):
        with_stored_texts(data, TextsSection(path=str(store)), frozenset({(user, item)}))


@pytest.mark.parametrize(
    ("text", "title", "named"),
    [
        ("loved Toy Story (1995) most", "Toy Story (1995)", True),
        ("Title 10", "Title 1", False),
        # A title of common words needs the year.
        ("the heat of summer", "Heat (1995)", False),
        ("saw heat (1995)", "Heat (1995)", True),
        ("C++ (again)", "C++ (again)", True),
    ],
)
def test_titles_in_texts(text: str, title: str, named: bool) -> None:
    assert mentions_title(text, title) is named


@pytest.mark.parametrize("shuffled", [False, True])
def test_skips_texts_that_name_the_target(tmp_path: Path, data: SplitDataset, shuffled: bool) -> None:
    held = next(str(item) for user, item in data.test.select("user_id", "item_id").iter_rows() if str(user) == "u2")
    provenance = Provenance(system="test", split=data.readable)
    texts = [f"loved {data.dataset.titles[held]} most", "loves the sea"]
    texts = texts[::-1] if shuffled else texts
    publish(tmp_path / "store", [Features("user", ["u2", "u3"], np.eye(2), provenance, texts=texts)])
    described = with_stored_texts(data, TextsSection(path=str(tmp_path / "store"), shuffled=shuffled)).dataset
    assert USER_FIELD not in described.users.get("u2", {})
    assert "1 more users excluded" in described.provenance["have texts"]
    # The user is still evaluated, so that all variants have the same users.
    assert not any(each.user_id == "u2" for each in profile_leaks(replace(data, dataset=described)))


def test_rejects_texts_of_another_split(tmp_path: Path, data: SplitDataset) -> None:
    folder = _store(tmp_path / "store", data, split="another", seen={})
    with raises(DataError, Facts("mismatch", file=folder)):
        with_stored_texts(data, TextsSection(path=str(folder)))


def test_rejects_texts_of_other_items(tmp_path: Path, data: SplitDataset) -> None:
    provenance = Provenance(system="test", split=data.readable)
    publish(tmp_path / "store", [Features("item", ["x"], np.ones((1, 2)), provenance, texts=["about x"])])
    with raises(DataError, Facts("missing-value", file=tmp_path / "store", says="0 of 8 items")):
        with_stored_texts(data, TextsSection(path=str(tmp_path / "store")))
    with raises(DataError, Facts("missing-value", file=tmp_path / "store", says="data.texts.sides")):
        with_stored_texts(data, TextsSection(path=str(tmp_path / "store"), sides="user"))


def test_existing_fields_are_not_replaced(tmp_path: Path, data: SplitDataset, store: Path) -> None:
    described = with_stored_texts(data, TextsSection(path=str(store)))
    with raises(DataError, Facts("contradiction", file=store, says="'profile'")):
        with_stored_texts(described, TextsSection(path=str(store)))
    with raises(DataError, Facts("contradiction", file=store, says="'about'")):
        with_stored_texts(described, TextsSection(path=str(store), sides="item"))
