"""Compresses a run, serves the best combination, and checks that the service reproduces its quality.

``python -m eval.benchmarks.compress_run RUN TARGET.json [--target-ms 20] [--users 50]`` stores the combinations and the
choice of `llmrec compress` for a target. Then the best combination, regardless of latency, is exported and served, and
``llmrec serve`` must reproduce its metric. The run's model predicts ratings of whole stars, as in the quickstart, and
was trained with ``train.exits``. The table is written before serving.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np

from eval.benchmarks.provenance import provenance
from eval.benchmarks.serving import serving
from llmrec.durable import write_json
from llmrec.exports.agreement import on_validation
from llmrec.machine import command_line
from llmrec.pipeline.runs import open_run
from llmrec.systems.m6.compress.compress import chosen, compress
from llmrec.types import Case, Request

# Requests per HTTP call.
_BATCH = 64
# A target below any latency, in milliseconds.
_ANY = 1e9


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, export, serve and write the results."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.compress_run")
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--target-ms", type=float, default=20.0)
    parser.add_argument("--users", type=int, default=50)
    asked = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        found = compress(asked.run, Path(folder) / "export", target_ms=asked.target_ms, users=asked.users)
    table: dict[str, Any] = {
        "command": command_line("python", "-m", "eval.benchmarks.compress_run"),
        "train_seconds": json.loads((asked.run / "train.json").read_text(encoding="utf-8"))["seconds"],
        **{key: value for key, value in asdict(found).items() if key != "folder"},
        **provenance(),
    }
    write_json(asked.target, table)
    best = chosen(found.rows, _ANY, lower=True)
    assert best is not None
    with TemporaryDirectory() as folder:
        out = Path(folder) / "export"
        again = compress(asked.run, out, target_ms=_ANY, users=asked.users, depths=(best.layers,)).chosen
        assert again is not None
        cases = on_validation(open_run(asked.run).recipe, asked.users).cases("rating")
        served = _served(out, Path(folder) / "store.sqlite", cases, again.dtype)
    write_json(asked.target, {**table, "exported": asdict(again), "served": served})


def _served(export: Path, store: Path, cases: Sequence[Case], dtype: str) -> dict[str, Any]:
    """Return the metric of the service's answers."""
    apart = []
    with serving(
        str(export), store, "--models", "tuned", "--dtype", "bfloat16" if dtype == "int8" else dtype
    ) as service:
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
    return {"id": request.id, "history": events, "item_id": request.item}


if __name__ == "__main__":
    main()
