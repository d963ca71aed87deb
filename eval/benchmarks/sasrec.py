"""Trains SASRec of llmrec, RecTools and RecBole on the same split, within the same time and with the same settings.

``SASREC_PYTHON=PYTHON LLMREC_DATA=FOLDER OMP_NUM_THREADS=1 python -m eval.benchmarks.sasrec eval/results/sasrec.json``,
where PYTHON is the interpreter of an environment with ``rectools[torch]`` and ``recbole``. All use two layers, 64
dimensions, two heads, the last 50 items, Adam with a learning rate of 1e-3 and the cross-entropy over all items; the
size of a batch is the default of each library. Finished entries of the file are kept.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import llmrec
from eval.benchmarks.auto_split import write_parts
from eval.benchmarks.provenance import provenance
from llmrec.baselines.sasrec import SASRec
from llmrec.baselines.validation import mean_ndcgs, ranking_cases
from llmrec.data.split import SplitDataset, request_of
from llmrec.durable import write_json
from llmrec.pipeline.study import load_split
from llmrec.recipe.load import load_suite

# Dropout and seconds of training by data set; the dropout is that of the suite.
SETS: Mapping[str, tuple[float, int]] = {"toys": (0.5, 600), "ml-1m": (0.2, 900)}
LIBRARIES = ("llmrec", "rectools", "recbole")
K, SEED, ROWS = 10, 0, 1000
# RecTools and RecBole hold all logits of a batch in memory. By default, glibc returns this memory to the system after
# each step, and allocating it again would take half of their time.
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def train_llmrec(data: SplitDataset, folder: Path, seconds: float, dropout: float) -> dict[str, Any]:
    """Train llmrec's SASRec for as many epochs as fit into the time, and write its lists."""
    common = {"dropout": dropout, "max_len": 50, "quiet": True}
    begin = time.monotonic()
    SASRec(seed=SEED, epochs=1, **common).fit(data)
    fitting = max(1, int(seconds / (time.monotonic() - begin)))
    begin = time.monotonic()
    model = SASRec(seed=SEED, epochs=fitting, **common)
    model.fit(data)
    spent = time.monotonic() - begin
    requests = [request_of(data, held, "test") for held in data.holdouts("test")]
    items, rows = np.array(model.items), []
    for start in range(0, len(requests), ROWS):
        some = requests[start : start + ROWS]
        for request, scores in zip(some, model.scores(some), strict=True):
            seen = np.isin(items, [event.item_id for event in request.history])
            best = np.argsort(np.where(seen, np.inf, -scores), kind="stable")[:K]
            rows += [(request.user_id, item, rank) for rank, item in enumerate(items[best].tolist(), 1)]
    pl.DataFrame(rows, schema=["user_id", "item_id", "rank"], orient="row").write_csv(folder / "llmrec.csv")
    valid = mean_ndcgs(model, ranking_cases(data, 10_000))["excluded"]
    return {
        "version": llmrec.__version__,
        "seconds": round(spent, 1),
        "best_epoch": int(model.state()["epochs"][0]),
        "epochs_within": fitting,
        "valid": valid,
    }


def measured(library: str, data: SplitDataset, folder: Path, seconds: float, dropout: float) -> dict[str, Any]:
    """Train SASRec of a library and score its lists."""
    if library == "llmrec":
        result = train_llmrec(data, folder, seconds, dropout)
    else:
        script = Path(__file__).with_name("sasrec_peers.py").resolve()
        command = [os.environ["SASREC_PYTHON"], script, library, folder, str(seconds), str(dropout)]
        subprocess.run(command, check=True, env={**os.environ, **KEEPING})
        result = json.loads((folder / f"{library}.json").read_text(encoding="utf-8"))
    return {**result, "test": _figure(llmrec.score(folder / f"{library}.csv", folder / "truth.csv", k=(K,)).metrics)}


def _figure(metrics: Mapping[str, Any]) -> dict[str, float]:
    estimate = metrics[f"NDCG@{K}"]
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def main(target: Path, names: Sequence[str]) -> None:
    """Run the missing libraries, one after another, and compare llmrec with the others."""
    sets = json.loads(target.read_text(encoding="utf-8"))["sets"] if target.is_file() else {}
    for name in names or SETS:
        dropout, seconds = SETS[name]
        suite = load_suite(f"eval/suites/{name}.yaml")
        data, folder = load_split(suite.data, suite.split_seeds[0]), Path("runs/sasrec", name).resolve()
        write_parts(data, folder)
        entry = sets.setdefault(
            name, {"budget_seconds": seconds, "dropout": dropout, "libraries": {}, "differences": {}}
        )
        for library in LIBRARIES:
            if library not in entry["libraries"]:
                entry["libraries"][library] = {**measured(library, data, folder, seconds, dropout), **provenance()}
            if library != LIBRARIES[0] and library not in entry["differences"]:
                pair = llmrec.score(
                    folder / f"{LIBRARIES[0]}.csv", folder / "truth.csv", against=folder / f"{library}.csv", k=(K,)
                )
                entry["differences"][library] = _figure(pair.comparisons)
            sys.stdout.write(f"{name}, {library}: {entry['libraries'][library]['test']}\n")
            result = {
                "command": "SASREC_PYTHON=PYTHON LLMREC_DATA=FOLDER OMP_NUM_THREADS=1 make bench NAME=sasrec",
                "what": "NDCG@10 of test users, seen items filtered, one seed; differences are llmrec - library",
                "sets": sets,
            }
            write_json(target, {**result, **provenance()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
