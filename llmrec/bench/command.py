"""The command `llmrec compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import About
from llmrec.cli.console import console, say, store_facts, written
from llmrec.recipe.shared import RESAMPLES


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Two run folders, and the output of their differences."""

    a: Annotated[Path, About(argument=True, metavar="RUN_A", help="A finished run folder.")]
    b: Annotated[Path, About(argument=True, metavar="RUN_B", help="Another one, over the same cases.")]
    to: Annotated[
        Path | None, About(metavar="FILE", help="Also write every difference: .csv, .tsv, .jsonl or .parquet.")
    ] = None
    resamples: Annotated[int, About(least=1, help="Of the users, for the intervals.")] = RESAMPLES
    seed: Annotated[int, About(help="Of the resamples.")] = 0


def compare(options: CompareOptions) -> None:
    """Compare two finished runs over the same cases.

    Paired differences with intervals. Rows stand for the runs or are in both; --json and --to hold every metric. Runs
    over other users, items, candidates or splits are refused. Nothing is asked again.
    """
    from llmrec.bench.runs import NOTE, compare_runs, tables, write

    result = compare_runs(options.a, options.b, resamples=options.resamples, seed=options.seed)
    store_facts(**result.as_json())
    say(f"A: {result.a}\nB: {result.b}\n{NOTE}\n")
    for table in tables(result):
        console().print(table)
    if options.to is not None:
        write(result, options.to)
        written({"file": options.to})
