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

Cluster = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="local|HOST:PORT",
        help="Have a Ray cluster work all pieces, and put them together; ray.* of the recipe says how.",
    ),
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
    put_together(target, shards or ())


def put_together(target: Path, folders: Sequence[Path] = ()) -> None:
    """Put shards together, and print what came out."""
    from llmrec.experiment.shards.folders import folders_of, read

    command = read(folders_of(target, folders)[0]).command
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


def ask_shards(
    page: str, overrides: Sequence[str], out: Path | None, piece: str | None = None, address: str | None = None
) -> None:
    """Ask one shard of a recipe's cases, or have Ray ask all, for `llmrec run` and `llmrec eval`.

    Args:
        page: The recipe.
        overrides: Changed keys.
        out: The run folder.
        piece: Which shard; None: all.
        address: Of a Ray cluster; None: the shard is asked here.

    Raises:
        RecipeError: If the page is no recipe.
    """
    from llmrec.errors import RecipeError
    from llmrec.experiment.study import folder_of
    from llmrec.recipe.load import kind_of_page, load_recipe
    from llmrec.records import Shard

    option = "--shard" if address is None else "--ray"
    shard = None if piece is None else Shard.parse(piece)
    refuse_both(piece, address)
    if (kind := kind_of_page(page)) != "recipe":
        raise RecipeError(
            f"{option}: {page} is a {kind}; evaluate its recipes in shards, and then the {kind}",
            kind="unsupported",
            column=option,
        )
    recipe = load_recipe(page, overrides)
    home = folder_of(recipe, out)
    if address is not None:
        from llmrec.commands.cluster.actors import finish_on

        finish_on(address, "eval", home, recipe)
    elif shard is not None:
        from llmrec.commands.merge.evaluation import evaluate_shard

        show_shard(evaluate_shard(recipe, out, shard), home)


def refuse_both(piece: str | None, address: str | None) -> None:
    """Refuse one shard where Ray is to work all.

    Raises:
        RecipeError: If both are asked for.
    """
    from llmrec.errors import RecipeError

    if piece is not None and address is not None:
        raise RecipeError(
            "--ray works all shards, and --shard one; drop one of them", kind="contradiction", column="--shard"
        )
