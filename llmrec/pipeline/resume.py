"""Stages remember what they were made from, so that a second run reuses what it has."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmrec.durable import checked, writing_to
from llmrec.errors import LlmrecError
from llmrec.machine import lock
from llmrec.pipeline.claiming import mark, open_lock, refuse_foreign
from llmrec.progress import Bar

log = logging.getLogger(__name__)


def key_of(**inputs: Any) -> str:
    """Return 16 hex digits over everything that can change a stage's outcome."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_stage(path: Path, key: str, form: Callable[[Mapping[str, Any]], object]) -> dict[str, Any] | None:
    """Return a stage that `write_checked` stored if it was made from the same inputs.

    Args:
        path: Its file.
        key: See `key_of`.
        form: Reads what was stored; where it cannot, the file is damaged, and the stage is made again.
    """
    if not path.is_file():
        return None
    try:
        stored = checked(path.read_bytes())
    except (OSError, ValueError) as error:
        log.warning("%s is damaged (%s); it is made again", path, error)
        return None
    if not isinstance(stored, dict) or stored.get("key") != key:
        return None
    try:
        form(stored)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s); it is made again", path, type(error).__name__)
        return None
    return stored


class Budget:
    """Seconds by stage, in the order they were spent.

    Args:
        quiet: Write no lines into a log while a stage goes on.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self.stages: dict[str, float] = {}
        self._inner: list[float] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a block to a stage; what a stage inside it takes is that one's alone."""
        begin = time.monotonic()
        self._inner.append(0.0)
        try:
            with Bar(name, None, quiet=self._quiet):
                yield
        finally:
            spent = time.monotonic() - begin
            self.add(name, spent - self._inner.pop())
            if self._inner:
                self._inner[-1] += spent

    def add(self, name: str, seconds: float) -> None:
        """Book seconds that an earlier, killed invocation spent on work that this one continues from."""
        self.stages[name] = self.stages.get(name, 0.0) + seconds


@contextmanager
def locked(folder: Path, own: Iterable[str] | Callable[[str], bool] = ()) -> Iterator[None]:
    """Keep two runs out of one folder.

    Args:
        folder: The folder; where it is not there it is made, for its owner alone.
        own: What is to be written into it, or which names are; see `refuse_foreign`. By default nothing.

    Raises:
        LlmrecError: If another live process holds the folder, or somebody's files in it could be lost.
    """
    refuse_foreign(folder, own)
    try:
        # What is written here is as private as the data that it is made from.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LlmrecError(
            f"the run folder {folder} cannot be made: {error.strerror}; choose another with --out",
            kind="unreadable",
            at=folder,
        ) from None
    with open_lock(folder) as file:
        if not lock(file):
            raise LlmrecError(
                f"another run is writing to {folder}; wait for it, or choose a folder with --out",
                kind="busy",
                at=folder,
            )
        if own:
            mark(file)
        with writing_to(folder):
            yield
