"""Stages remember what they were made from, so that a second run reuses what it has."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmrec.errors import LlmrecError


def key_of(**inputs: Any) -> str:
    """Return 16 hex digits over everything that can change a stage's outcome."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary file and rename it: a killed run leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    work.write_text(json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    work.replace(path)


def read_stage(path: Path, key: str) -> dict[str, Any] | None:
    """Return a stored stage if it was made from the same inputs."""
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return stored if isinstance(stored, dict) and stored.get("key") == key else None


class Budget:
    """Seconds by stage, in the order they were spent."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.monotonic() - begin


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep two runs out of one folder.

    Raises:
        LlmrecError: If another live process holds the folder.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LlmrecError(
            f"the run folder {folder} cannot be made: {error.strerror}; choose another with --out"
        ) from None
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LlmrecError(
                f"another run is writing to {folder}; wait for it, or choose a folder with --out"
            ) from None
        yield
