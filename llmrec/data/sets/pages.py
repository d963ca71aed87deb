"""Pages that describe data sets: which file holds what, in which form, under which names.

Those of published sets are ``llmrec/data/sets/*.yaml``. A page has the keys of `Known`, but for ``name``, and may have
a ``base``: the name of a published set, or another page beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from llmrec.data.read.text import Form
from llmrec.recipe.load import load_page
from llmrec.recipe.schema import Section
from llmrec.registry import SETS

# --------------------------------------------------------------------------- the keys of a page


class Events(Section):
    """The file of interactions, one a row.

    Attributes:
        files: Patterns of its name, without ``.gz`` and with ``.json`` for every sort of JSON Lines; the first that
            fits counts. What ``*`` stands for is the category.
        skip: Patterns of names that are something else.
        form: How it is written.
        user: Column of the user.
        item: Columns of the item; of several the first that is not blank.
        rating: Column of the rating.
        unrated: A number that means that there is no rating.
        time: Column of the time; without one, a seeded hash decides the order.
        clock: Formats of dates, UTC unless they say otherwise; none: seconds or milliseconds since 1970.
        texts: Columns with a text by the user; the first one is taken unless a recipe names another.
        title: Column with the item's title, where there is no file of items.
    """

    files: tuple[str, ...]
    skip: tuple[str, ...] = ()
    form: Form
    user: str
    item: Annotated[tuple[str, ...], Field(min_length=1)]
    rating: str | None = None
    unrated: float | None = None
    time: str | None = None
    clock: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    title: str | None = None


class Attribute(Section):
    """A further field of items or users.

    Attributes:
        name: What templates call it.
        column: Where it is.
        flags: Columns in place of it, each of which holds 1 where its name is one of the values.
        split: What separates several values inside one text.
        join: What stands between several values in the result.
        keep: A regular expression that the whole value must match; others count as missing.
        words: Codes with their meaning.
        missing: What stands for a missing value.
    """

    name: str
    column: str = ""
    flags: tuple[str, ...] = ()
    split: str | None = None
    join: str = ", "
    keep: str | None = None
    words: Mapping[str, str] = {}
    missing: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return self.flags or (self.column,)

    @model_validator(mode="after")
    def _has_columns(self) -> Self:
        if bool(self.column) == bool(self.flags):
            raise ValueError("name a column, or flags")
        return self

    @field_validator("keep")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"keep: {value!r} is no regular expression ({error})") from None
        return value


class Items(Section):
    """The file of items.

    Attributes:
        files: Patterns of its name; ``{}`` is the category of the file of interactions.
        form: How it is written.
        item: Column of the id.
        titles: Columns of the title; of several the first that is not blank.
        year: Column of the year, which is put behind titles in brackets.
        words: Titles with what they should be.
        junk: A piece of text that no real title holds.
        attributes: Further fields.
        film: Whether titles end in a year and carry their article last, as in ``"Fugitive, The (1993)"``.
        complete: Whether every item must have an entry and a title; otherwise its id stands in.
        gaps: Whether rows without an id are left out, since nobody can correct a published file; otherwise refused.
    """

    files: tuple[str, ...]
    form: Form
    item: str
    titles: tuple[str, ...]
    year: str | None = None
    words: Mapping[str, str] = {}
    junk: str | None = None
    attributes: tuple[Attribute, ...] = ()
    film: bool = False
    complete: bool = False
    gaps: bool = False


class People(Section):
    """The file of user profiles."""

    files: tuple[str, ...]
    form: Form
    user: str
    attributes: tuple[Attribute, ...]


class Renames(Section):
    """A file that says which item id of the interactions is which one in the file of items."""

    files: tuple[str, ...]
    form: Form
    old: str
    new: str


class Layout(Section):
    """The files of one variant of a set."""

    events: Events
    items: Items | None = None
    people: People | None = None
    renames: Renames | None = None


class Published(Section):
    """What the set's page or a paper says of the size of its files.

    Attributes:
        origin: Who says so.
        rounded: Whether the page rounds to tenths of a thousand or of a million.
        files: Users, items and interactions by the name of the file of interactions, without ``.gz`` and with ``.json``
            for JSON Lines; null where a number is not published.
    """

    origin: str
    rounded: bool = False
    files: Mapping[str, tuple[int | None, int | None, int]]

    def of(self, file: str) -> Counts | None:
        """Return the counts of a file of interactions; None where none are published."""
        return Counts(*self.files[file], self.origin, self.rounded) if file in self.files else None


class Known(Section):
    """A data set with files of its own form.

    Attributes:
        name: The source's name in recipes; of a page in a file of yours its path.
        noun: What its items are called, in the plural.
        scale: Lowest and highest rating.
        folders: Names of the folder or archive in which it is published.
        wheel: A folder in a package with its files, which is looked for first: ``PACKAGE/FOLDER``.
        page: Where it is published.
        fetch: Which files to fetch there.
        download: An archive that may be fetched without asking, into the cache folder; None: it is left to the user.
        md5: Of the archive.
        licence: Its terms, in one line.
        notes: What a user must know of the figures, such as that there are no times.
        layouts: Its variants.
        item_width: Characters of an item's id; a file whose users have as many, and whose items have not, has its
            columns in another order.
        counts: What is published of its size.
    """

    name: str
    noun: str = "items"
    scale: tuple[float, float] | None = None
    folders: tuple[str, ...] = ()
    wheel: str | None = None
    page: str = ""
    fetch: str = "its files"
    download: str | None = None
    md5: str | None = None
    licence: str = "not known"
    notes: tuple[str, ...] = ()
    layouts: Annotated[tuple[Layout, ...], Field(min_length=1)]
    item_width: int | None = None
    counts: Published | None = None

    @property
    def shipped(self) -> bool:
        """Whether it is one of the package's own, named by a word and not by a path."""
        return not self.name.lower().endswith((".yaml", ".yml"))


