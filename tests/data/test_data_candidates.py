from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from data_cases import Row, dataset, random_rows, seeds, shuffled
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.candidates import CandidateSets, _SplitMix64, sample_candidates
from llmrec.data.split import SplitDataset, request_id, split_dataset
from llmrec.errors import DataError
from llmrec.pipeline.leaks import with_random_holdouts
from llmrec.recipe.schema import CandidateSection, Split
from tests.facts import Facts, raises


def cut(rows: list[Row], seed: int = 0) -> SplitDataset:
    return split_dataset(dataset(rows), Split(), seed=seed)


def many(users: int, items: int = 30) -> SplitDataset:
    """Each user has three items; item 0 is the most popular item in training."""
    rows = []
    for user in range(users):
        for step, item in enumerate((0, 1 + user % (items - 2), items - 1)):
            rows.append((f"u{user}", f"i{item:02d}", 3.0, float(step)))
    return cut(rows)


@given(seeds, st.integers(2, 7), st.sampled_from(["uniform", "popularity"]), st.sampled_from(["valid", "test"]))
def test_sets_have_target_once_and_no_seen_items(seed: int, count: int, kind: str, name: str) -> None:
    rows = random_rows(seed, items=20)
    data = cut(rows, seed)
    drawn = sample_candidates(data, name, CandidateSection(count=count, kind=kind), seed=seed)  # type: ignore[arg-type]
    touched: dict[str, set[str]] = {}
    tested = set(data.test.select("user_id", "item_id").iter_rows())
    for user, item, *_ in rows:
        if name == "test" or (user, item) not in tested:
            touched.setdefault(user, set()).add(item)
    held = data.holdouts(name)  # type: ignore[arg-type]
    assert set(drawn.sets) == {request_id(each.user_id, each.item_id) for each in held}
    for each in held:
        chosen = drawn.sets[request_id(each.user_id, each.item_id)]
        assert len(chosen) == len(set(chosen)) == count
        assert set(chosen) & touched[each.user_id] == {each.item_id}
        assert set(chosen) <= set(data.dataset.items)


@given(seeds)
def test_validation_sets_do_not_depend_on_what_is_tested(seed: int) -> None:
    data = cut(random_rows(seed, items=20), seed)
    section = CandidateSection(count=5, kind="uniform")
    sets = sample_candidates(data, "valid", section, seed=seed).sets
    assert sample_candidates(with_random_holdouts(data, "test", seed), "valid", section, seed=seed).sets == sets
    other = with_random_holdouts(
        data, "test", seed, toward={name.partition("|")[0]: items for name, items in sets.items()}
    )
    assert sample_candidates(other, "valid", section, seed=seed).sets == sets


@given(seeds, st.sampled_from(["uniform", "popularity"]))
def test_sets_do_not_depend_on_row_order(seed: int, kind: str) -> None:
    rows = random_rows(seed, items=20)
    section = CandidateSection(count=5, kind=kind)  # type: ignore[arg-type]
    one = sample_candidates(cut(rows), "test", section, seed=seed)
    assert sample_candidates(cut(shuffled(rows, seed)), "test", section, seed=seed) == one
    assert sample_candidates(cut(rows), "test", section, seed=seed + 1).digest != one.digest


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_position_of_target_is_uniform(kind: str) -> None:
    data = many(2000)
    drawn = sample_candidates(data, "test", CandidateSection(count=10, kind=kind), seed=0)  # type: ignore[arg-type]
    positions = Counter(
        drawn.sets[request_id(held.user_id, held.item_id)].index(held.item_id) for held in data.holdouts("test")
    )
    # Chi-square with 9 degrees of freedom: 27.9 is the 0.1 % point.
    assert sum((positions[n] - 200) ** 2 / 200 for n in range(10)) < 27.9


def test_uniform_negatives_are_uniform() -> None:
    data = many(2000, items=12)
    drawn = sample_candidates(data, "test", CandidateSection(count=4), seed=0)
    counts = Counter(item for chosen in drawn.sets.values() for item in chosen if item != "i11")
    middle = Counter(f"i{1 + user % 10:02d}" for user in range(2000))
    # Each user lacks 9 of the 10 middle items, and 3 are drawn: an item that a user lacks is drawn with p = 3/9.
    expected = {item: (2000 - middle[item]) / 3 for item in middle}
    assert sum((counts[item] - expected[item]) ** 2 / expected[item] for item in middle) < 27.9
    assert counts["i00"] == 0


def test_popular_negatives_follow_training_counts() -> None:
    # Item p has 99 training rows, q has none: the negatives of other users are mostly p.
    rows = [(f"fan{n}", item, 3.0, float(t)) for n in range(99) for t, item in enumerate(("p", "q", "r"))]
    rows += [(f"new{n}", item, 3.0, float(t)) for n in range(400) for t, item in enumerate(("s", "t", "v"))]
    data = cut(rows)
    drawn = sample_candidates(data, "test", CandidateSection(count=2, kind="popularity"), seed=0)
    counts = Counter(item for name, chosen in drawn.sets.items() if name.startswith("new") for item in chosen)
    # Weights 100 : 1 : 1 among p, q and r; 400 draws, so p has 392 expected with a standard deviation of 2.8.
    assert 378 <= counts["p"] <= 400


