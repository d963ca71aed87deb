"""The page of what was run: every experiment with its users, seeds and hours, and what was cut and why.

``python -m eval.benchmarks.experiments`` writes ``eval/EXPERIMENTS.md`` from ``eval/experiments.yaml``, which names
the results and what was cut, and from the results themselves, which hold everything else. An experiment of fewer than
200 users or 3 seeds is exploratory: nothing is claimed from it. Where some rows alone have fewer, these are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmrec.chat.opening import MANAGERS
from llmrec.durable import write_text
from llmrec.errors import DataError
from llmrec.report.escape import cell, code
from llmrec.report.table import grid
from llmrec.report.wording import DASH, SEEDS, USERS

_HEAD = f"""# Experiments

Written by `make figures` from `eval/experiments.yaml` and `eval/results/`; do not edit. *Seeds* are those of the
rows that learn with any randomness; of a benchmark, of its tuned rows. What has fewer than {USERS} users or
{SEEDS} seeds is exploratory: its figures describe a run, and nothing is claimed from them; *in part*: some rows have
fewer, which their own page marks. Hours are those of two CPU cores.
"""
_COMMANDS = """
## Commands
"""


@dataclass(frozen=True)
class Experiment:
    """One line of the page.

    Attributes:
        result: Name of the file in ``eval/results``.
        command: What made it.
        cases: Number of users, or of what else is counted.
        unit: What is counted.
        seeds: Of the rows that have any, the fewest of any such row; 0 where none has.
        most: Seeds of the other rows.
        hours: Spent.
        cut: What was left out, and why.
    """

    result: str
    command: str
    cases: int
    unit: str
    seeds: int
    most: int
    hours: float
    cut: str

    @property
    def standing(self) -> str:
        """Whether it, or some of its rows, are too small for a claim."""
        if self.cases < USERS or 0 < self.most < SEEDS:
            return "exploratory"
        return "in part" if 0 < self.seeds < SEEDS else ""


def read(page: Path, results: Path) -> list[Experiment]:
    """Return the experiments that a page names, in its order.

    Raises:
        DataError: If a result is missing, or does not hold what its line needs.
    """
    found = []
    for entry in yaml.safe_load(page.read_text(encoding="utf-8")):
        path = results / f"{entry['result']}.json"
        if not path.is_file():
            raise DataError(
                f"{page}: there is no result {path}; run it, or drop its line", kind="missing-file", at=path
            )
        found.append(_experiment(entry, json.loads(path.read_text(encoding="utf-8")), path))
    return found


def write(experiments: Sequence[Experiment]) -> str:
    """Return the page."""
    rows = [
        [
            code(each.result),
            f"{each.cases:,} {cell(each.unit)}",
            f"{each.seeds} to {each.most}" if each.seeds < each.most else str(each.seeds or DASH),
            f"{each.hours:.2f}",
            each.standing,
            cell(each.cut),
        ]
        for each in experiments
    ]
    header = ["experiment", "cases", "seeds", "hours", "standing", "cut, and why"]
    commands = [[code(each.result), _command(each.command)] for each in experiments]
    shown = [grid(header, rows, numeric_to=4), _COMMANDS, grid(["experiment", "command"], commands, numeric_from=2)]
    return "\n".join([_HEAD, *shown, ""])


def _command(text: str) -> str:
    """Return a command as a code span: brackets are common in it."""
    return cell(text) if set(text) & set("`|\n") else f"`{text}`"


def _experiment(entry: Mapping[str, str], result: Mapping[str, Any], path: Path) -> Experiment:
    kind = str(result.get("kind") or ("run" if "recipe_hash" in result and "headline" in result else "script"))
    try:
        cases, seeds, seconds = _READERS[kind](result)
        cases = int(_at(result, entry["cases"])) if "cases" in entry else cases
        seconds = float(_at(result, entry["seconds"])) if "seconds" in entry else seconds
        # A run says nothing of how often its networks were trained.
        seeds = int(entry.get("seeds", seeds))
        most = max(seeds, _most(result) if kind == "suite" else seeds)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        what = f"{path} does not say its cases, seeds and seconds ({error!r})"
        raise DataError(what, kind="missing-key", at=path) from None
    command = str(entry.get("command") or result["command"])
    return Experiment(path.stem, command, cases, entry.get("unit", "users"), seeds, most, seconds / 3600, entry["cut"])


def _suite(result: Mapping[str, Any]) -> tuple[int, int, float]:
    fewer = [row["seeds"] for row in result["rows"] if row.get("fewer_seeds")]
    return result["protocol"]["users"], min([_most(result), *fewer]), result["seconds"]


def _most(result: Mapping[str, Any]) -> int:
    return len(result["protocol"]["seeds"])


def _chat(result: Mapping[str, Any]) -> tuple[int, int, float]:
    """Return the fewest users of a row with a language model, if there is one, else of any."""
    rows = [row["dialogues"] for row in result["rows"]]
    users = [row["users"] for row in rows]
    models = [row["users"] for row in rows if row["manager"] not in MANAGERS or row.get("ranker")]
    return min(models or users), _most(result), result["seconds"]


def _benchmark(result: Mapping[str, Any]) -> tuple[int, int, float]:
    """Return the smallest table's users and the smallest number of seeds of a tuned row."""
    seeds = [row["seeds"] for row in result["rows"] if row["arm"] == "tuned"]
    return min(table["users"] for table in result["tables"]), min(seeds, default=1), result["seconds"]


def _run(result: Mapping[str, Any]) -> tuple[int, int, float]:
    tuned = any(row["arm"] != "baseline" for row in result["rows"])
    return min(row.get("users") or row["n"] for row in result["rows"]), int(tuned), result["seconds"]


def _script(result: Mapping[str, Any]) -> tuple[int, int, float]:
    """Return what scripts over recipes write: rows with users, a list of seeds, runs with seconds of training."""
    rows, runs = result.get("rows") or [{}], result.get("runs") or [result]
    users = rows[0].get("users", 0) if isinstance(rows, list) else 0
    seconds = sum(float(run.get("train_seconds") or run.get("seconds") or 0.0) for run in runs)
    return users, len(result.get("seeds", [0])), seconds


def _campaign(result: Mapping[str, Any]) -> tuple[int, int, float]:
    """Return the number of inputs or cases; nothing is learned from them."""
    return result["all"]["tried"], 0, result["seconds"]


_READERS = {
    "suite": _suite,
    "benchmark": _benchmark,
    "run": _run,
    "script": _script,
    "chat": _chat,
    "campaign": _campaign,
    "faults": _campaign,
}


def _at(result: Any, pointer: str) -> Any:
    for key in pointer.split("."):
        result = result[int(key) if isinstance(result, list) else key]
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.experiments")
    parser.add_argument("--folder", type=Path, default=Path("eval"))
    folder = parser.parse_args(arguments).folder
    write_text(folder / "EXPERIMENTS.md", write(read(folder / "experiments.yaml", folder / "results")))


if __name__ == "__main__":
    main()
