"""Few fixed training rows: exactly so many, all different, classes alike, the same every time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from task_data import EVERY, make_dataset, make_split, make_task

from llmrec.errors import RecipeError
from llmrec.tasks.pool import pool, training_examples
from llmrec.types import Example, Message, Segment
from tests.facts import Facts, raises

DATA = make_split(make_dataset(hostile=False), kind="last_share")


def shown(example: Example) -> Any:
    return (example.user_id, example.pairs) if example.pairs else (example.messages, example.answer)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("count", [1, 5, 16])
def test_a_pool_holds_exactly_so_many_different_rows(family: str, count: int) -> None:
    task = make_task(family, DATA)
    rows = pool(task, count)
    assert len(rows) == len({shown(row) for row in rows}) == len({row.id for row in rows}) == count
    assert not {pair for row in rows for pair in row.pairs} & DATA.held_out
    assert rows == pool(make_task(family, DATA), count)
    drawn = list(islice(training_examples(task, count, 0), 3 * count))
    for number in range(3):
        assert Counter(drawn[number * count : (number + 1) * count]) == Counter(rows)
    if count == 16:
        assert drawn[:count] != drawn[count : 2 * count]


@pytest.mark.parametrize("family", EVERY)
def test_without_a_number_it_is_the_stream(family: str) -> None:
    task = make_task(family, DATA)
    assert list(islice(training_examples(task, None, 0), 50)) == list(task.examples("train", 50))


@pytest.mark.parametrize("count", [2, 16, 64, 101])
def test_yes_and_no_are_alike_and_small_pools_are_part_of_large_ones(count: int) -> None:
    # With liked=5, about one row of five is a yes.
    task = make_task("ctr", DATA, liked=5.0)
    rows = pool(task, count)
    counts = Counter(task.kind(row) for row in rows)
    assert counts["Yes"] + counts["No"] == count
    assert abs(counts["Yes"] - counts["No"]) <= count % 2
    assert set(pool(task, count // 2)) <= set(rows)


class Lopsided:
    """A finite stock of rows, few of them of the class yes."""

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


def test_a_class_that_runs_out_is_made_up_for_by_the_other() -> None:
    task: Any = Lopsided(3, 50)
    counts = Counter(task.kind(row) for row in pool(task, 16))
    assert counts == {"yes": 3, "no": 13}
    with raises(RecipeError, Facts("too-few", column="train.examples", says=("53", "54"))):
        pool(task, 54)
