"""Recognises published data sets by their files, tables by their columns, and sequences by their lines."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from llmrec.data.read.files import DataFile, list_files
from llmrec.data.read.table import read_column_names
from llmrec.data.sets.locate import match_category, match_wildcard
from llmrec.data.sets.pages import InteractionFile, KnownFormat, Layout, known_formats
from llmrec.errors import LlmrecError

# Column names that are too common to identify a data set.
_COMMON_COLUMNS = frozenset(
    ("user", "user_id", "item", "item_id", "id", "product_id", "rating", "time", "timestamp", "date", "title", "text")
)
_SEQUENCES_FILE, _LINES_EXAMINED, _MAX_LINE_BYTES = "sequences.txt", 20, 2**20
_SAMPLE_PARTS = ("train", "valid", "test")


def sources_with_columns(columns: Collection[str]) -> tuple[str, ...]:
    """Return the published data sets whose interaction files have the column names of a table.

    A data set is returned only if its user and item columns have distinctive names; files without a header have none.
    """
    return tuple(
        page.name for page in known_formats() if any(_matches_columns(layout, columns) for layout in page.layouts)
    )


def _matches_columns(layout: Layout, columns: Collection[str]) -> bool:
    events = layout.events
    distinctive = not events.form.columns and not {events.user, *events.item} & _COMMON_COLUMNS
    return distinctive and _required_columns(events) <= set(columns)


def _required_columns(events: InteractionFile) -> set[str]:
    return {events.user, *events.item, *(name for name in (events.rating, events.time) if name is not None)}


# --------------------------------------------------------------------------- files


def recognise_source(path: Path) -> str | None:
    """Return the data source for a path that is a folder, a zip archive, or not a table.

    None if the path is a table, or unknown to all sources.

    Raises:
        DataError: If a folder or an archive cannot be read.
    """
    if path.is_dir() or path.suffix.lower() == ".zip":
        members = list_files(path)
        names = {member.plain.lower() for member in members}
        if _SEQUENCES_FILE in names:
            return "sequences"
        if all({f"{part}.tsv", f"{part}.csv"} & names for part in _SAMPLE_PARTS) and _has_sample_columns(members):
            return "samples"
        return next((page.name for page in _matching_formats(members)), None)
    member = DataFile(str(path), path)
    if member.plain.lower().endswith(".txt"):
        return "sequences" if _is_sequences_file(member) else None
    # A file with a header is a table with columns to choose; other files are recognised by their names.
    for page in _matching_formats([member], alone=True):
        if all(
            layout.events.form.columns for layout in page.layouts if match_category(layout, member.plain) is not None
        ):
            return page.name
    return None


def _has_sample_columns(members: Sequence[DataFile]) -> bool:
    train = next(member for member in members if member.plain.lower() in ("train.tsv", "train.csv"))
    return {"history", "target"} <= set(_read_lines(train)[0].replace(",", "\t").split("\t"))


def _read_lines(member: DataFile, count: int = 1) -> list[str]:
    """Return the first lines of a file; empty ones after its end."""
    with member.open() as stream:
        return [stream.readline(_MAX_LINE_BYTES).decode("utf-8", "replace").strip() for _ in range(count)]


def _is_sequences_file(member: DataFile) -> bool:
    """Whether the first lines each have a user and the user's items, separated by spaces."""
    try:
        lines = [line for line in _read_lines(member, _LINES_EXAMINED) if line]
    except LlmrecError:
        return False
    rows = [line.split(" ") for line in lines]
    plain = all(len(row) > 1 for row in rows) and not any(mark in line for mark in '\t,;|"' for line in lines)
    users = [row[0] for row in rows]
    return plain and len(set(users)) == len(users) > 1 and len({len(row) for row in rows}) > 1


def _matching_formats(members: Sequence[DataFile], *, alone: bool = False) -> Iterator[KnownFormat]:
    """Yield the published data sets that have these files, the most likely first.

    Args:
        members: Files of a folder or an archive.
        alone: Do not search for the item file.
    """
    fitting = [
        (_pattern_specificity(layout, member.plain), page, member)
        for page in known_formats()
        for layout in page.layouts
        for member in members
        if match_category(layout, member.plain) is not None
        and (alone or _has_item_file(layout, member, members))
        and _has_required_columns(layout.events, member)
    ]
    if not fitting:
        return
    best = max(literal for literal, _, _ in fitting)
    pages = [(page, member) for literal, page, member in fitting if literal == best]
    named = [
        (page, member)
        for page, member in pages
        if _normalise_name(Path(member.folder).name) in map(_normalise_name, page.folders)
    ]
    if len(named or pages) > 1:
        named = named or [(page, member) for page, member in pages if _has_published_count(page, member)]
    yield from (page for page, _ in named or sorted(pages, key=lambda pair: pair[0].counts is not None))


def _normalise_name(name: str) -> str:
    return name.lower().replace("_", "-")


def _pattern_specificity(layout: Layout, name: str) -> int:
    """Return the number of literal characters in the best pattern of a data set for a file name."""
    return max(
        len(pattern.replace("*", "")) for pattern in layout.events.files if match_wildcard(pattern, name) is not None
    )


def _has_item_file(layout: Layout, events: DataFile, members: Sequence[DataFile]) -> bool:
    if layout.items is None or not layout.items.complete:
        return True
    near = [member.plain for member in members if member.folder == events.folder]
    return any(match_wildcard(pattern, name) is not None for pattern in layout.items.files for name in near)


def _has_required_columns(events: InteractionFile, member: DataFile) -> bool:
    """Whether a file has the columns of a data set: by its header or first record, else by their number."""
    if events.form.columns:
        named = not any(pattern.startswith("*") for pattern in events.files)
        return named and len(_read_lines(member)[0].split(events.form.separator)) == len(events.form.columns)
    try:
        if events.form.kind == "delimited":
            names = set(read_column_names(member, events.form))
        else:
            line = _read_lines(member)[0]
            names = set(json.loads(line) if events.form.kind == "json" else ast.literal_eval(line))
    except (LlmrecError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return _required_columns(events) <= names and not {events.user, *events.item} <= _COMMON_COLUMNS


def _has_published_count(page: KnownFormat, member: DataFile) -> bool:
    """Whether a file has the published number of rows."""
    counts = page.published_size(member.plain)
    if counts is None:
        return False
    with member.open() as stream:
        lines = sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(2**20), b""))
    return abs(lines - counts.interactions) <= 1
