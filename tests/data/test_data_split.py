from __future__ import annotations

import json
from collections import Counter

import polars as pl
import pytest
from data_cases import Row, dataset, pairs, random_rows, seeds, shuffled
from hypothesis import given, reject
from hypothesis import strategies as st

from llmrec.data.dataset import Dataset
from llmrec.data.hashing import hash64, hash_one
from llmrec.data.split import SplitDataset, request_id, split_dataset
from llmrec.data.stats import statistics, tied_last_share, wide_cutoff_warning
from llmrec.errors import DataError
from llmrec.recipe.schema import Split
from llmrec.types import Item
from tests.facts import Facts, raises

KINDS = ("leave_one_out", "last_share", "global_time", "user_disjoint", "prefix")
kinds = st.sampled_from(KINDS)


def cut(
    rows: list[Row], kind: str = "leave_one_out", seed: int = 0, *, timed: bool = True, **keys: float
) -> SplitDataset:
    shares = keys or {"valid": 0.2, "test": 0.2}
    return split_dataset(dataset(rows, timed=timed), Split(kind=kind, **shares), seed=seed)  # type: ignore[arg-type]


def cut_where_it_can_be(rows: list[Row], kind: str, seed: int, *, timed: bool = True) -> SplitDataset:
    """Split a random table; reject tables in which no user has enough interactions."""
    try:
        return cut(rows, kind, seed, timed=timed)
    except DataError as error:
        assert error.kind == "too-few" and kind == "prefix"
        reject()


@given(seeds, kinds, st.booleans(), st.booleans())
def test_parts_are_disjoint(seed: int, kind: str, repeats: bool, timed: bool) -> None:
    rows = random_rows(seed, repeats=repeats)
    data = cut_where_it_can_be(rows, kind, seed, timed=timed)
    valid, test, known, train = (pairs(part) for part in (data.valid, data.test, data.known, data.train))
    assert data.held_out == set(valid) | set(test)
    assert len(valid) == len(set(valid)) and len(test) == len(set(test))
    assert not set(valid) & set(test)
    assert not data.held_out & (set(train) | set(known))
    assert set(valid) | set(test) | set(known) | set(train) == {row[:2] for row in rows}
    if not repeats:
        assert len(valid) + len(test) + len(known) + len(train) == len(rows)


@given(seeds, kinds, st.booleans())
def test_row_order_does_not_matter(seed: int, kind: str, repeats: bool) -> None:
    rows = random_rows(seed, repeats=repeats)
    one, other = cut_where_it_can_be(rows, kind, seed), cut(shuffled(rows, seed + 1), kind, seed)
    for name in ("train", "valid", "test", "known"):
        assert getattr(one, name).equals(getattr(other, name))
    assert one.dataset.fingerprint == other.dataset.fingerprint
    assert one.fingerprint == other.fingerprint
    assert list(one.holdouts("test")) == list(other.holdouts("test"))


@given(seeds, kinds)
def test_history_is_ordered_and_earlier_than_target(seed: int, kind: str) -> None:
    data = cut_where_it_can_be(random_rows(seed), kind, seed)
    for name in ("valid", "test"):
        for held in data.holdouts(name):  # type: ignore[arg-type]
            history = data.history(held.user_id, name)  # type: ignore[arg-type]
            times = [event.timestamp for event in history]
            assert times == sorted(times)  # type: ignore[type-var]
            assert all(time <= held.timestamp for time in times)  # type: ignore[operator]
            assert held.item_id not in {event.item_id for event in history}
            # Every earlier row of the user is in the history.
            rows = data.dataset.interactions.filter(pl.col("user_id") == held.user_id)
            earlier = rows.filter(pl.col("timestamp") < held.timestamp)["item_id"].to_list()
            if kind != "global_time":
                assert set(earlier) - {event.item_id for event in history} <= {
                    i for u, i in data.held_out if u == held.user_id
                }


@pytest.mark.parametrize("kind", KINDS)
def test_seed_changes_split_and_fingerprint(kind: str) -> None:
    rows = random_rows(3, users=40, moments=2)
    one, other = cut(rows, kind, 1), cut(rows, kind, 2)
    assert one.held_out != other.held_out
    assert one.fingerprint != other.fingerprint
    assert one.dataset.fingerprint == other.dataset.fingerprint


def test_leave_one_out_by_hand() -> None:
    rows = [("a", f"i{n}", 3.0, float(n)) for n in range(4)] + [("b", "i0", 3.0, 9.0), ("b", "i1", 3.0, 1.0)]
    data = cut(rows)
    assert pairs(data.test) == [("a", "i3")]
    assert pairs(data.valid) == [("a", "i2")]
    assert pairs(data.train) == [("a", "i0"), ("a", "i1"), ("b", "i1"), ("b", "i0")]
    assert [event.item_id for event in data.history("a", "valid")] == ["i0", "i1"]
    assert [event.item_id for event in data.history("a", "test")] == ["i0", "i1", "i2"]
    assert [event.item_id for event in data.train_events("b")] == ["i1", "i0"]
    assert data.train_events("unknown") == ()
    assert data.users() == ("a", "b")


