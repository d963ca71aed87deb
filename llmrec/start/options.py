"""Options of `llmrec init`, `llmrec auto` and `llmrec tune`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import OptionHelp
from llmrec.errors import RecipeError

_UNIT_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BUDGET_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Options that describe a table of interactions and its columns."""

    table: str
    items: Annotated[str | None, OptionHelp(help="Table of items, with one row per item.")] = None
    query: Annotated[str | None, OptionHelp(help="With a database: the SELECT statement to read.")] = None
    user: Annotated[str | None, OptionHelp(help="Column of user IDs. Default: detected.")] = None
    item: Annotated[str | None, OptionHelp(help="Column of item IDs. Default: detected.")] = None
    rating: Annotated[str | None, OptionHelp(help="Column of ratings; none to ignore ratings. Default: detected.")] = (
        None
    )
    time: Annotated[
        str | None, OptionHelp(help="Column of timestamps; none to use the row order. Default: detected.")
    ] = None
    title: Annotated[str | None, OptionHelp(help="Column of item titles; none to use item IDs. Default: detected.")] = (
        None
    )
    fields: Annotated[
        str | None, OptionHelp(help="Comma-separated item feature columns; none for no features. Default: detected.")
    ] = None
    dates: Annotated[str | None, OptionHelp(help="Order of dates such as 03/04/2024: day-first or month-first.")] = None
    split: Annotated[
        str | None, OptionHelp(help="Column with the values train, valid and test; none to let llmrec split the data.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class InitOptions(TableOptions):
    """Options of `llmrec init`."""

    table: Annotated[
        str,
        OptionHelp(
            argument=True,
            metavar="TABLE",
            help="File, BOOK.xlsx#SHEET, folder, database (sqlite:///FILE, duckdb:///FILE, postgresql://...) or "
            "Hugging Face dataset (hf://NAME).",
        ),
    ]
    out: Annotated[Path | None, OptionHelp(help="Recipe file to write. Default: NAME.yaml.")] = None
    name: Annotated[str | None, OptionHelp(help="Name of the recipe. Default: the name of the table.")] = None
    text: Annotated[str | None, OptionHelp(help="Column of review texts; none to ignore texts. Default: detected.")] = (
        None
    )
    mend: Annotated[
        Path | None, OptionHelp(help="Write a repaired copy of the table to this file, and use the copy in the recipe.")
    ] = None
    force: Annotated[bool, OptionHelp(help="Overwrite an existing recipe or repaired table.")] = False


@dataclass(frozen=True, kw_only=True)
class AutoOptions(TableOptions):
    """Options of `llmrec auto`."""

    table: Annotated[
        str,
        OptionHelp(
            argument=True,
            metavar="TABLE",
            help="Table (as for llmrec init), or a recipe file that names the data.",
        ),
    ]
    budget: Annotated[
        str, OptionHelp(metavar="TIME", help="Time budget, such as 90s, 30m or 2h. A number without unit is minutes.")
    ] = "30m"
    out: Annotated[Path | None, OptionHelp(help="Run folder. Default: runs/NAME-auto.")] = None
    name: Annotated[str | None, OptionHelp(help="Name of the run. Default: the name of the table.")] = None
    users: Annotated[int, OptionHelp(help="Number of test users for the final evaluation.", least=1)] = 5000
    classic: Annotated[bool, OptionHelp(help="Do not fine-tune a language model, even if the budget allows it.")] = (
        False
    )
    rating: Annotated[str | None, OptionHelp(help="Column of ratings to ignore. Default: none.")] = None

    @property
    def seconds(self) -> float:
        """The time budget in seconds."""
        return budget_seconds(self.budget)


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Options of `llmrec tune`."""

    recipe: Annotated[
        str, OptionHelp(argument=True, metavar="RECIPE", help="Recipe file, such as recipes/quickstart.yaml.")
    ]
    over: Annotated[
        tuple[str, ...],
        OptionHelp(
            metavar="KEY=VALUES",
            help="Key to search and its values: a range such as 1e-4..1e-3 (log scale if it spans a factor of 10 or "
            "more) or a list such as 8,16,32. Repeatable.",
        ),
    ]
    overrides: Annotated[
        tuple[str, ...],
        OptionHelp(
            names=("--set",),
            metavar="KEY=VALUE",
            help="Recipe key to override in all trials, as KEY=VALUE. Repeatable.",
        ),
    ] = ()
    budget: Annotated[str, OptionHelp(metavar="TIME", help="Time budget of this call, such as 90s, 30m or 2h.")] = "2h"
    trials: Annotated[
        int | None, OptionHelp(least=1, help="Maximum number of trials. Default: as many as the budget allows.")
    ] = None
    metric: Annotated[
        str | None,
        OptionHelp(
            metavar="FAMILY/METRIC",
            help="Metric to optimise on validation users. Default: the main metric of the recipe's first task, in "
            "the order rating, sequential, direct, explanation, alignment, ctr, review, stars.",
        ),
    ] = None
    out: Annotated[Path | None, OptionHelp(help="Folder for the trials. Default: runs/NAME-tune.")] = None


def budget_seconds(text: str) -> float:
    """Return a ``--budget`` such as ``90s``, ``30m`` or ``1.5h`` in seconds; a bare number is minutes.

    Raises:
        RecipeError: If the text is not a time.
    """
    result = _BUDGET_PATTERN.fullmatch(text.strip().lower())
    unit = _UNIT_SECONDS.get(result[2] or "m") if result else None
    if result is None or unit is None or float(result[1]) <= 0:
        raise RecipeError(
            f"--budget {text!r} is not a duration; use one such as 90s, 30m or 2h", kind="bad-value", column="--budget"
        )
    return float(result[1]) * unit
