"""Packed rows have the loss and gradients of plain rows, and do not attend to each other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmrec.backends.encode import IGNORED, TokenRow
from llmrec.errors import RecipeError
from llmrec.models.traits import can_use_block_mask
from llmrec.recipe.schema import LoraSection, TrainSection
from llmrec.train import lora, sft
from llmrec.train.batches import pad_rows, plan_steps
from llmrec.train.loss import block_mask, label_loss, packed_loss
from llmrec.train.packing import PackedSequence, pack_into_bins, pack_rows, stack_sequences
from llmrec.train.steps import Step
from tests.conftest import encoder_of, opened, section
from tests.facts import Facts, raises
from tests.train.tiny import fit, moved, packed


def row(ids: Sequence[int], first: int = 1, *, quiet: Sequence[int] = ()) -> TokenRow:
    """Return a row with loss from ``first`` on, except at ``quiet``."""
    labels = [token if n >= first and n not in quiet else IGNORED for n, token in enumerate(ids)]
    return TokenRow(tuple(ids), tuple(labels))


def branching(seed: int, count: int = 9) -> list[TokenRow]:
    """Return rows with three prefixes; one row is a prefix of another, and one is repeated."""
    rng = random.Random(seed)
    begins = [[7, 8, *[rng.randrange(10, 200) for _ in range(rng.randrange(1, 12))]] for _ in range(3)]
    rows = []
    for n in range(count):
        ids = [*begins[n % 3], *[rng.randrange(10, 200) for _ in range(rng.randrange(1, 9))]]
        rows.append(row(ids, rng.randrange(1, len(ids))))
    rows.append(row(rows[0].ids, 1))
    rows.append(row([*rows[1].ids, 5, 6], 2, quiet=(3,)))
    return rows


def as_packed(rows: Sequence[TokenRow], width: int) -> dict[str, Any]:
    return packed(*(each.rows for each in pack_into_bins(rows, width)))


def as_plain(rows: Sequence[TokenRow]) -> tuple[Any, Any]:
    ids, labels = pad_rows(rows, 0)
    return torch.tensor(ids), torch.tensor(labels)


def adapted(folder: Path, **changes: Any) -> Any:
    torch.manual_seed(0)
    train = TrainSection(lora=LoraSection(rank=4), **changes)
    return moved(lora.load_trainable(str(folder), section(folder), train)).eval()


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("folder", "width", "method"),
    [("llama_folder", 25, "lora"), ("llama_folder", 10_000, "full"), ("qwen_folder", 60, "lora")],
)
def test_loss_and_gradients_equal_plain_rows(
    folder: str, width: int, method: str, request: pytest.FixtureRequest
) -> None:
    model = adapted(request.getfixturevalue(folder), method=method)
    rows = branching(seed=3)
    plain, count = label_loss(model, *as_plain(rows))
    expected = gradients(model, plain / count)
    total, targets = packed_loss(model, as_packed(rows, width))
    results = gradients(model, total / targets)
    assert targets == count == sum(each.targets for each in rows)
    assert float(total.detach()) == pytest.approx(float(plain.detach()), rel=1e-6, abs=1e-4)
    assert results.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        assert torch.allclose(results[name], gradient, atol=1e-5, rtol=1e-4), name


def test_eager_attention_reads_the_same_mask(llama_folder: Path) -> None:
    rows, model = branching(seed=4), opened(llama_folder)[0]
    plain, _ = label_loss(model, *as_plain(rows))
    model.set_attn_implementation("eager")
    assert block_mask(model, torch.tensor([[2, 2]])).dtype == torch.float32
    total, _ = packed_loss(model, as_packed(rows, 60))
    assert float(total.detach()) == pytest.approx(float(plain.detach()), abs=1e-3)


def test_tree_by_hand() -> None:
    laid = pack_rows([row([1, 2, 3, 4, 5], 4), row([1, 2, 3, 6], 2), row([9, 8], 1)])
    assert laid.ids.tolist() == [1, 2, 3, 4, 9]
    assert laid.positions.tolist() == [0, 1, 2, 3, 0]
    assert laid.ends.tolist() == [4, 4, 4, 4, 5]
    assert list(zip(laid.after.tolist(), laid.targets.tolist(), strict=True)) == [(1, 3), (2, 6), (3, 5), (4, 8)]
    # A shared target counts as often as in plain rows.
    laid = pack_rows([row([1, 2, 3], 1), row([1, 2, 3], 2), row([1, 2, 3, 4], 2)])
    assert len(laid.ids) == 3
    targets = sorted(zip(laid.after.tolist(), laid.targets.tolist(), strict=True))
    assert targets == [(0, 2), (1, 3), (1, 3), (1, 3), (2, 4)]


TOKENS = st.lists(st.integers(1, 3), min_size=2, max_size=9)


def visible_columns(laid: PackedSequence) -> Any:
    """Return what each column sees, by walking from parent to parent."""
    parents: list[int] = []
    for column, position in enumerate(laid.positions.tolist()):
        at = column - 1
        while at >= 0 and laid.positions[at] >= position:
            at -= 1
        parents.append(at if position else -1)
    seen = np.zeros((len(parents), len(parents)), dtype=bool)
    for column in range(len(parents)):
        at = column
        while at >= 0:
            seen[column, at] = True
            at = parents[at]
    return seen


@given(st.lists(st.tuples(TOKENS, st.integers(1, 8)), min_size=1, max_size=12), st.integers(4, 40))
def test_every_target_sees_the_prefix_of_its_row_only(drawn: list[tuple[list[int], int]], width: int) -> None:
    rows = [each for ids, first in drawn if (each := row(ids, min(first, len(ids) - 1))).targets]
    expected = sorted(
        (each.ids[:n], each.labels[n]) for each in rows for n in range(1, len(each.ids)) if each.labels[n] > 0
    )
    results = []
    for filled in pack_into_bins(rows, width):
        laid = pack_rows(filled.rows)
        assert len(laid.ids) == filled.columns <= max(width, 9)
        columns = np.arange(len(laid.ids))
        seen = (columns <= columns[:, None]) & (columns[:, None] < laid.ends)
        assert np.array_equal(seen, visible_columns(laid))
        assert np.array_equal(laid.positions, seen.sum(1) - 1)
        for column, token in zip(laid.after.tolist(), laid.targets.tolist(), strict=True):
            results.append((tuple(laid.ids[seen[column]].tolist()), token))
        # A trie contains no prefix twice.
        prefixes = [tuple(laid.ids[seen[column]].tolist()) for column in columns]
        assert len(prefixes) == len(set(prefixes))
    assert sorted(results) == expected


@given(st.lists(st.integers(2, 30), min_size=1, max_size=40), st.integers(10, 64))
def test_bins_contain_every_row_within_their_width(lengths: list[int], width: int) -> None:
    rows = [row([n + 100, *range(length - 1)], 1) for n, length in enumerate(lengths)]
    filled = pack_into_bins(rows, width)
    assert sorted(each.ids for part in filled for each in part.rows) == sorted(each.ids for each in rows)
    assert all(part.columns <= width or len(part.rows) == 1 for part in filled)
    # First fit leaves no two adjacent bins that would fit into one row.
    assert all(a.columns + b.columns > width for a, b in pairwise(filled))


def test_padding_sees_only_itself() -> None:
    stacked = stack_sequences([pack_rows([row([1, 2, 3, 4, 5], 1)]), pack_rows([row([6, 7], 1)])], pad=0)
    assert stacked.ids.tolist() == [[1, 2, 3, 4], [6, 0, 0, 0]]
    assert stacked.ends.tolist() == [[4, 4, 4, 4], [1, 2, 3, 4]]
    assert stacked.after.tolist() == [0, 1, 2, 3, 4]


def test_models_that_ignore_masks() -> None:
    from transformers import GPT2Config, LlamaConfig, MambaConfig, MistralConfig

    kinds = (LlamaConfig(), GPT2Config(), MistralConfig(sliding_window=64), MambaConfig())
    for config in kinds:
        config._attn_implementation = "sdpa"
    assert [can_use_block_mask(config) for config in kinds] == [True, True, False, False]
    kinds[0]._attn_implementation = "flash_attention_2"
    assert not can_use_block_mask(kinds[0])


def user_rows() -> list[TokenRow]:
    """Return lists, and questions about different items after the same history."""
    rng, rows = random.Random(5), []
    for _ in range(40):
        history = [7, 8, 9, *[rng.randrange(20, 200) for _ in range(30)]]
        rows += [row([*history, rng.randrange(200, 210), rng.randrange(10, 14)], 33) for _ in range(4)]
        rows.append(row([7, 11, *[rng.randrange(20, 200) for _ in range(rng.randrange(4, 40))]], 3))
    rng.shuffle(rows)
    return rows


def test_packed_plan_contains_every_row_within_its_budget() -> None:
    rows = user_rows()
    steps = list(plan_steps(iter(rows), steps=1000, batch_tokens=400, seed=0, width=100))
    assert sorted(each.ids for step in steps for each in step.rows) == sorted(each.ids for each in rows)
    assert all(step.padded_tokens <= 400 for step in steps)
    assert steps == list(plan_steps(iter(rows), steps=1000, batch_tokens=400, seed=0, width=100))
    assert steps != list(plan_steps(iter(rows), steps=1000, batch_tokens=400, seed=1, width=100))
    plain = plan_steps(iter(rows), steps=1000, batch_tokens=400, seed=0)
    computed, before = (sum(step.padded_tokens for step in each) for each in (steps, plain))
    assert sum(step.targets for step in steps) == sum(step.targets for step in plain)
    assert computed < 0.6 * before
    assert sum(step.tokens for step in steps) > 0.9 * computed


def tuned(folder: Path, out: Path, steps: Sequence[Step]) -> tuple[sft.TrainingResult, Any]:
    train = TrainSection(steps=len(steps), learning_rate=1e-3, valid_every=50, packing="tree")
    torch.manual_seed(0)
    model = lora.load_trainable(str(folder), section(folder), train)
    return fit(model, encoder_of(folder), steps, train, out), model


def test_packed_and_plain_training_give_equal_weights(llama_folder: Path, tmp_path: Path) -> None:
    steps = plan_steps(iter(user_rows()[:60]), steps=6, batch_tokens=400, seed=0, width=100)
    plain = [Step(step.rows) for step in steps]
    one, ours = tuned(llama_folder, tmp_path / "packed", steps)
    two, theirs = tuned(llama_folder, tmp_path / "plain", plain)
    assert [record["loss"] for record in one.log[1:]] == pytest.approx(
        [record["loss"] for record in two.log[1:]], abs=1e-4
    )
    weights = dict(theirs.named_parameters())
    assert any("lora_B" in name for name in weights)
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter, weights[name], atol=2e-4), name
    assert one.tokens == sum(each.columns for step in steps for each in step.bins) < two.tokens
    assert one.target_tokens == two.target_tokens


def test_rejects_models_that_ignore_the_mask(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(llama_folder)[0]
    sft.check_packing(model)
    with monkeypatch.context() as patch:
        # A model that uses a causal mask instead.
        patch.setattr("llmrec.train.loss.block_mask", lambda model, ends: None)
        with raises(RecipeError, Facts("unsupported", column="train.packing", says=("llama", "train.packing=none"))):
            sft.check_packing(model)
    model.config.layer_types = ["sliding_attention", "full_attention"]
    with raises(RecipeError, Facts("unsupported", column="train.packing", says="train.packing=none")):
        sft.check_packing(model)
