r"""Sets runs that differ in their item index side by side: figures with intervals, and paired differences.

``python -m eval.benchmarks.index_schemes TARGET RUN RUN...``: run folders of recipes/movielens-100k/index-*.yaml with
the same users and steps, such as

    for n in random collaborative-token; do
      llmrec run recipes/movielens-100k/index-$n.yaml name=full-$n 'eval.candidates={kind: catalogue}' \\
        'tasks.sequential.strategies=[search]' tasks.sequential.users=400 eval.backend=hf
    done

The first run is what the others are compared with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llmrec.durable import write_json
from llmrec.evaluate.compare import compare

METRICS = ("HR@5", "HR@10", "NDCG@5", "NDCG@10")


def tuned(run: Path) -> dict[str, Any]:
    """Return the stored row of a run's tuned model."""
    (file,) = (run / "rows").glob("sequential.tuned.*.json")
    row: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return row


def summary(run: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Return what a run was and what it reached."""
    rows = {row["id"]: row for row in results["rows"]}
    return {
        "recipe": results["recipe"]["name"],
        "recipe_hash": results["recipe_hash"],
        "index": results["recipe"]["index"]["scheme"],
        "item_token": results["recipe"]["index"]["item_token"],
        "steps": results["training"]["steps"],
        "train_seconds": results["training"]["seconds"],
        "target_tokens": results["training"]["target_tokens"],
        "n": tuned(run)["figures"]["n"],
        "rows": {
            name: {m: {k: row["metrics"][m][k] for k in ("value", "low", "high", "signature")} for m in METRICS}
            for name, row in rows.items()
        },
    }


def difference(metric: str, one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Return the paired difference of two rows over the same requests."""
    asked = [record["request_id"] for record in one["records"]]
    if asked != [record["request_id"] for record in two["records"]]:
        raise SystemExit("the runs were asked different requests; give them the same data, seed and users")
    users = [record["user_id"] for record in one["records"]]
    a, b = (np.array(row["values"][metric]) for row in (one, two))
    found = compare(metric, a, b, users, resamples=10_000, seed=0)
    return {"value": found.value, "low": found.low, "high": found.high, "p": found.p}


def main(target: Path, runs: list[Path]) -> None:
    """Compare and write."""
    results = [json.loads((run / "results.json").read_text(encoding="utf-8")) for run in runs]
    stored = [tuned(run) for run in runs]
    found = {
        "command": "python -m eval.benchmarks.index_schemes TARGET RUN RUN...",
        "what": "tuned models that differ in their item index alone; one training seed",
        "runs": [summary(run, each) for run, each in zip(runs, results, strict=True)],
        "less_the_first": [
            {"recipe": each["recipe"]["name"], **{m: difference(m, row, stored[0]) for m in METRICS}}
            for each, row in zip(results[1:], stored[1:], strict=True)
        ],
        "machine": results[0]["machine"],
        "versions": results[0]["versions"],
    }
    write_json(target, found)
    for entry in found["less_the_first"]:
        sys.stdout.write(json.dumps(entry, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
