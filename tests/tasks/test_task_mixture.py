from __future__ import annotations

import collections
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_data import make_task, mixture

from llmrec.errors import RecipeError
from llmrec.types import Example


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
@settings(max_examples=60, deadline=None)
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
    with pytest.raises(RecipeError, match="weight 0"):
        mixture({"rating": (tasks["rating"][0], 0.0)}, 0)


def test_a_size_of_0_does_not_starve_the_others() -> None:
    tasks: Any = {name: (task, 1.0) for name, task in STUBS.items()}
    assert len({row.task for row in islice(mixture(tasks, 0, size=lambda row: 0), 3)}) == 3
