"""Times the ranking metrics on 6,040 users with lists of 100, from tables of ids to figures, beside other libraries.

``python -m eval.benchmarks.metrics eval/results/metrics_speed.json``. Two workloads: one held-out item a user, and 5
to 50. ir-measures (with pytrec-eval) runs in this process. ranx and RecTools need environments of their own:
``RANX_PYTHON`` and ``RECTOOLS_PYTHON`` name their interpreters, which get the same Parquet files; without the variable
a library is left out. Rounds alternate between all of them. Each is timed from its own kind of table in memory, so
building its structures is part of the time; reading files, turning ids into text for those who want text, compiling
and warming up are not.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llmrec.durable import write_json
from llmrec.machine import machine, versions
from llmrec.metrics import multi_target, ranking
from llmrec.metrics.multi_target import Pairs, judge, numbered, place

USERS, ITEMS, DEPTH, CUTOFFS, ROUNDS = 6040, 3416, 100, (1, 5, 10, 20), 5
WORKLOADS: Mapping[str, tuple[int, int]] = {"one": (1, 1), "several": (5, 50)}
GOALS = {"ranx": 100, "rectools": 50}


def make(folder: Path, wanted: tuple[int, int]) -> tuple[Path, Path]:
    """Write a made run and its relevant items, between ``wanted`` a user, as Parquet; scores have no ties."""
    rng = np.random.default_rng(0)
    order = np.argsort(rng.random((USERS, ITEMS)), axis=1)
    ids = np.sort(rng.choice(10**6, size=USERS, replace=False))
    run = pl.DataFrame(
        {
            "user": np.repeat(ids, DEPTH),
            "item": order[:, :DEPTH].ravel(),
            "score": np.tile(np.arange(DEPTH, 0, -1) / DEPTH, USERS),
            "rank": np.tile(np.arange(1, DEPTH + 1), USERS),
        }
    )
    # Drawn from the first part of each user's order, so that hits are neither rare nor certain.
    sizes = rng.integers(wanted[0], wanted[1] + 1, USERS)
    goals = [np.sort(rng.choice(ITEMS // 10, size=int(size), replace=False)) for size in sizes]
    relevant = pl.DataFrame(
        {
            "user": np.repeat(ids, sizes),
            "item": np.concatenate([row[each] for row, each in zip(order, goals, strict=True)]),
        }
    )
    folder.mkdir(exist_ok=True)
    paths = folder / "run.parquet", folder / "relevant.parquet"
    run.write_parquet(paths[0])
    relevant.write_parquet(paths[1])
    return paths


def one(run: pl.DataFrame, relevant: pl.DataFrame) -> dict[str, float]:
    """Number the users, find each target, and take every metric."""
    users, targets = relevant["user"].to_numpy(), relevant["item"].to_numpy()
    pairs = Pairs(numbered(run["user"].to_numpy(), users), run["item"].to_numpy(), run["score"].to_numpy())
    greater, tied = place(pairs, targets)
    figures = {}
    for k in CUTOFFS:
        figures[f"HR@{k}"] = figures[f"Recall@{k}"] = float(ranking.hit_rate(greater, tied, k).mean())
        figures[f"Precision@{k}"] = float(ranking.precision(greater, tied, k).mean())
        figures[f"NDCG@{k}"] = float(ranking.ndcg(greater, tied, k).mean())
        figures[f"MAP@{k}"] = float(ranking.average_precision(greater, tied, k).mean())
    figures["MRR"] = float(ranking.reciprocal_rank(greater, tied).mean())
    return figures


def several_of(run: pl.DataFrame, relevant: pl.DataFrame) -> dict[str, float]:
    """Number the users, match, and take every metric."""
    goal_users = relevant["user"].to_numpy()
    users = np.unique(goal_users)
    judged = judge(
        Pairs(numbered(run["user"].to_numpy(), users), run["item"].to_numpy(), run["score"].to_numpy()),
        Pairs(numbered(goal_users, users), relevant["item"].to_numpy(), np.ones(len(goal_users))),
        len(users),
    )
    figures = {}
    for k in CUTOFFS:
        figures[f"HR@{k}"] = float(multi_target.hit_rate(judged, k).mean())
        figures[f"Recall@{k}"] = float(multi_target.recall(judged, k).mean())
        figures[f"Precision@{k}"] = float(multi_target.precision(judged, k).mean())
        figures[f"NDCG@{k}"] = float(multi_target.ndcg(judged, k).mean())
        figures[f"MAP@{k}"] = float(multi_target.average_precision(judged, k).mean())
    figures["MRR"] = float(multi_target.reciprocal_rank(judged).mean())
    return figures


OURS: Mapping[str, Callable[[pl.DataFrame, pl.DataFrame], dict[str, float]]] = {"one": one, "several": several_of}


def ir_measures(run: pl.DataFrame, relevant: pl.DataFrame) -> dict[str, float]:
    """Take the same metrics by ir-measures, from the same tables with ids as text."""
    import ir_measures as measures

    wanted = {"MRR": measures.RR}
    for k in CUTOFFS:
        wanted |= {f"HR@{k}": measures.Success @ k, f"Recall@{k}": measures.R @ k, f"Precision@{k}": measures.P @ k}
        wanted |= {f"NDCG@{k}": measures.nDCG @ k, f"MAP@{k}": measures.AP @ k}
    found = measures.calc_aggregate(list(wanted.values()), _nested(relevant, 1), _nested(run))
    return {name: float(found[measure]) for name, measure in wanted.items()}


def _nested(frame: pl.DataFrame, gain: int | None = None) -> dict[str, dict[str, Any]]:
    values = frame["score"].to_list() if gain is None else [gain] * len(frame)
    nested: dict[str, dict[str, Any]] = {}
    for user, item, value in zip(frame["user"].to_list(), frame["item"].to_list(), values, strict=True):
        nested.setdefault(user, {})[item] = value
    return nested


class Peer:
    """A library in another environment, timed once for each `seconds`."""

    def __init__(self, library: str, python: str, paths: tuple[Path, Path]) -> None:
        script = Path(__file__).with_name("metrics_peers.py")
        self._process = subprocess.Popen(
            [python, str(script), library, *map(str, paths), *map(str, CUTOFFS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=paths[0].parent,
        )
        first = self._read()
        self.metrics: dict[str, float] = first["metrics"]
        self.versions: dict[str, str] = first["versions"]

    def seconds(self) -> float:
        """Time one round."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._read()["seconds"])

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args!r} ended; its error stands above")
        found: dict[str, Any] = json.loads(line)
        return found