def test_repeats_of_a_held_out_pair_are_dropped() -> None:
    data = cut([("a", item, float(n), float(n)) for n, item in enumerate("xyzxx", start=1)])
    assert data.test.rows() == [("a", "x", 5.0, 5.0, None)]
    assert pairs(data.valid) == [("a", "z")]
    assert pairs(data.train) == [("a", "y")]


@given(seeds, st.integers(3, 8))
def test_ties_are_ordered_by_seeded_hash(seed: int, size: int) -> None:
    rows = [("u", f"i{n}", 3.0, 7.0) for n in range(size)]
    data = cut(shuffled(rows, seed), seed=seed)
    order = sorted((row[1] for row in rows), key=lambda item: hash_one("tie", seed, "u", item))
    assert [event.item_id for event in data.history("u", "test")] == order[:-1]
    assert pairs(data.test) == [("u", order[-1])]


def test_ties_in_file_order() -> None:
    pairs_in_file = ("ud", "vx", "ue", "ua", "uc", "vz", "vy")
    rows = [(user, item, 3.0, 5.0 if item == "e" else 7.0) for user, item in pairs_in_file]
    for seed in range(3):
        data = split_dataset(dataset(rows), Split(ties="file"), seed=seed)
        assert [event.item_id for event in data.history("u", "test")] == ["e", "d", "a"]
        assert sorted(pairs(data.test)) == [("u", "c"), ("v", "y")]


def test_ties_prefer_no_item() -> None:
    rows = [(f"u{user}", f"i{item}", 3.0, 1.0) for user in range(600) for item in range(4)]
    counts = Counter(item for _, item in pairs(cut(rows).test))
    # Chi-square with 3 degrees of freedom: 16.3 is the 0.1 % point.
    assert sum((counts[f"i{item}"] - 150) ** 2 / 150 for item in range(4)) < 16.3


def test_file_order_without_timestamps() -> None:
    rows = [("u", item, 3.0, 0.0) for item in ("c", "a", "d", "b")]
    data = cut(rows, timed=False)
    assert [event.item_id for event in data.history("u", "test")] == ["c", "a", "d"]
    assert pairs(data.test) == [("u", "b")]
    turned = cut(rows[::-1], timed=False)
    assert pairs(turned.test) == [("u", "c")]
    assert turned.dataset.fingerprint != data.dataset.fingerprint


def test_too_few_interactions_to_leave_one_out() -> None:
    with raises(DataError, Facts("too-few", column="data.split.kind")):
        cut([("a", "x", 1.0, 1.0), ("a", "y", 1.0, 2.0), ("b", "x", 1.0, 1.0)])


def test_last_share_by_hand() -> None:
    rows = [("a", f"i{n:02}", 3.0, float(n)) for n in range(30)]
    rows += [("b", f"i{n:02}", 3.0, float(n)) for n in range(3)] + [("c", "i00", 3.0, 1.0), ("c", "i01", 3.0, 2.0)]
    data = cut(rows, "last_share", valid=0.1, test=0.2)
    assert pairs(data.test) == [*[("a", f"i{n}") for n in range(24, 30)], ("b", "i02")]
    assert pairs(data.valid) == [*[("a", f"i{n}") for n in range(21, 24)], ("b", "i01")]
    assert [event.item_id for event in data.history("a", "test")] == [f"i{n:02}" for n in range(24)]
    assert [event.item_id for event in data.history("a", "valid")] == [f"i{n:02}" for n in range(21)]
    assert [event.item_id for event in data.train_events("c")] == ["i00", "i01"]


@pytest.mark.parametrize(("valid", "test"), [(0.3, 0.3), (0.0, 0.2), (0.2, 0.0), (0.01, 0.98)])
@pytest.mark.parametrize("size", [1, 2, 3, 37])
def test_last_share_keeps_training_interactions(valid: float, test: float, size: int) -> None:
    rows = [("u", f"i{n}", 3.0, float(n)) for n in range(size)] + [("v", f"i{n}", 3.0, float(n)) for n in range(50)]
    data = cut(rows, "last_share", valid=valid, test=test)
    parts = {name: [item for user, item in pairs(getattr(data, name)) if user == "u"] for name in ("valid", "test")}
    assert data.train_events("u")
    shares = {"valid": valid, "test": test}
    for name, share in shares.items():
        able = size > sum(other > 0 for other in shares.values())
        assert bool(parts[name]) == (share > 0 and able)
        assert len(parts[name]) <= max(1, size * share + 1e-6)


