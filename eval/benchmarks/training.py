"""Times training, compared with common implementations: TRL's SFTTrainer, string tokenisation, full logits.

``python -m eval.benchmarks.training eval/results/training.json``. Both sides of a comparison use the same weights, the
same targets and the same threads, alternately; the minimum and the median of the rounds are stored, and a goal is met
only if both meet it. ``--quick`` is a smoke test with meaningless results.

- rows: one sequence per user, compared with one example per target, padded and packed by TRL, with
  SmolLM2-135M-Instruct under LoRA on MovieLens-100K.
- alike: one sequence per user on both sides: TRL gets llmrec's sequences, with loss on the same targets.
- prompts: examples from lines that are tokenised once, compared with strings that are built and tokenised.
- memory: the peak memory of the loss, compared with full logits.
- packing: tasks that share a history under a tree mask, compared with padded examples.
- features: seconds and peak memory of a step with and without each setting that trades time for memory.

Section names after the file measure only these and keep the others; ``BENCH_CLOCK=processor`` measures processor time,
for a busy machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

# Waiting threads sleep, because on a busy machine spinning takes ten times the processor time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback

from eval.benchmarks import training_peers as peers
from eval.benchmarks.timing import alternated, at_most, faster, measured, seconds_now, summary
from llmrec.backends.encode import Encoder, TokenRow
from llmrec.machine import cpu_has_bf16
from llmrec.models.load import load_model, resolve_model_folder, silence_libraries
from llmrec.pipeline.study import Study, build_study, encoder_of
from llmrec.pipeline.training import plan_training
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import ModelSection, TrainSection
from llmrec.train import lora, sft
from llmrec.train.batches import plan_steps
from llmrec.train.kernels import enable_gradient_checkpointing, use_faster_layers
from llmrec.train.loss import label_loss, packed_loss
from llmrec.train.packing import pack_rows, stack_sequences
from llmrec.train.precision import autocast_dtype
from llmrec.train.rows import LineTable, RowStream
from llmrec.train.steps import Step
from llmrec.train.world import World

ROWS = "the same rows, padded"
OURS, PADDED, PACKED = "llmrec", "TRL, a row a position, padded", "TRL, a row a position, packed"
ALIKE = "TRL, the same rows and targets"
STRINGS, ONE_BY_ONE, PLANNED = (
    "strings, then a batched tokenizer",
    "llmrec, row by row from words",
    "llmrec, rows as planned",
)
VOCABULARY, WIDTH, TOKENS, SHARE = 151_936, 576, 1536, 0.5


class Setting:
    """The size of the measurements."""

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self.rounds, self.users, self.window = (1, 1, 8) if quick else (2, 2, 20)
        self.draws = 400 if quick else 4096
        self.vocabulary = 8_000 if quick else VOCABULARY


def build_sequential_study(window: int, *overrides: str) -> Study:
    """MovieLens-100K, sequential lists of ``window`` titles."""
    tasks = f"tasks={{sequential: {{templates: [continue-list], window: {window}}}}}"
    return build_study(load_recipe("recipes/movielens-100k/four-tasks.yaml", ["reviews=null", tasks, *overrides]))


# --------------------------------------------------------------------------- rows


def measure_rows(setting: Setting) -> dict[str, Any]:
    """One sequence per user, compared with one example per target by TRL."""
    study = build_sequential_study(setting.window)
    section, bf16 = study.recipe.model, cpu_has_bf16()
    folder = resolve_model_folder(section)
    encoder = encoder_of(study, folder)
    rows = full_rows(study, encoder, setting)
    apart = [example for row in rows for example in peers.positions(row)]
    targets = sum(row.targets for row in rows)
    assert sum(row.targets for row in apart) == targets, "both sides learn the same targets"
    model = lora.load_trainable(folder, section, TrainSection())
    step = plan_steps(iter(rows), steps=1, batch_tokens=10**9, seed=0)
    trainers = {OURS: our_trainer(model, encoder, step)}
    with peers.warnings_of("trl", "transformers") as warned:
        for name, packing in ((PADDED, False), (PACKED, True)):
            trainers[name] = peers.trl_trainer(model, encoder.tokenizer, apart, packing=packing, bf16=bf16)
    losses: dict[str, float] = {}

    def run(name: str) -> None:
        losses[name] = trainers[name].train().training_loss

    seconds, _ = alternated(setting.rounds, {name: lambda name=name: run(name) for name in trainers})
    work = {OURS: {"steps": 1, "tokens": step[0].padded_tokens}}
    work |= {name: peers.work(trainers[name]) for name in (PADDED, PACKED)}
    return {
        "what": f"{len(rows)} users, lists of {setting.window} titles, {targets} target tokens in "
        f"{len(apart)} positions; SmolLM2-135M-Instruct, LoRA on every linear layer, forward, backward and update.",
        "seconds": seconds,
        "targets": targets,
        "targets_per_second": {name: targets / times["min"] for name, times in seconds.items()},
        "work": work,
        "losses": losses,
        "warnings": warned,
        **equal_losses(folder, rows[0]),
        "goals": {
            "padded": faster(seconds, PADDED, OURS, 10.0) | {"what": "times the targets a second of TRL, padded"},
            "packed": faster(seconds, PACKED, OURS, 6.0) | {"what": "times the targets a second of TRL, packed"},
        },
    }


def measure_alike(setting: Setting) -> dict[str, Any]:
    """One step over the same sequences and targets by the trainers of llmrec and TRL."""
    study = build_sequential_study(setting.window)
    section = study.recipe.model
    folder = resolve_model_folder(section)
    encoder = encoder_of(study, folder)
    rows = full_rows(study, encoder, setting)
    model = lora.load_trainable(folder, section, TrainSection())
    step = plan_steps(iter(rows), steps=1, batch_tokens=10**9, seed=0)
    trl = peers.trl_trainer(model, encoder.tokenizer, rows, packing=False, bf16=cpu_has_bf16())
    trainers = {OURS: our_trainer(model, encoder, step), ALIKE: trl}
    losses: dict[str, float] = {}

    def run(name: str) -> None:
        losses[name] = trainers[name].train().training_loss

    # The first pass of a trainer is a warm-up.
    seconds, _ = alternated(setting.rounds + 1, {name: partial(run, name) for name in trainers})
    work = {OURS: {"steps": 1, "tokens": step[0].padded_tokens}, ALIKE: peers.work(trl)}
    assert work[OURS] == work[ALIKE], "both compute the same tokens"
    assert abs(losses[OURS] - losses[ALIKE]) < 0.01, ("both learn the same targets", losses)
    return {
        "what": f"{len(rows)} users, lists of {setting.window} titles, {sum(row.targets for row in rows)} target "
        f"tokens of {work[OURS]['tokens']}, in one step; SmolLM2-135M-Instruct, LoRA on every linear layer, forward, "
        "backward and update. TRL gets the rows of llmrec as they are, with a mask of their targets.",
        "seconds": seconds,
        "work": work,
        "losses": losses,
        "goals": {
            "alike": faster(seconds, ALIKE, OURS, 1.0) | {"what": "times the targets a second of TRL, same rows"}
        },
    }


def full_rows(study: Study, encoder: Encoder, setting: Setting) -> list[TokenRow]:
    """Return the first user sequences with the given number of titles."""
    task: Any = study.tasks["sequential"]
    full = (draw for draw in task.draws() if len(draw.events) == setting.window)
    return [encoder.row(task.example(draw)) for draw in islice(full, setting.users)]


def our_trainer(model: Any, encoder: Encoder, steps: Sequence[Step], **settings: Any) -> Any:
    """Return the trainer that `llmrec.train.sft.train` uses, with a learning rate of 0."""
    from transformers import PrinterCallback

    pad = encoder.tokenizer.pad_token_id
    section = TrainSection(steps=len(steps), save_every=10**6, **settings)
    if section.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    config = sft._trainer_config(section, Path(peers.tempfile.mkdtemp()), len(steps), 0, "cpu")
    config.learning_rate = 0.0
    config.save_strategy = "no"
    trainer = sft.LabelRowTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict({"step": list(range(len(steps)))}),
        processing_class=encoder.tokenizer,
        data_collator=partial(sft._collate_step, model, steps, pad, World(), section.micro_tokens),
    )
    trainer.autocast = autocast_dtype(model) is not None
    trainer.remove_callback(PrinterCallback)
    return trainer


def equal_losses(folder: str, row: TokenRow) -> dict[str, float]:
    """Return the mean loss of one user sequence, and of its targets one by one from full logits, in float32."""
    precise = load_model(folder, ModelSection(name=folder, dtype="float32")).eval()
    with torch.no_grad():
        total, count = label_loss(precise, torch.tensor([row.ids]), torch.tensor([row.labels]))
    ours, theirs = float(total) / count, peers.mean_loss(precise, peers.positions(row))
    assert abs(ours - theirs) <= 1e-4, (ours, theirs)
    return {"loss_in_float32": ours, "loss_of_positions_in_float32": theirs}


# --------------------------------------------------------------------------- prompts


def measure_prompts(setting: Setting) -> dict[str, Any]:
    """Examples from tokenised lines, compared with strings that are built and tokenised, for the same samples."""
    study = build_sequential_study(setting.window)
    encoder = encoder_of(study, resolve_model_folder(study.recipe.model))
    task: Any = study.tasks["sequential"]
    draws = list(islice(task.draws(), setting.draws))
    titles = {item: task._view.title(item) for item in study.data.dataset.items}
    opening = encoder.turns_text(task.example(draws[0]).messages)
    table = LineTable(task, draws[0].template, encoder)
    begin = time.perf_counter()
    table.gather(draws)
    filling = time.perf_counter() - begin

    def strings() -> Any:
        texts = [opening + "".join(titles[event.item_id] + "\n" for event in draw.events) for draw in draws]
        return encoder.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def stream() -> list[TokenRow | None]:
        return list(islice(RowStream(task, encoder, limit=10**6, seed=0), len(draws)))

    few = draws[: len(draws) // 8]
    ways: dict[str, Callable[[], Any]] = {
        OURS: lambda: table.gather(draws),
        STRINGS: strings,
        PLANNED: stream,
        ONE_BY_ONE: lambda: [encoder.row(task.example(draw)) for draw in few],
    }
    seconds, results = alternated(setting.rounds, ways)
    gathered, tokens = results[OURS], len(results[OURS].ids)
    rows = [encoder.row(task.example(draw)) for draw in draws]
    expected_ids = np.concatenate([row.ids for row in rows])
    labels = np.concatenate([row.labels for row in rows])
    assert np.array_equal(gathered.ids, expected_ids), "every id of every row"
    assert np.array_equal(gathered.labels, labels), "every label of every row"
    assert results[PLANNED] == rows, "the rows as planned"
    same = statistics.mean(tuple(ids) == row.ids for ids, row in zip(results[STRINGS], rows, strict=True))
    return {
        "what": f"{len(draws):,} rows of MovieLens-100K, lists of up to {setting.window} titles, {tokens:,} tokens, "
        "as ids and labels.",
        "seconds": seconds,
        "million_tokens_per_second": {
            name: tokens * (len(few) / len(draws) if name == ONE_BY_ONE else 1) / times["min"] / 1e6
            for name, times in seconds.items()
        },
        "seconds_to_fill_the_table": filling,
        "rows_equal_to_their_words": 1.0,
        "rows_of_whole_strings_that_are_equal": same,
        "goals": {"strings": faster(seconds, STRINGS, OURS, 30.0) | {"what": "times the tokens a second of strings"}},
    }


# --------------------------------------------------------------------------- memory


def measure_memory(setting: Setting) -> dict[str, Any]:
    """The peak memory of a loss and its gradient, each in a separate process."""
    results: dict[str, list[float]] = {}
    for way in ("full", "label rows"):
        call = f"from eval.benchmarks.training_peers import loss_memory as m; m({way!r}, {TOKENS}, {SHARE}, "
        call += f"{setting.vocabulary}, {WIDTH})"
        out = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True).stdout
        results[way] = [float(word) for word in out.split()]
    (full, loss, norm), (ours, our_loss, our_norm) = results["full"], results["label rows"]
    assert abs(loss - our_loss) < 1e-4 and abs(norm - our_norm) < 1e-4 * norm, "same loss, same gradient"
    goal = at_most({"min": ours}, full / 4, "MB", {"logits of every token": full})
    return {
        "what": f"One step of {TOKENS:,} tokens, half of them with loss, a frozen head of {setting.vocabulary:,} rows "
        f"and {WIDTH} columns in float32.",
        "megabytes": {"llmrec": ours, "logits of every token": full},
        "goals": {"peak": goal | {"what": "megabytes of the loss at its peak, limit a quarter of full logits"}},
    }


# --------------------------------------------------------------------------- packing


def measure_packing(setting: Setting) -> dict[str, Any]:
    """Sequential and rating prompts with the same histories, packed as trees, compared with padded examples."""
    names = "templates: [one-history], history: 20"
    tasks = f"tasks={{sequential: {{{names}}}, rating: {{{names}}}}}"
    settings = ["train.packing=tree", "train.max_row_tokens=512", "train.batch_tokens=2048"]
    changes = ["reviews=null", tasks, *settings, "train.steps=60"]
    study = build_study(load_recipe("recipes/movielens-100k/four-tasks.yaml", changes))
    folder = resolve_model_folder(study.recipe.model)
    encoder = encoder_of(study, folder)
    packed = plan_training(study, encoder).steps
    rows = [row for step in packed for row in step.rows]
    plain = plan_steps(iter(rows), steps=10**6, batch_tokens=2048, seed=0)
    plain_tokens, packed_tokens = (sum(step.padded_tokens for step in steps) for steps in (plain, packed))
    timed = packed[:1] if setting.quick else packed[:2]
    same = plan_steps(iter([row for step in timed for row in step.rows]), steps=10**6, batch_tokens=2048, seed=0)
    model = lora.load_trainable(folder, study.recipe.model, TrainSection())
    trainers = {OURS: our_trainer(model, encoder, timed), ROWS: our_trainer(model, encoder, same)}
    seconds, _ = alternated(setting.rounds, {name: trainer.train for name, trainer in trainers.items()})
    losses = packed_losses(folder, timed[0])
    return {
        "what": f"{len(rows):,} questions of two families after histories of up to 20 films of MovieLens-100K; "
        f"{sum(len(step.rows) for step in timed)} of them are timed, forward, backward and update.",
        "seconds": seconds,
        "tokens": {"packed": packed_tokens, "padded": plain_tokens, "rows": sum(len(row.ids) for row in rows)},
        "steps": {"packed": len(packed), "padded": len(plain)},
        **losses,
        "goals": {
            "tokens": {
                "found": {"all": plain_tokens / packed_tokens},
                "at_least": 1.5,
                "met": plain_tokens / packed_tokens >= 1.5,
                "bars": {OURS: packed_tokens / 1e3, ROWS: plain_tokens / 1e3},
                "line": plain_tokens / 1.5e3,
                "unit": "thousand tokens",
                "what": "times fewer tokens computed than the same rows padded",
            },
            "time": faster(seconds, ROWS, OURS, 1.3) | {"what": "times faster than the same rows padded"},
        },
    }


def packed_losses(folder: str, step: Step) -> dict[str, float]:
    """Return the mean loss of a packed step, and of its examples one by one, in float32."""
    precise = load_model(folder, ModelSection(name=folder, dtype="float32")).eval()
    stacked = stack_sequences([pack_rows(packed.rows) for packed in step.bins], 0)
    with torch.no_grad():
        total, count = packed_loss(precise, {name: torch.from_numpy(array) for name, array in asdict(stacked).items()})
        apart = [
            label_loss(precise, torch.tensor([row.ids]), torch.tensor([row.labels]), weights=torch.tensor([row.weight]))
            for row in step.rows
        ]
    ours, theirs = float(total) / count, sum(float(loss) for loss, _ in apart) / sum(weight for _, weight in apart)
    assert abs(ours - theirs) <= 1e-4, (ours, theirs)
    return {"loss_in_float32": ours, "loss_of_rows_in_float32": theirs}


# --------------------------------------------------------------------------- features

PLAIN = "lora"
TOP, FULL = f"{PLAIN}, 8 of 30 layers", "full"
# Settings by name; the first of each group is the baseline.
FEATURES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "lora, float32 copies of inputs": {"copies": True},
    "lora, micro_tokens": {"micro_tokens": 400},
    "lora, gradient_checkpointing": {"gradient_checkpointing": True},
    "lora, torch_compile": {"torch_compile": True},
    TOP: {"lora": {"top_layers": 8}},
    f"{TOP}, gradient_checkpointing": {"lora": {"top_layers": 8}, "gradient_checkpointing": True},
    f"{TOP}, gradient_checkpointing of every layer": {
        "lora": {"top_layers": 8},
        "gradient_checkpointing": True,
        "inputs": True,
    },
    FULL: {"method": "full"},
    **{f"{FULL}, {name}": {"method": "full", "optim": name} for name in ("adamw_8bit", "adafactor")},
}


def measure_features(setting: Setting) -> dict[str, Any]:
    """Seconds and memory of a step with each setting, in separate processes, alternately."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in FEATURES}
    for _ in range(setting.rounds):
        for name, records in results.items():
            call = f"from eval.benchmarks.training import feature; feature({name!r}, {1 if setting.quick else 2})"
            out = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True).stdout
            records.append(json.loads(out.splitlines()[-1]))
    seconds = {name: summary([s for record in records for s in record["seconds"]]) for name, records in results.items()}
    last = {name: records[-1] for name, records in results.items()}
    for name, record in last.items():
        group = max((first for first in (PLAIN, TOP, FULL) if name.startswith(first)), key=len)
        assert abs(record["loss"] - last[group]["loss"]) < 2e-3, ("the same step has the same loss", name, record)
    return {
        "what": f"One step of {last[PLAIN]['tokens']:,} tokens, lists of {setting.window} titles, "
        "SmolLM2-135M-Instruct; seconds of forward, backward and update after a first step, and megabytes that steps "
        "add to the process.",
        "seconds": seconds,
        "first_step_seconds": {name: min(record["first"] for record in records) for name, records in results.items()},
        "megabytes": {name: min(record["megabytes"] for record in records) for name, records in results.items()},
        "optimiser_megabytes": {name: record["state"] for name, record in last.items()},
        "losses": {name: record["loss"] for name, record in last.items()},
        "goals": {},
    }