PAGE = (".yaml", ".yml")
"""What the path of a page ends with."""


def is_page(source: str) -> bool:
    """Whether a source is the path of a page."""
    return source.lower().endswith(PAGE)


def published() -> list[Known]:
    """Return all published sets, by name."""
    return [known(name) for name in sorted(SETS)]


def known(source: str) -> Known:
    """Return what a page says.

    Args:
        source: The name of a published set, or the path of a page.

    Raises:
        RecipeError: If there is no such page, or a key or a value is wrong; the message names file, line and key.
    """
    return load_page(Known, Path(source), {"name": source}, SETS) if is_page(source) else _published(source)


@cache
def _published(name: str) -> Known:
    return load_page(Known, SETS[name], {"name": name}, SETS)


# --------------------------------------------------------------------------- counts, and how data compares with them


@dataclass(frozen=True)
class Counts:
    """Numbers of users, of items and of interactions.

    Attributes:
        users: Users with an interaction; None where it is not published.
        items: Items with an interaction; None where it is not published.
        interactions: Rows.
        origin: Who says so.
        rounded: Whether the page rounds to tenths of a thousand or of a million.
    """

    users: int | None
    items: int | None
    interactions: int
    origin: str
    rounded: bool = False

    def agrees(self, other: Counts) -> bool:
        """Whether another count is the same, as far as this one says."""
        pairs = (
            (self.users, other.users),
            (self.items, other.items),
            (self.interactions, other.interactions),
        )
        return all(
            mine is None or (theirs is not None and abs(mine - theirs) <= self._slack(mine)) for mine, theirs in pairs
        )

    def _slack(self, number: int) -> int:
        if not self.rounded or number < 1000:
            return 0
        return 50_000 if number >= 1_000_000 else 50

    def __str__(self) -> str:
        parts = ((self.users, "users"), (self.items, "items"), (self.interactions, "interactions"))
        return " / ".join(f"{number:,} {what}" for number, what in parts if number is not None)


def comparison(known: Counts, here: Counts) -> tuple[str, bool]:
    """Say how data compares with what is published about its file.

    Args:
        known: What is published.
        here: What was read, before any filter.

    Returns:
        A sentence, and whether the counts differ.
    """
    if known.agrees(here):
        return f"as published: {known} ({known.origin})", False
    sentence = f"published: {known} ({known.origin}); here: {here}; expected when the file was filtered or cut"
    return sentence, True
