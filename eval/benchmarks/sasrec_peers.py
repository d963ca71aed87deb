"""SASRec of RecTools or RecBole within a time budget, for comparison with llmrec's; run by `sasrec.py`.

It runs in a separate environment with ``rectools[torch]`` and ``recbole`` and does not import llmrec:
``PYTHON sasrec_peers.py rectools|recbole FOLDER SECONDS DROPOUT``. The folder contains ``train.csv``, ``valid.csv`` and
``test.csv`` (user_id, item_id, position); ``LIBRARY.csv`` (user_id, item_id, rank) and ``LIBRARY.json`` are written to
it. Both train on training interactions until the time is spent, or validation NDCG@10 has not risen for 10 epochs, and
rank with the weights of the best epoch. Validation counts towards the time, as it does in llmrec.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from auto_peer import K, dataset, lists, ndcg

DIM, LAYERS, HEADS, LENGTH, RATE = 64, 2, 2, 50, 1e-3
PATIENCE, VALIDATED, SEED = 10, 10_000, 0
PARTS = ("train", "valid", "test")


def until_spent(
    seconds: float, learn: Callable[[int], None], judge: Callable[[], float], network: Callable[[], Any]
) -> dict[str, Any]:
    """Train epoch by epoch within the time, and restore the weights of the best epoch."""
    began, curve, kept, best, since = time.monotonic(), [], None, -1.0, 0
    longest = 0.0
    # An epoch that would not end in time is not started, except the first one.
    while not curve or (time.monotonic() - began + longest <= seconds and since < PATIENCE):
        begin = time.monotonic()
        learn(len(curve))
        value = judge()
        longest = max(longest, time.monotonic() - begin)
        since += 1
        if value > best:
            best, kept, since = value, copy.deepcopy(network().state_dict()), 0
        curve.append({"seconds": round(time.monotonic() - began, 1), "valid": value})
        print(f"epoch {len(curve)}: {curve[-1]}", flush=True)  # noqa: T201
    network().load_state_dict(kept)
    return {"seconds": round(time.monotonic() - began, 1), "epochs": len(curve), "valid": best, "curve": curve}


def rectools(frames: dict[str, pd.DataFrame], seconds: float, dropout: float) -> tuple[dict[str, Any], pd.DataFrame]:
    """Train SASRec of RecTools."""
    from pytorch_lightning import Trainer, seed_everything
    from rectools.models import SASRecModel

    def quiet() -> Trainer:
        return Trainer(
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )

    seed_everything(SEED)
    known, truth = dataset(frames["train"]), frames["valid"].head(VALIDATED)
    model = SASRecModel(
        n_factors=DIM,
        n_blocks=LAYERS,
        n_heads=HEADS,
        session_max_len=LENGTH,
        dropout_rate=dropout,
        lr=RATE,
        loss="softmax",
        get_trainer_func=quiet,
    )

    def learn(_: int) -> None:
        model.fit_partial(known, min_epochs=1, max_epochs=1)

    result = until_spent(
        seconds, learn, lambda: ndcg(lists(model, known, truth["user_id"].unique()), truth), lambda: model.torch_model
    )
    everything = dataset(frames["train"], frames["valid"])
    ranked = lists(model, everything, frames["test"]["user_id"].unique())
    return result, ranked[["user_id", "item_id", "rank"]]


def recbole(frames: dict[str, pd.DataFrame], seconds: float, dropout: float) -> tuple[dict[str, Any], pd.DataFrame]:
    """Train SASRec of RecBole, whose own validation also ranks seen items."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed
    from recbole.utils.case_study import full_sort_scores

    columns = {"user_id": "user_id:token", "item_id": "item_id:token", "position": "timestamp:float"}
    Path("atomic").mkdir(exist_ok=True)
    every = pd.concat([frames[name] for name in PARTS], ignore_index=True)
    every[list(columns)].rename(columns=columns).to_csv("atomic/atomic.inter", sep="\t", index=False)
    sys.argv = sys.argv[:1]  # RecBole reads the command line.
    config = Config(
        model="SASRec",
        dataset="atomic",
        config_dict={
            "data_path": ".",
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"},
            "metrics": ["NDCG"],
            "topk": [K],
            "valid_metric": f"NDCG@{K}",
            "train_neg_sample_args": None,
            "MAX_ITEM_LIST_LENGTH": LENGTH,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_size": DIM,
            "inner_size": 4 * DIM,
            "hidden_dropout_prob": dropout,
            "attn_dropout_prob": dropout,
            "learning_rate": RATE,
            "seed": SEED,
            "use_gpu": False,
            "show_progress": False,
        },
    )
    init_seed(SEED, reproducibility=True)
    data = create_dataset(config)
    train, valid, test = data_preparation(config, data)
    model = get_model("SASRec")(config, train.dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], "SASRec")(config, model)
    trainer.eval_collector.data_collect(train)

    def learn(epoch: int) -> None:
        model.train()
        trainer._train_epoch(train, epoch)

    def judge() -> float:
        return float(trainer.evaluate(valid, load_best_model=False)[f"ndcg@{K}"])

    result = until_spent(seconds, learn, judge, lambda: model)
    seen = pd.concat([frames["train"], frames["valid"]]).groupby("user_id")["item_id"].agg(list)
    users, ranked = frames["test"]["user_id"].unique(), []
    for start in range(0, len(users), 1000):
        some = users[start : start + 1000]
        scores = full_sort_scores(data.token2id("user_id", some), model, test, device=config["device"]).cpu().numpy()
        scores[:, 0] = -np.inf  # The padding item.
        for user, row in zip(some, scores, strict=True):
            row[data.token2id("item_id", seen[user])] = -np.inf
            best = np.argsort(-row, kind="stable")[:K]
            items = data.id2token("item_id", best)
            ranked.append(pd.DataFrame({"user_id": user, "item_id": items, "rank": range(1, K + 1)}))
    return result, pd.concat(ranked, ignore_index=True)


def main() -> None:
    """Train one library, and write its lists."""
    warnings.simplefilter("ignore")
    library, folder, seconds, dropout = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    os.chdir(folder)
    frames = {part: pd.read_csv(f"{part}.csv", dtype={"user_id": str, "item_id": str}) for part in PARTS}
    result, lists = {"rectools": rectools, "recbole": recbole}[library](frames, seconds, dropout)
    lists.to_csv(f"{library}.csv", index=False)
    summary = {"version": importlib.metadata.version(library), **result}
    Path(f"{library}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
