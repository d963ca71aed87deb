"""Sequences and ready-made samples on made files, and the split that a source brings along."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_cases import archive, dataset, folder, random_rows, seeds
from hypothesis import given

from llmrec.data.dataset import Dataset, GivenSplit
from llmrec.data.sets.table import load, located
from llmrec.data.split import SplitDataset, split
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
    return load(DataSection(source=source, path=str(path), **keys), seed=0)


def orders(data: Dataset) -> dict[str, list[str]]:
    frame = data.interactions
    return {
        user: frame.filter(user_id=user)["item_id"].to_list() for user in frame["user_id"].unique(maintain_order=True)
    }


# --------------------------------------------------------------------------- sequences


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
    cut = split(data, Split(), seed=0)
    assert {(held.user_id, held.item_id) for held in cut.holdouts("test")} == {("u2", "i3"), ("u3", "i4")}


def test_the_order_of_lines_does_not_matter_and_that_of_items_does(tmp_path: Path) -> None:
    data = read("sequences", folder(tmp_path / "a", SEQUENCES))
    turned = {**SEQUENCES, "sequences.txt": "u3 i2 i1 i4\nu1 i3 i1\nu2 i1 i2 i3\n"}
    assert read("sequences", folder(tmp_path / "b", turned)).fingerprint == data.fingerprint
    other = {**SEQUENCES, "sequences.txt": SEQUENCES["sequences.txt"].replace("i1 i2 i3", "i2 i1 i3")}
    assert read("sequences", folder(tmp_path / "c", other)).fingerprint != data.fingerprint


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_every_way_to_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    data = read("sequences", folder(tmp_path / "a", SEQUENCES))
    monkeypatch.setattr("llmrec.data.read.text.BLOCK", size)
    folder(tmp_path / "b", SEQUENCES, packed=True)
    ways = [tmp_path / "a" / "sequences.txt", tmp_path / "b", archive(tmp_path / "z.zip", SEQUENCES)]
    renamed = folder(tmp_path / "c", {"beauty.txt": SEQUENCES["sequences.txt"], "items.tsv": SEQUENCES["items.tsv"]})
    for way in (*ways, renamed / "beauty.txt"):
        again = read("sequences", way)
        assert again.fingerprint == data.fingerprint and again.items == data.items
    assert read("sequences", renamed / "beauty.txt").name == "beauty"


def test_items_of_another_name_and_other_columns(tmp_path: Path) -> None:
    folder(tmp_path, {"sequences.txt": "u1 i1 i2\n", "things.csv": 'id,name,brand\ni1,"One, two",X\ni2,Two,\n'})
    columns = Columns(item="id", title="name", fields=("brand",))
    data = read("sequences", tmp_path, items=str(tmp_path / "things.csv"), columns=columns)
    assert data.items["i1"].title == "One, two" and data.items["i1"].fields == {"brand": "X"}
    with raises(DataError, Facts("missing-column", "things.csv", column="nam", says="did you mean 'name'")):
        read("sequences", tmp_path, items=str(tmp_path / "things.csv"), columns=Columns(item="id", title="nam"))


def test_without_items_ids_stand_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = read("sequences", folder(tmp_path, {"sequences.txt": "u1 i1 i2\n"}))
    assert data.items["i2"].title == "i2" and "2 of 2 items have no title" in data.provenance["notes"]
    assert "2 of 2 items have no title" in caplog.text


def test_repeats_in_a_sequence(tmp_path: Path) -> None:
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
        ("sequences.txt", "i4", "i\0", Facts("encoding", line=4)),
        ("items.tsv", "item_id", "id", Facts("missing-column", column="item_id")),
        ("items.tsv", "i2\tB02", "i1\tB02", Facts("duplicate", says="keep_last")),
        ("items.tsv", "\tFourth", "", Facts("ragged-row", row=4, line=5)),
        ("items.tsv", "i4\tB04", " \tB04", Facts("missing-value", None, 4, "item_id", line=5)),
    ],
)
def test_broken_sequences(tmp_path: Path, name: str, old: str, new: str, facts: Facts) -> None:
    assert old in SEQUENCES[name]
    path = folder(tmp_path, {**SEQUENCES, name: SEQUENCES[name].replace(old, new, 1)})
    with raises(DataError, replace(facts, file=path / name)):
        read("sequences", path)


def test_sequences_that_are_not_there(tmp_path: Path) -> None:
    with raises(DataError, Facts("missing-file", tmp_path, column="data.path", says="sequences.txt.gz")):
        read("sequences", folder(tmp_path, {"items.tsv": SEQUENCES["items.tsv"]}))
    with raises(DataError, Facts("missing-file", "nowhere", column="data.path")):
        read("sequences", tmp_path / "nowhere")
    with raises(DataError, Facts("missing-key", column="data.path")):
        load(DataSection(source="sequences"), seed=0)
    with raises(DataError, Facts("empty", "sequences.txt")):
        read("sequences", folder(tmp_path / "x", {"sequences.txt": "\n \n"}))
    with raises(DataError, Facts("contradiction", column="data.columns")):
        read("sequences", folder(tmp_path / "y", SEQUENCES), columns=Columns(rating="stars"))


# --------------------------------------------------------------------------- samples with their own split


def cut(data: Dataset) -> SplitDataset:
    return split(data, Split(kind="given"), seed=0)


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


def test_every_way_to_samples(tmp_path: Path) -> None:
    data = read("samples", folder(tmp_path / "films", SAMPLES), duplicates="keep_last", **GIVEN)
    ways = [
        folder(tmp_path / "b", SAMPLES, packed=True),
        archive(tmp_path / "films.zip", SAMPLES),
        tmp_path / "films" / "train.tsv",
        folder(tmp_path / "c", {name.replace("tsv", "csv"): text.replace("\t", ",") for name, text in SAMPLES.items()}),
    ]
    for way in ways:
        assert read("samples", way, duplicates="keep_last", **GIVEN).fingerprint == data.fingerprint, way


def test_histories_that_are_cut_to_their_latest_items(tmp_path: Path) -> None:
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


def test_rows_of_people_who_are_named_are_not_mixed(tmp_path: Path) -> None:
    train = "user_id\thistory\ttarget\nx\ta\tb\ny\ta\tb\ny\ta b\tc\nx\ta b\td\n"
    parts = cut(read("samples", folder(tmp_path, {**SAMPLES, "train.tsv": train}), **KEEP))
    assert [event.item_id for event in parts.train_events("x")] == ["a", "b", "d"]
    assert [event.item_id for event in parts.train_events("y")] == ["a", "b", "c"]


def test_rows_of_a_named_person_that_do_not_continue_each_other_are_one_persons(tmp_path: Path) -> None:
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
    # Each row has its own history; what is held out of a person is learned in no row of that person, and nothing twice.
    assert shown == {"x/valid-1": (["a", "b"], "e"), "x/valid-2": (["c", "f"], "d")}
    assert [event.item_id for event in parts.train_events("x")] == ["c", "a", "b", "f"]
    # Rows without a name are not one person's.
    others = [[event.item_id for event in parts.train_events(user)] for user in ("person-2", "person-3")]
    assert others == [["d", "e"], ["c", "b"]]


def test_rows_of_people_without_names_may_stand_in_any_order(tmp_path: Path) -> None:
    rows = ["a b c\td", "a b\tc", "a\tb", "d\te"]
    made = [
        cut(
            read(
                "samples",
                folder(tmp_path / str(n), {**SAMPLES, "train.tsv": "\n".join(["history\ttarget", *each])}),
                **KEEP,
            )
        )
        for n, each in enumerate((rows, rows[::-1]))
    ]
    for parts in made:
        trained = [[event.item_id for event in parts.train_events(user)] for user in parts.users()]
        assert sorted(filter(None, trained)) == [["a", "b", "c", "d"], ["d", "e"]]


def test_rows_that_continue_nothing_are_said(tmp_path: Path) -> None:
    files = {**SAMPLES, "test.tsv": "user_id\thistory\ttarget\nu9\tb c d\ta\n"}
    notes = read("samples", folder(tmp_path, files), **KEEP).provenance["notes"]
    assert "1 held-out rows do not continue a training row" in notes


def test_samples_repeat_an_item(tmp_path: Path) -> None:
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
def test_broken_samples(tmp_path: Path, name: str, old: str, new: str, facts: Facts) -> None:
    path = folder(tmp_path, {**SAMPLES, name: SAMPLES[name].replace(old, new, 1)})
    with raises(DataError, replace(facts, file=path / name)):
        read("samples", path, **GIVEN)


def test_samples_that_are_not_there(tmp_path: Path) -> None:
    files = {name: text for name, text in SAMPLES.items() if name != "test.tsv"}
    with raises(DataError, Facts("missing-file", tmp_path, column="data.path", says="test.tsv or test.csv")):
        read("samples", folder(tmp_path, files), **GIVEN)
    with raises(DataError, Facts("contradiction", column="data.split.kind", says="set data.split.kind=given")):
        read("samples", folder(tmp_path / "all", SAMPLES))


# --------------------------------------------------------------------------- the split that a source gives


@given(seeds)
def test_a_given_split_holds_out_what_it_says_and_nothing_else(seed: int) -> None:
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


def test_a_filter_takes_held_out_pairs_along(tmp_path: Path) -> None:
    data = read("samples", folder(tmp_path, SAMPLES), filter={"user_core": 3}, **KEEP)
    assert cut(data).held_out == {("u1/valid-1", "f"), ("u1/test-1", "c"), ("u3/test-1", "c")}
    with raises(DataError, Facts("too-few", column="data.filter")):
        cut(replace(data, given=GivenSplit(frozenset(), frozenset())))


def test_sources_without_a_split_of_their_own() -> None:
    with raises(DataError, Facts("contradiction", "case", column="data.split.kind")):
        cut(dataset(random_rows(0)))


def test_a_path_that_is_not_here_is_looked_for_under_the_folder_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = DataSection(source="sequences", path="some_sequences", items="about.csv")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLMREC_DATA", raising=False)
    assert located(section) == section
    (tmp_path / "kept" / "some_sequences").mkdir(parents=True)
    monkeypatch.setenv("LLMREC_DATA", str(tmp_path / "kept"))
    (tmp_path / "kept" / "about.csv").touch()
    assert located(section).path == str(tmp_path / "kept" / "some_sequences")
    assert located(section).items == str(tmp_path / "kept" / "about.csv")
    (tmp_path / "about.csv").touch()
    (tmp_path / "some_sequences").mkdir()
    assert located(section) == section
    tables = DataSection(
        source="table",
        path="rows.csv",
        items="items.csv",
        users="users.csv",
        columns=Columns(user_fields=("age",)),
    )
    for name in ("rows.csv", "items.csv", "users.csv"):
        (tmp_path / "kept" / name).touch()
    found = located(tables)
    assert [found.path, found.items, found.users] == [
        str(tmp_path / "kept" / name) for name in ("rows.csv", "items.csv", "users.csv")
    ]
