"""Finds a table of items beside a table of interactions."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmrec.commands.init.profile import peek, profile
from llmrec.errors import LlmrecError

_COMPANIONS = 20
_TEXT_ENDINGS = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".gz")


@contextmanager
def _unsaid() -> Iterator[None]:
    """Keep what reading would say to itself: nobody has asked for the file."""
    reading = logging.getLogger("llmrec.data.reading")
    level = reading.level
    reading.setLevel(logging.ERROR)
    try:
        yield
    finally:
        reading.setLevel(level)


def companion_of(path: Path, item: str) -> Path | None:
    """Return another table in the same folder that has the item's column, if there is exactly one."""
    found = []
    for other in sorted(path.absolute().parent.iterdir())[: 10 * _COMPANIONS]:
        if other.suffix.lower() in _TEXT_ENDINGS and other.is_file() and other.name != path.name:
            try:
                with _unsaid():
                    table = peek(other, limit=2**18, part=2**18).table
                if item in table.frame.columns and profile(table)[item].unique:
                    found.append(other)
            except LlmrecError:
                continue
            if len(found) > 1:
                break
    if len(found) != 1:
        return None
    return found[0] if path.is_absolute() else path.parent / found[0].name
