"""Losses over candidates: equal to their definitions, exact in packed rows, and learned from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmrec.backends.encode import IGNORED, TokenRow
from llmrec.errors import RecipeError
from llmrec.models.load import load_model
from llmrec.pipeline.objectives import listwise_of
from llmrec.pipeline.study import build_study
from llmrec.pipeline.training import plan_training, training_key
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import LoraSection, ModelSection, TrainSection
from llmrec.tasks.rows import Listwise, against
from llmrec.train import lora, sft
from llmrec.train.batches import plan
from llmrec.train.loss import label_loss, lambda_loss, list_loss, packed_loss, softmax_loss, target_losses
from llmrec.train.packing import stack, tree
from llmrec.train.steps import Step, Steps
from llmrec.types import Example, Message, Segment
from tests.conftest import encoder_of
from tests.facts import Facts, raises

TITLES = ("Heat", "Fargo", "The Big Lebowski", "Alien")
SETTINGS = """
name: lists
model: {{name: "{model}", max_length: 512}}
data: {{source: made-reviews, noun: products}}
tasks:
  direct: {{templates: [which-title], strategies: [likelihood], loss: {loss}, history: 3}}
train: {{steps: 6, batch_tokens: 1500, max_row_tokens: 400, valid_rows: 4}}
eval: {{candidates: {{count: 5}}}}
"""


def lists(count: int = 12) -> list[Example]:
    """Questions whose first candidate is the chosen one: the film that stands in the question."""
    made = []
    for n in range(count):
        chosen = n % len(TITLES)
        question = (Message("user", (Segment("text", "Again: "), Segment("item", TITLES[chosen]))),)
        for title in (TITLES[chosen], *TITLES[:chosen], *TITLES[chosen + 1 :]):
            made.append(
                Example(
                    id=f"{n}/{title}",
                    user_id="u",
                    task="direct",
                    template="direct/which-title",
                    messages=question,
                    answer=(Segment("target", title),),
                    ends_turn=True,
                )
            )
    return made


def planned(folder: Path, steps: int, count: int) -> tuple[Steps, list[TokenRow]]:
    rows = [encoder_of(folder).row(each) for each in lists(count)]
    return plan(chain(rows), steps=steps, batch_tokens=400, seed=0, lists=len(TITLES)), rows


def packed_of(step: Step) -> dict[str, Any]:
    laid = stack([tree(each.rows) for each in step.bins], 0)
    return {name: torch.from_numpy(each) for name, each in asdict(laid).items()}


def ranks(scores: Sequence[float]) -> list[int]:
    return [1 + sum(other > score for other in scores) for score in scores]


# --------------------------------------------------------------------------- what they are


def test_the_losses_are_what_their_papers_say() -> None:
    scores, chosen = np.random.default_rng(0).normal(size=(7, 6)) * 3, [0, 3, 5, 2, 2, 1, 4]
    softmax = pairs = 0.0
    for row, at in zip(scores.tolist(), chosen, strict=True):
        softmax += math.log(sum(math.exp(score) for score in row)) - row[at]
        places = ranks(row)
        for other, score in enumerate(row):
            gain = abs(1 / math.log2(1 + places[at]) - 1 / math.log2(1 + places[other]))
            pairs += gain * math.log2(1 + math.exp(score - row[at]))
    given = torch.from_numpy(scores), torch.tensor(chosen)
    assert float(softmax_loss(*given)) == pytest.approx(softmax, rel=1e-12)
    assert float(lambda_loss(*given)) == pytest.approx(pairs, rel=1e-6)


def test_the_loss_of_pairs_bounds_what_ndcg_lacks() -> None:
    """LambdaLoss, CIKM 2018, section 4: the weighted pairs are above 1 - NDCG, whatever the scores."""
    for seed in range(20):
        scores = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 9)))
        lost = 1 - 1 / math.log2(1 + ranks(scores[0].tolist())[4])
        assert float(lambda_loss(scores, torch.tensor([4]))) >= lost


# --------------------------------------------------------------------------- what they read


@pytest.mark.parametrize(
    ("folder", "temperature"), [("llama_folder", 1.0), ("llama_folder", 8.0), ("qwen_folder", 1.0)]
)
def test_scores_are_the_likelihoods_of_plain_rows(
    folder: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    """The claim: a list's loss is the softmax over the summed log-probabilities that scoring reads, within 1e-4."""
    path = request.getfixturevalue(folder)
    steps, rows = planned(path, 2, 8)
    model = load_model(str(path), ModelSection(name=str(path), dtype="float32")).eval()
    by_ids = {}
    for row in rows:
        loss, _ = label_loss(model, torch.tensor([row.ids]), torch.tensor([row.labels]))
        by_ids[row.ids] = -float(loss.detach())
    first = {rows[n].ids for n in range(0, len(rows), len(TITLES))}
    for step in steps:
        wanted = 0.0
        for each in step.bins:
            scores = [by_ids[row.ids] for row in each.rows]
            (chosen,) = [n for n, row in enumerate(each.rows) if row.weight > 0]
            assert each.rows[chosen].ids in first and len(scores) == len(TITLES)
            wanted += float(softmax_loss(torch.tensor([scores]) / temperature, torch.tensor([chosen])))
        total, count = list_loss(model, packed_of(step), len(TITLES), "softmax", temperature)
        assert count == len(step.bins)
        assert float(total.detach()) == pytest.approx(wanted, abs=1e-4)


