"""Sources of sequences and samples, and splits that a source provides."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_cases import archive, dataset, folder, random_rows, seeds
from hypothesis import given

from llmrec.data.dataset import Dataset, GivenSplit
from llmrec.data.sets.table import load_data, resolve_data_paths
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.errors import DataError
from llmrec.recipe.schema import Columns, DataSection, Split
from tests.facts import Facts, raises

Files = dict[str, str]
SEQUENCES: Files = {
    "sequences.txt": "u2 i1 i2 i3\nu1  i3\ti1\n\nu3 i2 i1 i4 \n",
    "items.tsv": (
        "item_id\tasin\ttitle\tgenres\n"
        'i1\tB01\tSalt &amp; Pepper\tA|B\ni2\tB02\t"Say ""Hi"""\tA\ni3\tB03\tThird\t\ni4\tB04\tFourth\tB\n'
        "i5\tB05\tNever\tB\n"
    ),
}
SAMPLES: Files = {
    "train.tsv": "history\ttarget\na\tb\nc\td\na b\te\na\tb\nc d\tf\n",
    "valid.tsv": "user_id\thistory\ttarget\trating\nu1\ta b e\tf\t5\nu2\td\ta\t4\n",
    "test.tsv": "user_id\thistory\ttarget\trating\nu1\ta b e f\tc\t5\nu3\tc d f\tc\t1\n",
    "items.tsv": "item_id\ttitle\n" + "".join(f"{item}\tTitle {item}\n" for item in "abcdef"),
}
GIVEN = {"split": {"kind": "given"}}
KEEP = {"duplicates": "keep_last", **GIVEN}


def read(source: str, path: Path, **keys: Any) -> Dataset:
    return load_data(DataSection(source=source, path=str(path), **keys), seed=0)


def orders(data: Dataset) -> dict[str, list[str]]:
    frame = data.interactions
    return {
        user: frame.filter(user_id=user)["item_id"].to_list() for user in frame["user_id"].unique(maintain_order=True)
    }


def test_sequences(tmp_path: Path) -> None:
    data = read("sequences", folder(tmp_path / "shop", SEQUENCES))
    assert orders(data) == {"u2": ["i1", "i2", "i3"], "u1": ["i3", "i1"], "u3": ["i2", "i1", "i4"]}
    assert {key: item.title for key, item in data.items.items()} == {
        "i1": "Salt & Pepper",
        "i2": 'Say "Hi"',
        "i3": "Third",
        "i4": "Fourth",
    }
    assert data.items["i1"].fields == {"genres": "A, B"} and data.items["i3"].fields == {"genres": ""}
    assert not data.has_time and data.rating_scale is None and data.name == "shop" and data.provenance["rows"] == "8"
    assert data.fingerprint.startswith("14df0771bc3e")
    cut = split_dataset(data, Split(), seed=0)
    assert {(held.user_id, held.item_id) for held in cut.holdouts("test")} == {("u2", "i3"), ("u3", "i4")}


def test_order_of_items_matters_and_order_of_lines_does_not(tmp_path: Path) -> None:
    data = read("sequences", folder(tmp_path / "a", SEQUENCES))
    turned = {**SEQUENCES, "sequences.txt": "u3 i2 i1 i4\nu1 i3 i1\nu2 i1 i2 i3\n"}
    assert read("sequences", folder(tmp_path / "b", turned)).fingerprint == data.fingerprint
    other = {**SEQUENCES, "sequences.txt": SEQUENCES["sequences.txt"].replace("i1 i2 i3", "i2 i1 i3")}
    assert read("sequences", folder(tmp_path / "c", other)).fingerprint != data.fingerprint


def test_locations_of_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read("sequences", folder(tmp_path / "a", SEQUENCES))
    monkeypatch.setattr("llmrec.data.read.text.BLOCK", 1)
    folder(tmp_path / "b", SEQUENCES, packed=True)
    paths = [tmp_path / "a" / "sequences.txt", tmp_path / "b", archive(tmp_path / "z.zip", SEQUENCES)]
    renamed = folder(tmp_path / "c", {"beauty.txt": SEQUENCES["sequences.txt"], "items.tsv": SEQUENCES["items.tsv"]})
    for path in (*paths, renamed / "beauty.txt"):
        again = read("sequences", path)
        assert again.fingerprint == data.fingerprint and again.items == data.items
    assert read("sequences", renamed / "beauty.txt").name == "beauty"


