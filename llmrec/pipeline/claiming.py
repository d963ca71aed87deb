"""Which folders llmrec may write and clear: those that it began itself; links and other files in them stay as they are.

A folder's ``.lock`` says that llmrec works there. What was there before, under the names that llmrec writes, is refused
and never replaced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from llmrec.durable import loads, refuse_link
from llmrec.errors import LlmrecError
from llmrec.machine import NO_LINK
from llmrec.terminal import LOG

LOCK = ".lock"
_MARK = "llmrec works in this folder: it writes, replaces and removes its own files there\n"
RUN = (
    *("recipe.yaml", "candidates", "index", "base", "base.json", "checkpoints", "best", "adapter", "merged"),
    *("train.json", "train_log.jsonl", "answers.sqlite", "rows", "predictions.parquet", "items.parquet"),
    *("data", "results.json", "report", "audit.json", "audit-baselines.json", "trackers.json", "tensorboard"),
    LOG,
)
"""What a run writes into its folder."""
SUITE = ("rows", "models", LOG)
"""What a suite writes into its folder."""
# What runs of before there was a mark say of themselves, where their lock was not copied with them.
_RECORDS = {"train.json": "key", "results.json": "llmrec", "base.json": "key"}


def refuse_foreign(folder: Path, own: Iterable[str] | Callable[[str], bool]) -> None:
    """Refuse a folder whose files could be lost.

    Args:
        folder: The folder; it need not be there.
        own: The names that are to be written into it, or, where the whole folder is llmrec's, which names these are.

    Raises:
        LlmrecError: If something under such a name is a link, or was there before llmrec was; or, where the whole
            folder is llmrec's, if the folder is a link or something else was there.
    """
    if callable(own):
        refuse_link(folder)
        foreign = sorted(entry.name for entry in folder.iterdir() if not own(entry.name)) if folder.is_dir() else []
        begun = _marked(folder)
    else:
        foreign = [name for name in own if os.path.lexists(folder / name)]
        for name in foreign:
            refuse_link(folder / name)
        begun = _marked(folder) or _begun_before(folder)
    lock = folder / LOCK
    if own and lock.is_file() and lock.stat().st_size > 0 and not _marked(folder):
        foreign, begun = [LOCK], False
    if foreign and not begun:
        raise LlmrecError(
            f"{folder} holds {', '.join(foreign[:3])}{' and more' if len(foreign) > 3 else ''}, which llmrec did not "
            "write and could replace; move them away, or choose another place with --out",
            kind="exists",
            at=folder,
        )


def open_lock(folder: Path) -> IO[str]:
    """Open a folder's ``.lock`` without following a link or changing what is in it.

    Raises:
        LlmrecError: If it is a link, or anything else that cannot be locked.
    """
    path = folder / LOCK
    refuse_link(path)
    if path.exists() and not path.is_file():
        raise LlmrecError(
            f"{path} is no file, so the folder cannot be locked; move it away", kind="unreadable", at=path
        )
    opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINK, 0o666)
    return os.fdopen(opened, "a", encoding="utf-8")


def mark(lock: IO[str]) -> None:
    """Say in a new lock that the folder is llmrec's."""
    if os.fstat(lock.fileno()).st_size == 0:
        lock.write(_MARK)
        lock.flush()


def _marked(folder: Path) -> bool:
    try:
        return (folder / LOCK).read_text(encoding="utf-8") == _MARK
    except (OSError, ValueError):
        return False


def _begun_before(folder: Path) -> bool:
    """Whether an llmrec that made no mark was at work here: by its empty lock, or by its records."""
    lock = folder / LOCK
    if lock.is_file() and lock.stat().st_size == 0:
        return True
    for name, key in _RECORDS.items():
        try:
            if key in loads((folder / name).read_text(encoding="utf-8")):
                return True
        except (OSError, ValueError, TypeError):
            continue
    return False
