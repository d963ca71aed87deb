"""Compresses a run, serves the export that was chosen, and asks the service what the table's figure was measured on.

``python -m eval.benchmarks.compress_run RUN TARGET.json [--target-ms 20] [--users 50]``: what `llmrec compress` finds,
which row the goal of 20 ms would choose, and the same figure from the answers of ``llmrec serve`` over the export. The
run's model answers ratings of whole stars, as the quickstart's does, and was trained with ``train.exits``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np

from eval.benchmarks.serving import serving
from llmrec.commands.compress.compress import compress
from llmrec.commands.compress.rows import Row, chosen
from llmrec.commands.export.agreement import on_validation
from llmrec.durable import write_json
from llmrec.experiment.runs import open_run
from llmrec.machine import machine, versions
from llmrec.types import Case, Request

GOAL = 20.0
# Questions of one call.
_BATCH = 64


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, export, serve, ask and write."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.compress_run")
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--target-ms", type=float, default=GOAL)
    parser.add_argument("--users", type=int, default=50)
    asked = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "export"
        found = compress(asked.run, out, target_ms=asked.target_ms, users=asked.users)
        lower = found.metric.startswith("RMSE")
        table: dict[str, Any] = {key: value for key, value in asdict(found).items() if key != "folder"}
        table |= {"goal_ms": GOAL, "chosen_at_goal": _as_dict(chosen(found.rows, GOAL, lower=lower))}
        if found.folder is not None and lower:
            cases = on_validation(open_run(asked.run).recipe, asked.users).cases("rating")
            table["served"] = _served(found.folder, Path(folder) / "store.sqlite", cases)
    write_json(asked.target, {**table, "machine": machine(), "versions": versions()})


def _as_dict(row: Row | None) -> dict[str, Any] | None:
    return None if row is None else asdict(row)


def _served(export: Path, store: Path, cases: Sequence[Case]) -> dict[str, Any]:
    """Return the figure of the answers that the service gives."""
    apart = []
    with serving(str(export), store, "--models", "tuned") as service:
        for start in range(0, len(cases), _BATCH):
            part = cases[start : start + _BATCH]
            bodies = [_body(case.request) for case in part]
            answer = httpx.post(f"{service.url}/v1/rate/batch", json={"requests": bodies}, timeout=600)
            answer.raise_for_status()
            apart += [
                each["rating"] - float(case.truth) for each, case in zip(answer.json()["answers"], part, strict=True)
            ]
    return {"metric": "RMSE", "cases": len(cases), "value": float(np.sqrt(np.mean(np.square(apart))))}


def _body(request: Request) -> dict[str, Any]:
    events = [
        {"item_id": event.item_id, "rating": event.rating, "timestamp": event.timestamp} for event in request.history
    ]
    return {"id": request.id, "history": events, "item": request.item}


if __name__ == "__main__":
    main()
