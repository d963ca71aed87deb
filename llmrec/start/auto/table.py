"""What `llmrec auto` learns from: the data of a recipe, or what `llmrec init` makes of a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmrec.recipe.load import as_recipe, load_recipe
from llmrec.recipe.schema import Recipe
from llmrec.start.auto.options import AutoOptions
from llmrec.start.init.roles import asked
from llmrec.start.init.start import init, name_of

PAGE, FIXED = "table.yaml", "fixed"
"""What is written into the folder of trials: what `init` made, and a folder of a copy without faults."""
PAGES = (".yaml", ".yml")


def data_page(options: AutoOptions, name: str, state: Path, say: Callable[[str], None]) -> Recipe:
    """Return a recipe of the data alone."""
    page = options.table.endswith(PAGES)
    given = load_recipe(options.table) if page else _looked_at(options, state, say)
    data = given.data.model_dump(mode="json")
    if not page:
        # Whoever has few interactions is to be served too.
        data["filter"] |= {"user_core": 1, "item_core": 1}
    return as_recipe(
        {
            "name": name,
            "seed": given.seed,
            "data": data,
            "tasks": {"sequential": {"strategies": ["search"]}},
            "eval": {"arms": [], "backend": "hf", "users": options.users, "candidates": {"kind": "catalogue"}},
        }
    )


def _looked_at(options: AutoOptions, state: Path, say: Callable[[str], None]) -> Recipe:
    """Return what `init` makes of a table; where faults can be fixed, of a fixed copy, and say what that lacks."""
    columns = asked(
        user=options.user,
        item=options.item,
        rating=options.rating or "none",  # a row without one is an interaction all the same
        time=options.time,
        title=options.title,
        fields=options.fields,
        dates=options.dates,
        split=options.split,
    )
    page = state / PAGE
    made = init(
        options.table,
        items=options.items,
        out=page,
        name=options.name,
        asked=columns,
        mend=state / FIXED / f"{name_of(options.name, options.table)}.csv",
        force=True,
        backend="hf",
        query=options.query,
    )
    for note in made.fixes:
        say(note)
    return load_recipe(page)
