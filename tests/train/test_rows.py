"""User rows, the steps that are planned from them, their storage, and shares of tasks in the loss."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmrec.backends.encode import IGNORED, Encoder, TokenRow
from llmrec.tasks.mixture import interleave
from llmrec.train.batches import pad_rows, padded_inputs, plan_steps, truncated_row
from llmrec.train.loss import label_loss, packed_loss
from llmrec.train.packing import PackedRows
from llmrec.train.steps import PlannedSteps, RowTable, Step, balance_task_losses
from llmrec.types import Example, Prompt, Segment
from tests.conftest import encoder_of, opened
from tests.train.tiny import alone, example, packed, user

TITLES = ("Toy Story", "Heat", "Fargo", "Casino", "Brazil")
QUESTION = user("Continue the list")


@pytest.fixture(scope="module", params=["llama_folder", "qwen_folder"])
def loaded(request: pytest.FixtureRequest) -> tuple[Any, Encoder]:
    folder = request.getfixturevalue(request.param)
    return opened(folder)[0], encoder_of(folder, 512)


def films(titles: tuple[str, ...] = TITLES) -> Example:
    """Return a list whose first title is no target."""
    first, *targets = titles
    answer = [Segment("item", first), Segment("text", "\n"), *(text for title in targets for text in (title, "\n"))]
    return example(QUESTION, *answer, ends_turn=False)


def prompt(count: int) -> Prompt:
    prefix = tuple(s for title in TITLES[:count] for s in (Segment("item", title), Segment("text", "\n")))
    return Prompt(messages=QUESTION, answer_prefix=prefix, stop="\n")


def test_user_row_loss_equals_per_position_loss(loaded: tuple[Any, Encoder]) -> None:
    model, encoder = loaded
    row = encoder.row(films())
    total, count = label_loss(model, *alone(row))
    expected, targets = 0.0, 0
    for k in range(len(TITLES)):
        ids = encoder.prompt(prompt(k))
        assert tuple(ids) == row.ids[: len(ids)]
        if k:
            tail = encoder.continuation(prompt(k), TITLES[k], closed=True)
            loss, n = label_loss(model, *alone(TokenRow((*ids, *tail), (*[IGNORED] * len(ids), *tail))))
            expected, targets = expected + float(loss.detach()), targets + n
    assert count == targets == row.targets
    assert float(total.detach()) == pytest.approx(expected, abs=1e-4)


def test_padding_changes_no_loss(loaded: tuple[Any, Encoder]) -> None:
    model, encoder = loaded
    short, long = encoder.row(films(TITLES[:2])), encoder.row(films())
    ids, labels = (torch.tensor(part) for part in pad_rows([short, long], encoder.tokenizer.pad_token_id))
    together, _ = label_loss(model, ids, labels)
    single = sum(float(label_loss(model, *alone(row))[0].detach()) for row in (short, long))
    assert float(together.detach()) == pytest.approx(single, abs=1e-4)


def test_steps_contain_every_row_within_their_budget() -> None:
    rows = [TokenRow(tuple(range(n)), (IGNORED,) * (n - 1) + (1,)) for n in range(5, 65)]
    steps = list(plan_steps(iter(rows), steps=1000, batch_tokens=128, seed=0))
    assert sorted(len(row.ids) for step in steps for row in step.rows) == [len(row.ids) for row in rows]
    assert all(step.padded_tokens <= 128 for step in steps)
    assert sum(s.tokens for s in steps) / sum(s.padded_tokens for s in steps) > 0.85
    assert steps == list(plan_steps(iter(rows), steps=1000, batch_tokens=128, seed=0))
    assert steps != list(plan_steps(iter(rows), steps=1000, batch_tokens=128, seed=1))
    # A longer row is a step by itself.
    row = TokenRow(tuple(range(300)), (1,) * 300)
    assert list(plan_steps(iter([row]), steps=5, batch_tokens=128, seed=0)) == [Step((row,))]


def test_long_rows_are_truncated(loaded: tuple[Any, Encoder]) -> None:
    _, encoder = loaded
    full = encoder.row(films())
    cut = truncated_row(films(), encoder, len(full.ids) - 3)
    assert cut is not None
    assert cut.ids == full.ids[:-3]
    assert truncated_row(films(), encoder, 5) is None


TOKENS = st.integers(0, 2**31 - 1)


@st.composite
def rows(draw: st.DrawFn) -> TokenRow:
    """A row whose labels are its tokens, or classes, or nothing."""
    ids = draw(st.lists(TOKENS, min_size=1, max_size=12))
    labels = [draw(st.sampled_from((IGNORED, token, 3))) for token in ids]
    return TokenRow(tuple(ids), tuple(labels))


@given(st.lists(rows(), max_size=8))
def test_rows_round_trip(drawn: list[TokenRow]) -> None:
    table = RowTable()
    for row in drawn:
        table.add(row)
    assert [table.row(n) for n in range(len(table))] == drawn
    assert [table.tokens(n) for n in range(len(table))] == [len(row.ids) for row in drawn]
    assert [table.targets(n) for n in range(len(table))] == [row.targets for row in drawn]


def test_steps_round_trip() -> None:
    one, two, three = (TokenRow((n, n + 1), (IGNORED, n + 1)) for n in (5, 7, 9))
    table = RowTable()
    for row in (one, two, three):
        table.add(row)
    numbers = {id(row): n for n, row in enumerate((one, two, three))}
    expected = [
        Step((three, one), (PackedRows((three,), 2), PackedRows((one,), 2))),
        Step((two,), (PackedRows((two,), 2),)),
    ]
    steps = PlannedSteps(table)
    for step in expected:
        steps.add(step, numbers)
    assert (list(steps), steps[-1], steps[:1]) == (expected, expected[1], expected[:1])
    assert list(map(list, steps.numbers())) == [[2, 0], [1]]
    heavy = steps.weighing([1.0, 2.0, 0.5])
    assert [[row.weight for row in step.rows] for step in heavy] == [[0.5, 1.0], [2.0]]
    assert [[row.weight for each in step.bins for row in each.rows] for step in heavy] == [[0.5, 1.0], [2.0]]
    assert list(steps) == expected


def test_planned_tokens_take_little_memory() -> None:
    rng = random.Random(0)
    drawn = (tuple(rng.randrange(50_000) for _ in range(200)) for _ in range(500))
    steps = plan_steps((TokenRow(ids, ids) for ids in drawn), steps=500, batch_tokens=1000, seed=0)
    table = steps.table
    held = sum(map(sys.getsizeof, (table._ids, table._learned, table._ends, steps._order, steps._ends)))
    assert held < 6 * sum(step.tokens for step in steps)


def row(length: int, targets: int, first: int) -> TokenRow:
    ids = tuple(first + n % 200 for n in range(length))
    return TokenRow(ids, (*[IGNORED] * (length - targets), *ids[length - targets :]))


def planned(chat_tokens: int, *, width: int | None = None, chat: float = 1.0) -> PlannedSteps:
    """Plan chat rows of 3 targets and lists of 250 to 350 tokens, two thirds of them targets."""
    lengths = random.Random(0)
    lists = (row(length, 2 * length // 3, 230) for length in iter(lambda: lengths.randint(250, 350), None))
    streams = {"chat": cycle([row(chat_tokens, 3, 5)]), "list": lists}
    drawn = interleave(streams, {"chat": chat, "list": 1.0}, 0, lambda each: len(each.ids))
    return plan_steps((each for _, each in drawn), steps=80, batch_tokens=1536, seed=0, width=width)


def family_of(each: TokenRow) -> str:
    return "chat" if each.ids[0] == 5 else "list"


def families(steps: PlannedSteps) -> list[str]:
    return [family_of(steps.table.row(n)) for n in range(len(steps.table))]


def part_of_chat(steps: Sequence[Step]) -> float:
    """Return the share of chat rows in the weight of a step's targets, as a mean over steps."""
    parts = []
    for step in steps:
        mass = [(family_of(each), each.weight * each.targets) for each in step.rows]
        parts.append(sum(m for f, m in mass if f == "chat") / sum(m for _, m in mass))
    return sum(parts) / len(parts)


