"""Loads published samples that are already split into train, valid and test files.

Each row is one request with its published history, so metrics are comparable with the papers that use the files. A
held-out row becomes a separate user, whose history is shown but never used for training. Training rows of one person
are merged, so that each interaction is used once.

Rows of one person are found by their histories: a row continues another if its history is the other's history and
target. A person's held-out items can thus be removed from the training rows even if these name no users.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import polars as pl

from llmrec.data.assemble import build_dataset, build_provenance, check_column_settings
from llmrec.data.dataset import Dataset, GivenSplit
from llmrec.data.read.columns import ColumnKind
from llmrec.data.read.files import DataFile
from llmrec.data.read.limits import format_value
from llmrec.data.read.table import read_blocks, read_column_names
from llmrec.data.read.tables import Table
from llmrec.data.sets.sequences import (
    ITEM_COLUMN_KEYS,
    LICENCE,
    derive_dataset_name,
    find_item_table,
    find_named_file,
    line_location_table,
    list_source_files,
    read_item_catalogue,
    table_format,
)
from llmrec.errors import DataError
from llmrec.recipe.schema import DataSection

_PARTS = {
    "train": ("train.tsv", "train.csv"),
    "valid": ("valid.tsv", "valid.csv", "validation.tsv", "validation.csv", "dev.tsv", "dev.csv"),
    "test": ("test.tsv", "test.csv"),
}
_USER, _HISTORY, _TARGET = "user_id", "history", "target"


class _Row(NamedTuple):
    line: int
    user: str
    history: tuple[str, ...]
    target: str


def load_samples(section: DataSection, *, seed: int) -> Dataset:
    """Load samples; requires ``data.split.kind: given``.

    Raises:
        DataError: If a file is missing, or has an invalid row or item.
    """
    check_column_settings(section, "samples", *ITEM_COLUMN_KEYS)
    if section.split.kind != "given":
        raise DataError(
            f"data.split.kind={section.split.kind}: the source 'samples' comes with a fixed split; set "
            "data.split.kind=given",
            kind="contradiction",
            column="data.split.kind",
        )
    members = list_source_files("samples", section.path)
    # If the path names a file, its folder is used, because all three files are needed.
    files = {
        part: find_named_file(members, names, section.path, f"with the columns {_HISTORY} and {_TARGET}")
        for part, names in _PARTS.items()
    }
    rows = {part: list(_read_rows(member)) for part, member in files.items()}
    people = _group_by_user(rows)
    training, dropped = _training_interactions(people)
    held = {part: _held_out_interactions(people, part) for part in ("valid", "test")}
    tables = [
        line_location_table(files[part].name, _interaction_frame(events), header=1)
        for part, events in {"train": training, **held}.items()
    ]
    frame = pl.concat([table.frame for table in tables])
    entries = find_item_table(members, section)
    catalogue, notes = read_item_catalogue(section, frame["item_id"], entries)
    dataset = build_dataset(
        section,
        Table(files["train"].name, frame, parts=tuple(tables)),
        frame,
        catalogue,
        name=derive_dataset_name(files["train"], "train"),
        provenance=build_provenance(
            "samples",
            (*files.values(), entries),
            rows=" / ".join(f"{part} {len(part_rows)}" for part, part_rows in rows.items()),
            licence=LICENCE,
            notes=[*notes, *_provenance_notes(rows, people, dropped)],
        ),
    )
    valid, test = (frozenset((user, items[-1]) for user, items, _ in events) for events in held.values())
    return replace(dataset, given=GivenSplit(valid, test, frozenset(user for user, _ in valid | test)))


def _read_rows(member: DataFile) -> Iterator[_Row]:
    form = table_format(member)
    named = _USER in read_column_names(member, form)
    wanted: dict[str, ColumnKind] = {_HISTORY: "text", _TARGET: "text"}
    if named:
        wanted[_USER] = "text"
    for block in read_blocks(member, form, wanted):
        users = block.frame[_USER] if named else [""] * block.frame.height
        columns = (block.lines or (), users, block.frame[_HISTORY], block.frame[_TARGET])
        for index, (line, user, history, target) in enumerate(zip(*columns, strict=True)):
            row = _Row(line, user, tuple(history.split()), target.strip())
            if len(row.target.split()) != 1:
                raise DataError.at(
                    block.where(index),
                    "bad-value",
                    f": column {_TARGET!r} is {format_value(target)}; write one item id",
                    _TARGET,
                )
            yield row


@dataclass
class _Person:
    """The rows of one user by part of the split, in file order."""

    name: str
    rows: dict[str, list[_Row]] = field(default_factory=lambda: {part: [] for part in _PARTS})

    @property
    def first(self) -> _Row:
        return next(part_rows[0] for part_rows in self.rows.values() if part_rows)


def _group_by_user(rows: Mapping[str, Sequence[_Row]]) -> list[_Person]:
    """Group the rows by user, independently of their order in the files, with shorter histories first.

    People are identified by user names if training rows have some, and otherwise by rows that continue others.
    Histories may be truncated to their latest items: the longest one gives the limit. People with the same history
    are not distinguished, and need not be.
    """
    longest = max(len(row.history) for part_rows in rows.values() for row in part_rows)
    named = any(row.user for row in rows["train"])
    people: list[_Person] = []
    waiting: dict[str | tuple[str, ...], list[_Person]] = {}
    for part, part_rows in rows.items():
        for row in sorted(part_rows, key=lambda row: len(row.history)):
            name = row.user if named else ""
            same = waiting.get(name or row.history) if name or row.history else None
            person = same.pop(0) if same else _Person(row.user)
            if not any(person.rows.values()):
                people.append(person)
            person.name = row.user or person.name
            person.rows[part].append(row)
            after = (*row.history, row.target)[-longest:] if longest else ()
            waiting.setdefault(name or after, []).append(person)
    # by the file and the line of their first row
    people.sort(key=lambda person: min((n, row.line) for n, part in enumerate(person.rows.values()) for row in part))
    for number, person in enumerate(people, start=1):
        person.name = person.name or f"person-{number}"
    return people


class _LineInteractions(NamedTuple):
    """Consecutive interactions of a user that come from one line."""

    user: str
    items: Sequence[str]
    line: int


def _training_interactions(people: Sequence[_Person]) -> tuple[list[_LineInteractions], int]:
    """Return the training interactions, and how many were left out because they are held out later."""
    events: list[_LineInteractions] = []
    dropped = 0
    for person in people:
        held = {row.target for part in ("valid", "test") for row in person.rows[part]}
        seen: list[str] = []
        for row in person.rows["train"]:
            # A row that continues the known interactions adds only its target, even if its history is truncated; other
            # rows of the same user add the items that are not yet known.
            continues = bool(row.history) and tuple(seen[-len(row.history) :]) == row.history
            new = [row.target] if continues else [item for item in (*row.history, row.target) if item not in seen]
            kept = [item for item in new if item not in held]
            dropped += len(new) - len(kept)
            if kept:
                events.append(_LineInteractions(person.name, kept, row.line))
            seen += new
    return events, dropped


def _held_out_interactions(people: Sequence[_Person], part: str) -> list[_LineInteractions]:
    """Return the held-out rows, each as a separate user whose last interaction is held out."""
    return [
        _LineInteractions(f"{person.name}/{part}-{number}", [*row.history, row.target], row.line)
        for person in people
        for number, row in enumerate(person.rows[part], start=1)
    ]


def _interaction_frame(events: Sequence[_LineInteractions]) -> pl.DataFrame:
    """Return one row per interaction, with its line number."""
    schema = {"user_id": pl.String(), "item_id": pl.List(pl.String), "line": pl.Int64()}
    return pl.DataFrame(events, schema=schema, orient="row").explode("item_id")


def _provenance_notes(rows: Mapping[str, Sequence[_Row]], people: Sequence[_Person], dropped: int) -> list[str]:
    held = [row for part in ("valid", "test") for row in rows[part]]
    learned = sum(bool(person.rows["train"]) for person in people)
    notes = [
        f"{len(rows['train'])} training rows are merged into the histories of {learned} users",
        f"each of {len(held)} held-out rows counts as a user, so confidence intervals treat rows of the same user as "
        "independent",
    ]
    seen = sum(row.target in row.history for row in held)
    if seen or dropped:
        notes.append(
            f"removed: {seen} held-out targets that are in their histories, and {dropped} training interactions that "
            "are held out for the same user"
        )
    lost = sum(
        len(person.rows["valid"]) + len(person.rows["test"])
        for person in people
        if not person.rows["train"] and len(person.first.history) > 1
    )
    if lost:
        notes.append(f"{lost} held-out rows do not continue a training row, so their items may be in the training data")
    return notes
