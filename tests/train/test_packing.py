"""Rows packed into masked rows have the loss and the gradients of plain rows, and see nothing of each other."""

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

from llmrec.backends.encode import IGNORED, Encoder, TokenRow
from llmrec.errors import RecipeError
from llmrec.models.load import load_model, load_tokenizer
from llmrec.models.traits import takes_block_mask
from llmrec.recipe.schema import LoraSection, ModelSection, TrainSection
from llmrec.train import lora, sft
from llmrec.train.batches import padded, plan
from llmrec.train.loss import block_mask, label_loss, packed_loss
from llmrec.train.packing import Packed, Stacked, bins, common_prefix, stack, tree
from llmrec.train.steps import Step
from tests.facts import Facts, raises
from tests.train.gradients import moved


def row(ids: Sequence[int], first: int = 1, *, quiet: Sequence[int] = ()) -> TokenRow:
    """A row with loss from ``first`` on, but not at ``quiet`` places."""
    labels = [token if n >= first and n not in quiet else IGNORED for n, token in enumerate(ids)]
    return TokenRow(tuple(ids), tuple(labels))


def branching(seed: int, count: int = 9) -> list[TokenRow]:
    """Rows of three beginnings: some part early, some late, one is the beginning of another, one stands twice."""
    rng = random.Random(seed)
    begins = [[7, 8, *[rng.randrange(10, 200) for _ in range(rng.randrange(1, 12))]] for _ in range(3)]
    rows = []
    for n in range(count):
        ids = [*begins[n % 3], *[rng.randrange(10, 200) for _ in range(rng.randrange(1, 9))]]
        rows.append(row(ids, rng.randrange(1, len(ids))))
    rows.append(row(rows[0].ids, 1))
    rows.append(row([*rows[1].ids, 5, 6], 2, quiet=(3,)))
    return rows


def tensors(packed: Stacked) -> dict[str, Any]:
    names = ("ids", "positions", "ends", "after", "targets")
    return {name: torch.from_numpy(getattr(packed, name)) for name in names}


def as_packed(rows: Sequence[TokenRow], width: int) -> dict[str, Any]:
    return tensors(stack([tree(each.rows) for each in bins(rows, width)], pad=0))


def as_plain(rows: Sequence[TokenRow]) -> tuple[Any, Any]:
    ids, labels = padded(rows, 0)
    return torch.tensor(ids), torch.tensor(labels)


def adapted(folder: Path, **changes: Any) -> Any:
    """A model with adapters that are no longer zero, or one that is trained whole."""
    section, train = ModelSection(name=str(folder), dtype="float32"), TrainSection(lora=LoraSection(rank=4), **changes)
    torch.manual_seed(0)
    return moved(lora.load_trainable(str(folder), section, train)).eval()


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("width", [25, 60, 10_000])
@pytest.mark.parametrize("folder", ["llama_folder", "qwen_folder"])
def test_loss_and_gradients_are_those_of_plain_rows(
    folder: str, width: int, method: str, request: pytest.FixtureRequest
) -> None:
    """The claim: within 1e-4 in float32, one masked row or many, frozen head or trained."""
    model = adapted(request.getfixturevalue(folder), method=method)
    rows = branching(seed=3)
    plain, count = label_loss(model, *as_plain(rows))
    wanted = gradients(model, plain / count)
    total, targets = packed_loss(model, as_packed(rows, width))
    found = gradients(model, total / targets)
    assert targets == count == sum(each.targets for each in rows)
    assert float(total.detach()) == pytest.approx(float(plain.detach()), rel=1e-6, abs=1e-4)
    assert found.keys() == wanted.keys() != set()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=1e-5, rtol=1e-4), name


def test_eager_attention_reads_the_same_mask(llama_folder: Path) -> None:
    rows = branching(seed=4)
    model = load_model(str(llama_folder), ModelSection(name=str(llama_folder), dtype="float32"))
    plain, _ = label_loss(model, *as_plain(rows))
    model.set_attn_implementation("eager")
    assert block_mask(model, torch.tensor([[2, 2]])).dtype == torch.float32
    total, _ = packed_loss(model, as_packed(rows, 60))
    assert float(total.detach()) == pytest.approx(float(plain.detach()), abs=1e-3)


def test_rows_see_nothing_of_each_other(llama_folder: Path) -> None:
    """Other tokens in one row change its own targets, and not one bit of any other's."""
    model = load_model(str(llama_folder), ModelSection(name=str(llama_folder), dtype="float32"))
    shared = [20, 21, 22, 23]
    first, second, stranger = row([*shared, 30, 31, 32], 5), row([*shared, 60, 61, 62], 5), row([90, 91, 92, 93], 1)
    changed = row([*shared, 60, 161, 162], 5)

    def states(rows: list[TokenRow]) -> tuple[Packed, Any]:
        packed = tree(rows)
        inputs = tensors(stack([packed], pad=0))
        mask = block_mask(model, inputs["ends"])
        with torch.no_grad():
            hidden = model.get_decoder()(
                input_ids=inputs["ids"], position_ids=inputs["positions"], attention_mask=mask
            ).last_hidden_state[0]
        return packed, hidden

    (packed, before), (other, after) = states([first, second, stranger]), states([first, changed, stranger])
    same = torch.from_numpy(packed.ids == other.ids)
    assert int((~same).sum()) == 1
    assert torch.equal(before[same], after[same])
    assert not torch.allclose(before[~same], after[~same])


