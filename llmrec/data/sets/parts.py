"""A published split in a table: which part each row belongs to, by a column or by its file."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from llmrec.data.dataset import PARTS
from llmrec.data.read.columns import find
from llmrec.data.read.limits import shown
from llmrec.data.read.text import Table
from llmrec.data.read.typed import texts
from llmrec.data.split import earlier
from llmrec.errors import DataError
from llmrec.recipe.schema import DataSection
from llmrec.terminal import logger

log = logger(__name__)

SPELLED: Mapping[str, str] = {
    "train": "train",
    **dict.fromkeys(("valid", "validation", "val", "dev"), "valid"),
    "test": "test",
}
"""What a column of parts may say, in lower case, and the part that it means."""
_KEY = "data.columns.split"


def part_of(said: str) -> str | None:
    """Return the part that a cell names, in any spelling; None if it names none."""
    return SPELLED.get(said.strip().lower())


def parts_of(section: DataSection, table: Table) -> pl.Series | None:
    """Return the part of every row, as its place in `PARTS`; None unless the split is the source's own.

    Args:
        section: The recipe's section.
        table: Its table, the files of the parts one behind the other.

    Raises:
        DataError: If nothing says what is held out, a value is no part, or no row is of the training or the test part.
    """
    if section.split.kind != "given":
        return None
    if section.files is not None:
        named = [part for part in PARTS if getattr(section.files, part) is not None]
        sizes = zip(named, table.parts, strict=True)
        return pl.Series([PARTS.index(name) for name, part in sizes for _ in range(part.frame.height)], dtype=pl.Int8)
    column = find(table, section.columns.split, "split", _KEY)
    if column is None:
        raise DataError.at(
            table.name,
            "missing-column",
            " has no column 'split', so nothing says what data.split.kind=given holds out; name the column whose "
            f"values are train, valid and test as {_KEY}=..., give a file of each part as data.files, or choose "
            "another kind",
            "split",
        )
    said = texts(table, column).str.strip_chars().str.to_lowercase()
    found = said.replace_strict({word: PARTS.index(part) for word, part in SPELLED.items()}, default=None)
    _all_parts(table, column, found)
    return found.cast(pl.Int8)


def _all_parts(table: Table, column: str, found: pl.Series) -> None:
    unknown = found.is_null().arg_true()
    if unknown.len():
        row = unknown[0]
        raise DataError.at(
            table.where(row),
            "bad-value",
            f": column {column!r} says {shown(table.frame[column][row])}, which is no part of a split "
            f"({unknown.len()} such rows); write {', '.join(SPELLED)}",
            column,
        )
    for part in ("train", "test"):
        if not (found == PARTS.index(part)).any():
            raise DataError.at(
                table.name,
                "too-few",
                f": no row of column {column!r} says {part!r}; a given split needs rows to learn from and rows to test "
                "on, so correct the column, or choose another data.split.kind",
                column,
            )


def told(parts: pl.Series, frame: pl.DataFrame) -> dict[str, str]:
    """Return what the provenance says of the parts, after a warning where their times overlap.

    Args:
        parts: From `parts_of`.
        frame: The interactions, with ``user_id`` and, if there are times, ``timestamp``.
    """
    sizes = ", ".join(f"{name} {int((parts == place).sum())}" for place, name in enumerate(PARTS))
    notes = []
    if not (parts == PARTS.index("valid")).any():
        notes.append("there is no valid part: nothing can be chosen on it")
    train, test = (frame.filter(parts == PARTS.index(name)) for name in ("train", "test"))
    if "timestamp" in frame.columns and (early := earlier(train, test)):
        notes.append(
            f"{early} of {test.height} test rows are earlier than a training row of their user: histories show what "
            "came later, so figures of what comes next say little"
        )
        log.warning("data.split.kind=given: %s", notes[-1])
    return {"split": sizes, **({"notes": "; ".join(notes)} if notes else {})}