def test_the_losses_of_targets_add_up(llama_folder: Path) -> None:
    steps, _ = planned(llama_folder, 1, 8)
    model = load_model(str(llama_folder), ModelSection(name=str(llama_folder), dtype="float32")).eval()
    packed = packed_of(steps[0]) | {"weights": torch.ones(len(packed_of(steps[0])["targets"]))}
    total, count = packed_loss(model, packed)
    losses = target_losses(model, packed)
    assert losses.shape == (count,)
    assert float(losses.sum().detach()) == pytest.approx(float(total.detach()), rel=1e-5)


def test_rows_of_a_list_stay_together(llama_folder: Path) -> None:
    steps, rows = planned(llama_folder, 3, 30)
    wanted = {frozenset(row.ids for row in rows[n : n + 4]) for n in range(0, len(rows), 4)}
    found = [frozenset(row.ids for row in each.rows) for step in steps for each in step.bins]
    assert len(found) > 3 and set(found) <= wanted
    assert all(sum(row.weight for row in each.rows) == 1 for step in steps for each in step.bins)


@pytest.mark.parametrize(("count", "prompt"), [(4, 40), (20, 200)])
def test_steps_of_lists_are_as_full_as_they_may_be(count: int, prompt: int) -> None:
    """What the rows of a list share counts once, so that many candidates make no small steps."""
    begin = tuple(range(10, 10 + prompt))
    ignored = (IGNORED,) * prompt

    def rows() -> Iterator[TokenRow]:
        for n in range(10**6):
            answer = (300 + n % count, 5, 6, 7)
            yield TokenRow((*begin, *answer), (*ignored, *answer))

    columns = prompt + 3 * count
    steps = plan(rows(), steps=24, batch_tokens=6 * columns + 10, seed=0, lists=count)
    sizes = [len(step.bins) for step in steps]
    assert len(steps) == 24 and sum(sizes) / len(sizes) > 5 and max(sizes) == 6


# --------------------------------------------------------------------------- training


