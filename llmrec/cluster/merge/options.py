"""The options of a command whose work is cut into shards."""

from __future__ import annotations

from typing import Annotated

import typer

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
