"""Extracts the validation curve of a run: ``python -m eval.benchmarks.curve RUN TARGET.json``.

It reads the training log, so unfinished and interrupted runs are supported. For evaluated runs, the results and
comparisons of all models are included.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from eval.benchmarks.provenance import provenance
from llmrec.durable import write_json
from llmrec.recipe.load import load_recipe


def _evaluated(path: Path) -> dict[str, object] | None:
    """Return the results of a run; None if it was not evaluated."""
    if not path.is_file():
        return None
    results = json.loads(path.read_text(encoding="utf-8"))
    return {
        "rows": [
            {"name": row["id"], "users": row["users"], "metrics": row["metrics"], "cost": row["cost"]}
            for row in results["rows"]
        ],
        "comparisons": results["comparisons"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    recipe = load_recipe(str(options.run / "recipe.yaml"))
    lines = (options.run / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    looks = [
        {
            "step": row["step"],
            "ndcg": row["valid_ndcg"],
            "loss": sum(row["valid_loss"].values()),
            "seconds": row["seconds"],
        }
        for row in rows
        if row.get("valid_ndcg") is not None
    ]
    best = max(looks, key=lambda look: look["ndcg"])
    judge = recipe.train.judge
    stored = options.run / "train.json"
    record = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else None
    result = {
        "recipe": recipe.name,
        "command": f"python -m eval.benchmarks.curve {options.run} {options.target}",
        "users": judge.users if judge else None,
        "patience": judge.patience if judge else None,
        "planned_steps": recipe.train.steps,
        "steps": rows[-1]["step"],
        "seconds": rows[-1]["seconds"],
        "hours": rows[-1]["seconds"] / 3600,
        "looks": looks,
        "best": best,
        "ended": record is not None,
        "tokens": record["tokens"] if record is not None else None,
        # Baselines on the same validation users.
        "controls": record["judged"]["controls"] if record is not None else None,
        "test": _evaluated(options.run / "results.json"),
        **provenance(),
    }
    write_json(options.target, result)
    print(f"{options.target}: {len(looks)} looks, best {best['ndcg']:.4f} at step {best['step']}")  # noqa: T201


if __name__ == "__main__":
    main()
