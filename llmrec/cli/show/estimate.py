"""What a recipe would do, found without weights: rows, tokens, and an estimate of time and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from llmrec.backends.encode import Encoder
from llmrec.cli.show.probe import measured
from llmrec.cli.show.work import Work, eval_work
from llmrec.errors import require
from llmrec.models import bottleneck
from llmrec.models.load import device, dtype, load_config
from llmrec.models.memory import free_bytes
from llmrec.models.soft_prompt import METHODS
from llmrec.models.tensors import named_tables
from llmrec.models.traits import auto_class, is_paired
from llmrec.pipeline.study import Study
from llmrec.pipeline.training import plan_training
from llmrec.recipe.schema import ModelSection, TrainSection

# Bytes that are kept for backward, of a token, a layer and a unit of width: with adapters under bfloat16 autocast and
# in float32, and with all weights learning; and what checkpointing keeps of a layer.
_KEPT, _KEPT_WIDE, _KEPT_FULL, _KEPT_CHECKPOINT, _KEPT_CHECKPOINT_WIDE = 58.0, 83.0, 100.0, 2.1, 4.0
# Bytes of a weight in NF4, its scales included.
_NF4 = 0.6
CONTEXT = 0.8 * 2**30
"""What a process takes of a GPU before any tensor, and room for logits; a guess, which no GPU has confirmed."""
# Seconds to start one vLLM engine, and to load one hf model.
_START = {"vllm": 45.0, "hf": 3.0, "openai": 0.0, "fake": 0.0}


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
        memory_gb: Peak of training: on a CPU what the process holds now, with data and libraries, and what training
            adds; on a GPU the memory of the GPU alone.
        free_gb: What of the GPU's memory is free; None on a CPU.
        cost: Of the tokens that a server reads and writes, in the currency of its prices; None without prices.
    """

    parameters: int
    train_tokens: int
    eval_work: dict[str, Work]
    train_seconds: float
    eval_seconds: dict[str, float]
    memory_gb: float
    cost: float | None
    free_gb: float | None = None

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of training and of the whole evaluation."""
        return {"training": self.train_seconds, "evaluation": sum(self.eval_seconds.values())}


def estimate(study: Study, encoder: Encoder, folder: str, rows: Mapping[str, Any]) -> Estimate:
    """Estimate time and memory from what is counted and from a probe of this machine; see `llmrec.cli.show.probe`.

    ``rows`` is what `train_rows` counted; empty where nothing is trained.
    """
    recipe = study.recipe
    work = eval_work(study, encoder)
    parameters, _, _ = _weights(_config(folder, study), recipe.train)
    if recipe.eval.backend == "openai" and not rows:
        # A server takes its own time, and nothing is computed here.
        return Estimate(parameters, 0, work, 0.0, {}, _used(), _cost(study, work))
    speed = measured(_config(folder, study), recipe.model, recipe.train)
    looks = 2 + recipe.train.steps // recipe.train.valid_every
    # A position with a target has its logits computed forward, and twice as much backward.
    training = rows.get("padded_tokens", 0) * speed.train + rows.get("target_tokens", 0) * 3 * speed.head
    training += looks * rows.get("validation_tokens", 0) * speed.read if rows else 0.0
    # Under auto vLLM is started, if there is one.
    start = _START.get(recipe.eval.backend, _START["vllm"]) + _START["hf"]
    seconds = {
        arm: each.read * speed.read + each.scored * speed.head + each.written * (speed.write + speed.head) + start
        for arm, each in work.items()
    }
    taken, free = memory_of(_config(folder, study), recipe.model, recipe.train), None
    on_gpu = device(recipe.model) == "cuda"
    if on_gpu:
        taken, free = taken + CONTEXT, round(free_bytes() / 2**30, 1)
    return Estimate(
        parameters=parameters,
        train_tokens=rows.get("tokens", 0),
        eval_work=work,
        train_seconds=training,
        eval_seconds={} if recipe.eval.backend == "openai" else seconds,
        memory_gb=round((0.0 if on_gpu else _used()) + taken / 2**30, 1),
        free_gb=free,
        cost=_cost(study, work),
    )


def memory_of(config: Any, model: ModelSection, train: TrainSection) -> float:
    """Return the bytes that a training step takes at its peak: weights, what learns, and what is kept for backward.

    What is kept was counted in the graph of the loss, for blocks of Llama and Qwen3 on a CPU: 55 and 58 bytes under
    bfloat16 autocast, 83 in float32, 85 to 96 with all weights learning. No GPU's own figure stands beside it.
    """
    whole, tables, adapters = _weights(config, train)
    text = config.get_text_config()
    layers, width = int(text.num_hidden_layers), int(text.hidden_size)
    row, wide = train.batch_tokens * width, dtype(model).itemsize == 4
    if train.method == "full":
        # Weights, gradients and both moments of Adam in float32.
        held, kept = 16.0 * whole, _KEPT_FULL
    else:
        each, kept = dtype(model).itemsize, _KEPT_WIDE if wide else _KEPT
        blocks = {"qlora": _NF4, "lora8": 1.0}.get(train.method, each)
        held = blocks * (whole - tables) + each * tables + 16.0 * adapters
    learning = min(layers, train.lora.top_layers or layers) if train.method not in ("full", *METHODS) else layers
    if train.gradient_checkpointing:
        return held + row * ((_KEPT_CHECKPOINT_WIDE if wide else _KEPT_CHECKPOINT) * learning + kept)
    return held + row * kept * learning


def _weights(config: Any, train: TrainSection) -> tuple[int, int, int]:
    """Count weights on the meta device: all, those of the vocabulary, and those that adapters or soft prompts add."""
    torch = require("torch", "train")
    with torch.device("meta"):
        made = auto_class(config).from_config(config)
    tables = {id(module.weight): module.weight.numel() for _, module in named_tables(made)}
    whole, vocabulary = sum(p.numel() for p in made.parameters()), sum(tables.values())
    if train.method in METHODS:
        text, soft = config.get_text_config(), train.soft
        beside = bottleneck.size(text.hidden_size, soft.rank) if train.method == "option-adapter" else 0
        return whole, vocabulary, soft.prompts * text.hidden_size + beside * text.num_hidden_layers
    targets = train.lora.targets
    linear = [
        module
        for name, module in made.named_modules()
        if isinstance(module, torch.nn.Linear)
        and id(module.weight) not in tables
        and (not targets or name.rpartition(".")[2] in targets)
    ]
    adapters = train.lora.rank * sum(module.in_features + module.out_features for module in linear)
    return whole, vocabulary, adapters


def _used() -> float:
    """Return the GiB that this process holds."""
    return round(float(psutil.Process().memory_info().rss) / 2**30, 1)


def _cost(study: Study, work: Mapping[str, Work]) -> float | None:
    """Return what a server's tokens cost, where the recipe has prices."""
    server = study.recipe.eval.server
    if study.recipe.eval.backend != "openai" or server is None or not (server.price_in or server.price_out):
        return None
    return sum(each.asked * server.price_in + each.written * server.price_out for each in work.values()) / 1e6


def _config(folder: str, study: Study) -> Any:
    return load_config(folder, study.recipe.model)
