"""Stores a run's results in the repository: ``make bench NAME=record`` after ``make quickstart``.

``python -m eval.benchmarks.record RUN TARGET`` writes them without prompts, texts and raw answers, which contain other
people's data. With docs/quickstart.md as third argument its table is updated; with the recipe as fourth its keys are
stored, so that a test can detect changes.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from eval.benchmarks.figures.parts import put
from llmrec.cli.console import show_run_results
from llmrec.durable import CHECKSUM
from llmrec.machine import commit_hash
from llmrec.pipeline.run import Run
from llmrec.recipe.load import load_recipe, recipe_hash
from llmrec.recipe.schema import Recipe
from llmrec.registry import is_lower_better
from llmrec.report.marks import significance_rule
from llmrec.report.summary import exploratory_reason
from llmrec.report.wording import format_verdict
from llmrec.results import Results

PART = "quickstart:table"
"""The generated part of the page."""
SIMPLE = ("random", "frequent-text", "global-mean", "user-mean", "popularity", "item-mean")
"""Simple baselines, the strongest last; a task has some of them."""


def main(run: Path, target: Path, shown: Path | None = None, page: Path | None = None) -> None:
    """Write the results, and the table into a page of the documentation.

    Raises:
        SystemExit: If the recipe differs from that of the run.
    """
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    if page is not None:
        # Keys that are newer than the run have defaults in both.
        if recipe_hash(load_recipe(page)) != recipe_hash(Recipe.model_validate(results["recipe"])):
            raise SystemExit(f"{run} was run with another recipe than {page}; run it again")
        results["recipe_page"] = yaml.safe_load(page.read_text(encoding="utf-8"))
    results["commit"] = commit_hash()
    # The report's examples of users and items are personal data.
    for key in ("examples", "gallery", "newcomers"):
        results[key] = []
    for key in ("texts", "files", "example", CHECKSUM):
        results.pop(key, None)
    for row in results["rows"]:
        row["failures"] = []
    target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if shown is None:
        return
    shown.write_text(put(shown.read_text(encoding="utf-8"), PART, table(results)), encoding="utf-8")


def changed_since(results: dict[str, Any], page: Path) -> list[str]:
    """Return the keys of a recipe that have changed since its results were recorded, without defaults.

    Names and descriptions are ignored.
    """
    then, now = (dict(_flat(recipe)) for recipe in (results["recipe_page"], yaml.safe_load(page.read_text("utf-8"))))
    different = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    return [
        f"{key} was {then.get(key, 'not set')}, is {now.get(key, 'not set')}"
        for key in different
        if key not in {"name", "description"}
    ]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def table(results: dict[str, Any]) -> str:
    """Return one line per task: the model in each variant, simple baselines, the best one, and paired differences."""
    lines = [
        "| Task, metric, requests | Zero-shot | Few-shot | Fine-tuned | Simple baselines | Best baseline "
        "| Fine-tuned − zero-shot | Fine-tuned − simple baseline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, metric in results["headline"].items():
        rows = [row for row in results["rows"] if row["task"] == task]
        by_arm = {row["arm"]: row for row in reversed(rows) if row["template"] and "fusion" not in row}
        value = {arm: f"{row['metrics'][metric]['value']:.3f}" for arm, row in by_arm.items()}
        classic = {row["predictor"]: row for row in rows if row["arm"] == "baseline"}
        figures = {name: row["metrics"][metric]["value"] for name, row in classic.items()}
        best = (min if is_lower_better(metric) else max)(figures, key=figures.__getitem__)
        simple = [name for name in SIMPLE if name in figures]
        better = "lower is better" if is_lower_better(metric) else "higher is better"
        cells = [
            f"{task}, {metric} ({better}), {rows[0]['n']}",
            *(value.get(arm, "–") for arm in ("zero-shot", "few-shot", "tuned")),
            ", ".join(f"{name} {figures[name]:.3f}" for name in simple),
            f"{best} {figures[best]:.3f}",
            _difference(results, by_arm["tuned"], by_arm["zero-shot"]),
            _difference(results, by_arm["tuned"], classic[simple[-1]]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _how(results), *(f"\n{note}" for note in results["notes"])])


def _difference(results: dict[str, Any], a: dict[str, Any], b: dict[str, Any]) -> str:
    """Return the paired difference of two models with its interval and verdict."""
    pair = next(row for row in results["comparisons"] if (row["a"], row["b"]) == (a["id"], b["id"]))
    text = f"{pair['value']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}], {format_verdict(pair.get('verdict'))}"
    return text.replace("-", "−")


def screen(results: dict[str, Any]) -> str:
    """Return the final output of the command as a code block."""
    folder = Path("runs") / results["recipe"]["name"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        show_run_results(Run(folder, results, (), folder / "report" / "index.html"))
    lines = "\n".join(line.rstrip() for line in output.getvalue().rstrip().splitlines())
    return f"```text\n{lines}\n```"


def _how(results: dict[str, Any]) -> str:
    """Return the conditions of the results, from the run."""
    tasks = list(results["headline"])
    predictors = {row["task"]: row["predictor"] for row in reversed(results["rows"]) if row["arm"] == "zero-shot"}
    read = Results.model_validate(results)
    machine = results["machine"]
    hardware = f"{machine['cores']} cores ({machine['cpu']}), {machine['gpu'] or 'no GPU'}"
    stages = ", ".join(f"{entry['stage']} {entry['seconds']:.0f} s" for entry in results["budget"])
    parts = [
        f"`{results['command']}` with llmrec {results['llmrec']}, recipe {results['recipe_hash']}",
        f"Methods: {_listed([f'{predictors[task]} ({task})' for task in tasks])}",
        f"Training rows: {', '.join(f'{task} {count}' for task, count in results['training']['rows'].items())}",
        significance_rule(read).rstrip("."),
        exploratory_reason(read, name=str).rstrip("."),
        f"{hardware}. Seconds by stage: {stages}; {results['seconds']:.0f} s in all",
    ]
    return f"{'. '.join(parts)}."


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:5]))
