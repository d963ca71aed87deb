"""A step that is computed in parts has the loss and the gradients of the whole, for every loss and any processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrec.backends.encode import TokenRow
from llmrec.errors import RecipeError
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import ModelSection, TrainSection
from llmrec.tasks.rows import Listwise
from llmrec.train import lora, sft
from llmrec.train.batches import micro_steps, plan
from llmrec.train.steps import Step
from tests.conftest import encoder_of
from tests.facts import Facts, raises
from tests.train.gradients import assert_equal, recorded, trained
from tests.train.test_listwise import planned
from tests.train.test_preference import Case
from tests.train.test_seq2seq import INDEX, base, rows_of
from tests.train.test_world import LOSS, assert_alike, training
from tests.train.together import together

__all__ = ["base"]  # a fixture
# float32 sums in another order.
EQUAL = 1e-6


def ones(*lengths: int) -> Step:
    return Step(tuple(TokenRow((1,) * length, (-100, *[1] * (length - 1))) for length in lengths))


def test_parts_hold_every_row_and_no_more_tokens_than_asked() -> None:
    step = ones(9, 2, 3, 3, 2, 30)
    parts = micro_steps(step, 10)
    assert sorted(len(row.ids) for part in parts for row in part.rows) == [2, 2, 3, 3, 9, 30]
    assert all(part.padded_tokens <= 10 or len(part.rows) == 1 for part in parts)
    assert len(parts) == 4
    assert micro_steps(step, None) == [step] == micro_steps(step, 10**6)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"width": 96, "packing": "tree"},
        pytest.param({"method": "full"}, marks=pytest.mark.slow),
        {"exits": True, "distill": 0.5},
        pytest.param({"gradient_checkpointing": True, "lora": {"rank": 4, "top_layers": 1}}, marks=pytest.mark.slow),
    ],
)
def test_the_parts_of_a_step_are_the_whole_step(
    settings: dict[str, Any], llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, one = trained(monkeypatch, llama_folder, tmp_path / "one", steps=1, **settings)
    parts, two = trained(monkeypatch, llama_folder, tmp_path / "two", steps=1, micro_tokens=48, **settings)
    assert parts == pytest.approx(whole, rel=EQUAL)
    assert_equal(one, two, 5 * EQUAL)


@pytest.mark.slow
def test_a_step_in_one_part_follows_one_in_several(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [ones(9, 9, 9, 9), ones(9), ones(9, 9)]
    found = []
    for name, limit in (("one", None), ("two", 18)):
        section = ModelSection(name=str(llama_folder), dtype="float32", device="cpu")
        train = TrainSection(steps=3, micro_tokens=limit, valid_rows=0, report_to=())
        torch.manual_seed(0)
        model = lora.load_trainable(str(llama_folder), section, train)
        given = (model, encoder_of(llama_folder), steps, {}, train)
        found.append(recorded(monkeypatch, *given, folder=tmp_path / name)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.slow
def test_parts_of_rows_with_weights_divide_by_all_of_them(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = plan

    def weighted(*given: Any, **options: Any) -> Any:
        steps = original(*given, **options)
        return steps.weighing([1.0 + n % 3 for n in range(len(steps.table))])

    monkeypatch.setattr("tests.train.gradients.plan", weighted)
    whole, one = trained(monkeypatch, llama_folder, tmp_path / "one", steps=1)
    parts, two = trained(monkeypatch, llama_folder, tmp_path / "two", steps=1, micro_tokens=48)
    assert parts == pytest.approx(whole, rel=EQUAL)
    assert_equal(one, two, 5 * EQUAL)


def test_parts_of_lists_are_whole_lists(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name, settings in (("one", {}), ("two", {"micro_tokens": 100})):
        case = Case(llama_folder)
        case.train = case.train.model_copy(update={**settings, "steps": 1, "report_to": ()})
        steps, _ = planned(llama_folder, 1, 40)
        assert len(micro_steps(steps[0], 100)) > 1
        loss = sft.LossInputs(listwise=Listwise("lambda", 4))
        found.append(
            recorded(
                monkeypatch,
                case.model,
                encoder_of(llama_folder),
                steps,
                {},
                case.train,
                folder=tmp_path / name,
                loss=loss,
            )
        )
    assert found[1][0] == pytest.approx(found[0][0], rel=EQUAL)
    assert_equal(found[0][1], found[1][1], 5 * EQUAL)


def test_parts_of_preferences_have_the_same_margins(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, figures = [], []
    for name, settings in (("one", {}), ("two", {"micro_tokens": 64})):
        case = Case(llama_folder).moved()
        case.train = case.train.model_copy(update={**settings, "steps": 1, "report_to": ()})
        assert len(micro_steps(case.steps[0], 64)) > 1
        loss = sft.LossInputs(listwise=case.listwise)
        given = (case.model, case.encoder, case.steps, {}, case.train)
        found.append(recorded(monkeypatch, *given, folder=tmp_path / name, loss=loss))
        lines = (tmp_path / name / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
        figures.append(json.loads(lines[-1])["figures"])
    assert found[1][0] == pytest.approx(found[0][0], rel=EQUAL)
    assert_equal(found[0][1], found[1][1], 5 * EQUAL)
    assert figures[0].keys() == figures[1].keys() and "rewards/margins" in figures[0]
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)


def test_parts_of_pairs_divide_by_all_targets(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name, settings in (("one", {}), ("two", {"micro_tokens": 128})):
        section = ModelSection(name=str(base), dtype="float32", device="cpu")
        train = TrainSection(method="full", steps=1, valid_rows=0, report_to=(), **settings)
        encoder = encoder_of(base)
        steps = plan(iter(rows_of("bare-next-code", encoder, 40)), steps=1, batch_tokens=512, seed=0)
        assert len(micro_steps(steps[0], 128)) > 1
        torch.manual_seed(0)
        tokens = encoder.tokenizer.convert_tokens_to_ids(list(INDEX.tokens))
        model = lora.load_trainable(str(base), section, train, tokens=tokens)
        # Every part would draw its own dropout.
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        found.append(recorded(monkeypatch, model, encoder, steps, {}, train, folder=tmp_path / name))
    assert found[1][0] == pytest.approx(found[0][0], rel=EQUAL)
    assert_equal(found[0][1], found[1][1], 1e-5)


@pytest.mark.slow
def test_processes_with_another_number_of_parts_train_as_one(llama_folder: Path, tmp_path: Path) -> None:
    _, _, _, losses = training(llama_folder, tmp_path / "one")()
    for count in (1, 2, 3):
        out = tmp_path / str(count)
        reports = together(count, training(llama_folder, out, micro_tokens=48), tmp_path / f"reports{count}")
        assert all(report[3] == pytest.approx(losses, rel=LOSS) for report in reports)
        assert_alike(tmp_path / "one", out)


def test_losses_that_are_no_sums_over_parts_are_refused() -> None:
    changes = ["train.micro_tokens=256", "train.teacher={run: runs/teacher, relations: 1.0}"]
    with raises(RecipeError, Facts("contradiction", column="train.teacher", says="train.micro_tokens")):
        load_recipe("recipes/movielens-100k/four-tasks.yaml", changes)
