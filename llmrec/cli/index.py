"""The command `llmrec index`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import About
from llmrec.cli.console import show, store_facts
from llmrec.cli.options import RecipeOptions


@dataclass(frozen=True, kw_only=True)
class IndexOptions(RecipeOptions):
    """A recipe, where its index goes, and which items are shown."""

    out: Annotated[Path | None, About(help="Folder to write; runs/<name>/index by default.")] = None
    items: Annotated[str, About(metavar="ID,ID", help="Items to show, with those nearest to them.")] = ""


def index(options: IndexOptions) -> None:
    """Build a recipe's item index and show its codes.

    It writes a page with figures and examples.
    """
    from llmrec.pipeline import index_report
    from llmrec.recipe.load import load_recipe

    items = [name for part in options.items.split(",") if (name := part.strip())]
    made = index_report.index(load_recipe(options.recipe, options.overrides), options.out, items=items)
    store_facts(index=made.folder, page=made.page, seconds=made.seconds, diagnostics=made.found)
    for title, rows in index_report.summary(made).items():
        show(title, rows, record={})
