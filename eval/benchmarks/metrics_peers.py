"""Times another library's ranking metrics, on the word of `metrics.py`: one line of JSON for each line on stdin.

It runs in that library's own environment, so it imports nothing of llmrec:
``PYTHON metrics_peers.py (ranx|rectools) RUN.parquet RELEVANT.parquet CUTOFF...``.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any


def ranx(run_path: str, relevant_path: str, cutoffs: list[int]) -> Callable[[], dict[str, float]]:
    """Return what is timed. ranx wants ids as text; turning them into text is left out of its time."""
    import pandas as pd
    from ranx import Qrels, Run, evaluate

    run, relevant = pd.read_parquet(run_path), pd.read_parquet(relevant_path)
    for frame in (run, relevant):
        for column in ("user", "item"):
            frame[column] = frame[column].astype(str).astype(object)
    relevant["gain"] = 1
    kinds = {"HR": "hit_rate", "Recall": "recall", "Precision": "precision", "NDCG": "ndcg", "MAP": "map"}
    names = {f"{ours}@{k}": f"{theirs}@{k}" for k in cutoffs for ours, theirs in kinds.items()} | {"MRR": "mrr"}

    def once() -> dict[str, float]:
        qrels = Qrels.from_df(relevant, q_id_col="user", doc_id_col="item", score_col="gain")
        ranked = Run.from_df(run, q_id_col="user", doc_id_col="item", score_col="score")
        found = evaluate(qrels, ranked, list(names.values()))
        return {ours: float(found[theirs]) for ours, theirs in names.items()}

    return once


def rectools(run_path: str, relevant_path: str, cutoffs: list[int]) -> Callable[[], dict[str, float]]:
    """Return what is timed; ranks are in the file."""
    import pandas as pd
    from rectools.metrics import MAP, MRR, NDCG, HitRate, Precision, Recall, calc_metrics

    renamed = {"user": "user_id", "item": "item_id"}
    run = pd.read_parquet(run_path).rename(columns=renamed)
    relevant = pd.read_parquet(relevant_path).rename(columns=renamed)
    # By default its NDCG divides by k relevant items even where there are fewer.
    ndcg = partial(NDCG, divide_by_achievable=True)
    kinds = {"HR": HitRate, "Recall": Recall, "Precision": Precision, "NDCG": ndcg, "MAP": MAP}
    wanted: dict[str, Any] = {f"{name}@{k}": kind(k=k) for k in cutoffs for name, kind in kinds.items()}
    # It has no reciprocal rank without a cut-off; lists end at 100.
    wanted["MRR"] = MRR(k=100)

    def once() -> dict[str, float]:
        return {name: float(value) for name, value in calc_metrics(wanted, run, interactions=relevant).items()}

    return once


def main() -> None:
    """Warm up once, then time once for each line on stdin."""
    library, run_path, relevant_path = sys.argv[1:4]
    once = {"ranx": ranx, "rectools": rectools}[library](run_path, relevant_path, [int(k) for k in sys.argv[4:]])
    metrics = once()
    packages = ("ranx", "RecTools", "numpy", "pandas", "numba")
    versions = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    sys.stdout.write(json.dumps({"metrics": metrics, "versions": versions}) + "\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        begin = time.perf_counter()
        once()
        sys.stdout.write(json.dumps({"seconds": time.perf_counter() - begin}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