def _clock(once: Callable[[], object]) -> float:
    begin = time.perf_counter()
    once()
    return time.perf_counter() - begin


def measure(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Time one workload."""
    paths = make(folder, WORKLOADS[name])
    run, relevant = (pl.read_parquet(path) for path in paths)
    text = [frame.with_columns(pl.col("user", "item").cast(pl.String)) for frame in (run, relevant)]
    ours = OURS[name]
    figures, compared = ours(run, relevant), {"ir-measures": ir_measures(*text)}
    peers = {
        library: Peer(library, os.environ[variable], paths)
        for library, variable in (("ranx", "RANX_PYTHON"), ("rectools", "RECTOOLS_PYTHON"))
        if os.environ.get(variable)
    }
    calls: dict[str, Callable[[], float]] = {"ir-measures": lambda: _clock(lambda: ir_measures(*text))}
    calls |= {library: peer.seconds for library, peer in peers.items()}
    seconds: dict[str, list[float]] = {each: [] for each in ("llmrec", *calls)}
    for _ in range(rounds):
        # Ours stands before each of the others, so that a busy moment falls on both sides of a ratio.
        for library, call in calls.items():
            seconds["llmrec"].append(_clock(lambda: ours(run, relevant)))
            seconds[library].append(call())
    for library, peer in peers.items():
        compared[library] = peer.metrics
        peer.close()
    spent = {each: {"min": min(s), "median": statistics.median(s)} for each, s in seconds.items()}
    slower = {k: {of: each[of] / spent["llmrec"][of] for of in each} for k, each in spent.items() if k != "llmrec"}
    return {
        "relevant_a_user": list(WORKLOADS[name]),
        "metrics": len(figures),
        "seconds": spent,
        "times_slower": slower,
        "goals": {
            k: {"at_least": goal, "met": min(slower[k].values()) >= goal} for k, goal in GOALS.items() if k in slower
        },
        "figures": figures,
        "largest_difference": {k: _largest(figures, each) for k, each in compared.items()},
        "versions": {library: peer.versions for library, peer in peers.items()},
    }


def _largest(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """Return by kind of metric the largest difference of the other library's figures."""
    found: dict[str, float] = {}
    for name, value in theirs.items():
        kind = name.split("@")[0]
        found[kind] = max(found.get(kind, 0.0), abs(value - ours[name]))
    return found


def main(target: Path, rounds: int = ROUNDS) -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory() as folder:
        workloads = {name: measure(name, Path(folder) / name, rounds) for name in WORKLOADS}
    result = {
        "command": "python -m eval.benchmarks.metrics eval/results/metrics_speed.json",
        "what": f"seconds for ranking metrics of {USERS} users with lists of {DEPTH}, from tables of ids to figures",
        "rounds": rounds,
        "workloads": workloads,
        "machine": machine(),
        "versions": versions()
        | {name: importlib.metadata.version(name) for name in ("ir-measures", "pytrec-eval-terrier")},
    }
    write_json(target, result)
    shown = {
        name: {key: each[key] for key in ("seconds", "times_slower", "largest_difference")}
        for name, each in workloads.items()
    }
    sys.stdout.write(json.dumps(shown, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:3]))
