"""Assembles results.json and predictions.parquet from finished rows."""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from llmrec import __version__
from llmrec.build.evaluation import Row
from llmrec.build.facts import machine, versions
from llmrec.build.stages import Budget
from llmrec.build.study import RANKING, Study
from llmrec.data.split import SplitDataset
from llmrec.durable import replacing, write_json
from llmrec.evaluate import HEADLINE, LOWER_IS_BETTER, compare
from llmrec.metrics.stats import Difference, holm, verdict
from llmrec.recipe_file import recipe_hash

_SCHEMA: Mapping[str, Any] = {
    "row_id": pl.String,
    "task": pl.String,
    "arm": pl.String,
    "predictor": pl.String,
    "template": pl.String,
    "request_id": pl.String,
    "user_id": pl.String,
    "truth": pl.String,
    "parsed": pl.String,
    "raw": pl.String,
    "prompt_hash": pl.String,
    "rank": pl.Float64,
    "error": pl.String,
    "prompt_tokens": pl.Int64,
    "completion_tokens": pl.Int64,
}


def write_results(
    study: Study,
    rows: Sequence[Row],
    training: Mapping[str, Any] | None,
    model: Mapping[str, Any],
    budget: Budget,
    folder: Path,
) -> dict[str, Any]:
    """Write ``results.json`` and ``predictions.parquet`` to the run folder, each atomically.

    ``budget`` holds what each stage cost when it last ran: a stage that this invocation reused keeps its figure.
    """
    recipe = study.recipe
    spent = {**_spent_before(folder / "results.json", recipe_hash(recipe)), **budget.stages}
    families = [family for family in HEADLINE if family in study.tasks]
    results = {
        "llmrec": __version__,
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["llmrec", *sys.argv[1:]]),
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": recipe_hash(recipe),
        "seed": recipe.seed,
        "versions": versions(),
        "machine": machine(),
        "model": dict(model),
        "data": {
            "main": describe(study.data),
            "reviews": describe(study.reviews) if study.reviews else None,
        },
        "candidates": {"main": _candidates(study)} if study.candidates else {},
        "training": {k: v for k, v in training.items() if k != "key"} if training else None,
        "rows": [row.figures for row in rows],
        "headline": {family: headline(family, recipe.eval.cutoffs) for family in families},
        "comparisons": comparisons(study, rows),
        "budget": [{"stage": stage, "seconds": seconds} for stage, seconds in spent.items()],
        "seconds": sum(spent.values()),
        "examples": [example for row in rows for example in row.examples],
        "notes": notes(study),
    }
    write_predictions(rows, folder / "predictions.parquet")
    write_json(folder / "results.json", results)
    return results


def _spent_before(path: Path, hashed: str) -> dict[str, float]:
    """Read the stage costs of an earlier run of the same recipe, if there is one."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        return {e["stage"]: float(e["seconds"]) for e in earlier["budget"]} if earlier["recipe_hash"] == hashed else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def headline(family: str, cutoffs: Sequence[int]) -> str:
    """Return the metric that a family is judged by: at 10 where the recipe cuts there, else at its largest."""
    if family not in RANKING or 10 in cutoffs:
        return HEADLINE[family]
    return f"NDCG@{max(cutoffs)}" if max(cutoffs) > 1 else "HR@1"


def comparisons(study: Study, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Pair tuned and few-shot with zero-shot, and the tuned headline strategy with every baseline.

    The headline strategy is the first that the recipe names for a family; p-values are Holm-adjusted over all pairs.
    """
    recipe = study.recipe
    planned: list[tuple[str, str, Row, Row]] = []
    for family in study.tasks:
        metric = headline(family, recipe.eval.cutoffs)
        own = [row for row in rows if row.figures["task"] == family and metric in row.values]
        arms = {(r.figures["arm"], r.figures["predictor"], r.figures["template"]): r for r in own}
        for (arm, predictor, template), row in arms.items():
            zero = arms.get(("zero-shot", predictor, template))
            if arm in ("tuned", "few-shot") and zero is not None:
                planned.append((family, metric, row, zero))
            if arm == "tuned" and predictor == study.section(family).strategies[0]:
                planned.extend((family, metric, row, b) for b in own if b.figures["arm"] == "baseline")
    found: list[Difference] = [
        compare(
            metric,
            a.values[metric],
            b.values[metric],
            [record["user_id"] for record in a.records],
            resamples=recipe.eval.bootstrap,
            seed=recipe.seed,
        )
        for _, metric, a, b in planned
    ]
    adjusted = holm([difference.p for difference in found]) if found else []
    return [
        {
            "task": family,
            "metric": metric,
            "a": a.figures["id"],
            "b": b.figures["id"],
            "value": difference.value,
            "low": difference.low,
            "high": difference.high,
            "p": p,
            "verdict": verdict(difference, "lower" if metric in LOWER_IS_BETTER else "higher", p=p),
        }
        for (family, metric, a, b), difference, p in zip(planned, found, adjusted, strict=True)
    ]


def write_predictions(rows: Sequence[Row], path: Path) -> None:
    """Write one line per row and request."""
    lines = [
        {
            "row_id": row.figures["id"],
            **{key: row.figures[key] for key in ("task", "arm", "predictor", "template")},
            **record,
        }
        for row in rows
        for record in row.records
    ]
    with replacing(path) as draft:
        pl.DataFrame(lines, schema=dict(_SCHEMA)).write_parquet(draft)


def describe(data: SplitDataset) -> dict[str, Any]:
    """Return a dataset's counts and hashes."""
    rows = data.dataset.interactions
    users, items = rows["user_id"].n_unique(), len(data.dataset.items)
    return {
        "name": data.dataset.name,
        "users": users,
        "items": items,
        "interactions": len(rows),
        "density": len(rows) / (users * items),
        "train": len(data.train),
        "valid": len(data.valid),
        "test": len(data.test),
        "fingerprint": data.dataset.fingerprint,
        "split_fingerprint": data.fingerprint,
        "split": data.kind,
        "noun": data.dataset.noun,
        "made": data.dataset.made,
    }


def notes(study: Study) -> list[str]:
    """Say what a reader of the tables must know."""
    found = []
    for data in filter(None, (study.data, study.reviews)):
        if data.dataset.made:
            found.append(
                f"{data.dataset.name}: this table is made by the llmrec project; its texts are no real reviews."
            )
    if study.candidates:
        found.append(
            f"Ranking figures are over {study.candidates.count} stored candidates a request, not over the whole "
            "catalogue; they cannot be compared with full-ranking figures."
        )
    if len(study.recipe.eval.arms) > 1 or "tuned" in study.recipe.eval.arms:
        found.append("One training seed: intervals cover the choice of users, not the choice of seed.")
    return found


def _candidates(study: Study) -> dict[str, Any]:
    sets = study.candidates
    assert sets is not None
    return {"digest": sets.digest, "count": sets.count, "kind": sets.kind}
