"""The command `llmrec merge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from llmrec.cli.common import App
from llmrec.cli.show.console import finish, show

app = App()


@app.command()
def merge(
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="What the shards are of: the --out of rank, a run folder, a store.")
    ],
    shards: Annotated[
        list[Path] | None, typer.Argument(metavar="[SHARD]...", help="Folders of shards; by default TARGET.shards/*.")
    ] = None,
) -> None:
    """Put the shards of a job together.

    Of `rank`, `eval`, `run` or `augment`, as one process writes it; no model is asked again. Missing, damaged or
    doubled shards, and those of other inputs, are refused. Exit code of rank: 1 if lines failed.
    """
    put_together(target, shards or ())


def put_together(target: Path, folders: Sequence[Path] = ()) -> None:
    """Put shards together, and print what came out."""
    from llmrec.pipeline.shards import folders_of, read

    command = read(folders_of(target, folders)[0]).command
    if command == "eval":
        from llmrec.cluster.merge.evaluation import merge_run

        finish(merge_run(target, folders))
    elif command == "augment":
        from llmrec.cli.augment_show import show_texts
        from llmrec.pipeline.augmenting import merge_augment

        show_texts(merge_augment(target, folders))
    else:
        from llmrec.answer.rank.progress import console_rows
        from llmrec.answer.rank.sharded import merge_rank

        summary = merge_rank(target, folders)
        show("ranking", console_rows(summary), told={"ranking": summary})
        raise typer.Exit(int(summary["failed"] != 0))
