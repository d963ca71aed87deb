"""Builds a folder beside its place and moves it there whole; what killed processes left is cleared away."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmrec.errors import LlmrecError


@contextmanager
def placing(target: Path, *, force: bool, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Hand out ``TARGET.llmrec-tmp-PID``, and move it to its place when the block ends well.

    Args:
        target: The folder to be.
        force: Replace a folder that is there.
        ours: Whether an existing folder may be replaced; nobody's own files are removed.

    Raises:
        LlmrecError: If the place is taken, or the disk refuses.
    """
    refuse(target, force=force, ours=ours)
    try:
        _sweep(target)
        draft = _beside(target, "tmp")
        draft.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        yield draft
        refuse(target, force=force, ours=ours)
        _swap(draft, target)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def refuse(target: Path, *, force: bool, ours: Callable[[Path], bool]) -> None:
    """Refuse a place that is taken.

    Raises:
        LlmrecError: If something is there that must not, or may not without ``force``, be replaced.
    """
    if not os.path.lexists(target):
        return
    if not force:
        raise LlmrecError(f"{target} exists already; choose another --out, or replace it with --force")
    if target.is_symlink() or not target.is_dir() or not ours(target):
        raise LlmrecError(
            f"{target} was not written by `llmrec export`, or was changed since, so --force does not replace it; "
            "remove it yourself, or choose another --out"
        )


def _swap(draft: Path, target: Path) -> None:
    old = _beside(target, "old")
    if target.exists():
        target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Clear away what dead processes left; a folder that was moved aside and never replaced goes back."""
    if not target.parent.is_dir():
        return
    for kind in ("old", "tmp"):
        for left in sorted(target.parent.glob(f"{_plain(target.name)}.llmrec-{kind}-*")):
            owner = left.name.rpartition("-")[2]
            if not owner.isdigit() or _alive(int(owner)):
                continue
            if kind == "old" and not target.exists():
                left.rename(target)
            else:
                shutil.rmtree(left)


def _alive(process: int) -> bool:
    # In a container the same number comes back at every start: what this process did not make is a leftover.
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f"{target.name}.llmrec-{kind}-{os.getpid()}")


def _plain(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _unwritable(target: Path, error: OSError) -> LlmrecError:
    reason = error.strerror or str(error)
    return LlmrecError(f"the export to {target} cannot be written: {reason}; mend this, or choose another --out")
