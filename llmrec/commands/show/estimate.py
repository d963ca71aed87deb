"""What a recipe would do, found without weights: rows, tokens, prompts, and an estimate of time and memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from llmrec.backends.encode import Encoder
from llmrec.errors import require
from llmrec.experiment.row_specs import asks
from llmrec.experiment.study import Study
from llmrec.experiment.training import plan_training
from llmrec.models.load import device, dtype, load_config
from llmrec.models.traits import auto_class, is_paired
from llmrec.strategies.counting import questions_of
from llmrec.types import Example, Request

SHOWN = 3
"""Prompts that are shown of a task."""
_SAMPLE = 24
# Share of a plain matrix product's speed that a training step or a prefill reaches; measured on two cores.
_EFFICIENCY = 0.45
# A strategy that is not among them counts one token.
_ONE_TOKEN = 1
_ANSWER_TOKENS = {
    "likelihood": 0,
    "likelihood-prior": 0,
    "search": 0,
    "head": 0,
    "expected": 1,
    "parsed": 3,
    "yes-no": 2,
    "parsed-yes-no": 3,
    "list": 60,
    "text": 30,
}
# Seconds to start one vLLM engine, and to load one hf model.
_START = {"vllm": 45.0, "hf": 3.0, "openai": 0.0, "fake": 0.0}


@dataclass(frozen=True)
class Estimate:
    """Totals of a dry run.

    Attributes:
        parameters: Weights of the model.
        train_tokens: Tokens of all planned steps.
        eval_tokens: Prompt and answer tokens of every evaluated row, by arm.
        train_seconds: Estimated.
        eval_seconds: Estimated, engine starts included, by arm; empty where a server answers.
        memory_gb: Estimated peak of the training process.
    """

    parameters: int
    train_tokens: int
    eval_tokens: dict[str, int]
    train_seconds: float
    eval_seconds: dict[str, float]
    memory_gb: float


def rendered(study: Study, encoder: Encoder, count: int = SHOWN) -> dict[str, list[str]]:
    """Return rendered training prompts with answers per task, one of each template first."""
    shown: dict[str, list[str]] = {}
    for family in study.tasks:
        first: dict[str, str] = {}
        more: list[str] = []
        for example in islice(study.training_examples(family), 64):
            text = f"[{example.template}]\n{marked(example, encoder)}"
            if example.template in first:
                more.append(text)
            else:
                first[example.template] = text
        shown[family] = [*first.values(), *more][:count]
    return shown


def marked(example: Example, encoder: Encoder) -> str:
    """Return a row as the model reads it, with what is learned in «these marks»."""
    answer = "".join(f"«{s.text}»" if s.kind == "target" else s.text for s in example.answer)
    return encoder.turns_text(example.messages) + answer


def train_rows(study: Study, encoder: Encoder, folder: str) -> dict[str, int | dict[str, int]]:
    """Return planned steps, rows by task and tokens; ``folder`` holds the base model's configuration."""
    planned = plan_training(study, encoder, paired=is_paired(_config(folder, study)))
    return {
        "steps": len(planned.steps),
        "rows": dict(planned.rows),
        "dropped_rows": dict(planned.dropped),
        "tokens": sum(step.tokens for step in planned.steps),
        "padded_tokens": sum(step.padded_tokens for step in planned.steps),
        "target_tokens": sum(step.targets for step in planned.steps),
        "validation_tokens": sum(len(row.ids) for rows in planned.valid.values() for row in rows),
    }


def eval_tokens(study: Study, encoder: Encoder) -> dict[str, int]:
    """Estimate each arm's tokens from a sample of its prompts."""
    totals: dict[str, int] = {}
    for arm in study.recipe.eval.arms:
        shots = study.recipe.eval.shots.k if arm == "few-shot" else 0
        totals[arm] = 0
        for family in (family for family in study.tasks if asks(study.recipe, family, arm)):
            cases = study.cases(family)
            for template in study.eval_templates(family):
                strategies = study.section(family).strategies
                for strategy in study.tasks[family].asked_by(template, strategies, tuned=arm == "tuned"):
                    used = [
                        _tokens(study, family, encoder, c.request, template.name, shots, strategy)
                        for c in cases[:_SAMPLE]
                    ]
                    totals[arm] += round(sum(used) / max(len(used), 1) * len(cases))
    return totals


