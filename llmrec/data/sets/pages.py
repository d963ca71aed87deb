"""Descriptions of published data sets: files, formats and column names.

Those of published data sets are ``llmrec/data/sets/*.yaml``. A description has the keys of `KnownFormat`, except
``name``, and may have a ``base``: the name of a published data set, or a description next to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from llmrec.data.read.text import TextFormat
from llmrec.recipe.load import load_yaml_model
from llmrec.recipe.schema import Section
from llmrec.registry import DATA_SETS

# --------------------------------------------------------------------------- keys of a description


class InteractionFile(Section):
    """Describes a file of interactions, one per row.

    Attributes:
        files: Patterns of its name, without ``.gz`` and with ``.json`` for all JSON Lines endings; the first that
            matches counts. The text that ``*`` matches is the category.
        skip: Patterns of names of other files.
        form: Its format.
        user: Column of the user.
        item: Columns of the item; the first that is not blank counts.
        rating: Column of the rating.
        unrated: A number that means a missing rating.
        time: Column of the time; without it, a seeded hash decides the order.
        clock: Formats of dates, in UTC unless they have an offset; empty: seconds or milliseconds since 1970.
        texts: Columns with texts of the user; the first one is used unless a recipe names another.
        title: Column with the item's title, if there is no file of items.
    """

    files: tuple[str, ...]
    skip: tuple[str, ...] = ()
    form: TextFormat
    user: str
    item: Annotated[tuple[str, ...], Field(min_length=1)]
    rating: str | None = None
    unrated: float | None = None
    time: str | None = None
    clock: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    title: str | None = None


class Attribute(Section):
    """Describes an additional field of items or users.

    Attributes:
        name: Its name in templates.
        column: Its column.
        flags: Columns that replace it, each with 1 in the rows for which the column's name is a value.
        split: Separator of values in the column.
        join: Separator of values in the result.
        keep: A regular expression that the whole value must match; other values count as missing.
        words: Meanings of codes.
        missing: Text that means a missing value.
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
        """Columns from which the field is read."""
        return self.flags or (self.column,)

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        if bool(self.column) == bool(self.flags):
            raise ValueError("name a column, or flags")
        return self

    @field_validator("keep")
    @classmethod
    def _check_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"keep: {value!r} is not a regular expression ({error})") from None
        return value


class ItemFile(Section):
    """Describes a file of items.

    Attributes:
        files: Patterns of its name; ``{}`` is the category of the file of interactions.
        form: Its format.
        item: Column of the id.
        titles: Columns of the title; the first that is not blank counts.
        year: Column of the year, appended to titles in parentheses.
        words: Corrections of titles.
        junk: Text that no valid title contains.
        attributes: Additional fields.
        film: Whether titles end in a year and have their article last, as in ``"Fugitive, The (1993)"``.
        complete: Whether every item must have an entry and a title; otherwise its id is used.
        gaps: Whether rows without an id are skipped, since a published file cannot be corrected; otherwise an error.
    """

    files: tuple[str, ...]
    form: TextFormat
    item: str
    titles: tuple[str, ...]
    year: str | None = None
    words: Mapping[str, str] = {}
    junk: str | None = None
    attributes: tuple[Attribute, ...] = ()
    film: bool = False
    complete: bool = False
    gaps: bool = False


class UserFile(Section):
    """Describes a file of user profiles."""

    files: tuple[str, ...]
    form: TextFormat
    user: str
    attributes: tuple[Attribute, ...]


class ItemIdMap(Section):
    """A file that maps item ids of interactions to ids of the item file."""

    files: tuple[str, ...]
    form: TextFormat
    old: str
    new: str


class Layout(Section):
    """The files of a data set in one of its published variants."""

    events: InteractionFile
    items: ItemFile | None = None
    people: UserFile | None = None
    renames: ItemIdMap | None = None


class PublishedSizes(Section):
    """The published size of a data set, from its web page or a paper.

    Attributes:
        origin: The source of the numbers.
        rounded: Whether they are rounded to tenths of a thousand or of a million.
        files: Users, items and interactions by the name of the file of interactions, without ``.gz`` and with ``.json``
            for JSON Lines; null for an unpublished number.
    """

    origin: str
    rounded: bool = False
    files: Mapping[str, tuple[int | None, int | None, int]]


class KnownFormat(Section):
    """A data set with a known file format.

    Attributes:
        name: The source's name in recipes; for a user's description its path.
        noun: Name of its items, in the plural.
        scale: Lowest and highest rating.
        folders: Names of the published folder or archive.
        wheel: A folder with its files in a package, which is searched first: ``PACKAGE/FOLDER``.
        page: URL of its web page.
        fetch: Files to download there.
        download: An archive that is downloaded to the cache automatically; None: the user downloads it.
        md5: MD5 of the archive.
        licence: Its terms, in one line.
        notes: What users need to know about results, such as missing timestamps.
        layouts: Its variants.
        item_width: Characters of an item's id; a file with user ids of that width, and item ids of another, has the
            column order of another edition.
        counts: The published sizes.
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
    counts: PublishedSizes | None = None

    def published_size(self, file: str) -> DatasetSize | None:
        """Return the published size of a file of interactions; None if it is not published."""
        if self.counts is None or file not in self.counts.files:
            return None
        return DatasetSize(*self.counts.files[file], self.counts.origin, self.counts.rounded)


def is_description_path(source: str) -> bool:
    """Whether a source is the path of a data set description."""
    return source.lower().endswith((".yaml", ".yml"))


def known_formats() -> list[KnownFormat]:
    """Return the descriptions of all included data sets, sorted by name."""
    return [read_known_format(name) for name in sorted(DATA_SETS)]


def read_known_format(source: str) -> KnownFormat:
    """Return the description of a data set.

    Args:
        source: The name of a published data set, or the path of a description.

    Raises:
        RecipeError: If it is missing, or has an invalid key or value; the message names file, line and key.
    """
    return (
        load_yaml_model(KnownFormat, Path(source), {"name": source}, DATA_SETS)
        if is_description_path(source)
        else _read_shipped_format(source)
    )


@cache
def _read_shipped_format(name: str) -> KnownFormat:
    return load_yaml_model(KnownFormat, DATA_SETS[name], {"name": name}, DATA_SETS)


# --------------------------------------------------------------------------- comparison with published counts


@dataclass(frozen=True)
class DatasetSize:
    """The numbers of users and items with an interaction, None if not published, and of rows; see `PublishedSizes`."""

    users: int | None
    items: int | None
    interactions: int
    origin: str
    rounded: bool = False

    def agrees(self, other: DatasetSize) -> bool:
        """Whether two sizes agree in all numbers that both have."""
        pairs = ((self.users, other.users), (self.items, other.items), (self.interactions, other.interactions))
        return all(
            mine is None or (theirs is not None and abs(mine - theirs) <= self._rounding_tolerance(mine))
            for mine, theirs in pairs
        )

    def _rounding_tolerance(self, number: int) -> int:
        if not self.rounded or number < 1000:
            return 0
        return 50_000 if number >= 1_000_000 else 50

    def __str__(self) -> str:
        parts = ((self.users, "users"), (self.items, "items"), (self.interactions, "interactions"))
        return " / ".join(f"{number:,} {what}" for number, what in parts if number is not None)
