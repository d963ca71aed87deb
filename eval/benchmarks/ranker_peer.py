"""RecTools' two-stage model over stored candidates, for comparison with llmrec's learned ranker; run by `ranker.py`.

It runs in a separate environment for RecTools and does not import llmrec: ``PYTHON ranker_peer.py FOLDER``. The folder
contains ``events.npz`` (training interactions, and the held-out items of the reserved validation users), and for these
users (``valid``) and the test users ``lists-*.npz`` (the top items of each member, with scores) and ``features-*.npz``
(llmrec's features of all candidates). ``lists.npz`` and ``trials.json`` are written to it.

RecTools' first stage consists of its models, so each member is a `ModelBase` that returns the stored lists; the rest is
an unchanged `CandidateRankingModel`. The setting is chosen on a fifth of the reserved users, and then fitted to all of
them.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from catboost import CatBoostRanker
from lightgbm import LGBMRanker
from rectools.dataset import Dataset
from rectools.model_selection import Splitter
from rectools.models.base import ModelBase
from rectools.models.ranking import (
    CandidateFeatureCollector,
    CandidateGenerator,
    CandidateRankingModel,
    CatBoostReranker,
    PerUserNegativeSampler,
    Reranker,
)
from rectools.models.ranking.candidate_ranking import NegativeSamplerBase

TOP, K = 40, 10
CHUNK = 4000
"""Users per batch."""
FOLDS, ENOUGH = 5, 1000
"""Folds of the reserved users to choose the setting; a single one, if it has enough users."""
LLMREC = {
    "n_estimators": 150,
    "learning_rate": 0.05,
    "num_leaves": 15,
    "min_child_samples": 200,
    "colsample_bytree": 0.5,
    "lambdarank_truncation_level": 20,
}
"""The settings of `llmrec.ensembles.trees`, with its largest number of trees."""
OWN, SHARED = "scores and ranks", "scores, ranks and llmrec's features"


@dataclass(frozen=True)
class Tables:
    """The lists and features of the candidates of some users.

    Attributes:
        lists: The top items of each member: user_id, item_id, score.
        features: One row per candidate: user_id, item_id, and llmrec's features.
    """

    lists: Mapping[str, pd.DataFrame]
    features: pd.DataFrame

    @classmethod
    def read(cls, folder: Path, which: str) -> Tables:
        lists, features = (np.load(folder / f"{kind}-{which}.npz") for kind in ("lists", "features"))
        by_member = {
            str(name): pd.DataFrame({key: lists[f"{key}-{index}"] for key in ("user_id", "item_id", "score")})
            for index, name in enumerate(lists["names"])
        }
        # LightGBM does not allow colons and commas in names.
        columns = [f"llmrec_{index}" for index in range(len(features["names"]))]
        values = pd.DataFrame(features["values"], columns=columns)
        ids = pd.DataFrame({key: features[key] for key in ("user_id", "item_id")})
        return cls(by_member, pd.concat([ids, values], axis=1))


@dataclass(frozen=True)
class Stages:
    """The tables for training the second stage, without held-out items, and for prediction."""

    events: int
    train: Tables
    answer: Tables

    def of(self, dataset: Dataset) -> Tables:
        return self.train if len(dataset.interactions.df) == self.events else self.answer


class StoredLists(ModelBase):
    """A first-stage model that returns stored lists, from which seen items are already filtered."""

    def __init__(self, name: str, stages: Stages) -> None:
        super().__init__()
        self.name, self.stages = name, stages

    def _fit(self, dataset: Dataset) -> None:
        pass

    def recommend(self, users: Any, dataset: Dataset, k: int, filter_viewed: bool, **options: Any) -> pd.DataFrame:
        lists = self.stages.of(dataset).lists[self.name]
        result = lists[lists["user_id"].isin(users)].reset_index(drop=True)
        if options.get("add_rank_col", True):
            result["rank"] = result.groupby("user_id", sort=False).cumcount() + 1
        return result


class HeldOut(Splitter):
    """One fold: the held-out items of the reserved users are the targets of the second stage."""

    n_splits = 1

    def __init__(self, events: int) -> None:
        super().__init__(filter_cold_users=False, filter_cold_items=False, filter_already_seen=False)
        self.events = events

    def _split_without_filter(
        self, interactions: Any, collect_fold_stats: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
        rows = np.arange(len(interactions.df))
        yield rows[: self.events], rows[self.events :], {}


class EveryNegative(NegativeSamplerBase):
    """All candidates that are not targets."""

    def sample_negatives(self, train: pd.DataFrame) -> pd.DataFrame:
        return train


class StoredFeatures(CandidateFeatureCollector):
    """llmrec's features of user-candidate pairs."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages

    def collect_features(self, useritem: pd.DataFrame, dataset: Dataset, fold_info: Any) -> pd.DataFrame:
        features = self.stages.of(dataset).features
        features = features[features["user_id"].isin(useritem["user_id"].unique())]
        return useritem.merge(features, on=["user_id", "item_id"], how="left")


