"""Training rows and few-shot examples do not depend on held-out interactions, not even by what they never show."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pytest
from task_data import CLASSES, EVERY, asking, load_templates, make_dataset, make_split, make_task

from eval.benchmarks.negatives import Knowing, chance, ndcg
from llmrec.data.candidates import CandidateSets, draw
from llmrec.data.sets.table import load
from llmrec.data.split import SplitDataset, request_id, split
from llmrec.errors import DataError
from llmrec.pipeline.leaks import redrawn
from llmrec.recipe.schema import CandidateSection, DataSection, Split
from llmrec.tasks.pool import Negatives
from llmrec.types import Example
from tests.facts import Facts, raises
from tests.tasks.making import make

KINDS = ("leave_one_out", "last_share", "global_time", "user_disjoint")


@cache
def data_of(kind: str) -> SplitDataset:
    return make_split(make_dataset(hostile=False), kind=kind)


def other_holdouts(data: SplitDataset, seed: int) -> SplitDataset:
    return redrawn(redrawn(data, "valid", seed), "test", seed + 100)


def rows_of(task: Any, count: int = 300) -> list[Example]:
    return list(islice(task.examples("train"), count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", EVERY)
def test_other_holdouts_leave_every_training_row_as_it_is(family: str, kind: str) -> None:
    data = data_of(kind)
    task = make_task(family, data)
    other = make_task(family, other_holdouts(data, 0))
    assert rows_of(other) == rows_of(task)
    if family in ("sequential", "rating"):
        branches = [[each.branch(n, user) for n in range(3) for user in data.users()[:10]] for each in (task, other)]
        assert branches[0] == branches[1] and any(branches[0])


@pytest.mark.parametrize("choice", ["random", "own", "similar", "recent"])
@pytest.mark.parametrize("family", EVERY)
def test_other_holdouts_leave_every_few_shot_example_as_it_is(family: str, choice: str) -> None:
    """The request stays the same: its id, its history and its candidates."""
    data = data_of("leave_one_out")
    task = make_task(family, data, shot_choice=choice)
    other = make_task(family, other_holdouts(data, 0), shot_choice=choice)
    for case in task.cases("test")[:5]:
        for name in asking(family):
            assert other.prompt(case.request, template=name, shots=2) == task.prompt(
                case.request, template=name, shots=2
            )
    if family == "direct":
        alone = [replace(case.request, candidates=case.request.candidates[:1]) for case in task.cases("test")[:10]]
        for request in alone:
            asked = [each.prompt(request, template="shortlist", shots=3, want="yes") for each in (task, other)]
            assert asked[0] == asked[1]
        assert other.questions(200) == task.questions(200)


@pytest.mark.parametrize("family", EVERY)
def test_other_test_interactions_leave_every_validation_row_as_it_is(family: str) -> None:
    data = data_of("last_share")
    rows = [list(make_task(family, used).examples("valid")) for used in (data, redrawn(data, "test"))]
    assert rows[0] == rows[1] and rows[0]


def test_negatives_that_know_what_is_held_out_move_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above compare can differ."""
    monkeypatch.setattr("llmrec.tasks.direct.Negatives", Knowing)
    data = data_of("leave_one_out")
    task, other = make_task("direct", data), make_task("direct", other_holdouts(data, 0))
    assert rows_of(task) != rows_of(other)
    assert task.questions(200) != other.questions(200)
    valid = make_task("direct", redrawn(data, "test"))
    assert list(task.examples("valid")) != list(valid.examples("valid"))


# --------------------------------------------------------------------------- what a row says of its negatives


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_records_its_negatives_and_they_are_no_training_items(kind: str) -> None:
    data = data_of(kind)
    held, drawn = 0, set()
    for row in rows_of(make_task("direct", data, templates=("profile-only",)), 1000):
        trained = {event.item_id for event in data.train_events(row.user_id)}
        assert len(set(row.negatives)) == len(row.negatives) == 9
        assert not trained & set(row.negatives)
        (target,) = {item for _, item in row.pairs}
        assert all(f"Film #{item[1:]}!" in row.messages[-1].text for item in (target, *row.negatives))
        held += sum((row.user_id, item) in data.held_out for item in row.negatives)
        drawn.update(row.negatives)
    assert drawn == set(data.dataset.items)
    # Users who are held out whole have no rows; all others are shown held-out items as negatives.
    assert (held > 0) == (kind != "user_disjoint")


