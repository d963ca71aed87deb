"""Losses over candidates: equal to their definitions, exact in packed rows, and learned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmrec.backends.encode import IGNORED, TokenRow
from llmrec.errors import RecipeError
from llmrec.pipeline.objectives import listwise_settings
from llmrec.pipeline.study import build_study
from llmrec.pipeline.training import plan_training, training_key
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import LoraSection, TrainSection
from llmrec.tasks.rows import Listwise, split_rejected
from llmrec.train import lora
from llmrec.train.batches import plan_steps
from llmrec.train.loss import label_loss, lambda_loss, list_loss, packed_loss, softmax_loss, target_losses
from llmrec.train.steps import PlannedSteps
from tests.conftest import encoder_of, opened, section
from tests.facts import Facts, raises
from tests.train.tiny import FILMS, alone, fit, lists, packed

SETTINGS = """
name: lists
model: {{name: "{model}", max_length: 512}}
data: {{source: made-reviews, noun: products}}
tasks:
  direct: {{templates: [which-title], strategies: [likelihood], loss: {loss}, history: 3}}
train: {{steps: 6, batch_tokens: 1500, max_row_tokens: 400, valid_rows: 4}}
eval: {{candidates: {{count: 5}}}}
"""


def planned(folder: Path, steps: int, count: int) -> tuple[PlannedSteps, list[TokenRow]]:
    encoder = encoder_of(folder)
    rows = [encoder.row(each) for one in lists(count) for each in split_rejected(one)]
    return plan_steps(iter(rows), steps=steps, batch_tokens=400, seed=0, lists=len(FILMS)), rows


def ranks(scores: Sequence[float]) -> list[int]:
    return [1 + sum(other > score for other in scores) for score in scores]


def test_losses_equal_their_definitions() -> None:
    scores, chosen = np.random.default_rng(0).normal(size=(7, 6)) * 3, [0, 3, 5, 2, 2, 1, 4]
    softmax = pairs = 0.0
    for row, at in zip(scores.tolist(), chosen, strict=True):
        softmax += math.log(sum(math.exp(score) for score in row)) - row[at]
        positions = ranks(row)
        for other, score in enumerate(row):
            gain = abs(1 / math.log2(1 + positions[at]) - 1 / math.log2(1 + positions[other]))
            pairs += gain * math.log2(1 + math.exp(score - row[at]))
    inputs = torch.from_numpy(scores), torch.tensor(chosen)
    assert float(softmax_loss(*inputs)) == pytest.approx(softmax, rel=1e-12)
    assert float(lambda_loss(*inputs)) == pytest.approx(pairs, rel=1e-6)


@pytest.mark.parametrize(("folder", "temperature"), [("llama_folder", 8.0), ("qwen_folder", 1.0)])
def test_list_loss_equals_softmax_over_plain_rows(
    folder: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(folder)
    steps, rows = planned(path, 2, 8)
    model = opened(path)[0].eval()
    by_ids = {row.ids: -float(label_loss(model, *alone(row))[0].detach()) for row in rows}
    first = {rows[n].ids for n in range(0, len(rows), len(FILMS))}
    for step in steps:
        expected = 0.0
        for each in step.bins:
            scores = [by_ids[row.ids] for row in each.rows]
            (chosen,) = [n for n, row in enumerate(each.rows) if row.weight > 0]
            assert each.rows[chosen].ids in first and len(scores) == len(FILMS)
            expected += float(softmax_loss(torch.tensor([scores]) / temperature, torch.tensor([chosen])))
        inputs = packed(*(each.rows for each in step.bins))
        total, count = list_loss(model, inputs, len(FILMS), "softmax", temperature)
        assert count == len(step.bins)
        assert float(total.detach()) == pytest.approx(expected, abs=1e-4)
        # Without row weights, the losses of targets sum to the loss of packed rows.
        inputs |= {"weights": torch.ones(len(inputs["targets"]))}
        (plain, targets), losses = packed_loss(model, inputs), target_losses(model, inputs)
        assert losses.shape == (targets,)
        assert float(losses.sum().detach()) == pytest.approx(float(plain.detach()), rel=1e-5)


@pytest.mark.parametrize(("count", "prompt"), [(4, 40), (20, 200)])
def test_steps_of_lists_are_full(count: int, prompt: int) -> None:
    begin = tuple(range(10, 10 + prompt))
    ignored = (IGNORED,) * prompt

    def rows() -> Iterator[TokenRow]:
        for n in range(10**6):
            answer = (300 + n % count, 5, 6, 7)
            yield TokenRow((*begin, *answer), (*ignored, *answer))

    columns = prompt + 3 * count
    steps = plan_steps(rows(), steps=24, batch_tokens=6 * columns + 10, seed=0, lists=count)
    sizes = [len(step.bins) for step in steps]
    assert len(steps) == 24 and sum(sizes) / len(sizes) > 5 and max(sizes) == 6


@pytest.mark.parametrize("loss", [pytest.param("softmax", marks=pytest.mark.slow), "lambda"])
def test_training_learns_the_chosen_candidates(loss: Any, llama_folder: Path, tmp_path: Path) -> None:
    steps, rows = planned(llama_folder, 24, 180)
    train = TrainSection(steps=24, learning_rate=1e-2, valid_rows=0, save_every=24, lora=LoraSection(rank=8))
    torch.manual_seed(0)
    model = lora.load_trainable(str(llama_folder), section(llama_folder), train)

    def right() -> float:
        model.eval()
        with torch.no_grad():
            scores = [-float(label_loss(model, *alone(row))[0]) for row in rows[:16]]
        return sum(int(np.argmax(scores[n : n + 4]) == 0) for n in range(0, 16, 4)) / 4

    assert right() < 1
    done = fit(model, encoder_of(llama_folder), steps, train, tmp_path, listwise=Listwise(loss, len(FILMS)))
    losses = [line["loss"] for line in done.log if line["loss"] is not None]
    assert losses[-1] < 0.5 * losses[0]
    assert right() == 1


def study_of(tmp_path: Path, model: Path, *changes: str, loss: str = "softmax") -> Any:
    page = tmp_path / "lists.yaml"
    page.write_text(SETTINGS.format(model=model, loss=loss), encoding="utf-8")
    return build_study(load_recipe(page, list(changes)))


def test_recipe_plans_lists_of_its_candidates(llama_folder: Path, tmp_path: Path) -> None:
    study, encoder = study_of(tmp_path, llama_folder), encoder_of(llama_folder, 512)
    assert listwise_settings(study) == Listwise("softmax", 5)
    assert all(len(each.rows) == 5 for step in plan_training(study, encoder).steps for each in step.bins)
    first = next(iter(study.training_tasks["direct"].examples("train")))
    texts = ["".join(segment.text for segment in each.answer) for each in split_rejected(first)]
    titles = [study.data.dataset.items[item].title for item in (first.pairs[-1][1], *first.negatives)]
    assert texts == titles and len(set(texts)) == 5
    # A candidate that is too long drops its list.
    short = study_of(tmp_path, llama_folder, "train.max_row_tokens=16")
    with raises(RecipeError, Facts("too-large", says="train.max_row_tokens=16")):
        plan_training(short, encoder)


def test_training_key_depends_on_fusion_of_candidates(llama_folder: Path, tmp_path: Path) -> None:
    def keys(first: str, *changes: list[str]) -> list[str]:
        studies = (study_of(tmp_path, llama_folder, first, *more) for more in ([], *changes))
        return [training_key(study, str(llama_folder)) for study in studies]

    reserved = ["eval.fusion.reserved=0.3"]
    baselines = ["tasks.direct.baselines=[random, popularity, item-knn, markov-1, transitions]"]
    assert len(set(keys("eval.candidates={kind: retrieved, retriever: fusion, count: 5}", baselines, reserved))) == 3
    judged = keys("train.judge={users: 5}", reserved, ["eval.candidates.count=4"], ["eval.bootstrap=9"])
    assert len(set(judged)) == 3 and judged[0] == judged[3]
    assert len(set(keys("eval.candidates={kind: retrieved, retriever: popularity, count: 5}", reserved))) == 1


def test_rejects_impossible_settings(llama_folder: Path, tmp_path: Path) -> None:
    column = "tasks.direct.loss"
    with raises(RecipeError, Facts("contradiction", column=column, says="answers with a candidate's label")):
        study_of(tmp_path, llama_folder, "tasks.direct.templates=[after-history]", "tasks.direct.strategies=[label]")
    both = study_of(tmp_path, llama_folder, "tasks.sequential.weight=1")
    with raises(RecipeError, Facts("contradiction", column=column, says="train.only")):
        listwise_settings(both)
    with raises(RecipeError, Facts("contradiction", column=column, says="encoder-decoder")):
        listwise_settings(study_of(tmp_path, llama_folder), paired=True)
