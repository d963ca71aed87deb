"""What a recipe would do, found without weights: rows, tokens, prompts, and an estimate of time and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import psutil

from llmrec.backends.encode import Encoder
from llmrec.commands.show.probe import measured
from llmrec.commands.show.work import Work, eval_work
from llmrec.errors import require
from llmrec.experiment.study import Study
from llmrec.experiment.training import plan_training
from llmrec.models.load import load_config
from llmrec.models.traits import auto_class, is_paired
from llmrec.types import Example

SHOWN = 3
"""Prompts that are shown of a task."""
# Seconds to start one vLLM engine, and to load one hf model.
_START = {"vllm": 45.0, "hf": 3.0, "openai": 0.0, "fake": 0.0}


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
    """Estimate each setting's tokens, of prompts and answers, from a sample of its prompts."""
    return {arm: work.tokens for arm, work in eval_work(study, encoder).items()}


@dataclass(frozen=True)
class Estimate:
    """Totals of a dry run.

    Attributes:
        parameters: Weights of the model.
        train_tokens: Tokens of all planned steps.
        eval_work: What every evaluated row asks, by setting.
        train_seconds: Estimated, validation losses included.
        eval_seconds: Estimated, engine starts included, by setting; empty where a server answers.
        memory_gb: Peak of the training process: what it holds now, with data and libraries, and what training adds.
        cost: Of the tokens that a server reads and writes, in the currency of its prices; None without prices.
    """

    parameters: int
    train_tokens: int
    eval_work: dict[str, Work]
    train_seconds: float
    eval_seconds: dict[str, float]
    memory_gb: float
    cost: float | None

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of training and of the whole evaluation."""
        return {"training": self.train_seconds, "evaluation": sum(self.eval_seconds.values())}


def estimate(study: Study, encoder: Encoder, folder: str, rows: Mapping[str, Any]) -> Estimate:
    """Estimate time and memory from what is counted and from a probe of this machine; see `llmrec.commands.show.probe`.

    ``rows`` is what `train_rows` counted; empty where nothing is trained.
    """
    recipe = study.recipe
    work = eval_work(study, encoder)
    parameters = _size(folder, study)
    if recipe.eval.backend == "openai" and not rows:
        # A server takes its own time, and nothing is computed here.
        return Estimate(parameters, 0, work, 0.0, {}, _used(), _cost(study, work))
    speed = measured(_config(folder, study), recipe.model, recipe.train)
    looks = 2 + recipe.train.steps // recipe.train.valid_every
    # A position with a target has its logits computed forward, and twice as much backward.
    training = rows.get("padded_tokens", 0) * speed.train + rows.get("target_tokens", 0) * 3 * speed.head
    training += looks * rows.get("validation_tokens", 0) * speed.read if rows else 0.0
    start = _START[recipe.eval.backend] + _START["hf"]
    seconds = {
        arm: each.read * speed.read + each.scored * speed.head + each.written * (speed.write + speed.head) + start
        for arm, each in work.items()
    }
    size = 4 if recipe.train.method == "full" else 2
    states = 12 * parameters if recipe.train.method == "full" else 0
    layers, share = _layers(folder, study), 1.0
    if recipe.train.method != "full" and recipe.train.lora.top_layers:
        share = min(1.0, recipe.train.lora.top_layers / layers)
    activations = recipe.train.batch_tokens * layers * 34 * _width(folder, study) * share
    return Estimate(
        parameters=parameters,
        train_tokens=rows.get("tokens", 0),
        eval_work=work,
        train_seconds=training,
        eval_seconds={} if recipe.eval.backend == "openai" else seconds,
        memory_gb=round(_used() + (parameters * size + states + activations) / 2**30, 1),
        cost=_cost(study, work),
    )


def _used() -> float:
    """Return the GiB that this process holds."""
    return round(float(psutil.Process().memory_info().rss) / 2**30, 1)


def _cost(study: Study, work: Mapping[str, Work]) -> float | None:
    """Return what a server's tokens cost, where the recipe has prices."""
    server = study.recipe.eval.server
    if study.recipe.eval.backend != "openai" or server is None or not (server.price_in or server.price_out):
        return None
    return sum(each.asked * server.price_in + each.written * server.price_out for each in work.values()) / 1e6


def _size(folder: str, study: Study) -> int:
    """Count weights on the meta device: nothing is loaded."""
    torch = require("torch", "train")
    config = _config(folder, study)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    return sum(p.numel() for p in model.parameters())


def _config(folder: str, study: Study) -> Any:
    return load_config(folder, study.recipe.model)


def _layers(folder: str, study: Study) -> int:
    return int(_config(folder, study).get_text_config().num_hidden_layers)


def _width(folder: str, study: Study) -> int:
    return int(_config(folder, study).get_text_config().hidden_size)