@pytest.mark.parametrize(("chat_tokens", "width", "chat", "share"), [(120, 640, 1.0, 0.5), (250, None, 0.25, 0.2)])
def test_shares_of_the_loss_equal_the_weights(chat_tokens: int, width: int | None, chat: float, share: float) -> None:
    steps = planned(chat_tokens, width=width, chat=chat)
    balanced, shares = balance_task_losses(steps, families(steps))
    assert part_of_chat(balanced) == pytest.approx(share, abs=0.05)
    assert shares["chat"] == pytest.approx(part_of_chat(balanced))
    assert sum(shares.values()) == pytest.approx(1)
    # Rows are unchanged, and the mean weight of a target is 1.
    assert [[each.ids for each in step.rows] for step in balanced] == [[each.ids for each in s.rows] for s in steps]
    counts = [(each.weight * each.targets, each.targets) for step in balanced for each in step.rows]
    assert sum(count for count, _ in counts) == pytest.approx(sum(targets for _, targets in counts))


def test_one_task_and_no_weights_change_nothing() -> None:
    steps = planned(290)
    assert part_of_chat(steps) < 0.4
    rows = [each for step in steps[:20] for each in step.rows if family_of(each) == "list"]
    single = plan_steps(iter(rows), steps=160, batch_tokens=1536, seed=0)
    balanced, shares = balance_task_losses(single, families(single))
    assert list(balanced) == list(single) and shares == {"list": 1.0}


def test_weights_of_rows_scale_loss_and_gradient(llama_folder: Path) -> None:
    model = opened(llama_folder)[0]
    rows = [
        TokenRow((5, 9, 30, 12), (-100, -100, 30, 12), weight=3.0),
        TokenRow((5, 9, 44), (-100, -100, 44), weight=0.5),
    ]

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    ours, count = label_loss(model, **{k: torch.tensor(v) for k, v in padded_inputs(model, rows, 0).items()})
    assert count == pytest.approx(2 * 3.0 + 0.5)
    one, other = (label_loss(model, *alone(row))[0] for row in rows)
    expected = 3.0 * one + 0.5 * other
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(gradient(ours), gradient(expected), atol=1e-4)
    together, again = packed_loss(model, packed(rows))
    assert again == pytest.approx(count) and float(together.detach()) == pytest.approx(float(ours.detach()), rel=1e-5)
