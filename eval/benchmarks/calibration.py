"""Measures the false-positive rate of the significance tests: ``python -m eval.benchmarks.calibration OUT.json``.

There are two tables: single comparisons, and families of planned comparisons with Holm's correction, where a family
counts if any of its comparisons is significant. With ``single`` or ``families`` as a second argument only that table is
computed, and the other one in OUT.json is kept.

Each single comparison draws two variants from the same distribution (A/A) over the same synthetic users, so every
significant difference is a false positive. For a valid test at a level of 5 %, 1,000 comparisons give 5 % +- 1.4 % (two
standard errors). If few users differ, no outcome has a p just below 5 %, and the rate is lower; the attainable rate of
each comparison (`llmrec.metrics.significance.attainable_p_value`) is reported with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.benchmarks.provenance import provenance
from llmrec.baselines.parameters import create_baseline
from llmrec.data.split import request_of
from llmrec.durable import write_json
from llmrec.evaluate.catalogue import evaluate_catalogue
from llmrec.evaluate.compare import Contrast, ModelValues
from llmrec.evaluate.figures import EvalProtocol
from llmrec.metrics.significance import (
    attainable_p_value,
    holm_p_values,
    required_resamples,
    sign_flip_p_value,
    sign_flip_test,
)
from llmrec.metrics.stats import ALPHA, Difference, StatisticName, paired_difference, verdict
from llmrec.pipeline.study import load_split
from llmrec.recipe.load import load_suite
from llmrec.registry import metric_direction
from llmrec.types import Case

COMPARISONS, RESAMPLES, SLACK = 1000, 1999, 0.014
USERS = (30, 1000)
Arm = NDArray[np.float64]


def normal(n: int, rng: np.random.Generator, arms: int = 2) -> list[Arm]:
    """Values without ties, with a component that all variants share."""
    user = rng.normal(size=n)
    return [user + rng.normal(0, 0.5, n) for _ in range(arms)]


def ties(n: int, rng: np.random.Generator, arms: int = 2) -> list[Arm]:
    """Few different values, with many ties."""
    user = rng.integers(0, 3, n)
    return [user + rng.integers(0, 3, n) / 2 for _ in range(arms)]


def hits(n: int, rng: np.random.Generator, arms: int = 2) -> list[Arm]:
    """HR@10: 0 or 1, about 9 % hits."""
    probability = rng.beta(0.4, 4, size=n)
    return [(rng.random(n) < probability).astype(np.float64) for _ in range(arms)]


def ndcg(n: int, rng: np.random.Generator, arms: int = 2) -> list[Arm]:
    """NDCG@10: mostly 0, else one of ten values."""
    probability = rng.beta(0.4, 2, size=n)

    def arm() -> Arm:
        return np.where(rng.random(n) < probability, 1 / np.log2(rng.integers(1, 11, n) + 1), 0.0)

    return [arm() for _ in range(arms)]


def squared_errors(n: int, rng: np.random.Generator, arms: int = 2) -> list[Arm]:
    """Squared errors with a heavy tail, compared as RMSE."""
    user = rng.gamma(1, 1, n)
    return [user * rng.exponential(1, n) for _ in range(arms)]


KINDS: Mapping[str, tuple[Callable[..., list[Arm]], StatisticName]] = {
    "normal": (normal, "mean"),
    "ties": (ties, "mean"),
    "hits": (hits, "mean"),
    "ndcg": (ndcg, "mean"),
    "squared errors": (squared_errors, "root_mean"),
}


def calibrate(kind: str, users: int, *, comparisons: int, resamples: int, bootstraps: bool = True) -> dict[str, Any]:
    """Compare equal variants and count significant differences.

    Args:
        kind: Key of `KINDS`.
        users: Users per comparison.
        comparisons: Number of comparisons.
        resamples: Resamples per comparison.
        bootstraps: Whether to include bootstrap intervals, which no verdict uses.

    Returns:
        Rates of false positives; ``attainable`` is the mean maximum rate of an exact test.
    """
    make, statistic = KINDS[kind]
    rng = np.random.default_rng([users, sum(map(ord, kind))])
    wrong = dict.fromkeys(["flip_p", "flip_interval", "verdict"], 0)
    if bootstraps:
        wrong |= dict.fromkeys(["bootstrap_p", "percentile_interval", "bca_interval"], 0)
    level = 0.0
    for trial in range(comparisons):
        a, b = make(users, rng)
        test = sign_flip_test(a, b, resamples=resamples, seed=trial, statistic=statistic).at()
        level += attainable_p_value(a - b)
        wrong["flip_p"] += test.p <= 0.05
        wrong["flip_interval"] += not test.low <= 0 <= test.high
        wrong["verdict"] += verdict(test) != "not shown"
        if bootstraps:
            plain = paired_difference(a, b, resamples=resamples, seed=trial, statistic=statistic)
            skewed = paired_difference(a, b, resamples=resamples, seed=trial, statistic=statistic, method="bca")
            wrong["bootstrap_p"] += plain.p <= 0.05
            wrong["percentile_interval"] += not plain.low <= 0 <= plain.high
            wrong["bca_interval"] += not skewed.low <= 0 <= skewed.high
    rates = {name: count / comparisons for name, count in wrong.items()}
    return {"kind": kind, "users": users, "statistic": statistic, "attainable": level / comparisons, **rates}


def keeps(row: Mapping[str, Any], slack: float = SLACK) -> bool:
    """Return whether p and interval are within the tolerance: at least the attainable rate, at most 5 %."""
    low, high = min(0.05, row["attainable"]) - slack, 0.05 + slack
    return all(low <= row[name] <= high for name in ("flip_p", "flip_interval"))


# --------------------------------------------------------------------------- families of planned comparisons

# The task families of a run: the kind of their values, and the metric.
TASKS: Mapping[str, str] = {"squared errors": "RMSE", "ndcg": "NDCG@10", "normal": "ROUGE-L"}
CONTROLS = 4
MODELS: Mapping[str, Mapping[str, float]] = {
    "als": {"factors": 64, "alpha": 5.0},
    "bpr": {"regularization": 0.0003, "decay": 0.8},
}
"""Models whose seeds 0 and 1 are compared on MovieLens-100K, with the parameters that the suite chose on validation."""
REAL = ("NDCG@10", "HR@10")
Values = Mapping[tuple[str, str], tuple[Arm, Arm]]
"""Values by user of two seeds, by model and treatment of the history."""


def run_like(n: int, controls: int, rng: np.random.Generator) -> list[Contrast]:
    """Return the planned comparisons of a run without any effects.

    Each family has a fine-tuned model, which is compared with the zero-shot one and with the best baseline. With one
    baseline all comparisons are true nulls. With several, the best is chosen on the values with which it is compared.
    """
    contrasts = []
    for kind, metric in TASKS.items():
        tuned, untuned, *others = KINDS[kind][0](n, rng, 2 + controls)
        best = (min if metric == "RMSE" else max)(others, key=lambda arm: float(arm.mean()))
        users = [str(user) for user in range(n)]
        a, b, c = (
            ModelValues(name, 0.0, arm) for name, arm in (("tuned", tuned), ("untuned", untuned), ("best", best))
        )
        contrasts += [Contrast(metric, a, b, users), Contrast(metric, a, c, users)]
    return contrasts


def real_values() -> dict[str, Values]:
    """Fit each of `MODELS` with two seeds and return its values by user, by metric."""
    suite = load_suite("eval/suites/ml-100k.yaml")
    data = load_split(suite.data, 0)
    cases = [
        Case(request=request_of(data, held, "test", item=None), truth=held.item_id) for held in data.holdouts("test")
    ]
    protocol = EvalProtocol(
        split=f"{data.kind}/test", candidates="full", cutoffs=suite.cutoffs, resamples=10, seed=0,
        catalogue=len(data.dataset.items),
    )  # fmt: skip
    by_metric: dict[str, dict[tuple[str, str], tuple[Arm, Arm]]] = {metric: {} for metric in REAL}
    for name, parameters in MODELS.items():
        seeds = []
        for seed in (0, 1):
            model = create_baseline(name, parameters, seed=seed)
            model.fit(data)
            seeds.append(evaluate_catalogue(model, cases, protocol))
        for metric in REAL:
            for seen in seeds[0]:
                one, two = (np.asarray(result[seen].values[metric]) for result in seeds)
                by_metric[metric][name, seen] = (one, two)
    return dict(by_metric)


def swapped(values: Values, metric: str, rng: np.random.Generator) -> list[Contrast]:
    """Draw users with replacement and swap the two values of each user with probability 1/2.

    Two seeds of a model need not be equal: one may be better. After the swap the two variants are exchangeable, a true
    null on real values. The swap is the same for both treatments of the history, since the two rankings of a user by a
    model are similar.
    """
    n = len(next(iter(values.values()))[0])
    drawn = rng.integers(0, n, n)
    users = [str(user) for user in range(n)]
    coins = {name: rng.random(n) < 0.5 for name in MODELS}
    contrasts = []
    for (name, seen), (one, two) in values.items():
        first = np.where(coins[name], one[drawn], two[drawn])
        second = np.where(coins[name], two[drawn], one[drawn])
        a, b = ModelValues(f"{name} {seen} a", 0.0, first), ModelValues(f"{name} {seen} b", 0.0, second)
        contrasts.append(Contrast(metric, a, b, users))
    return contrasts


def familywise(
    draw: Callable[[np.random.Generator], list[Contrast]], *, repetitions: int, resamples: int
) -> dict[str, Any]:
    """Test families without any effect and count those with a significant comparison.

    Args:
        draw: Draws the comparisons of one repetition.
        repetitions: Number of families.
        resamples: Minimum number per comparison; more are drawn if the smallest level of a family needs them.

    Returns:
        The rate, in total and by direction, and the mean maximum rate of exact tests of these values. Verdicts are
        those of `llmrec.evaluate.compare.compare_planned`, which depend on p only; intervals are not computed.
    """
    rng = np.random.default_rng(17)
    wrong = dict.fromkeys(["any", "better", "worse"], 0)
    reached, size = 0.0, 0
    for trial in range(repetitions):
        contrasts = draw(rng)
        size = len(contrasts)
        differences = [contrast.a.values - contrast.b.values for contrast in contrasts]
        adjusted = holm_p_values(
            [
                sign_flip_p_value(values, resamples=required_resamples(resamples, size), seed=trial)
                for values in differences
            ]
        )
        verdicts = {
            verdict(Difference(mean, mean, mean, p), metric_direction(contrast.metric))
            for contrast, mean, p in zip(contrasts, (float(v.mean()) for v in differences), adjusted, strict=True)
        }
        wrong["any"] += bool(verdicts - {"not shown"})
        wrong["better"] += "shown" in verdicts
        wrong["worse"] += "contradicted" in verdicts
        levels = [attainable_p_value(values, alpha=ALPHA / size) for values in differences]
        reached += 1 - float(np.prod([1 - level for level in levels]))
    rates = {name: count / repetitions for name, count in wrong.items()}
    return {"comparisons": size, "attainable": reached / repetitions, **rates}


def families(repetitions: int = COMPARISONS) -> Iterator[dict[str, Any]]:
    """Yield the family-wise error rate of simulated runs, and of two seeds of real models."""
    for users in USERS:
        for controls in (1, CONTROLS):
            rates = familywise(partial(run_like, users, controls), repetitions=repetitions, resamples=RESAMPLES)
            yield {"values": "simulated", "users": users, "controls": controls, **rates}
    for metric, values in real_values().items():
        users = len(next(iter(values.values()))[0])
        rates = familywise(partial(swapped, values, metric), repetitions=repetitions, resamples=RESAMPLES)
        yield {"values": "two seeds of als and of bpr", "metric": metric, "users": users, **rates}


def singles() -> Iterator[dict[str, Any]]:
    """Yield the rates of single comparisons, for every kind with few and many users."""
    for users in USERS:
        for kind in KINDS:
            row = calibrate(kind, users, comparisons=COMPARISONS, resamples=RESAMPLES)
            yield {**row, "keeps_level": keeps(row)}


def main(target: Path, part: str = "") -> None:
    """Compute both tables, or the requested one, and write them."""
    kept = json.loads(target.read_text(encoding="utf-8")) if part else {}
    tables = {"single": ("rows", singles), "families": ("families", families)}
    results: dict[str, Any] = {}
    for name, (key, table) in tables.items():
        if part not in ("", name):
            results[key] = kept[key]
            continue
        results[key] = []
        for row in table():
            results[key].append(row)
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()
    result = {
        "command": "python -m eval.benchmarks.calibration eval/results/calibration.json",
        "what": "share of A/A comparisons called different at a level of 5 %, and of families with any that is",
        "comparisons": COMPARISONS,
        "resamples": RESAMPLES,
        "slack": SLACK,
        **results,
        **provenance(),
    }
    write_json(target, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
