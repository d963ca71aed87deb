"""Mixtures of the training rows of tasks, and pools of a fixed number of rows."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_data import EVERY, make_dataset, make_split, make_task, mixture

from llmrec.errors import RecipeError
from llmrec.recipe.schema import TrainSection
from llmrec.tasks.mixture import training_shares
from llmrec.tasks.pool import distinct_examples, training_examples
from llmrec.types import Example, Message, Segment
from tests.facts import Facts, raises


class Stub:
    """A task with a stream of training rows only."""

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


def test_sizes_make_shares_of_tokens() -> None:
    sizes = {"rating": 30, "sequential": 300, "direct": 200}
    tasks: Any = {name: (task, 1.0) for name, task in STUBS.items()}
    spent: collections.Counter[str] = collections.Counter()
    for row in islice(mixture(tasks, 0, size=lambda row: sizes[row.task]), 3000):
        spent[row.task] += sizes[row.task]
    assert max(spent.values()) - min(spent.values()) <= 300
    assert len({row.task for row in islice(mixture(tasks, 0, size=lambda row: 0), 3)}) == 3


def test_order_is_fixed_and_weight_0_is_skipped() -> None:
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


SIZES = {"rating": 8000, "sequential": 1000, "direct": 125}


def section(**keys: Any) -> TrainSection:
    return TrainSection(**keys)


def size_of(name: str) -> int:
    return SIZES[name]


def test_weights_need_no_sizes() -> None:
    def never(name: str) -> int:
        raise AssertionError(name)

    weights = {"rating": 3.0, "sequential": 0.0, "direct": 1.0}
    assert training_shares(weights, never, section()) == {"rating": 3.0, "direct": 1.0}
    assert training_shares(weights, never, section(mixture="equal")) == {"rating": 0.5, "direct": 0.5}
    result = training_shares(weights, size_of, section(mixture="proportional"))
    assert result == pytest.approx({"rating": 8000 / 8125, "direct": 125 / 8125})


def test_shares_of_sizes_by_hand() -> None:
    ones = dict.fromkeys(SIZES, 1.0)
    result = training_shares(ones, size_of, section(mixture="proportional"))
    assert result == {"rating": 8000 / 9125, "sequential": 1000 / 9125, "direct": 125 / 9125}
    # Cube roots are 20, 10 and 5.
    result = training_shares(ones, size_of, section(mixture="temperature", temperature=3))
    assert result == pytest.approx({"rating": 20 / 35, "sequential": 10 / 35, "direct": 5 / 35})
    # Sizes above the limit count as the limit, before the root is taken.
    result = training_shares(ones, size_of, section(mixture="proportional", mixture_limit=1000))
    assert result == pytest.approx({"rating": 1000 / 2125, "sequential": 1000 / 2125, "direct": 125 / 2125})
    result = training_shares(ones, size_of, section(mixture="temperature", temperature=3, mixture_limit=1000))
    assert result == pytest.approx({"rating": 10 / 25, "sequential": 10 / 25, "direct": 5 / 25})


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 10**6), min_size=2), st.floats(1, 50))
def test_temperature_is_between_proportional_and_equal(sizes: dict[str, int], temperature: float) -> None:
    ones = dict.fromkeys(sizes, 1.0)
    flat, warm, cold = (
        training_shares(ones, sizes.__getitem__, section(mixture=kind, temperature=temperature))
        for kind in ("equal", "temperature", "proportional")
    )
    assert sum(warm.values()) == pytest.approx(1)
    largest, least = max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)
    assert flat[largest] - 1e-9 <= warm[largest] <= cold[largest] + 1e-9
    assert cold[least] - 1e-9 <= warm[least] <= flat[least] + 1e-9
    if temperature == 1:
        assert warm == cold


DATA = make_split(make_dataset(hostile=False), kind="last_share")


def shown(example: Example) -> Any:
    return (example.user_id, example.pairs) if example.pairs else (example.messages, example.answer)


@pytest.mark.parametrize(("family", "count"), [*((family, 16) for family in EVERY), ("rating", 1), ("ctr", 5)])
def test_pool_has_requested_number_of_distinct_rows(family: str, count: int) -> None:
    task = make_task(family, DATA)
    rows = distinct_examples(task, count)
    assert len(rows) == len({shown(row) for row in rows}) == len({row.id for row in rows}) == count
    assert not {pair for row in rows for pair in row.pairs} & DATA.held_out
    assert rows == distinct_examples(make_task(family, DATA), count)
    drawn = list(islice(training_examples(task, count, 0), 3 * count))
    for number in range(3):
        assert collections.Counter(drawn[number * count : (number + 1) * count]) == collections.Counter(rows)
    if count == 16:
        assert drawn[:count] != drawn[count : 2 * count]


def test_no_limit_gives_the_stream() -> None:
    task = make_task("rating", DATA)
    assert list(islice(training_examples(task, None, 0), 50)) == list(task.examples("train", 50))


@pytest.mark.parametrize("count", [2, 101])
def test_pools_are_balanced_and_nested(count: int) -> None:
    # With liked=5, about one row of five is a yes.
    task = make_task("ctr", DATA, liked=5.0)
    rows = distinct_examples(task, count)
    counts = collections.Counter(task.kind(row) for row in rows)
    assert counts["Yes"] + counts["No"] == count
    assert abs(counts["Yes"] - counts["No"]) <= count % 2
    assert set(distinct_examples(task, count // 2)) <= set(rows)


class Lopsided:
    """A task with a finite number of rows, few of them with the class yes."""

    family = "ctr"
    kinds = ("yes", "no")

    def __init__(self, yes: int, no: int) -> None:
        self._kinds = ["yes"] * yes + ["no"] * no

    def examples(self, split: str, limit: int | None = None) -> Iterator[Example]:
        while True:
            for number, kind in enumerate(self._kinds):
                turn = (Message("user", (Segment("text", f"{kind} {number}"),)),)
                yield Example(
                    id=f"{number}", user_id="u", task="ctr", template="ctr/t", messages=turn, answer=(), ends_turn=True,
                    pairs=(("u", f"{number}"),),
                )  # fmt: skip

    def kind(self, example: Example) -> str:
        return example.messages[0].text.split()[0]


def test_scarce_class_is_filled_up() -> None:
    task: Any = Lopsided(3, 50)
    counts = collections.Counter(task.kind(row) for row in distinct_examples(task, 16))
    assert counts == {"yes": 3, "no": 13}
    with raises(RecipeError, Facts("too-few", column="train.examples", says=("53", "54"))):
        distinct_examples(task, 54)
