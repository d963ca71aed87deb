"""Compares gradient-boosted trees with the weights of `llmrec.ensembles.blend` for ratings and yes/no answers.

``LLMREC_DATA=folder make bench NAME=rated-trees`` fits the members of the ensemble ``fusion`` of suites with the
parameters in ``eval/results``, one seed. The weights, and trees with the settings of rankings
(`llmrec.ensembles.trees`), are cross-fitted over the validation users for ensemble weights. Trees replace the weights,
or are boosted from their scores. Their features are the members' values, or also features of the item and the history.
They are preferred by the rule of rankings: a gain of more than one standard error on these users. Test users are not
used for any choice.

Members' answers are stored in a folder, so that an interrupted call continues.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import logit

from eval.benchmarks.provenance import provenance
from llmrec.baselines.fits import fitted
from llmrec.baselines.validation import rating_cases
from llmrec.bench.suite import cases_of, tables_of
from llmrec.data.split import SplitDataset, halves, scale_of, threshold
from llmrec.durable import write_json
from llmrec.ensembles.blend import Blend
from llmrec.ensembles.context import Context
from llmrec.ensembles.members import Recalled
from llmrec.ensembles.trees import _OPTIONS, Objective, Setting, cross_fitted
from llmrec.ensembles.weights import folds_of, preferred
from llmrec.errors import require
from llmrec.metrics.stats import StatisticName, paired
from llmrec.pipeline.study import load_split
from llmrec.recipe.comparisons import Suite
from llmrec.recipe.load import load_suite
from llmrec.types import Case, Probability, Rating, Request

_TENTH = "data.split={kind: last_share, valid: 0.1, test: 0.1}"
SETS: Mapping[str, tuple[str, Sequence[str]]] = {
    "MovieLens-100K, last ratings": ("movielens-100k-rating-fusion", ()),
    "MovieLens-100K, last tenths": ("movielens-100k-rating-fusion", (_TENTH,)),
    "MovieLens-1M, last ratings": ("ml1m-rating", ()),
    "MovieLens-1M, last tenths": ("ml1m-rating", (_TENTH,)),
    "Musical Instruments, last ratings": ("instruments-rating", ()),
    "MovieLens-100K, yes/no": ("movielens-100k-liked-fusion", ()),
    "MovieLens-100K, yes/no, last tenths": ("movielens-100k-liked-fusion", (_TENTH,)),
    "MovieLens-1M, yes/no": ("ml1m-ctr", ()),
}
"""Suites with changed keys, by name. Members have the parameters that the suites chose on their splits."""
_RESAMPLES = 2000
_SURE = 1e-6


@dataclass(frozen=True)
class Answers:
    """The cases of a split with the members' answers and further features, one row per case."""

    users: list[str]
    truth: NDArray[np.float64]
    members: NDArray[np.float64]
    context: NDArray[np.float64]

    @property
    def features(self) -> NDArray[np.float32]:
        """Answers and features, shape (n, f)."""
        return np.column_stack([self.members, self.context]).astype(np.float32)


def _context(data: SplitDataset, requests: Sequence[Request]) -> NDArray[np.float64]:
    """Return the context of rankings, statistics of the item's and the user's ratings, and the age of the history."""
    context = Context(data)
    codes = context.codes([str(request.item) for request in requests])
    columns = list(context.features(requests, np.arange(len(requests)), codes).values())
    rated = data.train.drop_nulls("rating").with_columns(pl.col("item_id").cast(pl.String))
    of_items = rated.group_by("item_id").agg(mean=pl.col("rating").mean(), spread=pl.col("rating").std())
    known = {item: values for item, *values in of_items.iter_rows()}
    of_item = np.array([known.get(str(request.item), (None, None)) for request in requests], dtype=np.float64)
    histories = [[event.rating for event in request.history if event.rating is not None] for request in requests]
    of_user = np.array([(np.mean(h), np.std(h), np.mean(h[-5:])) if h else (np.nan,) * 3 for h in histories])
    last = np.array([request.history[-1].timestamp if request.history else None for request in requests], dtype=float)
    first, end = (
        float(value) for value in data.train.select(pl.col("timestamp").min(), end=pl.col("timestamp").max()).row(0)
    )
    return np.column_stack([*columns, of_item, of_user, (end - last) / (end - first)])


