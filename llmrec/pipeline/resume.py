"""Run folders: locks, protection of files of other programs, and stored stages that a later run reuses."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llmrec.durable import check_not_link, note_written_path, parse_checked_json
from llmrec.errors import LlmrecError
from llmrec.machine import NO_LINK_FLAGS, try_lock
from llmrec.progress import Progress
from llmrec.terminal import LOG_FILE

log = logging.getLogger(__name__)


def read_stage(path: Path, key: str, form: Callable[[Mapping[str, Any]], object]) -> dict[str, Any] | None:
    """Return a stage stored by `write_checked_json` if its inputs are unchanged; otherwise None.

    Args:
        path: Its file.
        key: See `llmrec.fingerprint.fingerprint`.
        form: Parses the stored stage; if that fails, the file is damaged and the stage is computed again.
    """
    if not path.is_file():
        return None
    try:
        stored = parse_checked_json(path.read_bytes())
    except (OSError, ValueError) as error:
        log.warning("%s is damaged (%s) and is computed again", path, error)
        return None
    if not isinstance(stored, dict) or stored.get("key") != key:
        return None
    try:
        form(stored)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s) and is computed again", path, type(error).__name__)
        return None
    return stored


class StageTimer:
    """Wall-clock seconds by stage, in the order of execution.

    Args:
        quiet: Write no log lines while a stage is running.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self.stages: dict[str, float] = {}
        self._inner: list[float] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the time of a block as part of a stage; the time of nested stages is not included."""
        begin = time.monotonic()
        self._inner.append(0.0)
        try:
            with Progress(name, None, quiet=self._quiet):
                yield
        finally:
            spent = time.monotonic() - begin
            self.add(name, spent - self._inner.pop())
            if self._inner:
                self._inner[-1] += spent

    def add(self, name: str, seconds: float) -> None:
        """Add the seconds that an interrupted run spent on a stage."""
        self.stages[name] = self.stages.get(name, 0.0) + seconds


@contextmanager
def lock_folder(folder: Path, names: Iterable[str] | Callable[[str], bool] = ()) -> Iterator[None]:
    """Hold the lock of a folder, which is created if missing, against other processes.

    ``names`` are the files to write; see `check_foreign_files`. By default none.
    """
    check_foreign_files(folder, names)
    try:
        # Results are as confidential as their data.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LlmrecError(
            f"the run folder {folder} cannot be created ({error.strerror}); choose another folder with --out",
            kind="unreadable",
            at=folder,
        ) from None
    with open_lock_file(folder) as file:
        if not try_lock(file):
            raise LlmrecError(
                f"another run is writing to {folder}; wait until it has finished, or choose another folder with --out",
                kind="busy",
                at=folder,
            )
        if names and os.fstat(file.fileno()).st_size == 0:
            file.write(_MARK)
            file.flush()
        with note_written_path(folder):
            yield


# --------------------------------------------------------------------------- protecting folders


LOCK_FILE = ".lock"
_MARK = "This is a folder of llmrec, which writes, replaces and removes files here\n"
RUN_FILES = (
    *("recipe.yaml", "candidates", "index", "base", "base.json", "checkpoints", "best", "adapter", "merged"),
    *("train.json", "train_log.jsonl", "answers.sqlite", "rows", "predictions.parquet", "items.parquet"),
    *("data", "results.json", "report", "audit.json", "audit-baselines.json", "trackers.json", "tensorboard"),
    LOG_FILE,
)
"""Files and folders that a run writes into its folder."""
SUITE_FILES = ("rows", "models", LOG_FILE)
"""Files and folders that a suite writes into its folder."""


def check_foreign_files(folder: Path, names: Iterable[str] | Callable[[str], bool]) -> None:
    """Reject a folder whose files were not written by llmrec and could be overwritten.

    Args:
        folder: The folder, which may be missing.
        names: Names of the files to write or, if llmrec owns the folder, a test for their names.
    """
    if callable(names):
        check_not_link(folder)
        foreign = sorted(entry.name for entry in folder.iterdir() if not names(entry.name)) if folder.is_dir() else []
    else:
        foreign = [name for name in names if os.path.lexists(folder / name)]
        for name in foreign:
            check_not_link(folder / name)
    begun, lock = _is_marked(folder), folder / LOCK_FILE
    if names and lock.is_file() and lock.stat().st_size > 0 and not begun:
        foreign, begun = [LOCK_FILE], False
    if foreign and not begun:
        raise LlmrecError(
            f"{folder} contains files that llmrec did not write and could overwrite: "
            f"{', '.join(foreign[:3])}{' and more' if len(foreign) > 3 else ''}; move these files away, or choose "
            "another folder with --out",
            kind="exists",
            at=folder,
        )


def open_lock_file(folder: Path) -> IO[str]:
    """Open the ``.lock`` file of a folder without following links or changing its content."""
    path = folder / LOCK_FILE
    check_not_link(path)
    if path.exists() and not path.is_file():
        raise LlmrecError(
            f"{path} is not a file, so the folder cannot be locked; move it away", kind="unreadable", at=path
        )
    opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINK_FLAGS, 0o666)
    return os.fdopen(opened, "a", encoding="utf-8")


def _is_marked(folder: Path) -> bool:
    try:
        return (folder / LOCK_FILE).read_text(encoding="utf-8") == _MARK
    except (OSError, ValueError):
        return False
