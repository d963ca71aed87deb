"""How the command line ends where it does not end well: a paragraph for what a user can fix, a line at a signal."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from llmrec import processes, terminal
from llmrec.durable import WRITING
from llmrec.errors import ErrorKind, LlmrecError
from llmrec.progress import under_way
from llmrec.report.escape import visible

# What a user can fix: no space, no permission, a file system that is full or read-only, too many open files.
_MENDABLE: Mapping[int, ErrorKind] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE), "exhausted"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "unreadable"),
}
# Libraries that are written in Rust or C++ tell the same in words alone.
_TOLD = re.compile(
    r"os error (\d+)|No space left on device|PytorchStreamWriter failed|inline_container\.cc"
    r"|database or disk is full|^\d+ requested and \d+ written"
)
_MOST_CAUSES = 10
# Commands that go on where they were.
_RESUMED = frozenset(
    {"run", "train", "eval", "export", "rank", "predict", "augment", "refresh", "fuse", "auto", "tune", "merge"}
)
_CHECKPOINT = "checkpoint-"


def fix_of(error: BaseException) -> LlmrecError | None:
    """Return a failure as what a user can fix; None: it is a defect, and its traceback counts."""
    if isinstance(error, LlmrecError):
        return error
    seen: BaseException | None = error
    for _ in range(_MOST_CAUSES):
        if seen is None:
            return None
        number = seen.errno if isinstance(seen, OSError) and seen.errno else _errno_of(str(seen))
        if number is not None and number in _MENDABLE:
            file = (seen.filename if isinstance(seen, OSError) else None) or _written(error)
            where = f" ({file})" if file else ""
            return LlmrecError(
                f"{os.strerror(number)}{where}; fix this and run the same command again: it resumes where it stopped",
                kind=_MENDABLE[number],
                at=str(file) if file else None,
            )
        seen = seen.__cause__ or seen.__context__
    return None


def _written(error: BaseException) -> str | None:
    """Return the file or folder that was written when an error came, where somebody noted it."""
    seen: BaseException | None = error
    for _ in range(_MOST_CAUSES):
        if seen is None:
            return None
        for note in getattr(seen, "__notes__", ()):
            if note.startswith(WRITING):
                return str(note.removeprefix(WRITING))
        seen = seen.__cause__ or seen.__context__
    return None


def _errno_of(text: str) -> int:
    """Return the error number that a message names; 0: none."""
    told = _TOLD.search(text)
    if told is None:
        return 0
    return int(told[1]) if told[1] else errno.ENOSPC


@contextmanager
def told_of_signals() -> Iterator[None]:
    """Say one line at SIGINT and SIGTERM; the exit codes are 130 and 143.

    SIGINT unwinds what runs, so that engines are closed, and a second one ends at once. SIGTERM ends at once: whatever
    was not yet stored is made again, as after any kill.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:  # a fork that inherited this
            os.kill(os.getpid(), number)
            return
        if not processes.rank():
            os.write(_error_stream(), last_line(sys.argv[1:], ended=number != signal.SIGINT).encode())
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        os._exit(128 + number)

    # A shell that starts a job in the background has it ignore SIGINT.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_line(words: list[str], *, ended: bool = True) -> str:
    """Say what a command was at, what of its work is kept, and which command goes on with it.

    Args:
        words: The command line, without the program.
        ended: Whether the process ends now; where it does not, `llmrec auto` says itself how it goes on.
    """
    command = next((word for word in words if not word.startswith("-")), "")
    if command == "auto" and not ended:
        return "\n"
    said = " ".join(filter(None, ("stopped", _at())))
    if command not in _RESUMED:
        return f"\n{said}\n"
    folder = terminal.folder()
    kept = _kept(folder) if folder is not None else []
    what = f"; kept in {visible(str(folder))}: {', '.join(kept)}" if kept else ""
    return f"\n{said}{what}\nthe same command resumes: {visible(shlex.join(['llmrec', *words]))}\n"


def _at() -> str:
    """Return which pieces of work were under way, and how far the innermost was."""
    found = under_way()
    names = " / ".join(dict.fromkeys(bar.name for bar in found))
    reached = found[-1].reached() if found else ""
    return visible(f"at {names}{f', {reached}' if reached else ''}") if found else ""


def _kept(folder: Path) -> list[str]:
    """Return what of a run or a suite is stored in its folder."""
    trained = (folder / "train.json").is_file()
    steps = [int(path.name.removeprefix(_CHECKPOINT)) for path in folder.glob(f"checkpoints/{_CHECKPOINT}*[0-9]")]
    rows = sum(1 for _ in folder.glob("rows/*.json"))
    found = ["the tuned model"] if trained else [f"training up to step {max(steps)}"] if steps else []
    found += [f"{rows} finished {'row' if rows == 1 else 'rows'}"] if rows else []
    return found + (["every answer so far"] if (folder / "answers.sqlite").is_file() else [])


def _error_stream() -> int:
    try:
        return terminal.err().fileno()
    except (OSError, ValueError):  # in a notebook
        return 2