@given(seeds, st.booleans())
def test_history_ends_before_its_part(seed: int, repeats: bool) -> None:
    data = cut(random_rows(seed, repeats=repeats), "last_share", seed, valid=0.3, test=0.3)
    for name in ("valid", "test"):
        first: dict[str, float] = {}
        for held in data.holdouts(name):  # type: ignore[arg-type]
            first[held.user_id] = min(first.get(held.user_id, held.timestamp), held.timestamp)  # type: ignore[type-var,assignment]
        for user, time in first.items():
            assert all(event.timestamp <= time for event in data.history(user, name))  # type: ignore[operator,arg-type]


def test_too_few_interactions_for_a_last_share() -> None:
    with raises(DataError, Facts("too-few", column="data.split.kind")):
        cut([("a", "x", 1.0, 1.0), ("a", "y", 1.0, 2.0)], "last_share")


def test_global_time_by_hand() -> None:
    rows = [("a", f"i{n}", 3.0, float(n)) for n in range(8)] + [("new", "i1", 3.0, 8.0), ("a", "fresh", 3.0, 9.0)]
    data = cut(rows, "global_time", valid=0.2, test=0.2)
    assert set(pairs(data.test)) == {("new", "i1"), ("a", "fresh")}
    assert pairs(data.valid) == [("a", "i6"), ("a", "i7")]
    assert [event.item_id for event in data.history("a", "test")] == [f"i{n}" for n in range(8)]
    assert data.history("new", "test") == ()
    figures = statistics(data)
    assert (figures["cold_users_test"], figures["cold_items_test"]) == (1, 1)
    assert (figures["cold_users_valid"], figures["cold_items_valid"]) == (0, 2)


@given(seeds)
def test_global_time_has_one_border(seed: int) -> None:
    data = cut(random_rows(seed), "global_time", seed)
    times = data.valid["timestamp"]
    ends = [data.train["timestamp"].max(), times.min(), times.max(), data.test["timestamp"].min()]
    assert ends == sorted(ends)  # type: ignore[type-var]


@given(seeds)
def test_disjoint_users_are_not_in_training(seed: int) -> None:
    data = cut(random_rows(seed, users=20), "user_disjoint", seed)
    away = {user for user, _ in data.held_out}
    assert away and not away & set(data.train["user_id"])
    assert not set(data.valid["user_id"]) & set(data.test["user_id"])
    for held in data.holdouts("test"):
        assert data.train_events(held.user_id) == ()
        rows = data.dataset.interactions.filter(pl.col("user_id") == held.user_id)
        # A user with a single item is held out without a history.
        assert bool(data.history(held.user_id, "test")) == (rows["item_id"].n_unique() > 1)


@pytest.mark.parametrize("kind", ["global_time", "user_disjoint"])
def test_too_few_for_a_share(kind: str) -> None:
    rows = [("a", "x", 1.0, 1.0), ("a", "y", 1.0, 2.0), ("b", "x", 1.0, 3.0)]
    with raises(DataError, Facts("too-few", column="data.split.valid")):
        cut(rows, kind, valid=0.1, test=0.4)


@pytest.mark.parametrize("kind", ["global_time", "last_share"])
def test_rejects_impossible_shares(kind: str) -> None:
    for valid, test in ((0.0, 0.0), (0.5, 0.5)):
        with raises(DataError, Facts("bad-value", column="data.split")):
            cut(random_rows(0), kind, valid=valid, test=test)


def test_empty_training_part() -> None:
    rows = [("a", "x", 1.0, 1.0), ("a", "y", 1.0, 2.0), ("b", "x", 1.0, 3.0), ("b", "y", 1.0, 4.0)]
    with raises(DataError, Facts("too-few", column="data.split")):
        cut(rows, "user_disjoint", valid=0.5, test=0.49)


def test_first_holdouts_are_an_unbiased_sample() -> None:
    # Half of the users have ties, which a hash resolves: these users must not cluster at one end of the sample.
    rows = [(f"t{user}", f"i{item}", 3.0, 1.0) for user in range(500) for item in range(8)]
    rows += [(f"s{user}", f"i{item}", 3.0, float(item)) for user in range(500) for item in range(8)]
    first = cut(rows).holdouts("test")[:300]
    tied = sum(held.user_id.startswith("t") for held in first)
    assert 110 <= tied <= 190  # 150 expected; the standard deviation is 7.2


def test_training_has_no_holdouts() -> None:
    with raises(DataError, Facts("bad-value", says="'valid' or 'test'")):
        cut(random_rows(0)).holdouts("train")