def feature(name: str, steps: int) -> None:
    """Print the seconds of steps with a setting, their peak memory, and the size of the optimiser state."""
    silence_libraries()
    disable_progress_bars()
    settings = dict(FEATURES[name])
    copies, inputs = settings.pop("copies", False), settings.pop("inputs", False)
    setting = Setting(quick=False)
    setting.users = 4
    study = build_sequential_study(setting.window)
    folder = resolve_model_folder(study.recipe.model)
    encoder = encoder_of(study, folder)
    planned = plan_steps(iter(full_rows(study, encoder, setting)), steps=1, batch_tokens=10**9, seed=0)
    torch.manual_seed(0)
    model = lora.load_trainable(folder, study.recipe.model, TrainSection(**settings))
    trainer = our_trainer(model, encoder, [planned[0]] * (1 + steps), **settings)
    trainer.autocast &= not copies
    if inputs:
        model.enable_input_require_grads()
    times: list[float] = []
    begun: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            begun.append(time.perf_counter())
            times.append(-seconds_now())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += seconds_now()
            # Compilers of the first step are child processes.
            begun[-1] = time.perf_counter() - begun[-1]

    trainer.add_callback(Clock())
    before = peers.peak(reset=True)
    with use_faster_layers(model, TrainSection(**settings)):
        loss = trainer.train().training_loss
    state = trainer.optimizer.optimizer.state.values()
    tensors = [value for values in state for value in values.values() if isinstance(value, torch.Tensor)]
    record = {
        "tokens": planned[0].padded_tokens,
        "first": begun[0],
        "seconds": times[1:],
        "loss": loss,
        "megabytes": (peers.peak(reset=False) - before) / 1024,
        "state": sum(tensor.nbytes for tensor in tensors) / 1e6,
    }
    sys.stdout.write(json.dumps(record) + "\n")


def main(target: Path, *, quick: bool, only: Sequence[str]) -> None:
    """Measure and write."""
    silence_libraries()
    disable_progress_bars()
    setting = Setting(quick=quick)
    parts: dict[str, Callable[[Setting], dict[str, Any]]] = {
        "rows": measure_rows,
        "alike": measure_alike,
        "prompts": measure_prompts,
        "memory": measure_memory,
        "packing": measure_packing,
        "features": measure_features,
    }
    dtype = "bfloat16" if cpu_has_bf16() else "float32"
    head = {
        "command": "python -m eval.benchmarks.training eval/results/training.json",
        "what": "training rows: how they are made, how many tokens they take, and what their loss costs",
        "rounds": setting.rounds,
        "quick": quick,
        "model": f"SmolLM2-135M-Instruct, LoRA, {dtype}",
        "threads": torch.get_num_threads(),
    }
    measured(target, head, {name: partial(measure, setting) for name, measure in parts.items()}, only)


if __name__ == "__main__":
    words = sys.argv[2:]
    main(Path(sys.argv[1]), quick="--quick" in words, only=[word for word in words if word != "--quick"])
