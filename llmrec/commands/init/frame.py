"""`llmrec.init`: looks at a frame in memory and says what recipe it makes of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from llmrec.commands.init import start
from llmrec.commands.init.roles import ROLES, asked
from llmrec.data.frames import as_arrow, only_for_a_moment
from llmrec.errors import LlmrecError
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe


@dataclass(frozen=True)
class Begun:
    """What `init` made of a frame.

    Attributes:
        recipe: For `llmrec.run`, which takes the frame as ``data`` and the items as ``items``.
        found: Which column was taken for what, and why; what the data is like; which tasks it can carry.
    """

    recipe: Recipe
    found: str


def init(frame: Any, items: Any = None, *, name: str = "frame", **columns: str) -> Begun:
    """Look at a frame and return a recipe for it.

    Args:
        frame: Interactions; see `llmrec.data.frames.with_frames`.
        items: One row an item, as a frame.
        name: The recipe's name.
        columns: What is known: ``user``, ``item``, ``rating``, ``time``, ``title``, ``text``, ``split``, and ``fields``
            with commas between them, as the options of `llmrec init`; ``none`` says that there is no such column.

    Raises:
        DataError: If the frame cannot be judged, or no task can be made of it.
    """
    try:
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
                asked=asked(**columns),
                measure=False,
                in_memory=True,
            )
            recipe, found = load_recipe(made.recipe), in_python(named(made.found))
    except LlmrecError as error:
        raise type(error)(in_python(str(error)), kind=error.kind, at=error.place, column=error.column) from None
    data = recipe.data.model_copy(update={"path": None, "items": None})
    return Begun(recipe.model_copy(update={"data": data}), found)


_OPTIONS = "|".join((*ROLES, "fields", "dates", "items", "name"))
# What follows an option: a word, or one in quotes; see `llmrec.commands.init.profile.shell`.
_VALUE = re.compile(rf"--({_OPTIONS})[ =](?:'([^']*)'|(\.{{3}}|[\w.:-]*\w))")
_BARE = re.compile(rf"--({_OPTIONS})\b")


def in_python(text: str) -> str:
    """Return what is said of the command's options in the words of `init`: ``--user COLUMN`` as ``user="COLUMN"``."""
    return _BARE.sub(r"\1", _VALUE.sub(lambda found: f'{found[1]}="{found[2] or found[3]}"', text))
