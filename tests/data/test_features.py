"""Feature stores: round trip, versions, and protection against misuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data import features as module
from llmrec.data.features import Features, FeatureStore, Provenance, lock_store, publish, write_version
from llmrec.errors import DataError, LlmrecError
from tests.facts import Facts, raises

MADE = Provenance(system="test", split="abc", generator={"model": "m", "seed": 0})


def some(count: int = 5, width: int = 3, kind: str = "user") -> Features:
    rng = np.random.default_rng(count)
    ids = [f"{kind}{number}" for number in rng.permutation(count)]
    return Features(
        kind,  # type: ignore[arg-type]
        ids,
        rng.normal(size=(count, width)).astype(np.float32),
        MADE,
        texts=[f"likes {each}" for each in ids],
        seen={ids[0]: frozenset({(ids[0], "i1"), (ids[0], "i2")})},
    )


def test_round_trip(tmp_path: Path) -> None:
    users, items = some(), some(7, 4, "item")
    publish(tmp_path / "store", [users, items])
    store = FeatureStore.open(tmp_path / "store", split="abc")
    assert store.kinds == ("user", "item") and store.width("item") == 4 and store.provenance("user") == MADE
    vectors, known = store.get("user", [*users.ids, "unknown", users.ids[0], ""])
    assert known.tolist() == [True] * 5 + [False, True, False]
    assert np.array_equal(vectors[:5], users.vectors) and np.array_equal(vectors[6], users.vectors[0])
    assert vectors[5] == pytest.approx(users.vectors.mean(axis=0)) and np.array_equal(vectors[5], vectors[7])
    assert store.texts("user", ["unknown", users.ids[1]]) == {users.ids[1]: f"likes {users.ids[1]}"}
    assert store.texts("user", iter(users.ids)) == dict(zip(users.ids, users.texts, strict=True))
    assert store.seen("user") == users.seen[users.ids[0]] and len(store.seen()) == 4
    assert store.get("user", [])[0].shape == (0, 3)
    with raises(DataError, Facts("missing-value", says=("synthetic items", "users and items"))):
        store.get("synthetic", ["user0"])


def test_documented_numpy_lines_read_it(tmp_path: Path) -> None:
    """Run the example in docs/text-features-and-cold-start.md."""
    users = some(9)
    publish(tmp_path / "store", [users])
    page = Path("docs/text-features-and-cold-start.md").read_text(encoding="utf-8")
    lines = page.split("```python\n# without llmrec\n")[1].split("```")[0]
    assert len(lines.strip().splitlines()) <= 10
    names = {"folder": str(tmp_path / "store"), "asked": ["unknown", *users.ids]}
    exec(lines, names)
    vectors, known = FeatureStore.open(tmp_path / "store").get("user", ["unknown", *users.ids])
    assert np.array_equal(names["vectors"], vectors) and np.array_equal(names["known"], known)


def test_open_versions_stay_readable(tmp_path: Path) -> None:
    first, second = some(), some(6)
    publish(tmp_path, [first])
    before = FeatureStore.open(tmp_path)
    publish(tmp_path, [second])
    assert np.array_equal(before.get("user", first.ids)[0], first.vectors)
    assert np.array_equal(FeatureStore.open(tmp_path).get("user", second.ids)[0], second.vectors)
    publish(tmp_path, [first])
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_other_folders_are_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "ml1m").mkdir()
    (tmp_path / "ml1m" / "meta.json").write_text("{}")
    with raises(LlmrecError, Facts("exists", tmp_path, says="ml1m")):
        publish(tmp_path, [some()])
    (tmp_path / "store").mkdir()
    for _ in range(4):
        publish(tmp_path / "store", [some()])
        (tmp_path / "store" / "mine").mkdir(exist_ok=True)
        (tmp_path / "store" / "mine" / "meta.json").write_text("{}")
    assert (tmp_path / "ml1m" / "meta.json").exists() and (tmp_path / "store" / "mine" / "meta.json").exists()


def test_concurrent_writes_are_rejected(tmp_path: Path) -> None:
    publish(tmp_path, [some()])
    with lock_store(tmp_path), raises(LlmrecError, Facts("busy", tmp_path)):
        publish(tmp_path, [some(6)])
    publish(tmp_path, [some(6)])
    assert len(FeatureStore.open(tmp_path).ids("user")) == 6


def test_fallback_of_unknown_ids(tmp_path: Path) -> None:
    features = replace(some(), fallback=np.zeros(3, np.float32))
    publish(tmp_path, [features])
    first = FeatureStore.open(tmp_path)
    assert first.fallback("user") is not None and not first.get("user", ["unknown"])[0].any()
    publish(tmp_path, [some()])
    assert FeatureStore.open(tmp_path).fallback("user") is None and FeatureStore.open(tmp_path).stamp != first.stamp


def test_rejects_numbers_too_large_for_half_precision(tmp_path: Path) -> None:
    with lock_store(tmp_path) as folder, raises(DataError, Facts("too-large", says="float32")):
        write_version(folder, [Features("user", ["a"], np.array([[1e5]]), MADE)], dtype="float16")


@pytest.mark.parametrize("name", ["a#1", "é%20 ?"])
def test_any_folder_name(tmp_path: Path, name: str) -> None:
    publish(tmp_path / name, [some()])
    assert FeatureStore.open(tmp_path / name).texts("user", ["user1"]) == {"user1": "likes user1"}


def test_truncated_file_is_damaged(tmp_path: Path) -> None:
    path = publish(tmp_path, [some()]) / "user-vectors.npy"
    path.write_bytes(path.read_bytes()[:40])
    with raises(DataError, Facts("damaged", tmp_path)):
        FeatureStore.open(tmp_path)


def test_killed_build_keeps_previous_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = some()
    publish(tmp_path, [first])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("_write_features", "_write_texts", "write_json", "write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(module, step, killed)
            with pytest.raises(KeyboardInterrupt):
                publish(tmp_path, [some(6)])
        assert np.array_equal(FeatureStore.open(tmp_path).get("user", first.ids)[0], first.vectors), step


def test_rejects_texts_of_another_split(tmp_path: Path) -> None:
    publish(tmp_path, [some()])
    with raises(DataError, Facts("mismatch", tmp_path, says="llmrec augment")):
        FeatureStore.open(tmp_path, split="another")
    publish(tmp_path, [replace(some(), provenance=Provenance(system="titles alone"))])
    assert FeatureStore.open(tmp_path, split="another").kinds == ("user",)


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda at: (at / "current").unlink(), "missing-file"),
        (lambda at: (at / "current").write_text("gone"), "damaged"),
        (lambda at: next(at.glob("*/meta.json")).write_text("{"), "damaged"),
        (lambda at: next(at.glob("*/meta.json")).write_text(json.dumps({"format": 99})), "wrong-format"),
    ],
)
def test_malformed_stores(tmp_path: Path, spoil: object, kind: str) -> None:
    publish(tmp_path, [some()])
    spoil(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError) as caught:
        FeatureStore.open(tmp_path)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"ids": ["a", "a"], "vectors": np.zeros((2, 1))}, "duplicate"),
        ({"ids": ["a"], "vectors": np.array([[np.nan]])}, "bad-value"),
        ({"ids": ["a"], "vectors": np.zeros((2, 1))}, "mismatch"),
        ({"ids": ["a\0"], "vectors": np.zeros((1, 1))}, "bad-value"),
        ({"ids": ["a", "b"], "vectors": np.zeros((2, 1)), "texts": ["one"]}, "mismatch"),
        ({"ids": ["a"], "vectors": np.zeros((1, 1)), "seen": {"A": frozenset({("a", "i")})}}, "mismatch"),
        ({"ids": ["a"], "vectors": np.zeros((1, 2)), "fallback": np.zeros(3)}, "mismatch"),
    ],
)
def test_malformed_features(change: dict[str, object], kind: str) -> None:
    with pytest.raises(DataError) as caught:
        Features(kind="user", provenance=MADE, **change)  # type: ignore[arg-type]
    assert caught.value.kind == kind


@given(
    st.lists(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1), unique=True)
)
def test_any_ids(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    folder = tmp_path_factory.mktemp("store")
    vectors = np.arange(len(ids) * 2, dtype=np.float32).reshape(len(ids), 2)
    publish(folder, [Features("item", ids, vectors, MADE)])
    assert not FeatureStore.open(folder).get("item", ["\0"])[1].any()
    read, known = FeatureStore.open(folder).get("item", [*ids, *(each + "x" for each in ids)])
    assert np.array_equal(read[: len(ids)], vectors) and known[: len(ids)].all()
    assert known[len(ids) :].tolist() == [each + "x" in ids for each in ids]