def answers(suite: Suite, chosen: Mapping[str, Mapping[str, Any]], file: Path) -> tuple[Answers, Answers]:
    """Return the answers for the validation users for ensemble weights, and for test users."""
    if not file.is_file():
        begin = time.process_time()
        data = load_split(suite.data, suite.split_seeds[0])
        choosing, weighing = halves(data, suite.reserved)
        cases = {"weighing": rating_cases(weighing), "test": cases_of(suite, data)}
        if suite.task == "ctr":
            least = threshold(scale_of(data), suite.liked)
            cases["weighing"] = [replace(case, truth=float(float(case.truth) >= least)) for case in cases["weighing"]]
        (row,) = (row for row in suite.rows if row.label == "fusion")
        rows = {other.label: str(other.baseline) for other in suite.rows}
        members = [fitted(rows[label], chosen[label], choosing, seed=suite.seeds[0]) for label in row.fuse]
        arrays: dict[str, Any] = {}
        for split, known in cases.items():
            requests = [case.request for case in known]
            values = [[answer.value for answer in member.answer(requests)] for member in members]
            arrays[f"{split} users"] = np.array([request.user_id for request in requests])
            arrays[f"{split} truth"] = np.array([float(case.truth) for case in known])
            arrays[f"{split} members"] = np.array(values).T
            arrays[f"{split} context"] = _context(data, requests)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, **arrays, seconds=time.process_time() - begin)
    with np.load(file) as stored:
        first, second = (
            Answers(
                stored[f"{split} users"].tolist(),
                *(stored[f"{split} {key}"] for key in ("truth", "members", "context")),
            )
            for split in ("weighing", "test")
        )
    return first, second


def _blend(known: Answers, *, judges: bool) -> Blend:
    """Return the blend of the members."""
    answer = Probability if judges else Rating
    ids = [str(row) for row in range(len(known.users))]
    members = [
        (
            str(place),
            Recalled(
                str(place),
                "events",
                "logits",
                {i: answer(request_id=i, value=v) for i, v in zip(ids, values.tolist(), strict=True)},
            ),
        )
        for place, values in enumerate(known.members.T)
    ]
    requests = [Request(id=i, user_id=user, history=()) for i, user in zip(ids, known.users, strict=True)]
    cases = [Case(request=request, truth=truth) for request, truth in zip(requests, known.truth.tolist(), strict=True)]
    result = Blend("fusion", members, judges=judges)
    result.fit(cases)
    return result


