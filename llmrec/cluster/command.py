"""The command `llmrec merge`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from llmrec.answer.options import OptionHelp
from llmrec.cli.console import show_run_results, show_values


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Options of `llmrec merge`."""

    target: Annotated[
        Path,
        OptionHelp(
            argument=True,
            metavar="TARGET",
            help="Output of the job: an output file of llmrec rank, a run folder or a feature store.",
        ),
    ]
    shards: Annotated[
        tuple[Path, ...],
        OptionHelp(argument=True, metavar="[SHARD]...", help="Folders of the shards. Default: TARGET.shards/*."),
    ] = ()


def merge(options: MergeOptions) -> None:
    """Merge the shards of a distributed job.

    Works for rank, eval, run and augment; no model is run again. Missing, damaged, duplicate or foreign shards are
    errors. Exit code 1 if some requests of rank failed.

    Example:
        llmrec merge runs/quickstart
    """
    merge_shards(options.target, options.shards)


def merge_shards(target: Path, folders: Sequence[Path] = ()) -> None:
    """Merge the shards of a job, and print the result."""
    from llmrec.pipeline.shards import find_shard_folders, read_shard

    command = read_shard(find_shard_folders(target, folders)[0]).command
    if command == "eval":
        from llmrec.cluster.evaluation import merge_run

        show_run_results(merge_run(target, folders))
    elif command == "augment":
        from llmrec.cli.augment import show_texts
        from llmrec.pipeline.augmenting import merge_augment

        show_texts(merge_augment(target, folders))
    else:
        from llmrec.answer.rank.run import console_rows
        from llmrec.answer.rank.sharded import merge_rank

        summary = merge_rank(target, folders)
        show_values("ranking", console_rows(summary), record={"ranking": summary})
        raise typer.Exit(int(summary["failed"] != 0))
