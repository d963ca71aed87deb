"""The command `llmrec report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import OptionHelp
from llmrec.cli.console import say, show_tables, show_written_files, store_facts
from llmrec.registry import HOOKS, extension_hook


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `llmrec report`."""

    folder: Annotated[
        Path,
        OptionHelp(
            argument=True,
            metavar="RUN",
            help="Run folder such as runs/quickstart, or a folder of suite results such as eval/results.",
        ),
    ]
    table: Annotated[bool, OptionHelp(help="With a run folder: also print the tables.")] = False


def report(options: ReportOptions) -> None:
    """Rebuild the report of a run from its results.

    For a folder of suite results such as eval/results: rebuild the leaderboard and the pages of the benchmarks.

    Example:
        llmrec report runs/quickstart --table
    """
    from llmrec.pipeline import run as pipeline

    if "rewrite-pages" in HOOKS and (pages := extension_hook("rewrite-pages")(options.folder)):
        store_facts(pages=pages)
        say("\n".join(f"page: {path}" for path in pages))
        return
    page = pipeline.report(options.folder)
    if options.table:
        show_tables(options.folder)
    show_written_files({"report": page})
