"""Tunes RecTools' models within a time budget, for comparison with `llmrec auto`, and ranks for test users.

It runs in a separate environment for RecTools and does not import llmrec: ``PYTHON auto_peer.py FOLDER SECONDS``. The
folder contains ``train.csv``, ``valid.csv`` and ``test.csv`` (user_id, item_id, position) from ``auto_split``;
``lists.csv`` (user_id, item_id, rank, score) and ``trials.json`` are written to it. Models are tried in ascending order
of cost, each in a separate process, which is killed when the budget is spent; the best one on validation is then fitted
again, outside the budget. SASRec is included if torch is installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from implicit.als import AlternatingLeastSquares
from implicit.nearest_neighbours import CosineRecommender, TFIDFRecommender
from rectools.dataset import Dataset
from rectools.models import EASEModel, ImplicitALSWrapperModel, ImplicitItemKNNWrapperModel, PopularModel, PureSVDModel

# Without torch, RecTools imports its networks as placeholders that cannot be instantiated.
SASREC = importlib.util.find_spec("torch") is not None
if SASREC:
    from rectools.models import SASRecModel

K = 10
Make = Callable[[], Any]


def points() -> Iterator[tuple[str, Make]]:
    """Yield models with their names, cheapest first."""
    yield "popular", PopularModel
    for neighbours in (20, 50, 100, 200):
        for kind in (CosineRecommender, TFIDFRecommender):
            yield (
                f"{kind.__name__}(K={neighbours})",
                lambda k=neighbours, kind=kind: ImplicitItemKNNWrapperModel(kind(K=k)),
            )
    for factors in (32, 64, 128, 256):
        yield f"pure-svd({factors})", lambda f=factors: PureSVDModel(factors=f)
    for factors in (32, 64, 128):
        for weight in (0.01, 0.1, 1.0):
            for alpha in (1.0, 10.0, 40.0):
                yield (
                    f"als({factors}, {weight:g}, {alpha:g})",
                    lambda f=factors, w=weight, a=alpha: ImplicitALSWrapperModel(
                        AlternatingLeastSquares(factors=f, regularization=w, alpha=a, random_state=0)
                    ),
                )
    # It inverts a dense matrix over items.
    for regularization in (50.0, 100.0, 200.0, 500.0, 1000.0):
        yield f"ease({regularization:g})", lambda r=regularization: EASEModel(regularization=r)
    if SASREC:
        for epochs in (60, 150):
            for dropout in (0.5, 0.2):
                yield (
                    f"sasrec(epochs={epochs}, dropout={dropout:g})",
                    lambda e=epochs, d=dropout: SASRecModel(
                        n_factors=64, n_blocks=2, session_max_len=50, dropout_rate=d, epochs=e, deterministic=True
                    ),
                )


def dataset(*parts: pd.DataFrame) -> Dataset:
    frame = pd.concat(parts, ignore_index=True)
    frame["datetime"] = pd.Timestamp("2020-01-01") + pd.to_timedelta(frame.pop("position"), unit="s")
    frame["weight"] = 1.0
    return Dataset.construct(frame)


def lists(model: Any, data: Dataset, users: np.ndarray) -> pd.DataFrame:
    return model.recommend(users=users, dataset=data, k=K, filter_viewed=True)


def ndcg(ranked: pd.DataFrame, truth: pd.DataFrame) -> float:
    """Mean NDCG@10 with one relevant item per user; users without a list, or without the item in it, count 0."""
    hits = ranked.merge(truth, on=["user_id", "item_id"])
    return float((1 / np.log2(hits["rank"] + 1)).sum() / truth["user_id"].nunique())


def within(seconds: float, work: Callable[[], float]) -> float | None:
    """Return the result of work in a separate process; None on a timeout."""
    if seconds <= 0:
        return None
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: there.send(work()))
    child.start()
    there.close()
    try:
        return float(here.recv()) if here.poll(seconds) else None
    except EOFError:
        return None
    finally:
        child.kill()
        child.join()


def main() -> None:
    warnings.simplefilter("ignore")
    folder, budget = Path(sys.argv[1]), float(sys.argv[2])
    train, valid, test = (
        pd.read_csv(folder / f"{part}.csv", dtype={"user_id": str, "item_id": str})
        for part in ("train", "valid", "test")
    )
    began, trials = time.monotonic(), []
    known, users = dataset(train), valid["user_id"].unique()
    users = users[np.isin(users, train["user_id"].unique())]
    best: tuple[float, str, Make] | None = None
    for name, make in points():
        begin = time.monotonic()
        value = within(began + budget - begin, lambda m=make: ndcg(lists(m().fit(known), known, users), valid))
        if value is None:
            trials.append({"model": name, "skipped": True, "seconds": time.monotonic() - begin})
            continue
        trials.append({"model": name, "valid": value, "seconds": time.monotonic() - begin})
        print(f"{name} {value:.4f} {time.monotonic() - begin:.1f} s", flush=True)  # noqa: T201
        if best is None or value > best[0]:
            best = value, name, make
    assert best is not None
    everything = dataset(train, valid)
    ranked = lists(best[2]().fit(everything), everything, test["user_id"].unique())
    ranked[["user_id", "item_id", "rank", "score"]].to_csv(folder / "lists.csv", index=False)
    summary = {
        "library": f"rectools {importlib.metadata.version('rectools')}",
        "sasrec": SASREC,
        "best": best[1],
        "valid": best[0],
        "budget_seconds": budget,
        "seconds": time.monotonic() - began,
        "tried": sum("valid" in trial for trial in trials),
        "skipped": sum("skipped" in trial for trial in trials),
        "trials": trials,
    }
    (folder / "trials.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
