"""The command `llmrec compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import OptionHelp
from llmrec.cli.console import rich_console, say, show_written_files, store_facts
from llmrec.recipe.shared import RESAMPLES


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Options of `llmrec compare`."""

    a: Annotated[Path, OptionHelp(argument=True, metavar="RUN_A", help="Finished run folder.")]
    b: Annotated[
        Path,
        OptionHelp(
            argument=True,
            metavar="RUN_B",
            help="Folder of a finished run to compare with, evaluated on the same test cases.",
        ),
    ]
    to: Annotated[
        Path | None,
        OptionHelp(metavar="FILE", help="Output file for all differences (.csv, .tsv, .jsonl or .parquet)."),
    ] = None
    resamples: Annotated[
        int, OptionHelp(least=1, help="Number of bootstrap resamples for the confidence intervals.")
    ] = RESAMPLES
    seed: Annotated[int, OptionHelp(help="Random seed of the bootstrap.")] = 0


def compare(options: CompareOptions) -> None:
    """Compare two finished runs on the same cases.

    Prints paired differences with confidence intervals; --json and --to contain every metric. Runs with different
    users, items, candidates or splits are rejected. No model is run again.

    Example:
        llmrec compare runs/quickstart runs/longer
    """
    from llmrec.bench.runs import INTERVAL_NOTE, compare_runs, comparison_tables, write_differences

    result = compare_runs(options.a, options.b, resamples=options.resamples, seed=options.seed)
    store_facts(**result.as_json())
    say(f"A: {result.a}\nB: {result.b}\n{INTERVAL_NOTE}\n")
    for table in comparison_tables(result):
        rich_console().print(table)
    if options.to is not None:
        write_differences(result, options.to)
        show_written_files({"file": options.to})
