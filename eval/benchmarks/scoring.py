"""Which engine scores title likelihoods faster here: one masked forward a user (hf), or vLLM's forced tokens?

Run by ``make bench NAME=scoring``. Both engines score the same prompts and candidates of the quickstart, alternately in
one process; the minimum and the median of each are written to ``eval/results/scoring.json`` with the machine's load.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from llmrec.backends.encode import Encoder
from llmrec.backends.hf.backend import HFBackend
from llmrec.backends.vllm.backend import VLLMBackend, prepare_environment
from llmrec.machine import machine, versions
from llmrec.models.load import load_model, load_tokenizer, quiet_libraries, resolve
from llmrec.pipeline.engines import dtype_name
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import load_recipe

USERS = 16
ROUNDS = 3


def main(target: Path) -> None:
    """Measure and write."""
    prepare_environment()
    quiet_libraries()
    recipe = load_recipe(
        "recipes/movielens-100k/four-tasks.yaml", ["reviews=null", "tasks={sequential: {templates: [continue-list]}}"]
    )
    study = build_study(recipe)
    folder = resolve(recipe.model)
    encoder = Encoder(load_tokenizer(folder, recipe.model), max_length=recipe.model.max_length)
    task = study.tasks["sequential"]
    cases = study.cases("sequential")[: USERS * ROUNDS]
    prompts = [task.prompt(case.request, template="continue-list") for case in cases]
    titles = [task.continuations(case.request, template="continue-list") for case in cases]
    engines = {
        "hf:tree": HFBackend(load_model(folder, recipe.model), encoder),
        "vllm:forced": VLLMBackend(folder, encoder, dtype=dtype_name(recipe.model), route="forced"),
    }
    for engine in engines.values():
        engine.score(prompts[:2], titles[:2])
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    largest = 0.0
    for k in range(ROUNDS):
        part = slice(k * USERS, (k + 1) * USERS)
        found = {}
        for name, engine in engines.items():
            begin = time.perf_counter()
            found[name] = engine.score(prompts[part], titles[part])
            seconds[name].append((time.perf_counter() - begin) / USERS)
        for a, b in zip(*found.values(), strict=True):
            largest = max(largest, *(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)))
    result = {
        "command": "make bench NAME=scoring",
        "what": "seconds a user for the exact likelihood of 20 titles after the quickstart's sequential prompt",
        "users": USERS * ROUNDS,
        "prompt_tokens": statistics.mean(len(encoder.prompt(prompt)) for prompt in prompts),
        "candidate_tokens": statistics.mean(
            sum(len(encoder.continuation(p, t, closed=True)) for t in ts) for p, ts in zip(prompts, titles, strict=True)
        ),
        "seconds_per_user": {n: {"min": min(s), "median": statistics.median(s)} for n, s in seconds.items()},
        "largest_difference_nats": largest,
        "dtype": dtype_name(recipe.model),
        "machine": machine(),
        "versions": versions(),
    }
    engines["vllm:forced"].close()
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result["seconds_per_user"], indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