@pytest.mark.parametrize("loss", [pytest.param("softmax", marks=pytest.mark.slow), "lambda"])
def test_it_learns_what_is_chosen(loss: Any, llama_folder: Path, tmp_path: Path) -> None:
    steps, rows = planned(llama_folder, 40, 400)
    section = ModelSection(name=str(llama_folder), dtype="float32")
    train = TrainSection(
        steps=40, learning_rate=1e-2, valid_every=40, save_every=40, valid_rows=0, lora=LoraSection(rank=8)
    )
    torch.manual_seed(0)
    model = lora.load_trainable(str(llama_folder), section, train)

    def best() -> float:
        with torch.no_grad():
            scores = [-float(label_loss(model, torch.tensor([r.ids]), torch.tensor([r.labels]))[0]) for r in rows[:16]]
        return sum(int(np.argmax(scores[n : n + 4]) == 0) for n in range(0, 16, 4)) / 4

    model.eval()
    assert best() < 1
    encoder = encoder_of(llama_folder)
    listwise = Listwise(loss, len(TITLES))
    done = sft.train(
        model, encoder, steps, {}, train, folder=tmp_path, seed=0, quiet=True, loss=sft.LossInputs(listwise=listwise)
    )
    model.eval()
    losses = [line["loss"] for line in done.log if line["loss"] is not None]
    assert losses[-1] < 0.5 * losses[0]
    assert best() == 1


def study_of(tmp_path: Path, model: Path, *changes: str, loss: str = "softmax") -> Any:
    page = tmp_path / "lists.yaml"
    page.write_text(SETTINGS.format(model=model, loss=loss), encoding="utf-8")
    return build_study(load_recipe(page, list(changes)))


def test_a_recipe_plans_lists_of_its_candidates(llama_folder: Path, tmp_path: Path) -> None:
    study = study_of(tmp_path, llama_folder)
    encoder = encoder_of(llama_folder, 512)
    assert listwise_of(study) == Listwise("softmax", 5)
    made = plan_training(study, encoder)
    assert all(len(each.rows) == 5 for step in made.steps for each in step.bins)
    task = study.training_tasks["direct"]
    example = next(iter(task.examples("train")))
    texts = ["".join(segment.text for segment in each.answer) for each in against(example)]
    titles = [study.data.dataset.items[item].title for item in (example.pairs[-1][1], *example.negatives)]
    assert texts == titles and len(set(texts)) == 5


def test_a_candidate_that_does_not_fit_drops_its_list(llama_folder: Path, tmp_path: Path) -> None:
    study = study_of(tmp_path, llama_folder, "train.max_row_tokens=16")
    encoder = encoder_of(llama_folder, 512)
    with raises(RecipeError, Facts("too-large", says="train.max_row_tokens=16")):
        plan_training(study, encoder)


def test_what_a_fusion_retrieves_is_part_of_what_was_trained(llama_folder: Path, tmp_path: Path) -> None:
    """Its baselines, and who weighs them, decide training lists: another adapter stands for others."""
    fused = "eval.candidates={kind: retrieved, retriever: fusion, count: 5}"
    found = [
        training_key(study_of(tmp_path, llama_folder, fused, *more), str(llama_folder))
        for more in (
            [],
            ["tasks.direct.baselines=[random, popularity, item-knn, markov-1, transitions]"],
            ["eval.fusion.reserved=0.3"],
        )
    ]
    assert len(set(found)) == 3
    judged = [
        training_key(study_of(tmp_path, llama_folder, "train.judge={users: 5}", *more), str(llama_folder))
        for more in ([], ["eval.fusion.reserved=0.3"], ["eval.candidates.count=4"], ["eval.bootstrap=9"])
    ]
    assert len(set(judged)) == 3 and judged[0] == judged[3]
    single = "eval.candidates={kind: retrieved, retriever: popularity, count: 5}"
    same = [
        training_key(study_of(tmp_path, llama_folder, single, *more), str(llama_folder))
        for more in ([], ["eval.fusion.reserved=0.3"])
    ]
    assert same[0] == same[1]


def test_what_it_cannot_do_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    column = "tasks.direct.loss"
    with raises(RecipeError, Facts("contradiction", column=column, says="answers with a candidate's label")):
        study_of(tmp_path, llama_folder, "tasks.direct.templates=[after-history]", "tasks.direct.strategies=[label]")
    both = study_of(tmp_path, llama_folder, "tasks.sequential.weight=1")
    with raises(RecipeError, Facts("contradiction", column=column, says="train.only")):
        listwise_of(both)
    with raises(RecipeError, Facts("contradiction", column=column, says="encoder-decoder")):
        listwise_of(study_of(tmp_path, llama_folder), paired=True)
