"""What `llmrec init` is asked for: a table, and what is known of its columns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llmrec.answer.options import About

if TYPE_CHECKING:
    from llmrec.start.init.roles import Asked


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """A table of interactions, where its recipe goes, and which column is what."""

    table: Annotated[
        str,
        About(
            argument=True,
            metavar="TABLE",
            help="A file, BOOK.xlsx#SHEET or a folder; or sqlite:///FILE, duckdb:///FILE, postgresql:// or hf://NAME.",
        ),
    ]
    items: Annotated[str | None, About(help="A second table, with one row an item.")] = None
    query: Annotated[str | None, About(help="What is asked of a database: one SELECT.")] = None
    out: Annotated[Path | None, About(help="The recipe; <name>.yaml by default.")] = None
    name: Annotated[str | None, About(help="The recipe's name; the table's by default.")] = None
    user: Annotated[str | None, About(help="Column of users.")] = None
    item: Annotated[str | None, About(help="Column of items.")] = None
    rating: Annotated[str | None, About(help="Column of ratings; none: leave them out.")] = None
    time: Annotated[str | None, About(help="Column of times; none: the order of the rows.")] = None
    title: Annotated[str | None, About(help="Column of item titles; none: ids stand in.")] = None
    text: Annotated[str | None, About(help="Column of texts by users; none: leave them out.")] = None
    fields: Annotated[str | None, About(help="Further item columns, A,B; none: no such.")] = None
    dates: Annotated[str | None, About(help="Order in dates such as 03/04/2024: day-first or month-first.")] = None
    split: Annotated[str | None, About(help="Column of the parts train, valid and test; none: draw a split.")] = None
    mend: Annotated[Path | None, About(help="Write a copy of the table with its faults fixed, and use that.")] = None
    force: Annotated[bool, About(help="Write over an existing recipe or copy.")] = False

    @property
    def asked(self) -> Asked:
        """What is known of columns."""
        from llmrec.start.init.roles import asked

        return asked(
            user=self.user,
            item=self.item,
            rating=self.rating,
            time=self.time,
            title=self.title,
            text=self.text,
            fields=self.fields,
            dates=self.dates,
            split=self.split,
        )