@pytest.mark.parametrize("family", [family for family in EVERY if family != "direct"])
def test_families_without_candidates_have_no_negatives(family: str) -> None:
    assert not any(row.negatives for row in rows_of(make_task(family, data_of("leave_one_out"))))


@pytest.mark.parametrize("popular", [False, True])
def test_a_held_out_item_is_drawn_as_often_as_any_other(popular: bool) -> None:
    """By popularity, as often as training alone says."""
    data = data_of("leave_one_out")
    negatives = Negatives(data, "popularity" if popular else "uniform")
    counts = Counter(data.train["item_id"].to_list())
    user = data.users()[0]
    trained = {event.item_id for event in data.train_events(user)}
    free = sorted(data.dataset.items.keys() - trained)
    rng = random.Random(0)
    seen = Counter(negatives.draw(user, 1, rng)[0] for _ in range(20_000))
    weights = np.array([1.0 + counts[item] if popular else 1.0 for item in free])
    expected = 20_000 * weights / weights.sum()
    chi2 = float(((np.array([seen[item] for item in free]) - expected) ** 2 / expected).sum())
    # The 99.99 % point of chi-square, by Wilson and Hilferty.
    n = len(free) - 1
    assert set(seen) == set(free) and chi2 < n * (1 - 2 / (9 * n) + 3.72 * math.sqrt(2 / (9 * n))) ** 3


def test_all_items_that_are_left_can_be_drawn_and_no_more() -> None:
    data = data_of("leave_one_out")
    negatives, user = Negatives(data, "uniform"), data.users()[0]
    free = sorted(data.dataset.items.keys() - {event.item_id for event in data.train_events(user)})
    rng = random.Random(0)
    assert sorted(negatives.draw(user, len(free), rng)) == free
    assert set(negatives.draw(user, len(free) - 2, rng, but=free[:2])) == set(free[2:])
    with raises(DataError, Facts("too-few", column="eval.candidates.count")):
        negatives.draw(user, len(free) + 1, rng)


# --------------------------------------------------------------------------- an attack


def attacked(data: SplitDataset, sets: CandidateSets, task: Any, rows: int) -> np.ndarray[Any, Any]:
    """Return the NDCG@10 of each user for who counts which items the user was never shown as a negative."""
    shown: dict[str, Counter[str]] = defaultdict(Counter)
    stream: Iterator[Example] = islice(task.examples("train"), rows * len(data.users()))
    for row in stream:
        shown[row.user_id].update(row.negatives)
    asked = [(sets.sets[request_id(held.user_id, held.item_id)], held) for held in data.holdouts("test")]
    return np.array([ndcg(items, held.item_id, shown[held.user_id]) for items, held in asked])


@pytest.mark.parametrize("knows", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_never_a_negative_does_not_tell_the_answer(knows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 candidates, 40 rows a user of MovieLens-100K: chance; and far above it where negatives are as they were.

    `eval.benchmarks.negatives` has all users.
    """
    pytest.importorskip("recbole", reason="the wheel with MovieLens-100K is not installed")
    if knows:
        monkeypatch.setattr("llmrec.tasks.direct.Negatives", Knowing)
    whole = load(DataSection(source="movielens-100k"), seed=0)
    users = sorted(whole.interactions["user_id"].unique())[:120]
    some = whole.interactions.filter(whole.interactions["user_id"].is_in(users))
    data = split(replace(whole, interactions=some), Split(), seed=0)
    sets = draw(data, "test", CandidateSection(count=20), seed=0)
    kind, section = CLASSES["direct"]
    task = make(kind, data, section(templates=("profile-only",)), load_templates("direct"), seed=0, candidates=sets)
    found = attacked(data, sets, task, 40)
    error = float(found.std(ddof=1)) / math.sqrt(len(found))
    assert len(found) == 120
    if knows:
        assert found.mean() > chance(20) + 8 * error and found.mean() > 2 * chance(20)
    else:
        assert abs(found.mean() - chance(20)) < 3 * error
