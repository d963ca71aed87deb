"""Finds the columns of a table that a recipe means."""

from __future__ import annotations

import polars as pl

from llmrec.data.read.limits import enumerated, shown
from llmrec.data.read.nested import EACH, paths
from llmrec.data.read.text import Table
from llmrec.errors import DataError, did_you_mean
from llmrec.terminal import logger

log = logger(__name__)

NONE = "none"
"""What a key of ``data.columns`` says where no column is meant, though one has the name that llmrec looks for."""
_COMPULSORY = ("data.columns.user", "data.columns.item")


def find(table: Table, name: str | None, default: str, key: str) -> str | None:
    """Return the column that a recipe means.

    Args:
        table: Where to look.
        name: The recipe's value; None means ``default``, if there is such a column, and `NONE` none at all.
        default: llmrec's own name.
        key: The recipe's key, for the error.

    Raises:
        DataError: If the recipe names a column that is not there.
    """
    columns = table.frame.columns
    if name == NONE and name not in columns and key not in _COMPULSORY:
        return None
    check_usable(table, name or default, key)
    if name is None:
        return default if default in columns else None
    if name not in columns:
        known = [*columns, *paths(table)]
        raise DataError.at(
            table.name,
            "missing-column",
            f" has no column {name!r}{did_you_mean(name, known)}; its columns are: "
            f"{enumerated(known)}. Name the right one in the recipe as {key}=...",
            name,
        )
    return name


def check_usable(table: Table, column: str, key: str) -> None:
    """Refuse a column that is there and was left out, since nobody would notice.

    Raises:
        DataError: Naming what it holds.
    """
    if column not in table.unusable:
        return
    within = [path for path in (*table.frame.columns, *paths(table)) if path.startswith((f"{column}.", column + EACH))]
    what = f"holds {table.unusable[column]}, which cannot be used; write it as texts, numbers or dates"
    if within:
        what = f"holds {table.unusable[column]}; name a column within it, such as {enumerated(within[:4])}"
    raise DataError.at(
        table.name, "bad-value", f": column {column!r} {what}, or name another column as {key}=...", column
    )


def check_matched(name: str, own: pl.Series, known: pl.Series) -> None:
    """Refuse a table of users none of whom has interactions: its ids must be written otherwise.

    Args:
        name: Of the table.
        own: Its users.
        known: Users of the interactions.

    Raises:
        DataError: If it is one.
    """
    own, known = (each.cast(pl.String).unique() for each in (own, known))
    found = int(known.is_in(own.implode()).sum())
    if not found:
        raise DataError.at(
            name,
            "mismatch",
            f" (data.users): none of its {len(own)} users, such as {shown(str(own.sort()[0]))}, has an interaction; "
            f"there users are called such as {shown(str(known.sort()[0]))}, so write their ids alike in both tables",
        )
    if 2 * found < len(known):
        log.warning("%s (data.users): %d of %d users are not in it", name, len(known) - found, len(known))
