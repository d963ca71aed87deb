"""Times EASE and SASRec beside RecTools', in one run, interleaved.

``RECTOOLS_PYTHON=PYTHON python -m eval.benchmarks.models eval/results/models_speed.json``, where PYTHON is the
interpreter of an environment with ``rectools[torch]`` (Python 3.13). Both libraries get the same made interactions
and use the same number of threads. EASE: fit, then the first 10 of every user, history left out, both in single
precision. SASRec: what one more epoch costs (three epochs less one, by two), with the softmax over all items, 2 blocks,
2 heads, 64 factors, sequences of at most 50 items and about as many targets a step.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llmrec.baselines.ease import EASE
from llmrec.baselines.sasrec import SASRec
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split
from llmrec.durable import write_json
from llmrec.machine import machine, versions
from llmrec.recipe.schema import Split
from llmrec.types import Item, Request

USERS, ITEMS, ROUNDS = 6040, 3416, 2
GOALS = {"ease": 6.0, "sasrec": 1.0}


def made() -> SplitDataset:
    """6,040 users with 10 to 50 of 3,416 items, some more popular than others."""
    rng = np.random.default_rng(0)
    chance = 1 / np.arange(10, ITEMS + 10)
    chance /= chance.sum()
    sizes = rng.integers(12, 53, USERS)
    items = np.concatenate([rng.choice(ITEMS, size=int(size), replace=False, p=chance) for size in sizes])
    steps = np.concatenate([np.arange(size) for size in sizes])
    frame = pl.DataFrame(
        {
            "user_id": np.repeat([f"u{n:04d}" for n in range(USERS)], sizes),
            "item_id": [f"i{n:04d}" for n in items],
            "timestamp": steps.astype(float),
        }
    )
    catalogue = {f"i{n:04d}": Item(item_id=f"i{n:04d}", title="t") for n in range(ITEMS)}
    return split(Dataset(name="made", noun="things", interactions=frame, items=catalogue), Split(), seed=0)


def ease(data: SplitDataset) -> float:
    """Return the seconds of a fit and of every user's list."""
    requests = [
        Request(id=user, user_id=user, history=data.history(user, "valid"))
        for user in data.train["user_id"].unique(maintain_order=True)
    ]
    begin = time.perf_counter()
    model = EASE(EASE.Config(penalty=500.0, dtype="float32"))
    model.fit(data)
    answers = model.answer(requests)
    spent = time.perf_counter() - begin
    assert len(answers) == USERS
    return spent


def sasrec(data: SplitDataset) -> float:
    """Return the seconds of one more epoch."""
    return (_fit(data, 3) - _fit(data, 1)) / 2


def _fit(data: SplitDataset, epochs: int) -> float:
    config = SASRec.Config(
        dim=64, layers=2, heads=2, dropout=0.2, max_len=50, batch=2560, epochs=epochs, patience=None, quiet=True
    )
    model = SASRec(config)
    begin = time.perf_counter()
    model.fit(data)
    return time.perf_counter() - begin


class Peer:
    """RecTools in another environment, timed once for each `seconds`."""

    def __init__(self, python: str, interactions: Path) -> None:
        script = Path(__file__).with_name("models_peer.py")
        self._process = subprocess.Popen(
            [python, str(script), str(interactions)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = self._ask("versions")

    def seconds(self, model: str) -> float:
        """Time one round of a model."""
        return float(self._ask(model))

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()

    def _ask(self, what: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the other library's process ended; its error stands above")
        return json.loads(line)


def main(target: Path) -> None:
    """Measure and write."""
    python = os.environ.get("RECTOOLS_PYTHON")
    if not python:
        raise SystemExit("name the interpreter of an environment with rectools[torch]: RECTOOLS_PYTHON=PYTHON")
    data, found = made(), {}
    own: dict[str, Callable[[SplitDataset], float]] = {"ease": ease, "sasrec": sasrec}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "interactions.csv"
        data.train.select("user_id", "item_id", "timestamp").write_csv(file)
        peer = Peer(python, file)
        for name, once in own.items():
            seconds: dict[str, list[float]] = {"llmrec": [], "rectools": []}
            for _ in range(ROUNDS):
                seconds["llmrec"].append(once(data))
                seconds["rectools"].append(peer.seconds(name))
            spent = {k: {"min": min(s), "median": statistics.median(s)} for k, s in seconds.items()}
            ratio = {of: spent["rectools"][of] / spent["llmrec"][of] for of in ("min", "median")}
            found[name] = {
                "seconds": spent,
                "times_slower": ratio,
                "goal": {"at_least": GOALS[name], "met": min(ratio.values()) >= GOALS[name]},
            }
        peer.close()
    result = {
        "command": "RECTOOLS_PYTHON=PYTHON python -m eval.benchmarks.models eval/results/models_speed.json",
        "what": f"EASE fit and lists, and an epoch of SASRec: {USERS} users, {ITEMS} items, {len(data.train)} events",
        "rounds": ROUNDS,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "models": found,
        "machine": machine(),
        "versions": versions() | {"peer": peer.versions},
    }
    write_json(target, result)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
