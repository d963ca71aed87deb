"""One shard of an evaluation, or all of them on a cluster, for `llmrec run` and `llmrec eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmrec.cli.show.console import show_shard
from llmrec.cluster.merge.options import refuse_both


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
    from llmrec.pipeline.study import folder_of
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
        from llmrec.cluster.actors import finish_on

        finish_on(address, "eval", home, recipe)
    elif shard is not None:
        from llmrec.cluster.merge.evaluation import evaluate_shard

        show_shard(evaluate_shard(recipe, out, shard), home)