def test_a_tree_by_hand() -> None:
    """Two rows share three tokens and part; nothing is read behind a last target but one."""
    packed = tree([row([1, 2, 3, 4, 5], 4), row([1, 2, 3, 6], 2), row([9, 8], 1)])
    assert packed.ids.tolist() == [1, 2, 3, 4, 9]
    assert packed.positions.tolist() == [0, 1, 2, 3, 0]
    assert packed.ends.tolist() == [4, 4, 4, 4, 5]
    assert list(zip(packed.after.tolist(), packed.targets.tolist(), strict=True)) == [(1, 3), (2, 6), (3, 5), (4, 8)]


def test_a_shared_target_counts_as_often_as_in_plain_rows() -> None:
    packed = tree([row([1, 2, 3], 1), row([1, 2, 3], 2), row([1, 2, 3, 4], 2)])
    assert len(packed.ids) == 3
    assert sorted(zip(packed.after.tolist(), packed.targets.tolist(), strict=True)) == [
        *[(0, 2)],
        *[(1, 3)] * 3,
        *[(2, 4)],
    ]


TOKENS = st.lists(st.integers(1, 3), min_size=2, max_size=9)


def seen_by_walking(packed: Packed) -> Any:
    """What each column sees, found by walking up from parent to parent instead of from the ends."""
    parents: list[int] = []
    for column, place in enumerate(packed.positions.tolist()):
        at = column - 1
        while at >= 0 and packed.positions[at] >= place:
            at -= 1
        parents.append(at if place else -1)
    seen = np.zeros((len(parents), len(parents)), dtype=bool)
    for column in range(len(parents)):
        at = column
        while at >= 0:
            seen[column, at] = True
            at = parents[at]
    return seen


@given(st.lists(st.tuples(TOKENS, st.integers(1, 8)), min_size=1, max_size=12), st.integers(4, 40))
def test_every_token_sees_its_own_row_so_far(drawn: list[tuple[list[int], int]], width: int) -> None:
    """Isolation: along the mask, every target's column reads exactly the beginning of its row, and no token more."""
    rows = [made for ids, first in drawn if (made := row(ids, min(first, len(ids) - 1))).targets]
    wanted = sorted(
        (each.ids[:n], each.labels[n]) for each in rows for n in range(1, len(each.ids)) if each.labels[n] > 0
    )
    found = []
    for filled in bins(rows, width):
        packed = tree(filled.rows)
        assert len(packed.ids) == filled.columns <= max(width, 9)
        columns = np.arange(len(packed.ids))
        seen = (columns <= columns[:, None]) & (columns[:, None] < packed.ends)
        assert np.array_equal(seen, seen_by_walking(packed))
        assert np.array_equal(packed.positions, seen.sum(1) - 1)
        for column, token in zip(packed.after.tolist(), packed.targets.tolist(), strict=True):
            found.append((tuple(packed.ids[seen[column]].tolist()), token))
        # A trie holds no beginning twice.
        begins = [tuple(packed.ids[seen[column]].tolist()) for column in columns]
        assert len(begins) == len(set(begins))
    assert sorted(found) == wanted


@given(st.lists(st.integers(2, 30), min_size=1, max_size=40), st.integers(10, 64))
def test_bins_keep_every_row_and_their_width(lengths: list[int], width: int) -> None:
    rows = [row([n + 100, *range(length - 1)], 1) for n, length in enumerate(lengths)]
    made = bins(rows, width)
    assert sorted(each.ids for filled in made for each in filled.rows) == sorted(each.ids for each in rows)
    assert all(filled.columns <= width or len(filled.rows) == 1 for filled in made)
    # First fit never leaves two masked rows that would go into one.
    assert all(a.columns + b.columns > width for a, b in pairwise(made))


def test_padding_sees_itself_alone() -> None:
    packed = stack([tree([row([1, 2, 3, 4, 5], 1)]), tree([row([6, 7], 1)])], pad=0)
    assert packed.ids.tolist() == [[1, 2, 3, 4], [6, 0, 0, 0]]
    assert packed.ends.tolist() == [[4, 4, 4, 4], [1, 2, 3, 4]]
    assert packed.after.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("one", "two", "shared"), [([], [], 0), ([1], [1, 2], 1), ([1, 2], [1, 3], 1), ([4], [5], 0)])
