"""A family has the part of the loss that its weight says, whatever the lengths of its rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

import pytest
import torch

from llmrec.backends.encode import IGNORED, TokenRow
from llmrec.models.load import load_model
from llmrec.recipe.schema import ModelSection
from llmrec.tasks.mixture import interleave
from llmrec.train.batches import laid_out, plan
from llmrec.train.loss import label_loss, packed_loss
from llmrec.train.packing import stack, tree
from llmrec.train.steps import Step, Steps, weighted


def row(length: int, targets: int, first: int) -> TokenRow:
    ids = tuple(first + n % 200 for n in range(length))
    return TokenRow(ids, (*[IGNORED] * (length - targets), *ids[length - targets :]))


def planned(chat_tokens: int, *, width: int | None = None, chat: float = 1.0) -> Steps:
    """Chat rows of 3 targets beside lists of 250 to 350 tokens, two thirds of them targets; shares are of tokens."""
    lengths = random.Random(0)
    lists = (row(length, 2 * length // 3, 230) for length in iter(lambda: lengths.randint(250, 350), None))
    streams = {"chat": cycle([row(chat_tokens, 3, 5)]), "list": lists}
    drawn = interleave(streams, {"chat": chat, "list": 1.0}, 0, lambda each: len(each.ids))
    return plan((each for _, each in drawn), steps=160, batch_tokens=1536, seed=0, width=width)


def family_of(each: TokenRow) -> str:
    return "chat" if each.ids[0] == 5 else "list"


def families(steps: Steps) -> list[str]:
    """The family of every row that was drawn."""
    return [family_of(steps.table.row(n)) for n in range(len(steps.table))]


def part_of_chat(steps: Sequence[Step]) -> float:
    """The mean over steps of the chat rows' part in what a step's targets count."""
    parts = []
    for step in steps:
        mass = [(family_of(each), each.weight * each.targets) for each in step.rows]
        parts.append(sum(m for f, m in mass if f == "chat") / sum(m for _, m in mass))
    return sum(parts) / len(parts)


@pytest.mark.parametrize(
    ("chat_tokens", "width", "chat", "share"), [(120, 640, 1.0, 0.5), (250, None, 0.25, 0.2), (290, 640, 0.25, 0.2)]
)
def test_shares_of_the_loss_are_the_weights(chat_tokens: int, width: int | None, chat: float, share: float) -> None:
    steps = planned(chat_tokens, width=width, chat=chat)
    found = weighted(steps, families(steps))
    assert part_of_chat(found.steps) == pytest.approx(share, abs=0.05)
    assert found.shares["chat"] == pytest.approx(part_of_chat(found.steps))
    assert sum(found.shares.values()) == pytest.approx(1)
    # Rows and their packing are what they were, and the mean target counts 1.
    assert [[each.ids for each in step.rows] for step in found.steps] == [[each.ids for each in s.rows] for s in steps]
    counts = [(each.weight * each.targets, each.targets) for step in found.steps for each in step.rows]
    assert sum(count for count, _ in counts) == pytest.approx(sum(targets for _, targets in counts))


def test_without_weights_a_short_answer_is_drowned() -> None:
    assert part_of_chat(planned(290)) < 0.4


def test_one_family_is_left_as_it_is() -> None:
    rows = [each for step in planned(290)[:20] for each in step.rows if family_of(each) == "list"]
    alone = plan(iter(rows), steps=160, batch_tokens=1536, seed=0)
    found = weighted(alone, families(alone))
    assert list(found.steps) == list(alone)
    assert found.shares == {"list": 1.0}


def test_a_weight_counts_a_row_so_often_in_loss_and_gradient(llama_folder: Path) -> None:
    model = load_model(str(llama_folder), ModelSection(name="x", dtype="float32"))
    rows = [
        TokenRow((5, 9, 30, 12), (-100, -100, 30, 12), weight=3.0),
        TokenRow((5, 9, 44), (-100, -100, 44), weight=0.5),
    ]

    def found(loss: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    inputs = {name: torch.tensor(values) for name, values in laid_out(model, rows, 0).items()}
    ours, count = label_loss(model, **inputs)
    assert count == pytest.approx(2 * 3.0 + 0.5)
    one, other = (label_loss(model, torch.tensor([r.ids]), torch.tensor([r.labels]))[0] for r in rows)
    expected = 3.0 * one + 0.5 * other
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(found(ours), found(expected), atol=1e-4)
    packed = {name: torch.from_numpy(each) for name, each in asdict(stack([tree(rows)], 0)).items()}
    together, again = packed_loss(model, packed)
    assert again == pytest.approx(count) and float(together.detach()) == pytest.approx(float(ours.detach()), rel=1e-5)