def _tokens(
    study: Study, family: str, encoder: Encoder, request: Request, template: str, shots: int, strategy: str
) -> int:
    task = study.tasks[family]
    asked = questions_of(strategy, len(request.candidates or ()), study.recipe.eval) if request.candidates else None
    if asked is not None:
        part = replace(request, candidates=(request.candidates or ())[: asked.size])
        return asked.prompts * len(encoder.prompt(task.prompt(part, template=template, shots=shots, want=asked.want)))
    prompt = task.prompt(request, template=template, shots=shots)
    if strategy == "two-step":
        # The second prompt holds what the first one wrote, at most as long as it may be.
        second = len(encoder.prompt(prompt)) + task.profile_tokens
        first = len(encoder.prompt(task.profile_prompt(request))) + task.profile_tokens
        return int(first + study.recipe.eval.permutations * second)
    length = len(encoder.prompt(prompt)) + _ANSWER_TOKENS.get(strategy, _ONE_TOKEN)
    if strategy in ("likelihood", "likelihood-prior"):
        length += sum(len(encoder.piece(text)) + 1 for text in task.continuations(request, template=template))
    if strategy == "search":
        length += study.recipe.eval.beams * len(encoder.piece(task.continuations(request, template=template)[0]))
    return length


def estimate(study: Study, encoder: Encoder, folder: str, rows: Mapping[str, Any]) -> Estimate:
    """Estimate time and memory from token counts, model size and a short matrix product on this machine.

    ``rows`` is what `train_rows` counted; empty where nothing is trained.
    """
    recipe = study.recipe
    parameters, head = _size(folder, study)
    speed = _flops_per_second(study)
    body = parameters - head
    share = 1.0
    if recipe.train.method != "full" and recipe.train.lora.top_layers:
        share = min(1.0, recipe.train.lora.top_layers / _layers(folder, study))
    # Forward, and backward through the adapted blocks: to inputs only under LoRA, to weights too in full tuning.
    per_token = 2 * body * (1 + share) if recipe.train.method != "full" else 6 * body
    work = rows.get("padded_tokens", 0) * per_token + rows.get("target_tokens", 0) * 4 * head
    tokens = eval_tokens(study, encoder)
    start = _START[recipe.eval.backend] + _START["hf"]
    seconds = {arm: count * 2 * body / (speed * _EFFICIENCY) + start for arm, count in tokens.items()}
    if recipe.eval.backend == "openai":
        seconds = {}  # a server takes its own time
    size = 4 if recipe.train.method == "full" else 2
    states = 12 * parameters if recipe.train.method == "full" else 0
    activations = recipe.train.batch_tokens * _layers(folder, study) * 34 * _width(folder, study) * share
    return Estimate(
        parameters=parameters,
        train_tokens=rows.get("tokens", 0),
        eval_tokens=tokens,
        train_seconds=work / (speed * _EFFICIENCY),
        eval_seconds=seconds,
        memory_gb=round((parameters * size + states + activations + 1.5e9) / 2**30, 1),
    )


def _size(folder: str, study: Study) -> tuple[int, int]:
    """Count weights, and those of the head, on the meta device: nothing is loaded."""
    torch = require("torch", "train")
    config = _config(folder, study)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    total = sum(p.numel() for p in model.parameters())
    return total, model.get_output_embeddings().weight.numel()


def _config(folder: str, study: Study) -> Any:
    return load_config(folder, study.recipe.model)


def _layers(folder: str, study: Study) -> int:
    return int(_config(folder, study).get_text_config().num_hidden_layers)


def _width(folder: str, study: Study) -> int:
    return int(_config(folder, study).get_text_config().hidden_size)


def _flops_per_second(study: Study) -> float:
    """Time a matrix product in the model's dtype; about a fifth of a second."""
    torch = require("torch", "train")
    place = device(study.recipe.model)
    a = torch.ones(1024, 1024, dtype=dtype(study.recipe.model), device=place)
    times = []
    for _ in range(12):
        begin = time.perf_counter()
        product = a @ a
        if place == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    del product
    return float(2 * 1024**3 / np.median(times))
