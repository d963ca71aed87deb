"""The split cold_items: training, histories and counts use no data of a cold-start item except its text."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import Any

import numpy as np
import polars as pl
import pytest
from data_cases import Row, dataset, pairs, seeds, shuffled
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmrec.baselines.base import Catalogue, InteractionLog, item_counts
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.data.stats import statistics
from llmrec.errors import DataError
from llmrec.pipeline.leaks import audit_training_interactions
from llmrec.recipe.schema import Split
from tests.facts import Facts, raises


def cut(rows: list[Row], seed: int = 0, *, timed: bool = True, **keys: Any) -> SplitDataset:
    section = Split(**{"kind": "cold_items", "valid": 0.25, "test": 0.25} | keys)
    return split_dataset(dataset(rows, timed=timed), section, seed=seed)


def drawn(rows: list[Row], seed: int, **keys: Any) -> SplitDataset:
    """Split like `cut`; reject seeds with too few held-out cold-start items."""
    try:
        return cut(rows, seed, **keys)
    except DataError as error:
        assert error.kind == "too-few"
        assume(False)
        raise


def many(seed: int, *, repeats: bool = False, users: int = 60, items: int = 60) -> list[Row]:
    """Return rows of users with 2 to 12 events each, with many ties in time."""
    rng = np.random.default_rng(seed)
    return [
        (f"u{user}", f"i{item}", 1.0, float(rng.integers(1, 9)))
        for user in range(users)
        for item in rng.choice(items, size=int(rng.integers(2, 13)), replace=repeats).tolist()
    ]


@settings(max_examples=12)
@given(seeds, st.booleans(), st.booleans())
def test_cold_items_are_in_no_training_history_or_count(seed: int, repeats: bool, timed: bool) -> None:
    rows = many(seed, repeats=repeats)
    data = drawn(rows, seed, timed=timed)
    train, valid, test = set(pairs(data.train)), set(pairs(data.valid)), set(pairs(data.test))
    assert data.cold and not {item for _, item in train} & data.cold and data.known.is_empty()
    assert data.held_out == valid | test | {row[:2] for row in rows if row[1] in data.cold}
    assert not data.held_out & train
    for name in ("valid", "test"):
        for held in data.holdouts(name):
            history = {event.item_id for event in data.history(held.user_id, name)}
            assert history and not history & data.cold and held.item_id not in history
    catalogue = Catalogue.of(data)
    popular = item_counts(InteractionLog.of(data, catalogue), catalogue)
    assert not popular[catalogue.indices(sorted(data.cold))].any()
    # The catalogue keeps them.
    assert data.cold <= set(data.dataset.items)


@settings(max_examples=12)
@given(seeds, st.booleans())
def test_held_out_users_have_a_cold_and_a_warm_item(seed: int, repeats: bool) -> None:
    data = drawn(many(seed, repeats=repeats), seed)
    assert not set(data.valid["user_id"]) & set(data.test["user_id"])
    last = dict(data.train.group_by("user_id").agg(pl.col("timestamp").max()).iter_rows())
    for frame in (data.valid, data.test):
        held = frame.with_columns(cold=pl.col("item_id").is_in(sorted(data.cold)))
        for (user,), rows in held.group_by("user_id"):
            assert sorted(rows["cold"].to_list()) == [False, True]
            assert rows["timestamp"].min() >= last[user]
    assert audit_training_interactions(data).verdict != "leak"
    # The items of test are not those of validation.
    of = {name: {row.item_id for row in data.holdouts(name)} & data.cold for name in ("valid", "test")}
    assert of["valid"] and of["test"] and not of["valid"] & of["test"]


@settings(max_examples=6)
@given(seeds)
def test_cold_items_depend_on_the_seed_alone(seed: int) -> None:
    rows = many(seed)
    one, other = drawn(rows, seed), drawn(shuffled(rows, seed + 1), seed)
    assert one.fingerprint == other.fingerprint and one.cold == other.cold
    assert drawn(rows, seed + 1).cold != one.cold
    # The hash of an item does not depend on other items.
    part = drawn([row for row in rows if row[1] != "i0"], seed)
    assert part.cold == one.cold - {"i0"}


def test_interactions_with_cold_items_change_nothing() -> None:
    rows = many(3)
    data = cut(rows)
    held = set(pairs(data.test)) | set(pairs(data.valid))
    less = cut([row for row in rows if row[1] not in data.cold or row[:2] in held])
    assert less.readable == data.readable and set(pairs(less.test)) == set(pairs(data.test))


def test_example_by_hand() -> None:
    base = [(f"w{n}", f"i{k}", 1.0, float(k)) for n in range(3) for k in range(6)]
    cold = cut([*base, *many(1)]).cold
    one, warm = sorted(cold)[0], [f"i{k}" for k in range(60) if f"i{k}" not in cold][:3]
    order = {"late": [*warm, one], "middle": [*warm[:2], one, warm[2]], "early": [warm[0], one, *warm[1:]]}
    rows = [(user, item, 1.0, float(k)) for user, items in order.items() for k, item in enumerate(items)]
    data = cut([*many(1), *rows])
    held = set(pairs(data.test)) | set(pairs(data.valid))
    for user in ("late", "middle"):
        assert {item for name, item in held if name == user} == {one, warm[2]}
        assert [event.item_id for event in data.train_events(user)] == warm[:2]
    # Two warm events come after it, so evaluating it would leak later events.
    assert not [item for name, item in held if name == "early"]
    assert [event.item_id for event in data.train_events("early")] == warm


def test_items_first_seen_after_a_date() -> None:
    day = 86400.0
    rows = [(user, item, rating, when * day) for user, item, rating, when in many(2)]
    first: dict[str, float] = {}
    for _, item, _, when in rows:
        first[item] = min(when, first.get(item, when))
    rows += [(f"u{n}", f"new{n % 3}", 1.0, 20 * day) for n in range(20)]
    data = cut(rows, after="1970-01-21")
    assert {held.item_id for held in data.holdouts("test")} & data.cold == {"new0", "new1", "new2"}
    # The items for validation are drawn from the others.
    assert data.valid.height and len(data.cold) > 3
    assert data.readable == cut(rows, after=20 * day).readable
    assert Split.model_validate({"kind": "cold_items", "after": date(1970, 1, 21)}).since == 20 * day
    with raises(DataError, Facts("contradiction", column="data.split.after")):
        cut(rows, after=1.0, timed=False)
    with raises(DataError, Facts("too-few", column="data.split.test")):
        cut(rows, after="2030-01-01")
    for wrong, says in (({"kind": "last_share", "after": 1.0}, "kind: cold_items"), ({"after": "soon"}, "ISO date")):
        with pytest.raises(ValueError, match=says):
            Split.model_validate({"kind": "cold_items"} | wrong)


def test_audit_finds_cold_items_in_training() -> None:
    data = cut(many(5))
    assert audit_training_interactions(data).verdict != "leak"
    item = sorted(data.cold)[0]
    row = data.train[:1].with_columns(pl.lit(item).cast(data.train["item_id"].dtype).alias("item_id"))
    result = audit_training_interactions(replace(data, train=pl.concat([data.train, row])))
    assert result.verdict == "leak" and item in result.examples[0]
    both = audit_training_interactions(replace(data, valid=pl.concat([data.valid, data.test])))
    assert both.verdict == "leak" and "both splits" in both.examples[0]


def test_statistics_count_cold_targets() -> None:
    data = cut(many(7))
    assert statistics(data)["cold_items_test"] == data.test.height // 2
