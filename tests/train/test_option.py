"""Soft prompts, option tuning and option-adapter tuning on tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrec.backends.hf.backend import HFBackend
from llmrec.errors import RecipeError
from llmrec.models import bottleneck
from llmrec.models.load import load_model
from llmrec.models.soft_prompt import (
    TIED_METHODS,
    SoftPrompt,
    add_soft_prompts,
    copy_soft_prompt_files,
    soft_token_names,
)
from llmrec.pipeline.objectives import answer_labels
from llmrec.pipeline.study import Study, build_study
from llmrec.pipeline.training import plan_training
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import SOFT_PROMPT_METHODS, SoftSection, TrainSection
from llmrec.train import heads as rating_head
from llmrec.train import lora
from llmrec.train.batches import AnswerLabels, plan_steps
from llmrec.train.loss import label_loss
from llmrec.types import Example, Message, Prompt, Segment
from tests.conftest import encoder_of, section
from tests.facts import Facts, raises
from tests.train.tiny import alone, example, fit, tear, user

PROMPTS = 4


def question(film: str) -> tuple[Message, ...]:
    return user(f"rating {film}")


def rated(number: int, **changes: Any) -> Example:
    """Return an example: one film is liked and the other is not."""
    film, label = (("Heat", "4"), ("Jaws", "2"))[number % 2]
    return replace(example(question(film), label, id=str(number), task="ctr"), **changes)


class Case:
    """A tiny model with soft prompts, and rows of two labels."""

    def __init__(self, method: str, folder: Path, **settings: Any) -> None:
        soft = {"prompts": PROMPTS, "rank": 4}
        values = {"learning_rate": 3e-2, "soft": SoftSection(**soft), "save_every": 2, "valid_every": 2, **settings}
        self.folder = folder
        self.train = TrainSection(method=method, **values)
        self.encoder = rating_head.soft_prompt_encoder(encoder_of(folder), self.train)
        self.labels = AnswerLabels(self.encoder, PROMPTS, tied=method in TIED_METHODS)
        self.rows = [row for number in range(64) if (row := self.labels.row(self.encoder.row(rated(number))))]
        self.soft = SoftPrompt(PROMPTS, tuple(self.labels.ids), tied=method in TIED_METHODS)
        self.model = rating_head.load_soft_prompt_model(
            str(folder), section(folder), self.train, self.encoder, self.soft
        )
        self.steps = plan_steps(iter(self.rows), steps=8, batch_tokens=160, seed=0)

    def run(self, out: Path) -> str:
        valid = {"ctr": self.rows[:4]}
        return fit(self.model, self.encoder, self.steps, self.train, out, valid, soft=self.soft).adapter_sha256


def test_soft_prompts_precede_prompts_and_cannot_be_forged(llama_folder: Path) -> None:
    encoder = Case("prompt", llama_folder).encoder
    ids = encoder.tokenizer.convert_tokens_to_ids(soft_token_names(PROMPTS))
    assert encoder.chat(question("Heat"))[:PROMPTS] == ids
    forged = encoder.chat(question(soft_token_names(PROMPTS)[1]))
    assert [each for each in forged if each in ids] == ids
    assert "soft" not in encoder.completion([*ids, *encoder.piece("Heat")], None, 0).text


def test_class_vectors_get_the_gradients_of_both_uses(llama_folder: Path) -> None:
    case = Case("option", llama_folder)
    rows = rating_head.soft_prompt_rows(case.model)
    loss = rating_head.OptionLoss(rows, len(case.soft.labels))
    assert loss.rows.data_ptr() == rows.data_ptr() and rows.requires_grad

    def gradient(by: Any) -> Any:
        case.model.zero_grad()
        label_loss(case.model, *alone(case.rows[0]), by)[0].backward()
        return rows.grad.clone()

    copied = rows.detach().clone().requires_grad_(True)
    both, as_prompt = gradient(loss), gradient(rating_head.OptionLoss(copied, len(case.soft.labels)))
    assert copied.grad is not None and copied.grad[-2:].abs().min() > 0 and as_prompt[-2:].abs().max() > 0
    assert torch.allclose(both, as_prompt + copied.grad, atol=1e-5)
    # The other prompts are no class vectors.
    assert torch.equal(copied.grad[:-2], torch.zeros_like(copied.grad[:-2]))


def test_soft_prompts_are_never_generated(llama_folder: Path) -> None:
    base = load_model(str(llama_folder), section(llama_folder))
    head, count = base.get_output_embeddings(), base.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        direction = torch.zeros(head.weight.shape[1])
        direction[0] = 1
        head.weight[:, 0] = -5 - torch.rand(count)
        add_soft_prompts(base, SoftPrompt(PROMPTS), range(count, count + PROMPTS))
        logits = base.get_output_embeddings().weight @ direction
    assert logits.max() < 0 and int(logits.argmax()) < count
    assert torch.allclose(logits[count : count + PROMPTS], logits[:count].mean().expand(PROMPTS), atol=1e-4)


def test_new_bottleneck_adapter_changes_nothing(llama_folder: Path) -> None:
    plain, base = (load_model(str(llama_folder), section(llama_folder)) for _ in range(2))
    bottleneck.attach(base, 4, seed=0)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, base(ids).logits)
        for layer in base.get_decoder().layers:
            layer.mlp.llmrec_bottleneck.scale.fill_(0.1)
        assert not torch.equal(plain(ids).logits, base(ids).logits)


def test_classes_start_with_the_odds_of_the_base_model(llama_folder: Path) -> None:
    case = Case("option", llama_folder)
    row = case.rows[0]
    states = case.model.get_base_model().get_decoder()(torch.tensor([row.ids])).last_hidden_state[0]
    last = max(n for n, label in enumerate(row.labels) if label >= 0) - 1
    logits = states[last] @ rating_head.soft_prompt_rows(case.model)[-2:].T
    head = case.model.get_output_embeddings().weight[list(case.soft.labels)]
    assert torch.allclose(logits, states[last] @ head.T)


@pytest.mark.parametrize("method", SOFT_PROMPT_METHODS)
def test_merged_model_answers_like_the_trained_one(method: str, llama_folder: Path, tmp_path: Path) -> None:
    case = Case(method, llama_folder)
    before = rating_head.soft_prompt_rows(case.model).detach().clone()
    case.run(tmp_path / "run")
    assert not torch.equal(before, rating_head.soft_prompt_rows(case.model))
    target = tmp_path / "merged"
    target.mkdir()
    lora.merge_adapter(str(llama_folder), section(llama_folder), tmp_path / "run" / "adapter", target)
    copy_soft_prompt_files(tmp_path / "run" / "adapter", target)
    case.encoder.tokenizer.save_pretrained(target)
    again = encoder_of(target)
    backend = HFBackend(load_model(str(target), section(target)), again)
    odds = []
    for number in range(2):
        prompt = Prompt(messages=question(("Heat", "Jaws")[number]))
        yes, no = backend.score([prompt], [("4", "2")], closed=False)[0].logprobs
        states = case.model.eval().get_base_model().get_decoder()(torch.tensor([again.prompt(prompt)]))
        state = states.last_hidden_state[0, -1]
        vectors = rating_head.soft_prompt_rows(case.model)[-2:] if method in TIED_METHODS else None
        head = case.model.get_output_embeddings().weight[list(case.soft.labels)] if vectors is None else vectors
        trained = dict(zip(case.soft.labels, (head @ state).tolist(), strict=True))
        labels = [again.piece(text)[0] for text in ("4", "2")]
        assert yes - no == pytest.approx(trained[labels[0]] - trained[labels[1]], abs=1e-4)
        odds.append(yes - no)
    assert odds[0] > odds[1]
    # Other programs can read the folder, but without adapters.
    plain = AutoModelForCausalLM.from_pretrained(target)
    ids = torch.tensor([again.prompt(prompt)])
    with torch.no_grad():
        same = torch.allclose(plain(ids).logits, backend.model(ids).logits, atol=1e-5)
    assert same == (method != "option-adapter")


@pytest.mark.slow
def test_resumed_run_ends_like_an_uninterrupted_one(llama_folder: Path, tmp_path: Path) -> None:
    full = Case("option-adapter", llama_folder).run(tmp_path)
    tear(tmp_path, 8)
    assert Case("option-adapter", llama_folder).run(tmp_path) == full


def test_answers_without_label_are_rejected_or_learned_as_tokens(llama_folder: Path) -> None:
    case = Case("option", llama_folder)
    long = case.encoder.row(rated(0, answer=(Segment("target", "Toy Story"),)))
    with raises(RecipeError, Facts("contradiction", column="train.method", says="ctr")):
        case.labels.row(long)
    with raises(RecipeError, Facts("contradiction", column="train.method", says="train.soft.prompts=1")):
        tight = AnswerLabels(case.encoder, 1, tied=True)
        [tight.row(case.encoder.row(rated(number))) for number in range(2)]
    free = AnswerLabels(case.encoder, PROMPTS, tied=False)
    rows = [case.encoder.row(rated(0)), long]
    assert [free.row(row) for row in rows] == rows and free.ids == []


@pytest.mark.slow
def test_run_and_export(llama_folder: Path, tmp_path: Path) -> None:
    from llmrec.exports.export import export
    from llmrec.pipeline import run as pipeline
    from tests.pipeline.test_ctr_run import SMALL

    soft = [each for each in SMALL if "lora" not in each and not each.startswith("tasks=")]
    # The tiny tokenizer writes a digit as one token, but no word.
    only = "tasks={rating: {strategies: [expected], history: 5}}"
    more = ["train.lora={}", "train.method=option-adapter", "train.soft={prompts: 6, rank: 2}", "eval.arms=[tuned]"]
    chosen = load_recipe(
        "recipes/movielens-100k/four-tasks.yaml",
        [f"model.name={llama_folder}", "model.dtype=float32", *soft, only, *more],
    )
    done = pipeline.run(chosen, tmp_path / "run", quiet=True)
    row = next(row for row in done.results["rows"] if row["id"].startswith("rating/tuned/expected/"))
    assert row["parse_rate"] == 1.0 and done.results["training"]["method"] == "option-adapter"
    agreement = export(tmp_path / "run", tmp_path / "out", check_users=4).agreement
    assert agreement is not None and agreement.logit < 1e-3
    assert {"bottlenecks.safetensors", "soft_prompt.json", "model.safetensors"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }
    with raises(RecipeError, Facts("contradiction", column="eval.backend", says="eval.backend=hf")):
        load_recipe("recipes/movielens-100k/yes-no.yaml", ["train.lora={}", *more[1:], "eval.backend=vllm"])


def study_of(folder: Path, tasks: str, *more: str) -> Study:
    changes = [f"model.name={folder}", "model.dtype=float32", f"tasks={tasks}", "train.lora={}", "eval.backend=hf"]
    small = ["train.steps=2", "train.batch_tokens=1024", "train.max_row_tokens=1000", "train.valid_rows=20"]
    data = "data={source: made-reviews, noun: products, split: {kind: last_share, valid: 0.2, test: 0.4}}"
    return build_study(
        load_recipe("recipes/movielens-100k/four-tasks.yaml", [*changes, *small, data, "reviews=null", *more])
    )


RATED = "rating: {strategies: [expected], history: 5}"
LISTED = "sequential: {templates: [next-title], warm_up: 1}"


def test_validation_rows_of_untrained_tasks_define_no_labels(llama_folder: Path) -> None:
    plain, prompts = encoder_of(llama_folder, 2048), {}
    for method in ("option", "prompt"):
        for tasks in (RATED, f"{RATED}, {LISTED}"):
            more = ["train.only=[rating]"] if LISTED in tasks else []
            study = study_of(llama_folder, f"{{{tasks}}}", f"train.method={method}", "train.soft={prompts: 6}", *more)
            planned = plan_training(study, rating_head.soft_prompt_encoder(plain, study.recipe.train))
            assert planned.soft is not None and len(planned.soft.labels) == 5
            prompts[method, tasks] = planned.soft
            # A loss over labels exists only for the trained family, a loss over tokens for every family.
            assert set(planned.valid) == ({"rating"} if method == "option" or not more else {"rating", "sequential"})
        assert prompts[method, RATED] == prompts[method, f"{RATED}, {LISTED}"]


def test_labels_of_a_task_are_known_before_planning(llama_folder: Path) -> None:
    plain = encoder_of(llama_folder, 2048)
    study = study_of(llama_folder, f"{{{RATED}}}", "train.method=option", "train.soft={prompts: 6}")
    labels = answer_labels(study, plain)
    assert labels is not None and labels.ids == [plain.piece(str(stars))[0] for stars in range(1, 6)]
    with raises(RecipeError, Facts("contradiction", column="train.method", says="train.soft.prompts=4")):
        answer_labels(study_of(llama_folder, f"{{{RATED}}}", "train.method=option", "train.soft={prompts: 4}"), plain)
    # The tiny tokenizer writes no word as one token.
    yes_no = "{ctr: {strategies: [yes-no], history: 5, liked: 4}}"
    with raises(RecipeError, Facts("contradiction", column="train.method", says="more than one token")):
        answer_labels(study_of(llama_folder, yes_no, "train.method=option"), plain)
    with raises(RecipeError, Facts("contradiction", column="train.method", says="train.only")):
        answer_labels(study_of(llama_folder, f"{{{RATED}, {LISTED}}}", "train.method=option"), plain)


def test_unknown_label_has_no_validation_loss(llama_folder: Path) -> None:
    case = Case("option", llama_folder)
    case.labels.closed = True
    other = case.encoder.row(rated(0, answer=(Segment("target", "5"),)))
    assert case.labels.row(other) is None and case.labels.ids == list(case.soft.labels)
    assert case.labels.row(case.encoder.row(rated(0))) == case.rows[0]
