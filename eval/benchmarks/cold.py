"""Items that nobody chose before the test: how often semantic codes bring them up, with places reserved and without.

``LLMREC_DATA=folder python -m eval.benchmarks.cold eval/results/cold.json`` trains
``recipes/sequences/generative-codes.yaml`` on Amazon 2014 Toys, or goes on with what a killed call left, and searches
the catalogue for every test event whose item no training history holds:

- ``all``: among all items, at several depths; what the suites' ``cold`` figures are, and deeper.
- ``unseen``: among the unseen items alone. With r of K places reserved for them, as TIGER's cold-start test does with
  a share of K (Rajput et al., NeurIPS 2023, section 4.3), HR@K of these events is HR@r of this ranking.

The events fall on few items, and one item may have many of them, so three things stand beside the share of hits:

- intervals by a bootstrap over items, not events, since the events of an item rise and fall together;
- the same rankings with the histories of the events exchanged at random: what the model reaches without knowing whose
  history it reads. Its share, and the share of exchanges that reach the true one's hits, is the test of the model;
- the best list that is the same for every event, chosen from the answers themselves: how far popularity alone can go.

Chance, r out of the unseen items, assumes that all of them are asked for equally often; they are not. What reserved
places cost the other events is measured on a sample of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.backends.hf.backend import HFBackend
from llmrec.durable import write_json
from llmrec.machine import machine, versions
from llmrec.metrics.stats import interval
from llmrec.models.load import load_model
from llmrec.pipeline.resume import locked
from llmrec.pipeline.run import open_session
from llmrec.recipe.load import load_recipe, recipe_hash
from llmrec.types import Case

RECIPE = "recipes/sequences/generative-codes.yaml"
DEPTHS = (10, 50, 100, 500)
RESERVED = (1, 2, 5, 10)
K = 10
RESAMPLES = 10_000


def ranks(
    backend: Any,
    task: Any,
    template: str,
    cases: Sequence[Case],
    items: Sequence[str],
    depth: int,
    wanted: Sequence[str],
) -> NDArray[np.int64]:
    """Return where the search of ``items`` puts the wanted ones for each case.

    Returns:
        Ranks from 1, ``depth`` + 1 where the search did not find an item, shape (cases, wanted).
    """
    texts = dict(zip(task.catalogue, task.continuations(cases[0].request, template=template), strict=True))
    written = [texts[item] for item in items]
    places = {item: place for place, item in enumerate(items)}
    column = {item: place for place, item in enumerate(wanted)}
    found = np.full((len(cases), len(wanted)), depth + 1)
    for start in range(0, len(cases), 64):
        part = cases[start : start + 64]
        prompts = [task.prompt(case.request, template=template) for case in part]
        seen = [
            sorted({places[event.item_id] for event in case.request.history if event.item_id in places})
            for case in part
        ]
        answers = backend.search(prompts, written, k=min(depth, len(items)), width=depth, excluded=seen)
        for row, answer in enumerate(answers, start=start):
            for rank, place in enumerate(answer.items, start=1):
                if items[place] in column:
                    found[row, column[items[place]]] = rank
    return found


def share(found: NDArray[np.int64], truth: NDArray[np.int64], k: int, chance: float) -> dict[str, float]:
    """Return the share of events whose item is among the first k, and what it has to stand beside.

    Args:
        found: Ranks of the asked items for the history of each event, shape (events, items).
        truth: Column of each event's item, shape (events,).
        k: The cut-off.
        chance: The share by which a random order finds an item.
    """
    near = found <= k
    hits = near[np.arange(len(truth)), truth]
    over_items = interval(
        hits.astype(np.float64), resamples=RESAMPLES, seed=0, users=[str(item) for item in truth], widen=True
    )
    rng = np.random.default_rng(0)
    exchanged = np.array([near[rng.permutation(len(truth)), truth].sum() for _ in range(RESAMPLES)])
    counts = np.sort(np.bincount(truth, minlength=found.shape[1]))[::-1]
    return {
        "hits": int(hits.sum()),
        "HR": float(hits.mean()),
        "low": over_items.low,
        "high": over_items.high,
        "chance": chance,
        "exchanged_histories": float(exchanged.mean() / len(truth)),
        "p_over_exchanged": float((1 + (exchanged >= hits.sum()).sum()) / (1 + RESAMPLES)),
        "best_constant_list": float(counts[:k].sum() / len(truth)),
    }


def show(found: Mapping[str, Any]) -> str:
    """Return the figures as lines."""
    lines = [f"{found['events']} events, {found['unseen_items']} unseen items of {found['items']}"]
    for name in ("all", "unseen"):
        for at, each in found[name].items():
            lines.append(
                f"{name:7} {at:5} {each['hits']:4} hits, HR {each['HR']:.4f} [{each['low']:.4f}, {each['high']:.4f}], "
                f"chance {each['chance']:.4f}, exchanged histories {each['exchanged_histories']:.4f} "
                f"(p {each['p_over_exchanged']:.4f}), best constant list {each['best_constant_list']:.4f}"
            )
    lines.append(f"MRR among the unseen {found['unseen_MRR']:.4f}, chance {found['unseen_MRR_chance']:.4f}")
    return "\n".join([*lines, *(f"{name}: {value}" for name, value in found["warm"].items())])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, search and write."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.cold")
    parser.add_argument("target", type=Path)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--warm", type=int, default=1000, help="other test events, to see what reserved places cost")
    parser.add_argument("--out", type=Path, default=Path("runs/cold-toys"))
    asked = parser.parse_args(arguments)
    data = Path(os.environ.get("LLMREC_DATA", ".")) / "amazon14_toys"
    recipe = load_recipe(RECIPE, [f"data.path={data}", "name=cold-toys", f"train.steps={asked.steps}"])
    with locked(asked.out):
        session = open_session(recipe, asked.out)
        training = session.train()
    study = session.study
    task: Any = study.tasks["sequential"]
    trained = set(study.data.train["item_id"].unique().to_list())
    unseen = [item for item in task.catalogue if item not in trained]
    cases = task.cases("test")
    cold = [case for case in cases if case.truth not in trained]
    warm = [case for case in cases if case.truth in trained][: asked.warm]
    backend = HFBackend(load_model(str(session.folder / "merged"), recipe.model), session.encoder)
    template = task.eval_templates[0]
    everything = ranks(backend, task, template, cold, task.catalogue, max(DEPTHS), unseen)
    alone = ranks(backend, task, template, cold, unseen, len(unseen), unseen)
    column = {item: place for place, item in enumerate(unseen)}
    truth = np.array([column[str(case.truth)] for case in cold])
    wanted = sorted({str(case.truth) for case in warm})
    places = ranks(backend, task, template, warm, task.catalogue, 100, wanted)
    others = places[np.arange(len(warm)), [wanted.index(str(case.truth)) for case in warm]]
    own = alone[np.arange(len(cold)), truth]
    found = {
        "command": "python -m eval.benchmarks.cold TARGET",
        "what": "test events of Amazon 2014 Toys whose item no training history holds; one training seed",
        "recipe": RECIPE,
        "recipe_hash": recipe_hash(recipe),
        "steps": training["steps"],
        "train_seconds": round(training["seconds"], 1),
        "items": len(task.catalogue),
        "unseen_items": len(unseen),
        "resamples": RESAMPLES,
        "events": len(cold),
        "asked_items": len(set(truth.tolist())),
        "most_asked_item_events": int(np.bincount(truth).max()),
        "all": {f"@{depth}": share(everything, truth, depth, depth / len(task.catalogue)) for depth in DEPTHS},
        "unseen": {f"@{r}": share(alone, truth, r, r / len(unseen)) for r in RESERVED},
        "unseen_MRR": float((1 / own).mean()),
        "unseen_MRR_chance": float((1 / np.arange(1, len(unseen) + 1)).mean()),
        "warm": {
            "events": len(warm),
            f"HR@{K}": float((others <= K).mean()),
            **{f"HR@{K}, {r} reserved": float((others <= K - r).mean()) for r in RESERVED[:3]},
        },
        "machine": machine(),
        "versions": versions(),
    }
    write_json(asked.target, found)
    sys.stdout.write(show(found) + "\n")


if __name__ == "__main__":
    main()
