"""Times RecTools' EASE and SASRec, on the word of `models.py`: one line of JSON for each line on stdin.

It runs in that library's own environment, so it imports nothing of llmrec: ``PYTHON models_peer.py TRAIN.csv``.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import sys
import time
import warnings

import pandas as pd
from rectools.dataset import Dataset
from rectools.models import EASEModel, SASRecModel


def main() -> None:
    """Answer until there is no more to ask."""
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    frame = pd.read_csv(sys.argv[1])
    start = pd.Timestamp("2020-01-01")
    frame["datetime"] = start + pd.to_timedelta(frame.pop("timestamp"), unit="D")
    frame["weight"] = 1.0
    dataset = Dataset.construct(frame)
    users = frame["user_id"].unique()

    def ease() -> float:
        begin = time.perf_counter()
        model = EASEModel(regularization=500.0)
        model.fit(dataset)
        model.recommend(users, dataset, k=10, filter_viewed=True)
        return time.perf_counter() - begin

    def fit(epochs: int) -> float:
        model = SASRecModel(
            n_blocks=2, n_heads=2, n_factors=64, dropout_rate=0.2, session_max_len=50, batch_size=85, loss="softmax",
            epochs=epochs,
        )  # fmt: skip
        begin = time.perf_counter()
        model.fit(dataset)
        return time.perf_counter() - begin

    for line in sys.stdin:
        if line.strip() == "versions":
            names = ("RecTools", "numpy", "pandas", "torch", "pytorch-lightning")
            said: object = {"python": sys.version.split()[0]} | {n: importlib.metadata.version(n) for n in names}
        else:
            said = ease() if line.strip() == "ease" else (fit(3) - fit(1)) / 2
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
