"""How often do the tests call two equal arms different? ``python -m eval.benchmarks.calibration OUT.json``.

Each comparison draws two arms from one distribution (A/A) over the same made users, so every difference that is
called real is a false positive. At a level of 5 %, 1,000 comparisons give 5 % +- 1.4 % (two standard errors) for a test
that keeps its level. Where few users differ, no outcome has a p just below 5 %, and a valid test stays below the level;
by how much is known for each comparison (`llmrec.metrics.significance.attainable`) and stands beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.durable import write_json
from llmrec.machine import machine, versions
from llmrec.metrics.significance import attainable, signflip
from llmrec.metrics.stats import StatisticName, paired, verdict

COMPARISONS, RESAMPLES, SLACK = 1000, 1999, 0.014
USERS = (30, 1000)
Arm = NDArray[np.float64]


def normal(n: int, rng: np.random.Generator) -> tuple[Arm, Arm]:
    """Values that never tie, with a part that both arms share."""
    user = rng.normal(size=n)
    return user + rng.normal(0, 0.5, n), user + rng.normal(0, 0.5, n)


def ties(n: int, rng: np.random.Generator) -> tuple[Arm, Arm]:
    """Few different values, so that many users tie."""
    user = rng.integers(0, 3, n)
    return user + rng.integers(0, 3, n) / 2, user + rng.integers(0, 3, n) / 2


def hits(n: int, rng: np.random.Generator) -> tuple[Arm, Arm]:
    """HR@10: 0 or 1, about 9 % hits."""
    chance = rng.beta(0.4, 4, size=n)
    return (rng.random(n) < chance).astype(np.float64), (rng.random(n) < chance).astype(np.float64)


def ndcg(n: int, rng: np.random.Generator) -> tuple[Arm, Arm]:
    """NDCG@10: mostly 0, else one of ten values."""
    chance = rng.beta(0.4, 2, size=n)

    def arm() -> Arm:
        return np.where(rng.random(n) < chance, 1 / np.log2(rng.integers(1, 11, n) + 1), 0.0)

    return arm(), arm()


def squared_errors(n: int, rng: np.random.Generator) -> tuple[Arm, Arm]:
    """Squared errors with a heavy tail, compared as RMSE."""
    user = rng.gamma(1, 1, n)
    return user * rng.exponential(1, n), user * rng.exponential(1, n)


KINDS: Mapping[str, tuple[Callable[[int, np.random.Generator], tuple[Arm, Arm]], StatisticName]] = {
    "normal": (normal, "mean"),
    "ties": (ties, "mean"),
    "hits": (hits, "mean"),
    "ndcg": (ndcg, "mean"),
    "squared errors": (squared_errors, "root_mean"),
}


def calibrate(kind: str, users: int, *, comparisons: int, resamples: int, bootstraps: bool = True) -> dict[str, Any]:
    """Compare equal arms and count what is called different.

    Args:
        kind: Key of `KINDS`.
        users: Users a comparison.
        comparisons: Number of comparisons.
        resamples: Resamples of each.
        bootstraps: Whether to count bootstrap intervals too, which no verdict uses.

    Returns:
        Rates of false positives; ``attainable`` is what an exact test can reach at most, on average.
    """
    make, statistic = KINDS[kind]
    rng = np.random.default_rng([users, sum(map(ord, kind))])
    wrong = dict.fromkeys(["flip_p", "flip_interval", "verdict"], 0)
    if bootstraps:
        wrong |= dict.fromkeys(["bootstrap_p", "percentile_interval", "bca_interval"], 0)
    level = 0.0
    for trial in range(comparisons):
        a, b = make(users, rng)
        found = signflip(a, b, resamples=resamples, seed=trial, statistic=statistic)
        level += attainable(a - b)
        wrong["flip_p"] += found.p <= 0.05
        wrong["flip_interval"] += not found.low <= 0 <= found.high
        wrong["verdict"] += verdict(found) != "not shown"
        if bootstraps:
            plain = paired(a, b, resamples=resamples, seed=trial, statistic=statistic)
            skewed = paired(a, b, resamples=resamples, seed=trial, statistic=statistic, method="bca")
            wrong["bootstrap_p"] += plain.p <= 0.05
            wrong["percentile_interval"] += not plain.low <= 0 <= plain.high
            wrong["bca_interval"] += not skewed.low <= 0 <= skewed.high
    rates = {name: count / comparisons for name, count in wrong.items()}
    return {"kind": kind, "users": users, "statistic": statistic, "attainable": level / comparisons, **rates}


def keeps(row: Mapping[str, Any], slack: float = SLACK) -> bool:
    """Say whether p and interval are within the slack of what they should be: attainable below, 5 % above."""
    low, high = min(0.05, row["attainable"]) - slack, 0.05 + slack
    return all(low <= row[name] <= high for name in ("flip_p", "flip_interval"))


def main(target: Path) -> None:
    """Calibrate every kind with few and many users, and write the table."""
    rows = []
    for users in USERS:
        for kind in KINDS:
            row = calibrate(kind, users, comparisons=COMPARISONS, resamples=RESAMPLES)
            row["keeps_level"] = keeps(row)
            rows.append(row)
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()
    result = {
        "command": "python -m eval.benchmarks.calibration eval/results/calibration.json",
        "what": "share of A/A comparisons that are called different at a level of 5 %",
        "comparisons": COMPARISONS,
        "resamples": RESAMPLES,
        "slack": SLACK,
        "rows": rows,
        "machine": machine(),
        "versions": versions(),
    }
    write_json(target, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