def test_alike(one: list[int], two: list[int], shared: int) -> None:
    assert common_prefix(np.array(one, dtype=np.int64), np.array(two, dtype=np.int64)) == shared


def test_models_that_ignore_masks_are_known() -> None:
    from transformers import GPT2Config, LlamaConfig, MambaConfig, MistralConfig

    kinds = (LlamaConfig(), GPT2Config(), MistralConfig(sliding_window=64), MambaConfig())
    for config in kinds:
        config._attn_implementation = "sdpa"
    assert [takes_block_mask(config) for config in kinds] == [True, True, False, False]
    kinds[0]._attn_implementation = "flash_attention_2"
    assert not takes_block_mask(kinds[0])


def user_rows() -> list[TokenRow]:
    """What one user gives: a list, and questions about different items after the same history."""
    rng, rows = random.Random(5), []
    for _ in range(40):
        history = [7, 8, 9, *[rng.randrange(20, 200) for _ in range(30)]]
        rows += [row([*history, rng.randrange(200, 210), rng.randrange(10, 14)], 33) for _ in range(4)]
        rows.append(row([7, 11, *[rng.randrange(20, 200) for _ in range(rng.randrange(4, 40))]], 3))
    rng.shuffle(rows)
    return rows


def test_a_packed_plan_loses_no_row_and_holds_to_its_budget() -> None:
    rows = user_rows()
    steps = list(plan(iter(rows), steps=1000, batch_tokens=400, seed=0, width=100))
    assert sorted(each.ids for step in steps for each in step.rows) == sorted(each.ids for each in rows)
    assert all(step.padded_tokens <= 400 for step in steps)
    assert steps == list(plan(iter(rows), steps=1000, batch_tokens=400, seed=0, width=100))
    assert steps != list(plan(iter(rows), steps=1000, batch_tokens=400, seed=1, width=100))
    plain = plan(iter(rows), steps=1000, batch_tokens=400, seed=0)
    computed, before = (sum(step.padded_tokens for step in each) for each in (steps, plain))
    assert sum(step.targets for step in steps) == sum(step.targets for step in plain)
    assert computed < 0.6 * before
    assert sum(step.tokens for step in steps) > 0.9 * computed


def tuned(folder: Path, out: Path, steps: Sequence[Step]) -> tuple[sft.Training, Any]:
    section = ModelSection(name=str(folder), dtype="float32")
    train = TrainSection(steps=len(steps), learning_rate=1e-3, valid_every=50, packing="tree")
    torch.manual_seed(0)
    model = lora.load_trainable(str(folder), section, train)
    encoder = Encoder(load_tokenizer(str(folder), section), max_length=256)
    return sft.train(model, encoder, steps, {}, train, folder=out, seed=0, quiet=True), model


def test_training_on_packed_steps_ends_where_plain_steps_end(llama_folder: Path, tmp_path: Path) -> None:
    packed = plan(iter(user_rows()[:60]), steps=6, batch_tokens=400, seed=0, width=100)
    plain = [Step(step.rows) for step in packed]
    one, ours = tuned(llama_folder, tmp_path / "packed", packed)
    two, theirs = tuned(llama_folder, tmp_path / "plain", plain)
    assert [record["loss"] for record in one.log[1:]] == pytest.approx(
        [record["loss"] for record in two.log[1:]], abs=1e-4
    )
    weights = dict(theirs.named_parameters())
    moved = [name for name in weights if "lora_B" in name]
    assert moved
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter, weights[name], atol=2e-4), name
    assert one.tokens == sum(each.columns for step in packed for each in step.bins) < two.tokens
    assert one.target_tokens == two.target_tokens


def test_packing_is_checked_after_the_model_is_on_its_device(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Trainer(sft.LabelRowTrainer):
        """Puts the model where it is trained, as every trainer does."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            calls.append("placed")

    monkeypatch.setattr(sft, "LabelRowTrainer", Trainer)
    monkeypatch.setattr(sft, "check_packing", lambda *_: calls.append("checked"))
    tuned(llama_folder, tmp_path, plan(iter(user_rows()[:20]), steps=1, batch_tokens=400, seed=0, width=100))
    assert calls == ["placed", "checked"]


def test_models_that_do_not_read_the_mask_are_refused(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(llama_folder), ModelSection(name=str(llama_folder), dtype="float32"))
    sft.check_packing(model)
    with monkeypatch.context() as patch:
        # A model that puts a plain causal mask in place of ours.
        patch.setattr("llmrec.train.loss.block_mask", lambda model, ends: None)
        with raises(RecipeError, Facts("unsupported", column="train.packing", says=("llama", "train.packing=none"))):
            sft.check_packing(model)
    model.config.layer_types = ["sliding_attention", "full_attention"]
    with raises(RecipeError, Facts("unsupported", column="train.packing", says="train.packing=none")):
        sft.check_packing(model)
