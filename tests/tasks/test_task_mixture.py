from __future__ import annotations

import collections
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_data import make_task, mixture

from llmrec.errors import RecipeError
from llmrec.recipe.schema import TrainSection
from llmrec.tasks.mixture import shares
from llmrec.types import Example
from tests.facts import Facts, raises


class Stub:
    """A task of which only the stream is asked for."""

    def __init__(self, family: Any) -> None:
        self.family = family

    def examples(self, split: str, limit: int | None = None) -> Any:
        assert split == "train"
        number = 0
        while True:
            yield Example(
                id=str(number), user_id="u", task=self.family, template="t", messages=(), answer=(), ends_turn=True
            )
            number += 1


STUBS = {name: Stub(name) for name in ("rating", "sequential", "direct")}


@given(st.lists(st.integers(1, 9), min_size=3, max_size=3), st.integers(0, 9), st.integers(1, 400))
def test_rows_follow_the_weights(weights: list[int], seed: int, rows: int) -> None:
    tasks: Any = {name: (STUBS[name], weight) for name, weight in zip(STUBS, weights, strict=True)}
    counts = collections.Counter(row.task for row in islice(mixture(tasks, seed), rows))
    for name, weight in zip(STUBS, weights, strict=True):
        assert abs(counts[name] - rows * weight / sum(weights)) <= len(STUBS)


def test_shares_are_of_tokens_where_a_size_is_given() -> None:
    sizes = {"rating": 30, "sequential": 300, "direct": 200}
    tasks: Any = {name: (task, 1.0) for name, task in STUBS.items()}
    spent: collections.Counter[str] = collections.Counter()
    for row in islice(mixture(tasks, 0, size=lambda row: sizes[row.task]), 3000):
        spent[row.task] += sizes[row.task]
    assert max(spent.values()) - min(spent.values()) <= 300


def test_order_is_fixed_and_weight_0_gives_no_rows() -> None:
    tasks: Any = {
        "rating": (make_task("rating"), 1.0),
        "direct": (make_task("direct"), 2.0),
        "none": (STUBS["rating"], 0.0),
    }
    one, two = (list(islice(mixture(tasks, 3), 30)) for _ in range(2))
    assert one == two
    assert collections.Counter(row.task for row in one) == {"rating": 10, "direct": 20}
    assert list(islice(mixture(dict(reversed(tasks.items())), 3), 30)) == one
    with raises(RecipeError, Facts("bad-value", column="tasks", says="tasks.<family>.weight")):
        mixture({"rating": (tasks["rating"][0], 0.0)}, 0)


def test_a_size_of_0_does_not_starve_the_others() -> None:
    tasks: Any = {name: (task, 1.0) for name, task in STUBS.items()}
    assert len({row.task for row in islice(mixture(tasks, 0, size=lambda row: 0), 3)}) == 3


SIZES = {"rating": 8000, "sequential": 1000, "direct": 125}


def section(**keys: Any) -> TrainSection:
    return TrainSection(**keys)


def asked(name: str) -> int:
    return SIZES[name]


def test_weights_are_handed_on_and_no_size_is_asked_for() -> None:
    def never(name: str) -> int:
        raise AssertionError(name)

    weights = {"rating": 3.0, "sequential": 0.0, "direct": 1.0}
    assert shares(weights, never, section()) == {"rating": 3.0, "direct": 1.0}
    assert shares(weights, never, section(mixture="equal")) == {"rating": 0.5, "direct": 0.5}


def test_shares_of_sizes_by_hand() -> None:
    ones = dict.fromkeys(SIZES, 1.0)
    found = shares(ones, asked, section(mixture="proportional"))
    assert found == {"rating": 8000 / 9125, "sequential": 1000 / 9125, "direct": 125 / 9125}
    # Cube roots are 20, 10 and 5.
    found = shares(ones, asked, section(mixture="temperature", temperature=3))
    assert found == pytest.approx({"rating": 20 / 35, "sequential": 10 / 35, "direct": 5 / 35})
    # What is above the limit counts as the limit, before the root is taken.
    found = shares(ones, asked, section(mixture="proportional", mixture_limit=1000))
    assert found == pytest.approx({"rating": 1000 / 2125, "sequential": 1000 / 2125, "direct": 125 / 2125})
    found = shares(ones, asked, section(mixture="temperature", temperature=3, mixture_limit=1000))
    assert found == pytest.approx({"rating": 10 / 25, "sequential": 10 / 25, "direct": 5 / 25})


def test_own_weights_only_say_who_takes_part_in_other_mixtures() -> None:
    weights = {"rating": 9.0, "sequential": 0.0, "direct": 0.1}
    found = shares(weights, asked, section(mixture="proportional"))
    assert found == pytest.approx({"rating": 8000 / 8125, "direct": 125 / 8125})


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 10**6), min_size=2), st.floats(1, 50))
def test_temperature_lies_between_proportional_and_equal(sizes: dict[str, int], temperature: float) -> None:
    ones = dict.fromkeys(sizes, 1.0)
    flat, warm, cold = (
        shares(ones, sizes.__getitem__, section(mixture=kind, temperature=temperature))
        for kind in ("equal", "temperature", "proportional")
    )
    assert sum(warm.values()) == pytest.approx(1)
    largest, least = max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)
    assert flat[largest] - 1e-9 <= warm[largest] <= cold[largest] + 1e-9
    assert cold[least] - 1e-9 <= warm[least] <= flat[least] + 1e-9
    if temperature == 1:
        assert warm == cold
