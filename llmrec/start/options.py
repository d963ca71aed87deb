"""Options of `llmrec init`, `llmrec auto` and `llmrec tune`."""

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
class TableOptions:
    """A table of interactions, and the roles of its columns."""

    table: str
    items: Annotated[str | None, About(help="A second table, with one row an item.")] = None
    query: Annotated[str | None, About(help="What is asked of a database: one SELECT.")] = None
    user: Annotated[str | None, About(help="Column of users.")] = None
    item: Annotated[str | None, About(help="Column of items.")] = None
    rating: Annotated[str | None, About(help="Column of ratings; none: leave them out.")] = None
    time: Annotated[str | None, About(help="Column of times; none: the order of the rows.")] = None
    title: Annotated[str | None, About(help="Column of item titles; none: ids stand in.")] = None
    fields: Annotated[str | None, About(help="Further item columns, A,B; none: no such.")] = None
    dates: Annotated[str | None, About(help="Order in dates such as 03/04/2024: day-first or month-first.")] = None
    split: Annotated[str | None, About(help="Column of the parts train, valid and test; none: draw a split.")] = None


@dataclass(frozen=True, kw_only=True)
class InitOptions(TableOptions):
    """A table of interactions, and where its recipe goes."""

    table: Annotated[
        str,
        About(
            argument=True,
            metavar="TABLE",
            help="A file, BOOK.xlsx#SHEET or a folder; or sqlite:///FILE, duckdb:///FILE, postgresql:// or hf://NAME.",
        ),
    ]
    out: Annotated[Path | None, About(help="The recipe; <name>.yaml by default.")] = None
    name: Annotated[str | None, About(help="The recipe's name; the table's by default.")] = None
    text: Annotated[str | None, About(help="Column of texts by users; none: leave them out.")] = None
    mend: Annotated[Path | None, About(help="Write a copy of the table with its faults fixed, and use that.")] = None
    force: Annotated[bool, About(help="Write over an existing recipe or copy.")] = False


@dataclass(frozen=True, kw_only=True)
class AutoOptions(TableOptions):
    """A table of interactions or a recipe, a folder, and a budget."""

    table: Annotated[
        str,
        About(
            argument=True,
            metavar="TABLE",
            help="As `llmrec init` takes it, or a recipe whose data is meant: FILE.yaml.",
        ),
    ]
    budget: Annotated[
        str, About(metavar="TIME", help="Wall time for all of it, such as 90s, 30m or 2h; a number alone is minutes.")
    ] = "30m"
    out: Annotated[Path | None, About(help="The run folder; runs/<name>-auto by default.")] = None
    name: Annotated[str | None, About(help="What the run is called; the table's name by default.")] = None
    users: Annotated[int, About(help="Test users that the finished recommender is measured on.", least=1)] = 5000
    classic: Annotated[bool, About(help="Tune no language model, whatever the budget allows.")] = False
    rating: Annotated[str | None, About(help="Column of ratings, which nothing here reads; left out by default.")] = (
        None
    )

    @property
    def seconds(self) -> float:
        """The budget, in seconds."""
        return budget_seconds(self.budget, "--budget")


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """A recipe, the keys that are searched, and a budget."""

    recipe: Annotated[str, About(argument=True, metavar="RECIPE", help="The recipe, such as recipes/quickstart.yaml.")]
    over: Annotated[
        tuple[str, ...],
        About(
            metavar="KEY=VALUES",
            help="A key and its values: 1e-4..1e-3 (a range; on a log scale from a factor of 10 on) or 8,16,32.",
        ),
    ]
    overrides: Annotated[
        tuple[str, ...], About(names=("--set",), metavar="KEY=VALUE", help="A key of the recipe that stays as it is.")
    ] = ()
    budget: Annotated[str, About(metavar="TIME", help="Wall time of this call, such as 90s, 30m or 2h.")] = "2h"
    trials: Annotated[int | None, About(least=1, help="Trials in all; default: as many as the budget allows.")] = None
    metric: Annotated[
        str | None,
        About(
            metavar="FAMILY/METRIC",
            help="What decides, on validation users; default: the headline metric of the first of the recipe's "
            "families, in the order rating, sequential, direct, explanation, alignment, ctr, review, stars.",
        ),
    ] = None
    out: Annotated[Path | None, About(help="The folder of trials; runs/<name>-tune by default.")] = None


def budget_seconds(text: str, option: str) -> float:
    """Return a time such as ``90s``, ``30m`` or ``1.5h`` in seconds; a bare number is minutes.

    Raises:
        RecipeError: If the text is not a time.
    """
    result = _BUDGET.fullmatch(text.strip().lower())
    unit = _UNITS.get(result[2] or "m") if result else None
    if result is None or unit is None or float(result[1]) <= 0:
        raise RecipeError(
            f"{option} {text!r} is no time; write one such as 90s, 30m or 2h", kind="bad-value", column=option
        )
    return float(result[1]) * unit
