"""Finds a table of items beside a table of interactions."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmrec.data.read.nested import leaf
from llmrec.data.read.sheets import SHEETS, sheets_of, split_sheet
from llmrec.errors import LlmrecError
from llmrec.start.init.profile import peek, profile

_COMPANIONS = 20
_TEXT_ENDINGS = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".gz")


@contextmanager
def _unsaid() -> Iterator[None]:
    """Keep what reading would say to itself: nobody has asked for the file."""
    reading = logging.getLogger("llmrec.data.read")
    level = reading.level
    reading.setLevel(logging.ERROR)
    try:
        yield
    finally:
        reading.setLevel(level)


def companion_of(path: Path, item: str) -> Path | None:
    """Return the only other table in the folder, or sheet of the spreadsheet, that has the item's column, if any."""
    found: list[Path] = []
    for other in _others(path):
        try:
            with _unsaid():
                table = peek(other, limit=2**18, part=2**18).table
            column = item if item in table.frame.columns else leaf(item)
            if column in table.frame.columns and profile(table)[column].unique:
                found.append(other)
        except LlmrecError:
            continue
        if len(found) > 1:
            break
    if len(found) != 1:
        return None
    return found[0] if path.is_absolute() else path.parent / found[0].name


def _others(path: Path) -> Iterator[Path]:
    """Yield the sheets of a spreadsheet, or the text files beside a table."""
    book, _ = split_sheet(path)
    if book.suffix.lower() in SHEETS:
        yield from (Path(name) for name in sheets_of(book) if Path(name) != path)
        return
    for other in sorted(path.absolute().parent.iterdir())[: 10 * _COMPANIONS]:
        if other.suffix.lower() in _TEXT_ENDINGS and other.is_file() and other.name != path.name:
            yield other
