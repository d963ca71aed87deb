"""What `llmrec auto` is asked for: a table or a recipe, and how long it may take."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import About
from llmrec.errors import RecipeError

_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


@dataclass(frozen=True, kw_only=True)
class AutoOptions:
    """A table of interactions or a recipe, a folder, and a budget."""

    table: Annotated[
        str,
        About(
            argument=True,
            metavar="TABLE",
            help="As `llmrec init` takes it, or a recipe whose data is meant: FILE.yaml.",
        ),
    ]
    items: Annotated[str | None, About(help="A second table, with one row an item.")] = None
    budget: Annotated[
        str, About(metavar="TIME", help="Wall time for all of it, such as 90s, 30m or 2h; a number alone is minutes.")
    ] = "30m"
    out: Annotated[Path | None, About(help="The run folder; runs/<name>-auto by default.")] = None
    name: Annotated[str | None, About(help="What the run is called; the table's name by default.")] = None
    users: Annotated[int, About(help="Test users that the finished recommender is measured on.", least=1)] = 5000
    classic: Annotated[bool, About(help="Tune no language model, whatever the budget allows.")] = False
    user: Annotated[str | None, About(help="Column of users.")] = None
    item: Annotated[str | None, About(help="Column of items.")] = None
    rating: Annotated[str | None, About(help="Column of ratings, which nothing here reads; left out by default.")] = (
        None
    )
    time: Annotated[str | None, About(help="Column of times; none: the order of the rows.")] = None
    title: Annotated[str | None, About(help="Column of item titles; none: ids stand in.")] = None
    fields: Annotated[str | None, About(help="Further item columns, A,B; none: no such.")] = None
    dates: Annotated[str | None, About(help="Order in dates such as 03/04/2024: day-first or month-first.")] = None
    split: Annotated[str | None, About(help="Column of the parts train, valid and test; none: draw a split.")] = None
    query: Annotated[str | None, About(help="What is asked of a database: one SELECT.")] = None

    @property
    def seconds(self) -> float:
        """The budget."""
        return budget_seconds(self.budget, "--budget")


def budget_seconds(text: str, option: str) -> float:
    """Return a time such as ``90s``, ``30m`` or ``1.5h`` in seconds; a bare number is minutes.

    Raises:
        RecipeError: If it is no such time.
    """
    found = _BUDGET.fullmatch(text.strip().lower())
    unit = _UNITS.get(found[2] or "m") if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise RecipeError(
            f"{option} {text!r} is no time; write one such as 90s, 30m or 2h", kind="bad-value", column=option
        )
    return float(found[1]) * unit
