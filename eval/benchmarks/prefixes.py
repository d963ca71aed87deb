"""What ranking strategies read on transformers, where prompts that begin alike are read once.

``python -m eval.benchmarks.prefixes eval/results/prefixes.json`` asks SmolLM2-135M-Instruct by every strategy of
``recipes/movielens-100k/rankers.yaml`` that scores labels or yes and no (``--users 4``), and writes for each the tokens
of its prompts and those that were read; and how long a prompt by itself takes in blocks and whole.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from llmrec.backends.hf.backend import HFBackend
from llmrec.durable import write_json
from llmrec.machine import machine, versions
from llmrec.models.load import load_model, resolve
from llmrec.pipeline.study import build_study, encoder_of
from llmrec.recipe.load import load_recipe
from llmrec.registry import STRATEGIES, lookup, options_of
from llmrec.strategies.asking import Prompting

RECIPE = "recipes/movielens-100k/rankers.yaml"
NAMES = ("label", "permutation", "window", "setwise", "pairwise", "pointwise-yes")
REPEATS = 5


def seconds(work: Callable[[], Any]) -> float:
    """Return the median time of some repetitions, after one that is not counted."""
    work()
    found = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return median(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask, measure and write."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.prefixes")
    parser.add_argument("target", type=Path)
    parser.add_argument("--users", type=int, default=4)
    asked = parser.parse_args(arguments)
    recipe = load_recipe(RECIPE)
    study = build_study(recipe)
    base = resolve(recipe.model)
    encoder = encoder_of(study, base)
    backend = HFBackend(load_model(base, recipe.model), encoder)
    task: Any = study.tasks["direct"]
    requests = [case.request for case in study.cases("direct")[: asked.users]]
    template = task.eval_templates[0]
    rows = {}
    for name in NAMES:
        backend._prefixes.drop()
        before, begin = backend._prefixes.read, time.perf_counter()
        asker = Prompting(backend=backend, task=task, template=template)
        answers = lookup(STRATEGIES, name, "strategy")(asker, **options_of(name, recipe.eval)).answer(requests)
        took = time.perf_counter() - begin
        tokens, read = sum(answer.cost.prompt_tokens for answer in answers), backend._prefixes.read - before
        rows[name] = {
            "prompt_tokens": tokens / len(requests),
            "read": read / len(requests),
            "share": read / tokens,
            "forwards": sum(answer.cost.forwards for answer in answers) / len(requests),
            "seconds": took / len(requests),
        }
    ids = [encoder.prompt(task.prompt(request, template=template)) for request in requests]

    def whole() -> None:
        with torch.inference_mode():
            for each in ids:
                backend.model.get_decoder()(input_ids=torch.tensor([each]), use_cache=False)

    def blocks() -> None:
        for each in ids:
            backend._prefixes.drop()
            backend._prefixes.last(each)

    alone = {"tokens": sum(map(len, ids)) / len(ids), "whole": seconds(whole) / len(ids)}
    alone["blocks"] = seconds(blocks) / len(ids)
    alone["more"] = alone["blocks"] / alone["whole"] - 1
    found = {
        "command": "python -m eval.benchmarks.prefixes TARGET",
        "what": "tokens of a request's prompts, and those that were read; a prompt by itself in seconds",
        "recipe": RECIPE,
        "users": len(requests),
        "strategies": rows,
        "alone": alone,
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "versions": versions(),
    }
    write_json(asked.target, found)
    for name, row in rows.items():
        sys.stdout.write(f"{name:14} {row['prompt_tokens']:8.0f} tokens, {row['share']:.0%} read\n")
    sys.stdout.write(f"alone: {alone['more']:+.0%} in blocks\n")


if __name__ == "__main__":
    main()
