"""Writes the items of ``eval/suites/chat_loop.yaml``: films with genres, year, directors and countries.

``LLMREC_DATA=FOLDER python -m eval.benchmarks.chat_items`` joins the films of MovieLens-100K with FOLDER/movie_facts
(HetRec 2011) by title and year, into ``runs/chat/items.csv``. HetRec's terms do not allow redistribution.
"""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from eval.benchmarks.kar import table
from llmrec.chat.reading import spoken_title
from llmrec.durable import write_text
from llmrec.index.titles import title_key
from llmrec.pipeline.study import load_tables
from llmrec.recipe.load import load_recipe
from llmrec.types import Item

RECIPE, TARGET = "recipes/movielens-100k/four-tasks.yaml", Path("runs/chat/items.csv")


def informed(items: Mapping[str, Item], folder: Path) -> dict[str, Item]:
    """Return items with directors and countries, joined by title and year."""
    known = {}
    for row in table(folder / "movie_facts" / "hetrec_facts.tsv.gz").iter_rows(named=True):
        known[title_key(spoken_title(row["title"] or "")), str(row["year"])] = row
    result = {}
    for name, item in items.items():
        row = known.get((title_key(spoken_title(item.title)), item.fields.get("year", "")))
        more = (
            {}
            if row is None
            else {"director": str(row["directors"] or "").replace("|", ", "), "country": str(row["country"] or "")}
        )
        result[name] = replace(item, fields={**item.fields, **{key: value for key, value in more.items() if value}})
    return result


def written(items: Mapping[str, Item]) -> str:
    """Return items as CSV, with empty cells for missing fields."""
    fields = list(dict.fromkeys(field for item in items.values() for field in item.fields))
    lines = io.StringIO()
    rows = csv.writer(lines, lineterminator="\n")
    rows.writerow(["item_id", "title", *fields])
    rows.writerows(
        [item.item_id, item.title, *(item.fields.get(name, "") for name in fields)] for item in items.values()
    )
    return lines.getvalue()


def main() -> None:
    """Write the table."""
    items = load_tables(load_recipe(RECIPE))[0].dataset.items
    films = informed(items, Path(os.environ.get("LLMREC_DATA", ".")))
    write_text(TARGET, written(films))
    with_one = sum("director" in item.fields for item in films.values())
    sys.stdout.write(f"{TARGET}: {len(films)} films, {with_one} with a director\n")


if __name__ == "__main__":
    main()
