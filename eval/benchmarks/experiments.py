"""Generates ``eval/EXPERIMENTS.md``: users, seeds and hours of every committed result on quality.

An experiment with fewer than 200 users or 3 seeds is exploratory: no claim is based on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec.chat.opening import MANAGERS
from llmrec.errors import DataError
from llmrec.report.escape import code
from llmrec.report.table import grid
from llmrec.report.wording import DASH, SEEDS, USERS

_HEAD = f"""# Experiments

Written by `make figures` from `eval/results/`, whose files hold command and machine; hours are those of two CPU cores.
\\* exploratory: fewer than {USERS} users, or fewer than {SEEDS} seeds of the rows that learn with randomness.
"""


@dataclass(frozen=True)
class Experiment:
    """One line of the page.

    Attributes:
        result: Name of the file in ``eval/results``.
        cases: Number of users.
        seeds: Minimum number of seeds of the models with seeds; 0 if there are none.
        most: Maximum number of seeds.
        hours: Duration.
    """

    result: str
    cases: int
    seeds: int
    most: int
    hours: float

    @property
    def exploratory(self) -> bool:
        """Whether it is too small for a claim (users or seeds)."""
        return self.cases < USERS or 0 < self.most < SEEDS


def read(results: Path) -> list[Experiment]:
    """Return the experiments of a folder: results of models, and results of scripts with users and seeds.

    Raises:
        DataError: If a result lacks users, seeds or seconds.
    """
    found = []
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        kind = result.get("kind") or ("run" if "headline" in result else "script")
        if kind in _READERS and (kind != "script" or ("users" in result and {"seeds", "hours"} & result.keys())):
            found.append(_experiment(result, _READERS[kind], path))
    return found


def write(experiments: Sequence[Experiment]) -> str:
    """Return the page."""
    rows = [
        [
            code(item.result) + (r" \*" if item.exploratory else ""),
            f"{item.cases:,}",
            f"{item.seeds} to {item.most}" if item.seeds < item.most else str(item.seeds or DASH),
            f"{item.hours:.2f}",
        ]
        for item in experiments
    ]
    return "\n".join([_HEAD, grid(["experiment", "users", "seeds", "hours"], rows), ""])


_Reader = Callable[[Mapping[str, Any]], tuple[int, int, float]]


def _experiment(result: Mapping[str, Any], reader: _Reader, path: Path) -> Experiment:
    try:
        cases, seeds, seconds = reader(result)
        most = max(seeds, _most(result) if result.get("kind") == "suite" else seeds)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        what = f"{path} lacks users, seeds or seconds ({error!r})"
        raise DataError(what, kind="missing-key", at=path) from None
    return Experiment(path.stem, cases, seeds, most, seconds / 3600)


def _suite(result: Mapping[str, Any]) -> tuple[int, int, float]:
    fewer = [row["seeds"] for row in result["rows"] if row.get("fewer_seeds")]
    return result["protocol"]["users"], min([_most(result), *fewer]), result["seconds"]


def _most(result: Mapping[str, Any]) -> int:
    return len(result["protocol"]["seeds"])


def _chat(result: Mapping[str, Any]) -> tuple[int, int, float]:
    """Return the minimum number of users over the language models, or over all models if there are none."""
    rows = [row["dialogues"] for row in result["rows"]]
    users = [row["users"] for row in rows]
    models = [row["users"] for row in rows if row["manager"] not in MANAGERS or row.get("ranker")]
    return min(models or users), _most(result), result["seconds"]


def _benchmark(result: Mapping[str, Any]) -> tuple[int, int, float]:
    """Return the minimum number of users over tables, and of seeds over tuned models."""
    seeds = [row["seeds"] for row in result["rows"] if row["arm"] == "tuned"]
    return min(table["users"] for table in result["tables"]), min(seeds, default=1), result["seconds"]


def _run(result: Mapping[str, Any]) -> tuple[int, int, float]:
    tuned = any(row["arm"] != "baseline" for row in result["rows"])
    return min(row.get("users") or row["n"] for row in result["rows"]), int(tuned), result["seconds"]


def _script(result: Mapping[str, Any]) -> tuple[int, int, float]:
    seconds = result.get("seconds") or result.get("processor_seconds") or result["hours"] * 3600
    return int(result["users"]), len(result.get("seeds", [0])), float(seconds)


_READERS: Mapping[str, _Reader] = {
    "suite": _suite,
    "benchmark": _benchmark,
    "run": _run,
    "chat": _chat,
    "script": _script,
}
