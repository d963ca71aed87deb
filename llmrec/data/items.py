"""A table of items by itself, without interactions: ids, titles and further fields."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmrec.data.columns import ids, texts
from llmrec.data.hashing import digest_strings
from llmrec.data.opening import enumerated, no_file, shown
from llmrec.data.tables import read_table
from llmrec.errors import DataError, did_you_mean
from llmrec.types import Item


def read_items(path: Path) -> dict[str, Item]:
    """Read a table with the columns ``item_id`` and ``title``; every other column is a field.

    An item with a blank title stays in the table: whoever needs its text finds that there is none.

    Raises:
        DataError: If the file cannot be read, a column is missing, or an id stands twice.
    """
    problem = no_file(path)
    if problem:
        raise DataError(f"the table of items {path} {problem}; check --items")
    table = read_table(path)
    columns = table.frame.columns
    for name in ("item_id", "title"):
        if name in table.unusable:
            raise DataError(f"{table.name}: column {name!r} holds {table.unusable[name]}; write it as texts")
        if name not in columns:
            raise DataError(
                f"{table.name} has no column {name!r}{did_you_mean(name, columns)}; its columns are: "
                f"{enumerated(columns)}. Rename the one that holds it"
            )
    item_ids = ids(table, "item_id")
    again = (~item_ids.is_first_distinct()).arg_true()
    if again.len():
        raise DataError(
            f"{table.where(again[0])} repeats item {shown(item_ids[again[0]])} ({again.len()} such rows); keep one of "
            "each"
        )
    fields = {name: texts(table, name).to_list() for name in columns if name not in ("item_id", "title")}
    return {
        item: Item(item_id=item, title=title, fields={name: values[row] for name, values in fields.items()})
        for row, (item, title) in enumerate(zip(item_ids, texts(table, "title"), strict=True))
    }


def digest_items(items: Mapping[str, Item]) -> str:
    """Return a SHA-256 over ids, titles and fields; the order of items does not matter."""
    return digest_strings(
        part
        for item_id, item in sorted(items.items())
        for part in (item_id, item.title, *(text for pair in sorted(item.fields.items()) for text in pair), None)
    )
