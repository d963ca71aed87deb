"""Counts the requests and tokens that engines compute to score 20 titles after a prompt of MovieLens-100K.

Run by ``make bench NAME=tree_routes``. The prompts are tokenized as by SmolLM2-135M-Instruct. vLLM is simulated: full
blocks of a text are cached once a request with them was scheduled, and at least one token is computed; the requests are
those of the backend. ``eval/results/tree_routes.json`` has the means per prompt, without the pass over the prompt.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from eval.benchmarks.provenance import provenance
from llmrec.backends.encode import Encoder
from llmrec.backends.vllm.backend import plan
from llmrec.durable import write_json
from llmrec.models.load import load_tokenizer, quiet_libraries, resolve
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import load_recipe

# Block size of vLLM on a GPU.
BLOCK = 16
LIMIT = 128
USERS = 200


class Cache:
    """The prefix cache of vLLM."""

    def __init__(self, block: int) -> None:
        self.block, self.texts = block, set[tuple[int, ...]]()

    def computed(self, text: Sequence[int]) -> int:
        """Return the number of tokens that a request computes, and cache its blocks."""
        hit = 0
        while (end := hit + self.block) < len(text) and tuple(text[:end]) in self.texts:
            hit = end
        self.texts |= {tuple(text[:end]) for end in range(self.block, len(text) + 1, self.block)}
        return len(text) - hit


def requests_of(ids: Sequence[int], tails: Sequence[tuple[int, ...]], *, chains: bool) -> list[tuple[int, ...]]:
    """Return the prompts of the requests that score candidates, by paths or by nodes."""
    children: dict[tuple[int, ...], dict[int, None]] = {}
    for tail in tails:
        for k, token in enumerate(tail):
            children.setdefault(tail[:k], {})[token] = None
    starts = [0, *accumulate(map(len, children.values()))]
    tokens = [token for group in children.values() for token in group]
    asked, _ = plan(list(children), starts, tokens, chains=chains, limit=LIMIT)
    return [(*ids, *ask.text, *ask.forced) for ask in asked]


def work(ids: Sequence[int], tails: Sequence[tuple[int, ...]], *, chains: bool) -> dict[str, int]:
    """Return the number of requests and computed tokens for a prompt's candidates by one of vLLM's routes."""
    cache, texts = Cache(BLOCK), requests_of(ids, tails, chains=chains)
    return {"requests": len(texts), "tokens": sum(map(cache.computed, texts)) - len(ids)}


def main(target: Path) -> None:
    """Count and write."""
    quiet_libraries()
    recipe = load_recipe(
        "recipes/movielens-100k/four-tasks.yaml", ["reviews=null", "tasks={sequential: {templates: [continue-list]}}"]
    )
    study = build_study(recipe)
    encoder = Encoder(load_tokenizer(resolve(recipe.model), recipe.model), max_length=recipe.model.max_length)
    task = study.tasks["sequential"]
    rows: dict[str, list[dict[str, int]]] = {"prefill": [], "nodes": [], "tree": []}
    lengths, candidates = [], []
    for case in study.cases("sequential")[:USERS]:
        prompt = task.prompt(case.request, template="continue-list")
        ids = encoder.prompt(prompt)
        texts = task.continuations(case.request, template="continue-list")
        tails = encoder.continuations(prompt, ids, texts, closed=True)
        rows["prefill"].append(work(ids, tails, chains=True))
        rows["nodes"].append(work(ids, tails, chains=False))
        # One masked sequence; the last token of a title need not be computed.
        rows["tree"].append({"requests": 1, "tokens": len({tail[:k] for tail in tails for k in range(1, len(tail))})})
        lengths.append(len(ids))
        candidates.append(len(tails))
    means = {
        name: {key: round(statistics.mean(row[key] for row in found), 1) for key in ("requests", "tokens")}
        for name, found in rows.items()
    }
    prompt_tokens = round(statistics.mean(lengths), 1)
    # Including the prompt, which each computes once.
    whole = {name: round(prompt_tokens + row["tokens"], 1) for name, row in means.items()}
    result = {
        "command": "make bench NAME=tree_routes",
        "users": len(lengths),
        "candidates": round(statistics.mean(candidates), 1),
        "prompt_tokens": prompt_tokens,
        "block": BLOCK,
        "behind_the_prompt": means,
        "times_of_the_masked_pass": {name: round(total / whole["tree"], 2) for name, total in whole.items()},
        **provenance(),
    }
    write_json(target, result)
    sys.stdout.write(f"{means}\n{result['times_of_the_masked_pass']}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
