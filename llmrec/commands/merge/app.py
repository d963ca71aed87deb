"""The command `llmrec merge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from llmrec.commands.common import App
from llmrec.commands.show.console import finish, show, show_shard

app = App()

Piece = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="Do the I-th of N pieces alone; llmrec merge puts them together."),
]


@app.command()
def merge(
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="What the shards are of: the --out of rank, a run folder, a store.")
    ],
    shards: Annotated[
        list[Path] | None, typer.Argument(metavar="[SHARD]...", help="Folders of shards; by default TARGET.shards/*.")
    ] = None,
) -> None:
    """Put the shards of `rank`, `eval`, `run` or `augment` together, as one process writes it; asks no model again.

    Missing, damaged or doubled shards, and those of other inputs, are refused. Exit code of rank: 1 if lines failed.
    """
    from llmrec.experiment.shards.folders import folders_of, read

    folders = folders_of(target, shards or ())
    command = read(folders[0]).command
    if command == "eval":
        from llmrec.commands.merge.evaluation import merge_run

        finish(merge_run(target, folders))
    elif command == "augment":
        from llmrec.commands.features.augment import show_texts
        from llmrec.experiment.augmenting import merge_augment

        show_texts(merge_augment(target, folders))
    else:
        from llmrec.commands.rank.progress import console_rows
        from llmrec.commands.rank.sharded import merge_rank

        summary = merge_rank(target, folders)
        show("ranking", console_rows(summary), told={"ranking": summary})
        raise typer.Exit(int(summary["failed"] != 0))


def ask_shard(page: str, overrides: Sequence[str], out: Path | None, piece: str) -> None:
    """Ask one shard of a recipe's cases, for `llmrec run` and `llmrec eval`, and say what became of it.

    Raises:
        RecipeError: If the page is no recipe.
    """
    from llmrec.commands.merge.evaluation import evaluate_shard
    from llmrec.errors import RecipeError
    from llmrec.experiment.study import folder_of
    from llmrec.recipe.load import kind_of_page, load_recipe
    from llmrec.records import Shard

    kind, shard = kind_of_page(page), Shard.parse(piece)
    if kind != "recipe":
        raise RecipeError(
            f"--shard: {page} is a {kind}; evaluate its recipes in shards, and then the {kind}",
            kind="unsupported",
            column="--shard",
        )
    recipe = load_recipe(page, overrides)
    show_shard(evaluate_shard(recipe, out, shard), folder_of(recipe, out))
