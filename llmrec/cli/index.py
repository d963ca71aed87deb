"""The command `llmrec index`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import OptionHelp
from llmrec.cli.console import show_values, store_facts
from llmrec.cli.options import RecipeOptions


@dataclass(frozen=True, kw_only=True)
class IndexOptions(RecipeOptions):
    """Options of `llmrec index`."""

    out: Annotated[Path | None, OptionHelp(help="Output folder. Default: runs/NAME/index.")] = None
    items: Annotated[
        str, OptionHelp(metavar="ID,ID", help="Comma-separated item IDs to show, with their nearest neighbours.")
    ] = ""


def index(options: IndexOptions) -> None:
    """Build the item IDs of a recipe and show examples.

    Writes a page with statistics and examples of the semantic or other IDs that the section index configures.

    Example:
        llmrec index recipes/movielens-100k/index-semantic.yaml
    """
    from llmrec.pipeline import index_report
    from llmrec.recipe.load import load_recipe

    items = [name for part in options.items.split(",") if (name := part.strip())]
    result = index_report.index(load_recipe(options.recipe, options.overrides), options.out, items=items)
    store_facts(index=result.folder, page=result.page, seconds=result.seconds, diagnostics=result.found)
    for title, rows in index_report.summary_tables(result).items():
        show_values(title, rows, record={})
