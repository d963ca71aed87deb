"""Times the evaluation of SmolLM2-135M-Instruct in one process with two threads and in two with one thread each.

``python -m eval.benchmarks.launch eval/results/launch.json``. The two processes are started by `llmrec eval --launch
2`. Both commands read the data, fit the baselines and write the report in one process; the seconds of the whole command
and of the model's answers are recorded, alternately, with the load of the machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from eval.benchmarks.provenance import provenance
from llmrec.durable import write_json
from llmrec.pipeline.shards import SHARD, shards_of

ROUNDS, USERS = 3, 16
RECIPE = (
    "recipes/movielens-100k/four-tasks.yaml",
    "model.dtype=float32",
    "tasks={direct: {templates: [after-history], strategies: [label], "
    "baselines: [random, popularity, item-knn, markov-1]}}",
    "reviews=null",
    "eval.arms=[zero-shot]",
    f"eval.users={USERS}",
    "eval.batch=2",
    "eval.backend=hf",
    "eval.fusion={}",
)
# One process with two threads, and two with one thread each.
WAYS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "one": ({"OMP_NUM_THREADS": "2"}, ()),
    "two": ({"OMP_NUM_THREADS": "1"}, ("--launch", "2")),
}


def main(target: Path) -> None:
    """Run both alternately and write the times."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as place:
        # Before the first round, cache the model's files and the fits of baselines.
        _run(Path(place) / "first", *WAYS["one"])
        for number in range(ROUNDS):
            for way, settings in WAYS.items():
                runs[way].append(_run(Path(place) / f"{way} {number}", *settings))
    medians = {way: {key: _median(done, key) for key in ("command", "answers")} for way, done in runs.items()}
    one, two = medians.values()
    write_json(
        target,
        {
            "command": "make bench NAME=launch",
            "recipe": RECIPE,
            "runs": runs,
            "medians": medians,
            "ratio": {key: round(one[key] / two[key], 2) for key in one},
            **provenance(),
        },
    )


def _run(out: Path, environment: dict[str, str], words: tuple[str, ...]) -> dict[str, Any]:
    begin = time.monotonic()
    command = [sys.executable, "-m", "llmrec", "eval", *RECIPE, *words, "--out", str(out)]
    subprocess.run(command, check=True, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - begin
    shards = [json.loads(path.read_text(encoding="utf-8")) for path in shards_of(out).glob(f"*/{SHARD}")]
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    spent = {entry["stage"]: entry["seconds"] for entry in results["budget"]}
    # Shards work at the same time: the slowest one counts.
    answers = max((shard["told"]["seconds"]["zero-shot"] for shard in shards), default=spent["zero-shot"])
    return {
        "command": round(seconds, 1),
        "answers": round(answers, 1),
        "metrics": {row["id"]: row["metrics"]["NDCG@10"]["value"] for row in results["rows"]},
        "load": os.getloadavg()[0],
    }


def _median(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
