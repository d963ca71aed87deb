"""Generates ``eval/NEGATIVE_RESULTS.md``, the ideas that did not help.

``eval/negative_results.yaml`` lists the ideas with pointers to comparisons in ``eval/results``, which have the values,
intervals and verdicts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any

import yaml

from eval.benchmarks.figures.pointers import Results
from llmrec.chat.opening import MANAGERS
from llmrec.registry import is_lower_better
from llmrec.report.table import markdown_table
from llmrec.report.wording import SEEDS, USERS, format_verdict

SOURCE = "eval/negative_results.yaml"
PAGE = "eval/NEGATIVE_RESULTS.md"
_HEAD = f"""# Negative results

The table lists ideas that did not help on at least one data set. `make figures` writes it from
`{SOURCE}` and `eval/results/`.

- The column *effect* is the difference A − B of the *compared* models on the same users, with its interval. Planned
  comparisons are Holm-corrected, and their intervals exclude 0 exactly if p is at most .05. Other comparisons have an
  unadjusted 95 % interval and are *not tested*.
- *No significant difference* does not mean that both models are equal.
- \\* marks exploratory results with fewer than {USERS} users or fewer than {SEEDS} training seeds.
- The language model is SmolLM2-135M-Instruct unless the table names another model.
  [Statistics](../docs/evaluation-protocol-and-metrics.md#statistics) explains the tests.
"""


@dataclass(frozen=True)
class Tested:
    """One comparison of an idea.

    Attributes:
        data: The data set, and the subset of its cases.
        compared: The two models.
        at: Pointer to the comparison.
        metric: Its metric, if the comparison does not name it.
        exploratory: Whether it has one training seed, if the result does not record that.
    """

    data: str
    compared: str
    at: str
    metric: str = ""
    exploratory: bool = False


def write(root: Path) -> str:
    """Return the page.

    Raises:
        PointerError: If a pointer does not lead to a comparison.
    """
    results = Results(root)
    small = exploratory(root / "eval" / "results")
    rows = []
    for idea in yaml.safe_load((root / SOURCE).read_text(encoding="utf-8")):
        for entry in idea["tested"]:
            tested = Tested(**entry)
            file = tested.at.partition(":")[0]
            pair = results.entry(tested.at)
            metric = tested.metric or pair.get("metric", "")
            star = r" \*" if tested.exploratory or file in small else ""
            cells = [tested.data, tested.compared, metric, _effect(pair), f"{_verdict(pair, metric)}{star}"]
            rows.append([idea["idea"], *cells, _link(root, file)])
    header = ["idea", "data", "compared", "metric", "effect", "verdict", "result"]
    return "\n".join([_HEAD, markdown_table(header, rows, len(header)), ""])


def _effect(pair: dict[str, Any]) -> str:
    digits = 3 if pair.get("metric") == "RMSE" or abs(pair["value"]) >= 0.1 else 4
    value, low, high = (_signed(pair[key], digits) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _signed(value: float, decimals: int) -> str:
    rounded = Decimal(str(value)).quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_HALF_EVEN)
    digits = str(abs(rounded)).removeprefix("0") if abs(rounded) < 1 else str(abs(rounded))
    sign = "−" if rounded < 0 else "+" if rounded > 0 else ""
    return f"{sign}{digits}"


def _verdict(pair: dict[str, Any], metric: str) -> str:
    if pair.get("verdict"):
        return format_verdict(pair["verdict"])
    if pair.get("p") is None:
        return "not tested"
    if pair["p"] > 0.05:
        return format_verdict("not shown")
    return format_verdict("shown" if (pair["value"] < 0) == is_lower_better(metric) else "contradicted")


def _link(root: Path, name: str) -> str:
    page = f"{name}.md"
    return f"[{name}]({page})" if (root / "eval" / page).exists() else f"[{name}](results/{name}.json)"


def exploratory(results: Path) -> set[str]:
    """Return the names of the results with fewer than 200 users, or fewer than 3 training seeds of all models."""
    names = set()
    for path in results.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        kind = result.get("kind") or ("run" if "headline" in result else "script")
        # Scripts without users measure time, tests or texts.
        if kind in _SIZES and (kind != "script" or ("users" in result and {"seeds", "hours"} & result.keys())):
            users, seeds = _SIZES[kind](result)
            if users < USERS or 0 < seeds < SEEDS:
                names.add(path.stem)
    return names


def _suite(result: Mapping[str, Any]) -> tuple[int, int]:
    return result["protocol"]["users"], len(result["protocol"]["seeds"])


def _chat(result: Mapping[str, Any]) -> tuple[int, int]:
    """Return the minimum number of users over the language models, or over all models if there are none."""
    rows = [row["dialogues"] for row in result["rows"]]
    models = [row["users"] for row in rows if row["manager"] not in MANAGERS or row.get("ranker")]
    return min(models or [row["users"] for row in rows]), len(result["protocol"]["seeds"])


def _benchmark(result: Mapping[str, Any]) -> tuple[int, int]:
    seeds = [row["seeds"] for row in result["rows"] if row["arm"] == "tuned"]
    return min(table["users"] for table in result["tables"]), min(seeds, default=1)


def _run(result: Mapping[str, Any]) -> tuple[int, int]:
    tuned = any(row["arm"] != "baseline" for row in result["rows"])
    return min(row.get("users") or row["n"] for row in result["rows"]), int(tuned)


_SIZES = {
    "suite": _suite,
    "benchmark": _benchmark,
    "run": _run,
    "chat": _chat,
    "script": lambda result: (int(result["users"]), len(result.get("seeds", [0]))),
}
"""Functions that return the number of users and of seeds of a result, by its kind; 0 seeds if no model has seeds."""
