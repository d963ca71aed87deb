"""Measures the latency of late interaction, early exits and 8-bit weights: yes/no for 20 candidates after ten items.

``python -m eval.benchmarks.compress eval/results/compress_ms.json`` uses SmolLM2-135M-Instruct without fine-tuning,
which does not change latency. Text prompts are evaluated at each exit; late interaction with cached catalogue titles
only (cold), and with cached user segments as well (warm). Text prompts use a prefix cache (``text``), except at early
exits; ``text, int8`` has 8-bit linear layers by bitsandbytes, as ``llmrec compress`` measures and exports them. Token
counts are exact; seconds are those of this machine. Set ``BENCH_CLOCK=processor`` if other processes use its cores.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eval.benchmarks.provenance import provenance
from eval.benchmarks.timing import alternated
from llmrec.backends.hf.backend import HFBackend
from llmrec.durable import write_json
from llmrec.machine import command_line
from llmrec.models.load import load_model, resolve_model_folder
from llmrec.pipeline.study import build_study, encoder_of
from llmrec.recipe.load import load_recipe
from llmrec.systems.m6.compress.compress import load_in_format
from llmrec.systems.m6.late import LateInteraction, LateInteractionModel
from llmrec.systems.m6.segments import LowerLayers
from llmrec.types import Request

RECIPE = "recipes/movielens-100k/yes-no.yaml"
CANDIDATES, ROUNDS = 20, 3
JOINT = (1, 3, 6)
EXITS = (10, 15, 20, 30)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.compress")
    parser.add_argument("target", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(arguments)
    recipe = load_recipe(RECIPE, ["model.dtype=float32"])
    study = build_study(recipe)
    base = resolve_model_folder(recipe.model)
    first = next(iter(study.cases("ctr"))).request
    items = sorted(study.data.dataset.items)[:CANDIDATES]
    requests = [replace(first, id=item, item=item) for item in items]
    ways: dict[str, Any] = {}
    tokens: dict[str, int] = {}
    encoder = encoder_of(study, base)
    model = load_model(base, recipe.model)
    task, template = study.tasks["ctr"], study.tasks["ctr"].eval_templates[0]
    prompts = [task.prompt(request, template=template) for request in requests]
    answers = [task.continuations(request, template=template) for request in requests]
    ways["text"] = partial(_scored, HFBackend(model, encoder), prompts, answers)
    narrow = {
        "text, bfloat16": copy.deepcopy(model).bfloat16(),
        "text, int8": load_in_format(Path(base), "int8", recipe),
    }
    for name, other in narrow.items():
        ways[name] = partial(_scored, HFBackend(other, encoder), prompts, answers)
    expected = _odds(ways["text"]())
    apart = {name: max(abs(a - b) for a, b in zip(_odds(ways[name]()), expected, strict=True)) for name in narrow}
    sizes = {"text": _megabytes(model), **{name: _megabytes(other) for name, other in narrow.items()}}
    for depth in EXITS:
        ways[f"exit {depth}"] = partial(_scored, HFBackend(model, encoder, exit=depth), prompts, answers)
        tokens[f"exit {depth}"] = sum(len(encoder.prompt(prompt)) for prompt in prompts)
    for joint in JOINT:
        baseline = LateInteraction(LateInteraction.Config(joint=joint), seed=0)
        late = baseline._late(LowerLayers(base, recipe.model, joint), study.data)
        cold, warm = partial(_late, late, requests, cold=True), partial(_late, late, requests, cold=False)
        cold()
        before = late.lower.read
        cold()
        tokens[f"late {joint}, cold"] = late.lower.read - before
        warm()
        tokens[f"late {joint}, warm"] = late.lower.read - before - tokens[f"late {joint}, cold"]
        ways[f"late {joint}, cold"], ways[f"late {joint}, warm"] = cold, warm
    times, _ = alternated(options.rounds, ways)
    rows = {name: {"seconds": times[name], "lower_tokens": tokens.get(name)} for name in ways}
    for name, size in sizes.items():
        rows[name] |= {"layers_mb": round(size, 1), "log_odds_apart": apart.get(name)}
    command = command_line("python", "-m", "eval.benchmarks.compress")
    write_json(
        options.target,
        {
            "command": command,
            "candidates": CANDIDATES,
            "rows": [{"name": name, **row} for name, row in rows.items()],
            **provenance(),
        },
    )
    for name, row in rows.items():
        sys.stdout.write(f"{name:16} {row['seconds']} {row['lower_tokens']}\n")


def _scored(backend: HFBackend, prompts: Sequence[Any], answers: Sequence[Sequence[str]]) -> Any:
    return backend.score(prompts, answers, closed=False)


def _odds(scored: Sequence[Any]) -> list[float]:
    """Return the log-odds of yes for each candidate."""
    return [answer.logprobs[0] - answer.logprobs[1] for answer in scored]


def _megabytes(model: Any) -> float:
    """Return the size of the linear layers."""
    size = 0
    for module in model.get_decoder().layers.modules():
        weight = getattr(module, "weight", None)
        tensor = weight() if callable(weight) else weight
        size += tensor.numel() * tensor.element_size() if tensor is not None else 0
    return size / 1e6


@torch.no_grad()
def _late(late: LateInteractionModel, requests: Sequence[Request], *, cold: bool) -> Any:
    user = late.user(requests[0].history)
    if cold:
        late.lower.forget([segment.text for segment in user])
    return late.logits(user, [late.candidate(str(request.item)) for request in requests])


if __name__ == "__main__":
    main()
