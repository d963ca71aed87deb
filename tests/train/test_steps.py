"""Rows and steps come out of flat arrays as they went in, and lie there in about five bytes a token."""

from __future__ import annotations

import random
import sys

from hypothesis import given
from hypothesis import strategies as st

from llmrec.backends.encode import IGNORED, TokenRow
from llmrec.train.batches import plan
from llmrec.train.packing import Bin
from llmrec.train.steps import RowTable, Step, Steps

TOKENS = st.integers(0, 2**31 - 1)


@st.composite
def rows(draw: st.DrawFn) -> TokenRow:
    """A row whose labels are its tokens, or classes, or nothing."""
    ids = draw(st.lists(TOKENS, min_size=1, max_size=12))
    labels = [draw(st.sampled_from((IGNORED, token, 3))) for token in ids]
    return TokenRow(tuple(ids), tuple(labels))


@given(st.lists(rows(), max_size=8))
def test_rows_come_out_as_they_went_in(drawn: list[TokenRow]) -> None:
    table = RowTable()
    for row in drawn:
        table.add(row)
    assert [table.row(n) for n in range(len(table))] == drawn
    assert [table.tokens(n) for n in range(len(table))] == [len(row.ids) for row in drawn]
    assert [table.targets(n) for n in range(len(table))] == [row.targets for row in drawn]


def test_steps_come_out_as_they_went_in() -> None:
    one, two, three = (TokenRow((n, n + 1), (IGNORED, n + 1)) for n in (5, 7, 9))
    table = RowTable()
    for row in (one, two, three):
        table.add(row)
    numbers = {id(row): n for n, row in enumerate((one, two, three))}
    given_steps = [Step((three, one), (Bin((three,), 2), Bin((one,), 2))), Step((two,), (Bin((two,), 2),))]
    steps = Steps(table)
    for step in given_steps:
        steps.add(step, numbers)
    assert list(steps) == given_steps
    assert steps[-1] == given_steps[1]
    assert steps[:1] == given_steps[:1]
    assert list(map(list, steps.numbers())) == [[2, 0], [1]]
    heavy = steps.weighing([1.0, 2.0, 0.5])
    assert [[row.weight for row in step.rows] for step in heavy] == [[0.5, 1.0], [2.0]]
    assert [[row.weight for each in step.bins for row in each.rows] for step in heavy] == [[0.5, 1.0], [2.0]]
    assert list(steps) == given_steps


def test_planned_tokens_take_little_memory() -> None:
    rng = random.Random(0)
    drawn = (tuple(rng.randrange(50_000) for _ in range(200)) for _ in range(500))
    steps = plan((TokenRow(ids, ids) for ids in drawn), steps=500, batch_tokens=1000, seed=0)
    table = steps.table
    held = sum(map(sys.getsizeof, (table._ids, table._learned, table._ends, steps._order, steps._ends)))
    assert held < 6 * sum(step.tokens for step in steps)
