"""What alignment teaches about codes: a tuned model asked about items whose code it never read beside their text.

``python -m eval.benchmarks.alignment eval/results/alignment.json`` (``--steps``, ``--held-out``, ``--out``, and
further ``key=value`` of the recipe) tunes ``recipes/movielens-100k/align-semantic.yaml``, with smaller steps and most
of their tokens for alignment, and asks each eval template about the held-out items, four times:

- ``zero-shot``: the base model, whose item tokens start from the words of other items.
- ``tuned``: the tuned model.
- ``shuffled``: the tuned model, shown the code (or the text) of another held-out item with the same candidates. What it
  says then owes nothing to the item: it must be at chance, or the candidates give the answer away.
- ``tuned less shuffled``: candidates by how much more likely they are after the true code than after the other one,
  which takes out that some titles are likelier than others whatever is asked.

A killed call goes on with the training that it left.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from llmrec.backends.hf.backend import HFBackend
from llmrec.durable import write_json
from llmrec.evaluate.compare import compare
from llmrec.evaluate.predictor import Evaluated, evaluate
from llmrec.machine import machine, versions
from llmrec.models.load import load_model, release_memory
from llmrec.pipeline.resume import locked
from llmrec.pipeline.row_specs import protocol_of
from llmrec.pipeline.run import Session, open_session
from llmrec.recipe.load import load_recipe, recipe_hash
from llmrec.strategies.asking import Prompting
from llmrec.strategies.pointwise import LikelihoodRanker
from llmrec.tasks.base import keyed
from llmrec.tasks.family import family_of
from llmrec.types import Answer, Case, Ranking, Request

RECIPE = "recipes/movielens-100k/align-semantic.yaml"
# What makes 200 steps and the questions fit into 12 minutes on two cores.
SMALL = ("train.batch_tokens=1024", "train.valid_every=100", "train.valid_rows=20", "tasks.alignment.weight=3")
METRICS = ("HR@1", "NDCG@10", "MRR")


@dataclass
class Said:
    """A predictor that has answered already."""

    name: str
    answers: Sequence[Answer]

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the answers, which are in order."""
        assert [answer.request_id for answer in self.answers] == [request.id for request in requests]
        return list(self.answers)


def shuffled(cases: Sequence[Case], seed: int) -> list[Case]:
    """Return the same questions, shown another held-out item that is none of the candidates."""
    items = sorted(str(case.truth) for case in cases)
    found = []
    for case in cases:
        pool = [item for item in items if item not in (case.request.candidates or ())]
        other = keyed("shuffled codes", seed, case.request.id).choice(pool)
        found.append(replace(case, request=replace(case.request, item=other)))
    return found


def less(true: Sequence[Answer], other: Sequence[Answer]) -> list[Answer]:
    """Return rankings by the differences of two rankings' scores."""
    found: list[Answer] = []
    for one, two in zip(true, other, strict=True):
        assert isinstance(one, Ranking) and isinstance(two, Ranking)
        base = dict(zip(two.items, two.scores, strict=True))
        gain = {item: score - base[item] for item, score in zip(one.items, one.scores, strict=True)}
        order = sorted(gain, key=lambda item: -gain[item])
        found.append(Ranking(request_id=one.request_id, items=tuple(order), scores=tuple(gain[i] for i in order)))
    return found


def ask(session: Session, folder: str, shows: Mapping[str, Sequence[Case]]) -> dict[str, dict[str, list[Answer]]]:
    """Return a model's answers by template and by what it is shown; the model is loaded once."""
    study = session.study
    model = load_model(folder, study.recipe.model)
    backend = HFBackend(model, session.encoder)
    found: dict[str, dict[str, list[Answer]]] = {}
    for template in study.eval_templates("alignment"):
        asker = Prompting(backend=backend, task=study.tasks["alignment"], template=template.name)
        found[template.name] = {
            name: LikelihoodRanker(asker).answer([case.request for case in cases]) for name, cases in shows.items()
        }
    del model, backend
    release_memory()
    return found


