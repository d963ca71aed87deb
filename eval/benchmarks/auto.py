"""Collects the results of `llmrec auto` from finished run folders into one committed file.

``python -m eval.benchmarks.auto RUN... --target eval/results/auto.json``; ``make bench NAME=auto`` creates the runs.
``--peer FOLDER``, once per run in the same order, adds the results of another library on the same data
(`auto_peer.py`), computed as by `llmrec score`; for a run without a peer the earlier result is kept. ``--by-hand RESULT
ROW``, also once per run, copies the result of the best weighted ensemble of a committed suite with manually chosen
models and grids.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.provenance import provenance
from llmrec import score
from llmrec.durable import write_json


def measured(run: Path) -> dict[str, Any]:
    """Return the data, the budget, and the test results of the ensemble and of the best single model of a run."""
    summary = json.loads((run / "auto" / "auto.json").read_text(encoding="utf-8"))
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    metric = results["headline"]["sequential"]
    rows = [row for row in results["rows"] if row["task"] == "sequential"]
    fused = max((row for row in rows if row.get("fusion")), key=lambda row: len(row["fusion"]["parts"]))
    single = max((row for row in rows if not row.get("fusion")), key=lambda row: row["metrics"][metric]["value"])
    return {
        "data": results["data"]["main"]["name"],
        "users": fused["users"],
        "metric": metric,
        "budget_seconds": summary["budget_seconds"],
        "seconds": summary["seconds"],
        "fusion": {**_figure(fused["metrics"][metric]), "form": fused["fusion"]["form"]},
        "best_single": {"recommender": single["predictor"].partition("(")[0], **_figure(single["metrics"][metric])},
        "less_best_single": _compared(results["comparisons"], fused["id"], single["id"], metric),
        "sentence": summary["sentence"],
        "parts": summary["parts"],
        "machine": results["machine"],
    }


def reached(folder: Path) -> dict[str, Any]:
    """Return the results of another library on the same test users: its best model on validation, and its trials."""
    trials = json.loads((folder / "trials.json").read_text(encoding="utf-8"))
    result = score(str(folder / "lists.csv"), str(folder / "truth.csv"), k=(10,)).metrics["NDCG@10"]
    return trials | {"test": {"value": result.value, "low": result.low, "high": result.high}}


def by_hand(result: str, row: str) -> dict[str, Any]:
    """Return the result of an ensemble of a committed suite, with seen items filtered."""
    rows = json.loads(Path(f"eval/results/{result}.json").read_text(encoding="utf-8"))["rows"]
    (metrics,) = (entry["tables"]["excluded"]["metrics"] for entry in rows if entry["name"] == row)
    return {"result": result, "row": row, **_figure(metrics["NDCG@10"])}


def _figure(metric: Mapping[str, Any]) -> dict[str, Any]:
    return {key: metric[key] for key in ("value", "low", "high")}


def _compared(pairs: Sequence[Mapping[str, Any]], a: str, b: str, metric: str) -> dict[str, Any] | None:
    """Return the paired difference ensemble − best single model; None if they were not compared."""
    for pair in pairs:
        if pair["metric"] == metric and {pair["a"], pair["b"]} == {a, b}:
            sign = 1 if pair["a"] == a else -1
            ends = sorted(sign * pair[key] for key in ("low", "high"))
            return {"value": sign * pair["value"], "low": ends[0], "high": ends[1], "verdict": pair.get("verdict")}
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Read run folders and write the file."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.auto")
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--peer", type=Path, action="append", default=[], help="peer results, in the order of the runs")
    parser.add_argument("--by-hand", nargs=2, action="append", default=[], metavar=("RESULT", "ROW"))
    parser.add_argument("--note", default="")
    parser.add_argument("--target", type=Path, default=Path("eval/results/auto.json"))
    parser.add_argument("--command", default="make bench NAME=auto")
    options = parser.parse_args(arguments)
    if len(options.peer) > len(options.runs):
        parser.error(
            f"{len(options.peer)} peers for {len(options.runs)} runs: give at most one for each run, in the same order"
        )
    results = {run.name: measured(run) for run in options.runs}
    before = json.loads(options.target.read_text(encoding="utf-8"))["runs"] if options.target.is_file() else {}
    for run, peer in zip(options.runs, options.peer, strict=False):
        results[run.name]["peer"] = reached(peer)
    for run, reference in zip(options.runs, options.by_hand, strict=False):
        results[run.name]["by_hand"] = by_hand(*reference)
    for name in results:
        if "peer" in before.get(name, {}):
            results[name].setdefault("peer", before[name]["peer"])
    write_json(
        options.target,
        {
            "command": options.command,
            "what": "llmrec auto within a budget of wall time: NDCG@10 over the whole catalogue on test users",
            "note": options.note,
            **provenance(),
            "runs": results,
        },
    )
    for name, run in results.items():
        sys.stdout.write(f"{name}: {run['sentence']}\n")


if __name__ == "__main__":
    main()
