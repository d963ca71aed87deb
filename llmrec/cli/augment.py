"""The command `llmrec augment`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmrec.cli.common import App, Overrides, RecipePath
from llmrec.cli.show.console import show_shard
from llmrec.cluster.merge.options import Cluster, Piece, refuse_both

app = App()


@app.command()
def augment(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="The store; <run folder>/features by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would cost, and a prompt.")] = False,
    without_model: Annotated[
        bool,
        typer.Option("--without-model", help="The control: the same events and items; <run folder>/control."),
    ] = False,
    shard: Piece = None,
    ray: Cluster = None,
) -> None:
    """Have a language model write texts of users and items.

    They are stored with their vectors as features. A killed call resumes where it was. Texts on users are written from
    what nothing else learns from, where data.split.kind=prefix keeps it apart.
    """
    from llmrec.cli.augment_show import show_plan, show_texts
    from llmrec.errors import RecipeError
    from llmrec.pipeline import augmenting
    from llmrec.pipeline.study import folder_of
    from llmrec.recipe.load import load_recipe
    from llmrec.records import Shard

    refuse_both(shard, ray)
    if without_model and (shard, ray) != (None, None):
        raise RecipeError(
            "--shard and --ray share out questions, and --without-model asks none; drop one of them",
            kind="contradiction",
            column="--without-model",
        )
    asked = load_recipe(recipe, overrides or ())
    folder = folder_of(asked, None)
    target = out or folder / augmenting.FEATURES
    if dry_run:
        show_plan(asked)
    elif without_model:
        show_texts(augmenting.without_model(asked, out or folder / augmenting.CONTROL))
    elif ray is not None:
        from llmrec.cluster.actors import finish_on

        finish_on(ray, "augment", target, asked)
    elif shard is not None:
        show_shard(augmenting.augment_shard(asked, target, Shard.parse(shard)), target)
    else:
        show_texts(augmenting.augment(asked, target))
