"""Loads sequences without timestamps: one line per user with items oldest first, and a table of items.

This is the format of S3-Rec and of systems that use its files: ``sequences.txt`` with lines such as ``u1 i7 i3 i9``,
and ``items.tsv`` with ``item_id``, ``title`` and further columns; each may be gzipped.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from llmrec.data.assemble import build_dataset, build_provenance, check_column_settings
from llmrec.data.dataset import Dataset
from llmrec.data.read.files import DataFile, expand_path, list_files
from llmrec.data.read.limits import format_value
from llmrec.data.read.table import read_column_names
from llmrec.data.read.tables import Table
from llmrec.data.read.text import LineBlock, LineBlocks, TextFormat, decode_block
from llmrec.data.sets.pages import Attribute, ItemFile
from llmrec.data.sets.published import read_items, warn_of_untitled_items
from llmrec.errors import DataError, Location
from llmrec.recipe.schema import DataSection
from llmrec.types import Item

LICENCE = "see the author of the files"
ITEM_COLUMN_KEYS = ("item", "title", "fields")
"""Keys of ``data.columns`` that name columns of the table of items."""
_DEFAULT_FIELDS = ("categories", "category", "genres", "brand", "year")


def load_sequences(section: DataSection, *, seed: int) -> Dataset:
    """Load sequences; the order of items in a line is their time order.

    Raises:
        DataError: If a file is missing, or has an invalid line or item.
    """
    check_column_settings(section, "sequences", *ITEM_COLUMN_KEYS)
    members = list_source_files("sequences", section.path)
    named = is_file_path(section.path)
    main = members[0] if named else find_named_file(members, ("sequences.txt",), section.path, "with one line per user")
    entries = find_item_table(members, section)
    frame = _read_interactions(main)
    catalogue, notes = read_item_catalogue(section, frame["item_id"], entries)
    return build_dataset(
        section,
        line_location_table(main.name, frame),
        frame,
        catalogue,
        name=derive_dataset_name(main, "sequences"),
        provenance=build_provenance("sequences", (main, entries), rows=frame.height, licence=LICENCE, notes=notes),
    )


def _read_interactions(main: DataFile) -> pl.DataFrame:
    """Return one row per interaction, with its line number."""
    with main.open() as stream:
        frames = [_parse_sequences(piece) for piece in LineBlocks(main, stream) if not piece.raw.isspace()]
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
            f": user {format_value(user)} already has line {first}; write one line per user, oldest item first",
        )
    return users.explode("item_id")


def _parse_sequences(piece: LineBlock) -> pl.DataFrame:
    texts = pl.Series("text", [decode_block(piece)]).str.split("\n").explode().str.strip_chars()
    frame = pl.DataFrame({"text": texts}).with_row_index("line", offset=piece.line + 1).filter(pl.col("text") != "")
    words = pl.col("text").str.replace_all(r"\s+", " ").str.split(" ")
    frame = frame.select(words.list.first().alias("user_id"), words.list.slice(1).alias("item_id"), pl.col("line"))
    empty = (frame["item_id"].list.len() == 0).arg_true()
    if empty.len():
        user, line = frame.select("user_id", "line").row(empty[0])
        raise DataError.at(
            Location(piece.source.name, line=line),
            "missing-value",
            f": user {format_value(user)} has no items; write the user and then the user's items, separated by spaces",
        )
    return frame


# --------------------------------------------------------------------------- shared code


def line_location_table(name: str, frame: pl.DataFrame, header: int = 0) -> Table:
    """Return a table that locates interactions for errors, of which several are on one line.

    Args:
        name: The file.
        frame: One row per interaction, with its line number in the column ``line``.
        header: Number of lines before the first row of the file.
    """
    lines = array("q", frame["line"].cast(pl.Int64).to_numpy().tobytes())
    return Table(name, frame, lines=lines, rows=array("q", (line - 1 - header for line in lines)))


def list_source_files(source: str, path: str | None) -> list[DataFile]:
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
    root = expand_path(path)
    if not root.exists():
        raise DataError(
            f"data.path={path}: the file or folder does not exist; correct the path",
            kind="missing-file",
            at=root,
            column="data.path",
        )
    if root.is_file() and root.suffix.lower() != ".zip":
        main = DataFile(str(root), root)
        return [main, *(member for member in list_files(root.parent) if member.plain != main.plain)]
    return list_files(root)


def is_file_path(path: str | None) -> bool:
    """Whether ``data.path`` is a file, which is then read whatever its name is."""
    return path is not None and expand_path(path).is_file() and not path.lower().endswith(".zip")


def find_named_file(members: Sequence[DataFile], names: Sequence[str], path: str | None, what: str) -> DataFile:
    """Return the file that has one of these names.

    Raises:
        DataError: If there is none.
    """
    result = _first_named_file(members, names)
    if result is None:
        raise DataError(
            f"data.path={path} contains no {' or '.join(names)} (or {names[0]}.gz), {what}; correct data.path",
            kind="missing-file",
            at=path,
            column="data.path",
        )
    return result


def _first_named_file(members: Sequence[DataFile], names: Sequence[str]) -> DataFile | None:
    return next((member for name in names for member in members if member.plain == name), None)


def find_item_table(members: Sequence[DataFile], section: DataSection) -> DataFile | None:
    """Return the table of items: ``data.items``, or else ``items.tsv`` or ``items.csv``."""
    if section.items is not None:
        return DataFile(section.items, expand_path(section.items))
    return _first_named_file(members, ("items.tsv", "items.csv"))


def table_format(member: DataFile) -> TextFormat:
    """Return the format of a table, by file extension."""
    return TextFormat(kind="delimited", separator="," if member.plain.lower().endswith(".csv") else "\t", quoted=True)


def read_item_catalogue(
    section: DataSection, item_ids: pl.Series, entries: DataFile | None
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
        notes = warn_of_untitled_items("a table of items (none is given)", len(wanted), len(wanted))
        return {item: Item(item_id=item, title=item) for item in wanted}, notes
    form = table_format(entries)
    names = read_column_names(entries, form)
    columns = section.columns
    title = columns.title or ("title" if "title" in names else None)
    attributes = tuple(
        Attribute(name=name, column=name, split="|" if name == "genres" else None)
        for name in (columns.fields or tuple(name for name in _DEFAULT_FIELDS if name in names))
    )
    key = columns.item
    spec = ItemFile(files=(), form=form, item=key, titles=(title,) if title else (), attributes=attributes)
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
    return catalogue, warn_of_untitled_items(entries.name, missing, len(known)) + listed.notes(entries.name)


def derive_dataset_name(main: DataFile, usual: str) -> str:
    """Return a short name for data, derived from the file, folder or archive."""
    stem = main.plain.split(".")[0]
    around = Path(main.folder if main.inner is None else main.path.stem).name
    return (around or stem) if stem == usual else stem
