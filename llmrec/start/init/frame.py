"""`llmrec.init`: looks at a frame in memory and says what recipe it makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from llmrec.data.frames import as_arrow, only_for_a_moment
from llmrec.display import Displayed, Summary, listed
from llmrec.keywords import in_python, keywords_of
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe
from llmrec.start.init import start
from llmrec.start.init.roles import asked


@dataclass(frozen=True, repr=False)
class Begun(Displayed):
    """What `init` made of a frame.

    Attributes:
        recipe: For `llmrec.run`, which takes the frame as ``data`` and the items as ``items``.
        found: Which column was taken for what, and why; what the data is like; which tasks it can carry.
    """

    recipe: Recipe
    found: str

    def _summary(self) -> Summary:
        title = f"Recipe {self.recipe.name!r} for {listed(self.recipe.tasks.present())}"
        return Summary(title, text=self.found)


def init(
    frame: Any,
    items: Any = None,
    *,
    name: str = "frame",
    user: str | None = None,
    item: str | None = None,
    rating: str | None = None,
    time: str | None = None,
    title: str | None = None,
    text: str | None = None,
    fields: str | None = None,
    dates: str | None = None,
    split: str | None = None,
) -> Begun:
    """Look at a frame and return a recipe for it.

    A column is guessed where none is named; ``"none"`` says that there is no such column.

    Args:
        frame: Interactions; see `llmrec.data.frames.with_frames`.
        items: One row an item, as a frame.
        name: The recipe's name.
        user: Column of users.
        item: Column of items.
        rating: Column of ratings.
        time: Column of times.
        title: Column of item titles.
        text: Column of texts that users wrote.
        fields: Further columns about items, with commas between them.
        dates: Order in dates such as 03/04/2024: ``"day-first"`` or ``"month-first"``.
        split: Column of the parts train, valid and test.

    Raises:
        DataError: If the frame cannot be judged, or no task can be made of it.
    """
    roles = asked(
        user=user,
        item=item,
        rating=rating,
        time=time,
        title=title,
        text=text,
        fields=fields,
        dates=dates,
        split=split,
    )
    with only_for_a_moment() as (place, named):
        tables = {}
        for key, each in (("interactions", frame), ("items", items)):
            if each is not None:
                tables[key] = str(place / f"{key}.parquet")
                pq.write_table(as_arrow(each, f"{key} frame"), tables[key])
        made = start.init(
            tables["interactions"],
            items=tables.get("items"),
            out=place / "recipe.yaml",
            name=name,
            asked=roles,
            in_memory=True,
        )
        recipe, found = load_recipe(made.recipe), in_python(named(made.found), keywords_of(init))
    data = recipe.data.model_copy(update={"path": None, "items": None})
    return Begun(recipe.model_copy(update={"data": data}), found)
