"""Titles and fields of a table's items, from a table of items or from the interactions themselves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from llmrec.data.columns import check_usable, find, ids, one_per_item, texts
from llmrec.data.files import Table
from llmrec.data.opening import enumerated, shown
from llmrec.data.typed import has_markup
from llmrec.errors import DataError, did_you_mean
from llmrec.recipe import DataSection
from llmrec.types import Item

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Listing:
    """A table whose rows are about items, and the item of each row."""

    table: Table
    item_ids: pl.Series
    unique: bool

    def column(self, name: str) -> dict[str, str]:
        """Return a column's text by item; where rows disagree, the most frequent one."""
        if self.unique:
            return dict(zip(self.item_ids, texts(self.table, name), strict=True))
        return one_per_item(self.table, self.item_ids, name)


def catalogue(section: DataSection, interactions: Table, item_ids: pl.Series, items: Table | None) -> dict[str, Item]:
    """Return the entries of all items that have interactions.

    A column is taken from the table of items, and from the interactions if it is not there. Items that the
    table of items lacks have no entry.

    Args:
        section: The recipe's section.
        interactions: The table of interactions.
        item_ids: The item of each of its rows.
        items: The table of items, if there is one.

    Raises:
        DataError: If a column is in neither table, an item is listed twice, or a title is missing.
    """
    listings = [_Listing(interactions, item_ids, False)]
    known = item_ids.unique(maintain_order=True).to_list()
    if items is not None:
        listing = _listing(section, items)
        listings.insert(0, listing)
        listed = set(listing.item_ids)
        known = [item for item in known if item in listed]
    fields = {
        name: _source(listings, name, f"data.columns.fields=[{name}]").column(name) for name in section.columns.fields
    }
    titles = _titles(section, listings, known)
    return {
        item: Item(
            item_id=item,
            title=titles.get(item, item),
            fields={name: values.get(item, "") for name, values in fields.items()},
        )
        for item in known
    }


def _listing(section: DataSection, items: Table) -> _Listing:
    column = find(items, section.columns.item, "item_id", "data.columns.item") or ""
    item_ids = ids(items, column)
    again = (~item_ids.is_first_distinct()).arg_true()
    if again.len() and section.duplicates == "error":
        raise DataError(
            f"{items.where(again[0])} repeats item {shown(item_ids[again[0]])} ({again.len()} such rows); "
            "drop the repeats, or set data.duplicates=keep_last to keep the last of each"
        )
    return _Listing(items, item_ids, True)


def _source(listings: list[_Listing], column: str, setting: str) -> _Listing:
    for listing in listings:
        if column in listing.table.frame.columns:
            return listing
    for listing in listings:
        check_usable(listing.table, column, setting.partition("=")[0])
    columns = [name for listing in listings for name in listing.table.frame.columns]
    raise DataError(
        f"{' and '.join(listing.table.name for listing in listings)}: there is no column {column!r}"
        f"{did_you_mean(column, columns)}; the columns are: {enumerated(columns)}. "
        f"Name the right one in the recipe as {setting}"
    )


def _titles(section: DataSection, listings: list[_Listing], known: list[str]) -> Mapping[str, str]:
    """Return titles by item; empty where the source has no titles, so that ids stand in for them.

    An id stands in for a title that is HTML too, after a warning.
    """
    column = section.columns.title or "title"
    for listing in listings:
        check_usable(listing.table, column, "data.columns.title")
    if section.columns.title is None and not any(column in listing.table.frame.columns for listing in listings):
        return {}
    listing = _source(listings, column, "data.columns.title=NAME")
    titles = listing.column(column)
    for item in known:
        if not titles.get(item, "").strip():
            rows = (listing.item_ids == item).arg_true()
            row = rows[-1] if listing.unique else rows[0]
            raise DataError(
                f"{listing.table.where(row)}: item {shown(item)} has no title in column {column!r}; "
                "give it one, or drop the item"
            )
    scraped = [item for item in known if has_markup(titles[item])]
    if scraped:
        log.warning(
            "%d of %d items have HTML in place of a title in column %r of %s, such as %s; their ids stand in, which "
            "say little to a model",
            *(len(scraped), len(known), column, listing.table.name, shown(titles[scraped[0]])),
        )
    return titles | dict(zip(scraped, scraped, strict=True))