def test_popularity_draws_match_exact_probabilities() -> None:
    # Two negatives of three items with weights 8, 1 and 1: {q, r} has the probability 2 * (1/10) * (1/9).
    rows = [(f"fan{n}", item, 3.0, float(t)) for n in range(7) for t, item in enumerate(("p", "q", "r"))]
    rows += [(f"new{n}", item, 3.0, float(t)) for n in range(3000) for t, item in enumerate(("s", "t", "v"))]
    drawn = sample_candidates(cut(rows), "test", CandidateSection(count=3, kind="popularity"), seed=1)
    sets = [set(chosen) for name, chosen in drawn.sets.items() if name.startswith("new")]
    share = float(np.mean(["p" not in chosen for chosen in sets]))
    assert share == pytest.approx(2 / 90, abs=4 * (2 / 90 / 3000) ** 0.5)


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_all_unseen_items_can_be_candidates(kind: str) -> None:
    data = many(30)
    drawn = sample_candidates(data, "test", CandidateSection(count=28, kind=kind), seed=0)  # type: ignore[arg-type]
    assert {len(set(chosen)) for chosen in drawn.sets.values()} == {28}
    with raises(DataError, Facts("too-few", column="eval.candidates.count", says="at most 28")):
        sample_candidates(data, "test", CandidateSection(count=29), seed=0)


def test_round_trip(tmp_path: Path) -> None:
    drawn = sample_candidates(many(50), "test", CandidateSection(count=5), seed=3)
    path = tmp_path / "new" / "candidates.parquet"
    drawn.save(path)
    stored = pl.read_parquet(path)
    assert stored.columns == ["request_id", "candidates"]
    assert {name: tuple(chosen) for name, chosen in stored.iter_rows()} == drawn.sets
    (head,) = (value for key, value in (pq.read_schema(path).metadata or {}).items() if b"llmrec" in key)
    assert json.loads(head) == {"kind": drawn.kind, "count": 5, "seed": 3, "digest": drawn.digest}


def test_digest_depends_on_everything_but_order_of_requests() -> None:
    drawn = sample_candidates(many(50), "test", CandidateSection(count=5), seed=3)
    kind, count, seed, sets = drawn.kind, drawn.count, drawn.seed, dict(drawn.sets)
    name, first = next(iter(sets.items()))
    others = {other: items for other, items in sets.items() if other != name}
    for changed in (
        ("popularity", count, seed, sets),
        (kind, 6, seed, sets),
        (kind, count, 4, sets),
        (kind, count, seed, {**sets, name: first[::-1]}),
        (kind, count, seed, {**sets, name: ("another", *first[1:])}),
        (kind, count, seed, others),
    ):
        assert CandidateSets.of(*changed).digest != drawn.digest
    assert CandidateSets.of(kind, count, seed, {**others, name: first}).digest == drawn.digest


def test_pinned_set() -> None:
    """The same data and seed give the same candidates on every machine and with every library version."""
    drawn = sample_candidates(many(12, items=12), "test", CandidateSection(count=5), seed=0)
    assert drawn.digest == "acd3696c00ddc2f320f3d74bf66d7edfc641625d6a72d734f46d12ce592b8bdc"


def test_numbers_are_splitmix64() -> None:
    # The published outputs for the seed 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    published += [4593380528125082431, 16408922859458223821]
    numbers = _SplitMix64(1234567)
    drawn = [*numbers.below(2**63, 2).tolist(), *numbers.below(2**63, 3).tolist()]
    assert drawn == [number % 2**63 for number in published]


@given(seeds, st.integers(1, 6), st.sampled_from(["uniform", "popularity"]), st.sampled_from(["valid", "test"]))
def test_sets_do_not_depend_on_other_users(seed: int, count: int, kind: str, name: str) -> None:
    data = cut(random_rows(seed, items=20), seed)
    section = CandidateSection(count=5, kind=kind)  # type: ignore[arg-type]
    held = data.holdouts(name)  # type: ignore[arg-type]
    users = dict.fromkeys(each.user_id for each in held)
    first = held.first_users(count)
    assert first == tuple(users)[:count] and held.first_users(count, but=first) == tuple(users)[count : 2 * count]
    part = [request_id(each.user_id, each.item_id) for each in held.of(first)]
    assert part == [request_id(each.user_id, each.item_id) for each in held if each.user_id in first]
    every = sample_candidates(data, name, section, seed=seed)  # type: ignore[arg-type]
    some = sample_candidates(data, name, section, seed=seed, users=frozenset(first))  # type: ignore[arg-type]
    assert list(some.sets) == part
    assert some.digest == CandidateSets.of(kind, 5, seed, {each: every.sets[each] for each in part}).digest
    assert sample_candidates(data, name, section, seed=seed, users=frozenset(users)).digest == every.digest  # type: ignore[arg-type]