def figures(row: Evaluated, chance: float) -> dict[str, Any]:
    """Return a row's metrics beside chance, and how likely so many hits or more are by chance alone."""
    hits, n = float(row.values["HR@1"].sum()), len(row.values["HR@1"])
    metrics = {name: row.figures.metrics[name].as_json() for name in METRICS if name in row.figures.metrics}
    low = metrics["HR@1"]["low"]
    return {
        "n": n,
        "metrics": metrics,
        "HR@1_chance": chance,
        # Ties count as shares of a hit; whole ones are what the test counts.
        "p_by_chance": float(binomtest(int(hits), n, chance, alternative="greater").pvalue),
        "above_chance": low is not None and low > chance,
    }


def run(session: Session, overrides: Sequence[str]) -> dict[str, Any]:
    """Train, ask and measure."""
    training = session.train()
    study = session.study
    assert study.held is not None and study.aligned is not None
    cases = study.cases("alignment")
    shows = {"true": cases, "other": shuffled(cases, study.recipe.seed)}
    before = ask(session, session.base, {"true": cases})
    after = ask(session, str(session.folder / "merged"), shows)
    chance, protocol = 1 / study.aligned.count, protocol_of(study, "alignment")
    found: dict[str, Any] = {}
    for template, said in after.items():
        answers = {
            "zero-shot": before[template]["true"],
            "tuned": said["true"],
            "shuffled": said["other"],
            "tuned less shuffled": less(said["true"], said["other"]),
        }
        rows = {
            name: evaluate(
                Said(name, own), cases, name="alignment", kind=family_of("alignment").answer, protocol=protocol
            )
            for name, own in answers.items()
        }
        users = [case.request.user_id for case in cases]
        found[template] = {
            "rows": {name: figures(row, chance) for name, row in rows.items()},
            "tuned_minus": {
                name: asdict(
                    compare(
                        "NDCG@10", rows["tuned"].values["NDCG@10"], rows[name].values["NDCG@10"], users,
                        resamples=10_000, seed=study.recipe.seed,
                    )
                )
                for name in ("zero-shot", "shuffled")
            },
        }  # fmt: skip
    return {
        "command": "python -m eval.benchmarks.alignment TARGET",
        "what": "questions about items whose code and text were never trained together; one training seed",
        "recipe": RECIPE,
        "overrides": list(overrides),
        "recipe_hash": recipe_hash(study.recipe),
        "steps": training["steps"],
        "rows": training["rows"],
        "train_seconds": training["seconds"],
        "items": {
            "trained": len(study.data.dataset.items) - len(study.held.items),
            "valid": len(study.held.valid),
            "test": len(study.held.test),
        },
        "candidates": study.aligned.count,
        "chance": chance,
        "templates": found,
        "machine": machine(),
        "versions": versions(),
    }


def show(found: Mapping[str, Any]) -> str:
    """Return the figures as lines."""
    lines = [f"HR@1 by chance {found['chance']:.3f}; {found['steps']} steps; {found['items']['test']} held-out items"]
    for template, entry in found["templates"].items():
        for name, row in entry["rows"].items():
            hit, gain = row["metrics"]["HR@1"], row["metrics"]["NDCG@10"]
            lines.append(
                f"{template:14} {name:20} HR@1 {hit['value']:.3f} [{hit['low']:.3f}, {hit['high']:.3f}]  "
                f"p {row['p_by_chance']:.2g}  NDCG@10 {gain['value']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}]"
            )
        for name, each in entry["tuned_minus"].items():
            between = f"[{each['low']:+.3f}, {each['high']:+.3f}]"
            lines.append(f"{template:14} tuned - {name:12} NDCG@10 {each['value']:+.3f} {between}  p {each['p']:.2g}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.alignment")
    parser.add_argument("target", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the items; half of them are asked about")
    parser.add_argument("--users", type=int, default=1000, help="most items that are asked about")
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"))
    parser.add_argument("overrides", nargs="*", help="further key=value of the recipe")
    chosen = parser.parse_intermixed_args(arguments)
    overrides = [
        *SMALL,
        *(f"train.steps={chosen.steps}", f"tasks.alignment.held_out={chosen.held_out}"),
        *(f"tasks.alignment.users={chosen.users}", "eval.backend=hf", *chosen.overrides),
    ]
    with locked(chosen.out):
        found = run(open_session(load_recipe(RECIPE, overrides), chosen.out), overrides)
    write_json(chosen.target, json.loads(json.dumps(found)))
    sys.stdout.write(show(found) + "\n")


if __name__ == "__main__":
    main()
