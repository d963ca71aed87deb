"""Loads a published data set from its files, according to a description in `llmrec.data.sets.pages`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from llmrec.data.assemble import build_dataset, build_provenance, check_column_settings
from llmrec.data.dataset import Dataset
from llmrec.data.read.codes import PAIR_COLUMNS
from llmrec.data.read.columns import ColumnKind, row_location_table
from llmrec.data.read.files import DataFile
from llmrec.data.read.markup import has_markup, remove_markup
from llmrec.data.read.objects import value_text
from llmrec.data.read.table import read_blocks, read_records
from llmrec.data.read.tables import Table
from llmrec.data.read.typed import TimeUnit, date_column, epoch_column, id_column, number_column, plain_text_column
from llmrec.data.sets.locate import LocatedFiles, locate_files
from llmrec.data.sets.pages import (
    Attribute,
    DatasetSize,
    InteractionFile,
    ItemFile,
    ItemIdMap,
    KnownFormat,
    UserFile,
    known_formats,
    read_known_format,
)
from llmrec.errors import DataError, Location
from llmrec.recipe.schema import DataSection
from llmrec.terminal import warn_once_logger
from llmrec.types import Item

log = warn_once_logger(__name__)

NO_TEXT = "none"
"""Value of ``data.columns.text`` that excludes texts."""
_NO_TIMESTAMP = 0.0
_YEAR = "year"


def load_published(section: DataSection, *, seed: int) -> Dataset:
    """Load the data set that ``data.source`` names.

    Raises:
        RecipeError: If its description has an invalid key or value.
        DataError: If a file is missing or damaged, or has an invalid row.
    """
    return load_from_description(read_known_format(section.source), section)


# --------------------------------------------------------------------------- loading


def load_from_description(page: KnownFormat, section: DataSection) -> Dataset:
    """Load a published data set from its description.

    Args:
        page: Its description.
        section: The recipe's ``data`` or ``reviews``.

    Raises:
        DataError: If a file is missing or damaged, or has an invalid row.
    """
    check_column_settings(section, page.name, "text")
    located = locate_files(page, section.path, section.items)
    spec = located.layout.events
    events = read_events(located.events, spec, _select_text_column(page, spec, section))
    _check_column_order(page, events.frame, located.events.name)
    item_ids = set(events.frame["item_id"].unique())
    items, notes = read_published_catalogue(located, item_ids, events.titles)
    people: dict[str, dict[str, str]] = {}
    if located.people is not None and located.layout.people is not None:
        people = read_user_profiles(located.people, located.layout.people)
    notes = (*page.notes, *notes)
    if spec.time is None:
        notes += ("the data have no timestamps: a seeded hash orders the items of a user",)
    return build_dataset(
        section,
        events.table,
        events.frame,
        items,
        name="-".join(filter(None, (page.name, located.category.lower()))),
        provenance=build_provenance(
            page.name,
            (located.events, located.items, located.people, located.renames),
            rows=events.frame.height,
            licence=page.licence,
            more=compare_with_published(page, located.events.plain, events.frame),
            notes=notes,
        ),
        users=people,
        noun=page.noun,
        scale=page.scale,
    )


def compare_with_published(page: KnownFormat, file: str, frame: pl.DataFrame) -> dict[str, str]:
    """Return the provenance entries about published sizes, and warn if the sizes differ."""
    counted = page.published_size(file)
    if counted is None:
        return {}
    here = DatasetSize(frame["user_id"].n_unique(), frame["item_id"].n_unique(), frame.height, "here")
    if counted.agrees(here):
        return {"published": f"as published: {counted} ({counted.origin})"}
    note = f"published: {counted} ({counted.origin}); here: {here}. This is expected if the file was filtered or cut"
    log.warning("%s: %s", page.name, note)
    return {"published": note}


def _check_column_order(page: KnownFormat, frame: pl.DataFrame, file: str) -> None:
    """Reject columns in the order of another edition, whose values would be wrong."""
    if page.item_width is None:
        return
    first = frame.head(1000)
    users, items = (first[column].cast(pl.String).str.len_chars().eq(page.item_width).mean() for column in PAIR_COLUMNS)
    if isinstance(users, float) and isinstance(items, float) and users > 0.9 and items < 0.1:
        others = " and ".join(
            f"{other.name!r} for {','.join(layout.events.form.columns)}"
            for other in known_formats()
            for layout in other.layouts
            if other.item_width and layout.events.form.columns
        )
        raise DataError(
            f"{file}: the user column contains product ids, so this is another edition; use the source {others}",
            kind="wrong-format",
            at=file,
        )


def _select_text_column(known: KnownFormat, events: InteractionFile, section: DataSection) -> str | None:
    column = section.columns.text
    if column is None:
        return events.texts[0] if events.texts else None
    if column == NO_TEXT:
        return None
    if column not in events.texts:
        raise DataError(
            f"data.columns.text={column}: the texts of source {known.name!r} in this file are: "
            f"{', '.join(events.texts) or 'none'}; use one of them, or {NO_TEXT} for no texts",
            kind="unknown-name",
            column="data.columns.text",
        )
    return column


# --------------------------------------------------------------------------- interactions


@dataclass(frozen=True)
class PublishedEvents:
    """Interactions read from a file, with their rows.

    Attributes:
        frame: Columns of `llmrec.data.dataset.SCHEMA`.
        table: Locates their rows for errors.
        titles: Titles by item, if they are stored with the interactions.
    """

    frame: pl.DataFrame
    table: Table
    titles: Mapping[str, str]


def read_events(member: DataFile, spec: InteractionFile, text: str | None, also: Sequence[str] = ()) -> PublishedEvents:
    """Read interactions.

    Args:
        member: The file.
        spec: Its description.
        text: The column for texts.
        also: Further text columns with optional values; in the frame under their own names.

    Raises:
        DataError: If a row is invalid; the message names it.
    """
    wanted: dict[str, ColumnKind] = dict.fromkeys((spec.user, spec.item[0]), "text")
    wanted |= dict.fromkeys((*spec.item[1:], *also, *(column for column in (text, spec.title) if column)), "maybe")
    if spec.rating is not None:
        wanted[spec.rating] = "number"
    if spec.time is not None:
        wanted[spec.time] = "text" if spec.clock else "number"
    unit: TimeUnit | None = None
    frames: list[pl.DataFrame] = []
    lines: list[Sequence[int]] = []
    titles: dict[str, str] = {}
    for block in read_blocks(member, spec.form, wanted):
        series = {"user_id": id_column(block, spec.user), "item_id": id_column(block, *spec.item)}
        if spec.rating is not None:
            series["rating"] = number_column(block, spec.rating, "rating", absent=spec.unrated)
        if spec.time is None:
            series["timestamp"] = pl.Series([_NO_TIMESTAMP]).new_from_index(0, block.frame.height)
        elif spec.clock:
            series["timestamp"] = date_column(block, spec.time, spec.clock)
        else:
            series["timestamp"], unit = epoch_column(block, spec.time, unit)
        if text is not None:
            series["text"] = plain_text_column(block, text)
        series |= {column: plain_text_column(block, column) for column in also}
        frames.append(pl.DataFrame(series))
        lines.append(block.lines or ())
        if spec.title is not None:
            rows = pl.DataFrame({"item": series["item_id"], "title": plain_text_column(block, spec.title)}).drop_nulls()
            titles = dict(rows.unique("item", keep="first", maintain_order=True).iter_rows()) | titles
    return PublishedEvents(pl.concat(frames), row_location_table(member.name, lines), titles)


# --------------------------------------------------------------------------- items and users


def read_published_catalogue(
    located: LocatedFiles, item_ids: set[str], titles: Mapping[str, str]
) -> tuple[dict[str, Item], tuple[str, ...]]:
    """Return the `Item` of every item id, with the titles and fields that were read, and notes for the user.

    Args:
        located: The files of the data set.
        item_ids: The wanted items.
        titles: Titles stored with the interactions, by item.

    Raises:
        DataError: If a row of the file of items is invalid.
    """
    spec = located.layout.items
    if spec is None or located.items is None:
        titles = {item: title for item, title in titles.items() if not has_markup(title)}
        items = {item: Item(item_id=item, title=titles.get(item, item)) for item in item_ids}
        return items, warn_of_untitled_items(located.where, len(item_ids - titles.keys()), len(items))
    names = {item: item for item in item_ids}
    if located.renames is not None and located.layout.renames is not None:
        # An item that the renaming file lacks gets no entry, even if its number is the id of another item.
        names = dict.fromkeys(item_ids, "") | _read_id_map(located.renames, located.layout.renames, item_ids)
    listed = read_items(located.items, spec, set(names.values()))
    blank = {attribute.name: attribute.missing for attribute in spec.attributes}
    items = {}
    missing = 0
    for item, name in names.items():
        title, fields = listed.entries.get(name, (None, blank))
        if title is None and spec.complete:
            continue  # the check of interactions names the row
        missing += title is None
        items[item] = Item(item_id=item, title=title or item, fields=fields)
    untitled = warn_of_untitled_items(located.items.name, missing, len(items))
    return items, untitled + listed.notes(located.items.name)


def warn_of_untitled_items(where: str, missing: int, total: int) -> tuple[str, ...]:
    """Warn if items have no title, and return a note about them."""
    if not missing:
        return ()
    note = (
        f"{missing} of {total} items have no title in {where}; prompts show their ids instead, which contain little "
        "information"
    )
    log.warning("%s", note)
    return (note,)


def _read_id_map(member: DataFile, spec: ItemIdMap, item_ids: set[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for block in read_blocks(member, spec.form, {spec.old: "text", spec.new: "text"}):
        chosen = block.frame.filter(pl.col(spec.old).is_in(item_ids))
        names |= dict(chosen.select(spec.old, spec.new).iter_rows())
    return names


ItemEntries = dict[str, tuple[str | None, dict[str, str]]]
"""Title and fields by item; the title is None if it is missing."""


@dataclass(frozen=True)
class PublishedItems:
    """The titles and fields read from a file of items.

    Attributes:
        entries: Entries of the wanted items.
        repeated: Rows that list an item again.
        nameless: Rows without an id.
        markup: Items with HTML instead of a title.
    """

    entries: ItemEntries
    repeated: int
    nameless: int
    markup: int

    def notes(self, file: str) -> tuple[str, ...]:
        """Warn of missing titles or fields, and return notes on them."""
        lost = {
            f"{self.nameless} rows of {file} have no id and are ignored": self.nameless,
            f"{self.markup} titles in {file} are HTML and count as missing": self.markup,
        }
        result = tuple(note for note, count in lost.items() if count)
        for note in result:
            log.warning("%s", note)
        again = f"{file} repeats {self.repeated} items; the first entry is used"
        return (*result, again) if self.repeated else result


def read_items(member: DataFile, spec: ItemFile, wanted: set[str]) -> PublishedItems:
    """Read the titles and fields of items.

    Args:
        member: The file.
        spec: Its description.
        wanted: Ids of the items to keep.

    Raises:
        DataError: If a row is invalid, or lacks a required title.
    """
    result: ItemEntries = {}
    repeated = nameless = markup = 0
    named = (spec.item, *spec.titles, *(column for attribute in spec.attributes for column in attribute.columns))
    columns = dict.fromkeys((*named, *((spec.year,) if spec.year else ())))
    for location, row in read_records(member, spec.form, list(columns)):
        item = value_text(location, spec.item, row.get(spec.item))
        if not item.strip():
            if not spec.gaps:
                raise DataError.at(
                    location, "missing-value", f": column {spec.item!r} is empty; every item needs an id", spec.item
                )
            nameless += 1
            continue
        if item not in wanted:
            continue
        if item in result:
            repeated += 1
            continue
        titles = [title for name in spec.titles if (title := _item_title(location, spec, name, row))]
        title = next((name for name in titles if not has_markup(name)), None)
        markup += title is None and bool(titles)
        if title is None and spec.complete:
            raise DataError.at(
                location,
                "missing-value",
                f": column {spec.titles[0]!r} is empty; every item needs a title",
                spec.titles[0],
            )
        fields = {attribute.name: format_attribute(location, attribute, row) for attribute in spec.attributes}
        if spec.film and title is not None:
            title, fields[_YEAR] = movie_title(title)
        result[item] = (title, fields)
    return PublishedItems(result, repeated, nameless, markup)


def _item_title(location: Location, spec: ItemFile, column: str, row: Mapping[str, object]) -> str | None:
    title = remove_markup(value_text(location, column, row.get(column))).strip()
    if not title or (spec.junk is not None and spec.junk in title):
        return None
    year = value_text(location, spec.year, row.get(spec.year)).strip() if spec.year else ""
    return spec.words.get(title) or (f"{title} ({year})" if year else title)


def read_user_profiles(member: DataFile, spec: UserFile) -> dict[str, dict[str, str]]:
    """Read the profiles of users.

    Raises:
        DataError: If a row is invalid.
    """
    people = {}
    columns = [spec.user, *(column for attribute in spec.attributes for column in attribute.columns)]
    for location, row in read_records(member, spec.form, columns):
        user = value_text(location, spec.user, row.get(spec.user))
        if not user.strip():
            raise DataError.at(
                location, "missing-value", f": column {spec.user!r} is empty; every profile needs a user", spec.user
            )
        people[user] = {attribute.name: format_attribute(location, attribute, row) for attribute in spec.attributes}
    return people


def format_attribute(location: Location, attribute: Attribute, row: Mapping[str, object]) -> str:
    """Return an additional field as one text: lists joined, codes replaced by words, HTML removed."""
    if attribute.flags:
        value: object = [flag for flag in attribute.flags if value_text(location, flag, row.get(flag)).strip() == "1"]
    else:
        value = row.get(attribute.column)
    if isinstance(value, list) and value and all(isinstance(path, list) for path in value):
        value = value[0]  # of several category paths, the first is the main one
    if isinstance(value, list):
        parts = [value_text(location, attribute.column, part) for part in value]
    else:
        text = value_text(location, attribute.column, value)
        parts = text.split(attribute.split) if attribute.split else [text]
    cleaned = ["" if has_markup(part) else part for part in (remove_markup(part).strip() for part in parts)]
    joined = attribute.join.join(attribute.words.get(part, part) for part in cleaned if part)
    if attribute.keep is not None and not re.fullmatch(attribute.keep, joined):
        return attribute.missing
    return joined or attribute.missing


# --------------------------------------------------------------------------- movie titles

_TITLE_WITH_YEAR = re.compile(r"^(?P<title>.*?)\s*\((?P<years>(?P<year>\d{4})(?:[-–]\d{0,4})?)\)(?:\s*\((?:V|TV)\))?$")
_TRAILING_ARTICLE = re.compile(
    r"^(?P<also>a\.k\.a\. )?(?P<rest>.+), (?P<article>The|An?|Le|La|Les|L'|Il|El|Los|Las|Das|Der|Die|De[nt])$"
)
_FOREIGN_TRAILING_ARTICLE = re.compile(r"^(?P<also>a\.k\.a\. )?(?P<rest>.+), (?P<article>I|O|De|Un[ae]?)$")
_BRACKET = re.compile(r"\(([^()]*)\)")


def movie_title(raw: str) -> tuple[str, str]:
    """Return the title of a movie in the usual form with its year, and the year.

    ``"Fugitive, The (1993)"`` becomes ``"The Fugitive (1993)"``; articles in further titles in parentheses are moved
    too. The year is ``"unknown"`` if the title has none.
    """
    ending = _TITLE_WITH_YEAR.match(raw.strip())
    title = ending["title"] if ending else raw.strip()
    head, bracket, tail = title.partition(" (")
    further = _BRACKET.sub(lambda match: f"({_move_article_first(match[1], foreign=True)})", bracket + tail)
    full_title = _move_article_first(head) + further
    return (f"{full_title} ({ending['years']})", ending["year"]) if ending else (full_title, "unknown")


def _move_article_first(title: str, *, foreign: bool = False) -> str:
    match = _TRAILING_ARTICLE.match(title) or (_FOREIGN_TRAILING_ARTICLE.match(title) if foreign else None)
    if match is None:
        return title
    gap = "" if match["article"].endswith("'") else " "
    return f"{match['also'] or ''}{match['article']}{gap}{match['rest']}"
