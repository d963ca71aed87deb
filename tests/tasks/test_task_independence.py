"""Training rows and few-shot examples do not depend on held-out interactions."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pytest
from task_data import CLASSES, EVERY, asking, load_templates, make_dataset, make_split, make_task

from eval.benchmarks.negatives import Knowing, chance, ndcg
from llmrec.data.candidates import sample_candidates
from llmrec.data.sets.table import load_data
from llmrec.data.split import SplitDataset, request_id, split_dataset
from llmrec.errors import DataError
from llmrec.pipeline.leaks import with_random_holdouts
from llmrec.recipe.schema import CandidateSection, DataSection, Split
from llmrec.tasks.pool import NegativeSampler
from llmrec.types import Example
from tests.facts import Facts, raises
from tests.tasks.making import make

KINDS = ("leave_one_out", "last_share", "global_time", "user_disjoint")


@cache
def data_of(kind: str) -> SplitDataset:
    return make_split(make_dataset(hostile=False), kind=kind)


def other_holdouts(data: SplitDataset, seed: int) -> SplitDataset:
    return with_random_holdouts(with_random_holdouts(data, "valid", seed), "test", seed + 100)


def rows_of(task: Any, count: int = 300) -> list[Example]:
    return list(islice(task.examples("train"), count))


@pytest.mark.parametrize(
    ("family", "kind"), [*((family, KINDS[0]) for family in EVERY), *(("direct", kind) for kind in KINDS[1:])]
)
def test_training_rows_do_not_depend_on_holdouts(family: str, kind: str) -> None:
    data = data_of(kind)
    task = make_task(family, data)
    other = make_task(family, other_holdouts(data, 0))
    assert rows_of(other) == rows_of(task)
    if family in ("sequential", "rating"):
        branches = [[each.branch(n, user) for n in range(3) for user in data.users()[:10]] for each in (task, other)]
        assert branches[0] == branches[1] and any(branches[0])


@pytest.mark.parametrize(
    ("family", "choice"),
    [*((family, "random") for family in EVERY), *(("rating", choice) for choice in ("own", "similar", "recent"))],
)
def test_shots_do_not_depend_on_holdouts(family: str, choice: str) -> None:
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
            prompts = [each.prompt(request, template="shortlist", shots=3, want="yes") for each in (task, other)]
            assert prompts[0] == prompts[1]
        assert other.questions(200) == task.questions(200)


@pytest.mark.parametrize("family", EVERY)
def test_validation_rows_do_not_depend_on_test_interactions(family: str) -> None:
    data = data_of("last_share")
    rows = [list(make_task(family, used).examples("valid")) for used in (data, with_random_holdouts(data, "test"))]
    assert rows[0] == rows[1] and rows[0]


def test_leaking_negatives_change_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons of the tests above can fail."""
    monkeypatch.setattr("llmrec.tasks.direct.NegativeSampler", Knowing)
    data = data_of("leave_one_out")
    task, other = make_task("direct", data), make_task("direct", other_holdouts(data, 0))
    assert rows_of(task) != rows_of(other)
    assert task.questions(200) != other.questions(200)
    valid = make_task("direct", with_random_holdouts(data, "test"))
    assert list(task.examples("valid")) != list(valid.examples("valid"))


@pytest.mark.parametrize("kind", ["leave_one_out", "user_disjoint"])
def test_negatives_are_recorded_and_not_in_training(kind: str) -> None:
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
    # Users without training data have no rows; negatives of all others include held-out items.
    assert (held > 0) == (kind != "user_disjoint")


@pytest.mark.parametrize("popular", [False, True])
def test_held_out_items_are_drawn_like_others(popular: bool) -> None:
    """Held-out items are drawn uniformly, or by their popularity in the training data."""
    data = data_of("leave_one_out")
    negatives = NegativeSampler(data, "popularity" if popular else "uniform")
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


def test_all_remaining_items_can_be_drawn() -> None:
    data = data_of("leave_one_out")
    negatives, user = NegativeSampler(data, "uniform"), data.users()[0]
    free = sorted(data.dataset.items.keys() - {event.item_id for event in data.train_events(user)})
    rng = random.Random(0)
    assert sorted(negatives.draw(user, len(free), rng)) == free
    assert set(negatives.draw(user, len(free) - 2, rng, but=free[:2])) == set(free[2:])
    with raises(DataError, Facts("too-few", column="eval.candidates.count")):
        negatives.draw(user, len(free) + 1, rng)


def test_counting_negatives_does_not_reveal_the_answer() -> None:
    """Use 20 candidates, and 25 rows per user of MovieLens-100K; `eval.benchmarks.negatives` uses all users."""
    pytest.importorskip("recbole", reason="the wheel with MovieLens-100K is not installed")
    dataset = load_data(DataSection(source="movielens-100k"), seed=0)
    users = sorted(dataset.interactions["user_id"].unique())[:80]
    some = dataset.interactions.filter(dataset.interactions["user_id"].is_in(users))
    data = split_dataset(replace(dataset, interactions=some), Split(), seed=0)
    sets = sample_candidates(data, "test", CandidateSection(count=20), seed=0)
    kind, section = CLASSES["direct"]
    task = make(kind, data, section(templates=("profile-only",)), load_templates("direct"), seed=0, candidates=sets)
    # Ranks by how rarely an item was shown to the user as a negative.
    shown: dict[str, Counter[str]] = defaultdict(Counter)
    for row in islice(task.examples("train"), 25 * len(users)):
        shown[row.user_id].update(row.negatives)
    cases = [(sets.sets[request_id(held.user_id, held.item_id)], held) for held in data.holdouts("test")]
    scores = np.array([ndcg(items, held.item_id, shown[held.user_id]) for items, held in cases])
    error = float(scores.std(ddof=1)) / math.sqrt(len(scores))
    assert len(scores) == 80
    assert abs(scores.mean() - chance(20)) < 3 * error
