"""What commands print: tables of names and values, a run's results, and the estimate of a dry run."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer


def finish(done: Any) -> None:
    """Print the tables, the budget and where the report lies."""
    from rich.console import Console

    from llmrec.report.results import results_of
    from llmrec.report.summary import first_sentence
    from llmrec.report.table import console_tables

    # Piped output has no width of its own; 80 columns would fold every cell.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    found = results_of(done.results)
    if sentence := first_sentence(found):
        say(sentence)
    for table in console_tables(found):
        console.print(table)
    budget = {entry["stage"]: f"{entry['seconds']:.0f} s" for entry in done.results["budget"]}
    show("budget", {**budget, "total": f"{done.results['seconds']:.0f} s"})
    say(f"results: {done.folder / 'results.json'}\nreport: {done.report}")


def show_dry_run(study: Any) -> None:
    """Print rendered prompts, training rows, and an estimate of time and memory."""
    from llmrec.commands.show import estimate
    from llmrec.experiment.study import encoder_of
    from llmrec.models.load import resolve

    base = resolve(study.recipe.model, seed=study.recipe.seed)
    encoder = encoder_of(study, base)
    for texts in estimate.rendered(study, encoder).values():
        for text in texts:
            say(text + "\n")
    rows = estimate.train_rows(study, encoder, base) if "tuned" in study.recipe.eval.arms else {}
    if rows:
        show("training rows", {name: json.dumps(value) for name, value in rows.items()})
    found = estimate.estimate(study, encoder, base, rows)
    arms = {
        f"{arm}: about": f"{count:,} tokens"
        + (f", {found.eval_seconds[arm]:.0f} s" if arm in found.eval_seconds else "")
        for arm, count in found.eval_tokens.items()
    }
    show(
        "estimate",
        {
            "parameters": f"{found.parameters:,}",
            "training: about": f"{found.train_tokens:,} tokens, {found.train_seconds:.0f} s",
            **arms,
            "memory: about": f"{found.memory_gb} GiB",
        },
    )


def show(title: str, rows: dict[str, str]) -> None:
    """Print a title, and names with their values below it."""
    width = max((len(name) for name in rows), default=0)
    say(title)
    for name, value in rows.items():
        say(f"  {name:<{width}}  {value}")


def short(value: Any) -> str:
    """Return a figure with its thousands apart."""
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def readable(value: Any) -> str:
    """Return a figure, or a few named ones, as a line is read."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {readable(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(readable, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def say(text: str) -> None:
    """Print a line."""
    typer.echo(text)
