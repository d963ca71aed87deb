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

from llmrec.data.assemble import assemble
from llmrec.data.dataset import Dataset, GivenSplit
from llmrec.data.read.columns import Kind, numbered
from llmrec.data.read.files import Member
from llmrec.data.read.limits import shown
from llmrec.data.read.table import blocks, header
from llmrec.data.sets.sequences import (
    LICENCE,
    check_keys,
    items_member,
    items_of,
    member_of,
    members_of,
    name_of,
    refuse_repeats,
    table_form,
)
from llmrec.errors import DataError, Place
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


def samples(section: DataSection, *, seed: int) -> Dataset:
    """Load samples; requires ``data.split.kind: given``.

    Raises:
        DataError: If a file is missing, or has an invalid row or item.
    """
    check_keys("samples", section)
    if section.split.kind != "given":
        raise DataError(
            f"data.split.kind={section.split.kind}: the source 'samples' comes with a fixed split; set "
            "data.split.kind=given",
            kind="contradiction",
            column="data.split.kind",
        )
    members = members_of("samples", section.path)
    # If the path names a file, its folder is used, because all three files are needed.
    result = {
        part: member_of(members, names, section.path, f"with the columns {_HISTORY} and {_TARGET}")
        for part, names in _PARTS.items()
    }
    rows = {part: list(_read(member)) for part, member in result.items()}
    people = _follow(rows)
    built = _Built()
    dropped = _add_training(built, people, result["train"])
    held = {part: _add_held_out(built, people, part, result[part]) for part in ("valid", "test")}
    frame = pl.DataFrame({"user_id": built.users, "item_id": built.items})

    def place(row: int) -> Place:
        return Place(built.files[row], line=built.lines[row])

    refuse_repeats(section, frame, place)
    entries = items_member(members, section)
    catalogue, notes = items_of(section, frame["item_id"], entries, place)
    read = [member for member in (*result.values(), entries) if member is not None]
    dataset = assemble(
        section,
        numbered(result["train"].name, [built.lines]),
        frame,
        catalogue,
        {},
        name=name_of(result["train"], "train"),
        noun="items",
        scale=None,
        provenance={
            "source": "samples",
            "path": "; ".join(member.name for member in read),
            "sha256": "; ".join(dict.fromkeys(member.sha256 for member in read)),
            "rows": " / ".join(f"{part} {len(part_rows)}" for part, part_rows in rows.items()),
            "made": "no",
            "licence": LICENCE,
            "notes": "; ".join([*notes, *_limits(rows, people, dropped)]),
        },
    )
    return replace(dataset, given=GivenSplit(held["valid"], held["test"], frozenset(built.held_out)))


def _read(member: Member) -> Iterator[_Row]:
    form = table_form(member)
    named = _USER in header(member, form)
    wanted: dict[str, Kind] = {_HISTORY: "text", _TARGET: "text"}
    if named:
        wanted[_USER] = "text"
    for block in blocks(member, form, wanted):
        users = block.frame[_USER] if named else [""] * block.frame.height
        columns = (block.lines or (), users, block.frame[_HISTORY], block.frame[_TARGET])
        for index, (line, user, history, target) in enumerate(zip(*columns, strict=True)):
            row = _Row(line, user, tuple(history.split()), target.strip())
            if len(row.target.split()) != 1:
                raise DataError.at(
                    block.where(index),
                    "bad-value",
                    f": column {_TARGET!r} is {shown(target)}; write one item id",
                    _TARGET,
                )
            yield row


@dataclass
class _Person:
    """The rows of one user by part of the split, in file order."""

    name: str
    rows: dict[str, list[_Row]] = field(default_factory=lambda: {part: [] for part in _PARTS})


def _follow(rows: Mapping[str, Sequence[_Row]]) -> list[_Person]:
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
    for number, person in enumerate(sorted(people, key=_first_place), start=1):
        person.name = person.name or f"person-{number}"
    return sorted(people, key=_first_place)


def _first_place(person: _Person) -> tuple[int, int]:
    """Return the file part and the line number of the first row of a user."""
    part = next(number for number, part_rows in enumerate(person.rows.values()) if part_rows)
    return part, min(row.line for row in list(person.rows.values())[part])


@dataclass
class _Built:
    """Interactions collected so far, in columns, and the held-out users."""

    users: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)

    def add(self, user: str, items: Sequence[str], member: Member, line: int) -> None:
        self.users += [user] * len(items)
        self.items += items
        self.files += [member.name] * len(items)
        self.lines += [line] * len(items)


def _add_training(built: _Built, people: Sequence[_Person], member: Member) -> int:
    """Add the training interactions of each user, and return how many were left out because they are held out later."""
    dropped = 0
    for person in people:
        held = {row.target for part in ("valid", "test") for row in person.rows[part]}
        had: list[str] = []
        for row in person.rows["train"]:
            # A row that continues the known interactions adds only its target, even if its history is truncated; other
            # rows of the same user add the items that are not yet known.
            continues = bool(row.history) and tuple(had[-len(row.history) :]) == row.history
            events = [row.target] if continues else [item for item in (*row.history, row.target) if item not in had]
            kept = [item for item in events if item not in held]
            dropped += len(events) - len(kept)
            built.add(person.name, kept, member, row.line)
            had += events
    return dropped


def _add_held_out(built: _Built, people: Sequence[_Person], part: str, member: Member) -> frozenset[tuple[str, str]]:
    """Add each held-out row as a separate user, and return the held-out (user, item) pairs."""
    pairs = set()
    for person in people:
        for number, row in enumerate(person.rows[part], start=1):
            user = f"{person.name}/{part}-{number}"
            built.held_out.append(user)
            built.add(user, (*row.history, row.target), member, row.line)
            pairs.add((user, row.target))
    return frozenset(pairs)


def _limits(rows: Mapping[str, Sequence[_Row]], people: Sequence[_Person], dropped: int) -> list[str]:
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
        if not person.rows["train"] and max(len(row.history) for row in _first_rows(person)) > 1
    )
    if lost:
        notes.append(f"{lost} held-out rows do not continue a training row, so their items may be in the training data")
    return notes


def _first_rows(person: _Person) -> list[_Row]:
    return [part_rows[0] for part_rows in person.rows.values() if part_rows][:1]