def test_other_item_file_and_columns(tmp_path: Path) -> None:
    folder(tmp_path, {"sequences.txt": "u1 i1 i2\n", "things.csv": 'id,name,brand\ni1,"One, two",X\ni2,Two,\n'})
    columns = Columns(item="id", title="name", fields=("brand",))
    data = read("sequences", tmp_path, items=str(tmp_path / "things.csv"), columns=columns)
    assert data.items["i1"].title == "One, two" and data.items["i1"].fields == {"brand": "X"}
    with raises(DataError, Facts("missing-column", "things.csv", column="nam", says="did you mean 'name'")):
        read("sequences", tmp_path, items=str(tmp_path / "things.csv"), columns=Columns(item="id", title="nam"))


def test_ids_are_titles_without_items(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = read("sequences", folder(tmp_path, {"sequences.txt": "u1 i1 i2\n"}))
    assert data.items["i2"].title == "i2" and "2 of 2 items have no title" in data.provenance["notes"]
    assert "2 of 2 items have no title" in caplog.text


def test_repeated_items(tmp_path: Path) -> None:
    folder(tmp_path, {"sequences.txt": "u1 i1 i2\nu2 i3 i1 i2 i3\n"})
    with raises(DataError, Facts("duplicate", "sequences.txt", line=2, says="data.duplicates=keep_last")):
        read("sequences", tmp_path)
    assert orders(read("sequences", tmp_path, duplicates="keep_last"))["u2"] == ["i1", "i2", "i3"]


@pytest.mark.parametrize(
    ("name", "old", "new", "facts"),
    [
        ("sequences.txt", "u3 i2 i1 i4", "u3", Facts("missing-value", line=4)),
        ("sequences.txt", "u3 i2", "u1 i2", Facts("duplicate", line=4)),
        ("sequences.txt", "i4", "i9", Facts("unknown-name", line=4)),
        ("items.tsv", "item_id", "id", Facts("missing-column", column="item_id")),
        ("items.tsv", "i2\tB02", "i1\tB02", Facts("duplicate", says="keep_last")),
        ("items.tsv", "i4\tB04", " \tB04", Facts("missing-value", None, 4, "item_id", line=5)),
    ],
)
def test_malformed_sequences(tmp_path: Path, name: str, old: str, new: str, facts: Facts) -> None:
    assert old in SEQUENCES[name]
    path = folder(tmp_path, {**SEQUENCES, name: SEQUENCES[name].replace(old, new, 1)})
    with raises(DataError, replace(facts, file=path / name)):
        read("sequences", path)


def test_missing_sequences(tmp_path: Path) -> None:
    with raises(DataError, Facts("missing-file", tmp_path, column="data.path", says="sequences.txt.gz")):
        read("sequences", folder(tmp_path, {"items.tsv": SEQUENCES["items.tsv"]}))
    with raises(DataError, Facts("missing-key", column="data.path")):
        load_data(DataSection(source="sequences"), seed=0)
    with raises(DataError, Facts("empty", "sequences.txt")):
        read("sequences", folder(tmp_path / "x", {"sequences.txt": "\n \n"}))
    with raises(DataError, Facts("contradiction", column="data.columns")):
        read("sequences", folder(tmp_path / "y", SEQUENCES), columns=Columns(rating="stars"))


def cut(data: Dataset) -> SplitDataset:
    return split_dataset(data, Split(kind="given"), seed=0)


def test_samples(tmp_path: Path) -> None:
    data = read("samples", folder(tmp_path / "films", SAMPLES), **KEEP)
    parts = cut(data)
    # u1's rows go a > b > e in training, then f, then c; u3's go c > d > f, and c is held out, so it is not learned.
    trained = {user: [event.item_id for event in parts.train_events(user)] for user in parts.users()}
    assert {user: items for user, items in trained.items() if items} == {
        "u1": ["a", "b", "e"],
        "u3": ["d", "f"],
        "person-3": ["a", "b"],
    }
    shown = {
        held.user_id: ([event.item_id for event in parts.history(held.user_id, part)], held.item_id)
        for part in ("valid", "test")
        for held in parts.holdouts(part)  # type: ignore[arg-type]
    }
    assert shown == {
        "u1/valid-1": (["a", "b", "e"], "f"),
        "u2/valid-1": (["d"], "a"),
        "u1/test-1": (["a", "b", "e", "f"], "c"),
        "u3/test-1": (["d", "f"], "c"),
    }
    assert data.name == "films" and data.provenance["rows"] == "train 5 / valid 2 / test 2"
    notes = data.provenance["notes"]
    assert "5 training rows are merged into the histories of 3 users" in notes
    assert "each of 4 held-out rows counts as a user" in notes
    assert "removed: 1 held-out targets that are in their histories, and 1 training interactions" in notes
    assert parts.fingerprint.startswith("a053c72f04e1")


def test_truncated_histories_are_joined(tmp_path: Path) -> None:
    items = "abcdefgh"
    train = "history\ttarget\n" + "".join(f"{' '.join(items[max(0, n - 2) : n])}\t{items[n]}\n" for n in range(1, 6))
    files = {
        **SAMPLES,
        "train.tsv": train,
        "valid.tsv": "history\ttarget\ne f\tg\n",
        "test.tsv": "history\ttarget\nf g\th\n",
    }
    files["items.tsv"] += "g\tG\nh\tH\n"
    parts = cut(read("samples", folder(tmp_path, files), **GIVEN))
    assert [event.item_id for event in parts.train_events("person-1")] == list("abcdef")
    assert parts.held_out == {("person-1/valid-1", "g"), ("person-1/test-1", "h")}


def test_rows_of_named_users_are_separate(tmp_path: Path) -> None:
    train = "user_id\thistory\ttarget\nx\ta\tb\ny\ta\tb\ny\ta b\tc\nx\ta b\td\n"
    parts = cut(read("samples", folder(tmp_path, {**SAMPLES, "train.tsv": train}), **KEEP))
    assert [event.item_id for event in parts.train_events("x")] == ["a", "b", "d"]
    assert [event.item_id for event in parts.train_events("y")] == ["a", "b", "c"]


def test_unconnected_rows_of_a_user(tmp_path: Path) -> None:
    head = "user_id\thistory\ttarget\n"
    files = {
        **SAMPLES,
        "train.tsv": f"{head}x\ta b e\tf\nx\tc\ta\n\td\te\n\tc\tb\n",
        "valid.tsv": f"{head}x\ta b\te\nx\tc f\td\n",
        "test.tsv": f"{head}y\ta\tb\n",
    }
    parts = cut(read("samples", folder(tmp_path, files), **KEEP))
    shown = {
        held.user_id: ([event.item_id for event in parts.history(held.user_id, "valid")], held.item_id)
        for held in parts.holdouts("valid")
    }
    # Each row has its own history; a user's held-out items are in none of the user's training rows, others once.
    assert shown == {"x/valid-1": (["a", "b"], "e"), "x/valid-2": (["c", "f"], "d")}
    assert [event.item_id for event in parts.train_events("x")] == ["c", "a", "b", "f"]
    # Rows without a user ID are different users.
    others = [[event.item_id for event in parts.train_events(user)] for user in ("person-2", "person-3")]
    assert others == [["d", "e"], ["c", "b"]]


def test_rows_without_user_in_any_order(tmp_path: Path) -> None:
    rows = ["a b c\td", "a b\tc", "a\tb", "d\te"]
    for n, order in enumerate((rows, rows[::-1])):
        files = {**SAMPLES, "train.tsv": "\n".join(["history\ttarget", *order])}
        parts = cut(read("samples", folder(tmp_path / str(n), files), **KEEP))
        trained = [[event.item_id for event in parts.train_events(user)] for user in parts.users()]
        assert sorted(filter(None, trained)) == [["a", "b", "c", "d"], ["d", "e"]]


def test_unconnected_rows_are_counted(tmp_path: Path) -> None:
    files = {**SAMPLES, "test.tsv": "user_id\thistory\ttarget\nu9\tb c d\ta\n"}
    notes = read("samples", folder(tmp_path, files), **KEEP).provenance["notes"]
    assert "1 held-out rows do not continue a training row" in notes


def test_repeated_items_in_samples(tmp_path: Path) -> None:
    files = {**SAMPLES, "train.tsv": "history\ttarget\na\tb\na b\ta\n"}
    with raises(DataError, Facts("duplicate", "train.tsv", line=3, says="keep_last")):
        read("samples", folder(tmp_path, files), **GIVEN)
    parts = cut(read("samples", tmp_path, duplicates="keep_last", **GIVEN))
    assert [event.item_id for event in parts.train_events("person-1")] == ["b", "a"]


@pytest.mark.parametrize(
    ("name", "old", "new", "facts"),
    [
        ("valid.tsv", "u2\td\ta", "u2\td\ta b", Facts("bad-value", None, 2, "target", line=3)),
        ("test.tsv", "c d f\tc", "c d f\tz", Facts("unknown-name", line=3)),
        ("train.tsv", "history", "past", Facts("missing-column", column="history")),
        ("train.tsv", "a b\te", "a b", Facts("ragged-row", row=3, line=4)),
    ],
)
def test_malformed_samples(tmp_path: Path, name: str, old: str, new: str, facts: Facts) -> None:
    path = folder(tmp_path, {**SAMPLES, name: SAMPLES[name].replace(old, new, 1)})
    with raises(DataError, replace(facts, file=path / name)):
        read("samples", path, **GIVEN)


def test_missing_samples(tmp_path: Path) -> None:
    files = {name: text for name, text in SAMPLES.items() if name != "test.tsv"}
    with raises(DataError, Facts("missing-file", tmp_path, column="data.path", says="test.tsv or test.csv")):
        read("samples", folder(tmp_path, files), **GIVEN)
    with raises(DataError, Facts("contradiction", column="data.split.kind", says="set data.split.kind=given")):
        read("samples", folder(tmp_path / "all", SAMPLES))


@given(seeds)
def test_given_split_holds_out_exactly_its_pairs(seed: int) -> None:
    dice = random.Random(seed)
    data = dataset(random_rows(seed, repeats=True))
    pairs = sorted(set(data.interactions.select("user_id", "item_id").iter_rows()))
    held = dice.sample(pairs, 6)
    users = frozenset(dice.sample(sorted({user for user, _ in pairs}), 3))
    given_split = GivenSplit(frozenset(held[:4]), frozenset(held[3:]), users)
    parts = cut(replace(data, given=given_split))
    assert set(parts.test.select("user_id", "item_id").iter_rows()) == set(held[3:])
    assert set(parts.valid.select("user_id", "item_id").iter_rows()) == set(held[:3])
    for frame in (parts.train, parts.known):
        assert not parts.held_out & set(frame.select("user_id", "item_id").iter_rows())
    assert not users & set(parts.train["user_id"]) and set(parts.known["user_id"]) <= users
    everything = {
        pair
        for name in ("train", "valid", "test", "known")
        for pair in getattr(parts, name).select("user_id", "item_id").iter_rows()
    }
    assert everything == set(pairs)


def test_filter_applies_to_held_out_pairs(tmp_path: Path) -> None:
    data = read("samples", folder(tmp_path, SAMPLES), filter={"user_core": 3}, **KEEP)
    assert cut(data).held_out == {("u1/valid-1", "f"), ("u1/test-1", "c"), ("u3/test-1", "c")}
    with raises(DataError, Facts("too-few", column="data.filter")):
        cut(replace(data, given=GivenSplit(frozenset(), frozenset())))


def test_source_without_split() -> None:
    with raises(DataError, Facts("contradiction", "case", column="data.split.kind")):
        cut(dataset(random_rows(0)))


def test_relative_paths_in_llmrec_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = DataSection(source="sequences", path="some_sequences", items="about.csv")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLMREC_DATA", raising=False)
    assert resolve_data_paths(section) == section
    (tmp_path / "kept" / "some_sequences").mkdir(parents=True)
    monkeypatch.setenv("LLMREC_DATA", str(tmp_path / "kept"))
    (tmp_path / "kept" / "about.csv").touch()
    assert resolve_data_paths(section).path == str(tmp_path / "kept" / "some_sequences")
    assert resolve_data_paths(section).items == str(tmp_path / "kept" / "about.csv")
    (tmp_path / "about.csv").touch()
    (tmp_path / "some_sequences").mkdir()
    assert resolve_data_paths(section) == section
    names = {"path": "rows.csv", "items": "items.csv", "users": "users.csv"}
    tables = DataSection.model_validate({"source": "table", **names, "columns": {"user_fields": ["age"]}})
    for name in names.values():
        (tmp_path / "kept" / name).touch()
    result = resolve_data_paths(tables)
    assert [result.path, result.items, result.users] == [str(tmp_path / "kept" / name) for name in names.values()]
