"""Tells published sets by the columns of their files, for tables that are read as the user's own."""

from __future__ import annotations

from collections.abc import Collection

from llmrec.data.sources.sets import published
from llmrec.data.sources.spec import Layout

# What anybody may call a column.
_COMMON = frozenset(
    ("user", "user_id", "item", "item_id", "id", "product_id", "rating", "time", "timestamp", "date", "title", "text")
)


def sources_with(columns: Collection[str]) -> tuple[str, ...]:
    """Return the names of the published sets whose files of interactions have what a table's columns are called.

    A set is named only if its users and its items stand under names of their own; files without a header have none.
    """
    return tuple(each.name for each in published() if any(_fits(layout, columns) for layout in each.layouts))


def _fits(layout: Layout, columns: Collection[str]) -> bool:
    events = layout.events
    if events.form.columns:
        return False
    names = {events.user, *events.item, *(name for name in (events.rating, events.time) if name is not None)}
    return names <= set(columns) and not {events.user, *events.item} & _COMMON