class LightGBMReranker(Reranker):
    """LightGBM's ranker with its groups, as in RecTools' tutorial of two-stage models."""

    def prepare_fit_kwargs(self, candidates_with_target: pd.DataFrame) -> dict[str, Any]:
        ordered = candidates_with_target.sort_values("user_id", kind="stable")
        return super().prepare_fit_kwargs(ordered) | {"group": ordered.groupby("user_id")["item_id"].count().to_numpy()}


MODELS: Mapping[str, Callable[[], Reranker]] = {
    "LightGBM": lambda: LightGBMReranker(LGBMRanker(n_jobs=1, random_state=0, verbose=-1)),
    "LightGBM, llmrec's settings": lambda: LightGBMReranker(LGBMRanker(n_jobs=1, random_state=0, verbose=-1, **LLMREC)),
    "CatBoost": lambda: CatBoostReranker(
        CatBoostRanker(thread_count=1, random_seed=0, verbose=False, allow_writing_files=False)
    ),
}
SAMPLERS: Mapping[str, Callable[[], NegativeSamplerBase]] = {
    "3 negatives": lambda: PerUserNegativeSampler(random_state=0),
    "all negatives": EveryNegative,
}


def build_model(setting: Mapping[str, str], stages: Stages) -> CandidateRankingModel:
    """Return the two-stage model of a setting."""
    return CandidateRankingModel(
        [
            CandidateGenerator(StoredLists(name, stages), TOP, keep_ranks=True, keep_scores=True)
            for name in stages.train.lists
        ],
        HeldOut(stages.events),
        MODELS[setting["model"]](),
        SAMPLERS[setting["sampler"]](),
        StoredFeatures(stages) if setting["features"] == SHARED else None,
    )


def answered(setting: Mapping[str, str], train: Dataset, users: np.ndarray, stages: Stages) -> dict[str, Any]:
    """Fit a setting and return the lists of users, and processor seconds."""
    begin = time.process_time()
    model = build_model(setting, stages).fit(train)
    fitted = time.process_time()
    blocks = [users[start : start + CHUNK] for start in range(0, len(users), CHUNK)]
    lists = pd.concat([model.recommend(block, train, K, filter_viewed=False) for block in blocks], ignore_index=True)
    return {"lists": lists, "fit": fitted - begin, "answer": time.process_time() - fitted}


def dataset(train: pd.DataFrame, targets: pd.DataFrame) -> Dataset:
    frame = pd.concat([train, targets], ignore_index=True).assign(weight=1.0, datetime=pd.Timestamp("2020-01-01"))
    return Dataset.construct(frame)


def ndcg(lists: pd.DataFrame, targets: pd.DataFrame) -> float:
    """Mean NDCG@10 with one relevant item per user; a user without it in the list counts 0."""
    hits = lists.merge(targets, on=["user_id", "item_id"])
    return float((1 / np.log2(hits["rank"] + 1)).sum() / len(targets))


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    events = np.load(folder / "events.npz")
    train, targets = (
        pd.DataFrame({"user_id": events[f"{name}-users"], "item_id": events[f"{name}-items"]})
        for name in ("train", "targets")
    )
    valid, test = (Tables.read(folder, name) for name in ("valid", "test"))
    fold = np.random.default_rng(0).permutation(len(targets)) % FOLDS
    folds = 1 if len(targets) >= FOLDS * ENOUGH else FOLDS
    stages = Stages(len(train), valid, valid)
    trials: list[dict[str, Any]] = []
    for features, sampler, model in itertools.product((OWN, SHARED), SAMPLERS, MODELS):
        setting = {"features": features, "sampler": sampler, "model": model}
        if model == "CatBoost" and sampler == "all negatives":
            continue
        begin, values = time.process_time(), []
        for number in range(folds):
            held, known = targets[fold == number], dataset(train, targets[fold != number])
            values.append(ndcg(answered(setting, known, held["user_id"].to_numpy(), stages)["lists"], held))
        trials.append(setting | {"valid": float(np.mean(values)), "seconds": time.process_time() - begin})
        print(f"{setting} {trials[-1]['valid']:.4f} {trials[-1]['seconds']:.0f} s", flush=True)  # noqa: T201
    stages = Stages(len(train), valid, test)
    users = events["test-users"]
    arrays: dict[str, Any] = {}
    best = []
    for index, features in enumerate((OWN, SHARED)):
        chosen = max((t for t in trials if t["features"] == features), key=lambda t: t["valid"])
        setting = {key: chosen[key] for key in ("features", "sampler", "model")}
        result = answered(setting, dataset(train, targets), users, stages)
        lists = result.pop("lists")
        arrays |= {f"{key}-{index}": lists[key].to_numpy() for key in ("user_id", "item_id", "rank")}
        best.append(setting | {"valid": chosen["valid"], **result})
        print(f"{setting} fitted to all", flush=True)  # noqa: T201
    np.savez(folder / "lists.npz", **arrays)
    library = {name: importlib.metadata.version(name) for name in ("rectools", "lightgbm", "catboost", "pandas")}
    summary = {"versions": library, "choosing_users": int((fold < folds).sum()), "best": best, "trials": trials}
    (folder / "trials.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
