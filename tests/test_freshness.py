"""In the replay by year no profile is newer than what it stands beside, and older ones know less."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from eval.benchmarks.freshness import NEVER, WINDOW, Replay, before, features, name_of, ndcg_within, slice_of
from llmrec.types import Item

YEARS = range(2001, 2011)


@pytest.fixture(scope="module")
def replay() -> Replay:
    """Twelve users, each in some years, with films of which some appear late."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(12):
        free = rng.permutation(40).tolist()
        for year in YEARS:
            if rng.random() < 0.6:
                for step in range(3):
                    rows.append(
                        (f"u{user}", f"i{free.pop()}", float(rng.integers(1, 6)), float(year * 10 + step), year)
                    )
    schema = ["user_id", "item_id", "rating", "timestamp", "year"]
    items = {f"i{n}": Item(item_id=f"i{n}", title=f"The film {n % 7} of {n % 5}") for n in range(40)}
    return Replay.of(pl.DataFrame(rows, schema=schema, orient="row"), items)


@pytest.mark.parametrize("age", [0, 1, 3, NEVER])
def test_no_feature_is_newer_than_the_row_it_serves(replay: Replay, age: int) -> None:
    year, first = 2010, 2008
    users, items = features(replay, year, age, first)
    data, _ = slice_of(replay, year)
    when = {(user, item): at for user, item, at in replay.events.select("user_id", "item_id", "year").iter_rows()}
    assert users.seen
    for name, pairs in users.seen.items():
        user, served = name.split("@")
        newest = max(when[user, item] for _, item in pairs)
        assert newest < before(int(served), age, first) <= int(served)
        # The host learns from nothing that a profile has seen, and is asked about nothing of it.
        assert pairs.isdisjoint(data.train.select("user_id", "item_id").iter_rows())
    appeared = dict(replay.events.group_by("item_id").agg(pl.col("year").min()).iter_rows())
    assert all(appeared[item] < before(year, age, first) for item in items.ids)


def test_older_profiles_know_no_more_and_frozen_ones_never_change(replay: Replay) -> None:
    known = [features(replay, 2010, age, 2008)[0].seen for age in (0, 1, 3)]
    for newer, older in ((known[0], known[1]), (known[1], known[2])):
        assert set(older) <= set(newer) and all(older[name] <= newer[name] for name in older)
        assert sum(map(len, older.values())) < sum(map(len, newer.values()))
    frozen = [features(replay, year, NEVER, 2008)[0] for year in (2009, 2010)]
    said = [{n.split("@")[0]: v.tobytes() for n, v in zip(f.ids, f.vectors, strict=True)} for f in frozen]
    both = {name_of(user, 2009) for user in said[0]} & set(frozen[1].ids)
    assert both and all(
        frozen[0].vectors[frozen[0].ids.index(name)].tobytes() == frozen[1].vectors[frozen[1].ids.index(name)].tobytes()
        for name in both
    )


def test_a_user_of_a_year_has_what_was_rated_before_as_history(replay: Replay) -> None:
    data, cases = slice_of(replay, 2010)
    train = data.train.select("user_id", "item_id", "timestamp")
    assert {int(user.split("@")[1]) for user in train["user_id"].to_list()} <= set(range(2010 - WINDOW, 2010))
    for (name,), rows in data.known.group_by("user_id"):
        year = int(str(name).split("@")[1])
        assert max(float(each) for each in rows["timestamp"]) < year * 10
    asked = replay.events.filter(pl.col("year") == 2010)
    assert len(cases) == asked.height
    for case in cases:
        user = case.request.user_id.split("@")[0]
        (at,) = asked.filter((pl.col("user_id") == user) & (pl.col("item_id") == case.request.item))["timestamp"]
        past = replay.events.filter((pl.col("user_id") == user) & (pl.col("timestamp") < at))["item_id"].to_list()
        assert [event.item_id for event in case.request.history] == past


def test_no_rating_before_the_question_is_dropped() -> None:
    # The host counts what a user has rated, and no row that it learns from has a shortened past.
    many = 400
    rows = [("u", f"i{n}", float(n % 5 + 1), float(n), 2009 + n // 200) for n in range(many)]
    schema = ["user_id", "item_id", "rating", "timestamp", "year"]
    items = {f"i{n}": Item(item_id=f"i{n}", title=f"The film {n}") for n in range(many)}
    _, cases = slice_of(Replay.of(pl.DataFrame(rows, schema=schema, orient="row"), items), 2010)
    assert [len(case.request.history) for case in cases] == list(range(200, many))


def test_ndcg_is_taken_of_each_user_and_year_alone() -> None:
    lists = ["a@1"] * 3 + ["a@2"] * 2 + ["b@1"] * 2
    liked = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    # Second of three, and first of two; what has no other film says nothing.
    values = np.array([0.5, 0.9, 0.1, 0.2, 0.3, 0.4, 0.6])
    assert ndcg_within(values, liked, lists) == pytest.approx((1 / np.log2(3) + 1) / 2)