class Comparison:
    """The errors of weights and of trees on one data set, lower is better: squared errors, or log-losses.

    Args:
        known: The answers for the validation users for ensemble weights.
        test: The answers for test users.
        judges: Whether the answers are probabilities.
    """

    def __init__(self, known: Answers, test: Answers, *, judges: bool) -> None:
        self._blend, self._folds = _blend(known, judges=judges), folds_of("fusion", known.users)
        if judges:
            known, test = (replace(e, members=logit(np.clip(e.members, _SURE, 1 - _SURE))) for e in (known, test))
        self._known, self._test, self._judges = known, test, judges
        self._crossed = np.empty(len(known.truth))
        for fold in np.unique(self._folds):
            outside = self._folds == fold
            self._crossed[outside] = self._weighed(~outside, known.members[outside])
        self._every = np.ones(len(known.truth), dtype=bool)
        self._tested = self._weighed(self._every, test.members)

    def _weighed(self, inside: NDArray[np.bool_], members: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the scores of weights fitted to some of the cases."""
        gone = np.array(self._known.users)[~inside].tolist()
        return self._blend.line_apart_from(frozenset(gone)).of(members)

    def _errors(self, scores: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
        if self._judges:
            return np.asarray(np.logaddexp(0, scores) - truth * scores)
        return np.asarray((np.clip(scores, self._known.truth.min(), self._known.truth.max()) - truth) ** 2)

    def _figure(self, errors: NDArray[np.float64]) -> float:
        return float(errors.mean() if self._judges else errors.mean() ** 0.5)

    def _less(self, a: NDArray[np.float64], b: NDArray[np.float64], users: Sequence[str]) -> dict[str, float]:
        """Return the metric of errors ``a``, and its difference to that of ``b`` with its interval over users."""
        statistic: StatisticName = "mean" if self._judges else "root_mean"
        pair = paired(a, b, resamples=_RESAMPLES, seed=0, users=users, statistic=statistic)
        return {"value": self._figure(a), "difference": pair.value, "low": pair.low, "high": pair.high}

    def trees(self, *, context: bool, boosted: bool) -> dict[str, Any]:
        """Return the results of trees.

        Args:
            context: Whether to include the further features.
            boosted: Whether to boost from the scores of the weights.
        """
        known, test = self._known, self._test
        features, others = ((e.features if context else e.members.astype(np.float32)) for e in (known, test))

        def fit_to(inside: NDArray[np.bool_], setting: Setting) -> Any:
            start = self._weighed(inside, known.members[inside]) if boosted else None
            least = min(_OPTIONS["min_data_in_leaf"], max(1, int(inside.sum()) // 50))
            options = {**_OPTIONS, "objective": setting.objective, "min_data_in_leaf": least, "num_threads": 1}
            lightgbm = require("lightgbm", "ranker")
            rows = lightgbm.Dataset(features[inside], known.truth[inside], init_score=start)
            return lightgbm.train(options, rows, setting.rounds)

        def gained(scores: NDArray[np.float64]) -> NDArray[np.float64]:
            return -self._errors(scores + self._crossed if boosted else scores, known.truth)

        objective: Objective = "binary" if self._judges else "regression"
        rows = np.arange(len(known.truth))
        setting, values = cross_fitted((objective,), fit_to, features, rows, self._folds, gained)
        weights = self._errors(self._crossed, known.truth)
        gains = weights + values
        _, clusters = np.unique(np.array(known.users), return_inverse=True)
        sums = np.bincount(clusters, weights=gains - gains.mean())
        scores = fit_to(self._every, setting).predict(others, raw_score=True)
        tested = self._errors(scores + self._tested if boosted else scores, test.truth)
        return {
            "features": "members and context" if context else "members",
            "start": "weights" if boosted else "nothing",
            "trees": setting.rounds,
            "standard_errors": float(gains.sum() / np.sqrt((sums**2).sum())),
            "preferred": preferred({"weights": -weights, "trees": values}, "trees", known.users) == "trees",
            "validation": self._less(-values, weights, known.users),
            "test": self._less(tested, self._errors(self._tested, test.truth), test.users),
        }

    def measured(self) -> dict[str, Any]:
        """Return all results."""
        known, test = self._known, self._test
        return {
            "metric": "LogLoss" if self._judges else "RMSE",
            "cases": len(known.truth),
            "users": len(set(known.users)),
            "test_cases": len(test.truth),
            "test_users": len(set(test.users)),
            "weights": {
                "form": self._blend.fitted.form,
                "validation": self._figure(self._errors(self._crossed, known.truth)),
                "test": self._figure(self._errors(self._tested, test.truth)),
            },
            "trees": [self.trees(context=c, boosted=b) for c in (False, True) for b in (False, True)],
        }


def main(target: Path, out: Path) -> None:
    """Measure and write."""
    rows: list[dict[str, Any]] = []
    for name, (page, overrides) in SETS.items():
        suite = load_suite(f"eval/suites/{page}.yaml", overrides)
        (table,) = tables_of(suite)
        earlier = json.loads(Path(f"eval/results/{page}.json").read_text(encoding="utf-8"))
        chosen = {row["name"]: row["tables"][table]["parameters"] for row in earlier["rows"] if table in row["tables"]}
        file, begin = out / f"{len(rows)}-{page}.npz", time.process_time()
        known, test = answers(suite, chosen, file)
        measured = Comparison(known, test, judges=suite.task == "ctr").measured()
        with np.load(file) as stored:
            seconds = float(stored["seconds"])
        rows.append(
            {
                "data": name,
                "suite": page,
                "overrides": list(overrides),
                **measured,
                "seconds": round(seconds + time.process_time() - begin, 1),
            }
        )
        sys.stdout.write(f"{json.dumps(rows[-1])}\n")
    result = {
        "command": "LLMREC_DATA=folder make bench NAME=rated-trees",
        "what": "Error of trees that combine ratings or yes/no answers less that of weights, cross-fitted and on test",
        "seeds": [0],
        "rows": rows,
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        **provenance(),
    }
    write_json(target, result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/rated-trees"))
    given = parser.parse_args()
    main(given.target, given.out)
