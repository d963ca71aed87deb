"""Loads sequences without timestamps: one line per user with items oldest first, and a table of items.

This is the format of S3-Rec and of systems that use its files: ``sequences.txt`` with lines such as ``u1 i7 i3 i9``,
and ``items.tsv`` with ``item_id``, ``title`` and further columns; each may be gzipped.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from llmrec.data.assemble import assemble, origin, refuse_columns
from llmrec.data.dataset import Dataset
from llmrec.data.read.files import Member, listing, user_path
from llmrec.data.read.limits import shown
from llmrec.data.read.table import header
from llmrec.data.read.tables import Table
from llmrec.data.read.text import LineBlock, LineBlocks, TextFormat, decoded
from llmrec.data.sets.pages import Attribute, Items
from llmrec.data.sets.published import read_items, untitled
from llmrec.errors import DataError, Location
from llmrec.recipe.schema import DataSection
from llmrec.types import Item

LICENCE = "see the author of the files"
COLUMNS = ("item", "title", "fields")
"""Keys of ``data.columns`` that name columns of the table of items."""
_FIELDS = ("categories", "category", "genres", "brand", "year")


def sequences(section: DataSection, *, seed: int) -> Dataset:
    """Load sequences; the order of items in a line is their time order.

    Raises:
        DataError: If a file is missing, or has an invalid line or item.
    """
    refuse_columns(section, "sequences", *COLUMNS)
    members = members_of("sequences", section.path)
    named = is_file_named(section.path)
    main = members[0] if named else member_of(members, ("sequences.txt",), section.path, "with one line per user")
    entries = items_member(members, section)
    frame = _read(main)
    catalogue, notes = items_of(section, frame["item_id"], entries)
    return assemble(
        section,
        by_line(main.name, frame),
        frame,
        catalogue,
        name=name_of(main, "sequences"),
        provenance=origin("sequences", (main, entries), rows=frame.height, licence=LICENCE, notes=notes),
    )


def _read(main: Member) -> pl.DataFrame:
    """Return one row per interaction, with its line number."""
    with main.open() as stream:
        frames = [_sequences_of(piece) for piece in LineBlocks(main, stream) if not piece.raw.isspace()]
    if not frames or all(frame.is_empty() for frame in frames):
        raise DataError.at(main.name, "empty", " contains no lines; write it again")
    users = pl.concat(frames)
    again = (~users["user_id"].is_first_distinct()).arg_true()
    if again.len():
        user, line = users.select("user_id", "line").row(again[0])
        first = users.filter(pl.col("user_id") == user)["line"][0]
        raise DataError.at(
            Location(main.name, line=line),
            "duplicate",
            f": user {shown(user)} already has line {first}; write one line per user, oldest item first",
        )
    return users.explode("item_id")


def _sequences_of(piece: LineBlock) -> pl.DataFrame:
    texts = pl.Series("text", [decoded(piece)]).str.split("\n").explode().str.strip_chars()
    frame = pl.DataFrame({"text": texts}).with_row_index("line", offset=piece.line + 1).filter(pl.col("text") != "")
    words = pl.col("text").str.replace_all(r"\s+", " ").str.split(" ")
    frame = frame.select(words.list.first().alias("user_id"), words.list.slice(1).alias("item_id"), pl.col("line"))
    empty = (frame["item_id"].list.len() == 0).arg_true()
    if empty.len():
        user, line = frame.select("user_id", "line").row(empty[0])
        raise DataError.at(
            Location(piece.source.name, line=line),
            "missing-value",
            f": user {shown(user)} has no items; write the user and then the user's items, separated by spaces",
        )
    return frame


# --------------------------------------------------------------------------- shared code


def by_line(name: str, frame: pl.DataFrame, header: int = 0) -> Table:
    """Return a table that locates interactions for errors, of which several are on one line.

    Args:
        name: The file.
        frame: One row per interaction, with its line number in the column ``line``.
        header: Number of lines before the first row of the file.
    """
    lines = array("q", frame["line"].cast(pl.Int64).to_numpy().tobytes())
    return Table(name, frame, lines=lines, rows=array("q", (line - 1 - header for line in lines)))


def members_of(source: str, path: str | None) -> list[Member]:
    """Return the files in the folder or archive of ``data.path``, or in the folder that contains it.

    Raises:
        DataError: If there is none.
    """
    if path is None:
        raise DataError(
            f"source {source!r} needs a folder, a zip archive or a file; set data.path; see "
            "docs/datasets-and-output-files.md",
            kind="missing-key",
            column="data.path",
        )
    root = user_path(path)
    if not root.exists():
        raise DataError(
            f"data.path={path}: the file or folder does not exist; correct the path",
            kind="missing-file",
            at=root,
            column="data.path",
        )
    if root.is_file() and root.suffix.lower() != ".zip":
        main = Member(str(root), root)
        return [main, *(member for member in listing(root.parent) if member.plain != main.plain)]
    return listing(root)


def is_file_named(path: str | None) -> bool:
    """Whether ``data.path`` is a file, which is then read whatever its name is."""
    return path is not None and user_path(path).is_file() and not path.lower().endswith(".zip")


def member_of(members: Sequence[Member], names: Sequence[str], path: str | None, what: str) -> Member:
    """Return the file that has one of these names.

    Raises:
        DataError: If there is none.
    """
    result = _first(members, names)
    if result is None:
        raise DataError(
            f"data.path={path} contains no {' or '.join(names)} (or {names[0]}.gz), {what}; correct data.path",
            kind="missing-file",
            at=path,
            column="data.path",
        )
    return result


def _first(members: Sequence[Member], names: Sequence[str]) -> Member | None:
    return next((member for name in names for member in members if member.plain == name), None)


def items_member(members: Sequence[Member], section: DataSection) -> Member | None:
    """Return the table of items: ``data.items``, or else ``items.tsv`` or ``items.csv``."""
    if section.items is not None:
        return Member(section.items, user_path(section.items))
    return _first(members, ("items.tsv", "items.csv"))


def table_form(member: Member) -> TextFormat:
    """Return the format of a table, by file extension."""
    return TextFormat(kind="delimited", separator="," if member.plain.lower().endswith(".csv") else "\t", quoted=True)


def items_of(
    section: DataSection, item_ids: pl.Series, entries: Member | None
) -> tuple[Mapping[str, Item], tuple[str, ...]]:
    """Return the `Item` of every item id in the table of items, and notes on missing titles.

    Args:
        section: The recipe's section.
        item_ids: The item of each interaction.
        entries: The table of items; without it, ids stand in for titles.

    Raises:
        DataError: If the table lacks a column.
    """
    wanted = set(item_ids.unique())
    if entries is None:
        notes = untitled("a table of items (none is given)", len(wanted), len(wanted))
        return {item: Item(item_id=item, title=item) for item in wanted}, notes
    form = table_form(entries)
    names = header(entries, form)
    columns = section.columns
    title = columns.title or ("title" if "title" in names else None)
    attributes = tuple(
        Attribute(name=name, column=name, split="|" if name == "genres" else None)
        for name in (columns.fields or tuple(name for name in _FIELDS if name in names))
    )
    key = columns.item
    spec = Items(files=(), form=form, item=key, titles=(title,) if title else (), attributes=attributes)
    listed = read_items(entries, spec, wanted)
    known = listed.entries
    if listed.repeated and section.duplicates == "error":
        raise DataError.at(
            entries.name,
            "duplicate",
            f" lists {listed.repeated} items more than once; drop the repeats, or set data.duplicates=keep_last",
        )
    catalogue = {item: Item(item_id=item, title=name or item, fields=fields) for item, (name, fields) in known.items()}
    missing = sum(name is None for name, _ in known.values())
    return catalogue, untitled(entries.name, missing, len(known)) + listed.notes(entries.name)


def name_of(main: Member, usual: str) -> str:
    """Return a short name for data, derived from the file, folder or archive."""
    stem = main.plain.split(".")[0]
    around = Path(main.folder if main.inner is None else main.path.stem).name
    return (around or stem) if stem == usual else stem
