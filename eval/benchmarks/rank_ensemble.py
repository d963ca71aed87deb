"""Times single full-catalogue requests to an ensemble with a learned ranker.

Run by ``make bench NAME=rank-ensemble``: the ensemble of interactions and texts of ``eval/suites/toys.yaml``, with data
in ``LLMREC_DATA`` and a ranker with the setting of the suite's result, fitted to fewer users, which does not change the
latency. The command uses one core with one thread; set ``BENCH_CLOCK=processor`` if other processes use the core.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from eval.benchmarks.provenance import provenance
from eval.benchmarks.timing import seconds_now
from llmrec.answer.ensemble import Ensemble
from llmrec.answer.recommender import Question
from llmrec.baselines.fits import fit_baseline
from llmrec.baselines.validation import ranking_cases
from llmrec.data.requests import PastEvent, RankRequest
from llmrec.data.split import split_validation_users
from llmrec.durable import write_json
from llmrec.ensembles.context import ContextFeatures
from llmrec.ensembles.members import ensemble_weights_record
from llmrec.ensembles.rankers import CatalogueEnsemble, CatalogueMember
from llmrec.ensembles.stored import StoredEnsemble, StoredMember
from llmrec.ensembles.weights import EnsembleTrial
from llmrec.pipeline.study import load_split
from llmrec.recipe.load import load_suite
from llmrec.types import Request

SUITE, ENSEMBLE = "eval/suites/toys.yaml", "ensemble of interactions and texts"
# Number of users to which the ranker is fitted; minimum list length that a service requests.
FITTING, DEPTH = 1500, 50


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.rank_ensemble")
    parser.add_argument("target", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    chosen = parser.parse_args()
    write_json(chosen.target, measured(chosen.requests))


def measured(count: int) -> dict[str, Any]:
    """Time single requests, as in a service."""
    suite = load_suite(SUITE)
    rows = {row.name or str(row.baseline): row for row in suite.rows}
    result = json.loads(Path(f"eval/results/{suite.suite}.json").read_text(encoding="utf-8"))
    chosen = {row["name"]: row["tables"]["excluded"]["parameters"] for row in result["rows"]}
    form = chosen[ENSEMBLE]["of"]
    data = load_split(suite.data, suite.split_seeds[0])
    choose, weigh = split_validation_users(data, suite.reserved)
    parts = [
        StoredMember(name=name, baseline=rows[name].baseline, parameters=chosen[name]) for name in rows[ENSEMBLE].fuse
    ]
    members = [
        CatalogueMember(part.name, fit_baseline(str(part.baseline), part.parameters, choose, seed=0), part.kind)
        for part in parts
    ]
    learned = CatalogueEnsemble(ENSEMBLE, members, filtered=True, context=ContextFeatures(data))
    learned.fit(ranking_cases(weigh, FITTING), only=EnsembleTrial("ranker", form, 0.0))
    weights = ensemble_weights_record(learned)
    assert weights is not None
    fused = StoredEnsemble(
        id=f"sequential/baseline/{ENSEMBLE}",
        family="sequential",
        arm="baseline",
        parts=tuple(parts),
        fitted=weights,
        seed=0,
        reserved=suite.reserved,
    )
    items = data.dataset.items
    model = Ensemble(fused, data, items, ENSEMBLE)
    held = data.holdouts("test")
    requests = [
        RankRequest(
            id=str(n),
            candidates=(),
            user_id=one.user_id,
            history=tuple(
                PastEvent(item=items[event.item_id], rating=event.rating, timestamp=event.timestamp)
                for event in data.history(one.user_id, "test")
            ),
        )
        for n, one in zip(range(count), held, strict=False)
    ]
    question = Question(depth=DEPTH)
    # Fit the members and build their matrices before the first timed request.
    model.answer(requests[:3], question)

    def times(once: Callable[[Any], object], inputs: Sequence[Any]) -> dict[str, float]:
        spent = []
        for request in inputs:
            begin = seconds_now()
            once(request)
            spent.append(seconds_now() - begin)
        return {"median_ms": 1000 * median(spent), "p99_ms": 1000 * quantiles(spent, n=100)[98]}

    times_of_ensemble = times(lambda request: model.answer([request], question), requests)
    posed = [
        Request(id=one.id, user_id=str(one.user_id), history=data.history(str(one.user_id), "test")) for one in requests
    ]
    times_of_members = {member.name: times(lambda one, of=member.scorer: of.scores([one]), posed) for member in members}
    return {
        "command": "LLMREC_DATA=folder BENCH_CLOCK=processor make bench NAME=rank-ensemble",
        "what": f"one request at a time about the whole catalogue, the best {DEPTH} items, histories of the test users",
        "clock": os.environ.get("BENCH_CLOCK", "wall"),
        "suite": suite.suite,
        "form": form,
        "items": len(items),
        "requests": len(requests),
        "answer": {**times_of_ensemble, "goal": {"at_most_ms": 30, "met": times_of_ensemble["p99_ms"] <= 30}},
        "members": times_of_members,
        **provenance(),
    }


if __name__ == "__main__":
    main()
