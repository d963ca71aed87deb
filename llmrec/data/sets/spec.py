"""The keys of a page that describes a data set: which file holds what, in which form, under which names.

`llmrec.data.sets.pages` reads such pages; those of published sets are ``llmrec/data/sets/*.yaml``.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator

from llmrec.data.sets.counts import Counts
from llmrec.recipe.schema import Section


class Form(Section):
    """How a file is written.

    Attributes:
        kind: ``json``: one JSON object a line; ``dicts``: one JSON object or Python dictionary a line.
        separator: Between the fields of delimited text; may be longer than one character.
        columns: Names of the columns of a file without a header.
        quoted: Whether a double quote opens a field in which separators and line breaks are text.
        encodings: The first one in which the whole file can be read is taken.
    """

    kind: Literal["delimited", "json", "dicts"]
    separator: Annotated[str, Field(min_length=1)] = ","
    columns: tuple[str, ...] = ()
    quoted: bool = False
    encodings: Annotated[tuple[str, ...], Field(min_length=1)] = ("utf-8",)

    @field_validator("encodings")
    @classmethod
    def _are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            try:
                codecs.lookup(name)
            except LookupError:
                raise ValueError(f"encodings: there is no encoding {name!r}; write one such as utf-8") from None
        return value


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
        column: Where it stands.
        split: What separates several values inside one text.
        join: What stands between several values in the result.
        keep: A regular expression that the whole value must match; others count as missing.
        words: Codes with their meaning.
        missing: What stands for a missing value.
    """

    name: str
    column: str
    split: str | None = None
    join: str = ", "
    keep: str | None = None
    words: Mapping[str, str] = {}
    missing: str = ""

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
        page: Where it is published.
        fetch: Which files to fetch there.
        download: An archive that may be fetched without asking, into the cache folder; None: it is left to the user.
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
    page: str = ""
    fetch: str = "its files"
    download: str | None = None
    licence: str = "not known"
    notes: tuple[str, ...] = ()
    layouts: Annotated[tuple[Layout, ...], Field(min_length=1)]
    item_width: int | None = None
    counts: Published | None = None

    @property
    def shipped(self) -> bool:
        """Whether it is one of the package's own, named by a word and not by a path."""
        return not self.name.lower().endswith((".yaml", ".yml"))
