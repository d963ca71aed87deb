"""Three ways to answer with a rating, and three losses of a head, on MovieLens-100K: each over several seeds.

``python -m eval.benchmarks.rating_heads eval/results/rating_heads.json`` (``--seeds 0 1 2``, ``--ways classes``,
``--out FOLDER``, and further ``key=value`` for every recipe) runs the pages ``recipes/movielens-100k/rating-*.yaml``: a
head of one unit (alpha 0), of classes (alpha 1) and of both (alpha .5), and the model that is tuned on the rating's own
token, which is asked for its expectation and for the number that it writes. Seeds are those of training: all runs have
the same requests, and the base model and the baselines are asked once.

Every run has a folder of its own, so that a killed call goes on with the run that it was in. Seeds are averaged by
request before two ways are paired over users.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.durable import write_json
from llmrec.evaluate.compare import Contrast, Standing
from llmrec.evaluate.compare import planned as tested
from llmrec.machine import machine, versions
from llmrec.metrics.significance import over_seeds
from llmrec.metrics.stats import interval
from llmrec.pipeline.run import run
from llmrec.recipe.load import load_recipe, recipe_hash

PAGES = "recipes/movielens-100k/rating-{}.yaml"
WAYS = ("head", "both", "classes", "tokens")
"""Pages by their names, which the names of their tuned rows begin with; the last one's first run asks the base too."""
METRICS = ("RMSE", "MAE", "LikedAUC")
CONTROLS = ("user-mean", "user-item-bias")
RESAMPLES = 10_000


@dataclass(frozen=True)
class Answered:
    """One row of one seed: figures, and the squared error of every request with its user."""

    name: str
    seed: int
    figures: Mapping[str, Any]
    requests: tuple[str, ...]
    users: tuple[str, ...]
    errors: NDArray[np.float64]


def answered(way: str, seed: int, folder: Path) -> list[Answered]:
    """Read the finished rows of a run."""
    found = []
    for file in sorted((folder / "rows").glob("rating.*.json")):
        row = json.loads(file.read_text(encoding="utf-8"))
        arm, predictor = row["figures"]["arm"], row["figures"]["predictor"]
        name = {"baseline": predictor, "zero-shot": f"zero-shot {predictor}"}.get(arm, f"{way} {predictor}")
        found.append(
            Answered(
                name=name,
                seed=seed,
                figures=row["figures"],
                requests=tuple(record["request_id"] for record in row["records"]),
                users=tuple(record["user_id"] for record in row["records"]),
                errors=np.array(row["values"]["RMSE"]),
            )
        )
    return found


def errors(rows: Sequence[Answered], name: str) -> NDArray[np.float64]:
    """Return a row's squared error of each request, averaged over its seeds."""
    found: NDArray[np.float64] = over_seeds([r.errors for r in rows if r.name == name], statistic="root_mean").values
    return found


def summary(rows: Sequence[Answered], name: str) -> dict[str, Any]:
    """Return a row's figures by seed, and its RMSE over seeds with the interval over users."""
    own = [row for row in rows if row.name == name]
    found = over_seeds([row.errors for row in own], statistic="root_mean")
    around = interval(
        found.values, users=own[0].users, resamples=RESAMPLES, seed=0, statistic="root_mean", method="bca", widen=True
    )
    return {
        "name": name,
        "seeds": [row.seed for row in own],
        "requests": len(found.values),
        "users": len(set(own[0].users)),
        "rmse": found.value,
        "low": around.low,
        "high": around.high,
        "sd_over_seeds": found.sd,
        "by_seed": {metric: [row.figures["metrics"][metric]["value"] for row in own] for metric in METRICS},
        "coverage": [row.figures["parse_rate"] for row in own],
        "fallbacks": [row.figures["fallbacks"] for row in own],
        "seconds": [round(row.figures["cost"]["seconds"], 1) for row in own],
    }


def planned(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs to compare: each tuned row with the base model, the controls and the tuned rows after it.

    What the base model is asked by is the same strategy, or for a head, which it lacks, its expectation. What the tuned
    model writes is compared with its own expectation alone.
    """
    tuned = [name for name in names if name.split()[0] in WAYS]
    written = f"{WAYS[-1]} parsed"
    pairs = []
    for place, name in enumerate(tuned):
        zero = f"zero-shot {name.split()[1].replace('head', 'expected')}"
        later = tuned[place + 1 :] if name.endswith("expected") else [n for n in tuned[place + 1 :] if n != written]
        pairs += [(name, other) for other in (zero, *CONTROLS, *later) if other in names]
    return pairs


def compared(rows: Sequence[Answered], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return differences of RMSE over seeds, a less b, all pairs tested as one family."""
    if len({row.requests for row in rows}) > 1:
        raise ValueError("the runs were not asked the same; give all of them the same overrides")
    users = rows[0].users
    each = {name: errors(rows, name) for name in {name for pair in pairs for name in pair}}
    standings = {name: Standing(name, float(np.sqrt(values.mean())), values) for name, values in each.items()}
    contrasts = [Contrast("RMSE", standings[a], standings[b], users) for a, b in pairs]
    return [pair.as_json() for pair in tested(contrasts, resamples=RESAMPLES)]


def main(target: Path, seeds: Sequence[int], ways: Sequence[str], out: Path, overrides: Sequence[str]) -> None:
    """Run what is missing, and write the table after every run, so that it can be read while others go on."""
    rows: list[Answered] = []
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        for way in ways:
            first = seed == seeds[0]
            arms = "[zero-shot, tuned]" if first and way == ways[-1] else "[tuned]"
            more = [f"train.seed={seed}", f"eval.arms={arms}", *overrides]
            recipe = load_recipe(PAGES.format(way), more)
            done = run(recipe, out / f"{way}-{seed}", quiet=True)
            own = answered(way, seed, done.folder)
            # Baselines and the base model are the same in every run.
            known = {row.name for row in rows if row.figures["arm"] != "tuned"}
            rows += [row for row in own if row.name not in known]
            training = done.results["training"]
            runs.append(
                {
                    "way": way,
                    "seed": seed,
                    "recipe_hash": recipe_hash(recipe),
                    "rows": training["rows"],
                    "targets": training["target_tokens"],
                    "tokens": training["tokens"],
                    "train_seconds": round(training["seconds"], 1),
                }
            )
            sys.stdout.write(f"{json.dumps(runs[-1] | {row.name: _rmse(row) for row in own})}\n")
            sys.stdout.flush()
            write_json(target, _result(rows, runs, seeds, overrides))


def _rmse(row: Answered) -> float:
    return round(float(row.figures["metrics"]["RMSE"]["value"]), 4)


def _result(
    rows: Sequence[Answered], runs: Sequence[Mapping[str, Any]], seeds: Sequence[int], overrides: Sequence[str]
) -> dict[str, Any]:
    names = list(dict.fromkeys(row.name for row in rows))
    return {
        "command": " ".join(["python -m eval.benchmarks.rating_heads", *sys.argv[1:]]),
        "what": "RMSE on the last tenth of each user's ratings, by how the model answers and what it is tuned to",
        "seeds": list(seeds),
        "overrides": list(overrides),
        "runs": list(runs),
        "rows": [summary(rows, name) for name in names],
        "comparisons": compared(rows, planned(names)),
        "machine": machine(),
        "versions": versions(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--out", type=Path, default=Path("runs/rating-heads"))
    parser.add_argument("overrides", nargs="*", help="key=value for every recipe")
    given = parser.parse_intermixed_args()
    main(given.target, given.seeds, given.ways, given.out, given.overrides)
