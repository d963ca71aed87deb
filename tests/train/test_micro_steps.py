"""A step that is computed in parts has the loss and gradients of the full step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrec.backends.encode import TokenRow
from llmrec.errors import RecipeError
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import TrainSection
from llmrec.tasks.rows import Listwise
from llmrec.train import lora
from llmrec.train.batches import micro_steps, plan_steps
from llmrec.train.steps import Step
from tests.conftest import encoder_of, section
from tests.facts import Facts, raises
from tests.train.test_listwise import planned
from tests.train.test_preference import Case
from tests.train.test_seq2seq import INDEX, base, rows_of
from tests.train.test_world import LOSS, assert_alike, training
from tests.train.tiny import Gradients, assert_equal, recorded, trained
from tests.train.together import together

__all__ = ["base"]  # a fixture
Trained = tuple[list[float], Gradients]
# float32 sums in another order.
EQUAL = 1e-6


def ones(*lengths: int) -> Step:
    return Step(tuple(TokenRow((1,) * length, (-100, *[1] * (length - 1))) for length in lengths))


def test_parts_contain_every_row_within_the_limit() -> None:
    step = ones(9, 2, 3, 3, 2, 30)
    parts = micro_steps(step, 10)
    assert sorted(len(row.ids) for part in parts for row in part.rows) == [2, 2, 3, 3, 9, 30]
    assert all(part.padded_tokens <= 10 or len(part.rows) == 1 for part in parts)
    assert len(parts) == 4
    assert micro_steps(step, None) == [step] == micro_steps(step, 10**6)


def assert_parts_equal(full: Trained, parts: Trained, tolerance: float = 5 * EQUAL) -> None:
    assert parts[0] == pytest.approx(full[0], rel=EQUAL)
    assert_equal(full[1], parts[1], tolerance)


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
def test_parts_equal_the_full_step(
    settings: dict[str, Any], llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = trained(monkeypatch, llama_folder, tmp_path / "one", steps=1, **settings)
    parts = trained(monkeypatch, llama_folder, tmp_path / "two", steps=1, micro_tokens=48, **settings)
    assert_parts_equal(full, parts)


@pytest.mark.slow
def test_parts_divide_by_the_weights_of_all_rows(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = plan_steps

    def weighted(*args: Any, **options: Any) -> Any:
        steps = original(*args, **options)
        return steps.weighing([1.0 + n % 3 for n in range(len(steps.table))])

    monkeypatch.setattr("tests.train.tiny.plan_steps", weighted)
    full = trained(monkeypatch, llama_folder, tmp_path / "one", steps=1)
    parts = trained(monkeypatch, llama_folder, tmp_path / "two", steps=1, micro_tokens=48)
    assert_parts_equal(full, parts)


@pytest.mark.parametrize("kind", ["lists", "preferences"])
def test_parts_contain_complete_lists(
    kind: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 100 if kind == "lists" else 64
    results, figures = [], []
    for name, settings in (("one", {}), ("two", {"micro_tokens": limit})):
        case = Case(llama_folder)
        if kind == "lists":
            case.steps, case.listwise = planned(llama_folder, 1, 40)[0], Listwise("lambda", 4)
        else:
            case.moved()
        case.train = case.train.model_copy(update={**settings, "steps": 1, "report_to": ()})
        assert len(micro_steps(case.steps[0], limit)) > 1
        inputs = (case.model, case.encoder, case.steps, {}, case.train)
        results.append(recorded(monkeypatch, *inputs, folder=tmp_path / name, listwise=case.listwise))
        lines = (tmp_path / name / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
        figures.append(json.loads(lines[-1]).get("figures", {}))
    assert_parts_equal(*results)
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)
    assert kind == "lists" or "rewards/margins" in figures[0]


def test_parts_of_encoder_decoders_divide_by_all_targets(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, encoder = [], encoder_of(base)
    steps = plan_steps(iter(rows_of("bare-next-code", encoder, 40)), steps=1, batch_tokens=512, seed=0)
    assert len(micro_steps(steps[0], 128)) > 1
    for limit in (None, 128):
        train = TrainSection(method="full", steps=1, valid_rows=0, report_to=(), micro_tokens=limit)
        torch.manual_seed(0)
        tokens = encoder.tokenizer.convert_tokens_to_ids(list(INDEX.tokens))
        model = lora.load_trainable(str(base), section(base), train, tokens=tokens)
        # Parts would draw separate dropout.
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        results.append(recorded(monkeypatch, model, encoder, steps, {}, train, folder=tmp_path / str(limit)))
    assert_parts_equal(*results, tolerance=1e-5)


@pytest.mark.slow
def test_processes_with_different_numbers_of_parts_train_alike(llama_folder: Path, tmp_path: Path) -> None:
    _, _, _, losses = training(llama_folder, tmp_path / "one")()
    for count in (1, 3):
        out = tmp_path / str(count)
        reports = together(count, training(llama_folder, out, micro_tokens=48), tmp_path / f"reports{count}")
        assert all(report[3] == pytest.approx(losses, rel=LOSS) for report in reports)
        assert_alike(tmp_path / "one", out)


def test_rejects_losses_that_are_no_sums_over_parts() -> None:
    changes = ["train.micro_tokens=256", "train.teacher={run: runs/teacher, relations: 1.0}"]
    with raises(RecipeError, Facts("contradiction", column="train.teacher", says="train.micro_tokens")):
        load_recipe("recipes/movielens-100k/four-tasks.yaml", changes)