@given(st.lists(st.text("ab|\\"), min_size=4, max_size=4))
def test_request_ids_escape_the_separator(parts: list[str]) -> None:
    assert (request_id(*parts[:2]) == request_id(*parts[2:])) == (parts[:2] == parts[2:])


def test_prefix_is_history_and_not_training() -> None:
    rows = [(f"u{user}", f"i{step}", 1.0, float(step)) for user in range(4) for step in range((8, 20, 90, 2)[user])]
    data = cut(rows, "prefix", valid=0.2, test=0.2)
    known = data.known.group_by("user_id").len().sort("user_id")["len"].to_list()
    assert known == [4, 10, 30, 1]
    assert data.test.group_by("user_id").len().sort("user_id")["len"].to_list() == [1, 2, 12]
    assert data.train_counts()["u2"] == 60 - 24 and data.train_counts()["u3"] == 1
    assert [event.item_id for event in data.history("u0", "test")] == [f"i{step}" for step in range(7)]
    assert data.test.filter(pl.col("user_id") == "u0")["item_id"][0] == "i7"
    assert not set(data.known.select("user_id", "item_id").iter_rows()) & data.held_out


def test_prefix_of_everything() -> None:
    rows = [("u", f"i{step}", 1.0, float(step)) for step in range(9)]
    with raises(DataError, Facts("too-few", says="data.split.prefix")):
        cut(rows, "prefix", prefix=1.0)


ROWS: list[Row] = [
    *(("a", "x", 5.0, 1.0), ("a", "y", 4.5, 2.0), ("a", "z", 4.5, 2.0), ("a", "w", 1.0, 0.0)),
    *(("b", "x", 5.0, 3.0), ("c", "x", 5.0, 1.0), ("c", "y", 5.0, 2.0)),
]


def test_statistics_by_hand() -> None:
    figures = statistics(split_dataset(dataset(ROWS), Split(), seed=0))
    assert (figures["users"], figures["items"], figures["interactions"]) == (3, 4, 7)
    assert figures["density"] == pytest.approx(7 / 12)
    assert figures["ratings"] == {"1": 1, "4.5": 2, "5": 4}
    assert figures["interactions_per_user"] == {"min": 1, "q25": 1.5, "median": 2, "q75": 3, "max": 4, "mean": 7 / 3}
    assert figures["tied_last_share"] == pytest.approx(1 / 3)
    assert (figures["train"], figures["valid"], figures["test"], figures["history_only"]) == (5, 1, 1, 0)
    assert figures["shared_titles"] == 0 and figures["with_text"] == 0
    # y or z is held out last, and the other before it: y is also known from user c, z is not.
    assert (figures["cold_items_test"], figures["cold_items_valid"]) in [(1, 0), (0, 1)]
    assert figures["cold_users_test"] == 0


def test_statistics_are_json() -> None:
    data = split_dataset(dataset(random_rows(1, users=30)), Split(kind="user_disjoint"), seed=0)
    assert json.loads(json.dumps(statistics(data)))["split"] == "user_disjoint"


def test_without_ratings_and_times() -> None:
    frame = pl.DataFrame({"user_id": ["a"] * 3, "item_id": ["x", "y", "z"], "text": ["t", None, None]})
    items = {item: Item(item_id=item, title="Same") for item in "xyz"}
    figures = statistics(split_dataset(Dataset(name="d", noun="n", interactions=frame, items=items), Split(), seed=0))
    assert figures["tied_last_share"] is None and figures["ratings"] == {} and figures["rating_scale"] is None
    assert (figures["with_text"], figures["shared_titles"]) == (1, 3)


def test_only_last_ties_count() -> None:
    rows = [("a", "x", 1.0, 1.0), ("a", "y", 1.0, 1.0), ("a", "z", 1.0, 2.0)]
    assert tied_last_share(dataset(rows).interactions) == 0.0


def test_hashes_are_stable_and_separate_parts() -> None:
    assert hash_one("tie", 0, "u1", "i1") == 9710115311842113335
    assert hash64("tie", 0, ["u1", "ab"], ["i1", "c"]).tolist()[0] == hash_one("tie", 0, "u1", "i1")
    seen = {hash_one("tie", 0, "ab", "c"), hash_one("tie", 0, "a", "bc"), hash_one("tie", 1, "ab", "c")}
    assert len(seen | {hash_one("other", 0, "ab", "c")}) == 4


def test_cutoffs_beyond_the_ranking_are_reported() -> None:
    warning = wide_cutoff_warning((50, 1, 20), 20)
    assert "20 items are ranked" in warning and "HR@20 is always 1" in warning
    assert wide_cutoff_warning((1, 10), 20) == ""
