"""Checks metric code and seen-item filter against published figures that anybody can count.

``LLMREC_DATA=FOLDER python -m eval.benchmarks.oracle eval/results/popularity_oracle.json``, where FOLDER holds
``amazon14_beauty`` and ``amazon14_toys`` (docs/data.md says what they are). S3-Rec (Zhou et al., CIKM 2020) prints the
figures of a popularity ranking that counts *all* interactions, the held-out ones too. Counting them the same way must
give the same four digits. Counting training interactions only, as every baseline here does, gives less.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from llmrec.baselines.popular import Popularity
from llmrec.bench.references import load_reference
from llmrec.data.sets.table import load
from llmrec.data.split import SplitDataset, request_id, split
from llmrec.durable import write_json
from llmrec.evaluate.catalogue import evaluate_catalogue
from llmrec.evaluate.figures import EvalProtocol
from llmrec.recipe.schema import DataSection
from llmrec.resources import resource
from llmrec.types import Case, Request

METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")
ORACLE = "popularity, counted over all interactions"


def figures(data: SplitDataset, counted: SplitDataset) -> dict[str, float]:
    """Return the popularity ranking's test figures, history excluded, with what ``counted`` calls training."""
    model = Popularity()
    model.fit(counted)
    cases = [
        Case(
            request=Request(
                id=request_id(held.user_id, held.item_id),
                user_id=held.user_id,
                history=data.history(held.user_id, "test"),
            ),
            truth=held.item_id,
        )
        for held in data.holdouts("test")
    ]
    protocol = EvalProtocol(
        split="leave_one_out/test",
        candidates="full",
        cutoffs=(5, 10),
        resamples=10,
        seed=0,
        catalogue=len(data.dataset.items),
    )
    found = evaluate_catalogue(model, cases, protocol, seen=("excluded",))["excluded"].figures.metrics
    return {name: found[name].value for name in METRICS}


def check(folder: Path, name: str) -> dict[str, Any]:
    """Measure one data set both ways, beside what was published."""
    section = DataSection(source="sequences", path=str(folder / name.replace("-", "_")))
    data = split(load(section, seed=0), section.split, seed=0)
    page = load_reference(resource("eval", "references") / f"{name}.yaml")
    printed = next(row.values for row in page.rows if row.system == ORACLE)
    everything = replace(data, train=pl.concat([data.train, data.valid, data.test]))
    found = figures(data, everything)
    return {
        "published": dict(printed),
        "all_interactions": found,
        "equal_to_four_digits": {metric: round(found[metric], 4) == printed[metric] for metric in METRICS},
        "training_interactions": figures(data, data),
    }


def main(target: Path) -> None:
    """Measure and write; exits with 1 where a digit differs."""
    place = os.environ.get("LLMREC_DATA")
    if not place:
        raise SystemExit("name the folder of the data: LLMREC_DATA=FOLDER; docs/data.md says what must lie there")
    result = {
        "command": "LLMREC_DATA=FOLDER python -m eval.benchmarks.oracle eval/results/popularity_oracle.json",
        "data": {name: check(Path(place), name) for name in ("amazon14-beauty", "amazon14-toys")},
    }
    write_json(target, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    if not all(all(each["equal_to_four_digits"].values()) for each in result["data"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
